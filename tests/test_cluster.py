"""Host processes in one program: they compute what one process does, and what is lost is told."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hosts
import numpy as np
import pytest
import small

from mesh_transformer.errors import UserError
from mesh_transformer.session import Sampling, SessionLost

ray = pytest.importorskip("ray", reason="needs the extra [pods]")

from mesh_transformer.pod import cluster  # noqa: E402
from mesh_transformer.pod.cluster import Cluster  # noqa: E402
from mesh_transformer.pod.machines import Pod  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    # Ray leaves sockets and files of its processes to the interpreter's end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

MP = 4
SECONDS = 60
GREEDY = Sampling(temperature=0)
PROMPTS = [[5, 6, 7], [1]]


@pytest.fixture(scope="module")
def pods() -> Iterator[Callable[[int], Pod]]:
    """Pods of so many hosts, all on one Ray cluster."""
    with Pod(n_local=1) as first:

        def pod(n_hosts: int) -> Pod:
            first._n_local = n_hosts
            return first

        yield pod


def parsed(folder: Path, **keys: Any) -> Any:
    return small.parsed(
        tpu_size=8,
        cores_per_replica=MP,
        zero_stage=2,
        gradient_accumulation_steps=2,
        **{"model_dir": str(folder / "run")} | keys,
    )


def seen(session: Any) -> tuple[list[float], np.ndarray, Any]:
    """Train three steps; score and continue by what was learnt."""
    tokens = small.tokens(2, 2, 17)
    losses = [metrics["loss"] for metrics in [session.train(tokens) for _ in range(3)]]
    scores = session.evaluate(small.tokens(3, 17)).loss_BT
    return [float(loss) for loss in losses], scores, session.generate(PROMPTS, GREEDY, 5).tokens


def test_hosts_together_compute_what_one_process_does(
    pods: Callable[[int], Pod], tmp_path: Path
) -> None:
    config = parsed(tmp_path)
    with Cluster(config, pods(4).nodes(SECONDS)) as session:
        losses, scores, tokens = seen(session)
        assert session.devices.n == 8
        session.save(3, {"sample": 12})
        after = [session.train(small.tokens(2, 2, 17))["loss"] for _ in range(2)]
        restored = session.restore()
        assert restored is not None and (restored.step, restored.position) == (3, {"sample": 12})
        assert [session.train(small.tokens(2, 2, 17))["loss"] for _ in range(2)] == after
    alone = small.worker(2, MP, zero_stage=2, gradient_accumulation_steps=2)
    alone.state = small.start(2, MP, zero_stage=2, gradient_accumulation_steps=2)
    expected = seen(alone)
    # Sums over processes are added in another order than sums over devices of one process.
    np.testing.assert_allclose(losses, expected[0], rtol=2e-6)
    np.testing.assert_allclose(scores, expected[1], atol=1e-5)
    assert tokens == expected[2]


@pytest.fixture
def two_hosts(pods: Callable[[int], Pod], tmp_path: Path) -> Iterator[Cluster]:
    """A session that has taken a step, and gives up one that takes twenty seconds."""
    config = parsed(tmp_path, pod_start_seconds=120, pod_step_seconds=20)
    session = Cluster(config, pods(2).nodes(SECONDS))
    try:
        assert session.train(small.tokens(2, 2, 17))["loss"] > 0
        yield session
    finally:
        session.kill()


def test_a_host_that_is_killed_is_told_by_its_name(two_hosts: Cluster) -> None:
    victim = hosts.pids_below(os.getpid())[-1]
    metrics = two_hosts.train(small.tokens(2, 2, 17))
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(SessionLost, match=rf"\(process {victim}\) was lost during"):
        for _ in range(50):  # the step may have been done before the signal came
            assert metrics["loss"] > 0
            metrics = two_hosts.train(small.tokens(2, 2, 17))


def test_what_a_host_raises_comes_with_its_name_and_traceback(two_hosts: Cluster) -> None:
    with pytest.raises(SessionLost, match=r"(?s)train failed on .*process.*worker\.py.*n_vocab is"):
        dict(two_hosts.train(np.full((2, 2, 17), small.KEYS["n_vocab"])))


def test_what_the_user_can_mend_comes_as_it_is(two_hosts: Cluster) -> None:
    with pytest.raises(UserError, match="^prompt 1 is empty"):
        two_hosts.generate([[1], []], GREEDY, 2)


def test_what_the_others_raise_once_a_host_is_gone_is_not_the_users_fault(
    two_hosts: Cluster,
) -> None:
    victim = hosts.pids_below(os.getpid())[-1]
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(SessionLost, match=rf"\(process {victim}\) was lost during generate"):
        two_hosts.generate([[1], []], GREEDY, 2)


def test_hosts_that_cannot_share_the_devices_are_refused(
    pods: Callable[[int], Pod], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"tpu_size is 8, which 3 hosts cannot share .* 1, 2, 4, 8"):
        Cluster(parsed(tmp_path), pods(3).nodes(SECONDS))


def test_hosts_of_another_version_are_refused(
    pods: Callable[[int], Pod], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "__version__", "9.9")
    with pytest.raises(UserError, match="this driver has mesh_transformer 9.9, but .* has mesh"):
        Cluster(parsed(tmp_path), pods(2).nodes(SECONDS))


def in_folders(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Let the hosts and the driver see another folder by one relative path, as machines do."""
    driver, *left = folders
    start, more = cluster._actor, iter(left)

    def started(node: Any) -> Any:
        actor, folder = start(node), str(next(more))
        ray.get(actor.__ray_call__.remote(lambda host: os.chdir(folder)), timeout=SECONDS)
        return actor

    for folder in {*folders}:
        folder.mkdir(exist_ok=True)
    monkeypatch.chdir(driver)
    monkeypatch.setattr(cluster, "_actor", started)
    monkeypatch.setattr(cluster, "_SECONDS_TO_BE_SEEN", 1)


