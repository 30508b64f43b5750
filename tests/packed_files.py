"""Files as other programs write them, byte by byte from their formats' descriptions.

Nothing of the library and nothing of the programs' own packages is used, so that a mistake in one
is not made in both.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

IN_PIECES = "__msgpack_chunked_array__"


def text(value: str) -> bytes:
    """Pack a text, as msgpack does (github.com/msgpack/msgpack/blob/master/spec.md)."""
    data = value.encode()
    if len(data) < 32:
        return bytes([0xA0 | len(data)]) + data
    return bytes([0xD9, len(data)]) + data


def number(value: int) -> bytes:
    if value < 128:
        return bytes([value])
    return (
        b"\xcd" + struct.pack(">H", value) if value < 2**16 else b"\xce" + struct.pack(">I", value)
    )


def listed(*items: bytes) -> bytes:
    return bytes([0x90 | len(items)]) + b"".join(items)


def mapping(items: Mapping[str, bytes]) -> bytes:
    head = (
        bytes([0x80 | len(items)]) if len(items) < 16 else b"\xde" + struct.pack(">H", len(items))
    )
    return head + b"".join(text(key) + value for key, value in items.items())


def with_length(data: bytes, byte: int, code: bytes = b"") -> bytes:
    """Pack bytes (0xc4) or an extension (0xc7), whose length takes one, two or four bytes."""
    if len(data) < 2**8:
        return bytes([byte, len(data)]) + code + data
    if len(data) < 2**16:
        return bytes([byte + 1]) + struct.pack(">H", len(data)) + code + data
    return bytes([byte + 2]) + struct.pack(">I", len(data)) + code + data


def array(value: np.ndarray, code: int = 1) -> bytes:
    """Pack an array as Flax does: an extension with its shape, its dtype's name and its bytes."""
    shape = listed(*map(number, value.shape))
    inner = listed(shape, text(value.dtype.name), with_length(value.tobytes(), 0xC4))
    if len(inner) in (1, 2, 4, 8, 16):
        return bytes([0xD4 + len(inner).bit_length() - 1, code]) + inner
    return with_length(inner, 0xC7, bytes([code]))


def in_pieces(value: np.ndarray, n: int) -> bytes:
    """Pack an array as Flax does a very large one: in flat pieces of at most n numbers."""
    flat = value.reshape(-1)
    pieces = {str(i): array(flat[i * n : (i + 1) * n]) for i in range(-(-flat.size // n))}
    shape = {str(i): number(size) for i, size in enumerate(value.shape)}
    return mapping({IN_PIECES: b"\xc3", "shape": mapping(shape), "chunks": mapping(pieces)})


def tree(value: Any) -> bytes:
    """Pack dicts in dicts of arrays."""
    if isinstance(value, dict):
        return mapping({key: tree(inner) for key, inner in value.items()})
    if isinstance(value, bytes):
        return value
    return number(value) if isinstance(value, int) else array(value)


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Make dicts in dicts of names with "/" in them."""
    made: dict[str, Any] = {}
    for name, value in arrays.items():
        *path, last = name.split("/")
        inner = made
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return made


def stream(arrays: Mapping[str, Any]) -> bytes:
    """Pack pairs one after the other, as JAXSeq does: keys, and what Flax makes of an array."""
    return b"".join(
        listed(listed(*map(text, name.split("/"))), with_length(tree(value), 0xC4))
        for name, value in arrays.items()
    )


_GGUF_KINDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "BF16": 30}
_ALIGNMENT = 32


def gguf(about: Mapping[str, Any], tensors: Mapping[str, tuple[str, np.ndarray]]) -> bytes:
    """Write a GGUF file (github.com/ggml-org/ggml/blob/master/docs/gguf.md).

    Args:
        about: Metadata: texts, whole numbers, floats, and lists of texts.
        tensors: Kind and numbers of each; these are quantised here.
    """
    blocks = {name: _GGUF_BYTES[kind](value) for name, (kind, value) in tensors.items()}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(about))
    for key, value in about.items():
        head += _gguf_text(key) + _gguf_value(value)
    begin = 0
    for name, (kind, value) in tensors.items():
        sizes = value.shape[::-1]
        head += _gguf_text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        head += struct.pack("<IQ", _GGUF_KINDS[kind], begin)
        begin += len(blocks[name]) + -len(blocks[name]) % _ALIGNMENT
    head += bytes(-len(head) % _ALIGNMENT)
    padded = (block + bytes(-len(block) % _ALIGNMENT) for block in blocks.values())
    return head + b"".join(padded)


def _gguf_text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _gguf_value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _gguf_text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_gguf_text, value))


def _q8_0(value: np.ndarray) -> bytes:
    """Quantise 32 numbers at a time: a float16 scale and 32 signed bytes."""
    rows = value.astype(np.float32).reshape(-1, 32)
    scales = np.abs(rows).max(1, keepdims=True) / 127
    numbers = np.round(np.divide(rows, scales, where=scales > 0, out=np.zeros_like(rows)))
    both = np.concatenate(
        [scales.astype(np.float16).view(np.uint8), numbers.astype(np.int8).view(np.uint8)], 1
    )
    return both.tobytes()


def from_q8_0(value: np.ndarray) -> np.ndarray:
    """Return the numbers that a quantised array stands for."""
    blocks = np.frombuffer(_q8_0(value), np.uint8).reshape(-1, 34)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return (scales * blocks[:, 2:].view(np.int8).astype(np.float32)).reshape(value.shape)


_GGUF_BYTES = {
    "F32": lambda value: value.astype(np.float32).tobytes(),
    "F16": lambda value: value.astype(np.float16).tobytes(),
    "BF16": lambda value: (value.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes(),
    "Q8_0": _q8_0,
}
