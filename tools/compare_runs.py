"""Tell whether two runs took the same steps: every logged value equal, time aside.

    python tools/compare_runs.py runs/before runs/after [--tolerance 1e-5]

For a change that should not alter any number: train a few steps before and after it, in two
folders, and compare. Prints the first difference and the largest one of each value that differs;
the exit status is 1 if there is any. With a tolerance, smaller relative differences pass.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from mesh_transformer.metrics_file import TIMING, Line, read


class Difference(NamedTuple):
    """One value of one line; absent values are None."""

    step: int
    name: str
    before: Any
    after: Any

    @property
    def relative(self) -> float:
        """Relative to the larger magnitude; infinite for what no number separates."""
        numbers = (self.before, self.after)
        if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
            return math.inf
        return abs(self.before - self.after) / max(map(abs, numbers))

    def __str__(self) -> str:
        return f"step {self.step}: {self.name} {self.before!r} -> {self.after!r}"


def values(lines: list[Line]) -> dict[tuple[int, str], Any]:
    return {
        (line["step"], name): value
        for line in lines
        for name, value in line.items()
        if name not in (*TIMING, "step")
    }


def differences(before: list[Line], after: list[Line], tolerance: float) -> Iterator[Difference]:
    """Yield what differs by more than the tolerance, in the order of steps."""
    old, new = values(before), values(after)
    for step, name in sorted(old.keys() | new.keys()):
        found = Difference(step, name, old.get((step, name)), new.get((step, name)))
        both_nan = found.before != found.before and found.after != found.after
        if found.before != found.after and not both_nan and found.relative > tolerance:
            yield found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", help="folder of a run, or its metrics.jsonl")
    parser.add_argument("after", help="the same of the other run")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="relative; 0 asks for equality"
    )
    args = parser.parse_args(arguments)
    before, after = read(args.before), read(args.after)
    found = list(differences(before, after, args.tolerance))
    if not found:
        print(f"the same {len(values(before))} values in {len(before)} lines")
        return
    print("first:", found[0])
    for name in sorted({difference.name for difference in found}):
        largest = max((d for d in found if d.name == name), key=lambda d: d.relative)
        print(f"largest: {largest} (relative {largest.relative:.3g})")
    sys.exit(1)


if __name__ == "__main__":
    main()
