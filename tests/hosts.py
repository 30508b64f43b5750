"""The host processes of a Ray cluster on this machine, found to be killed."""

from __future__ import annotations

import subprocess


def pids_below(ancestor: int) -> list[int]:
    """Return the process ids of the hosts that a driver has started, itself or by Ray."""
    listing = ["ps", "-eo", "pid=,ppid=,args="]
    done = subprocess.run(listing, capture_output=True, text=True, check=True, timeout=60)
    rows = [line.split(None, 2) for line in done.stdout.splitlines()]
    parents = {int(row[0]): int(row[1]) for row in rows}
    hosts = [int(row[0]) for row in rows if row[2].startswith("ray::Host")]
    return sorted(pid for pid in hosts if ancestor in _ancestors(pid, parents))


def _ancestors(pid: int, parents: dict[int, int]) -> list[int]:
    found = []
    while pid := parents.get(pid, 0):
        found.append(pid)
    return found
