"""PyTorch's own weights' files (pytorch_model.bin, .pth), one array at a time; needs PyTorch.

Such a file is a zip: a pickle of what there is, and a member for the bytes of each array. PyTorch
reads it without running code that it may hold, and maps the arrays, so that each one is in memory
only while it is copied. `torch.save` would need all of them at once; so what it writes is written
here (pytorch.org/docs/stable/notes/serialization.html).
"""

from __future__ import annotations

import collections
import errno
import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer import storage
from mesh_transformer.checkpoints.layout import CheckpointError, dtype_of, reason
from mesh_transformer.checkpoints.npz import BFLOAT16, writing_zip
from mesh_transformer.checkpoints.source import Array

_DTYPES = {
    "torch.float32": np.dtype(np.float32),
    "torch.float16": np.dtype(np.float16),
    "torch.bfloat16": BFLOAT16,
}
_STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    BFLOAT16: "BFloat16Storage",
    np.dtype(np.uint8): "ByteStorage",
}
_ALIGNMENT = 64  # of arrays in the files that PyTorch writes, which maps them
_LOCAL_HEADER, _ZIP64_BYTES = 30, 20  # before a member's name, and after it
_PADDING = 0x4246  # PyTorch's own mark ("FB") of bytes in a header that mean nothing


class Mapped(NamedTuple):
    """An array in a file.

    Attributes:
        path: Path of the file.
        name: In the file.
        tensor: Mapped, not read.
    """

    path: str
    name: str
    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def array(self) -> Array:
        """What reading it gives.

        Raises:
            CheckpointError: Its dtype is not one that weights can be read from.
        """
        return Array(
            self.shape, dtype_of(f"{self.name} in {self.path}", str(self.tensor.dtype), _DTYPES)
        )

    def read(self) -> np.ndarray:
        """Copy it into memory."""
        array = self.array
        tensor = self.tensor.detach().contiguous()
        if array.dtype == BFLOAT16:  # which NumPy does not have, and PyTorch does not hand over
            return tensor.view(_torch(self.path).int16).numpy().view(BFLOAT16).copy()
        return tensor.numpy().copy()


def read_header(path: str, *, inside: str = "") -> dict[str, Mapped]:
    """List what is in a file.

    Args:
        inside: The weights may also be below this name, beside other things; entries without a
            value, as tied weights have them, are left out then.

    Raises:
        CheckpointError: It cannot be read; there is no PyTorch here, or it is not a local file.
    """
    if storage.is_remote(path):
        raise CheckpointError(
            f"{path}: PyTorch reads its files from a local disk only; copy the folder to one, or "
            "save it as safetensors (save_pretrained of transformers does)"
        )
    torch = _torch(path)
    try:
        tensors = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        if (
            isinstance(error, OSError) and error.errno != errno.EINVAL
        ):  # of a file cut in its middle
            raise
        raise CheckpointError(
            f"{path} is damaged, or no file of weights alone: {reason(error)}"
        ) from error
    if inside and isinstance(tensors, dict):
        tensors = tensors.get(inside, tensors)
        if isinstance(tensors, dict):
            tensors = {name: it for name, it in tensors.items() if it is not None}
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise CheckpointError(f"{path} holds something else than named tensors")
    return {name: Mapped(path, name, tensor) for name, tensor in tensors.items()}


class _Storage(NamedTuple):
    """The bytes of an array, as the pickle names them: by a class of PyTorch and a member."""

    kind: Any
    member: str
    n_numbers: int


class _Saved:
    """A tensor of which the pickle has all but its bytes."""

    def __init__(self, rebuild: Any, storage: _Storage, shape: tuple[int, ...]) -> None:
        strides = [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
        hooks: Mapping[Any, Any] = collections.OrderedDict()
        self._call = rebuild, (storage, 0, shape, tuple(strides), False, hooks)

    def __reduce__(self) -> Any:
        return self._call


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        return ("storage", value.kind, value.member, "cpu", value.n_numbers)


def write(
    path: str,
    arrays: Mapping[str, Array],
    read: Callable[[str], np.ndarray],
    *,
    inside: str = "",
    copies: Mapping[str, str] | None = None,
) -> None:
    """Write a state dict, as `torch.save` does.

    Args:
        arrays: By name; of dtypes that PyTorch has.
        read: Makes an array, given its name; called in their order.
        inside: The name that the state dict is below, as trainers have it; "": it is the file.
        copies: Further names, each with that of the array which it is, as modules that share a
            parameter have it. The bytes are there once.

    Raises:
        CheckpointError: There is no PyTorch here.
    """
    torch = check(path)
    saved: dict[str, Any] = {}
    for i, (name, array) in enumerate(arrays.items()):
        n_numbers = array.n_bytes // array.dtype.itemsize
        held = _Storage(getattr(torch, _STORAGES[array.dtype]), str(i), n_numbers)
        saved[name] = _Saved(torch._utils._rebuild_tensor_v2, held, array.shape)
    saved |= {name: saved[copied] for name, copied in (copies or {}).items()}
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump({inside: saved} if inside else saved)
    with writing_zip(path) as archive:
        _add(archive, "data.pkl", pickled.getbuffer())
        _add(archive, "byteorder", memoryview(b"little"))
        for i, (name, array) in enumerate(arrays.items()):
            whole = np.asarray(read(name), order="C")
            assert (whole.shape, whole.dtype) == (array.shape, array.dtype), name
            _add(archive, f"data/{i}", whole.reshape(-1).view(np.uint8).data)
            del whole  # or it would stay until the next one has been made
        _add(archive, "version", memoryview(b"3\n"))


def _add(archive: zipfile.ZipFile, name: str, data: memoryview) -> None:
    """Add a member, whose bytes are aligned in the file."""
    member = zipfile.ZipInfo(f"archive/{name}")
    assert archive.fp is not None
    begin = archive.fp.tell() + _LOCAL_HEADER + len(member.filename) + _ZIP64_BYTES + 4
    member.extra = struct.pack("<HH", _PADDING, -begin % _ALIGNMENT) + bytes(-begin % _ALIGNMENT)
    with archive.open(member, "w", force_zip64=True) as file:
        file.write(data)


def check(path: str) -> Any:
    """Return PyTorch, with which a file is to be written.

    Raises:
        CheckpointError: It is not installed.
    """
    return _torch(path, "choose another --format, such as hf")


def _torch(
    path: str,
    otherwise: str = "save the model as safetensors (save_pretrained of transformers does)",
) -> Any:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a file of PyTorch's: pip install torch, or {otherwise}"
        ) from error
    return torch