def test_a_model_dir_that_hosts_do_not_share_is_refused_before_they_join(
    pods: Callable[[int], Pod], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_folders(monkeypatch, tmp_path / "a", tmp_path / "a", tmp_path / "b")
    told = (
        r"^model_dir run is not one folder for all hosts: what .*\(process \d+\) writes there is "
        r"not seen by [^,]*\(process \d+\), so that"
    )
    with pytest.raises(UserError, match=told):
        Cluster(parsed(tmp_path, model_dir="run"), pods(2).nodes(SECONDS))
    assert not list((tmp_path / "a" / "run").iterdir()) and not (tmp_path / "b" / "run").exists()


def test_a_model_dir_that_the_driver_does_not_share_is_refused(
    pods: Callable[[int], Pod], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_SECONDS_TO_BE_SEEN", 1.0)
    in_folders(monkeypatch, tmp_path / "a", tmp_path / "b", tmp_path / "b")
    with pytest.raises(UserError, match="^model_dir run is another folder here than on "):
        Cluster(parsed(tmp_path, model_dir="run"), pods(2).nodes(SECONDS))
    assert not list((tmp_path / "b" / "run").iterdir())


def test_a_model_dir_that_cannot_be_written_is_told_as_the_users_to_mend(
    pods: Callable[[int], Pod], tmp_path: Path
) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write to model_dir: .*'.*/run"):
        Cluster(parsed(tmp_path), pods(2).nodes(SECONDS))


def test_the_driver_does_not_import_jax() -> None:
    program = "import mesh_transformer.driver, sys; sys.exit('jax' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=environment)


def test_ended_hosts_are_gone_at_once_although_nothing_holds_them_any_more(
    pods: Callable[[int], Pod], monkeypatch: pytest.MonkeyPatch
) -> None:
    class SlowToPart:
        """Waits for others when it ends by itself, as a host of a JAX program does."""

        def info(self) -> int:
            atexit.register(time.sleep, 600)
            return os.getpid()

    def kill_late(actor: Any, *, no_restart: bool) -> None:
        worker = ray._private.worker.global_worker.core_worker
        threading.Timer(0.5, worker.kill_actor, [actor._ray_actor_id, no_restart]).start()

    pods(1).nodes(SECONDS)
    actors = [ray.remote(SlowToPart).options(num_cpus=0).remote() for _ in range(2)]
    pids = ray.get([actor.info.remote() for actor in actors], timeout=SECONDS)
    monkeypatch.setattr(cluster.ray, "kill", kill_late)  # an order that is overtaken
    cluster.end(actors)
    del actors
    end = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)
