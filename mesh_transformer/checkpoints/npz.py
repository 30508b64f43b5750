"""NumPy's .npz archives, read and written one array at a time.

As `np.savez` writes them: a zip of uncompressed .npy members named arr_0, arr_1, ... An array is
read straight into its memory, by one range of the file, and its checksum is compared; `np.load`
would go through the zip in small pieces. bfloat16, which NumPy itself does not have, is what it
becomes in such files: two bytes of nothing known, `<V2`.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import struct
import threading
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mesh_transformer import storage
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.source import Array
from mesh_transformer.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_LOCAL_HEADER = 30  # bytes before a member's name; the lengths of what follows are its last four
_LONGEST_HEADER = 2**12  # of an array's own description
_ZIP64_BYTES = 20  # that NumPy's local headers have after the name
_ALIGNMENT = 64  # of arrays in memory, and of NumPy's own headers
_DESCRIPTION = _LOCAL_HEADER + 2**8 + _LONGEST_HEADER  # a member up to where its numbers begin
_END_BYTES = 2**16  # of an archive, in which its directory is most likely
_PIECE = 2**24  # bytes read at a time where nothing is kept


_PARSING = threading.Lock()
"""NumPy parses headers as Python, which two threads of Python 3.11 cannot do at once: now and then
that raises a SystemError (github.com/python/cpython/issues/106905)."""


_UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
    *(ValueError, KeyError, TypeError, SyntaxError, EOFError, OverflowError, RuntimeError),
)
"""What `zipfile` and NumPy raise of bytes that are no archive, or no header of an array."""


@contextlib.contextmanager
def _parsed(heading: str) -> Iterator[None]:
    """Say of which file it is what cannot be parsed."""
    try:
        yield
    except UserError:
        raise
    except _UNREADABLE as error:
        raise CheckpointError(f"{heading}: {error or type(error)}; copy the file again") from error


class Member(NamedTuple):
    """An array in an archive.

    Attributes:
        archive: Path or URL.
        name: "arr_0".
        info: Of the zip's directory.
        end: Where what comes after it begins.
    """

    archive: str
    name: str
    info: zipfile.ZipInfo
    end: int

    def __str__(self) -> str:
        return f"{self.name} of {self.archive}"


def members(archive: str) -> list[Member]:
    """List what is in an archive, by number.

    Raises:
        CheckpointError: It is missing, cut off, or no such archive.
    """
    with _parsed(f"{archive} is damaged or cut off"):
        try:
            with zipfile.ZipFile(_Ranges(archive)) as opened:
                infos, directory = opened.infolist(), opened.start_dir
        except FileNotFoundError as error:
            raise CheckpointError(f"{archive} is missing") from error
    starts = sorted(info.header_offset for info in infos)
    if starts and starts[0] < 0 or len(set(starts)) < len(starts):
        raise CheckpointError(
            f"{archive} is damaged or cut off: arrays would begin before it, or two at one place"
        )
    ends = dict(zip(starts, [*starts[1:], directory], strict=True))
    numbered = {}
    for info in infos:
        match = re.fullmatch(r"arr_(\d+)\.npy", info.filename)
        if match is None:
            raise CheckpointError(f"{archive} holds {info.filename!r}, where arr_0.npy, ... belong")
        end = ends[info.header_offset]
        numbered[int(match[1])] = Member(archive, f"arr_{match[1]}", info, end)
    if sorted(numbered) != list(range(len(numbered))):
        raise CheckpointError(f"{archive} holds {sorted(numbered)}, not every array from arr_0 on")
    return [numbered[i] for i in range(len(numbered))]


def describe(member: Member) -> Array:
    """Read the shape and dtype of an array.

    Raises:
        CheckpointError: There is no array, or one that this library does not read.
    """
    if member.info.compress_type == zipfile.ZIP_STORED:
        stored = _read_range(member, _DESCRIPTION)
        return _described(stored[_header_bytes(stored, member) :].tobytes(), member)[0]
    with (
        _parsed(f"{member} is damaged"),
        zipfile.ZipFile(_Ranges(member.archive)) as opened,
        opened.open(member.info) as stream,
    ):
        return _described(stream.read(_LONGEST_HEADER), member)[0]


class Room(threading.local):
    """Memory of each thread, to read one array after another into.

    Memory that is new costs more to be zeroed than the numbers to be read, and what threads free
    stays with their process.
    """

    _room = np.empty(0, np.uint8)

    def __call__(self, n_bytes: int) -> np.ndarray:
        if len(self._room) < n_bytes:
            self._room = np.empty(n_bytes, np.uint8)
        return self._room[:n_bytes]


def _new_room(n_bytes: int) -> np.ndarray:
    return np.empty(n_bytes, np.uint8)


def read(member: Member, room: Callable[[int], np.ndarray] = _new_room) -> np.ndarray:
    """Read an array, by one range of the archive.

    Args:
        room: Gives the bytes in which it will be; of a `Room`, until it is asked again.

    Raises:
        CheckpointError: It is damaged.
    """
    if member.info.compress_type != zipfile.ZIP_STORED:
        return _read_compressed(member)
    stored = _read_range(member, room=room)
    begin = _header_bytes(stored, member)
    data = stored[begin : begin + member.info.file_size]
    if len(data) < member.info.file_size:
        raise CheckpointError(f"{member} is cut off; copy the file again")
    array, offset = _described(data[:_LONGEST_HEADER].tobytes(), member)
    if offset + array.n_bytes != len(data) or zlib.crc32(data.data) != member.info.CRC:
        raise CheckpointError(f"{member} is damaged: its checksum is another; copy the file again")
    found = data[offset:].view(array.dtype).reshape(array.shape)
    return found if found.flags.aligned else found.copy()


def read_entry(member: Member, index: int) -> np.ndarray:
    """Read one entry of an array's first axis alone; see `check` for its checksum.

    Of an archive that somebody has compressed the whole array is read for it.

    Raises:
        CheckpointError: It is damaged.
    """
    if member.info.compress_type != zipfile.ZIP_STORED:
        return np.array(_read_compressed(member)[index])
    stored = _read_range(member, _DESCRIPTION)
    begin = _header_bytes(stored, member)
    whole, offset = _described(stored[begin:].tobytes(), member)
    entry = np.empty(whole.shape[1:], whole.dtype)
    at = member.info.header_offset + begin + offset + index * entry.nbytes
    read_into(member.archive, at, entry.reshape(-1).view(np.uint8).data, str(member))
    return entry


def check(member: Member) -> None:
    """Read an array piece by piece, and compare its checksum.

    Raises:
        CheckpointError: It is damaged.
    """
    if member.info.compress_type != zipfile.ZIP_STORED:
        _read_compressed(member)
        return
    begin = member.info.header_offset + _header_bytes(_read_range(member, _DESCRIPTION), member)
    piece, checksum = np.empty(_PIECE, np.uint8), 0
    for done in range(0, member.info.file_size, _PIECE):
        part = piece[: member.info.file_size - done].data
        read_into(member.archive, begin + done, part, str(member))
        checksum = zlib.crc32(part, checksum)
    if checksum != member.info.CRC:
        raise CheckpointError(f"{member} is damaged: its checksum is another; copy the file again")


def read_into(path: str, begin: int, buffer: memoryview, what: str) -> None:
    """Fill a buffer from a file.

    Raises:
        CheckpointError: The file ends before.
    """
    if storage.read_into(path, begin, buffer) < len(buffer):
        raise CheckpointError(f"{what} is cut off; copy the file again")


class _Ranges(io.RawIOBase):
    """A file whose end, where a zip has its directory, is read at once; the rest when asked for."""

    def __init__(self, path: str) -> None:
        self._path, self._at = path, 0
        self._size = storage.size(path)
        self._end_begins = max(0, self._size - _END_BYTES)
        self._end = np.empty(self._size - self._end_begins, np.uint8)
        read_into(path, self._end_begins, self._end.data, path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + (0, self._at, self._size)[whence]
        if at < 0:
            raise ValueError("something is said to lie before its beginning")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer)[: max(0, self._size - self._at)]
        within = self._at - self._end_begins
        if within >= 0:
            wanted[:] = self._end.data[within : within + len(wanted)]
        else:
            read_into(self._path, self._at, wanted, self._path)
        self._at += len(wanted)
        return len(wanted)


@contextlib.contextmanager
def writing_zip(archive: str) -> Iterator[zipfile.ZipFile]:
    """Give an archive to write, uncompressed: the block leaves a whole one or raises."""
    with storage.open(archive, "wb") as file:  # of a remote file nothing appears on an error
        opened = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)
        with contextlib.ExitStack() as unless_whole:
            # Or its directory would be written when it is forgotten, into a file that is closed.
            unless_whole.callback(setattr, opened, "fp", None)
            yield opened
            unless_whole.pop_all()
        opened.close()


class Writer:
    """Writes an archive array by array; in a `with` block, which leaves a whole one or raises."""

    def __init__(self, archive: str) -> None:
        self._opened = writing_zip(archive)
        self._n = 0

    def __enter__(self) -> Writer:
        self._zip = self._opened.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._opened.__exit__(kind, error, trace)

    def add(self, array: np.ndarray) -> None:
        """Write the next array, as `np.savez` does."""
        descr = "<V2" if array.dtype == BFLOAT16 else np.lib.format.dtype_to_descr(array.dtype)
        header = io.BytesIO()
        about = {"descr": descr, "fortran_order": False, "shape": array.shape}
        np.lib.format.write_array_header_1_0(header, about)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        with self._zip.open(f"arr_{self._n}.npy", "w", force_zip64=True) as member:
            member.write(header.getvalue())
            member.write(data.data)
        self._n += 1


def _read_range(
    member: Member,
    at_most: int | None = None,
    room: Callable[[int], np.ndarray] = _new_room,
) -> np.ndarray:
    """Read what is stored of a member, its local header first, so that its array is aligned."""
    begin = member.info.header_offset
    if not 0 <= begin <= member.end - _LOCAL_HEADER:
        raise CheckpointError(f"{member} is damaged: no array where one should be")
    n = member.end - begin if at_most is None else min(member.end - begin, at_most)
    usual = _LOCAL_HEADER + len(member.info.filename) + _ZIP64_BYTES
    bytes_there = room(n + 2 * _ALIGNMENT)
    first = -(bytes_there.ctypes.data + usual) % _ALIGNMENT
    stored = bytes_there[first : first + n]
    read_into(member.archive, begin, stored.data, str(member))
    return stored


def _header_bytes(stored: np.ndarray, member: Member) -> int:
    """Find where a member's bytes begin: its local header is as long as it says itself."""
    header = stored[:_LOCAL_HEADER].tobytes()
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{member} is damaged: no array where one should be")
    return int(_LOCAL_HEADER + sum(struct.unpack("<HH", header[26:])))


def _described(begin: bytes, member: Member) -> tuple[Array, int]:
    """Read an array's header; return what it says and how long it is."""
    stream = io.BytesIO(begin)
    with _parsed(f"{member} is damaged"):
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        with _PARSING:
            shape, fortran, dtype = read_header(stream)
        if any(size < 0 for size in shape):
            raise ValueError(f"its shape is {shape}")
    if dtype.kind == "V" and dtype.itemsize == 2:
        dtype = BFLOAT16
    if fortran and math.prod(shape) > 1 or dtype.kind == "O":
        raise CheckpointError(f"{member} is stored as {dtype}, column by column: {fortran}")
    return Array(shape, dtype), stream.tell()


def _read_compressed(member: Member) -> np.ndarray:
    """Read an array of an archive that somebody has compressed."""
    with (
        _parsed(f"{member} is damaged"),
        zipfile.ZipFile(_Ranges(member.archive)) as opened,
    ):
        data = opened.read(member.info)
    array, offset = _described(data[:_LONGEST_HEADER], member)
    if len(data) - offset != array.n_bytes:
        raise CheckpointError(f"{member} is cut off; copy the file again")
    return np.frombuffer(data, np.uint8, offset=offset).view(array.dtype).reshape(array.shape)
