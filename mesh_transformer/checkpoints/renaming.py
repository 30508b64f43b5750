"""Our arrays by the names of a family, each made when it is asked for; `named` is the other way.

A writer of files is given what there is and reads it one array at a time, in its own order. Our
embedding may have a bias, which most families lack: theirs is then the table with the bias in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mesh_transformer.checkpoints.family import Family
from mesh_transformer.checkpoints.fitting import cast, fitted
from mesh_transformer.checkpoints.source import TABLE, TABLE_BIAS, Array, Source
from mesh_transformer.checkpoints.tensors import tensors
from mesh_transformer.config import ModelConfig

_ROWS_AT_A_TIME = 256  # of the embedding, in float32 while the bias is added


class Renamed:
    """The weights of a source by a family's names, in the order of its rows.

    Args:
        source: Of the model's arrays.
        family: One that can describe the model (`families.described`).
        dtype: Of what is read.
        advance: Called with the bytes of each array that has been made.

    Raises:
        CheckpointError: The source is not of the model.
    """

    def __init__(
        self,
        source: Source,
        family: Family,
        model: ModelConfig,
        dtype: np.dtype[Any],
        advance: Callable[[int], object],
    ) -> None:
        self._source, self._dtype, self._advance = fitted(source, model), dtype, advance
        self._tensors = {tensor.name: tensor for tensor in tensors(family, model)}
        held = {key for tensor in self._tensors.values() for key in tensor.keys}
        self._folds_bias = TABLE_BIAS in self._source.arrays and TABLE_BIAS not in held
        self.arrays: Mapping[str, Array] = {
            name: Array(tensor.shape, dtype) for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        """Make one array.

        Raises:
            CheckpointError: It holds numbers that are too large for the dtype, or is damaged.
        """
        made = self._made(name)
        self._advance(made.nbytes)
        return made

    def _made(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        if tensor.keys == (TABLE,) and self._folds_bias:
            return _embedding(self._source, self._dtype)
        whole = np.empty(tensor.shape if len(tensor.keys) > 1 else 0, self._dtype)
        for key in tensor.keys:
            part = cast(self._source.read(key), self._dtype, f"{key} in {self._source.where}")
            whole = tensor.put(whole, key, part)
        return whole


def _embedding(source: Source, dtype: np.dtype[Any]) -> np.ndarray:
    """Return the embedding `[V, D]` with the bias in it, added in float32."""
    what = f"{TABLE} in {source.where}"
    bias_D = source.read(TABLE_BIAS).astype(np.float32)
    table_VD = source.read(TABLE)
    if not bias_D.any():  # adding it would make -0 into 0
        return cast(table_VD, dtype, what)
    result_VD = np.empty(table_VD.shape, dtype)
    for begin in range(0, len(table_VD), _ROWS_AT_A_TIME):
        part = slice(begin, begin + _ROWS_AT_A_TIME)
        result_VD[part] = cast(table_VD[part].astype(np.float32) + bias_D, dtype, what)
    return result_VD
