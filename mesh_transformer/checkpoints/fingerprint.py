"""Fingerprints of array contents that do not depend on how the arrays are sharded.

Each element's bits are mixed with its place in the global array and the results are added up
modulo 2^32. Integer addition has no rounding and no order, so the same content gives the same
fingerprint on every mesh and backend, and a changed, moved, lost or repeated element gives another
(but for one chance in 2^32). It guards against accidents, not against malice.

Each device adds up what it holds; the host adds up the devices. Nothing is communicated between
devices: many small programs with collectives in flight at once can deadlock XLA's CPU backend.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_GOLDEN = 0x9E3779B1  # 2^32 / golden ratio, odd: spreads places over all 32 bits
_PIECE = 2**22  # elements that the host adds up at a time
_MIX = (0x85EBCA6B, 0xC2B2AE35)  # the finaliser of MurmurHash3, a public-domain bit mixer


def fingerprints(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """Compute the fingerprint of each array, where it lies, as 8 hexadecimal digits."""
    sums = {path: _device_sums(array) for path, array in arrays.items()}  # all begun, none awaited
    ours = [sum(int(np.asarray(part).item()) for part in parts) for parts in sums.values()]
    totals = np.array(ours, np.uint64).astype(np.uint32)
    if jax.process_count() > 1:
        totals = multihost_utils.process_allgather(totals).sum(axis=0, dtype=np.uint32)
    return {path: as_digits(total) for path, total in zip(arrays, totals.tolist(), strict=True)}


def box_sum(part: np.ndarray, starts: Sequence[int], shape: Sequence[int]) -> int:
    """Add up the part of an array of `shape` that begins at `starts`, in the host's memory.

    The sums of parts that cover the array once add up to what `as_digits` gives the array's
    fingerprint of.
    """
    flat_from = _contiguous_from(part.shape, starts, shape)
    if flat_from is not None:  # the common case: pieces of few sizes, so that little is compiled
        flat = part.reshape(-1)
        pieces = [flat[first : first + _PIECE] for first in range(0, flat.size, _PIECE)]
        begins = [[flat_from + first] for first in range(0, flat.size, _PIECE)]
        # Of one dimension, the size says nothing: strides follow from the sizes of later ones.
        shape = (0,)
    else:
        pieces, begins = [part], [list(starts)]
    total = 0
    with jax.default_device(_host()):
        for piece, begin in zip(pieces, begins, strict=True):
            wrapped = [np.uint32(start % 2**32) for start in begin]
            total += int(_sum(jax.device_put(piece, _host()), wrapped, tuple(shape)))
    return total % 2**32


def as_digits(total: int) -> str:
    """Write a sum of sums as the fingerprint it is."""
    return f"{total % 2**32:08x}"


def _contiguous_from(
    part: Sequence[int], starts: Sequence[int], shape: Sequence[int]
) -> int | None:
    """Give the place in the flattened array where a part begins, if the part is one run of it."""
    wide = [axis for axis, size in enumerate(part) if size > 1]
    first = wide[0] if wide else len(shape)
    if any(part[axis] != shape[axis] for axis in range(first + 1, len(shape))):
        return None
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return sum(start * stride for start, stride in zip(starts, strides, strict=True))


@functools.cache
def _host() -> jax.Device:
    """Return the host's own processor as a device, or the default device where there is none."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _device_sums(array: jax.Array) -> list[jax.Array]:
    """Begin to add up each part of the array that this process holds, once where it is repeated."""
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    if isinstance(array.sharding, NamedSharding):
        sums = _summing(array.sharding.mesh, array.sharding.spec, array.ndim)(array)
        by_device = {shard.device: shard.data for shard in sums.addressable_shards}
        return [by_device[shard.device] for shard in shards]
    starts = [np.array([cut.start or 0 for cut in shard.index], np.uint32) for shard in shards]
    return [
        _sum(shard.data, start, array.shape) for shard, start in zip(shards, starts, strict=True)
    ]


@functools.cache
def _summing(mesh: Mesh, spec: PartitionSpec, n_dims: int) -> Callable[[jax.Array], jax.Array]:
    """Make the program in which each device adds up its own part of an array: [devices]."""
    axes_by_dim = [*spec, *[None] * (n_dims - len(spec))]

    def part_sum(part: jax.Array) -> jax.Array:
        counts = [jax.lax.axis_size(axes) if axes else 1 for axes in axes_by_dim]
        starts = [
            jax.lax.axis_index(axes) * size if axes else 0
            for axes, size in zip(axes_by_dim, part.shape, strict=True)
        ]
        shape = tuple(count * size for count, size in zip(counts, part.shape, strict=True))
        return _sum(part, starts, shape)[None]

    return jax.jit(
        jax.shard_map(
            part_sum,
            mesh=mesh,
            in_specs=spec,
            out_specs=PartitionSpec(mesh.axis_names),
            check_vma=False,
        )
    )


@functools.partial(jax.jit, static_argnums=2)
def _sum(part: jax.Array, starts: Sequence[jax.Array | int], shape: tuple[int, ...]) -> jax.Array:
    """Add up the mixed bits of the part of an array of `shape` that begins at `starts`."""
    words = _words(part)
    shape = (*shape, *words.shape[part.ndim :])
    place = jnp.ones(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        start = jnp.asarray(starts[axis] if axis < part.ndim else 0).astype(jnp.uint32)
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        place += (jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) + start) * stride
    mixed = words ^ (place * jnp.uint32(_GOLDEN))
    for factor, shift in zip(_MIX, (16, 13), strict=True):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    """View the bits of each element as uint32 (two of them, on a last axis, if it has 64)."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    if array.dtype.itemsize >= 4:
        return jax.lax.bitcast_convert_type(array, jnp.uint32)
    unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
