"""Files in the safetensors format, read and written one array at a time.

Eight bytes (little-endian) say how long the header is; the header is a JSON object that gives each
array's dtype, shape and place in the data, which follow as plain little-endian bytes without gaps
(github.com/huggingface/safetensors). An array is read by one range of the file, straight into its
memory, wherever the file lies. Nothing is mapped: a mapped array would be read piece by piece, and
only from a local disk.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer import storage
from mesh_transformer.checkpoints.layout import CheckpointError, dtype_of
from mesh_transformer.checkpoints.npz import BFLOAT16, read_into
from mesh_transformer.checkpoints.source import Array

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
}
"""What weights may be, by the format's own names."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "F64": 64}
_BITS |= {"I64": 64, "U64": 64} | {name: dtype.itemsize * 8 for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # of the data: the header is padded with spaces
_LONGEST_HEADER = 10**8  # as the package safetensors has it
_BEGIN_BYTES = 2**16  # of a file, in which most headers are whole
_METADATA = "__metadata__"


class Stored(NamedTuple):
    """An array in a file.

    Attributes:
        path: Path or URL of the file.
        name: In the file.
        dtype: By the format's own name; not only those that `DTYPES` knows.
        begin: Where its bytes begin, counted from the beginning of the file.
        n_bytes: How many they are.
    """

    path: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    n_bytes: int

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
        read_into(self.path, self.begin, data, f"{self.name} in {self.path}")
        return whole


def read_header(path: str) -> dict[str, Stored]:
    """List what is in a file, in the order of the data.

    Raises:
        CheckpointError: The file is missing, cut off or damaged.
    """
    try:
        file_bytes = storage.size(path)
        begin = bytearray(min(file_bytes, _BEGIN_BYTES))
        read_into(path, 0, memoryview(begin), path)
        header_bytes = int.from_bytes(begin[:8], "little")
        if file_bytes < 8 or header_bytes > min(file_bytes - 8, _LONGEST_HEADER):
            raise CheckpointError(
                f"{path} is cut off or no safetensors file: {file_bytes} bytes, of which the "
                f"first 8 announce a header of {header_bytes}; copy it again"
            )
        rest = bytearray(max(0, 8 + header_bytes - len(begin)))
        read_into(path, len(begin), memoryview(rest), path)
        text = (begin + rest)[8 : 8 + header_bytes]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    try:
        header = json.loads(text)
        header.pop(_METADATA, None)
        listed = [_stored(path, 8 + header_bytes, name, about) for name, about in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged: its header is not what safetensors files have ({error!r})"
        ) from error
    listed.sort(key=lambda it: (it.begin, it.n_bytes))
    _check_places(path, listed, 8 + header_bytes, file_bytes)
    return {stored.name: stored for stored in listed}


def header(arrays: Mapping[str, Array]) -> bytes:
    """Return all of a file that comes before the data.

    Raises:
        CheckpointError: An array has a dtype that is not written.
    """
    entries: dict[str, Any] = {_METADATA: {"format": "pt"}}
    begin = 0
    for name, array in arrays.items():
        if array.dtype not in _NAMES:
            raise CheckpointError(
                f"{name} is {array.dtype}, which is not written to safetensors here; needed is "
                f"{', '.join(str(dtype) for dtype in _NAMES)}"
            )
        end = begin + array.n_bytes
        entries[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def write(
    path: str,
    arrays: Mapping[str, Array],
    read: Callable[[str], np.ndarray],
) -> None:
    """Write a file, asking for its arrays one at a time, in order.

    Args:
        arrays: What the file will hold, by name.
        read: Gives the array of a name.

    Raises:
        CheckpointError: An array is not what was said, or of a dtype that is not written.
    """
    with storage.open(path, "wb") as file:
        file.write(header(arrays))
        for name, needed in arrays.items():
            array = read(name)
            given = Array(array.shape, array.dtype)
            if given != needed:
                raise CheckpointError(f"{name} for {path} is {given}, announced was {needed}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            del array  # or it would stay until the next one has been made


def _stored(path: str, data_begin: int, name: str, about: Mapping[str, Any]) -> Stored:
    """Make one entry of a header into what it says; any error is the header's."""
    begin, end = about["data_offsets"]
    shape = tuple(about["shape"])
    if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)) or end < begin:
        raise ValueError(f"{name}: shape {list(shape)}, data_offsets {[begin, end]}")
    dtype = str(about["dtype"])
    needed = math.prod(shape) * _BITS.get(dtype, 0) // 8
    if dtype in _BITS and needed != end - begin:
        raise ValueError(f"{name}: {dtype}{list(shape)} is {needed} bytes, not {end - begin}")
    return Stored(path, name, dtype, shape, data_begin + begin, end - begin)


def _check_places(path: str, listed: Iterable[Stored], data_begin: int, file_bytes: int) -> None:
    """Check that the arrays lie one after the other and end with the file."""
    end = data_begin
    for stored in listed:
        if stored.begin != end:
            what = "overlaps what is before it" if stored.begin < end else "leaves a gap before it"
            raise CheckpointError(
                f"{path} is damaged: {stored.name} begins at byte {stored.begin} and {what}, which "
                f"ends at {end}"
            )
        end += stored.n_bytes
    if end > file_bytes:
        raise CheckpointError(
            f"{path} is cut off: {file_bytes} bytes, its header says {end}; copy it again"
        )
    if end < file_bytes:
        raise CheckpointError(
            f"{path} is damaged: {file_bytes} bytes, its header accounts for {end}; copy it again"
        )
