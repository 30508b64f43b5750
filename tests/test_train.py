"""Whatever train.py loses at whatever stage, its run ends with the bits of one that lost nothing.

Each test prints how soon the loss was noticed and when the run trained again (pytest -rP).
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hosts
import processes
import pytest
import runs

from mesh_transformer import config, metrics_file

pytest.importorskip("ray", reason="needs the extra [pods]")

from mesh_transformer import driver  # noqa: E402
from mesh_transformer.pod import cluster, host  # noqa: E402
from mesh_transformer.pod.machines import Pod  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    # Ray leaves sockets and files of its processes to the interpreter's end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

KEYS = {
    **{"tpu_size": 2, "zero_stage": 1, "total_steps": 20, "anneal_steps": 15, "keep_n": 9},
    **{"pod_step_seconds": 60, "pod_start_seconds": 240},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A finished run of two hosts, with all its checkpoints."""
    run = runs.make(tmp_path_factory.mktemp("faults"), **KEYS)
    done = run.ended(run.drive())
    assert done.status == 0, done.told
    assert "Trained to step 20" in done.told and "goodput" in done.told
    assert re.search(r"^step 20/20  loss .* hosts 2  restarts 0  goodput \d", done.told, re.M)
    return run


@pytest.fixture
def run(undisturbed: runs.Run, tmp_path: Path) -> runs.Run:
    """The same run as it was once step 10 was saved."""
    run = undisturbed.but("disturbed", tmp_path)
    shutil.copytree(undisturbed.root, run.root)
    for step in (15, 20):
        shutil.rmtree(run.root / "checkpoints" / f"step_{step}")
    metrics_file.drop_after(str(run.root / metrics_file.NAME), 10)
    return run


def assert_recovered(
    what: str, done: processes.Ended, run: runs.Run, undisturbed: runs.Run, losses: int = 1
) -> None:
    """Check that a run has ended as one that lost nothing, and print how long recovery took."""
    assert done.status == 0, done.told
    assert f"{losses} restart(s)" in done.told or not losses, done.told
    run.assert_ends_as(undisturbed)
    noticed = re.findall(r"noticed .*? s after|no answer to .*? s from", done.told)
    assert len(noticed) == losses, done.told
    again = re.findall(r"training again .* s after the loss", done.told)
    (whole,) = re.findall(r"^goodput .* s(?:, .*)?: .*$", done.told, re.M)[-1:]
    print(f"{what}: {noticed}; {again}; {whole}")


def being_saved(run: runs.Run, step: int) -> bool:
    """Whether a checkpoint is begun and not complete."""
    return (run.root / "checkpoints" / f"step_{step}.orbax-checkpoint-tmp").exists()


