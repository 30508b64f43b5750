"""The records that TFRecord and TensorBoard files are made of, without TensorFlow.

A record is its length (8 bytes, little-endian), a checksum of that, the data, a checksum of the
data. The data is a serialized protobuf message, of which this writes what both files need.
"""

from __future__ import annotations

import functools
import struct

import numpy as np


def framed(messages: list[bytes]) -> list[bytes]:
    """Make a record of each message (of 4 bytes or more)."""
    heads = [struct.pack("<Q", len(message)) for message in messages]
    parts = zip(heads, masked_checksums(heads), messages, masked_checksums(messages), strict=True)
    return [b"".join(part) for part in parts]


def varint(number: int) -> bytes:
    """Encode a count: 7 bits a byte, lowest first."""
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def field(number: int, content: bytes) -> bytes:
    """Encode the protobuf field of this number that holds bytes, text or another message."""
    return varint(number << 3 | 2) + varint(len(content)) + content


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
