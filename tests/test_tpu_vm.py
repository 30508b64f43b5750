"""Slices of TPU VMs through the real client, against a local server that speaks its API."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from tpu_slices import QUEUED, V3_16, StatusCode, Time, api, fake, make_vm, serve

from mesh_transformer.config import PodConfig
from mesh_transformer.errors import UserError
from mesh_transformer.pod import tpu_api
from mesh_transformer.pod.tpu_vm import NoCapacity, Slice, list_vms

pytestmark = pytest.mark.pods

TWO_HOSTS = ("127.0.0.1", "127.0.0.1")


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with serve(monkeypatch) as server:
        yield server


@pytest.fixture
def time() -> Time:
    return Time()


def test_a_slice_is_created_as_the_configuration_says(
    cloud: Any, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    config = PodConfig(
        tpu_type="v3-16",
        tpu_network="net",
        tpu_subnetwork="sub",
        tpu_external_ips=False,
        tpu_service_account="hosts@my-project.iam.gserviceaccount.com",
        tpu_labels={"team": "language"},
    )
    cloud.plans["a"] = ["CREATING", "CREATING", "READY"]
    with caplog.at_level(logging.INFO):
        made = make_vm(time, config, spot=True).ensure()
    assert made.ready and made.ours and not made.queued
    assert (made.name, made.state, made.addresses) == ("a", "READY", TWO_HOSTS)
    assert (made.tpu_type, made.runtime) == ("v3-16", "tpu-ubuntu2204-base")
    node = cloud.nodes["a"]
    assert node.name == "projects/my-project/locations/local/nodes/a"
    assert node.scheduling_config.spot and not node.scheduling_config.reserved
    assert (node.network_config.network, node.network_config.subnetwork) == ("net", "sub")
    assert not node.network_config.enable_external_ips
    assert node.service_account.email == "hosts@my-project.iam.gserviceaccount.com"
    assert list(node.service_account.scope) == [tpu_api.SCOPE]
    assert dict(node.labels) == {"team": "language", "created-by": "mesh-transformer"}
    assert dict(node.metadata) == {"startup-script": "#!/bin/sh\n"}
    assert caplog.messages == [
        "TPU a: creating a v3-16 in local (spot)",
        "TPU a: asked for",
        "TPU a: CREATING",
        "TPU a is ready: 2 host(s)",
    ]


def test_a_slice_is_on_demand_unless_told_otherwise(cloud: Any, time: Time) -> None:
    make_vm(time).ensure()
    assert not cloud.nodes["a"].scheduling_config.spot
    assert cloud.nodes["a"].network_config.enable_external_ips


def test_a_reserved_slice_uses_reserved_capacity(cloud: Any, time: Time) -> None:
    make_vm(time, dataclasses.replace(V3_16, tpu_reserved=True)).ensure()
    assert cloud.nodes["a"].scheduling_config.reserved


@pytest.mark.parametrize(
    ("config", "seconds"), [(V3_16, 1), (V3_16, 2), (QUEUED, 1), (QUEUED, 2), (QUEUED, 4)]
)
def test_a_driver_that_starts_again_adopts_its_slice_in_whatever_state(
    cloud: Any, time: Time, config: PodConfig, seconds: float
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    time.at(seconds, interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_vm(time, config).ensure()
    assert make_vm(time, config).ensure().ready
    assert len(cloud.methods("Create")) == 1 and not cloud.methods("Delete")


def test_what_is_there_must_be_what_is_asked_for(cloud: Any, time: Time) -> None:
    make_vm(time).ensure()
    other = PodConfig(tpu_type="v3-32")
    with pytest.raises(UserError) as caught:
        make_vm(time, other).ensure()
    assert str(caught.value) == (
        "TPU a in local has tpu_type 'v3-16', tpu_runtime 'tpu-ubuntu2204-base', but the run asks "
        "for tpu_type 'v3-32', tpu_runtime 'tpu-ubuntu2204-base'; choose another --tpu name, or "
        "delete it: gcloud compute tpus tpu-vm delete a --zone local"
    )
    with pytest.raises(UserError, match="'tpu-ubuntu2204-base', but .* 'v2-alpha-tpuv5'"):
        make_vm(time, dataclasses.replace(V3_16, tpu_runtime="v2-alpha-tpuv5")).ensure()
    assert cloud.methods("Create") == ["CreateNode"] and not cloud.methods("Delete")


@pytest.mark.parametrize("deed", ["ensure", "replace", "delete"])
@pytest.mark.parametrize("state", ["READY", "PREEMPTED"])
def test_a_slice_that_somebody_else_made_is_left_alone(
    cloud: Any, time: Time, deed: str, state: str
) -> None:
    make_vm(time).ensure()
    cloud.nodes["a"].labels = {"created-by": "somebody"}
    cloud.plans["a"] = [state]
    with pytest.raises(UserError, match="a TPU of this name in local that this library did not"):
        getattr(make_vm(time), deed)()
    assert cloud.methods("Create") == ["CreateNode"] and not cloud.methods("Delete")
    assert list_vms("local", api=api(time)) == []


@pytest.mark.parametrize(
    "code", [StatusCode.RESOURCE_EXHAUSTED, StatusCode.INTERNAL, StatusCode.ABORTED]
)
def test_a_creation_that_fails_for_now_leaves_nothing_and_may_be_tried_again(
    cloud: Any, time: Time, code: Any
) -> None:
    cloud.failures = [(code, "There is no more capacity in the zone")]
    vm = make_vm(time)
    with pytest.raises(NoCapacity, match="^local: There is no more capacity in the zone$"):
        vm.ensure()
    assert not cloud.nodes
    assert vm.ensure().ready


def test_an_operation_that_is_forgotten_has_not_failed(cloud: Any, time: Time) -> None:
    cloud.plans["a"] = ["CREATING", "CREATING", "CREATING", "READY"]
    cloud.faults["GetOperation"] = [fake.Fault(StatusCode.NOT_FOUND)] * 3
    assert make_vm(time).ensure().ready
    assert not cloud.faults["GetOperation"] and not cloud.methods("Delete")


def test_a_creation_that_fails_for_good_says_what_to_change(cloud: Any, time: Time) -> None:
    cloud.failures = [(StatusCode.INVALID_ARGUMENT, "Network net is not found.")]
    with pytest.raises(UserError) as caught:
        make_vm(time).ensure()
    assert str(caught.value) == (
        "Google Cloud refuses: Network net is not found; see the keys tpu_... of the configuration"
    )
    assert not cloud.nodes


def test_a_stuck_creation_is_reported_each_minute_and_given_up_in_time(
    cloud: Any, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    cloud.plans["a"] = ["CREATING"]
    config = dataclasses.replace(V3_16, tpu_wait_minutes=10)
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(NoCapacity, match=r"^TPU a is still CREATING after 10 min \(tpu_wait_min"),
    ):
        make_vm(time, config).ensure()
    assert 600 <= time.now < 620
    waiting = [text for text in caplog.messages if text.startswith("TPU a: CREATING, after")]
    assert 8 <= len(waiting) <= 9 and waiting[0] == "TPU a: CREATING, after 1 min"

    cloud.plans["a"] = ["READY"]  # the request went on: to ask again is to wait on
    assert make_vm(time, config).ensure().ready
    assert cloud.methods("Create") == ["CreateNode"]


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED"])
def test_what_is_left_of_a_lost_slice_is_deleted_and_created_anew(
    cloud: Any, time: Time, state: str
) -> None:
    vm = make_vm(time, spot=True)
    vm.ensure()
    cloud.plans["a"] = [state]
    lost = vm.state()
    assert lost is not None and (lost.state, lost.ready) == (state, False)
    first = cloud.nodes["a"]
    assert vm.ensure().ready
    assert cloud.nodes["a"] is not first


def test_a_slice_that_is_preempted_before_it_is_ready_is_created_anew(
    cloud: Any, time: Time
) -> None:
    cloud.plans["a"] = ["CREATING"]
    time.at(100, lambda: cloud.preempt("a"))
    assert make_vm(time, spot=True).ensure().ready
    assert cloud.methods("Create") == ["CreateNode", "CreateNode"]


def test_a_slice_that_was_deleted_by_somebody_is_created_anew(cloud: Any, time: Time) -> None:
    vm = make_vm(time)
    vm.ensure()
    cloud.vanish("a")
    assert vm.state() is None
    assert vm.ensure().ready


@pytest.mark.parametrize("config", [V3_16, QUEUED], ids=["node", "queued"])
def test_replacing_deletes_even_what_is_ready(cloud: Any, time: Time, config: PodConfig) -> None:
    vm = make_vm(time, config)
    vm.ensure()
    first = cloud.nodes["a"]
    assert vm.replace().ready
    assert cloud.nodes["a"] is not first


def test_a_host_without_an_address_is_waited_for(
    cloud: Any, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    cloud.without_address = 3
    with caplog.at_level(logging.INFO):
        assert make_vm(time).ensure().addresses == TWO_HOSTS
    assert "TPU a: READY, 1 of 2 hosts without an address" in caplog.messages
    assert cloud.without_address == 0


def test_a_stopped_slice_is_started(cloud: Any, time: Time) -> None:
    vm = make_vm(time)
    vm.ensure()
    cloud.plans["a"] = ["STOPPED"]
    assert vm.ensure().ready
    assert cloud.methods("StartNode") and not cloud.methods("Delete")


@pytest.mark.parametrize(
    "answer", [None, fake.Fault(StatusCode.ABORTED), fake.Fault(StatusCode.FAILED_PRECONDITION)]
)
def test_an_adopted_slice_is_given_the_new_script(cloud: Any, time: Time, answer: Any) -> None:
    make_vm(time).ensure()
    cloud.nodes["a"].metadata["ssh-keys"] = "of the user"
    cloud.faults["UpdateNode"] = [answer] if answer else []
    assert make_vm(time, script="newer").ensure().ready
    assert dict(cloud.nodes["a"].metadata) == {
        "startup-script": "newer",
        "ssh-keys": "of the user",
    }
    assert len(cloud.methods("UpdateNode")) == (2 if answer else 1)


@pytest.mark.parametrize("config", [V3_16, QUEUED], ids=["node", "queued"])
def test_deleting_ends_when_nothing_is_left(cloud: Any, time: Time, config: PodConfig) -> None:
    vm = make_vm(time, config)
    vm.ensure()
    vm.delete()
    assert vm.state() is None and not cloud.nodes and not cloud.requests
    vm.delete()
    assert len(cloud.methods("Delete")) == 1


def test_a_deletion_that_something_is_in_the_way_of_is_asked_for_again(
    cloud: Any, time: Time
) -> None:
    vm = make_vm(time)
    vm.ensure()
    in_the_way = [fake.Fault(StatusCode.ABORTED), fake.Fault(StatusCode.FAILED_PRECONDITION)]
    cloud.faults["DeleteNode"] = [*in_the_way, fake.Fault(StatusCode.UNAVAILABLE, done=True)]
    vm.delete()
    assert not cloud.nodes


def test_a_deletion_that_does_not_end_is_reported(cloud: Any, time: Time) -> None:
    vm = make_vm(time)
    vm.ensure()
    cloud.faults["DeleteNode"] = [fake.Fault(StatusCode.ABORTED)] * 1000
    with pytest.raises(TimeoutError, match=r"^TPU a is still READY after 15 min \(deletion\)$"):
        vm.delete()


def test_a_slice_that_is_known_is_a_value() -> None:
    one = Slice("a", "READY", ("10.0.0.2",), "v3-8", "runtime", False, True, "")
    assert one == dataclasses.replace(one) and hash(one) == hash(dataclasses.replace(one))
    assert one.ready and not dataclasses.replace(one, addresses=()).ready
