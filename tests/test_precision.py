"""What a model that computes in bfloat16 still adds and scales in float32."""

from __future__ import annotations

import re
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from mesh_transformer.model.attention import plain
from mesh_transformer.model.block import FeedForward, Heads
from mesh_transformer.model.decoder import make_model
from mesh_transformer.model.positions import Positions
from mesh_transformer.sharding import lookup, make_mesh

MANY = 4096
SUM = 0.01 * MANY


def model_config(**keys: Any) -> Any:
    return small.parsed(**{"compute_dtype": "bfloat16"} | keys).model


@pytest.mark.parametrize("mp", [1, 4])
def test_the_gradient_of_an_embedding_is_summed_in_float32(mp: int) -> None:
    """In bfloat16 a sum of hundredths stands still at 4, where one more no longer counts."""
    table_VD, ids_BT = jnp.zeros((8, 4), jnp.bfloat16), jnp.full((1, MANY), 5)
    g_BTD = jnp.full((1, MANY, 4), 0.01, jnp.bfloat16)
    with jax.set_mesh(make_mesh(1, mp, jax.devices()[:mp])):
        gradient = jax.jit(jax.grad(lambda t: (lookup(t, ids_BT) * g_BTD).sum()))(table_VD)
    assert gradient.dtype == jnp.bfloat16
    # Rounded to bfloat16 once, as hundredths are too: each by less than one part in 256.
    np.testing.assert_allclose(gradient[5].astype(np.float32), SUM, rtol=2**-7)
    assert not np.asarray(gradient[np.arange(8) != 5]).any()


def heads(x_BTD: jax.Array, config: Any) -> Any:
    made = Heads.of(config)
    n_heads, width = config.n_heads, config.n_heads * config.d_head
    q_BTHK, k_BTGK, v_BTGK = made.split((x_BTD[..., :width],) * 3)
    y_BTD = made.add_bias(x_BTD)
    return [x.reshape(*x_BTD.shape[:2], n_heads, -1) for x in (q_BTHK, k_BTGK, v_BTGK, y_BTD)]


def feed_forward(x_BTD: jax.Array, config: Any) -> Any:
    made = FeedForward.of(config)
    x_BTF = jnp.tile(x_BTD, (1, 1, config.d_ff // config.d_model))
    return [made.hidden((x_BTF,)), made.add_bias(x_BTD)]


@pytest.mark.parametrize("part", [heads, feed_forward])
def test_the_gradient_of_a_bias_is_summed_in_float32(part: Any) -> None:
    config = model_config(qkv_bias=True, o_bias=True, activation="relu")
    x_BTD = jnp.ones((1, MANY, config.d_model), jnp.bfloat16)
    run = hk.without_apply_rng(hk.transform(lambda x: part(x, config)))
    params = run.init(jax.random.key(0), x_BTD)

    def objective(params: Any) -> jax.Array:
        hundredth = jnp.asarray(0.01, jnp.bfloat16)
        sums = [(y * hundredth).astype(jnp.float32).sum() for y in run.apply(params, x_BTD)]
        return jnp.stack(sums).sum()

    gradients = jax.tree.leaves(jax.jit(jax.grad(objective))(params))
    assert gradients
    for gradient in gradients:
        assert gradient.dtype == jnp.float32
        np.testing.assert_allclose(gradient, SUM, rtol=2**-7)


def test_the_gradient_of_a_learned_position_is_summed_in_float32() -> None:
    """Over sequences: so many alike give as many times the gradient of one."""
    model = make_model(model_config(pe="fixed", seq=2, layers=1))
    params = model.init(jax.random.key(0))

    def gradient(n_sequences: int) -> np.ndarray:
        def objective(params: Any) -> jax.Array:
            tokens_BT = jnp.broadcast_to(jnp.array([3, 4]), (n_sequences, 2))
            seen, _ = model.apply(params, tokens_BT, jnp.arange(2)[None], targets_BT=tokens_BT)
            return seen.loss_BT.sum()

        found = jax.jit(jax.grad(objective))(params)["decoder/positions"]["embeddings"]
        return np.asarray(found, np.float32)

    alone, many = gradient(1), gradient(MANY)
    np.testing.assert_allclose(many, MANY * alone, rtol=0, atol=2**-7 * np.abs(MANY * alone).max())


def test_attention_is_scaled_in_float32() -> None:
    """For heads of 80 features, say, the scale is no number that bfloat16 holds."""
    normal = np.random.default_rng(0).normal
    q, k, v = (jnp.asarray(normal(size=(1, 8, 2, 80)) * 3, jnp.bfloat16) for _ in range(3))
    y_BTHK = plain(q, k, v.astype(jnp.float32), Positions(jnp.arange(8)[None]), 80**-0.5)
    q_BTHK, k_BSHK, v_BSHK = (np.asarray(x, np.float64) for x in (q, k, v))
    logits_BHTS = np.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) * 80**-0.5
    logits_BHTS = np.where(np.tri(8, dtype=bool), logits_BHTS, -np.inf)
    weights_BHTS = np.exp(logits_BHTS - logits_BHTS.max(-1, keepdims=True))
    weights_BHTS /= weights_BHTS.sum(-1, keepdims=True)
    expected_BTHK = np.einsum("bhts,bshk->bthk", weights_BHTS, v_BSHK)
    np.testing.assert_allclose(y_BTHK, expected_BTHK, rtol=0, atol=1e-5)


def test_attention_in_bfloat16_multiplies_factors_of_bfloat16_alone() -> None:
    """Neither forward nor backward: float32 products take many times as long where it matters."""
    normal = np.random.default_rng(0).normal
    q, k, v, g = (jnp.asarray(normal(size=(1, 8, h, 16)), jnp.bfloat16) for h in (4, 2, 2, 4))

    def gradients(*factors: jax.Array) -> Any:
        y_BTHK, back = jax.vjp(
            lambda q, k, v: plain(q, k, v, Positions(jnp.arange(8)[None]), 0.25), *factors[:3]
        )
        return back(factors[3].astype(y_BTHK.dtype))

    program = jax.jit(gradients).lower(q, k, v, g).as_text()
    products = re.findall(r"dot_general.*: \(tensor<(.*)>, tensor<(.*)>\) -> tensor<(.*)>", program)
    assert len(products) == 6
    for shapes in products:
        assert [shape.rpartition("x")[2] for shape in shapes] == ["bf16", "bf16", "f32"]
    for low, high in zip(
        gradients(q, k, v, g),
        gradients(*(x.astype(jnp.float32) for x in (q, k, v, g))),
        strict=True,
    ):
        assert low.dtype == jnp.bfloat16
        # Each factor is rounded by up to 2^-9 of itself, and sums are smaller than their terms.
        np.testing.assert_allclose(low, high, rtol=0, atol=2**-6 * np.abs(high).max())
