"""A run that is killed and started again, as often as it takes, ends as one that never was."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
from processes import ended, wait_until
from runs import Run

from mesh_transformer.checkpoints import layout

TOTAL = runs.KEYS["total_steps"]
SPREAD = {
    "tpu_size": 8,
    "cores_per_replica": 4,
    "zero_stage": 3,
    "gradient_accumulation_steps": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def spread(folder: Path) -> Run:
    """A run that nothing stopped: on a 2 x 4 mesh, all spread over the replicas, 2 microbatches."""
    return uninterrupted(folder, **SPREAD)


def uninterrupted(folder: Path, **keys: Any) -> Run:
    """A run that nothing stops, and of which no package has anything to say."""
    run = runs.make(folder, **keys)
    status, _, told = ended(run.train())
    assert status == 0, told
    assert told.startswith("tiny: ") and told.count("\n") == 1
    return run


def logged(run: Run, step: int) -> Callable[[], bool]:
    """Whether a step is logged from now on, which is while the second one after it is taken."""
    path, begin = run.root / "metrics.jsonl", time.time_ns()

    def since_then() -> bool:
        changed = path.exists() and path.stat().st_mtime_ns > begin
        return changed and f'{{"step": {step}, "train' in path.read_text()

    return since_then


def saved(run: Run, step: int) -> Callable[[], bool]:
    """Whether a checkpoint is complete."""
    return (run.root / "checkpoints" / f"step_{step}" / layout.MARKER).exists


def saving(run: Run, step: int, inside: str = "") -> Callable[[], bool]:
    """Whether a checkpoint being written has come as far as to hold some file, or further."""
    path = run.root / "checkpoints" / f"step_{step}.orbax-checkpoint-tmp" / inside
    return lambda: path.exists() or saved(run, step)()


def kill(run: Run, when: Callable[[], bool]) -> None:
    """Start or resume a run and kill it once something has happened."""
    process = run.train()
    assert wait_until(when, process), ended(process)
    process.kill()
    assert ended(process)[0] == -signal.SIGKILL


def kill_after(run: Run, seconds: float) -> None:
    """Start or resume a run and kill it after a time, or a few steps before its end if sooner."""
    end, ending = time.monotonic() + seconds, logged(run, TOTAL - 4)
    kill(run, lambda: time.monotonic() > end or ending())


def finish(run: Run) -> None:
    status, output, errors = ended(run.train())
    assert status == 0 and f"Trained to step {TOTAL}." in output, errors


def assert_as_if_never_stopped(run: Run, whole: Run) -> None:
    """Weights, moments, counts, data position and all that is logged but time: to the bit."""
    assert run.log() == whole.log()
    for ours, theirs in zip(run.arrays(TOTAL), whole.arrays(TOTAL), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert run.about(TOTAL)["extra"]["position"] == whole.about(TOTAL)["extra"]["position"]
    assert run.steps() == whole.steps()


@pytest.mark.slow
def test_a_run_killed_while_saving_then_stopped_in_a_step_ends_as_if_never_stopped(
    spread: Run,
) -> None:
    run = spread.but("stopped")
    kill(run, saving(run, 10, inside="state"))
    happened = logged(run, 11)
    process = run.train()
    assert wait_until(happened, process), ended(process)
    process.terminate()
    status, output, errors = ended(process)
    assert status == 128 + signal.SIGTERM
    assert "SIGTERM: stopping once a checkpoint is saved; again stops at once" in errors
    last = max(run.steps())
    assert 11 < last < TOTAL
    assert f"Stopped at step {last}, which is saved. To go on from the newest" in output
    finish(run)
    assert_as_if_never_stopped(run, spread)


@pytest.mark.thorough
def test_a_run_whose_newest_checkpoint_is_damaged_ends_as_if_it_had_not_been(spread: Run) -> None:
    """The one before is taken, and what was logged after that is logged anew."""
    run = spread.but("damaged")
    happened = logged(run, 13)
    process = run.train()
    assert wait_until(happened, process), ended(process)
    process.terminate()
    ended(process)
    last = max(run.steps())
    newest = run.root / "checkpoints" / f"step_{last}"
    manifest = newest / "state" / "manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    status, _, errors = ended(run.train())
    assert status == 0, errors
    assert f"{newest} is damaged: state/manifest.ocdbt (changed)" in errors
    aside = newest.with_name(f"damaged_step_{last}")
    assert f"It is set aside in {aside}; going on from step 10 instead" in errors
    shutil.rmtree(aside)
    assert_as_if_never_stopped(run, spread)


@pytest.mark.slow
def test_a_run_killed_at_every_kind_of_moment_ends_as_if_never_stopped(tmp_path: Path) -> None:
    whole = uninterrupted(tmp_path, **SPREAD | {"zero_stage": 2})
    run = whole.but("killed")
    some = random.Random(os.environ.get("KILL_SEED", "0")).uniform
    kill_after(run, some(0, 2))  # as programs start
    kill(run, logged(run, 3))  # before there is a checkpoint
    kill(run, saving(run, 5))  # as the first one begins
    kill(run, saving(run, 10, inside="about"))  # arrays under way
    kill(run, saving(run, 10, inside="files.json"))  # all written, not yet committed
    kill(run, saved(run, 15))  # just committed, the superseded one about to go
    kill(run, logged(run, 18))  # in a step
    kill(run, logged(run, 24))  # just validated
    kill_after(run, some(2, 8))  # anywhere
    finish(run)
    assert_as_if_never_stopped(run, whole)
