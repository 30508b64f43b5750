#!/usr/bin/env python3
"""Convert a large checkpoint to each format, and copy it with `cp`: time, speed and memory of each.

    python benchmarks/make_gptj.py --output step_383500 --shards 8
    python benchmarks/conversion.py --input step_383500 --config configs/6B_roto_256.json

Prints one JSON line for each. Memory is the largest resident set of the process, as the kernel
counts it; speed is of the bytes of the input. Each ends with `sync`, so that what is still in
memory is not counted as written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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
    args = parser.parse_args()
    n_bytes = sum(path.stat().st_size for path in Path(args.input).rglob("*") if path.is_file())
    output = f"{args.input.rstrip('/')}.converted"
    commands = {"cp -r": ["cp", "-r", args.input, output]} | {
        name: [
            sys.executable, str(RESHARDING), "--input", args.input, "--config", args.config,
            "--output", output, *flags,
        ]
        for name, flags in TARGETS.items()
    }  # fmt: skip
    copying = 0.0
    for name, command in commands.items():
        seconds, gigabytes = measured(command)
        copying = copying or seconds
        line = {
            "what": name,
            "seconds": round(seconds, 1),
            "gb_per_s": round(n_bytes / seconds / 1e9, 3),
            "of_cp": round(copying / seconds, 2),
            "memory_gb": round(gigabytes, 2),
        }
        print(json.dumps(line), flush=True)
        shutil.rmtree(output)


if __name__ == "__main__":
    main()
