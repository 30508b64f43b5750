"""Outside viewers of a run's metrics: TensorBoard event files and Weights & Biases.

Every tracker is given the same names and values as the metrics log. A tracker that cannot start
stops the run with a `TrackerError` that says what to do; it is never left out in silence.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import socket
import struct
import tempfile
import time
from collections.abc import Mapping
from typing import Protocol

from mesh_transformer import storage
from mesh_transformer.config import Config
from mesh_transformer.errors import UserError
from mesh_transformer.records import field, framed, varint


class TrackerError(UserError):
    """Raised when a tracker that the configuration asks for cannot start."""


class Tracker(Protocol):
    """Somewhere that scalars are sent to as the run goes."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Send the scalars of a step."""
        ...

    def flush(self) -> None:
        """Make what was written so far durable where the tracker keeps it."""
        ...

    def close(self) -> None:
        """End the run there."""
        ...


def start(config: Config, step: int) -> list[Tracker]:
    """Start the trackers that a run asks for.

    Args:
        config: The run; its `trackers`, where it is kept, and what W&B calls it.
        step: The step that the run goes on from; 0 begins a new one.

    Raises:
        TrackerError: A package is missing or a service refuses.
    """
    root = config.checkpoint.root
    started: list[Tracker] = []
    with contextlib.ExitStack() as stack:
        for name in config.run.trackers:
            if name == "tensorboard":
                started.append(TensorBoard(storage.join(root, "tensorboard"), step))
            else:
                started.append(WandB(config, step))
            stack.callback(started[-1].close)
        stack.pop_all()
    return started


class WandB:
    """Weights & Biases; a resumed run goes on under the id kept in the run's folder."""

    def __init__(self, config: Config, step: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise TrackerError(
                'trackers: "wandb" needs a package: pip install -e ".[wandb]" -c constraints.txt'
            ) from error
        root = config.checkpoint.root
        id_path = storage.join(root, "wandb_id.txt")
        if step and storage.exists(id_path):
            run_id = storage.read_text(id_path).strip()
        else:
            run_id = secrets.token_hex(4)
            storage.write_text_atomically(id_path, run_id + "\n")
        folder = tempfile.gettempdir() if storage.is_remote(root) else root
        try:
            self._run = wandb.init(
                project=config.run.wandb_project,
                name=config.run.name,
                notes=config.run.comment or None,
                id=run_id,
                resume="allow",
                config=config.to_flat(),
                dir=folder,
            )
        except wandb.errors.Error as error:
            raise TrackerError(
                f"trackers: W&B did not start: {error}. Log in with `wandb login`, or set "
                "WANDB_MODE=offline to keep the run on this machine"
            ) from error
        # W&B's own step never goes back, a resumed run does: plot over our step instead.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Send the scalars of a step."""
        self._run.log({"step": step, **scalars})

    def flush(self) -> None:
        """Do nothing: W&B's own process sends as it can."""

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


class TensorBoard:
    """TensorBoard event files, written as the format is: no package is needed to write them.

    A file is a sequence of TFRecord frames, each an `Event` of tensorflow/core/util/event.proto. An
    event with a SessionLog START tells TensorBoard to forget what it knows from that step on, so a
    resumed run draws one line.
    """

    def __init__(self, folder: str, step: int) -> None:
        self._folder = folder
        self._name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        local = folder
        if storage.is_remote(folder):
            self._scratch = tempfile.TemporaryDirectory(prefix="mesh-transformer-")
            local = self._scratch.name
        self._local = storage.join(local, self._name)
        self._file = storage.open(self._local, "wb")
        self._append(field(3, b"brain.Event:2"))
        self._append(_int_field(2, step + 1) + field(7, _int_field(1, 1)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of a step as one event."""
        summary = b"".join(
            field(1, field(1, tag.encode()) + _float_field(2, value))
            for tag, value in scalars.items()
        )
        self._append(_int_field(2, step) + field(5, summary))
        self._file.flush()

    def flush(self) -> None:
        """Put the file of a remote run in its bucket; a local one is up to date."""
        if self._scratch is not None:
            data = storage.read_bytes(self._local)
            storage.write_bytes_atomically(storage.join(self._folder, self._name), data)

    def close(self) -> None:
        """Flush and close the file."""
        self.flush()
        self._file.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def _append(self, event: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + event
        self._file.write(framed([event])[0])


_FLOAT32_MAX = 3.4028234663852886e38


def _int_field(tag: int, number: int) -> bytes:
    return varint(tag << 3) + varint(number)


def _float_field(tag: int, number: float) -> bytes:
    if abs(number) > _FLOAT32_MAX:
        number = math.copysign(math.inf, number)
    return varint(tag << 3 | 5) + struct.pack("<f", number)
