"""The ledger of a run's time."""

from __future__ import annotations

import logging

import pytest

from mesh_transformer.training import goodput
from mesh_transformer.training.goodput import Ledger


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run() -> tuple[Ledger, Clock]:
    """Start 3 s, compile 10 s, take steps 2 and 3 of 2 s each with a save of 1 s between."""
    clock = Clock()
    ledger = Ledger(clock)
    clock.now += 3
    ledger.now(goodput.COMPILING)
    clock.now += 10
    ledger.step(1)
    clock.now += 2
    ledger.step(2)
    with ledger.during(goodput.SAVING):
        clock.now += 1
    clock.now += 2
    ledger.step(3)
    return ledger, clock


def test_every_second_is_booked_once() -> None:
    ledger, _ = run()
    assert ledger.goodput == pytest.approx(4 / 18)
    assert str(ledger) == (
        "goodput 22.2% of 18.0 s: compiling 10.0 s, training 4.0 s, starting 3.0 s, saving 1.0 s"
    )


def test_steps_after_the_restored_one_are_lost() -> None:
    ledger, clock = run()
    ledger.lost()
    ledger.restored(2)
    assert ledger.goodput == pytest.approx(2 / 18)
    clock.now += 2
    ledger.step(3)
    ledger.restored(3)
    assert str(ledger) == (
        "goodput 20.0% of 20.0 s, 1 restart(s): compiling 10.0 s, training 4.0 s, starting 3.0 s, "
        "training lost again 2.0 s, saving 1.0 s"
    )


def test_a_hang_is_no_training() -> None:
    ledger, clock = run()
    clock.now += 600
    ledger.lost()
    ledger.now(goodput.STARTING)
    clock.now += 6
    ledger.restored(3)
    clock.now += 2
    ledger.step(4)
    assert ledger.goodput == pytest.approx(4 / 626)
    assert "training lost again 600.0 s" in str(ledger)


def test_recovery_is_told_once_it_trains_again(caplog: pytest.LogCaptureFixture) -> None:
    ledger, clock = run()
    with caplog.at_level(logging.INFO):
        ledger.lost()
        clock.now += 4
        ledger.restored(1)
        ledger.lost()  # before it had trained
        clock.now += 2
        ledger.restored(1)
        assert not caplog.messages
        ledger.step(2)
        ledger.step(3)
    assert caplog.messages == [
        "training again 6.0 s after the loss: step 2 is done, 2 step(s) are taken again"
    ]
    assert ledger.restarts == 2
