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
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mesh_transformer import storage
from mesh_transformer.checkpoints import layout, reading, retention
from mesh_transformer.checkpoints.fingerprint import fingerprints
from mesh_transformer.checkpoints.layout import CheckpointError, Damaged
from mesh_transformer.checkpoints.reading import locate, read_extra, restore, restore_params

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Damaged",
    "locate",
    "read_extra",
    "restore",
    "restore_params",
]

_NOTICE_SECONDS = 60.0  # between lines that say that a save is waited for

_logger = logging.getLogger(__name__)

T = TypeVar("T")


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
            UserError: It is where no checkpoints can be kept, or refuses to be listed.
        """
        retention.check_kept(root)
        retention.superseded([], keep_n=keep_n, keep_every=keep_every)
        self._keep_n = keep_n
        self._keep_every = keep_every
        self._folder = layout.absolute(root) / "checkpoints"
        layout.make_folder(self._folder)
        with contextlib.ExitStack() as lock:
            if not storage.is_remote(root) and jax.process_index() == 0:
                taken = f"another process trains in {root}: end it, or set another model_dir"
                lock.enter_context(storage.alone(str(self._folder), taken))
            self._remove_unfinished()
            _all_processes("unfinished removed")
            self._writer = layout.make_writer(
                self._folder, lambda: layout.list_files(self._being_written)
            )
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
                save_args={
                    path: layout.save_args(path, leaf.shape, leaf.dtype)
                    for path, leaf in arrays.items()
                },
                ocdbt_target_data_file_size=layout.FILE_BYTES,
            ),
            about=ocp.args.JsonSave(json.loads(json.dumps(about))),
        )
        self._being_written = layout.being_written(folder)
        begun = time.monotonic()
        with layout.named_errors(f"saving step {step} to {folder} failed", writing=True):
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
            with contextlib.suppress(
                OSError, storage.StorageError
            ):  # what stays is removed by the next run's start
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

    def newest_sound(self, read: Callable[[int], T]) -> T | None:
        """Read the newest checkpoint, or the newest that is not damaged.

        Those found damaged on the way are set aside, with a warning, but for the last that there
        is: a run that cannot go on must not begin anew unasked.

        Args:
            read: Reads a step, and raises Damaged on all processes or on none.

        Returns:
            What `read` does; None if there is no checkpoint.

        Raises:
            Damaged: So are all that there are.
        """
        while (step := self.latest()) is not None:
            try:
                return read(step)
            except Damaged as error:
                earlier = self.steps()[:-1]
                if not earlier:
                    raise
                place = self._set_aside(step)
                message = "%s\n  It is set aside in %s; going on from step %d instead"
                _logger.warning(message, error, place, earlier[-1])
        return None

    def _set_aside(self, step: int) -> str:
        folder = self._step_folder(step)
        _all_processes("about to set aside")  # or some might still look at what others rename
        place = layout.set_aside(folder) if jax.process_index() == 0 else str(folder)
        _all_processes("set aside")
        return place

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
        folder = self._existing(step)
        with reading.agreed(folder):
            return reading.read_extra(folder)

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
        except (OSError, storage.StorageError) as error:
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


def _all_processes(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"checkpoints: {what}")
