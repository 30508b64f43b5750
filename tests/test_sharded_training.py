"""Every mesh, every ZeRO stage and every way to cut a batch trains the same model."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from mesh_transformer.model.decoder import make_model
from mesh_transformer.model.loss import z_loss
from mesh_transformer.training.gradients import score
from mesh_transformer.training.steps import TrainState

N_STEPS, A, B, T = 5, 2, 8, small.KEYS["seq"]
BATCHES = small.tokens(N_STEPS, A, B, T + 1)
TOLERANCE = 1e-5
"""On losses of 4 to 5 nats, which float32 holds to 5e-7. Sums in other orders differ by that much
(measured: 5e-7), and each step of Adam carries the difference on."""

ALL = [(dp, mp, stage) for dp, mp in ((8, 1), (2, 4), (4, 2), (1, 8)) for stage in range(4)]
MASKED = (2, 4, 3)
FAST = [(1, 8, 0), (8, 1, 2), (4, 2, 1), MASKED]
"""Every mesh and every stage, but not each with each. One is always given a mask."""

FULL_MASK = np.ones((A, B, T), np.float32)


class Run(NamedTuple):
    """What some steps showed: metrics by name, one value per step; and the state after them."""

    metrics: dict[str, np.ndarray]
    state: TrainState


@functools.cache
def run(dp: int, mp: int, zero_stage: int, n_steps: int = N_STEPS, **keys: Any) -> Run:
    """Train on `BATCHES` from the same start."""
    state = small.start(dp, mp, zero_stage=zero_stage, **keys)
    train, rows = small.steps(dp, mp, zero_stage=zero_stage, **keys).train, []
    mask = FULL_MASK if (dp, mp, zero_stage) == MASKED else None
    for batch in BATCHES[:n_steps]:
        state, metrics = train(state, batch, mask)
        rows.append(jax.device_get(metrics))
    return Run({key: np.array([row[key] for row in rows]) for key in rows[0]}, state)


class Step(NamedTuple):
    """One step: the mean gradient as Adam's first moment holds it (clipped, a tenth); metrics."""

    gradient: Any
    metrics: dict[str, np.ndarray]


def step(mesh: tuple[int, int, int], tokens: Any, mask: Any = None) -> Step:
    """Take the first step on a mesh, given with its ZeRO stage."""
    dp, mp, zero_stage = mesh
    state = small.start(dp, mp, zero_stage=zero_stage)
    state, metrics = small.steps(dp, mp, zero_stage=zero_stage).train(state, tokens, mask)
    return jax.device_get(Step(optax.tree.get(state.opt_state, "mu"), metrics))


def assert_same_gradient(one: Step, other: Step) -> None:
    """Compare the norms before clipping, and what is left after it."""
    np.testing.assert_allclose(one.metrics["grad_norm"], other.metrics["grad_norm"], rtol=1e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-7)
    jax.tree.map(close, one.gradient, other.gradient)


