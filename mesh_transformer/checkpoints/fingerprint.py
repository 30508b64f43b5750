"""Fingerprints of array contents that do not depend on how the arrays are sharded.

Each element's bits are mixed with its place in the global array and the results are added up
modulo 2^32. Integer addition has no rounding and no order, so the same content gives the same
fingerprint on every mesh and backend, and a changed, moved, lost or repeated element gives another
(but for one chance in 2^32). It guards against accidents, not against malice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

_GOLDEN = 0x9E3779B1  # 2^32 / golden ratio, odd: spreads places over all 32 bits
_MIX = (0x85EBCA6B, 0xC2B2AE35)  # the finaliser of MurmurHash3, a public-domain bit mixer


def fingerprints(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """Compute the fingerprint of each array, where it lies, as 8 hexadecimal digits."""
    sums = {path: _fingerprint(array) for path, array in arrays.items()}
    return {path: f"{int(total):08x}" for path, total in sums.items()}


@jax.jit
def _fingerprint(array: jax.Array) -> jax.Array:
    words = _words(array)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    mixed = words ^ ((place + jnp.uint32(1)) * jnp.uint32(_GOLDEN))
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
