"""Slices that wait their turn: queued resources of the real client and a local server."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from tpu_slices import QUEUED, V3_16, StatusCode, Time, api, fake, make_vm, serve

from mesh_transformer.errors import UserError
from mesh_transformer.pod.tpu_vm import NoCapacity, TpuVm, list_vms

pytestmark = pytest.mark.pods


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with serve(monkeypatch) as server:
        yield server


@pytest.fixture
def time() -> Time:
    return Time()


def test_a_request_that_waits_must_be_what_is_asked_for_too(cloud: Any, time: Time) -> None:
    cloud.queues["a"] = ["WAITING_FOR_RESOURCES"]
    with pytest.raises(NoCapacity):
        make_vm(time, QUEUED).ensure()
    with pytest.raises(UserError, match="queued-resources delete a --zone local --force"):
        make_vm(time, dataclasses.replace(QUEUED, tpu_type="v3-8")).ensure()


def test_a_queued_slice_waits_its_turn(
    cloud: Any, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        made = make_vm(time, dataclasses.replace(QUEUED, tpu_wait_minutes=30), spot=True).ensure()
    assert made.ready and made.queued and made.ours
    request = cloud.requests["a"]
    assert request.name == "projects/my-project/locations/local/queuedResources/a"
    assert request.queueing_policy.valid_until_duration.total_seconds() == 30 * 60
    assert "spot" in request and "guaranteed" not in request
    assert fake.V2ALPHA1 not in dict(cloud.calls)
    states = [text.removeprefix("TPU a: ") for text in caplog.messages[1:-1]]
    assert states == ["asked for", "ACCEPTED", "WAITING_FOR_RESOURCES", "CREATING"]


def test_a_reserved_slice_is_queued_through_the_api_that_can(cloud: Any, time: Time) -> None:
    make_vm(time, dataclasses.replace(QUEUED, tpu_reserved=True)).ensure()
    asked = [
        request
        for (service, method), request in zip(cloud.calls, cloud.asked, strict=True)
        if (service, method) == (fake.V2ALPHA1, "CreateQueuedResource")
    ]
    assert [request.queued_resource.guaranteed.reserved for request in asked] == [True]


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED", "ACTIVE"])
def test_what_is_left_of_a_queued_slice_is_deleted_and_asked_for_anew(
    cloud: Any, time: Time, state: str
) -> None:
    vm = make_vm(time, QUEUED, spot=True)
    vm.ensure()
    cloud.preempt("a")
    cloud.queues["a"] = [state]
    cloud.plans["a"] = []  # its node is not to come back
    cloud.failures = [(StatusCode.INTERNAL, "expired")] * 9
    lost = vm.state()
    assert lost is not None and (lost.state, lost.ready, lost.addresses) == (state, False, ())
    assert vm.ensure().ready
    assert cloud.methods("CreateQ") == ["CreateQueuedResource"] * 2


def test_a_queued_slice_that_is_suspended_while_it_leaves_is_waited_for(
    cloud: Any, time: Time
) -> None:
    vm = make_vm(time, QUEUED, spot=True)
    vm.ensure()
    cloud.queues["a"] = ["SUSPENDING", "SUSPENDING", "SUSPENDED"]
    assert vm.ensure().ready
    assert cloud.methods("Delete") == ["DeleteQueuedResource"]


@pytest.mark.parametrize(
    ("code", "error"),
    [(StatusCode.RESOURCE_EXHAUSTED, NoCapacity), (StatusCode.INVALID_ARGUMENT, UserError)],
)
def test_a_queued_slice_that_fails_leaves_nothing(
    cloud: Any, time: Time, code: Any, error: type[Exception]
) -> None:
    cloud.queues["a"] = ["ACCEPTED", "FAILED"]
    cloud.failures = [(code, "the reason")]
    with pytest.raises(error, match="the reason"):
        make_vm(time, QUEUED).ensure()
    assert not cloud.requests


def test_slices_are_listed_with_those_that_wait(cloud: Any, time: Time) -> None:
    assert list_vms("local", api=api(time)) == []
    for name, config in (("c", V3_16), ("a", V3_16), ("b", QUEUED)):
        TpuVm(name, "local", config, spot=False, startup_script="", api=api(time)).ensure()
    cloud.vanish("b")
    cloud.queues["b"] = ["WAITING_FOR_RESOURCES"]
    TpuVm("b", "local", QUEUED, spot=False, startup_script="", api=api(time)).state()
    found = list_vms("local", api=api(time))
    assert [(item.name, item.state, item.queued) for item in found] == [
        ("a", "READY", False),
        ("b", "WAITING_FOR_RESOURCES", True),
        ("c", "READY", False),
    ]
