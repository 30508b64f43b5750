"""The bytes of a TFRecord file, written without TensorFlow.

A record is its length (8 bytes, little-endian), a checksum of that, the data, a checksum of the
data. The data is a serialized `tf.train.Example`: here one feature, `text`, a list of token ids.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Iterable
from typing import IO

import numpy as np

_SEQUENCES_AT_ONCE = 512


def write(file: IO[bytes], sequences: Iterable[np.ndarray]) -> int:
    """Write sequences of token ids, all of one length, as records; return how many there were."""
    sequences = iter(sequences)
    n = 0
    while some := list(itertools.islice(sequences, _SEQUENCES_AT_ONCE)):
        examples = _examples(np.stack(some))
        heads = [struct.pack("<Q", len(example)) for example in examples]
        checksums = masked_checksums(heads), masked_checksums(examples)
        for head, head_sum, example, example_sum in zip(
            heads, checksums[0], examples, checksums[1], strict=True
        ):
            file.write(head + head_sum + example + example_sum)
        n += len(some)
    return n


def _examples(tokens: np.ndarray) -> list[bytes]:
    """Serialize each row of ids as a `tf.train.Example` of one feature."""
    return [
        # Example.features, Features.feature (a map entry), its key "text", its value Feature,
        # Feature.int64_list, Int64List.value (packed): a field's tag is 8 * its number + 2.
        _field(
            0x0A,
            _field(0x0A, _field(0x0A, b"text") + _field(0x12, _field(0x1A, _field(0x0A, ids)))),
        )
        for ids in _varints(tokens)
    ]


def _field(tag: int, content: bytes) -> bytes:
    """Put a tag and the length before the content of a length-delimited protobuf field."""
    size, length = len(content), b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([tag]) + length + bytes([size]) + content


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


@functools.cache
def _tables() -> np.ndarray:
    """Checksum tables for four bytes at once: table k is for a byte with k more after it."""
    table: np.ndarray = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = table >> 1 ^ np.where(table & 1, np.uint32(0x82F63B78), np.uint32(0))
    tables = [table]
    for _ in range(3):
        tables.append(tables[-1] >> 8 ^ table[tables[-1] & 255])
    return np.stack(tables)


def masked_checksums(messages: list[bytes]) -> list[bytes]:
    """Compute the checksum of each message (of 4 bytes or more) as TFRecord files hold it.

    It is CRC-32C, rotated by 15 bits, plus a constant. All messages are worked through together,
    four bytes at a time. They are aligned at their ends, for zeros before a message change nothing
    once its first four bytes, instead of the register, are inverted.
    """
    width = -(-max(map(len, messages)) // 4) * 4
    padded = np.zeros((len(messages), width), np.uint8)
    for row, message in zip(padded, messages, strict=True):
        begin = width - len(message)
        row[begin:] = np.frombuffer(message, np.uint8)
        row[begin : begin + 4] ^= 255
    crc = np.zeros(len(messages), np.uint32)
    t0, t1, t2, t3 = _tables()
    for word in np.ascontiguousarray(padded.view("<u4").T):
        crc = crc ^ word
        crc = t3[crc & 255] ^ t2[crc >> 8 & 255] ^ t1[crc >> 16 & 255] ^ t0[crc >> 24]
    crc = ~crc
    masked = (crc >> 15 | crc << 17) + np.uint32(0xA282EAD8)
    return [sum_.tobytes() for sum_ in masked.astype("<u4")]


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
