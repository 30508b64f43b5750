"""Machines of a Ray cluster as places for hosts, and what slices tell each other by."""

from __future__ import annotations

import os
import signal
import socket
import stat
from pathlib import Path

import pytest

from mesh_transformer.errors import UserError

pytest.importorskip("ray", reason="needs the extra [pods]")

from mesh_transformer.pod import cluster, machines  # noqa: E402
from mesh_transformer.pod.machines import Machine, RayCluster  # noqa: E402


def machine(labels: dict[str, str], **resources: float) -> Machine:
    return Machine("id", "10.0.0.2", resources, labels)


@pytest.mark.parametrize(
    "labels",
    [
        {"mesh-slice": "a", "mesh-worker": "3"},
        {"ray.io/tpu-slice-name": "a", "ray.io/tpu-worker-id": "3"},
    ],
)
def test_labels_of_start_up_scripts_and_of_ray_number_a_machine(labels: dict[str, str]) -> None:
    assert (machine(labels).slice_name, machine(labels).worker) == ("a", 3)


def test_a_machine_s_accelerators_are_shared_alike() -> None:
    (first, second) = machine({}, GPU=4, CPU=8).places(2)
    assert first == second and first.resources == {"GPU": 2}
    assert machine({}, CPU=2).places(1)[0].resources == {}
    with pytest.raises(UserError, match="10.0.0.2 has 3 GPUs, which 2 hosts cannot share alike"):
        machine({}, GPU=3).places(2)


def test_a_head_without_accelerators_takes_no_host_beside_machines_that_have_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head, worker = machine({}, CPU=8), machine({}, CPU=8, GPU=2)._replace(id="worker")
    pod = machines.Pod(address="10.0.0.1:6379")
    monkeypatch.setattr(pod._cluster, "machines", lambda: [head, worker])
    assert [found.id for found in pod._machines()] == ["worker"]
    monkeypatch.setattr(pod._cluster, "machines", lambda: [head, head])
    assert pod._machines() == [head, head]


def test_hosts_of_several_slices_are_told_where_the_first_one_is() -> None:
    names = [machine({"mesh-slice": name}, TPU=4).places(1)[0] for name in ("a", "a", "b", "b")]
    assert cluster._between_slices(names, 3) == {
        "MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.2",
        "MEGASCALE_PORT": "8081",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
    }
    assert cluster._between_slices(names[:2], 1) == {}


def test_a_token_that_is_made_up_is_one_that_only_its_user_can_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    folder = machines._private_folder.__wrapped__()
    monkeypatch.setattr(machines, "_private_folder", lambda: folder)
    machines._keep_token(None)
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    token = RayCluster().token
    assert token == path.read_text() and len(token) == 64
    machines._keep_token(None)
    assert RayCluster().token == token
    machines._keep_token("given")
    assert RayCluster().token == "given"
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")


def test_ray_is_not_shown_the_folder_of_the_token_when_it_looks_for_logs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = []
    monkeypatch.setenv("TPU_LOG_DIR", "")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "")
    monkeypatch.setattr("ray.init", lambda **_: started.append(os.environ["TPU_LOG_DIR"]))
    with RayCluster():
        (folder,) = started
        assert os.path.isdir(folder) and not os.listdir(folder)


@pytest.mark.parametrize("raised", [ConnectionError("no answer"), Exception("timed out")])
def test_a_ray_that_does_not_start_leaves_nothing_behind_and_says_where_to_look(
    monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    def fails(**_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray has a handler of its own
        raise raised

    monkeypatch.setenv("TPU_LOG_DIR", "")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    monkeypatch.setattr("ray.init", fails)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(type(raised), match=str(raised)) as caught:
        RayCluster().__enter__()
    assert "session_latest/logs" in caught.value.__notes__[0]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_cluster_that_is_not_one_of_ray_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    name, tries = "RAY_gcs_server_port_wait_time_s", []

    def fails(**_: object) -> None:
        tries.append(os.environ[name])
        raise ConnectionError("no head of Ray")

    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("ray.init", fails)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=f"join the Ray cluster {address}: no head of Ray; --a"):
            RayCluster(address).__enter__()
    assert tries == ["1"] and name not in os.environ


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:1", "refused"),
        ("10.0.0.1", "a host or a port is missing"),
        (":6379", "a host or a port is missing"),
        ("127.0.0.1:head", "Port could not be cast"),
        ("ray://10.0.0.1:10001", "a host or a port is missing"),
    ],
)
def test_an_address_at_which_nothing_is_is_refused_before_ray_is_asked(
    monkeypatch: pytest.MonkeyPatch, address: str, why: str
) -> None:
    monkeypatch.setattr("ray.init", None)
    with pytest.raises(UserError, match=f"cannot join the Ray cluster {address}: .*{why}.*; --a"):
        RayCluster(address).__enter__()


def test_hosts_elsewhere_cannot_join_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match="RAY_AUTH_MODE is 'disabled', but other machines join"):
        RayCluster().token  # noqa: B018
