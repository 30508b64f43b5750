"""The optimizer is the rule that GPT-J was trained by, and its edge cases are finite."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import original
import pytest
import small

from mesh_transformer.config import OptimizerConfig
from mesh_transformer.training.optimizer import (
    is_decayed,
    learning_rate,
    make_optimizer,
    restart_schedule,
    schedule_count,
)

PARAMS = {
    "decoder/embed": {"embeddings": jnp.ones((4, 2)), "b": jnp.ones(2)},
    "decoder/layers/block/attention/q": {"w": jnp.ones((3, 2, 2))},
    "decoder/layers/block/ff/in": {"w": jnp.ones((3, 2, 8)), "b": jnp.ones((3, 8))},
    "decoder/layers/block/norm": {"scale": jnp.ones((3, 2)), "offset": jnp.ones((3, 2))},
}
"""Stacked over three layers, where a bias has two dimensions and is still a bias."""


def configured(**keys: Any) -> OptimizerConfig:
    """Return an optimizer configuration without warm-up."""
    chosen = {"warmup_steps": 0, "anneal_steps": 10, "lr": 0.5, "end_lr": 0.1, "weight_decay": 0.1}
    return OptimizerConfig(**chosen | keys)


OPTIMIZER = make_optimizer(configured(), "layernorm")
update = jax.jit(OPTIMIZER.update)


def gpt3_schedule(count: np.ndarray, config: OptimizerConfig) -> np.ndarray:
    """Return mesh-transformer-jax's closed form, which divides by the lengths of both phases."""
    warmed = np.clip(count, 0, config.warmup_steps) / config.warmup_steps
    annealed = np.clip(count - config.warmup_steps, 0, config.anneal_steps) / config.anneal_steps
    drop = (config.lr - config.end_lr) * (1 - np.cos(np.pi * annealed)) / 2
    return warmed * config.lr - drop


@pytest.mark.thorough
@pytest.mark.parametrize(("warmup", "anneal"), [(1, 1), (3, 7), (10, 100), (3000, 300000)])
def test_the_learning_rate_is_gpt3_s_at_every_count(warmup: int, anneal: int) -> None:
    config = configured(warmup_steps=warmup, anneal_steps=anneal, lr=1.2e-4, end_lr=1.2e-5)
    count = np.unique(np.linspace(0, 2 * (warmup + anneal), 500).astype(np.int32))
    rates = learning_rate(config)(jnp.asarray(count))
    np.testing.assert_allclose(rates, gpt3_schedule(count, config), rtol=0, atol=1.2e-4 * 1e-6)


@pytest.mark.parametrize(
    ("warmup", "anneal", "expected"),
    [
        (0, 4, [0.5, 0.44142136, 0.3, 0.15857864, 0.1, 0.1]),
        (4, 0, [0, 0.125, 0.25, 0.375, 0.1, 0.1]),
        (0, 0, [0.1, 0.1, 0.1, 0.1, 0.1, 0.1]),
    ],
)
def test_a_schedule_without_one_of_its_phases_is_finite(
    warmup: int, anneal: int, expected: list[float]
) -> None:
    schedule = learning_rate(configured(warmup_steps=warmup, anneal_steps=anneal))
    np.testing.assert_allclose([schedule(jnp.int32(i)) for i in range(6)], expected, atol=1e-7)


def test_matrices_decay_and_stacked_vectors_do_not() -> None:
    config = configured()
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = update(zeros, OPTIMIZER.init(PARAMS), PARAMS)
    for module, values in updates.items():
        for name, moved in values.items():
            matrix = name in ("w", "embeddings")
            expected = -config.lr * config.weight_decay if matrix else 0.0
            np.testing.assert_allclose(moved, expected, rtol=1e-6, err_msg=f"{module}/{name}")


@pytest.mark.parametrize("pe", ["rotary", "t5", "fixed"])
@pytest.mark.parametrize("norm", ["layernorm", "scalenorm-bias"])
def test_what_decays_is_decided_by_name(pe: str, norm: str) -> None:
    params = small.steps(pe=pe, norm=norm).state.params
    decayed = {f"{m}/{n}" for m, values in is_decayed(params).items() for n in values if values[n]}
    always = {
        "decoder/embed/embeddings",
        "decoder/unembed/w",
        *(f"decoder/layers/block/attention/{name}/w" for name in "qkvo"),
        *(f"decoder/layers/block/ff/{name}/w" for name in ("in", "out")),
    }
    table = {"t5": "relative_positions", "fixed": "positions"}.get(pe)
    assert decayed == always | ({f"decoder/{table}/embeddings"} if table else set())


@pytest.mark.parametrize("norm", [0.5, 50.0])
def test_gradients_are_clipped_to_norm_one_before_adam(norm: float) -> None:
    length = float(optax.tree.norm(PARAMS))
    gradient = jax.tree.map(lambda x: x * (norm / length), PARAMS)
    _, state = update(gradient, OPTIMIZER.init(PARAMS), PARAMS)
    seen = optax.tree.norm(optax.tree.get(state, "mu"))
    np.testing.assert_allclose(seen, 0.1 * min(norm, 1), rtol=1e-6)


def test_the_first_update_of_a_warm_up_changes_nothing() -> None:
    optimizer = make_optimizer(configured(warmup_steps=5), "layernorm")
    once = jax.jit(optimizer.update)
    updates, state = once(PARAMS, optimizer.init(PARAMS), PARAMS)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(updates))
    updates, _ = once(PARAMS, state, PARAMS)
    assert all(np.asarray(leaf).all() for leaf in jax.tree.leaves(updates))


def test_a_restarted_schedule_keeps_adam_s_moments_and_count() -> None:
    state = OPTIMIZER.init(PARAMS)
    for _ in range(3):
        _, state = update(PARAMS, state, PARAMS)
    assert schedule_count(state) == 3
    restarted = restart_schedule(state)
    assert schedule_count(restarted) == 0
    adam = [part for part in restarted if isinstance(part, optax.ScaleByAdamState)]
    was = [part for part in state if isinstance(part, optax.ScaleByAdamState)]
    assert adam[0].count == 3
    jax.tree.map(np.testing.assert_array_equal, adam, was)


def test_one_update_moves_the_original_s_weights_where_the_original_moved_them() -> None:
    run = original.load("E_rmsnorm")
    params, grads, mu, nu, after = (
        nested(run.shards(kind)) for kind in ("params", "grads", "mu", "nu", "after")
    )
    optimizer = make_optimizer(run.config.optimizer, run.config.model.norm)
    steps_taken = jnp.int32(20)
    state = optax.tree.set(optimizer.init(params), mu=mu, nu=nu, count=steps_taken)
    updates, _ = jax.jit(optimizer.update)(grads, state, params)
    ours = optax.apply_updates(params, updates)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), after, params)
    assert max(jax.tree.leaves(moved)) > 1e-3
    small.assert_close(ours, after, 1e-6)


def nested(shards: dict[str, np.ndarray]) -> dict[str, dict[str, jax.Array]]:
    """Return arrays by module and name."""
    tree: dict[str, dict[str, jax.Array]] = {}
    for path, array in shards.items():
        module, name = path.rsplit("/", 1)
        tree.setdefault(module, {})[name] = jnp.asarray(array)
    return tree
