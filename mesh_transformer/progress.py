"""What a person sees of a training run: a progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable
from typing import IO, NamedTuple, Protocol

SECONDS_BETWEEN_LINES = 10.0


class Status(NamedTuple):
    """How a run stands after an optimizer step; None where a number is not known (yet).

    Attributes:
        loss: nats/token.
        mfu: Fraction of the devices' peak.
        eta_seconds: Wall-clock time left, at the pace so far, validation and saving included.
    """

    loss: float
    learning_rate: float
    tokens_per_second: float | None
    mfu: float | None
    eta_seconds: float | None

    def __str__(self) -> str:
        parts = [f"loss {self.loss:.4f}"]
        if self.tokens_per_second is not None:
            parts.append(f"{_three_digits(self.tokens_per_second)} tok/s")
        parts.append(f"lr {self.learning_rate:.1e}")
        if self.mfu is not None:
            parts.append(f"MFU {self.mfu:.1%}")
        if self.eta_seconds is not None:
            parts.append(f"ETA {datetime.timedelta(seconds=round(self.eta_seconds))}")
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
        self._clock = clock
        self._next_line_at = -float("inf")

    def show(self, step: int, status: Status) -> None:
        """Write a line if ten seconds have passed since the last, or it is the last step."""
        now = self._clock()
        if now < self._next_line_at and step < self._total_steps:
            return
        self._next_line_at = now + SECONDS_BETWEEN_LINES
        self.say(f"step {step}/{self._total_steps}  {status}")

    def say(self, message: str) -> None:
        """Write a line."""
        self._stream.write(message + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Leave the stream open: it belongs to the caller."""


class Bar:
    """Progress as one live line under the messages of the run."""

    def __init__(self, total_steps: int, stream: IO[str], step: int = 0) -> None:
        import rich.console
        import rich.progress

        self._bar = rich.progress.Progress(
            rich.progress.SpinnerColumn(),
            rich.progress.TextColumn("{task.completed}/{task.total}"),
            rich.progress.BarColumn(bar_width=16),
            rich.progress.TextColumn("{task.description}"),
            console=rich.console.Console(file=stream, highlight=False, markup=False),
        )
        self._task = self._bar.add_task("compiling", total=total_steps, completed=step)
        self._bar.start()

    def show(self, step: int, status: Status) -> None:
        """Move the bar; it is redrawn ten times a second at most."""
        self._bar.update(self._task, completed=step, description=str(status))

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


def _three_digits(rate: float) -> str:
    """Write a rate with three digits: 9.88, 988, 12.3k, 4.56M."""
    unit, size = next(
        (unit, size) for unit, size in (("M", 1e6), ("k", 1e3), ("", 0)) if rate >= 0.9995 * size
    )
    rate /= size or 1
    return f"{rate:.{2 if rate < 9.995 else 1 if rate < 99.95 else 0}f}{unit}"
