"""Programs that tests start: how they end, or that they hang, which fails the test in time."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

LIMIT = 300.0
"""Seconds that a program is given: many times what any takes on a slow machine."""


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        status: Its exit status.
        output: What it wrote to standard output.
        told: What it wrote to standard error.
    """

    status: int
    output: str
    told: str


def ended(process: subprocess.Popen[str], given: str | None = None, limit: float = LIMIT) -> Ended:
    """Give a process its input, if any, and wait for it; one that hangs fails with its output."""
    with process:
        try:
            output, told = process.communicate(given, timeout=limit)
        except subprocess.TimeoutExpired as late:
            process.kill()
            so_far = ((text or b"").decode(errors="replace") for text in (late.stdout, late.stderr))
            pytest.fail("\n".join([f"{process.args!r} hangs; it wrote", *so_far]))
    return Ended(process.returncode, output, told)


@contextlib.contextmanager
def killed_if_late(process: subprocess.Popen[str], limit: float = LIMIT) -> Iterator[None]:
    """Kill a process if the `with` block takes too long."""
    timer = threading.Timer(limit, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Wait for something that a process does; False if it ends, or is killed as late, without."""
    with killed_if_late(process):
        while not happened():
            try:
                process.wait(timeout=0.002)
            except subprocess.TimeoutExpired:
                continue
            return happened()
    return True


def read_until(line: str, process: subprocess.Popen[str]) -> None:
    """Read what a process writes up to some line; it fails if it ends, or is late, without."""
    assert process.stdout is not None
    read = []
    with killed_if_late(process):
        for text in process.stdout:
            read.append(text)
            if text.strip() == line:
                return
    pytest.fail("".join([f"{process.args!r} did not write {line!r}; it wrote\n", *read]))
