"""The hosts of slices: which are waited for, in which order they come, and what is told of them."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from configurations import MINIMAL
from tpu_slices import StatusCode, Time, fake, serve

from mesh_transformer.config import parse
from mesh_transformer.errors import UserError
from mesh_transformer.pod import tpu_api
from mesh_transformer.session import SessionLost

pytest.importorskip("ray", reason="needs the extra [pods]")

from mesh_transformer.pod import slices, startup  # noqa: E402
from mesh_transformer.pod.machines import Machine  # noqa: E402
from mesh_transformer.pod.slices import SlicePod  # noqa: E402

pytestmark = pytest.mark.pods

WAIT = 60
BUILD = "this-build"


class FakeRay:
    """A Ray cluster without Ray."""

    address, token = "127.0.0.1:6379", "secret"
    there: list[Machine]
    how: dict[str, Any]

    def __init__(self, **how: Any) -> None:
        type(self).how = how
        type(self).there = []

    def __enter__(self) -> FakeRay:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left."""

    def machines(self) -> list[Machine]:
        return self.there


def machine(name: str, worker: int, build: str = BUILD, id: str = "") -> Machine:
    labels = {"mesh-slice": name, "mesh-worker": str(worker), "mesh-build": build}
    return Machine(id or f"{name}-{worker}", "127.0.0.1", {"TPU": 4}, labels)


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    wheel = startup.Wheel(Path(__file__), "1", "0")
    monkeypatch.setattr(slices, "build_wheel", lambda folder: wheel)
    monkeypatch.setattr(slices, "RayCluster", FakeRay)
    monkeypatch.setattr(startup.Startup, "build", BUILD)
    with serve(monkeypatch) as server:
        yield server


@pytest.fixture
def time() -> Time:
    return Time()


def pod(time: Time, *names: str, **options: Any) -> SlicePod:
    keys = {"tpu_type": "v3-16", "tpu_size": 16 * len(names), **options.pop("keys", {})}
    config = parse(MINIMAL | keys)
    return SlicePod(names, "local", config, clock=time.clock, sleep=time.sleep, **options)


def joins(*machines: Machine) -> Callable[[], None]:
    return lambda: setattr(FakeRay, "there", list(machines))


def test_hosts_come_in_the_order_of_the_slices_as_named_and_of_their_numbers(
    cloud: Any, time: Time
) -> None:
    with pod(time, "b", "a") as slices:
        time.at(30, joins(*(machine(name, worker) for name in "ab" for worker in (1, 0))))
        nodes = slices.nodes(WAIT)
    assert [node.id for node in nodes] == ["b-0", "b-1", "a-0", "a-1"]
    assert [node.slice_name for node in nodes] == ["b", "b", "a", "a"]
    assert nodes[0].resources == {"TPU": 4}


