"""Inputs and outputs as records of an encoder and its decoder: nothing packed, padding after each.

A record is `encoder_seq` tokens of the input, the `pad_id` that begins what the decoder is fed, and
`seq` tokens of the output. Both texts are ended by an end of text.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import numpy as np

from mesh_transformer.data.packing import Documents, shuffled


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Inputs and outputs, one document of each in turn, and the shape of their records.

    Attributes:
        texts: The documents; each ends with the id that ends a text, and holds no `pad_id`.
        encoder_seq: Tokens of an input, its end included. What is longer loses what comes before
            its end.
        seq: Tokens of an output, its end included. What is longer loses its end and more: nothing
            is learned of where it ends.
        pad_id: The token that fills up records.
    """

    texts: Documents
    encoder_seq: int
    seq: int
    pad_id: int

    def __len__(self) -> int:
        return len(self.texts) // 2

    def n_cut(self) -> tuple[int, int]:
        """Count the inputs and the outputs that are too long for a record."""
        lengths = np.diff(self.texts.ends, prepend=0)
        too_long = lengths[0::2] > self.encoder_seq, lengths[1::2] > self.seq
        return int(too_long[0].sum()), int(too_long[1].sum())

    def passes(self, n_passes: int, rng: random.Random | None) -> Iterator[Iterator[np.ndarray]]:
        """Yield the records of all pairs, `n_passes` times, each shuffled if there is an rng."""
        order = np.arange(len(self))
        for _ in range(n_passes):
            order = shuffled(order, rng) if rng else order
            yield map(self._record, order.tolist())

    def _record(self, number: int) -> np.ndarray:
        source, target = self._text(2 * number), self._text(2 * number + 1)
        if len(source) > self.encoder_seq:
            source = np.append(source[: self.encoder_seq - 1], source[-1:])
        target = target[: self.seq]
        first = self.encoder_seq + 1
        record = np.full(first + self.seq, self.pad_id, target.dtype)
        record[: len(source)] = source
        record[first : first + len(target)] = target
        return record

    def _text(self, number: int) -> np.ndarray:
        begin = int(self.texts.ends[number - 1]) if number else 0
        return self.texts.tokens[begin : int(self.texts.ends[number])]
