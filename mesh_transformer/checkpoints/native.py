"""Native checkpoints: asynchronous, atomic, sharded, restored into whatever mesh is asked for.

A run's checkpoints lie under `RUN/checkpoints`, a local folder or a gs:// URL; this module owns
that folder and removes from it what is unfinished.

    RUN/checkpoints/step_300/
        commit_success.txt   the last file to be written: without it the folder is not a checkpoint
        about.json           folder; its `about.json` holds step, format version and `extra`
        state/               arrays by path (`params/...`, `opt_state/...`, `step`), OCDBT + Zarr 3
        _CHECKPOINT_METADATA Orbax's own notes (times, handlers)
    RUN/checkpoints/step_400.orbax-checkpoint-tmp/   being written (local folders only)

On a local disk a checkpoint is written beside its place and renamed, on gs:// it is written in
place and the marker comes last; both leave the same files, so a step folder copied with `cp -r`,
`gsutil cp -r` or `rsync` in either direction is a checkpoint wherever it lands. Deleting takes the
marker away first: a process killed half-way leaves a folder that nobody takes for a checkpoint.

Orbax writes and reads the arrays (`AsyncCheckpointer`); which steps there are, which stay and
which go is decided here, from what is on disk and nothing else.
"""

from __future__ import annotations

import concurrent.futures
import logging
import re
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mesh_transformer.checkpoints import retention

FORMAT_VERSION = 1

_MARKER = "commit_success.txt"
_STEP_FOLDER = re.compile(r"step_(\d+)")
_UNFINISHED_FOLDER = re.compile(r"step_\d+(\.orbax-checkpoint-tmp.*)?")
_CHUNK_BYTES = 128 * 2**20  # bounds what a read of a part of an array has to fetch
_FILE_BYTES = 2**30  # size at which Orbax begins a new file of arrays
_MIN_READ_GB = 16  # arrays in flight while restoring; more only if one array alone is larger
_SAVE_TIMEOUT_S = 3600

_logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or cannot be read as what is asked for."""


class Checkpoints:
    """The checkpoints of one run: saved in the background, the superseded ones deleted.

    Every process of a multi-host run calls every method, in the same order. One run at a time may
    write under `root`; readers may come and go.
    """

    def __init__(self, root: str, *, keep_n: int = 3, keep_every: int | None = None) -> None:
        """Take over `root/checkpoints`, removing what earlier runs left unfinished.

        Args:
            root: The run's folder or gs:// URL; made if absent.
            keep_n: How many of the newest checkpoints to keep.
            keep_every: Also keep every step that is a multiple of this.
        """
        retention.superseded([], keep_n=keep_n, keep_every=keep_every)
        self._keep_n = keep_n
        self._keep_every = keep_every
        self._folder = epath.Path(root) / "checkpoints"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        self._writer = _writer()
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint; return once the arrays are copied to host memory.

        Waits for the save before it, and raises if that one failed.

        Args:
            step: Names the folder; must not exist as a complete checkpoint.
            state: A pytree of jax arrays. They may be donated as soon as this returns.
            extra: JSON-able; read back by `read_extra`.
        """
        self.wait()
        folder = self._step_folder(step)
        if _is_complete(folder):
            raise CheckpointError(
                f"{folder} exists already and is complete; call delete_after({step - 1}) first to"
                " give up that step and all later ones"
            )
        arrays = _by_path(state)
        about = {"step": step, "format_version": FORMAT_VERSION, "extra": dict(extra)}
        self._writer.save(
            folder,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(
                    arrays,
                    save_args={path: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for path in arrays},
                    ocdbt_target_data_file_size=_FILE_BYTES,
                ),
                about=ocp.args.JsonSave(about),
            ),
            force=True,
        )
        self._pending = (step, self._background.submit(self._commit))

    def wait(self) -> None:
        """Block until the save under way is committed; raise CheckpointError if it failed."""
        if self._pending is None:
            return
        step, committed = self._pending
        error = committed.exception()
        self._pending = None
        if error is not None:
            raise CheckpointError(
                f"saving step {step} to {self._step_folder(step)} failed: {error}"
            ) from error

    def close(self) -> None:
        """As `wait`; then release the background threads. No method may be called after it."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._writer.close()

    def steps(self) -> list[int]:
        """List the steps of all complete checkpoints, oldest first."""
        return _steps(self._folder)

    def latest(self) -> int | None:
        """Give the newest complete checkpoint's step; None if there is none."""
        return max(self.steps(), default=None)

    def delete_after(self, step: int) -> None:
        """Give up every checkpoint newer than `step`, so that a run can go on from it."""
        self.wait()
        self._delete([newer for newer in self.steps() if newer > step])

    def clear(self) -> None:
        """Give up every checkpoint, so that the run can start over."""
        self.wait()
        self._delete(self.steps())

    def restore(
        self, step: int, target: Any, *, config: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Read step `step` as `target`; see the function `restore`."""
        self.wait()
        return restore(str(self._step_folder(step)), target, config=config)

    def restore_params(
        self, step: int, target_params: Any, *, config: Mapping[str, Any] | None = None
    ) -> Any:
        """Read the weights alone of step `step`; see the function `restore_params`."""
        self.wait()
        return restore_params(str(self._step_folder(step)), target_params, config=config)

    def read_extra(self, step: int) -> dict[str, Any]:
        """Give back the `extra` that step `step` was saved with."""
        self.wait()
        return read_extra(str(self._step_folder(step)))

    def _step_folder(self, step: int) -> epath.Path:
        return self._folder / f"step_{step}"

    def _commit(self) -> None:
        self._writer.wait_until_finished()
        self._delete(
            retention.superseded(self.steps(), keep_n=self._keep_n, keep_every=self._keep_every)
        )

    def _delete(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                _delete_folder(self._step_folder(step))

    def _remove_unfinished(self) -> None:
        if jax.process_index() == 0:
            for folder in self._folder.iterdir():
                if _UNFINISHED_FOLDER.fullmatch(folder.name) and not _is_complete(folder):
                    _logger.warning("removing %s: it was never finished", folder)
                    _delete_folder(folder)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints: unfinished ones removed")


def locate(path: str) -> str | None:
    """Find the checkpoint that a path means: a step folder, or the newest one of a run.

    Args:
        path: A step folder, a run's folder, or the `checkpoints` folder in it.

    Returns:
        The step folder; None if the path holds no complete native checkpoint.
    """
    given = epath.Path(path)
    if _is_complete(given):
        return path
    for folder in (given / "checkpoints", given):
        steps = _steps(folder)
        if steps:
            return str(folder / f"step_{steps[-1]}")
    return None


def restore(
    folder: str, target: Any, *, config: Mapping[str, Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """Read a checkpoint as exactly the arrays of `target`, wherever its shardings place them.

    Args:
        folder: A step folder, in a run or copied out of it.
        target: Pytree of jax.ShapeDtypeStruct with shardings (or of arrays, for their likeness).
        config: The flat configuration that `target` follows from. If the arrays do not fit, the
            error names the keys in which the checkpoint's own configuration differs.

    Returns:
        The state, and the `extra` it was saved with.

    Raises:
        CheckpointError: Lists by path every array that is missing, not asked for, or of another
            shape or dtype. Nothing is ever cast, padded or cut.
    """
    extra = read_extra(folder)
    return _read(folder, "", target, extra, config), extra


def restore_params(
    folder: str, target_params: Any, *, config: Mapping[str, Any] | None = None
) -> Any:
    """Read the weights alone; optimizer state and step are left unread. Otherwise as `restore`."""
    return _read(folder, "params", target_params, read_extra(folder), config)


def read_extra(folder: str) -> dict[str, Any]:
    """Give back the `extra` that a checkpoint was saved with."""
    if not _is_complete(epath.Path(folder)):
        raise CheckpointError(f"{folder} is not a complete native checkpoint: it has no {_MARKER}")
    about = _about_handler().restore(epath.Path(folder) / "about")
    found = about["format_version"]
    if found > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} is of format {found}; this version of the library reads formats up to"
            f" {FORMAT_VERSION}: install a newer one"
        )
    return about["extra"]


def _read(
    folder: str,
    prefix: str,
    target: Any,
    extra: Mapping[str, Any],
    config: Mapping[str, Any] | None,
) -> Any:
    state_folder = epath.Path(folder) / "state"
    wanted = _by_path(target, prefix)
    stored = _arrays_handler().metadata(state_folder).tree
    within = {
        path: it for path, it in stored.items() if not prefix or path.startswith(prefix + "/")
    }
    problems = _differences(within, wanted)
    if problems:
        problems += _config_differences(extra.get("config"), config)
        raise CheckpointError("\n  - ".join([f"{folder} does not fit:", *problems]))
    args = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args={
            path: ocp.ArrayRestoreArgs(sharding=_sharding(it), global_shape=it.shape)
            for path, it in wanted.items()
        },
        partial_restore=True,
    )
    largest_gb = max((it.size * it.dtype.itemsize for it in wanted.values()), default=0) // 10**9
    handler = _arrays_handler(read_gb=max(_MIN_READ_GB, largest_gb + 1))
    arrays = handler.restore(state_folder, args=args)
    return jax.tree.unflatten(jax.tree.structure(target), [arrays[path] for path in wanted])


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    problems = []
    for path in sorted(stored.keys() | wanted.keys()):
        if path not in stored:
            problems.append(
                f"{path}: missing from the checkpoint, {_likeness(wanted[path])} wanted"
            )
        elif path not in wanted:
            problems.append(f"{path}: {_likeness(stored[path])} in the checkpoint, not asked for")
        elif _likeness(stored[path]) != _likeness(wanted[path]):
            problems.append(
                f"{path}: {_likeness(stored[path])} in the checkpoint,"
                f" {_likeness(wanted[path])} wanted"
            )
    return problems


def _config_differences(
    stored: Mapping[str, Any] | None, current: Mapping[str, Any] | None
) -> list[str]:
    if stored is None or current is None:
        return []
    absent = "absent"
    return [
        f"configuration key {key}: {stored.get(key, absent)} in the checkpoint,"
        f" {current.get(key, absent)} now"
        for key in sorted(stored.keys() | current.keys())
        if stored.get(key, absent) != current.get(key, absent)
    ]


def _likeness(array: Any) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _sharding(array: Any) -> jax.sharding.Sharding:
    if array.sharding is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return array.sharding


def _by_path(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a pytree to {"params/decoder/.../w": leaf}, in the order of its leaves."""
    flat = {}
    for keys, leaf in jax.tree.leaves_with_path(tree):
        path = "/".join([*([prefix] if prefix else []), *map(_key_name, keys)])
        if path in flat:
            raise CheckpointError(f"two arrays have the same path {path}")
        flat[path] = leaf
    return flat


def _key_name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def _steps(folder: epath.Path) -> list[int]:
    if not folder.is_dir():
        return []
    found = [_STEP_FOLDER.fullmatch(child.name) for child in folder.iterdir()]
    return sorted(int(m[1]) for m in found if m and _is_complete(folder / m[0]))


def _is_complete(folder: epath.Path) -> bool:
    return "tmp" not in folder.name and (folder / _MARKER).exists()


def _delete_folder(folder: epath.Path) -> None:
    (folder / _MARKER).unlink(missing_ok=True)
    folder.rmtree()


def _arrays_handler(*, read_gb: int = _MIN_READ_GB) -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(
        use_zarr3=True, use_compression=False, restore_concurrent_gb=read_gb
    )


def _about_handler() -> ocp.JsonCheckpointHandler:
    return ocp.JsonCheckpointHandler(filename="about.json")


def _writer() -> ocp.AsyncCheckpointer:
    options = ocp.options.AsyncOptions(
        timeout_secs=_SAVE_TIMEOUT_S, create_directories_asynchronously=False
    )
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(async_options=options),
        state=_arrays_handler(),
        about=_about_handler(),
    )
    return ocp.AsyncCheckpointer(handler, async_options=options)
