"""The bytes of a TFRecord file, written without TensorFlow.

Each record is a serialized `tf.train.Example` of one feature, `text`, a list of token ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import IO

import numpy as np

from mesh_transformer.records import field, framed

_SEQUENCES_AT_ONCE = 512


def write(file: IO[bytes], sequences: Iterable[np.ndarray]) -> int:
    """Write sequences of token ids, all of one length, as records; return how many there were."""
    sequences = iter(sequences)
    n = 0
    while some := list(itertools.islice(sequences, _SEQUENCES_AT_ONCE)):
        file.write(b"".join(framed(_examples(np.stack(some)))))
        n += len(some)
    return n


def _examples(tokens: np.ndarray) -> list[bytes]:
    """Serialize each row of ids as a `tf.train.Example` of one feature."""
    return [
        # Example.features, Features.feature (a map entry), its key "text", its value Feature,
        # Feature.int64_list, Int64List.value (packed).
        field(1, field(1, field(1, b"text") + field(2, field(3, field(1, ids)))))
        for ids in _varints(tokens)
    ]


def _varints(tokens: np.ndarray) -> list[bytes]:
    """Encode each row of ids (below 2**32) as protobuf varints: 7 bits a byte, lowest first."""
    n_bits = int(tokens.max()).bit_length()
    shifted = tokens[..., None].astype(np.uint32) >> np.arange(
        0, max(n_bits, 1), 7, dtype=np.uint32
    )
    more = shifted >> 7 > 0
    used = np.concatenate([np.ones_like(more[..., :1]), more[..., :-1]], -1)
    octets = (shifted & 127).astype(np.uint8) | more.astype(np.uint8) << 7
    return [row[keep].tobytes() for row, keep in zip(octets, used, strict=True)]


def count(path: str, size: int, at_most: int) -> int:
    """Count the records of a plain local file by skipping from length to length.

    Raises:
        EOFError: The record with the number in `args` is cut short, or its length is corrupt.
    """
    n, position = 0, 0
    with open(path, "rb") as file:
        while n < at_most and (head := file.read(12)):
            position += 16 + int.from_bytes(head[:8], "little")
            if len(head) < 12 or position > size:
                raise EOFError(n)
            file.seek(position)
            n += 1
    return n
