"""Real runs of a tiny model: its data and configuration, its commands and what they leave."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import IO, Any, NamedTuple

import jax
import numpy as np
import pytest
from processes import Ended, ended, wait_until

import create_finetune_tfrecords
from mesh_transformer import config, metrics_file
from mesh_transformer.checkpoints import native
from mesh_transformer.errors import run_command
from mesh_transformer.pod import worker
from mesh_transformer.pod.worker import Worker
from mesh_transformer.training.steps import make_steps

ROOT = Path(__file__).parent.parent
SEQ = 16

KEYS: dict[str, Any] = {
    "layers": 1,
    "d_model": 16,
    "n_heads": 4,
    "n_vocab": 264,
    "seq": SEQ,
    "tokenizer": "bytes",
    "compute_dtype": "float32",
    "per_replica_batch": 2,
    "warmup_steps": 2,
    "anneal_steps": 30,
    "lr": 1e-2,
    "end_lr": 1e-3,
    "weight_decay": 0.1,
    "total_steps": 40,
    "val_batches": 2,
    "val_every": 4,
    "ckpt_every": 5,
    "keep_every": 10,
    "keep_n": 2,
    "name": "tiny",
}


class Run(NamedTuple):
    """A run in a folder of its own.

    Attributes:
        config: Its configuration file.
        root: Its model_dir.
        cache: Where compiled programs are kept, so that only the first process compiles.
    """

    config: Path
    root: Path
    cache: Path

    def keys(self) -> dict[str, Any]:
        keys: dict[str, Any] = json.loads(self.config.read_text())
        return keys

    def but(self, name: str, folder: Path | None = None, **keys: Any) -> Run:
        """Another run on the same data, with other keys; beside this one or in another folder."""
        root = (folder or self.root.parent) / name
        path = root.with_suffix(".json")
        path.write_text(json.dumps(self.keys() | {"model_dir": str(root)} | keys))
        return Run(path, root, self.cache)

    def train(self, *flags: str) -> subprocess.Popen[str]:
        """Start `device_train.py` in a process of its own."""
        return self.start("device_train.py", "--config", str(self.config), *flags)

    @property
    def variables(self) -> dict[str, str]:
        """Environment of its processes: CPU devices, and programs that are compiled once."""
        return {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(
        self,
        script: str,
        *arguments: str,
        folder: Path = ROOT,
        output: int | IO[str] = PIPE,
        **variables: str,
    ) -> subprocess.Popen[str]:
        """Start a script of the repository, or a copy of it in another folder."""
        return subprocess.Popen(
            [sys.executable, str(folder / script), *arguments],
            env=os.environ | self.variables | variables,
            text=True,
            stdout=output,
            stderr=output,
        )

    def drive(self, *flags: str, folder: Path = ROOT) -> subprocess.Popen[str]:
        """Start `train.py`, on two hosts of this machine unless flags say otherwise.

        What it says is added to a file: Ray may tell more than a pipe holds that nobody reads.
        """
        flags = ("--config", str(self.config), *(flags or ("--hosts", "2")))
        with self._told.open("a") as output:
            return self.start("train.py", *flags, folder=folder, output=output)

    @property
    def _told(self) -> Path:
        return self.config.with_suffix(".told")

    def told(self) -> str:
        """What every `train.py` of this run has said."""
        return self._told.read_text()

    def ended(self, process: subprocess.Popen[str]) -> Ended:
        """Wait for `train.py`; what it told is what every one of this run has said."""
        status = ended(process).status
        return Ended(status, "", self.told())

    def reach(self, process: subprocess.Popen[str], step: int) -> None:
        """Wait until a step is logged."""
        assert wait_until(lambda: self.logged(step), process), self.told()

    def logged(self, step: int) -> bool:
        """Whether a step's metrics are in the log."""
        path = self.root / metrics_file.NAME
        return path.exists() and f'"step": {step},' in path.read_text()

    def assert_ends_as(self, other: Run) -> None:
        """Check that the last weights, moments and every logged number are those of another run."""
        assert self.log() == other.log()
        step = self.keys()["total_steps"]
        for mine, theirs in zip(self.arrays(step), other.arrays(step), strict=True):
            assert mine.tobytes() == theirs.tobytes()

    def log(self) -> list[dict[str, Any]]:
        """What is logged, but for times."""
        return [
            {key: value for key, value in line.items() if key not in metrics_file.TIMING}
            for line in metrics_file.read(str(self.root))
        ]

    def arrays(self, step: int) -> list[np.ndarray]:
        """Weights, Adam's moments and counts of a checkpoint."""
        worker = Worker(config.load(self.config), jax.devices()[: self.keys().get("tpu_size", 1)])
        folder = str(self.root / "checkpoints" / f"step_{step}")
        state, _ = native.restore(folder, worker.steps.state)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]

    def about(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        path = self.root / "checkpoints" / f"step_{step}" / "about" / "about.json"
        about: dict[str, Any] = json.loads(path.read_text())
        return about

    def steps(self) -> list[int]:
        """The steps that have a checkpoint; nothing else lies beside them."""
        found = (self.root / "checkpoints").iterdir()
        return sorted(int(path.name.removeprefix("step_")) for path in found)


def make(folder: Path, **keys: Any) -> Run:
    """Make data by the command for it, from text that every machine has, and a configuration."""
    for name, module in (("train", json.decoder), ("val", json.encoder)):
        text = folder / f"{name}.txt"
        text.write_text(inspect.getsource(module), encoding="utf-8")
        create_finetune_tfrecords.main(
            [
                *(str(text), name, "--output-dir", str(folder)),
                *("--tokenizer", "bytes", "--seq", str(keys.get("seq", SEQ)), "--workers", "1"),
            ]
        )
    sets = {"train_set": str(folder / "train.index"), "val_set": {"v": str(folder / "val.index")}}
    path = folder / "run.json"
    path.write_text(json.dumps(KEYS | sets | {"model_dir": str(folder / "run")} | keys))
    return Run(path, folder / "run", folder / "compiled")


def called(
    capsys: pytest.CaptureFixture[str], main: Callable[[], int], *arguments: str, **options: str
) -> Ended:
    """Run the main function of a script in this process, as the script would in its own."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(sys, "argv", ["script.py", *arguments])
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)
        patch.setattr(logging.root, "handlers", logging.root.handlers[:])
        run_command(main, **options)
    code, (output, told) = exit_.value.code, capsys.readouterr()
    if isinstance(code, str):  # printed to standard error when a process ends by it
        return Ended(1, output, f"{told}{code}\n")
    return Ended(code or 0, output, told)


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Let all runs of one model in this process share compiled steps."""
    made: dict[Any, Any] = {}

    def shared(config: config.Config, mesh: jax.sharding.Mesh) -> Any:
        key = (config.model, config.mesh, config.optimizer, config.batch, mesh)
        return made.setdefault(key, make_steps(config, mesh))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "make_steps", shared)
        yield
