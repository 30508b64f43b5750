"""train.py on TPU VMs as a user runs it, against a local server that speaks the Cloud TPU API.

The VMs are local processes in network namespaces of their own, where this machine allows those;
they run the real start-up script, install the driver's wheel, and join its Ray cluster with its
token.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_network
import fake_tpu_vms
import processes
import pytest
import runs
from tpu_slices import fake

from mesh_transformer.pod import tpu_api

pytest.importorskip("ray", reason="needs Ray; run EXTRAS=test,pods ./test")
pytestmark = [pytest.mark.pods, pytest.mark.slow]

STEPS = 12
TPU = ("--tpu", "test", "--tpu_region", "local", "--preemptible")


@pytest.fixture(scope="module")
def network() -> Iterator[fake_network.Network]:
    if why := fake_network.Namespaces.refused():
        pytest.skip(why)
    made = fake_network.Namespaces()
    yield made
    made.close()


@pytest.fixture
def cloud(
    tmp_path: Path,
    network: fake_network.Network,
    undisturbed: runs.Run,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Any]:
    vms = fake_tpu_vms.Vms(tmp_path / "vms", undisturbed.variables, network)
    with fake.serve(vms) as server:
        monkeypatch.setenv(tpu_api.ENDPOINT, server.endpoint)
        yield server


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """The quickstart's model after some steps on two hosts of this machine."""
    quickstart = json.loads((runs.ROOT / "configs" / "quickstart.json").read_text())
    model = {key: quickstart[key] for key in ("layers", "d_model", "n_heads", "n_vocab", "seq")}
    size = {"tpu_type": "v4-16", "tpu_size": 8, "per_replica_batch": 1, "remat": "none"}
    times = {
        "total_steps": STEPS,
        "anneal_steps": 10,
        "ckpt_every": 4,
        "keep_every": 12,
        "val_every": 12,
        "val_batches": 1,
    }
    run = runs.make(tmp_path_factory.mktemp("tpu"), **model | size | times)
    done = run.ended(run.drive())
    assert done.status == 0, done.told
    return run


def start(run: runs.Run, folder: Path, *flags: str) -> Any:
    """Start train.py where nothing of the checkout is, so that hosts must import the wheel."""
    copy = folder / "driver"
    copy.mkdir(exist_ok=True)
    shutil.copy(runs.ROOT / "train.py", copy)
    return run.drive(*TPU, *flags, folder=copy)


def assert_token_is_kept(host: Any, script: str, told: str) -> None:
    """Check that only a file of the host's own has the token."""
    path = host.home / ".mesh-transformer" / "token"
    token = path.read_text()
    assert len(token) == 64 and path.stat().st_mode & 0o777 == 0o600
    assert not [text for text in (host.log, script, told) if token in text]
    for pid in fake_tpu_vms.session(host.process.pid):
        for name in ("cmdline", "environ"):
            assert token.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()


def test_a_run_whose_slice_is_preempted_and_whose_driver_is_killed_ends_with_the_same_bits(
    cloud: Any, undisturbed: runs.Run, tmp_path: Path
) -> None:
    run = undisturbed.but("disturbed", tmp_path)
    process = start(run, tmp_path)
    run.reach(process, 3)
    for host in cloud.vms["test"]:
        assert_token_is_kept(host, cloud.nodes["test"].metadata["startup-script"], run.told())
    cloud.preempt("test")
    run.reach(process, 7)
    process.kill()
    process.wait()
    said = run.told()
    assert "TPU test: PREEMPTED" in said and "training again" in said, said
    assert cloud.methods("Create") == ["CreateNode"] * 2
    assert all(node.scheduling_config.spot for node in cloud.nodes.values())

    done = run.ended(start(run, tmp_path, "--delete-tpu-on-exit"))
    assert done.status == 0, done.told
    assert cloud.methods("Create") == ["CreateNode"] * 2, "it got its slice back"
    assert "TPU test is deleted" in done.told and "no TPU" in done.told
    assert not cloud.nodes
    run.assert_ends_as(undisturbed)


def test_a_signal_while_the_slice_is_waited_for_lists_what_was_asked_for(
    cloud: Any, undisturbed: runs.Run, tmp_path: Path
) -> None:
    cloud.plans["test"] = ["CREATING"]
    run = undisturbed.but("waiting", tmp_path)
    process = start(run, tmp_path)
    assert processes.wait_until(lambda: len(cloud.methods("GetNode")) > 3, process), run.told()
    process.send_signal(signal.SIGTERM)
    done = run.ended(process)
    assert done.status == 128 + signal.SIGTERM, done.told
    assert "TPU test (v4-16) is there still: CREATING" in done.told


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"tpu_size": 16}, "tpu_size is 16, but --tpu names 1 slice(s) of v4-16, 8 devices in all"),
        ({"tpu_type": "v5p-16"}, "tpu_type 'v5p-16' (v3-TPU_SIZE unless given) is not offered in"),
    ],
)
def test_nothing_is_created_for_a_configuration_that_is_wrong(
    cloud: Any, undisturbed: runs.Run, tmp_path: Path, keys: dict[str, Any], told: str
) -> None:
    run = undisturbed.but("wrong", tmp_path, **keys)
    done = run.ended(start(run, tmp_path))
    assert done.status == 1
    assert told in done.told
    assert not cloud.methods("Create")
