"""Starting again what is lost: how often, how soon, and what is not retried."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from configurations import MINIMAL

from mesh_transformer.config import parse
from mesh_transformer.errors import UserError
from mesh_transformer.pod.host import Devices
from mesh_transformer.progress import PodStatus
from mesh_transformer.session import SessionLost
from mesh_transformer.training import goodput, loop, recovery

DONE = loop.Finished(10, None)


class Attempts:
    """Sessions of which each ends as told: by an error, or well. Before, it saved a checkpoint."""

    def __init__(self, *ends: tuple[int | None, Exception | None]) -> None:
        self.ends = iter(ends)
        self.prepared: list[int | None] = []
        self.waits: list[float] = []
        self.received: signal.Signals | None = None
        self.statuses: list[PodStatus] = []

    @contextlib.contextmanager
    def start(self) -> Iterator[Any]:
        latest, self.end = next(self.ends)
        yield SimpleNamespace(devices=Devices(2, "cpu", 9), latest=lambda: latest, n_alive=2)

    def train(self, monkeypatch: pytest.MonkeyPatch, **keys: int) -> loop.Finished:
        def trained(*_: Any, pod: Callable[[], PodStatus], **__: Any) -> loop.Finished:
            self.statuses.append(pod())
            if self.end:
                raise self.end
            return DONE

        monkeypatch.setattr(loop, "train", trained)
        monkeypatch.setattr(loop, "announce", lambda *_: None)
        signals = loop.StopSignals()
        signals.received = self.received
        data_for: Callable[[int], Any] = lambda n_devices: None  # noqa: E731
        return recovery.train(
            self.start,
            parse(MINIMAL | keys),
            data_for,
            signals,
            prepare=lambda session: self.prepared.append(session.latest()),
            ledger=goodput.Ledger(),
            sleep=self.waits.append,
        )


LOST = SessionLost("a host (process 7) was lost during train")


def test_a_lost_session_is_started_again_and_the_loss_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = Attempts((None, LOST), (3, LOST), (5, None))
    with caplog.at_level(logging.WARNING):
        assert attempts.train(monkeypatch, pod_retries=1) == DONE
    assert attempts.prepared == [None, 3, 5]
    assert attempts.statuses == [PodStatus(2, restarts, 0.0) for restarts in range(3)]
    assert str(LOST) in caplog.text and "starting again from the last checkpoint" in caplog.text


def test_losses_without_a_new_checkpoint_wait_longer_each_time_and_end_at_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempts = Attempts(*[(3, LOST)] * 10)
    told = r"(?s)process 7.*loss 10 without a new checkpoint, and pod_retries is 9"
    with pytest.raises(SessionLost, match=told):
        attempts.train(monkeypatch, pod_retries=9)
    assert attempts.waits == [1, 2, 4, 8, 16, 32, 64, 120, 120]


def test_a_new_checkpoint_forgives_earlier_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = Attempts(*[(step, LOST) for step in range(9)], (9, None))
    assert attempts.train(monkeypatch, pod_retries=1) == DONE
    assert attempts.waits == [1] * 9


def test_what_would_go_wrong_again_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = Attempts((None, UserError("step 3: loss is nan")))
    with pytest.raises(UserError, match="loss is nan"):
        attempts.train(monkeypatch)
    assert attempts.waits == []


def test_a_signal_that_came_before_a_loss_ends_the_run_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempts = Attempts((5, LOST), (5, None))
    attempts.received = signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        attempts.train(monkeypatch)
    assert len(attempts.prepared) == 1 and not attempts.waits
