"""train.py as a user runs it: hosts are lost on the way, and the run ends as if none had been."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import hosts
import processes
import pytest
import runs

from mesh_transformer import metrics_file

pytest.importorskip("ray", reason="needs the extra [pods]")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A finished run of two hosts."""
    keys = {"tpu_size": 2, "zero_stage": 1, "total_steps": 20, "anneal_steps": 15}
    run = runs.make(tmp_path_factory.mktemp("train"), **keys)
    done = processes.ended(run.start("train.py", "--config", str(run.config), "--hosts", "2"))
    assert done.status == 0, done.told
    assert "Trained to step 20" in done.output and "goodput" in done.told
    assert re.search(r"^step 20/20  loss .* hosts 2  restarts 0  goodput \d", done.output, re.M)
    return run


def assert_same(run: runs.Run, other: runs.Run) -> None:
    assert run.log() == other.log()
    for mine, theirs in zip(run.arrays(20), other.arrays(20), strict=True):
        assert mine.tobytes() == theirs.tobytes()


def logged(run: runs.Run, step: int) -> bool:
    """Whether a step's metrics are in the log; the first line is written after compilation."""
    path = run.root / metrics_file.NAME
    return path.exists() and f'"step": {step},' in path.read_text()


@pytest.mark.parametrize("step", [11])
def test_a_run_that_loses_a_host_ends_with_the_same_bits(
    undisturbed: runs.Run, tmp_path: Path, step: int
) -> None:
    run = undisturbed.but("disturbed", tmp_path)
    process = run.start("train.py", "--config", str(run.config), "--hosts", "2")
    assert processes.wait_until(lambda: logged(run, step), process)
    victim = hosts.pids_below(process.pid)[step % 2]
    os.kill(victim, signal.SIGKILL)
    done = processes.ended(process)
    assert done.status == 0, done.told
    assert f"(process {victim}) was lost during" in done.told
    assert "1 restart(s)" in done.told
    assert "hosts 2  restarts 1  goodput " in done.output
    assert_same(run, undisturbed)


def test_a_run_whose_driver_is_killed_goes_on_when_it_is_started_again(
    undisturbed: runs.Run, tmp_path: Path
) -> None:
    run = undisturbed.but("driverless", tmp_path)
    process = run.start("train.py", "--config", str(run.config), "--hosts", "2")
    assert processes.wait_until(lambda: logged(run, 7), process)
    process.kill()
    processes.ended(process)
    done = processes.ended(run.start("train.py", "--config", str(run.config), "--hosts", "2"))
    assert done.status == 0, done.told
    assert_same(run, undisturbed)


def test_a_signal_saves_and_stops_and_the_next_run_goes_on(
    undisturbed: runs.Run, tmp_path: Path
) -> None:
    run = undisturbed.but("stopped", tmp_path)
    process = run.start("train.py", "--config", str(run.config), "--hosts", "2")
    assert processes.wait_until(lambda: logged(run, 1), process)
    process.send_signal(signal.SIGTERM)
    stopped = processes.ended(process)
    assert stopped.status == 128 + signal.SIGTERM, stopped.told
    assert "which is saved" in stopped.output
    done = processes.ended(run.start("train.py", "--config", str(run.config), "--hosts", "2"))
    assert done.status == 0, done.told
    assert_same(run, undisturbed)
