"""What the model is trained to lower: cross-entropy of the next token, and the z-loss beside it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenLoss(NamedTuple):
    """Loss of every token.

    Attributes:
        loss_BT: float32 cross-entropy in nats.
        log_z_BT: float32 logarithm of the partition function, log(sum(exp(logits))).
        correct_BT: bool, whether no token is likelier than the target (ties count as right).
        max_BT: float32, the largest logit.
    """

    loss_BT: jax.Array
    log_z_BT: jax.Array
    correct_BT: jax.Array
    max_BT: jax.Array


def next_token_loss(logits_BTV: jax.Array, targets_BT: jax.Array) -> TokenLoss:
    """Return the cross-entropy of each target; the vocabulary may be split over `mp`.

    Only elementwise operations and reductions over V are used, never an index into V: so each
    device works on its own part of the vocabulary and exchanges three numbers per token.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    max_BT = jax.lax.stop_gradient(logits_BTV.max(-1))
    log_z_BT = jnp.log(jnp.exp(logits_BTV - max_BT[..., None]).sum(-1)) + max_BT
    is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    target_BT = jnp.where(is_target_BTV, logits_BTV, 0).sum(-1)
    return TokenLoss(log_z_BT - target_BT, log_z_BT, target_BT >= max_BT, max_BT)


def z_loss(log_z_BT: jax.Array) -> jax.Array:
    """Return the penalty that keeps the partition function near one: log(Z)^2 per token.

    PaLM (arXiv:2204.02311, section 5) weighs it with 1e-4. mesh-transformer-jax meant the same but
    took the logarithm after subtracting the largest logit (see `training.as_original`).
    """
    return jnp.square(log_z_BT)
