"""The host processes of a Ray cluster on this machine, found to be killed."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
from collections.abc import Callable

import processes


def pids_below(ancestor: int, title: str = "ray::Host") -> list[int]:
    """Return the process ids of the hosts that a driver has started, itself or by Ray.

    Args:
        title: Or of other programs: how what `ps` shows of them begins, without their folder.
    """
    listing = ["ps", "-ww", "-eo", "pid=,ppid=,args="]
    done = subprocess.run(listing, capture_output=True, text=True, check=True, timeout=60)
    rows = [line.split(None, 2) for line in done.stdout.splitlines()]
    parents = {int(row[0]): int(row[1]) for row in rows}
    found = [int(row[0]) for row in rows if _program(row[2]).startswith(title)]
    return sorted(pid for pid in found if ancestor in _ancestors(pid, parents))


def is_at(pid: int, method: str) -> bool:
    """Whether a host is in a method, which Ray writes over its command line."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        title = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
        return title.rstrip(b"\0 ") == f"ray::Host.{method}".encode()
    return False


def stopped(
    driver: subprocess.Popen[str],
    when: Callable[[int], bool],
    but: tuple[int, ...] = (),
    n_hosts: int = 2,
) -> int:
    """Stop a host (SIGSTOP) at a moment when something is true of it; return its process id.

    Args:
        but: Hosts of an earlier attempt.
    """
    pids: list[int] = []

    def caught() -> bool:
        if len(pids) < n_hosts:
            pids[:] = [pid for pid in pids_below(driver.pid) if pid not in but]
        if len(pids) < n_hosts or not when(pids[-1]):
            return False
        os.kill(pids[-1], signal.SIGSTOP)
        if when(pids[-1]):
            return True
        os.kill(pids[-1], signal.SIGCONT)  # it had gone on in the meantime
        return False

    assert processes.wait_until(caught, driver), f"{driver.args!r} ended before"
    return pids[-1]


def _program(arguments: str) -> str:
    """Return the name of a program, or the title that it gave itself."""
    return pathlib.PurePath(arguments.split()[0]).name


def _ancestors(pid: int, parents: dict[int, int]) -> list[int]:
    found = []
    while pid := parents.get(pid, 0):
        found.append(pid)
    return found
