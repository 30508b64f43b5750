"""Slices in tests: a clock that nobody waits for, and the server that stands for Google Cloud."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mesh_transformer.config import PodConfig
from mesh_transformer.pod import tpu_api
from mesh_transformer.pod.tpu_vm import TpuVm

WHY = "needs the Cloud TPU client; run EXTRAS=test,pods ./test"
fake: Any = pytest.importorskip("fake_cloud_tpu", reason=WHY, exc_type=ImportError)
StatusCode: Any = fake.grpc.StatusCode

V3_16 = PodConfig(tpu_type="v3-16")
QUEUED = dataclasses.replace(V3_16, tpu_queued=True)


class Time:
    """A clock that goes on when somebody sleeps, and what happens meanwhile."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sleeps: list[float] = []
        self._events: list[tuple[float, Callable[[], object]]] = []

    def at(self, seconds: float, event: Callable[[], object]) -> None:
        self._events.append((seconds, event))

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds
        due = [event for when, event in self._events if when <= self.now]
        self._events = [(when, event) for when, event in self._events if when > self.now]
        for event in due:
            event()


@contextlib.contextmanager
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Stand in for Google Cloud, whose zone is "local"."""
    with fake.serve() as server:
        monkeypatch.setenv(tpu_api.ENDPOINT, server.endpoint)
        yield server
    assert not server.hasty, "these calls could wait for ever"


def api(time: Time) -> tpu_api.TpuApi:
    return tpu_api.connect("local", "my-project", clock=time.clock, sleep=time.sleep)


def make_vm(
    time: Time, config: PodConfig = V3_16, *, spot: bool = False, script: str = "#!/bin/sh\n"
) -> TpuVm:
    return TpuVm("a", "local", config, spot=spot, startup_script=script, api=api(time))
