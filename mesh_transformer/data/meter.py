"""How far a long preparation has come: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO

Advance = Callable[[int], object]
"""Tells that so much more is done."""


@contextlib.contextmanager
def stage(name: str, total: int, stream: IO[str] | None = None) -> Iterator[Advance]:
    """Show a stage of work while the `with` block runs; standard error by default.

    Args:
        name: What is being done.
        total: What the advances will add up to.
        stream: Where to show it.
    """
    stream = sys.stderr if stream is None else stream
    with (_bar if stream.isatty() else _lines)(name, total, stream) as advance:
        yield advance


@contextlib.contextmanager
def _bar(name: str, total: int, stream: IO[str]) -> Iterator[Advance]:
    import rich.console
    import rich.progress

    columns = (
        rich.progress.TextColumn("{task.description:<12}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    console = rich.console.Console(file=stream)
    with rich.progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=total)
        yield lambda n: bar.advance(task, n)


@contextlib.contextmanager
def _lines(name: str, total: int, stream: IO[str], seconds: float = 10) -> Iterator[Advance]:
    begin = time.monotonic()
    done, last = 0, begin

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= seconds:
            last = now
            stream.write(f"{name}: {done / max(total, 1):.0%}\n")
            stream.flush()

    yield advance
    stream.write(f"{name}: done in {time.monotonic() - begin:.1f} s\n")
    stream.flush()