@pytest.mark.parametrize(
    ("dp", "mp", "zero_stage"),
    [pytest.param(*mesh, marks=[] if mesh in FAST else pytest.mark.slow) for mesh in ALL],
)
def test_every_mesh_and_zero_stage_trains_as_one_device(dp: int, mp: int, zero_stage: int) -> None:
    alone, here = run(1, 1, 0).metrics, run(dp, mp, zero_stage).metrics
    for name in ("loss", "last_loss", "lr"):
        np.testing.assert_allclose(here[name], alone[name], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(here["grad_norm"], alone["grad_norm"], rtol=TOLERANCE)
    assert alone["loss"][-1] < alone["loss"][0], "nothing was learned, so nothing was compared"


@pytest.mark.parametrize(
    ("pe", "norm"),
    [*small.KINDS[:4], *(pytest.param(*kind, marks=pytest.mark.slow) for kind in small.KINDS[4:])],
)
def test_every_norm_and_position_encoding_trains_on_a_mesh_as_on_one_device(
    pe: str, norm: str
) -> None:
    """Two steps with everything spread: the second sees what the first made of the weights."""
    alone, here = (run(*mesh, n_steps=2, pe=pe, norm=norm) for mesh in ((1, 1, 0), MASKED))
    for name in ("loss", "last_loss", "grad_norm"):
        np.testing.assert_allclose(here.metrics[name], alone.metrics[name], rtol=TOLERANCE)
    ours, theirs = (jax.device_get(optax.tree.get(r.state.opt_state, "mu")) for r in (here, alone))
    small.assert_close(ours, theirs, TOLERANCE)


def test_every_mesh_scores_tokens_as_one_device() -> None:
    alone, here = (
        jax.device_get(
            small.steps(dp, mp, zero_stage=zero_stage).evaluate(
                small.start(dp, mp, zero_stage=zero_stage).params, BATCHES[0, 0]
            )
        )
        for dp, mp, zero_stage in ((1, 1, 0), (2, 4, 3))
    )
    assert here[0].shape == here[1].shape == (B, T)
    np.testing.assert_allclose(here[0], alone[0], rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(here[1], alone[1])


def test_every_mesh_starts_from_the_same_weights() -> None:
    alone = small.start().params
    here = small.steps(2, 4, zero_stage=3).init(jax.random.key(0)).params
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(alone), jax.device_get(here))


def test_steps_report_five_float32_scalars() -> None:
    metrics = step((1, 1, 0), BATCHES[0]).metrics
    assert set(metrics) == {"loss", "last_loss", "grad_norm", "micro_grad_norm", "lr"}
    assert all(value.shape == () and value.dtype == np.float32 for value in metrics.values())


def test_a_step_takes_over_the_memory_of_the_state_before_it() -> None:
    before = small.start(2, 4, zero_stage=3)
    small.steps(2, 4, zero_stage=3).train(before, BATCHES[0], FULL_MASK)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))


def test_the_same_steps_give_the_same_bits() -> None:
    first, again = (run.__wrapped__(*MASKED, n_steps=2) for _ in range(2))
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(first.state), jax.device_get(again.state)
    )
    for name, values in first.metrics.items():
        np.testing.assert_array_equal(values, again.metrics[name])


