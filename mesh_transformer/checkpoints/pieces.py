"""Look at the arrays of a native checkpoint piece by piece, in memory for one piece.

Nothing is placed on accelerators: a machine of any size can look at a model of any size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from mesh_transformer.checkpoints import layout, reading
from mesh_transformer.checkpoints.fingerprint import as_digits, box_sum
from mesh_transformer.checkpoints.layout import CheckpointError, Damaged
from mesh_transformer.checkpoints.source import Array

Box = tuple[slice, ...]


class Pieces:
    """The arrays of a step folder, opened and found whole as far as files tell.

    Attributes:
        folder: The step folder.
        about: What `about.json` holds.
        paths: Of its arrays.
    """

    def __init__(self, folder: str, *, check_files: bool = True) -> None:
        """Look at what is there.

        Args:
            check_files: Whether to refuse a folder whose files are not those that are listed.

        Raises:
            CheckpointError: It is not a native checkpoint, or damaged, or cannot be read.
        """
        self.folder = folder
        self.about = reading.read_about(folder, check_files=check_files)
        self._state = layout.absolute(folder) / "state"
        self.paths: Sequence[str] = list(self.about["fingerprints"])
        self._context = ocp.type_handlers.get_ts_context(use_ocdbt=True)

    def array(self, path: str) -> Array:
        """Look up an array's shape and dtype.

        Raises:
            Damaged: It is lost.
            CheckpointError: It cannot be read.
        """
        opened = self._open(path)
        return Array(tuple(opened.shape), np.dtype(opened.dtype.numpy_dtype))

    def read(self, path: str, box: Box) -> np.ndarray:
        """Read a part of an array.

        Raises:
            Damaged: What is stored cannot be decoded.
            CheckpointError: It cannot be read.
        """
        return self._read(self._open(path), path, box)

    def fingerprint(self, path: str) -> str:
        """Add up what is stored of an array, one stored chunk at a time.

        Raises:
            Damaged: What is stored cannot be decoded.
            CheckpointError: It cannot be read.
        """
        opened = self._open(path)
        shape = tuple(opened.shape)
        total = 0
        for box in _boxes(shape, opened.chunk_layout.read_chunk.shape):
            part = self._read(opened, path, box)
            total += box_sum(part, [cut.start for cut in box], shape)
        return as_digits(total)

    def _open(self, path: str) -> Any:
        info = ocp.type_handlers.ParamInfo(
            name=path,
            parent_dir=self._state,
            is_ocdbt_checkpoint=True,
            use_zarr3=True,
            ts_context=self._context,
        )
        spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=True)
        with layout.named_errors(f"{path} in {self.folder} cannot be read", reading.ADVICE):
            return ts.open(ts.Spec(spec), open=True, context=self._context).result()

    def _read(self, opened: Any, path: str, box: Box) -> np.ndarray:
        with layout.named_errors(f"{path} in {self.folder} cannot be read", reading.ADVICE):
            part: np.ndarray = opened[box].read(order="C").result()
        return part


def verify(folder: str, advance: Callable[[int], object] = lambda n_bytes: None) -> None:
    """Check every file and every array of a native checkpoint, in memory for one stored chunk.

    Args:
        folder: A step folder, as `reading.locate` gives it.
        advance: Told of the bytes of each array once it is looked at.

    Raises:
        Damaged: Lists every file and every array that is not as it was saved.
        CheckpointError: It is not a native checkpoint, or cannot be read.
    """
    damaged = reading.damaged_files(folder)
    try:
        pieces = Pieces(folder, check_files=False)
    except CheckpointError as error:
        if damaged:
            raise reading.damaged(folder, damaged) from error
        raise
    for path in pieces.paths:
        try:
            found = pieces.fingerprint(path)
            advance(pieces.array(path).n_bytes)
        except Damaged as error:
            damaged.append(f"{path} ({layout.reason(error)})")
        else:
            if found != pieces.about["fingerprints"][path]:
                damaged.append(f"{path} (changed)")
    if damaged:
        raise reading.damaged(folder, damaged)


def _boxes(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[Box]:
    """Cut an array along its stored chunks."""
    if not shape:
        return iter([()])  # TensorStore tells of no chunks then
    cuts = [
        [slice(first, min(first + step, size)) for first in range(0, size, step)]
        for size, step in zip(shape, chunk, strict=True)
    ]
    return itertools.product(*cuts)
