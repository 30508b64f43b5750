"""Our decoder computes and trains on as mesh-transformer-jax's second model did."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fused_run import CORES, RUN, STEP, later_losses, record, run_config

from mesh_transformer.checkpoints import opening
from mesh_transformer.checkpoints.fitting import fitted
from mesh_transformer.checkpoints.placing import place_opt_state, place_params
from mesh_transformer.config import Config
from mesh_transformer.model.decoder import make_model
from mesh_transformer.pod.worker import Worker
from mesh_transformer.sharding import make_mesh
from mesh_transformer.training.optimizer import (
    is_decayed,
    learning_rate,
    make_optimizer,
    schedule_count,
)
from mesh_transformer.training.steps import Steps, TrainState, make_steps


def losses(compute_dtype: str, mp: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Evaluate the record's tokens: loss and correctness of each."""
    run = run_config(compute_dtype=compute_dtype, cores_per_replica=mp)
    worker = Worker(run, jax.devices()[:mp])
    worker.load_weights(str(RUN))
    seen = worker.evaluate(record()["eval_tokens"])
    return np.asarray(seen.loss_BT, np.float64), np.asarray(seen.correct_BT)


@pytest.mark.thorough
@pytest.mark.parametrize("mp", [1, 2])
def test_every_token_has_the_loss_that_the_original_gave_it(mp: int) -> None:
    """But for one number: it added its z-loss, a mean over all tokens, in evaluation too."""
    theirs = record()
    loss_BT, correct_BT = losses("float32", mp)
    added_BT = theirs["eval_f32_all_loss"] - loss_BT
    # 1e-4 of log(Z)^2 less the largest logit, in these 128 tokens' mean: log(Z) is about 2 here.
    assert 1e-4 < added_BT.mean() < 1e-3
    np.testing.assert_allclose(added_BT, added_BT.mean(), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(correct_BT, theirs["eval_f32_correct"])


@pytest.mark.thorough
def test_in_bfloat16_losses_are_as_near_as_its_rounding_leaves_them() -> None:
    """Both round activations, at other places: each is away from float32 by its own rounding."""
    theirs = record()
    loss_BT, correct_BT = losses("bfloat16")
    z_loss = (theirs["eval_f32_all_loss"] - losses("float32")[0]).mean()
    rounding = np.abs(theirs["eval_bf16_all_loss"] - theirs["eval_f32_all_loss"]).max()
    apart_BT = theirs["eval_bf16_all_loss"] - z_loss - loss_BT
    assert 0.01 < rounding < 0.05  # of losses of about 3, in numbers of eight bits
    assert np.abs(apart_BT).max() < 2 * rounding
    assert abs(apart_BT.mean()) < 2 * rounding / math.sqrt(apart_BT.size)
    np.testing.assert_array_equal(correct_BT, theirs["eval_bf16_correct"])


def their_objective(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the second model's training loss, and that of last tokens.

    Its z-loss, on logits less the largest, has a gradient through the largest one too; the first
    model's, and ours, has none there.
    """
    shifted_BTV = logits_BTV - logits_BTV.max(-1, keepdims=True)
    log_z_BT = jnp.log(jnp.exp(shifted_BTV).sum(-1))
    target_BT = jnp.take_along_axis(shifted_BTV, targets_BT[..., None], axis=-1)[..., 0]
    loss_BT = log_z_BT - target_BT + 1e-4 * jnp.square(log_z_BT).mean()
    return loss_BT.mean(), loss_BT[:, -1].mean()


def restored(run: Config) -> tuple[Steps, TrainState]:
    """Compile steps for one device, and put the checkpoint there, moments and all."""
    steps = make_steps(run, make_mesh(1, 1, jax.devices()[:1]))
    found = opening.find(str(STEP))
    source = fitted(opening.open_source(found, run.model, CORES), run.model)
    params = place_params(source, steps.state.params, lambda n: None)
    opt_state = place_opt_state(source, steps.state.opt_state, lambda n: None)
    return steps, TrainState(jnp.int32(source.step), params, opt_state)


@pytest.mark.thorough
def test_five_more_steps_by_the_original_s_own_rules_are_the_original_s() -> None:
    """Our gradients, optimizer and restored state, and the two rules of its that we do not keep.

    Its z-loss as in `their_objective`; and it decays whatever has two dimensions, so norms and
    biases of stacked layers too, where ours goes by name.
    """
    run = run_config()
    _, (_, params, opt_state) = restored(run)
    model = make_model(run.model)
    optimizer = make_optimizer(run.optimizer, run.model.norm)
    rate = learning_rate(run.optimizer)

    def objective(params: Any, tokens_BT1: jax.Array) -> tuple[jax.Array, jax.Array]:
        positions_BT = jnp.arange(tokens_BT1.shape[1] - 1)[None]
        logits_BTV, _ = model.apply(params, tokens_BT1[:, :-1], positions_BT)
        return their_objective(logits_BTV, tokens_BT1[:, 1:])

    @jax.jit
    def step(params: Any, opt_state: Any, tokens_ABT1: jax.Array) -> Any:
        many = jax.vmap(jax.value_and_grad(objective, has_aux=True), (None, 0))
        (loss_A, last_loss_A), grads = many(params, tokens_ABT1)
        mean = jax.tree.map(lambda grad: grad.mean(0), grads)
        lr = rate(schedule_count(opt_state))
        updates, opt_state = optimizer.update(mean, opt_state, params)
        stacked_vectors = jax.tree.map(
            lambda decays, it: it.ndim > 1 and not decays, is_decayed(params), params
        )
        updates = jax.tree.map(
            lambda update, it, more: update - lr * run.optimizer.weight_decay * it * more,
            updates,
            params,
            stacked_vectors,
        )
        return optax.apply_updates(params, updates), opt_state, (loss_A.mean(), last_loss_A.mean())

    rows = []
    for batch in record()["next_tokens"].astype(np.int32):
        params, opt_state, row = step(params, opt_state, batch)
        rows.append(row)
    # As for the first model: sums in another order, carried on by Adam (measured: 9e-7).
    np.testing.assert_allclose(np.array(rows, np.float64), later_losses(), rtol=1e-5)


@pytest.mark.thorough
def test_five_more_steps_by_our_rules_stay_beside_the_original_s() -> None:
    """With `original_shards` 1. The first loss, before any update, is the same.

    Then what the two rules above leave out shows: at most lr * 0.1 = 3e-4 of norms and biases a
    step, and the largest logit's part of a loss that has the weight 1e-4 (measured: 7e-5).
    """
    steps, state = restored(run_config(original_shards=1))
    rows = []
    for batch in record()["next_tokens"].astype(np.int32):
        state, metrics = steps.train(state, batch, None)
        rows.append([metrics["loss"], metrics["last_loss"]])
    apart = np.abs(np.array(rows, np.float64) / later_losses() - 1)
    assert apart[0].max() < 1e-6
    assert 1e-6 < apart[1:].max() < 3e-4
