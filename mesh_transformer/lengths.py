"""How long sequences are at each optimizer step: shorter at first, where `seq_warmup` says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of each sequence that optimizer steps, counted from 1, train on.

    Stages of growing length, as in fattorib/transformer (there of one stage); those of Sequence
    Length Warmup (arXiv:2108.06084) are as many as lengths.

    Attributes:
        seq: After the last stage.
        warmup: Stages, each as optimizer steps and length.
    """

    seq: int
    warmup: tuple[tuple[int, int], ...] = ()

    def at(self, step: int) -> int:
        """Return the tokens of each sequence at a step."""
        return next(length for last, length in self._ends() if last is None or step <= last)

    def through(self, step: int) -> int:
        """Return the tokens of one sequence a step, summed over steps 1 to `step`."""
        total = before = 0
        for last, length in self._ends():
            end = step if last is None else min(step, last)
            total, before = total + (end - before) * length, end
        return total

    def begins(self, step: int) -> bool:
        """Say whether a step is the first of its length, and so compiles."""
        return step == 1 or self.at(step) != self.at(step - 1)

    def _ends(self) -> Iterator[tuple[int | None, int]]:
        """Yield the last step of each stage, None being that of the run, and the stage's length."""
        last = 0
        for steps, length in self.warmup:
            last += steps
            yield last, length
        yield None, self.seq
