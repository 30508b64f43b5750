"""The driver without hosts: what it does before, between and around sessions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import record_files
from configurations import MINIMAL
from fake_session import N_SEQUENCES, Fake

from mesh_transformer.config import parse
from mesh_transformer.errors import UserError
from mesh_transformer.session import Restored, SessionLost

pytest.importorskip("ray", reason="needs the extra [pods]")

from mesh_transformer import driver  # noqa: E402
from mesh_transformer.pod.host import Devices  # noqa: E402
from mesh_transformer.training import recovery  # noqa: E402
from mesh_transformer.training.loop import Finished  # noqa: E402


class FakePod:
    """Machines that are always there."""

    n_devices: int | None = None

    def __enter__(self) -> FakePod:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left."""

    def nodes(self, seconds: int) -> list[Any]:
        return []


class FakeCluster(Fake):
    """A session without a model, on hosts that are not there."""

    devices, n_alive = Devices(1, "cpu", 9), 1

    def __enter__(self) -> FakeCluster:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left."""

    def latest(self) -> int | None:
        return self.restored and self.restored.step

    def tune_from(self, path: str, *, fresh_opt: bool) -> None:
        self.does("tune from", path, fresh_opt)

    def clear(self) -> None:
        self.does("clear")
        self.restored, self.step = None, 0


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """Train by the driver in a folder with a training set, on the sessions given."""
    monkeypatch.chdir(tmp_path)
    record_files.write(Path("train.tfrecords"), record_files.numbered(N_SEQUENCES, seq=4))
    ours = {"seq": 4, "tokenizer": "bytes", "train_set": "train.tfrecords", "model_dir": "run"}

    def trained(*sessions: FakeCluster, keys: Any = None, **flags: Any) -> Finished:
        left = iter(sessions)
        monkeypatch.setattr(driver, "Cluster", lambda config, nodes: next(left))
        monkeypatch.setattr(recovery, "_FIRST_WAIT", 0.0)
        return driver.train(parse(MINIMAL | ours | (keys or {})), FakePod(), **flags)

    return trained


def saved(step: int) -> Restored:
    return Restored(step, {"epoch": 0, "sample": step})


def test_tasks_that_nothing_can_run_are_told_before_machines_are_asked_for(
    train: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakePod, "__enter__", lambda self: 1 / 0)
    with pytest.raises(UserError, match="^eval_harness_tasks asks for piqa after each validation"):
        train(keys={"eval_harness_tasks": ["piqa"]})


TUNING = {"tune_model_path": "runs/other", "fresh_opt": True}
LEFT_ASIDE = "run goes on as it is; --new starts over from --tune-model-path"


def lost_at(step: int, session: FakeCluster) -> FakeCluster:
    def lose() -> None:
        raise SessionLost("a host (process 7) was lost during train")

    session.during = {("train", step): lose}
    return session


def test_a_run_with_checkpoints_leaves_the_path_to_tune_from_aside_and_says_so_once(
    train: Callable[..., Finished], caplog: pytest.LogCaptureFixture
) -> None:
    sessions = lost_at(8, FakeCluster(saved(5))), FakeCluster(saved(5))
    with caplog.at_level(logging.WARNING):
        assert train(*sessions, **TUNING) == Finished(10, None)
    assert [record.getMessage() for record in caplog.records].count(LEFT_ASIDE) == 1
    assert not any(session.named("tune from") for session in sessions)


def test_a_run_without_checkpoints_tunes_until_it_has_one_of_its_own(
    train: Callable[..., Finished], caplog: pytest.LogCaptureFixture
) -> None:
    sessions = lost_at(2, FakeCluster()), lost_at(7, FakeCluster()), FakeCluster(saved(5))
    with caplog.at_level(logging.WARNING):
        assert train(*sessions, **TUNING) == Finished(10, None)
    tuned = [session.events[0] == ("tune from", "runs/other", True) for session in sessions]
    assert tuned == [True, True, False]
    assert LEFT_ASIDE not in caplog.text


def test_a_new_run_tunes_before_it_gives_up_what_there_is_and_gives_up_only_once(
    train: Callable[..., Finished], caplog: pytest.LogCaptureFixture
) -> None:
    sessions = lost_at(8, FakeCluster(saved(5))), FakeCluster(saved(5))
    with caplog.at_level(logging.WARNING):
        assert train(*sessions, new=True, **TUNING) == Finished(10, None)
    assert sessions[0].events[:2] == [("tune from", "runs/other", True), ("clear",)]
    assert not sessions[1].named("tune from", "clear")
    assert LEFT_ASIDE not in caplog.text


def test_hosts_that_are_lost_too_often_end_the_run_with_one_message(
    train: Callable[..., Finished],
) -> None:
    with pytest.raises(UserError, match=r"(?s)process 7.* pod_retries is 1; training is given up"):
        train(lost_at(2, FakeCluster()), lost_at(2, FakeCluster()), keys={"pod_retries": 1})
