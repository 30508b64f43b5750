"""What the model is trained to lower: cross-entropy of the next token, and the z-loss beside it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mesh_transformer.sharding import axis_size, over_mp


class TokenLoss(NamedTuple):
    """Loss of every token.

    Attributes:
        loss_BT: float32 cross-entropy in nats.
        log_z_BT: float32 logarithm of the partition function, log(sum(exp(logits))).
        correct_BT: bool, whether no token is likelier than the target (ties count as right).
        max_BT: float32, the largest logit; constant in backward passes.
    """

    loss_BT: jax.Array
    log_z_BT: jax.Array
    correct_BT: jax.Array
    max_BT: jax.Array


@jax.custom_vjp
def next_token_loss(logits_BTV: jax.Array, targets_BT: jax.Array) -> TokenLoss:
    """Return the cross-entropy of each target; the vocabulary may be split over `mp`.

    Each device works on its own part of the vocabulary; they exchange three numbers per token,
    together, and nothing backward.
    """
    max_BT, log_z_BT, target_BT = over_mp(_terms, ("BTV", "BT"), ("BT", "BT", "BT"))(
        logits_BTV, targets_BT
    )
    return TokenLoss(log_z_BT - target_BT, log_z_BT, target_BT >= max_BT, max_BT)


def _terms(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, ...]:
    """Return the largest logit, log Z and the target's logit, of the whole vocabulary."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    if axis_size("mp") > 1:
        targets_BT = targets_BT - jax.lax.axis_index("mp") * logits_BTV.shape[-1]
    max_BT = logits_BTV.max(-1)
    sum_BT = jnp.exp(logits_BTV - max_BT[..., None]).sum(-1)
    target_BT = jnp.where(_is_target(logits_BTV, targets_BT), logits_BTV, 0).sum(-1)
    if axis_size("mp") > 1:
        parts = jax.lax.all_gather(jnp.stack((max_BT, sum_BT, target_BT)), "mp", axis=1)
        max_MBT, sum_MBT, target_MBT = parts
        max_BT, target_BT = max_MBT.max(0), target_MBT.sum(0)
        sum_BT = (sum_MBT * jnp.exp(max_MBT - max_BT)).sum(0)
    return max_BT, jnp.log(sum_BT) + max_BT, target_BT


def _is_target(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Mark the targets by comparing, where TPUs would look up indices one by one."""
    return jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]


def _forward(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[TokenLoss, Any]:
    seen = next_token_loss(logits_BTV, targets_BT)
    return seen, (logits_BTV, targets_BT, seen.log_z_BT)


def _backward(factors: Any, gradients: TokenLoss) -> tuple[jax.Array, None]:
    logits_BTV, targets_BT, log_z_BT = factors
    probability_BTV = jnp.exp(logits_BTV.astype(jnp.float32) - log_z_BT[..., None])
    g_BT = gradients.loss_BT
    pull_BTV = (g_BT + gradients.log_z_BT)[..., None] * probability_BTV
    push_BTV = jnp.where(_is_target(logits_BTV, targets_BT), g_BT[..., None], 0)
    return (pull_BTV - push_BTV).astype(logits_BTV.dtype), None


next_token_loss.defvjp(_forward, _backward)


def z_loss(log_z_BT: jax.Array) -> jax.Array:
    """Return the penalty that keeps the partition function near one: log(Z)^2 per token.

    PaLM (arXiv:2204.02311, section 5) weighs it with 1e-4. mesh-transformer-jax meant the same but
    took the logarithm after subtracting the largest logit (see `training.as_original`).
    """
    return jnp.square(log_z_BT)
