"""The loss of the next token is finite, right, and its z-loss is on the true partition function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mesh_transformer.model.layers import PADDING_BIAS
from mesh_transformer.model.loss import TokenLoss, next_token_loss, z_loss
from mesh_transformer.sharding import make_mesh

B, T, V = 2, 5, 16
TARGETS_BT = np.random.default_rng(0).integers(0, V, (B, T))


def logits(scale: float, shift: float = 0.0) -> np.ndarray:
    """Return random float32 logits."""
    normal = np.random.default_rng(1).normal(size=(B, T, V))
    return (normal * scale + shift).astype(np.float32)


def by_numpy(logits_BTV: np.ndarray, targets_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss and log Z in float64."""
    logits_BTV = logits_BTV.astype(np.float64)
    max_BT1 = logits_BTV.max(-1, keepdims=True)
    log_z_BT = np.log(np.exp(logits_BTV - max_BT1).sum(-1)) + max_BT1[..., 0]
    target_BT = np.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]
    return log_z_BT - target_BT, log_z_BT


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (10, 0), (1, 100), (1, -100), (1e4, 0)])
def test_loss_and_log_z_are_numpy_s(scale: float, shift: float) -> None:
    logits_BTV = logits(scale, shift)
    seen = next_token_loss(jnp.asarray(logits_BTV), jnp.asarray(TARGETS_BT))
    loss_BT, log_z_BT = by_numpy(logits_BTV, TARGETS_BT)
    rounding = 1e-6 * max(1.0, float(np.abs(logits_BTV).max()))
    np.testing.assert_allclose(seen.loss_BT, loss_BT, rtol=0, atol=rounding)
    np.testing.assert_allclose(seen.log_z_BT, log_z_BT, rtol=0, atol=rounding)
    np.testing.assert_allclose(z_loss(seen.log_z_BT), log_z_BT**2, rtol=1e-5)


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_logits_give_finite_losses_and_gradients(extreme: float) -> None:
    logits_BTV = logits(1).copy()
    logits_BTV[0, :, 3] = extreme

    def objective(logits_BTV: jax.Array) -> jax.Array:
        seen = next_token_loss(logits_BTV, jnp.asarray(TARGETS_BT))
        return (seen.loss_BT + 1e-4 * z_loss(seen.log_z_BT)).sum()

    value, gradient = jax.value_and_grad(objective)(jnp.asarray(logits_BTV))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_the_gradient_is_the_distribution_less_the_target() -> None:
    logits_BTV = logits(3)
    gradient = jax.grad(lambda x: next_token_loss(x, jnp.asarray(TARGETS_BT)).loss_BT.sum())(
        jnp.asarray(logits_BTV)
    )
    shares = np.exp(logits_BTV - logits_BTV.max(-1, keepdims=True))
    expected = shares / shares.sum(-1, keepdims=True) - np.eye(V)[TARGETS_BT]
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6)


def test_z_loss_feels_what_the_cross_entropy_cannot() -> None:
    here, moved = (
        next_token_loss(jnp.asarray(logits(1, shift)), jnp.asarray(TARGETS_BT))
        for shift in (0.0, 50.0)
    )
    np.testing.assert_allclose(here.loss_BT, moved.loss_BT, rtol=0, atol=1e-4)
    np.testing.assert_allclose(moved.log_z_BT - here.log_z_BT, 50, rtol=1e-6)
    assert (z_loss(moved.log_z_BT) > 2000).all()
    pull = jax.grad(lambda x: z_loss(next_token_loss(x, jnp.asarray(TARGETS_BT)).log_z_BT).sum())
    np.testing.assert_allclose(
        pull(jnp.asarray(logits(1, 50.0))).sum(-1), 2 * moved.log_z_BT, rtol=1e-5
    )


def test_a_target_that_ties_with_the_best_counts_as_correct() -> None:
    logits_BTV = np.zeros((1, 3, V), np.float32)
    logits_BTV[0, :, [2, 9]] = 1.0
    seen = next_token_loss(jnp.asarray(logits_BTV), jnp.asarray([[2, 9, 0]]))
    np.testing.assert_array_equal(seen.correct_BT, [[True, True, False]])


