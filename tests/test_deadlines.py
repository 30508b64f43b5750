"""How long a step of a pod may take: longer if it is compiled, however late that is."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small

from mesh_transformer.pod.host import Devices, HostInfo
from mesh_transformer.session import SessionLost

pytest.importorskip("ray", reason="needs the extra [pods]")

from mesh_transformer.pod import cluster  # noqa: E402
from mesh_transformer.pod.machines import Node  # noqa: E402

COMPILING, STEPPING = 60.0, 5.0


@dataclasses.dataclass
class Answer:
    at: float
    value: Any


@dataclasses.dataclass
class Machine:
    """Ray and one host, by a clock of their own, at which nothing has to wait.

    A call begins when the one before it has been answered; steps are computed behind their answers.
    """

    now: float = 0.0
    free_at: float = 0.0
    done_at: float = 0.0
    more: float = 0.0
    compiled: set[Any] = dataclasses.field(default_factory=set)

    def wait(
        self, answers: list[Answer], *, timeout: float, num_returns: int = 1
    ) -> tuple[list[Answer], list[Answer]]:
        first = min(answers, key=lambda answer: answer.at)
        if first.at > self.now + timeout:
            self.now += timeout
            return [], answers
        self.now = max(self.now, first.at)
        return [first], [answer for answer in answers if answer is not first]

    def __getattr__(self, method: str) -> Any:
        """Return what has a method of the host called."""
        if method.startswith("__"):
            raise AttributeError(method)
        return SimpleNamespace(remote=lambda *args, **keys: self._called(method, *args))

    def _called(self, method: str, *args: Any) -> Answer:
        self.free_at = max(self.free_at, self.now)
        if method == "train":
            program = args[0].shape, args[1] is None
            self.free_at += self.more + (0 if program in self.compiled else COMPILING)
            self.compiled.add(program)
        if method in ("train", "settle"):  # which tell of the step before
            self.free_at = max(self.free_at, self.done_at)
        if method == "train":
            self.done_at = self.free_at + STEPPING
        about = HostInfo("host", "10.0.0.1:1", cluster.__version__, "3")
        values = {"info": about, "join": Devices(1, "cpu", 1)}
        return Answer(self.free_at, values.get(method, {"loss": 1.0}))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(cluster.ray, "wait", made.wait)
    monkeypatch.setattr(cluster.ray, "get", lambda answer: answer.value)
    monkeypatch.setattr(cluster.ray, "put", lambda value: value)
    monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=lambda: made.now))
    monkeypatch.setattr(cluster, "_actor", lambda node: made)
    monkeypatch.setattr(cluster, "end", lambda hosts: None)
    return made


def session() -> cluster.Cluster:
    config = small.parsed(model_dir="gs://bucket/run", pod_start_seconds=100, pod_step_seconds=20)
    return cluster.Cluster(config, [Node("1", "10.0.0.1", {})])


def batch(length: int) -> np.ndarray:
    return np.zeros((1, 1, length), np.int32)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_later_step_of_another_shape_has_the_time_to_compile(
    machine: Machine, at_once: bool
) -> None:
    """Whether or not the steps before it have been asked for, whose metrics come with its own."""
    with session() as pod:
        steps = []
        for length in (9, 9, 9, 17, 17, 9, 33, 33):
            steps.append(pod.train(batch(length)))
            if not at_once:
                assert steps[-1]["loss"] == 1.0
        steps.append(pod.train(batch(33), np.ones((1, 1, 32))))  # another program too
        assert [step["loss"] for step in steps] == [1.0] * 9
    assert 4 * COMPILING < machine.now < 4 * COMPILING + 12 * STEPPING


@pytest.mark.parametrize(("length", "seconds", "key"), [(9, 20, "step"), (17, 100, "start")])
def test_a_step_that_hangs_is_noticed_in_the_time_that_it_has(
    machine: Machine, length: int, seconds: int, key: str
) -> None:
    pod = session()
    assert pod.train(batch(9))["loss"] == 1.0
    begun, machine.more = machine.now, 1000.0
    with pytest.raises(SessionLost, match=f"after {seconds} s from host: .* pod_{key}_seconds"):
        dict(pod.train(batch(length)))
    assert machine.now == begun + seconds
