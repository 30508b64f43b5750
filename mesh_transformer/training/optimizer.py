"""One optax chain: the rule GPT-J was trained by."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mesh_transformer.model import mup
from mesh_transformer.network import Norm
from mesh_transformer.sections import OptimizerConfig
from mesh_transformer.training import as_original


def make_optimizer(
    config: OptimizerConfig, norm: Norm, widths: mup.Widths = mup.STANDARD
) -> optax.GradientTransformation:
    """Return clip, Adam, weight decay, learning rate, as mesh-transformer-jax chains them.

    Clip the global norm to 1; Adam (arXiv:1412.6980) with b1 0.9, b2 0.999, epsilon 1e-8; add the
    decay of matrices before the learning rate multiplies both (AdamW, arXiv:1711.05101).

    With `original_shards`, the norm and Adam's updates are what `as_original` makes of them; the
    state has the same tree and scale as without. So it has with muP, which resizes Adam's updates.

    Args:
        norm: The model's.
        widths: The model's, beside its base's.
    """
    shards = config.original_shards

    def moved(updates: Any) -> Any:
        return mup.sized(as_original.moved(updates, shards, norm), widths)

    return optax.chain(
        clip_by_global_norm(1.0, functools.partial(as_original.counted, shards=shards, norm=norm)),
        adam(moved),
        optax.add_decayed_weights(config.weight_decay, mask=is_decayed),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def adam(moved: Callable[[Any], Any]) -> optax.GradientTransformation:
    """Return Adam, with `moved` of its updates in their stead."""
    rule = optax.scale_by_adam()

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, Any]:
        updates, state = rule.update(updates, state, params)
        return moved(updates), state

    return optax.GradientTransformation(rule.init, update)


def clip_by_global_norm(
    longest: float, counted: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Return the clipping of the global norm (arXiv:1211.5063), that of `counted` of a gradient.

    It multiplies by one factor, where optax's divides each number: a product is computed again by
    each of Adam's moments, a quotient XLA on CPUs stores for them, a second copy of the gradient.
    """

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, Any]:
        factor = longest / jnp.maximum(optax.tree.norm(counted(updates)), longest)
        return jax.tree.map(lambda update: factor * update, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Return the learning rate of each update, counted from 0: GPT-3's (arXiv:2005.14165, B).

    Linear from 0 over `warmup_steps`, half a cosine from `lr` to `end_lr` over `anneal_steps`,
    `end_lr` from then on. Without warm-up the first update has `lr`; without annealing `end_lr`
    follows the warm-up at once.
    """

    def rate(count: jax.Array) -> jax.Array:
        warmed = _progress(count, config.warmup_steps)
        annealed = _progress(count - config.warmup_steps, config.anneal_steps)
        drop = (config.lr - config.end_lr) * (1 - jnp.cos(jnp.pi * annealed)) / 2
        return warmed * config.lr - drop

    return rate


def _progress(count: jax.Array, steps: int) -> jax.Array:
    """Return how much of `steps` is done at `count`, 0 to 1; all from count 0 if there are none."""
    if steps == 0:
        return jnp.where(count >= 0, 1.0, 0.0)
    return jnp.clip(count, 0, steps) / steps


def is_decayed(params: Any) -> Any:
    """Say of each parameter whether it decays: matrices do, norms, biases and scales do not.

    By name: a bias stacked over layers has two dimensions and is still a bias.
    """
    return {
        module: {name: name in ("w", "embeddings") for name in values}
        for module, values in params.items()
    }


def schedule_count(opt_state: optax.OptState) -> jax.Array:
    """Return how many updates the learning-rate schedule has seen."""
    return _schedule(opt_state).count


def restart_schedule(opt_state: optax.OptState) -> optax.OptState:
    """Return the optimizer state with the schedule at its beginning, and Adam's moments kept."""
    old = _schedule(opt_state)
    fresh = old._replace(count=jnp.zeros_like(old.count))
    return tuple(fresh if part is old else part for part in opt_state)


def _schedule(opt_state: optax.OptState) -> optax.ScaleByScheduleState:
    (state,) = (part for part in opt_state if isinstance(part, optax.ScaleByScheduleState))
    return state
