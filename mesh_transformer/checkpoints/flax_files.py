"""Files of Flax's, in msgpack, read one array at a time.

Flax packs a tree as maps in maps; JAXSeq writes pairs instead, one after the other: the keys on the
way to an array, and the array as Flax packs it alone. An array is an extension of code 1 (a scalar
3), which holds its shape, its dtype's name and its bytes; one of more than 2^30 bytes is a map of
its shape and of flat pieces (flax.serialization; github.com/msgpack/msgpack has the format).

Only what stands before the bytes is parsed; an array is then read by a range of the file, so that
one is in memory at a time, and a file may lie in a bucket.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgpack
import numpy as np

from mesh_transformer import storage
from mesh_transformer.checkpoints.layout import CheckpointError, dtype_of
from mesh_transformer.checkpoints.npz import BFLOAT16, read_into
from mesh_transformer.checkpoints.source import Array

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": BFLOAT16,
}
"""What weights may be, by the names that are in files."""

_WINDOW = 2**16  # bytes looked at together
_SMALL = 2**12  # at most, of keys and shapes
_DEEPEST = 64  # maps in maps
IN_PIECES = "__msgpack_chunked_array__"
LENGTHS = {
    **{0xC4: ("bytes", ">B"), 0xC5: ("bytes", ">H"), 0xC6: ("bytes", ">I")},
    **{0xC7: ("ext", ">B"), 0xC8: ("ext", ">H"), 0xC9: ("ext", ">I")},
    **{0xDC: ("list", ">H"), 0xDD: ("list", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I")},
}


class Packed(NamedTuple):
    """An array in a file.

    Attributes:
        path: Path or URL of the file.
        name: The keys on the way to it, with "/" between.
        dtype: By name; not only those that `DTYPES` knows.
        pieces: Where its bytes begin, and how many they are: one piece, or several.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[tuple[int, int], ...]

    @property
    def array(self) -> Array:
        """What reading it gives.

        Raises:
            CheckpointError: Its dtype is not one that weights can be read from.
        """
        return Array(self.shape, dtype_of(f"{self.name} in {self.path}", self.dtype, DTYPES))

    def read(self) -> np.ndarray:
        """Read it.

        Raises:
            CheckpointError: The file is cut off, or `array` raises.
        """
        whole = np.empty(self.array.shape, self.array.dtype)
        data = whole.reshape(-1).view(np.uint8).data
        done = 0
        for begin, n_bytes in self.pieces:
            part = data[done : done + n_bytes]
            read_into(self.path, begin, part, f"{self.name} in {self.path}")
            done += n_bytes
        return whole


def read_tree(path: str) -> dict[str, Packed]:
    """List the arrays of a tree that Flax has packed into a file.

    Raises:
        CheckpointError: The file is missing, cut off or damaged.
    """
    with _Cursor(path) as cursor:
        listed = _listed(cursor, "")
        cursor.end(cursor.size)
    return listed


def read_stream(path: str) -> dict[str, Packed]:
    """List the arrays of a file that JAXSeq has written pair by pair.

    Raises:
        CheckpointError: The file is missing, cut off or damaged.
    """
    listed: dict[str, Packed] = {}
    with _Cursor(path) as cursor:
        while cursor.at < cursor.size:
            cursor.expect("list", 2)
            keys = cursor.small()
            if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
                raise ValueError(f"{keys!r:.80} where an array's keys should be")
            _, n_bytes, _ = cursor.head("bytes")
            end = cursor.at + n_bytes
            found = _listed(cursor, "/".join(keys))
            cursor.end(end)
            if twice := found.keys() & listed.keys():
                raise ValueError(f"{min(twice)} is there twice")
            listed |= found
    return listed


