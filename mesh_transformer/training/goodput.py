"""Where the time of a run goes: the part that trained, and each part that did not."""

from __future__ import annotations

import collections
import contextlib
import logging
import time
from collections.abc import Callable, Iterator

STEPS = "training"
LOST = "training lost again"
STARTING = "starting"
COMPILING = "compiling"
RESTORING = "restoring"
SAVING = "saving"
VALIDATING = "validating"
WAITING = "waiting to try again"

_logger = logging.getLogger(__name__)


class Ledger:
    """Books every second of a run under one of the names above; they sum to the whole.

    Goodput is the share of wall time spent on steps that were not lost again (Google's ML Goodput;
    Megascale, arXiv:2402.15627, calls it effective training time).

    Args:
        clock: Seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._since = clock()
        self._doing = STARTING
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self._step_seconds: dict[int, float] = {}
        self._in_steps = 0.0  # their sum
        self._lost_at: float | None = None
        self._steps_lost = 0
        self.restarts = 0

    def now(self, doing: str) -> None:
        """Book the time since the last call, and say what is done from now on."""
        now = self._clock()
        self._seconds[self._doing] += now - self._since
        self._since, self._doing = now, doing

    @contextlib.contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Book the time of the `with` block apart."""
        before = self._doing
        self.now(doing)
        try:
            yield
        finally:
            self.now(before)

    def step(self, step: int) -> None:
        """Note that a step is done: what was spent on training since the last one is its time.

        The first one after a loss is logged with the time that recovery took.
        """
        self.now(STEPS)
        self._step_seconds[step] = self._seconds[STEPS] - self._in_steps
        self._in_steps = self._seconds[STEPS]
        if self._lost_at is not None:
            _logger.info(
                "training again %.1f s after the loss: step %d is done, %d step(s) are taken again",
                self._since - self._lost_at,
                step,
                self._steps_lost,
            )
            self._lost_at, self._steps_lost = None, 0

    def lost(self) -> None:
        """Note that all hosts have to start again: until the next step it is recovered from.

        Steps that were not done are lost, and so is the time in which nobody had noticed.
        """
        self.restarts += 1
        self.now(self._doing)
        self._seconds[LOST] += self._seconds[STEPS] - self._in_steps
        self._seconds[STEPS] = self._in_steps
        if self._lost_at is None:
            self._lost_at = self._clock()

    def restored(self, step: int) -> None:
        """Book the time of later steps as lost: they are taken again."""
        for later in [taken for taken in self._step_seconds if taken > step]:
            self._steps_lost += 1
            seconds = self._step_seconds.pop(later)
            self._seconds[STEPS] -= seconds
            self._in_steps -= seconds
            self._seconds[LOST] += seconds

    @property
    def goodput(self) -> float:
        """Share of the time so far that trained and was not lost."""
        self.now(self._doing)
        whole = self._since - self._began
        return self._seconds[STEPS] / whole if whole else 0.0

    def __str__(self) -> str:
        goodput = self.goodput
        whole = self._since - self._began
        parts = [
            f"{name} {seconds:.1f} s"
            for name, seconds in sorted(self._seconds.items(), key=lambda item: -item[1])
            if seconds >= 0.05
        ]
        restarts = f", {self.restarts} restart(s)" if self.restarts else ""
        return f"goodput {goodput:.1%} of {whole:.1f} s{restarts}: {', '.join(parts)}"
