"""Arrays that lie in files by a table's names, whatever the files are, checked and read.

A reader of files gives what is in them by name; a `Family` says which of ours each name is. So a
format is a reader, a table and a few lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from mesh_transformer.checkpoints.family import Family
from mesh_transformer.checkpoints.fitting import model_arrays
from mesh_transformer.checkpoints.layout import CheckpointError, first_of
from mesh_transformer.checkpoints.source import TABLE, TABLE_BIAS, Array, Counts, Key
from mesh_transformer.checkpoints.tensors import Tensor, tensors
from mesh_transformer.config import ModelConfig


class Stored(Protocol):
    """An array in a file, not read yet."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def array(self) -> Array:
        """What reading it gives.

        Raises:
            CheckpointError: Its dtype is not one that weights can be read from.
        """
        ...

    def read(self) -> np.ndarray:
        """Read it.

        Raises:
            CheckpointError: It is damaged or cannot be read; the message names its file.
        """
        ...


class NamedSource:
    """Weights by the names of a family, checked against a model.

    Where the model's embedding has a bias that the family lacks, it is read as zeros.

    Args:
        where: Path of the checkpoint.
        what: What it is, in a few words.
        family: Whose names they are.
        model: What is there.
        known: Keys of the configuration that the checkpoint itself holds.
        stored: What is in its files.
        told_by: What says which model it is: "config.json".

    Raises:
        CheckpointError: Its arrays are not those of the model; every difference is listed.
    """

    step = 0
    counts: Counts | None = None

    def __init__(
        self,
        where: str,
        what: str,
        family: Family,
        model: ModelConfig,
        known: Mapping[str, Any],
        stored: Mapping[str, Stored],
        told_by: str,
    ) -> None:
        self.where, self.known, self._stored = where, known, stored
        ours, listed = model_arrays(model), tensors(family, model)
        if problems := _misfits(family, model, listed, stored, told_by):
            heading = f"{where} is not what its {told_by} describes:"
            raise CheckpointError("\n  - ".join([heading, *problems]))
        self._places = {key: tensor for tensor in listed for key in tensor.keys}
        self.arrays: dict[Key, Array] = {
            key: Array(ours[key], stored[tensor.name].array.dtype)
            for key, tensor in self._places.items()
        }
        if TABLE_BIAS in ours and TABLE_BIAS not in self.arrays:
            self.arrays[TABLE_BIAS] = Array(ours[TABLE_BIAS], self.arrays[TABLE].dtype)
        dtypes = " and ".join(sorted({array.dtype.name for array in self.arrays.values()}))
        self.about = f"{what}, {dtypes}"

    def read(self, key: Key) -> np.ndarray:
        """Read one array."""
        if key not in self._places:
            return np.zeros(*self.arrays[key])
        tensor = self._places[key]
        return tensor.part(self._stored[tensor.name].read(), key)


def _misfits(
    family: Family,
    model: ModelConfig,
    listed: Iterable[Tensor],
    stored: Mapping[str, Stored],
    told_by: str,
) -> list[str]:
    """List what is not as the model says."""
    needed = {tensor.name: tensor.shape for tensor in listed}
    missing = [f"{name} is missing" for name in needed if name not in stored]
    # Files may hold a copy of the embeddings as the head, which other readers too ignore.
    tied = {row.theirs for row in family.rows if row.ours == "unembed/w"}
    unused = tied if model.tie_embeddings else set()
    extra = [
        f"{name} is no part of a {family.name}"
        for name in stored
        if name not in needed.keys() | unused and not re.fullmatch(family.constants, name)
    ]
    wrong = [
        f"{name} is {list(stored[name].shape)}, {list(shape)} by {told_by}"
        for name, shape in needed.items()
        if name in stored and stored[name].shape != shape
    ]
    unread = []
    for name in needed.keys() & stored.keys():
        try:
            _ = stored[name].array
        except CheckpointError as error:
            unread.append(str(error))
    return [text for kind in (missing, extra, wrong, sorted(unread)) for text in first_of(kind)]
