"""Where our arrays lie in those of a family, as its rows say: transposed, or three in one."""

from __future__ import annotations

import concurrent.futures
import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mesh_transformer.checkpoints.family import Family, Row
from mesh_transformer.checkpoints.fitting import model_arrays
from mesh_transformer.checkpoints.source import PARAMS, Key
from mesh_transformer.config import ModelConfig

_BLOCK, _PAD, _THREADS = 256, 8, 2  # of a transpose


class Tensor(NamedTuple):
    """An array of a family's.

    Attributes:
        name: In its files.
        row: Of its table.
        shape: Of theirs.
        keys: Ours in it.
        n_groups: Of heads whose queries, keys and values stand together, where these are in one.
        pairs: Features per head, and how many of them stand in pairs, where ours are in halves.
    """

    name: str
    row: Row
    shape: tuple[int, ...]
    keys: tuple[Key, ...]
    n_groups: int
    pairs: tuple[int, int] = (0, 0)

    def part(self, whole: np.ndarray, key: Key) -> np.ndarray:
        """Return one of ours."""
        if len(self.keys) > 1:
            part = self._parts(whole)[self.keys.index(key)]
            whole = part.reshape(*self._part_shape())
        ours = transposed(whole) if self.row.transposed else np.ascontiguousarray(whole)
        return _reordered(ours, *self.pairs, to_halves=True) if self.row.pairs else ours

    def put(self, whole: np.ndarray, key: Key, part: np.ndarray) -> np.ndarray:
        """Put one of ours in its place, and return the whole."""
        if self.row.pairs:
            part = _reordered(part, *self.pairs, to_halves=False)
        theirs = transposed(part) if self.row.transposed else part
        if len(self.keys) == 1:
            return theirs
        place = self._parts(whole)[self.keys.index(key)]
        place[...] = theirs.reshape(place.shape)
        return whole

    @property
    def _axis(self) -> int:
        """The axis along which ours lie beside each other."""
        return 0 if self.row.transposed else len(self.shape) - 1

    def _parts(self, whole: np.ndarray) -> np.ndarray:
        """Return a view whose first axis is that of our arrays."""
        axis, n = self._axis, len(self.keys)
        split = (self.n_groups, n, self.shape[axis] // n // self.n_groups)
        view = whole.reshape(*self.shape[:axis], *split, *self.shape[axis + 1 :])
        return np.moveaxis(view, axis + 1, 0)

    def _part_shape(self) -> tuple[int, ...]:
        axis = self._axis
        width = self.shape[axis] // len(self.keys)
        return (*self.shape[:axis], width, *self.shape[axis + 1 :])


def tensors(family: Family, model: ModelConfig) -> list[Tensor]:
    """List the arrays that a family has of a model, in the order of its rows; layers in order."""
    ours = model_arrays(model)
    found = []
    for stack, group in itertools.groupby(family.rows, _stack):
        rows = list(group)
        n_layers = {"encoder": model.encoder_layers, "decoder": model.layers}
        for layer in range(n_layers[stack]) if stack else (None,):
            found += [_tensor(row, layer, model, ours) for row in rows]
    return [tensor for tensor in found if tensor is not None]


def _stack(row: Row) -> str | None:
    """Name the stack whose layers have an array; None: it is of no layer."""
    return row.paths[0].partition("/")[0] if "{}" in row.theirs else None


def _tensor(
    row: Row, layer: int | None, model: ModelConfig, ours: Mapping[Key, tuple[int, ...]]
) -> Tensor | None:
    keys = tuple(Key(PARAMS, path, layer) for path in row.paths)
    if row.gated not in (None, model.gated) or not all(key in ours for key in keys):
        return None
    shape = ours[keys[0]][::-1] if row.transposed else ours[keys[0]]
    pairs = (model.d_head, model.pe_rotary_dims)
    tensor = Tensor(row.theirs.format(layer), row, shape, keys, 1, pairs)
    if len(keys) == 1:
        return tensor
    axis = tensor._axis
    whole = (*shape[:axis], len(keys) * shape[axis], *shape[axis + 1 :])
    return tensor._replace(shape=whole, n_groups=model.n_heads if row.by_head else 1)


def _reordered(array: np.ndarray, d_head: int, n_rotated: int, *, to_halves: bool) -> np.ndarray:
    """Reorder the rotary features of each head, along the last axis, from pairs to halves or back.

    "rotary" turns neighbours and "rotary-half" features that are half a head apart; what one
    computes with its features, the other does with them in its own order.
    """
    heads = array.reshape(*array.shape[:-1], -1, d_head)
    result = heads.copy()
    split = (n_rotated // 2, 2) if to_halves else (2, n_rotated // 2)
    turned = heads[..., :n_rotated].reshape(*heads.shape[:-1], *split).swapaxes(-1, -2)
    result[..., :n_rotated] = turned.reshape(*heads.shape[:-1], n_rotated)
    return result.reshape(array.shape)


def transposed(matrix: np.ndarray) -> np.ndarray:
    """Return a matrix's transpose, laid out row by row.

    Several times as fast as `np.ascontiguousarray(matrix.T)`, which takes a cache line from memory
    for each number: a square block is copied first to where its columns lie in the cache together.
    Rows there have an odd length, since those of a matrix, whose lengths are mostly powers of two,
    would take each other's place in the cache.
    """
    n_rows, n_columns = matrix.shape
    # NumPy copies what it takes for integers faster than numbers of a type that it does not know.
    numbers = np.ascontiguousarray(matrix).view(f"u{matrix.dtype.itemsize}")
    result = np.empty((n_columns, n_rows), numbers.dtype)

    def strip(begin: int) -> None:
        rows = slice(begin, begin + _BLOCK)
        near = np.empty((_BLOCK, _BLOCK + _PAD), numbers.dtype)
        for left in range(0, n_columns, _BLOCK):
            columns = slice(left, left + _BLOCK)
            block = numbers[rows, columns]
            copied = near[: block.shape[0], : block.shape[1]]
            copied[...] = block
            result[columns, rows] = copied.T

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(strip, range(0, n_rows, _BLOCK)))
    return result.view(matrix.dtype)