@functools.cache
def gradients_by_sequence() -> np.ndarray:
    """Compute the gradient of each sequence's mean loss at the start: `[A, B, parameter]`."""
    model, weight = make_model(small.parsed().model), small.parsed().model.z_loss

    def objective(params: Any, tokens_T1: jax.Array) -> jax.Array:
        seen = score(model, params, tokens_T1[None])
        return (seen.loss_BT + weight * z_loss(seen.log_z_BT)).mean()

    of_each = jax.jit(
        jax.vmap(jax.grad(objective), (None, 0)), compiler_options=small.COMPILED_FAST
    )
    tree = of_each(small.start().params, jnp.asarray(BATCHES[0].reshape(A * B, T + 1)))
    flat = [np.asarray(leaf, np.float64).reshape(A, B, -1) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(flat, axis=-1)


@pytest.mark.parametrize("mesh", [(1, 1, 0), *FAST])
def test_a_step_accumulates_the_mean_of_gradients_computed_one_by_one(mesh: Any) -> None:
    gradient, metrics = step(mesh, BATCHES[0], FULL_MASK if mesh == MASKED else None)
    expected = gradients_by_sequence().mean((0, 1))
    norm = np.linalg.norm(expected)
    assert norm > 1, "nothing is clipped"
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    flat = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])
    np.testing.assert_allclose(flat, 0.1 * expected / norm, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("mesh", "n_units"),
    [((1, 1, 0), A), ((8, 1, 2), A * 8), ((4, 2, 1), A * 4), ((1, 8, 0), A), (MASKED, A)],
)
def test_micro_grad_norm_is_the_root_mean_square_over_microbatches(mesh: Any, n_units: int) -> None:
    of_units = gradients_by_sequence().reshape(n_units, A * B // n_units, -1).mean(1)
    expected = np.sqrt(np.square(np.linalg.norm(of_units, axis=-1)).mean())
    np.testing.assert_allclose(run(*mesh).metrics["micro_grad_norm"][0], expected, rtol=1e-6)


@pytest.mark.parametrize("mesh", [(1, 1, 0), pytest.param((4, 2, 3), marks=pytest.mark.slow)])
def test_accumulating_microbatches_equals_one_batch(mesh: Any) -> None:
    in_two, at_once = step(mesh, BATCHES[0]), step(mesh, BATCHES[0].reshape(1, A * B, T + 1))
    for name in ("loss", "last_loss"):
        np.testing.assert_allclose(in_two.metrics[name], at_once.metrics[name], rtol=1e-6)
    assert_same_gradient(in_two, at_once)
    assert at_once.metrics["micro_grad_norm"] == at_once.metrics["grad_norm"]


def masked(tokens: Any, mask: Any) -> Step:
    """Take a masked step on two replicas of four devices each, everything spread."""
    return step(MASKED, tokens, np.float32(mask))


@functools.cache
def some_mask() -> np.ndarray:
    """A third of all targets, unevenly over sequences, microbatches and replicas."""
    share_AB1 = np.random.default_rng(1).uniform(0, 0.7, (A, B, 1))
    return np.random.default_rng(2).uniform(size=(A, B, T)) < share_AB1


def test_losses_are_means_over_valid_tokens() -> None:
    loss_ABT = np.stack(
        [small.steps().evaluate(small.start().params, batch)[0] for batch in BATCHES[0]]
    )
    metrics = masked(BATCHES[0], some_mask()).metrics
    np.testing.assert_allclose(metrics["loss"], loss_ABT[some_mask()].mean(), rtol=1e-6)
    last = loss_ABT[..., -1][some_mask()[..., -1]]
    assert len(last), "no sequence's last target is valid"
    np.testing.assert_allclose(metrics["last_loss"], last.mean(), rtol=1e-6)


def test_where_valid_tokens_fall_changes_nothing() -> None:
    order = np.random.default_rng(3).permutation(A * B)
    tokens, mask = (x.reshape(A * B, -1)[order].reshape(x.shape) for x in (BATCHES[0], some_mask()))
    as_given, moved = masked(BATCHES[0], some_mask()), masked(tokens, mask)
    for name in ("loss", "last_loss"):
        np.testing.assert_allclose(as_given.metrics[name], moved.metrics[name], rtol=1e-6)
    assert_same_gradient(as_given, moved)


def test_a_masked_microbatch_counts_for_nothing() -> None:
    mask, other = some_mask().copy(), BATCHES[0].copy()
    mask[1] = False
    other[1] = small.tokens(B, T + 1, seed=7)
    one, another = masked(BATCHES[0], mask), masked(other, mask)
    jax.tree.map(np.testing.assert_array_equal, one, another)
    assert 0 < one.metrics["loss"] < 10, "a mean over no token"


def test_a_batch_without_a_valid_token_has_no_gradient() -> None:
    gradient, metrics = masked(BATCHES[0], np.zeros((A, B, T)))
    assert metrics["loss"] == metrics["last_loss"] == metrics["grad_norm"] == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_bfloat16_layers_train_nearly_as_float32_ones_from_float32_masters() -> None:
    exact, rounded = run(2, 4, 3), run(2, 4, 3, compute_dtype="bfloat16")
    np.testing.assert_allclose(rounded.metrics["loss"], exact.metrics["loss"], rtol=5e-3)
    assert (rounded.metrics["loss"] != exact.metrics["loss"]).any(), "nothing was rounded"
    masters = (rounded.state.params, optax.tree.get(rounded.state.opt_state, "mu"))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(masters))
