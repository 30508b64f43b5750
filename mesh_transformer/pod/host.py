"""One process of a pod: it joins the others, then holds a worker over the devices of all of them.

A driver calls these methods in the same order on every host, with the same arguments, as JAX
demands of the processes of one program. Every result is plain data; arrays stay on the devices.
"""

from __future__ import annotations

import logging
import os
import pathlib
import platform
import socket
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer import __version__, storage
from mesh_transformer.config import ConfigWarning, parse
from mesh_transformer.errors import UserError
from mesh_transformer.session import Evaluation, Generation, Position, Restored, Sampling

_COMPILED = "~/.cache/mesh_transformer/compiled"  # programs, for hosts that start again


class HostInfo(NamedTuple):
    """What a host is.

    Attributes:
        name: Host name and process id, for messages.
        address: IP address and a free port of it, for a coordinator.
        version: Of this library.
        python: Version of the interpreter.
    """

    name: str
    address: str
    version: str
    python: str


class Devices(NamedTuple):
    """The devices of all hosts together.

    Attributes:
        n: How many.
        kind: Their `jax.Device.device_kind`.
        n_parameters: Weights of the model, each counted once.
    """

    n: int
    kind: str
    n_parameters: int


def appears(path: str, seconds: float) -> bool:
    """Whether there is a file, or comes to be: file systems on a network may tell of it late."""
    end = time.monotonic() + seconds
    while not storage.exists(path):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


class Host:
    """One process of a pod. Until `join` it only says who it is and what it sees."""

    def __init__(self, address: str) -> None:
        """Begin to listen to calls.

        Args:
            address: IP address at which the other hosts reach this one.
        """
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        # Gloo greets its peers there, once for each group of them.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        self._address = address
        self._before: Mapping[str, Any] | None = None

    def info(self) -> HostInfo:
        """Say who this is; the address has a port that is free now."""
        with socket.socket() as probe:
            probe.bind((self._address, 0))
            port = probe.getsockname()[1]
        return HostInfo(
            name=f"{platform.node()} (process {os.getpid()})",
            address=f"{self._address}:{port}",
            version=__version__,
            python=platform.python_version(),
        )

    def mark(self, path: str) -> None:
        """Write a small file for the other hosts to see.

        Raises:
            UserError: It cannot be written.
        """
        try:
            storage.write_text_atomically(path, "")
        except OSError as error:
            raise UserError(f"{platform.node()} cannot write to model_dir: {error}") from error

    def sees(self, path: str, seconds: float) -> bool:
        """Whether the file that another host has written is there, or comes in time."""
        return appears(path, seconds)

    def unmark(self, path: str) -> None:
        """Take away what `mark` wrote."""
        os.unlink(path)

    def join(
        self,
        flat_config: Mapping[str, Any],
        *,
        coordinator: str,
        n_hosts: int,
        index: int,
        seconds: int,
        heartbeat_seconds: int,
        environment: Mapping[str, str],
    ) -> Devices:
        """Join the other hosts, and make the mesh of all devices, the steps and the checkpoints.

        Args:
            coordinator: Address of the host with index 0, with a port that no attempt used before.
            seconds: After which a host that is missing is given up.
            heartbeat_seconds: After which a host that went silent ends all the others.
            environment: Variables that the accelerator's runtime is to find when JAX starts it.

        Raises:
            UserError: The devices do not fit the configuration.
        """
        os.environ.update(environment)
        import jax

        warnings.simplefilter("ignore", ConfigWarning)  # the driver has shown them
        config = parse(flat_config)
        if index == 0:
            logging.getLogger("mesh_transformer").setLevel(logging.INFO)
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            cache = str(pathlib.Path(_COMPILED).expanduser())
            jax.config.update("jax_compilation_cache_dir", cache)
        if n_hosts > 1:  # one alone reduces over its devices in memory, which is faster
            jax.distributed.initialize(
                coordinator,
                n_hosts,
                index,
                initialization_timeout=seconds,
                coordinator_bind_address=coordinator if index == 0 else None,
                heartbeat_timeout_seconds=heartbeat_seconds,
            )
        from mesh_transformer.checkpoints.native import Checkpoints
        from mesh_transformer.pod.devices import host_devices
        from mesh_transformer.pod.worker import Worker

        devices = host_devices(config, n_hosts)
        about = config.checkpoint
        self._checkpoints = Checkpoints(
            about.root, keep_n=about.keep_n, keep_every=about.keep_every
        )
        self._worker = Worker(config, devices, self._checkpoints)
        return Devices(len(devices), devices[0].device_kind, self._worker.n_parameters)

    def train(
        self, tokens_ABT1: np.ndarray, mask_ABT: np.ndarray | None
    ) -> dict[str, float] | None:
        """Begin an optimizer step, and return the metrics of the one before.

        So the devices have a step to work at while the metrics travel and the next tokens come.
        """
        before = self._before
        self._before = self._worker.train(tokens_ABT1, mask_ABT)
        return None if before is None else _numbers(before)

    def settle(self) -> dict[str, float] | None:
        """Wait for the step that was begun last, and return its metrics."""
        before, self._before = self._before, None
        return None if before is None else _numbers(before)

    def evaluate(self, tokens_BT1: np.ndarray, mask_BT: np.ndarray | None) -> Evaluation:
        """Score tokens with the current weights."""
        return self._worker.evaluate(tokens_BT1, mask_BT)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int
    ) -> Generation:
        """Continue each prompt by up to `max_new_tokens` tokens."""
        return self._worker.generate(prompts, sampling, max_new_tokens)

    def save(self, step: int, position: Position) -> None:
        """Begin to write a checkpoint; each host writes its part."""
        self._worker.save(step, position)

    def restore(self, step: int | None) -> Restored | None:
        """Load the newest (or the given) checkpoint."""
        return self._worker.restore(step)

    def latest(self) -> int | None:
        """Give the step of the newest complete checkpoint; None if there is none."""
        return self._checkpoints.latest()

    def tune_from(self, path: str, fresh_opt: bool) -> None:
        """Take the weights of another run, to train on from step 0."""
        self._worker.tune_from(path, fresh_opt=fresh_opt)

    def clear(self) -> None:
        """Give up every checkpoint, so that training can start over."""
        self._checkpoints.clear()

    def close(self) -> None:
        """Wait for a save under way, and leave the other hosts."""
        import jax

        self._checkpoints.close()
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    from mesh_transformer.training.memory import memory_for

    with memory_for("a step"):
        return {name: float(value) for name, value in metrics.items()}
