"""Files of Flax's, in msgpack, written one array at a time; `flax_files` says what is in them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple

import msgpack
import numpy as np

from mesh_transformer import storage
from mesh_transformer.checkpoints.flax_files import DTYPES, IN_PIECES, LENGTHS
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.source import Array

PIECE_BYTES = 2**30
"""Of an array that is packed whole, at most, and of each piece of a larger one."""

_LONGEST = 2**32 - 1  # bytes together
_FIRST_OF_SHORT = {"map": 0x80, "list": 0x90}  # of fewer than 16 entries
_ARRAY = 1  # the code of an ext that is one
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Read = Callable[[str], np.ndarray]


def nested(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """Make a tree of names with "/" in them, in JAX's order: the keys of a map sorted as text."""
    tree: dict[str, Any] = {}
    for keys in sorted(name.split("/") for name in arrays):
        inner = tree
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = arrays["/".join(keys)]
    return tree


def write_tree(path: str, tree: Mapping[str, Any], read: Read) -> None:
    """Write a tree as Flax packs it.

    Args:
        path: Of the file.
        tree: Of what there is: maps, whole numbers, None, and an `Array` in the place of each
            array, whose dtype is one of `flax_files.DTYPES`.
        read: Given the keys on the way to an array, with "/" between, makes it; called in order.
    """
    with storage.open(path, "wb") as file:
        _write_map(file, tree, "", read)


def _write_map(file: IO[bytes], tree: Mapping[str, Any], inside: str, read: Read) -> None:
    file.write(_head("map", len(tree)))
    for key, value in tree.items():
        name = f"{inside}{key}"
        file.write(msgpack.packb(key))
        if isinstance(value, Array):
            _write_array(file, name, value, read)
        elif isinstance(value, Mapping):
            _write_map(file, value, f"{name}/", read)
        else:
            file.write(msgpack.packb(value))


def check_stream(arrays: Mapping[str, Array]) -> None:
    """Refuse arrays that a stream has no room for.

    Raises:
        CheckpointError: Some are too large; all of them are named.
    """
    sizes = {name: sum(it.n_bytes for it in _packed(array)) for name, array in arrays.items()}
    if large := [f"{name} is {n} bytes" for name, n in sizes.items() if n > _LONGEST]:
        heading = f"msgpack packs {_LONGEST} bytes together at most; choose a smaller dtype:"
        raise CheckpointError("\n  - ".join([heading, *large]))


def write_stream(path: str, arrays: Mapping[str, Array], read: Read) -> None:
    """Write arrays pair by pair, as JAXSeq does, in the order that they have in Flax's trees.

    Args:
        path: Of the file.
        arrays: By the keys on the way to them, with "/" between; checked by `check_stream`.
        read: As for `write_tree`.
    """
    with storage.open(path, "wb") as file:
        for keys in sorted(name.split("/") for name in arrays):
            name = "/".join(keys)
            n_bytes = sum(it.n_bytes for it in _packed(arrays[name]))
            file.write(_head("list", 2) + msgpack.packb(keys) + _head("bytes", n_bytes))
            _write_array(file, name, arrays[name], read)


class _Part(NamedTuple):
    """A part of a packed array: bytes, or where it has its own.

    Attributes:
        packed: What stands before the array's own bytes.
        begin, end: Which of its own bytes follow.
    """

    packed: bytes
    begin: int
    end: int

    @property
    def n_bytes(self) -> int:
        return len(self.packed) + self.end - self.begin


def _packed(array: Array) -> Iterator[_Part]:
    """Say how an array is packed, without it."""
    if array.n_bytes <= PIECE_BYTES:
        yield _Part(_before(array.shape, array), 0, array.n_bytes)
        return
    each = max(1, PIECE_BYTES // array.dtype.itemsize)
    n_numbers = array.n_bytes // array.dtype.itemsize
    pieces = [(first, min(first + each, n_numbers)) for first in range(0, n_numbers, each)]
    head = _head("map", 3) + msgpack.packb(IN_PIECES) + msgpack.packb(True)
    shape = {str(i): n for i, n in enumerate(array.shape)}
    head += msgpack.packb("shape") + msgpack.packb(shape)
    head += msgpack.packb("chunks") + _head("map", len(pieces))
    for i, (first, last) in enumerate(pieces):
        piece = msgpack.packb(str(i)) + _before((last - first,), array)
        itemsize = array.dtype.itemsize
        yield _Part((b"" if i else head) + piece, first * itemsize, last * itemsize)


def _before(shape: tuple[int, ...], array: Array) -> bytes:
    """Pack what stands before the bytes of an array, or of a piece of one, of this shape."""
    n_bytes = int(np.prod(shape, dtype=np.int64)) * array.dtype.itemsize
    inner = _head("list", 3) + msgpack.packb(shape) + msgpack.packb(_NAMES[array.dtype])
    inner += _head("bytes", n_bytes)
    return _head("ext", len(inner) + n_bytes) + inner


def _head(kind: str, n: int) -> bytes:
    """Pack the head of what has this length, in as few bytes as it takes."""
    if kind in _FIRST_OF_SHORT and n < 16:
        return bytes([_FIRST_OF_SHORT[kind] | n])
    if kind == "ext" and n in (1, 2, 4, 8, 16):
        return bytes([0xD4 + n.bit_length() - 1, _ARRAY])
    for first, (other, form) in LENGTHS.items():
        if other == kind and n < 256 ** struct.calcsize(form):
            code = bytes([_ARRAY]) if kind == "ext" else b""
            return bytes([first]) + struct.pack(form, n) + code
    raise ValueError(f"a {kind} of {n} is longer than msgpack has them")


def _write_array(file: IO[bytes], name: str, array: Array, read: Read) -> None:
    whole = np.asarray(read(name), order="C")
    assert (whole.shape, whole.dtype) == (array.shape, array.dtype), name
    data = whole.reshape(-1).view(np.uint8).data
    for part in _packed(array):
        file.write(part.packed)
        file.write(data[part.begin : part.end])