def test_hosts_of_another_build_and_those_that_left_unnoticed_are_not_taken(
    cloud: Any, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = machine("a", 1, id="left"), machine("a", 1, id="came")
    with caplog.at_level(logging.INFO), pod(time, "a") as slices:
        time.at(20, joins(machine("a", 0), machine("a", 1, build="another")))
        time.at(30, joins(machine("a", 0), old, new))
        time.at(40, joins(machine("a", 0), new))
        assert [node.id for node in slices.nodes(WAIT)] == ["a-0", "came"]
    assert time.now >= 40
    assert "1 of 2 host(s) have joined" in caplog.messages


def test_the_token_is_handed_out_only_while_hosts_are_waited_for(cloud: Any, time: Time) -> None:
    with pod(time, "a") as slices:
        files = slices._files
        path = files.url("token").partition("/token")[0].rpartition("/")[2] + "/token"
        given = []
        time.at(20, lambda: given.append(files.answer(f"/{path}", "127.0.0.1")))
        time.at(30, joins(machine("a", 0), machine("a", 1)))
        assert files.answer(f"/{path}", "127.0.0.1")[0] == 403
        slices.nodes(WAIT)
        assert files.answer(f"/{path}", "127.0.0.1")[0] == 403
    assert given == [(200, b"secret")]


def test_a_host_that_does_not_come_is_named_and_its_slice_replaced_at_the_next_try(
    cloud: Any, time: Time
) -> None:
    with pod(time, "a", "b") as slices:
        time.at(10, joins(machine("a", 0), machine("a", 1), machine("b", 0)))
        with pytest.raises(SessionLost, match=r"^host 1 of TPU b did not join within 60 s \(pod_"):
            slices.nodes(WAIT)
        assert not cloud.methods("Delete")
        time.at(time.now + 30, joins(*(machine(name, i) for name in "ab" for i in range(2))))
        assert len(slices.nodes(WAIT)) == 4
    assert cloud.methods("Delete") == ["DeleteNode"]
    assert cloud.methods("Create") == ["CreateNode"] * 3


def test_a_slice_that_is_preempted_before_its_hosts_have_joined_is_a_loss_and_then_replaced(
    cloud: Any, time: Time
) -> None:
    with pod(time, "a") as slices:
        time.at(15, lambda: cloud.preempt("a"))
        with pytest.raises(SessionLost, match="^TPU a is PREEMPTED before all its hosts joined"):
            slices.nodes(WAIT)
        time.at(50, joins(machine("a", 0), machine("a", 1)))
        assert len(slices.nodes(WAIT)) == 2
    assert cloud.methods("Create") == ["CreateNode"] * 2


def test_capacity_is_asked_for_ever_more_rarely_and_then_given_up_for_this_time(
    cloud: Any, time: Time
) -> None:
    refused = fake.Fault(StatusCode.RESOURCE_EXHAUSTED, "none left")
    cloud.faults["CreateNode"] = [refused] * 99
    with (
        pod(time, "a", keys={"tpu_wait_minutes": 10}) as slices,
        pytest.raises(SessionLost, match="TPU slices cannot be had now: local: none left"),
    ):
        slices.nodes(WAIT)
    pauses = [seconds for seconds in time.sleeps if seconds >= 5]
    assert pauses[:6] == [5, 10, 20, 40, 80, 120]
    assert 400 < time.now <= 600


def test_what_is_there_is_listed_at_the_end_however_it_comes(
    cloud: Any, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.suppress(KeyboardInterrupt), pod(time, "a", spot=True) as slices:
        time.at(30, joins(machine("a", 0), machine("a", 1)))
        slices.nodes(WAIT)
        raise KeyboardInterrupt
    assert caplog.messages[-1] == (
        "TPU a (v3-16) is there still: READY. To delete it: gcloud compute tpus tpu-vm delete a "
        "--zone local"
    )


def test_what_was_asked_for_is_named_when_it_cannot_be_listed(
    cloud: Any, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    with pod(time, "a"):
        cloud.faults["ListNodes"] = [fake.Fault(StatusCode.PERMISSION_DENIED, "not yours")]
    assert "whether TPUs are left (this run's: a) is not known" in caplog.text


def test_an_api_that_does_not_answer_while_hosts_join_is_a_loss_and_closes_the_door(
    cloud: Any, time: Time
) -> None:
    silent = fake.Fault(StatusCode.UNAVAILABLE, "outage")
    with pod(time, "a") as slices:
        time.at(5, lambda: cloud.faults["GetNode"].extend([silent] * 99))
        with pytest.raises(SessionLost, match="Cloud TPU has not answered get_node for 300 s"):
            slices.nodes(9 * WAIT)
        assert not slices._files._admitted
        cloud.faults["GetNode"].clear()


def test_a_slice_that_cannot_be_deleted_does_not_keep_the_others(
    cloud: Any, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("a", "b")
    with caplog.at_level(logging.INFO), pod(time, *names, delete_on_exit=True) as slices:
        time.at(30, joins(*(machine(name, i) for name in names for i in range(2))))
        slices.nodes(WAIT)
        cloud.faults["DeleteNode"] = [fake.Fault(StatusCode.PERMISSION_DENIED, "not yours")]
    assert "TPU a is not deleted: Google Cloud refuses: not yours" in caplog.text
    assert "TPU b is deleted" in caplog.messages
    assert "TPU a (v3-16) is there still" in caplog.messages[-1]


def test_a_host_without_a_tpu_is_refused_on_google_cloud(
    cloud: Any, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = [machine("a", i)._replace(resources={"CPU": 96}) for i in range(2)]
    with pod(time, "a") as slices:
        time.at(30, joins(*bare))
        monkeypatch.setattr(slices, "_zone", "us-central1-a")
        with pytest.raises(UserError, match="Ray finds no TPU on 127.0.0.1, 127.0.0.1; tpu_runt"):
            slices.nodes(WAIT)
        monkeypatch.setattr(slices, "_zone", "local")


def test_slices_are_deleted_when_that_is_asked_for(
    cloud: Any, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), pod(time, "a", delete_on_exit=True) as slices:
        time.at(30, joins(machine("a", 0), machine("a", 1)))
        slices.nodes(WAIT)
    assert caplog.messages[-2:] == [
        "TPU a is deleted",
        "no TPU that was created by this library is left in local",
    ]


def test_a_slice_whose_driver_is_running_is_left_to_it(
    cloud: Any, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        monkeypatch.setattr(FakeRay, "address", address)
        with pod(time, "a") as slices:
            time.at(30, joins(machine("a", 0), machine("a", 1)))
            slices.nodes(WAIT)
        with pytest.raises(UserError, match=f"--tpu a belongs to a driver .* {address}: end"):
            pod(time, "a").__enter__()
        time.at(time.now + 5, other.close)
        with pod(time, "a"):
            assert cloud.methods("Create") == ["CreateNode"]


def test_a_secret_takes_the_place_of_the_token_that_the_driver_hands_out(
    cloud: Any, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tpu_api.TpuApi, "secret", lambda self, name: f"what {name} holds")
    with pod(time, "a", keys={"tpu_token_secret": "ours"}) as slices:
        assert FakeRay.how["token"] == "what ours holds"
        time.at(30, joins(machine("a", 0), machine("a", 1)))
        slices.nodes(WAIT)
    script = cloud.nodes["a"].metadata["startup-script"]
    assert "token_secret=ours" in script and "token_url=''" in script
    assert "what ours holds" not in script


@pytest.mark.parametrize(
    ("names", "keys", "told"),
    [
        (
            ["a"],
            {"tpu_size": 32},
            "tpu_size is 32, but --tpu names 1 slice(s) of v3-16, 16 devices in all: name 2 slice",
        ),
        (["a", "b", "a"], {"tpu_size": 16}, "--tpu names a more than once; each is one slice"),
        (["A"], {}, "--tpu 'A' cannot be a TPU's name"),
    ],
)
def test_slices_that_are_not_the_run_s_are_refused(
    cloud: Any, time: Time, names: list[str], keys: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError) as refused:
        pod(time, *names, keys=keys)
    assert told in str(refused.value)
    assert not cloud.calls


def test_hosts_install_what_reading_the_run_s_paths_takes(cloud: Any, time: Time) -> None:
    keys = {"model_dir": "s3://bucket/run"}
    with pod(time, "a", keys=keys, also_read="gs://other/run") as slices:
        time.at(30, joins(machine("a", 0), machine("a", 1)))
        slices.nodes(WAIT)
    assert "extras=tpu,pods,gcs,s3\n" in cloud.nodes["a"].metadata["startup-script"]
