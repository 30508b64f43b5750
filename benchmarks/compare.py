#!/usr/bin/env python3
"""Time our training step against PyTorch's, in turns on one machine; prints one JSON line.

    python benchmarks/compare.py --config benchmarks/cpu_27M.json --rounds 3

Each round runs train_step.py and torch_step.py once each, as processes of their own, so that a
machine that slows down slows both; the medians over the rounds are compared.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

PROGRAMS = {"ours": "train_step.py", "torch": "torch_step.py"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", default=sys.executable, help="of PyTorch, if it is another")
    args = parser.parse_args()
    speeds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(args.rounds):
        for name, program in PROGRAMS.items():
            python = sys.executable if name == "ours" else args.python
            speeds[name].append(tokens_per_second(python, program, args.config))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    print(
        json.dumps(
            {"ratio": round(medians["ours"] / medians["torch"], 3), **medians} | {"rounds": speeds}
        )
    )


def tokens_per_second(python: str, program: str, config: str) -> float:
    """Run one benchmark and return its speed; its own line goes to standard error."""
    path = pathlib.Path(__file__).parent / program
    done = subprocess.run(
        [python, str(path), "--config", config], check=True, stdout=subprocess.PIPE, text=True
    )
    line = done.stdout.strip().splitlines()[-1]
    print(line, file=sys.stderr, flush=True)
    return json.loads(line)["tokens_per_second"]


if __name__ == "__main__":
    main()
