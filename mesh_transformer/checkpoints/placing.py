"""Put a checkpoint of any format onto a mesh, one array after the other.

In host memory there is never more than one array of one layer and this process's own parts of one
array of our trees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.checkpoints.fitting import cast
from mesh_transformer.checkpoints.layout import COUNT, MOMENT, CheckpointError, by_path
from mesh_transformer.checkpoints.source import PARAMS, Key, Source


def place_params(source: Source, wanted: Any, advance: Callable[[int], object]) -> Any:
    """Return the weights, in the dtypes and shardings of `wanted`.

    Args:
        source: One that fits; see `fitting.fitted`.
        wanted: Our tree of weights, of jax.ShapeDtypeStruct with shardings.
        advance: Called with the bytes read, as they are read.
    """
    placed = {
        path: _placed(source, Key(PARAMS, path), leaf, advance)
        for path, leaf in by_path(wanted).items()
    }
    return jax.tree.unflatten(jax.tree.structure(wanted), placed.values())


def place_opt_state(source: Source, wanted: Any, advance: Callable[[int], object]) -> Any:
    """Return the optimizer's state, as `place_params`.

    Raises:
        CheckpointError: The checkpoint holds weights alone.
    """
    if source.counts is None:
        raise CheckpointError(
            f"{source.where} holds no optimizer state ({source.about}): begin with a fresh one "
            "(--fresh-opt)"
        )
    flat = by_path(wanted, "opt_state")
    adam = {match[1] for path in flat if (match := MOMENT.fullmatch(path))}
    placed = []
    for path, leaf in flat.items():
        if match := MOMENT.fullmatch(path):
            placed.append(_placed(source, Key(match[2], match[3]), leaf, advance))
        elif match := COUNT.fullmatch(path):
            count = source.counts.adam if match[1] in adam else source.counts.schedule
            placed.append(jnp.full((), count, leaf.dtype, device=leaf.sharding))
        else:
            raise ValueError(f"{path} of the optimizer's state is not known here")
    return jax.tree.unflatten(jax.tree.structure(wanted), placed)


def _placed(source: Source, key: Key, leaf: Any, advance: Callable[[int], object]) -> jax.Array:
    """Read an array, layer by layer if layers are stacked, into this process's parts of it."""
    indices: Mapping[Any, Any] = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    bounds = {
        device: tuple(cut.indices(n)[:2] for cut, n in zip(index, leaf.shape, strict=True))
        for device, index in indices.items()
    }
    dtype = np.dtype(leaf.dtype)
    parts = {
        part: np.empty([stop - start for start, stop in part], dtype) for part in bounds.values()
    }
    stacked = key not in source.arrays
    for layer in range(leaf.shape[0]) if stacked else (None,):
        whole = source.read(key._replace(layer=layer))
        n_read = whole.nbytes
        whole = cast(whole, dtype, str(key))
        for part, array in parts.items():
            if layer is None:
                array[...] = whole[tuple(slice(*cut) for cut in part)]
            elif part[0][0] <= layer < part[0][1]:
                array[layer - part[0][0]] = whole[tuple(slice(*cut) for cut in part[1:])]
        advance(n_read)
    arrays = [jax.device_put(parts[part], device) for device, part in bounds.items()]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)
