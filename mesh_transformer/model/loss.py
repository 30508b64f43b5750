"""What the model is trained to lower: cross-entropy of the next token, and the z-loss beside it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mesh_transformer.sharding import first_of_own, over_mp, parts_over_mp


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
    together, and backward only if it computes the logits anew.
    """
    return _loss(*_terms(logits_BTV, targets_BT))


def _loss(max_BT: jax.Array, log_sum_BT: jax.Array, target_BT: jax.Array) -> TokenLoss:
    """Return the loss, of the largest logit, log(Z) relative to it, and the target's logit."""
    loss_BT = log_sum_BT - (target_BT - max_BT)
    return TokenLoss(loss_BT, log_sum_BT + max_BT, target_BT >= max_BT, max_BT)


def _terms(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, ...]:
    """Return what `_loss` takes, of the whole vocabulary."""

    def of_own_part(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, ...]:
        logits_BTV = logits_BTV.astype(jnp.float32)
        max_BT = logits_BTV.max(-1)
        sum_BT = jnp.exp(logits_BTV - max_BT[..., None]).sum(-1)
        own_BT = targets_BT - first_of_own(logits_BTV.shape[-1])
        target_BT = jnp.where(_is_target(logits_BTV, own_BT), logits_BTV, 0).sum(-1)
        parts = parts_over_mp(jnp.stack((max_BT, sum_BT, target_BT)))
        max_MBT, sum_MBT, target_MBT = parts.swapaxes(0, 1)
        max_BT = max_MBT.max(0)
        sum_BT = (sum_MBT * jnp.exp(max_MBT - max_BT)).sum(0)
        return max_BT, jnp.log(sum_BT), target_MBT.sum(0)

    return over_mp(of_own_part, ("BTV", "BT"), ("BT", "BT", "BT"))(logits_BTV, targets_BT)


def _is_target(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Mark the targets by comparing, where TPUs would look up indices one by one."""
    return jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]


def _forward(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[TokenLoss, Any]:
    max_BT, log_sum_BT, target_BT = _terms(logits_BTV, targets_BT)
    return _loss(max_BT, log_sum_BT, target_BT), (logits_BTV, targets_BT, max_BT, log_sum_BT)


def _backward(kept: Any, gradients: TokenLoss) -> tuple[jax.Array, None]:
    logits_BTV, targets_BT, max_BT, log_sum_BT = kept
    shifted_BTV = logits_BTV.astype(jnp.float32) - max_BT[..., None]
    probability_BTV = jnp.exp(shifted_BTV - log_sum_BT[..., None])
    loss_g_BT, log_z_g_BT = gradients.loss_BT, gradients.log_z_BT
    pull_BTV = (loss_g_BT + log_z_g_BT)[..., None] * probability_BTV
    push_BTV = jnp.where(_is_target(logits_BTV, targets_BT), loss_g_BT[..., None], 0)
    return (pull_BTV - push_BTV).astype(logits_BTV.dtype), None


next_token_loss.defvjp(_forward, _backward)


def z_loss(log_z_BT: jax.Array) -> jax.Array:
    """Return the penalty that keeps the partition function near one: log(Z)^2 per token.

    PaLM (arXiv:2204.02311, section 5) weighs it with 1e-4. mesh-transformer-jax meant the same but
    took the logarithm after subtracting the largest logit (see `training.as_original`).
    """
    return jnp.square(log_z_BT)
