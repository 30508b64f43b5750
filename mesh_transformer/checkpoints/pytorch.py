"""PyTorch's own weights' files (pytorch_model.bin), read one array at a time; needs PyTorch.

Such a file is a pickle. PyTorch reads it without running code that it may hold, and maps the
arrays, so that each one is in memory only while it is copied.
"""

from __future__ import annotations

import errno
import pickle
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer import storage
from mesh_transformer.checkpoints.layout import CheckpointError, reason
from mesh_transformer.checkpoints.npz import BFLOAT16
from mesh_transformer.checkpoints.source import Array

_DTYPES = {
    "torch.float32": np.dtype(np.float32),
    "torch.float16": np.dtype(np.float16),
    "torch.bfloat16": BFLOAT16,
}


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
        dtype = str(self.tensor.dtype)
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.name} in {self.path} is {dtype}, which is not read here; save it as "
                f"{', '.join(_DTYPES)}"
            )
        return Array(self.shape, _DTYPES[dtype])

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


def _torch(path: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a file of PyTorch's: pip install torch, or save the model as safetensors "
            "(save_pretrained of transformers does)"
        ) from error
    return torch