STAGES: dict[str, Callable[[runs.Run, int], bool]] = {
    "starting": lambda run, pid: hosts.is_at(pid, "join"),
    "restoring": lambda run, pid: hosts.is_at(pid, "restore"),
    "training": lambda run, pid: run.logged(13),
    "validating": lambda run, pid: hosts.is_at(pid, "evaluate"),
    "saving": lambda run, pid: being_saved(run, 15),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_host_is_killed(undisturbed: runs.Run, run: runs.Run, stage: str) -> None:
    process = run.drive()
    victim = hosts.stopped(process, lambda pid: STAGES[stage](run, pid))
    os.kill(victim, signal.SIGKILL)
    done = run.ended(process)
    assert f"(process {victim}) was lost during" in done.told or stage == "starting", done.told
    assert_recovered(f"host killed, {stage}", done, run, undisturbed)


def test_a_host_is_killed_and_another_one_while_the_run_recovers(
    undisturbed: runs.Run, run: runs.Run
) -> None:
    process = run.drive()
    first = hosts.stopped(process, lambda pid: run.logged(13))
    both = tuple(hosts.pids_below(process.pid))
    os.kill(first, signal.SIGKILL)
    second = hosts.stopped(process, lambda pid: hosts.is_at(pid, "restore"), but=both)
    os.kill(second, signal.SIGKILL)
    assert_recovered("two hosts killed", run.ended(process), run, undisturbed, losses=2)


def test_a_host_hangs_in_a_step(undisturbed: runs.Run, run: runs.Run) -> None:
    run = run.but("disturbed", pod_step_seconds=15)
    process = run.drive()
    victim = hosts.stopped(process, lambda pid: run.logged(13) and hosts.is_at(pid, "train"))
    done = run.ended(process)
    assert re.search(rf"no answer to train .*\(process {victim}\).*pod_step_seconds", done.told)
    assert_recovered("host stopped in a step", done, run, undisturbed)


def test_the_driver_is_killed_while_a_checkpoint_is_saved(
    undisturbed: runs.Run, run: runs.Run
) -> None:
    process = run.drive()
    assert processes.wait_until(lambda: being_saved(run, 15), process)
    process.kill()
    process.wait()
    done = run.ended(run.drive())
    assert_recovered("driver killed, saving", done, run, undisturbed, losses=0)


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_the_driver_ends_with_ray_and_the_next_run_goes_on(
    undisturbed: runs.Run, run: runs.Run, name: str
) -> None:
    process = run.drive()
    hosts.stopped(process, lambda pid: run.logged(13))  # or the run is over too soon
    (victim,) = hosts.pids_below(process.pid, name)
    os.kill(victim, signal.SIGKILL)
    begun = time.monotonic()
    done = run.ended(process)
    print(f"{name} killed: the driver ends after {time.monotonic() - begun:.1f} s")
    assert done.status == 1 and "IndexError" not in done.told, done.told
    again = run.ended(run.drive())
    assert again.status == 0, again.told
    run.assert_ends_as(undisturbed)


def test_a_host_raises_what_nobody_expects(
    undisturbed: runs.Run,
    run: runs.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    accident = tmp_path / "accident"

    class Host(host.Host):
        n_steps = 0

        def train(self, *args: Any) -> Any:
            self.n_steps += 1
            if self.n_steps == 3 and not accident.exists():
                accident.touch()
                raise ZeroDivisionError("an accident")
            return super().train(*args)

    monkeypatch.setattr(cluster, "Host", Host)
    with caplog.at_level(logging.INFO):
        finished = driver.train(config.load(run.config), Pod(n_local=2))
    assert re.search(r"(?s)train failed on .*process.*ZeroDivisionError: an accident", caplog.text)
    done = processes.Ended(finished.status, "", "\n".join(caplog.messages))
    assert_recovered("host raises", done, run, undisturbed)


def test_a_signal_saves_and_stops_and_the_next_run_goes_on(
    undisturbed: runs.Run, tmp_path: Path
) -> None:
    run = undisturbed.but("stopped", tmp_path)
    process = run.drive()
    run.reach(process, 1)
    process.send_signal(signal.SIGTERM)
    stopped = run.ended(process)
    assert stopped.status == 128 + signal.SIGTERM, stopped.told
    assert "which is saved" in stopped.told
    done = run.ended(run.drive())
    assert done.status == 0, done.told
    run.assert_ends_as(undisturbed)


@pytest.fixture
def ray_cluster() -> Iterator[Any]:
    """A Ray cluster of two machines, each with a raylet of its own, all on this one."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        started.add_node(num_cpus=1)
        yield started
    finally:
        started.shutdown()


def test_a_machine_is_lost_and_another_one_comes(
    undisturbed: runs.Run, run: runs.Run, ray_cluster: Any
) -> None:
    process = run.drive("--address", ray_cluster.address)
    run.reach(process, 13)
    (machine,) = ray_cluster.worker_nodes
    ray_cluster.remove_node(machine, allow_graceful=False)
    ray_cluster.add_node(num_cpus=1)
    done = run.ended(process)
    # Ray takes a while to notice; an attempt until then is lost on the machine that is gone.
    losses = done.told.count("starting again")
    assert losses
    assert_recovered("machine lost", done, run, undisturbed, losses)


HOPELESS: dict[str, tuple[dict[str, Any], str]] = {
    "a loss that is not finite": ({"lr": 1e30}, r"error: step \d+: (loss|grad_norm) is (nan|inf)"),
    "devices that hosts cannot share": (
        {"tpu_size": 3, "zero_stage": 0},
        "error: tpu_size is 3, which 2 hosts",
    ),
    "data of another vocabulary": ({"n_vocab": 64}, "error: .*n_vocab is 64"),
}


@pytest.mark.parametrize("what", HOPELESS)
def test_what_would_go_wrong_again_is_not_retried(
    undisturbed: runs.Run, tmp_path: Path, what: str
) -> None:
    keys, message = HOPELESS[what]
    run = undisturbed.but("hopeless", tmp_path, **keys)
    done = run.ended(run.drive())
    assert done.status == 1 and re.search(message, done.told), done.told
    assert "starting again" not in done.told and "restart(s)" not in done.told
