"""Dropout: what is dropped, that masks differ wherever they may, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from jax.sharding import PartitionSpec

from mesh_transformer.model.attention import plain
from mesh_transformer.model.decoder import make_model
from mesh_transformer.model.dropout import dropout, embedding_key, layer_keys
from mesh_transformer.model.positions import Positions
from mesh_transformer.sharding import make_mesh
from mesh_transformer.training.gradients import dropout_keys, over_dp
from mesh_transformer.training.steps import TrainState

RATES = {"dropout_embedding": 0.1, "dropout_attention": 0.2, "dropout_residual": 0.3}
KEYS: dict[str, Any] = {"seq": 8, "layers": 1, "remat": "full", **RATES}
KEY = jax.random.key(1)


def test_numbers_are_dropped_at_the_rate_and_the_others_grow_so_that_the_mean_stays() -> None:
    x = np.random.default_rng(0).normal(size=(4, 50, 500)).astype(np.float32)
    y = np.asarray(dropout(jnp.asarray(x), "BTD", 0.3, KEY))
    kept = y != 0
    np.testing.assert_allclose(y[kept], x[kept] / 0.7, rtol=1e-6)
    # A share of 100,000 draws has a standard deviation of 0.0015.
    assert abs(kept.mean() - 0.7) < 0.01
    np.testing.assert_array_equal(dropout(jnp.asarray(x), "BTD", 0.0, KEY), x)
    np.testing.assert_array_equal(dropout(jnp.asarray(x), "BTD", 0.3, None), x)


def test_every_place_of_every_layer_has_a_key_of_its_own() -> None:
    keys: Any = [embedding_key(KEY), *(it for n in range(3) for it in layer_keys(KEY, n))]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 1 + 3 * 3
    assert set(layer_keys(None, 0)) == {embedding_key(None)} == {None}


def test_attention_drops_weights_after_their_softmax() -> None:
    normal = np.random.default_rng(0).normal
    q_BTHK, k_BSHK, v_BSHK = (jnp.asarray(normal(size=(2, 6, 4, 8)), jnp.float32) for _ in range(3))
    mask_BHTS = normal(size=(2, 4, 6, 6)) > -0.5
    drop = lambda weights_BHTS: jnp.where(mask_BHTS, weights_BHTS / 0.8, 0)  # noqa: E731
    y_BTHK = plain(q_BTHK, k_BSHK, v_BSHK, Positions(jnp.arange(6)[None]), 0.5, drop=drop)
    logits_BHTS = np.where(
        np.tri(6, dtype=bool), np.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) / 2, -np.inf
    )
    share_BHTS = np.exp(logits_BHTS) / np.exp(logits_BHTS).sum(-1, keepdims=True)
    dropped_BHTS = np.where(mask_BHTS, share_BHTS / 0.8, 0)
    expected_BTHK = np.einsum("bhts,bshk->bthk", dropped_BHTS, v_BSHK)
    np.testing.assert_allclose(y_BTHK, expected_BTHK, rtol=0, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("key", "residual"),
    [*((key, "parallel") for key in RATES), ("dropout_residual", "sequential")],
)
def test_each_rate_drops_something_by_the_key_alone(key: str, residual: str) -> None:
    model = make_model(small.parsed(residual=residual, seq=8, layers=1, **{key: 0.5}).model)
    options = small.COMPILED_FAST
    weights = jax.jit(model.init, compiler_options=options)(KEY)
    tokens_BT, positions_BT = small.tokens(2, 8), jnp.arange(8)[None]

    def apply(dropout_key: jax.Array) -> jax.Array:
        return model.apply(weights, tokens_BT, positions_BT, dropout_key=dropout_key)[0]

    apply = jax.jit(apply, compiler_options=options)
    one_BTV, again_BTV, other_BTV = (apply(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one_BTV, again_BTV)
    assert np.abs(one_BTV - other_BTV).max() > 1e-3


def train(mesh: tuple[int, int, int], state: TrainState, batch: Any) -> tuple[TrainState, Any]:
    dp, mp, zero_stage = mesh
    return small.steps(dp, mp, zero_stage=zero_stage, **KEYS).train(state, batch, None)


def start(mesh: tuple[int, int, int]) -> TrainState:
    dp, mp, zero_stage = mesh
    return small.start(dp, mp, zero_stage=zero_stage, **KEYS)


SAME = np.tile(small.tokens(1, 1, 9), (2, 2, 1))
"""One sequence as two microbatches of two."""

METRICS = ("loss", "grad_norm")


def test_every_microbatch_of_every_replica_and_step_has_a_key_of_its_own() -> None:
    config = small.parsed(**KEYS)

    def keys(step: Any) -> Any:
        return jax.random.key_data(dropout_keys(config, step, 3))[None]  # type: ignore

    with jax.set_mesh(make_mesh(2, 1, jax.devices()[:2])):
        draw = jax.jit(over_dp(keys, PartitionSpec(), PartitionSpec("dp")))
        seen = np.concatenate([draw(jnp.int32(step)).reshape(-1, 2) for step in (0, 1)])
        again = np.concatenate([draw(jnp.int32(step)).reshape(-1, 2) for step in (0, 1)])
    assert len(np.unique(seen, axis=0)) == 2 * 2 * 3
    np.testing.assert_array_equal(seen, again)
    # Initial weights are drawn from other keys.
    first = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(config.run.seed), 99)))
    assert len(np.unique(np.concatenate([seen, first]), axis=0)) == len(seen) + len(first)
    assert dropout_keys(small.parsed(), jnp.int32(0), 3) is None


@pytest.mark.thorough
def test_masks_are_the_same_however_the_model_is_spread_and_differ_by_step() -> None:
    """Two replicas, each whole or over two devices, with nothing or everything spread over them."""
    seen = []
    for mesh in ((2, 1, 0), (2, 2, 3)):
        state, first = train(mesh, start(mesh), SAME)
        gradient = jax.device_get(optax.tree.get(state.opt_state, "mu"))
        _, second = train(mesh, state, SAME)
        seen.append((gradient, [float(it[key]) for it in (first, second) for key in METRICS]))
        # Were the gradients of equal sequences equal, they would be as long as their mean.
        assert float(first["micro_grad_norm"]) > 1.02 * float(first["grad_norm"])
    (theirs, expected), (ours, found) = seen
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    small.assert_close(ours, theirs, 1e-5)
    later = start((2, 1, 0))
    later = later._replace(step=later.step + 1)
    _, metrics = train((2, 1, 0), later, SAME)
    assert float(metrics["grad_norm"]) != pytest.approx(expected[1], rel=1e-3)


def test_a_run_that_goes_on_from_a_saved_state_draws_what_it_would_have_drawn() -> None:
    mesh = (2, 1, 0)
    state, _ = train(mesh, start(mesh), SAME)
    saved = jax.device_get(state)
    whole, _ = train(mesh, state, SAME)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, small.steps(*mesh[:2], **KEYS).state)
    resumed, _ = train(mesh, jax.device_put(saved, shardings, may_alias=False), SAME)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(resumed))


def test_scoring_drops_nothing() -> None:
    params, plain = start((2, 1, 0)).params, {key: KEYS[key] for key in KEYS.keys() - RATES.keys()}
    ours, theirs = (small.steps(2, **keys).evaluate(params, SAME[0]) for keys in (KEYS, plain))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours), jax.device_get(theirs))
