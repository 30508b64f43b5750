#!/usr/bin/env python3
"""Convert a large checkpoint to each format, and copy it with `cp`: time, speed and memory of each.

    python benchmarks/make_gptj.py --output step_383500 --shards 8
    python benchmarks/conversion.py --input step_383500 --config configs/6B_roto_256.json --rounds 3

Prints one JSON line for each, with its median over the rounds, which run the commands in turns.
Each command begins after the input was read once, so that all find as much of it in memory, and
ends with `sync`, so that what is still in memory is not counted as written. Memory is the largest
resident set of the process in any round, as the kernel counts it; speed is of the bytes of the
input.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESHARDING = Path(__file__).parent.parent / "resharding_example.py"
TARGETS = {
    "slim, 1 shard": ["--format", "slim", "--shards", "1"],
    "slim, 2 shards": ["--format", "slim", "--shards", "2"],
    "native": ["--format", "native"],
    "hf": ["--format", "hf"],
}


CHUNK = 1 << 24


def read(folder: Path) -> int:
    """Read every file of a folder; return their bytes."""
    n_bytes = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while n_read := len(file.read(CHUNK)):
                n_bytes += n_read
    return n_bytes


def measured(command: list[str]) -> tuple[float, float]:
    """Run a command and `sync`; return seconds, and GB of memory at most."""
    begun = time.monotonic()
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)} ended with status {child.returncode}")
    os.sync()
    return time.monotonic() - begun, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    output = f"{args.input.rstrip('/')}.converted"
    commands = {"cp -r": ["cp", "-r", args.input, output]} | {
        name: [
            sys.executable, str(RESHARDING), "--input", args.input, "--config", args.config,
            "--output", output, *flags,
        ]
        for name, flags in TARGETS.items()
    }  # fmt: skip
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            n_bytes = read(Path(args.input))
            results[name].append(measured(command))
            shutil.rmtree(output)
            os.sync()
    medians = {name: statistics.median(s for s, _ in runs) for name, runs in results.items()}
    for name, runs in results.items():
        line = {
            "what": name,
            "seconds": [round(seconds, 1) for seconds, _ in runs],
            "gb_per_s": round(n_bytes / medians[name] / 1e9, 3),
            "of_cp": round(medians["cp -r"] / medians[name], 2),
            "memory_gb": round(max(memory for _, memory in runs), 2),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
