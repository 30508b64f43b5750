"""What a person sees of training or of preparing data: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import rich.progress

SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[int], object]
"""Tells that so much more is done."""


class PodStatus(NamedTuple):
    """How the hosts of a run stand.

    Attributes:
        hosts: Hosts that are alive.
        restarts: How often all of them were started again.
        goodput: Share of wall time so far that trained and was not lost.
    """

    hosts: int
    restarts: int
    goodput: float

    def __str__(self) -> str:
        return f"hosts {self.hosts}  restarts {self.restarts}  goodput {self.goodput:.1%}"


class Status(NamedTuple):
    """How a run stands after an optimizer step; None where a number is not known (yet).

    Attributes:
        loss: nats/token.
        mfu: Fraction of the devices' peak.
        eta_seconds: Wall-clock time left, at the pace so far, validation and saving included.
        pod: None where there is no driver.
    """

    loss: float
    learning_rate: float
    tokens_per_second: float | None
    mfu: float | None
    eta_seconds: float | None
    pod: PodStatus | None = None

    def __str__(self) -> str:
        parts = [f"loss {self.loss:.4f}"]
        if self.tokens_per_second is not None:
            parts.append(f"{_three_digits(self.tokens_per_second)} tok/s")
        parts.append(f"lr {self.learning_rate:.1e}")
        if self.mfu is not None:
            parts.append(f"MFU {self.mfu:.1%}")
        if self.eta_seconds is not None:
            parts.append(f"ETA {datetime.timedelta(seconds=round(self.eta_seconds))}")
        if self.pod is not None:
            parts.append(str(self.pod))
        return "  ".join(parts)


class Progress(Protocol):
    """Shows a run to a person."""

    def show(self, step: int, status: Status) -> None:
        """Show how the run stands after a step."""
        ...

    def say(self, message: str) -> None:
        """Show a line that stays."""
        ...

    def close(self) -> None:
        """Give the terminal back."""
        ...


class Lines:
    """Progress as plain lines, at most one each ten seconds, for logs and pipes."""

    def __init__(
        self, total_steps: int, stream: IO[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total_steps = total_steps
        self._stream = stream
        self._rate = _Rate(clock)

    def show(self, step: int, status: Status) -> None:
        """Write a line if ten seconds have passed since the last, or it is the last step."""
        if self._rate.allows() or step >= self._total_steps:
            self.say(f"step {step}/{self._total_steps}  {status}")

    def say(self, message: str) -> None:
        """Write a line."""
        _write_line(self._stream, message)

    def close(self) -> None:
        """Leave the stream open: it belongs to the caller."""


class Bar:
    """Progress as one live line under the messages of the run, two if it has a pod."""

    def __init__(self, total_steps: int, stream: IO[str], step: int = 0) -> None:
        import rich.progress

        self._bar = _bar(
            stream,
            rich.progress.SpinnerColumn(),
            rich.progress.TextColumn("{task.completed}/{task.total}"),
            rich.progress.BarColumn(bar_width=16),
            rich.progress.TextColumn("{task.description}"),
        )
        self._task = self._bar.add_task("compiling", total=total_steps, completed=step)
        self._bar.start()

    def show(self, step: int, status: Status) -> None:
        """Move the bar; it is redrawn ten times a second at most."""
        lines = [str(status._replace(pod=None)), *([str(status.pod)] if status.pod else [])]
        self._bar.update(self._task, completed=step, description="\n".join(lines))

    def say(self, message: str) -> None:
        """Write a line above the bar."""
        self._bar.console.print(message, soft_wrap=True)

    def close(self) -> None:
        """Draw the bar a last time and show the cursor again."""
        self._bar.stop()


def for_stream(total_steps: int, step: int = 0, stream: IO[str] | None = None) -> Progress:
    """Choose the bar for a terminal and lines for anything else; standard output by default."""
    stream = sys.stdout if stream is None else stream
    if stream.isatty():
        return Bar(total_steps, stream, step)
    return Lines(total_steps, stream)


@contextlib.contextmanager
def stage(
    name: str,
    total: int,
    stream: IO[str] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Advance]:
    """Show a stage of a preparation while the `with` block runs; standard error by default.

    Args:
        name: What is being done.
        total: What the advances will add up to.
        stream: Where to show it.
        clock: Seconds that only go forward.
    """
    stream = sys.stderr if stream is None else stream
    is_terminal = stream.isatty()
    shown = _as_bar(name, total, stream) if is_terminal else _as_lines(name, total, stream, clock)
    with shown as advance:
        yield advance


@contextlib.contextmanager
def _as_bar(name: str, total: int, stream: IO[str]) -> Iterator[Advance]:
    import rich.progress

    columns = (
        rich.progress.TextColumn("{task.description:<12}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    with _bar(stream, *columns) as bar:
        task = bar.add_task(name, total=total)
        yield lambda n: bar.advance(task, n)


@contextlib.contextmanager
def _as_lines(
    name: str, total: int, stream: IO[str], clock: Callable[[], float]
) -> Iterator[Advance]:
    begin, done, rate = clock(), 0, _Rate(clock)
    rate.allows()  # the first line can wait: most stages are over by then

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if rate.allows():
            _write_line(stream, f"{name}: {done / max(total, 1):.0%}")

    yield advance
    _write_line(stream, f"{name}: done in {clock() - begin:.1f} s")


class _Rate:
    """Allows a line at once, and the next whenever ten seconds have passed."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._next_line_at = -float("inf")

    def allows(self) -> bool:
        now = self._clock()
        if now < self._next_line_at:
            return False
        self._next_line_at = now + SECONDS_BETWEEN_LINES
        return True


def _write_line(stream: IO[str], message: str) -> None:
    stream.write(message + "\n")
    stream.flush()


def _bar(stream: IO[str], *columns: rich.progress.ProgressColumn) -> rich.progress.Progress:
    import rich.console
    import rich.progress

    console = rich.console.Console(file=stream, highlight=False, markup=False)
    return rich.progress.Progress(*columns, console=console)


def _three_digits(rate: float) -> str:
    """Write a rate with three digits: 9.88, 988, 12.3k, 4.56M."""
    unit, size = next(
        (unit, size) for unit, size in (("M", 1e6), ("k", 1e3), ("", 0)) if rate >= 0.9995 * size
    )
    rate /= size or 1
    return f"{rate:.{2 if rate < 9.995 else 1 if rate < 99.95 else 0}f}{unit}"
