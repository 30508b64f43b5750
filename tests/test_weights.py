"""A stored weight becomes the one that is multiplied by, and its gradient comes back as asked."""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding, PartitionSpec

from mesh_transformer.model.weights import Weight, cast_at_use, gather_over_dp, sum_into_shards
from mesh_transformer.sharding import STORAGE, make_mesh, spec
from mesh_transformer.training.gradients import over_dp

W = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
B = np.random.default_rng(1).normal(size=3).astype(np.float32)


def layer(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return a matrix and a vector as a layer gets them, the matrix times `x`."""
    with cast_at_use(jnp.dtype("bfloat16")):
        w = hk.get_parameter("w", [4, 3], init=jnp.zeros)
        b = hk.get_parameter("b", [3], init=jnp.zeros)
    return x.astype(w.dtype) @ w, b


apply = hk.without_apply_rng(hk.transform(layer)).apply


def weight(value: Any, dims: str, dtype: Any) -> Weight:
    """Return a weight whose gradient is received in `dtype`."""
    return Weight(jnp.asarray(value), jnp.zeros(value.shape, dtype), dims, False)


def test_matrices_are_cast_where_used_and_vectors_are_not() -> None:
    for params in (
        {"~": {"w": jnp.asarray(W), "b": jnp.asarray(B)}},
        {"~": {"w": weight(W, "DH", jnp.float32), "b": weight(B, "D", jnp.float32)}},
    ):
        w, b = apply(params, jnp.eye(4))
        assert (w.dtype, b.dtype) == (jnp.bfloat16, jnp.float32)
        np.testing.assert_array_equal(w, jnp.asarray(W).astype(jnp.bfloat16))
        np.testing.assert_array_equal(b, B)


def test_a_cast_weight_is_rounded_once() -> None:
    bits = np.random.default_rng(2).integers(0, 2**31, (4, 3), dtype=np.uint32)
    halfway = (bits & 0x7F7F0000 | 0x8000).view(np.float32)  # between two bfloat16 numbers
    with np.errstate(over="ignore"):
        w, _ = apply(
            {"~": {"w": weight(halfway, "DH", jnp.float32), "b": jnp.asarray(B)}}, jnp.eye(4)
        )
    np.testing.assert_array_equal(w, jnp.asarray(halfway).astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_come_in_the_dtype_of_their_receiver(dtype: Any) -> None:
    x = jnp.arange(8.0).reshape(2, 4)

    def objective(params: Any) -> jax.Array:
        y, b = apply(params, x)
        return (y.astype(jnp.float32) + b).sum()

    params = {"~": {"w": weight(W, "DH", dtype), "b": weight(B, "D", jnp.float32)}}
    gradient = jax.grad(objective)(params)["~"]
    assert gradient["w"].gradient.dtype == dtype
    np.testing.assert_array_equal(gradient["w"].gradient, np.tile(x.sum(0)[:, None], 3))
    np.testing.assert_array_equal(gradient["b"].gradient, np.full(3, 2.0))
    assert not gradient["w"].value.any(), "the master itself is not differentiated by"


def test_a_spread_weight_is_gathered_and_its_gradient_summed_into_the_same_parts() -> None:
    mesh = make_mesh(2, 4)
    dims, shape = "LDF", (2, 8, 12)
    whole = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    parts = jax.device_put(whole, NamedSharding(mesh, spec(dims, STORAGE)))
    assert parts.addressable_shards[0].data.shape == (2, 4, 3)
    dp = PartitionSpec(None, "dp")

    def there_and_back(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        used = gather_over_dp(part, dims)
        factor = 1.0 + jax.lax.axis_index("dp")
        return used, sum_into_shards(used * factor, dims)

    with jax.set_mesh(mesh):
        everywhere, summed = jax.jit(over_dp(there_and_back, (dp,), (PartitionSpec(), dp)))(parts)
    np.testing.assert_array_equal(everywhere, whole)
    np.testing.assert_allclose(summed, 3 * whole, rtol=1e-6)
    assert summed.sharding.shard_shape(shape) == (2, 4, 3)


def test_copies_hold_matrices_in_the_compute_dtype_and_vectors_in_float32() -> None:
    steps = small.steps(compute_dtype="bfloat16")
    copies: Any = steps.copies.lower(steps.state.params).out_info
    for module, values in copies.items():
        for name, value in values.items():
            expected = jnp.bfloat16 if name in ("w", "embeddings") else jnp.float32
            assert value.dtype == expected, f"{module}/{name}"
