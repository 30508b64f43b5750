"""Packing documents into sequences of equal length.

Documents are laid end to end in some order and the whole is cut every `length` tokens. Orders are
drawn by `random.Random(seed)` with the calls that the original script made, so the sequences are
its sequences. Tokens stay where they are, on disk: only orders and offsets are in memory.
"""

from __future__ import annotations

import array
import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np


class Tokens(Protocol):
    """Token ids in memory or on disk, of which any stretch can be had."""

    def __len__(self) -> int: ...
    def __getitem__(self, stretch: slice, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Documents:
    """Token ids of documents, one after the other.

    Attributes:
        tokens: The ids of all documents.
        ends: int64, where each document ends in `tokens`.
    """

    tokens: Tokens
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)


class Chain:
    """Documents laid end to end in a given order, of which any stretch can be read.

    Args:
        documents: The documents.
        order: Their numbers, in the order wanted.
    """

    def __init__(self, documents: Documents, order: np.ndarray) -> None:
        starts = np.concatenate([[0], documents.ends[:-1]])[order]
        ends = documents.ends[order]
        self._tokens = documents.tokens
        self._chain_ends = np.cumsum(ends - starts)
        # What to add to a place in the chain to have the place in `tokens`.
        self._offsets = ends - self._chain_ends

    def __len__(self) -> int:
        return int(self._chain_ends[-1]) if len(self._chain_ends) else 0

    def read(self, begin: int, end: int) -> np.ndarray:
        """Return the tokens from `begin` up to `end`; past the last document comes the first."""
        if end > len(self):
            return np.concatenate([self.read(begin, len(self)), self.read(0, end - len(self))])
        pieces = []
        document = int(np.searchsorted(self._chain_ends, begin, side="right"))
        while begin < end:
            until = min(int(self._chain_ends[document]), end)
            offset = int(self._offsets[document])
            pieces.append(self._tokens[begin + offset : until + offset])
            begin = until
            document += 1
        return np.concatenate(pieces)


@dataclasses.dataclass(frozen=True)
class Pass:
    """The sequences of one pass over the documents.

    Attributes:
        chain: The documents in the order of this pass.
        length: Tokens per sequence.
        starts: Where each sequence begins in the chain, in the order of output.
        n_trailing: Tokens left over at the end, too few for a sequence.
        n_excluded: Sequences that `keep` refused.
    """

    chain: Chain
    length: int
    starts: np.ndarray
    n_trailing: int
    n_excluded: int

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in self.starts.tolist():
            yield self.chain.read(start, start + self.length)


def passes(
    documents: Documents,
    length: int,
    n_passes: int,
    rng: random.Random | None,
    keep: Callable[[np.ndarray], bool] | None = None,
) -> Iterator[Pass]:
    """Cut the documents into sequences, `n_passes` times, each time differently.

    With an `rng` every pass shuffles the documents, then the sequences. Without, the order stays,
    and each pass begins with the trailing tokens of the one before, so that the cuts move along.

    Args:
        documents: The documents.
        length: Tokens per sequence.
        n_passes: How often every document is used.
        rng: What shuffles; None preserves the order.
        keep: Tells which sequences may stay.
    """
    order = np.arange(len(documents))
    shift = 0
    for _ in range(n_passes):
        if rng:
            order = shuffled(order, rng)
        chain = Chain(documents, order)
        n_sequences, n_trailing = divmod(len(chain), length)
        starts = (np.arange(n_sequences) * length - shift) % max(len(chain), 1)
        shift = shift + n_trailing if rng is None else 0
        if keep:
            kept = [keep(chain.read(start, start + length)) for start in starts.tolist()]
            starts = starts[np.array(kept, bool)]
        n_excluded = n_sequences - len(starts)
        if rng:
            starts = shuffled(starts, rng)
        yield Pass(chain, length, starts, n_trailing, n_excluded)


def shuffled(numbers: np.ndarray, rng: random.Random) -> np.ndarray:
    """Shuffle as `rng.shuffle` does a list, in 8 bytes per number."""
    compact = array.array("q", numbers.astype(np.int64).tobytes())
    rng.shuffle(compact)
    return np.frombuffer(compact, np.int64)
