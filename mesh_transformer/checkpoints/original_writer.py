"""Checkpoints of mesh-transformer-jax's first model, and of its fork's others, written.

`original` says what is in them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mesh_transformer import storage
from mesh_transformer.checkpoints import npz, roles
from mesh_transformer.checkpoints.fitting import cast, weights_dtype
from mesh_transformer.checkpoints.original import (
    Leaf,
    check_held,
    leaves,
    n_files_of,
    parts_of,
)
from mesh_transformer.checkpoints.source import PARAMS, Key, Source, ahead
from mesh_transformer.config import ModelConfig

_WRITERS = 4  # shards written at a time


def write(
    folder: str,
    source: Source,
    model: ModelConfig,
    *,
    n_shards: int,
    dtype: np.dtype[Any] | None,
    moments: bool,
    advance: Callable[[int], object],
) -> None:
    """Write a step folder as the original would with so many shards.

    Args:
        folder: There already, and empty.
        n_shards: Divides heads, vocabulary and feed-forward features.
        dtype: Of the weights; as in the source if None. Moments are float32.
        moments: Whether to write the optimizer's state, which `source` then has.
        advance: Called with the bytes of each array of the source's that is written.

    Raises:
        CheckpointError: Neither the original nor its fork computes such a model.
    """
    check_held(model)
    listed = leaves(model, moments=moments)
    paths = [storage.join(folder, f"shard_{shard}") for shard in range(n_shards)]

    numbers = {"step": source.step}
    if moments:
        assert source.counts is not None
        numbers |= {"adam count": source.counts.adam, "schedule count": source.counts.schedule}
    spare = dtype or weights_dtype(source)

    def whole_of(leaf: Leaf) -> np.ndarray:
        if leaf.role is None:
            return np.asarray(numbers[leaf.name], np.int32)
        if leaf.key is None:
            return np.zeros(leaf.shape, spare if leaf.name.startswith(PARAMS) else np.float32)
        return _whole(source, leaf.key, model.n_heads, dtype)

    begin = 0
    with ahead(whole_of, listed) as read:
        for i, n in enumerate(n_files_of(len(listed))):
            archives = [npz.Writer(storage.join(path, f"{i}.npz")) for path in paths]
            with (
                contextlib.ExitStack() as opened,
                concurrent.futures.ThreadPoolExecutor(_WRITERS) as pool,
            ):
                for archive in archives:
                    opened.enter_context(archive)
                for leaf in listed[begin : begin + n]:
                    whole = read(leaf)
                    parts = _parts(leaf, whole, n_shards)
                    list(pool.map(npz.Writer.add, archives, parts))
                    if leaf.key is not None:
                        advance(whole.nbytes)
                    del whole, parts  # or they would stay until the next ones are there
            begin += n


def _whole(source: Source, key: Key, n_heads: int, dtype: np.dtype[Any] | None) -> np.ndarray:
    """Read one of the original's arrays, as which heads' queries, keys and values may be in one."""
    parts = [source.read(it) for it in parts_of(key)]
    if dtype is not None and key.kind == PARAMS:
        parts = [cast(part, dtype, str(key)) for part in parts]
    if len(parts) == 1:
        return parts[0]
    by_head = [part.reshape(*part.shape[:-1], n_heads, -1) for part in parts]
    return np.stack(by_head, -2).reshape(*parts[0].shape[:-1], -1)


def _parts(leaf: Leaf, whole: np.ndarray, n_shards: int) -> list[np.ndarray]:
    """Say what each shard holds of an array."""
    if leaf.role is None:
        return [whole] * n_shards
    kind = leaf.key.kind if leaf.key else PARAMS
    axis = roles.split_axis(leaf.role)
    if axis is None:
        return [
            roles.copy_for(leaf.role, kind, leaf.param, whole, shard, n_shards)
            for shard in range(n_shards)
        ]
    scale = roles.gathered_scale(leaf.role, kind, n_shards)
    whole = whole if scale == 1 else (whole / scale).astype(whole.dtype)
    return np.split(whole, n_shards, axis)