def test_logits_below_float32_are_widened_first() -> None:
    rounded_BTV = jnp.asarray(logits(5), jnp.bfloat16)
    seen = next_token_loss(rounded_BTV, jnp.asarray(TARGETS_BT))
    expected_BT, _ = by_numpy(np.asarray(rounded_BTV, np.float32), TARGETS_BT)
    assert seen.loss_BT.dtype == np.float32
    np.testing.assert_allclose(seen.loss_BT, expected_BT, rtol=0, atol=1e-5)


def test_a_split_vocabulary_exchanges_numbers_per_token_only() -> None:
    mesh = make_mesh(1, 8)
    split = NamedSharding(mesh, PartitionSpec(None, None, "mp"))
    whole = NamedSharding(mesh, PartitionSpec())
    split_BTV = jax.device_put(logits(1), split)
    targets_BT = jax.device_put(TARGETS_BT, whole)
    with jax.set_mesh(mesh):
        lowered = jax.jit(next_token_loss, out_shardings=whole).lower(split_BTV, targets_BT)
        compiled = lowered.compile()
    program = str(compiled.as_text())
    assert "all-gather" in program
    assert f"{B},{T},{V}]" not in program, "a device holds all logits"
    seen = compiled(split_BTV, targets_BT)
    np.testing.assert_allclose(seen.loss_BT, by_numpy(logits(1), TARGETS_BT)[0], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_split_vocabulary_has_the_loss_and_gradient_of_a_whole_one(dtype: str) -> None:
    logits_BTV = np.array(jnp.asarray(logits(3), dtype), np.float32)
    logits_BTV[0, 0, [2, 9]] = 20.0  # a tie of two devices
    logits_BTV[..., V - V // 8 :] = PADDING_BIAS  # all that the last device holds
    targets_BT = np.where(TARGETS_BT < V - V // 8, TARGETS_BT, 0)
    targets_BT[0, 0] = 9

    def scored(logits_BTV: jax.Array) -> tuple[jax.Array, TokenLoss]:
        seen = next_token_loss(logits_BTV, jnp.asarray(targets_BT))
        return (seen.loss_BT + 0.1 * z_loss(seen.log_z_BT)).sum(), seen

    whole_BTV = jnp.asarray(logits_BTV, dtype)
    mesh = make_mesh(1, 8)
    with jax.set_mesh(mesh):
        split_BTV = jax.device_put(whole_BTV, NamedSharding(mesh, PartitionSpec(None, None, "mp")))
        (_, seen), gradient_BTV = jax.jit(jax.value_and_grad(scored, has_aux=True))(split_BTV)
    expected, expected_BTV = jax.grad(scored, has_aux=True)(whole_BTV)[::-1]
    assert seen.correct_BT[0, 0]
    np.testing.assert_array_equal(seen.correct_BT, expected.correct_BT)
    np.testing.assert_array_equal(seen.max_BT, expected.max_BT)
    np.testing.assert_allclose(seen.loss_BT, expected.loss_BT, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(seen.log_z_BT, expected.log_z_BT, rtol=1e-6)
    # Rounded to the logits' type, where float32 sums of another order may round apart.
    rounding = float(jnp.finfo(dtype).eps)
    assert gradient_BTV.dtype == dtype
    np.testing.assert_allclose(
        np.float32(gradient_BTV), np.float32(expected_BTV), rtol=rounding * 8, atol=1e-6
    )
    # By its formula: each probability pulls, the target pushes.
    loss_BT, log_z_BT = by_numpy(logits_BTV, targets_BT)
    probability_BTV = np.exp(logits_BTV.astype(np.float64) - log_z_BT[..., None])
    formula_BTV = (1 + 0.2 * log_z_BT)[..., None] * probability_BTV - np.eye(V)[targets_BT]
    np.testing.assert_allclose(np.float32(gradient_BTV), formula_BTV, rtol=rounding * 8, atol=1e-5)
    np.testing.assert_allclose(seen.loss_BT, loss_BT, rtol=1e-6, atol=1e-5)