class _Cursor:
    """A place in a file; in a `with` block, which says of what file it is what cannot be parsed."""

    def __init__(self, path: str) -> None:
        self.path, self.at = path, 0
        self._begin, self._window = 0, b""

    def __enter__(self) -> _Cursor:
        try:
            self.size = storage.size(self.path)
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path} is missing") from error
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        told = (ValueError, TypeError, KeyError, msgpack.UnpackException)
        if isinstance(error, msgpack.OutOfData):
            raise CheckpointError(f"{self.path} is cut off; copy it again") from error
        if isinstance(error, told) and not isinstance(error, CheckpointError):
            raise CheckpointError(
                f"{self.path} is damaged, or not packed by Flax: at byte {self.at}, {error}"
            ) from error

    def peek(self, n: int) -> bytes:
        """Return the next bytes: n, or fewer at the end of the file."""
        wanted = min(n, self.size - self.at)
        first = self.at - self._begin
        if not 0 <= first <= first + wanted <= len(self._window):
            window = bytearray(min(_WINDOW, self.size - self.at))
            read_into(self.path, self.at, memoryview(window), self.path)
            self._begin, self._window, first = self.at, bytes(window), 0
        return self._window[first : first + n]

    def small(self) -> Any:
        """Unpack what comes next, which is a scalar, a text, or a short list of these."""
        unpacker = msgpack.Unpacker(read_size=_SMALL)
        unpacker.feed(self.peek(_SMALL))
        value = unpacker.unpack()
        self.at += unpacker.tell()
        return value

    def kind(self) -> str:
        """Say what comes next: "map", "list", "bytes", "ext" or, of all else, "small"."""
        (first,) = self.peek(1) or _out_of_data()
        if first >> 4 in (8, 9):
            return "map" if first >> 4 == 8 else "list"
        return "ext" if 0xD4 <= first <= 0xD8 else LENGTHS.get(first, ("small", ""))[0]

    def head(self, kind: str) -> tuple[int, int, int]:
        """Pass the head of what comes next.

        Returns:
            Its first byte; its length, in entries of a map or a list or in bytes; an ext's code.

        Raises:
            ValueError: Something else comes next.
        """
        if (found := self.kind()) != kind:
            raise ValueError(f"a {found} stands where a {kind} should")
        head = self.peek(6)
        first = head[0]
        if first >> 4 in (8, 9):
            self.at += 1
            return first, first & 15, 0
        if 0xD4 <= first <= 0xD8:
            n, n_length = 1 << (first - 0xD4), 0
        else:
            form = LENGTHS[first][1]
            n_length = struct.calcsize(form)
            if len(head) < 1 + n_length + (kind == "ext"):
                _out_of_data()
            (n,) = struct.unpack_from(form, head, 1)
        self.at += 1 + n_length + (kind == "ext")
        return first, n, head[1 + n_length] if kind == "ext" else 0

    def expect(self, kind: str, n: int) -> None:
        """Pass a head that has this length.

        Raises:
            ValueError: It has another, or something else comes next.
        """
        if (found := self.head(kind)[1]) != n:
            raise ValueError(f"a {kind} of {found} stands where one of {n} should")

    def end(self, at: int) -> None:
        """Be sure that all up to a place has been passed.

        Raises:
            ValueError: It has not.
        """
        if self.at > self.size:
            _out_of_data()
        if self.at != at:
            raise ValueError(f"what is there should end at byte {at}")


def _out_of_data() -> Any:
    raise msgpack.OutOfData


def _listed(cursor: _Cursor, name: str) -> dict[str, Packed]:
    """List the arrays in what comes next, and pass it."""
    listed: dict[str, Packed] = {}
    pieces: dict[str, dict[str, Any]] = {}
    for path, value in _leaves(cursor, name, 0):
        owner, marked, rest = path.rpartition(f"/{IN_PIECES}/")
        if marked:
            pieces.setdefault(owner, {})[rest] = value
        elif isinstance(value, Packed):
            if path in listed:
                raise ValueError(f"{path} is there twice")
            listed[path] = value
    return listed | {owner: _joined(cursor.path, owner, parts) for owner, parts in pieces.items()}


def _leaves(cursor: _Cursor, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield what is in maps by the keys on the way to it."""
    kind = cursor.kind()
    if kind == "map":
        if depth == _DEEPEST:
            raise ValueError(f"maps lie deeper than {_DEEPEST} in each other")
        for i in range(cursor.head("map")[1]):
            key = cursor.small()
            if i == 0 and key == IN_PIECES:
                name = f"{name}/{key}"
            yield from _leaves(cursor, f"{name}/{key}".removeprefix("/"), depth + 1)
    elif kind == "list":
        for i in range(cursor.head("list")[1]):
            yield from _leaves(cursor, f"{name}/{i}", depth + 1)
    elif kind == "ext":
        yield name, _extension(cursor, name)
    elif kind == "bytes":
        n_bytes = cursor.head("bytes")[1]
        cursor.at += n_bytes
        yield name, None
    else:
        yield name, cursor.small()


def _extension(cursor: _Cursor, name: str) -> Packed | None:
    """Pass an array, and say where it is; None of what is none."""
    _, n_bytes, code = cursor.head("ext")
    end = cursor.at + n_bytes
    if end > cursor.size:
        _out_of_data()
    if code not in (1, 3):
        cursor.at = end
        return None
    cursor.expect("list", 3)
    shape, dtype = cursor.small(), cursor.small()
    _, n_data, _ = cursor.head("bytes")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{name} has the shape {shape!r:.80}")
    known = DTYPES.get(str(dtype))
    if known is not None and math.prod(shape) * known.itemsize != n_data:
        raise ValueError(f"{name}: {dtype}{shape} in {n_data} bytes")
    packed = Packed(cursor.path, name, tuple(shape), str(dtype), ((cursor.at, n_data),))
    cursor.at += n_data
    cursor.end(end)
    return packed


def _joined(path: str, name: str, parts: dict[str, Any]) -> Packed:
    """Make one array of the flat pieces that it is packed in."""
    shape = tuple(parts[f"shape/{i}"] for i in range(sum("shape/" in key for key in parts)))
    found = [parts[f"chunks/{i}"] for i in range(sum("chunks/" in key for key in parts))]
    dtype = found[0].dtype
    pieces = tuple(place for piece in found for place in piece.pieces)
    n_bytes = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else None
    if n_bytes not in (None, sum(n for _, n in pieces)):
        raise ValueError(f"{name}: {dtype}{list(shape)} in pieces of {[n for _, n in pieces]}")
    return Packed(path, name, shape, dtype, pieces)
