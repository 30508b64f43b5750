"""How a stored weight becomes the one that is multiplied by, and where its gradient goes.

Masters are float32 and may be spread over `dp` (ZeRO stage 3, arXiv:1910.02054). Where a layer uses
one, it is cast to the compute dtype and, if spread, gathered: per layer, so that no copy of the
whole model lives beside the masters. Backward, a spread weight's gradient is summed over `dp`
straight into the same spread layout, in float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from mesh_transformer.sharding import over_mp, spread_axis


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight to differentiate by: the value, and an array that only receives the gradient.

    The gradient's dtype is thereby free: gradients of a float32 master that was cast at use come
    out in the compute dtype, half the memory that the master's own dtype would take.

    Attributes:
        value: The stored weight.
        gradient: Zeros of the stored shape, never read; differentiate by these.
        dims: Dimensions of the stored weight, before a layer is taken out of the stack.
        spread: Whether the value is spread over `dp` and must be gathered.
    """

    value: jax.Array
    gradient: jax.Array
    dims: str = dataclasses.field(metadata={"static": True})
    spread: bool = dataclasses.field(metadata={"static": True})


def cast_at_use(dtype: jnp.dtype) -> contextlib.AbstractContextManager[Any]:
    """Give layers their matrices in `dtype`; vectors (norms, biases) stay as they are stored."""

    def getter(next_getter: Any, value: Any, context: Any) -> jax.Array:
        if not isinstance(value, Weight):
            return next_getter(value.astype(dtype) if value.ndim >= 2 else value)
        dims = value.dims[-value.value.ndim :]
        used_dtype = dtype if value.value.ndim >= 2 else value.value.dtype
        spread = value.spread and spread_axis(dims) is not None
        return next_getter(_use(value.value, value.gradient, dims, jnp.dtype(used_dtype), spread))

    return hk.custom_getter(getter)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _use(
    value: jax.Array, gradient: jax.Array, dims: str, dtype: jnp.dtype, spread: bool
) -> jax.Array:
    used = value
    if value.dtype != dtype:
        # Rounding before the cast changes no value; a bare cast XLA moves out of the loop over
        # layers, and then keeps a copy of the whole model beside the masters.
        kept = jnp.finfo(dtype)
        used = jax.lax.reduce_precision(value, kept.nexp, kept.nmant).astype(dtype)
    return gather_over_dp(used, dims) if spread else used


def _use_forward(
    value: jax.Array, gradient: jax.Array, dims: str, dtype: jnp.dtype, spread: bool
) -> tuple[jax.Array, jax.Array]:
    return _use(value, gradient, dims, dtype, spread), gradient


def _use_backward(
    dims: str, dtype: jnp.dtype, spread: bool, gradient: jax.Array, cotangent: jax.Array
) -> tuple[None, jax.Array]:
    cotangent = cotangent.astype(gradient.dtype)
    return None, sum_into_shards(cotangent, dims) if spread else cotangent


_use.defvjp(_use_forward, _use_backward)


def gather_over_dp(part: jax.Array, dims: str) -> jax.Array:
    """Gather the parts of a weight that `dp` spreads; `mp` keeps its split."""
    gather = functools.partial(
        jax.lax.all_gather, axis_name="dp", axis=spread_axis(dims), tiled=True
    )
    return over_mp(gather, (dims,), dims)(part)


def sum_into_shards(x: jax.Array, dims: str) -> jax.Array:
    """Sum over `dp`, each device keeping its part of the `STORAGE` layout: one reduce-scatter."""
    scatter = functools.partial(
        jax.lax.psum_scatter, axis_name="dp", scatter_dimension=spread_axis(dims), tiled=True
    )
    return over_mp(scatter, (dims,), dims)(x)
