"""Native checkpoints: asynchronous, atomic, sharded, restored into whatever mesh is asked for.

    with Checkpoints("runs/mine", keep_n=3, keep_every=1000) as checkpoints:
        checkpoints.save(300, state, {"config": config.to_flat(), "position": position})
        state, extra = checkpoints.restore(checkpoints.latest(), target)

Orbax writes and reads the arrays, each process its own part of them. Which steps there are, which
stay and which go is decided here, from what is on disk and nothing else; `layout` has the files.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mesh_transformer import storage
from mesh_transformer.checkpoints import layout, reading, retention
from mesh_transformer.checkpoints.fingerprint import fingerprints
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.reading import locate, read_extra, restore, restore_params
from mesh_transformer.errors import InUse

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "locate",
    "read_extra",
    "restore",
    "restore_params",
]

_CHUNK_BYTES = 128 * 2**20  # bounds what must be fetched to read part of an array
_FILE_BYTES = 2**30  # when Orbax begins another file of arrays
_NOTICE_SECONDS = 60.0  # between lines that say that a save is waited for

_logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run: saved in the background, the superseded ones deleted.

    Use it in a `with` block, or call `close`: a save that is still under way when the interpreter
    exits is lost. One run at a time may write under a root: on a local disk another is refused,
    in a bucket nothing tells them apart. Readers may come and go. In a multi-host run every process
    calls every method, in the same order.
    """

    def __init__(self, root: str, *, keep_n: int = 3, keep_every: int | None = None) -> None:
        """Take over `root/checkpoints` and remove what a killed run left unfinished there.

        Args:
            root: The run's folder or gs:// URL; made if absent.
            keep_n: How many of the newest checkpoints to keep.
            keep_every: Also keep every step that is a multiple of this.

        Raises:
            CheckpointError: Another process has taken the root over and lives.
        """
        retention.superseded([], keep_n=keep_n, keep_every=keep_every)
        self._keep_n = keep_n
        self._keep_every = keep_every
        self._folder = layout.absolute(root) / "checkpoints"
        self._folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as lock:
            if not storage.is_remote(root) and jax.process_index() == 0:
                lock.enter_context(_alone(root, self._folder))
            self._remove_unfinished()
            _all_processes("unfinished removed")
            self._writer = self._make_writer()
            self._lock = lock.pop_all()
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._being_written = self._folder
        self._pending: tuple[int, float, concurrent.futures.Future[None]] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint; return once the arrays are copied to host memory.

        Waits for the save before it, and raises if that one failed.

        Args:
            step: Names the folder; newer than every checkpoint there is.
            state: A pytree of jax arrays. They may be donated as soon as this returns.
            extra: JSON-able; `read_extra` gives it back.

        Raises:
            CheckpointError: The save before failed, or there is a checkpoint as new as this one.
        """
        self.wait()
        folder = self._step_folder(step)
        newest = self.latest()
        if newest is not None and newest >= step:
            raise CheckpointError(
                f"{folder} cannot be saved beside step {newest}: a resumed run would take the newer"
                f" one; call delete_after({step - 1}) to give up what is newer, or save elsewhere"
            )
        arrays = layout.by_path(state)
        others = [path for path, leaf in arrays.items() if not isinstance(leaf, jax.Array)]
        if others:
            raise CheckpointError(f"only jax arrays can be saved; these are not: {others}")
        about = {  # copied by way of JSON: the caller may change its own while this is written
            "step": step,
            "format_version": layout.FORMAT_VERSION,
            "fingerprints": fingerprints(arrays),
            "extra": extra,
        }
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(
                arrays,
                save_args=dict.fromkeys(arrays, ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)),
                ocdbt_target_data_file_size=_FILE_BYTES,
            ),
            about=ocp.args.JsonSave(json.loads(json.dumps(about))),
        )
        self._being_written = layout.being_written(folder)
        begun = time.monotonic()
        with layout.named_errors(f"saving step {step} to {folder} failed"):
            self._writer.save(folder, args=items, force=True)
        self._pending = (step, begun, self._background.submit(self._commit))

    def wait(self) -> None:
        """Block until the save under way is committed; raise CheckpointError if it failed.

        While it takes, a line a minute says so: a disk or a bucket that hangs is not waited for in
        silence.
        """
        if self._pending is None:
            return
        step, begun, committed = self._pending
        while concurrent.futures.wait([committed], _NOTICE_SECONDS).not_done:
            seconds = time.monotonic() - begun
            message = "still saving the checkpoint of step %d to %s (%.0f s so far)"
            _logger.info(message, step, self._folder.parent, seconds)
        error = committed.exception()
        self._pending = None
        if error is not None:
            folder = self._step_folder(step)
            with contextlib.suppress(OSError):  # what stays is removed by the next run's start
                self._remove_unfinished()
            raise CheckpointError(
                f"saving step {step} to {folder} failed: {layout.reason(error)}"
            ) from error

    def close(self) -> None:
        """As `wait`; then end the background threads. The object cannot save any more."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._writer.close()
            self._lock.close()

    def steps(self) -> list[int]:
        """List the steps of all complete checkpoints, oldest first."""
        return layout.steps(self._folder)

    def latest(self) -> int | None:
        """Give the newest complete checkpoint's step; None if there is none."""
        return layout.latest(self._folder)

    def delete_after(self, step: int) -> None:
        """Give up every checkpoint newer than `step`, so that training can go on from there."""
        self.wait()
        self._delete([newer for newer in reversed(self.steps()) if newer > step])
        _all_processes("deleted")

    def clear(self) -> None:
        """Give up every checkpoint, so that training can start over."""
        self.delete_after(-1)

    def restore(
        self, step: int, target: Any, *, config: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Read the checkpoint of a step as `target`; see the function `restore`."""
        return reading.restore(self._existing(step), target, config=config)

    def restore_params(
        self, step: int, target_params: Any, *, config: Mapping[str, Any] | None = None
    ) -> Any:
        """Read the weights of a step alone; see the function `restore_params`."""
        return reading.restore_params(self._existing(step), target_params, config=config)

    def read_extra(self, step: int) -> dict[str, Any]:
        """Give back the `extra` that the checkpoint of a step was saved with."""
        return reading.read_extra(self._existing(step))

    def _step_folder(self, step: int) -> epath.Path:
        return layout.step_folder(self._folder, step)

    def _existing(self, step: int) -> str:
        self.wait()
        folder = self._step_folder(step)
        if not layout.is_complete(folder):
            raise CheckpointError(f"{folder} is not a checkpoint; there are steps {self.steps()}")
        return str(folder)

    def _commit(self) -> None:
        self._writer.wait_until_finished()
        old = retention.superseded(self.steps(), keep_n=self._keep_n, keep_every=self._keep_every)
        try:
            self._delete(old)
        except OSError as error:
            _logger.warning("superseded checkpoints %s are not all deleted: %s", old, error)

    def _delete(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                layout.delete(self._step_folder(step))

    def _remove_unfinished(self) -> None:
        if jax.process_index() == 0:
            for folder in layout.unfinished(self._folder):
                _logger.warning("removing %s, which was never finished", folder)
                layout.delete(folder)

    def _make_writer(self) -> ocp.AsyncCheckpointer:
        mode = ocp.options.AtomicityMode
        in_place = storage.is_remote(str(self._folder))
        atomicity = ocp.options.AtomicityOptions(
            mode=mode.COMMIT_FILE if in_place else mode.ATOMIC_RENAME
        )
        asynchrony = ocp.options.AsyncOptions(
            # In the foreground, so that what fails is raised at once and not after a timeout.
            create_directories_asynchronously=False,
            # Called when all hosts have written and before the commit.
            post_finalization_callback=lambda: layout.list_files(self._being_written),
        )
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(
                async_options=asynchrony, atomicity_options=atomicity
            ),
            state=layout.state_handler(),
            about=layout.about_handler(),
        )
        return ocp.AsyncCheckpointer(handler, async_options=asynchrony, atomicity_options=atomicity)


@contextlib.contextmanager
def _alone(root: str, folder: epath.Path) -> Iterator[None]:
    """Keep other processes out of a folder, until the `with` block ends or this process dies.

    The lock is on the folder itself: no file is left, and what this process starts inherits none.
    """
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InUse(
                f"another process trains in {root}: end it, or set another model_dir"
            ) from error
        yield
    finally:
        os.close(held)


def _all_processes(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"checkpoints: {what}")
