"""Logits to token: temperature, top-k and top-p in the order other libraries use."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Choice(NamedTuple):
    """How each sequence's next token is drawn; arrays, so that one compiled program serves all.

    Attributes:
        temperature_B: float32; 0 is greedy.
        top_k_B: int32; 0 keeps all.
        top_p_B: float32 in (0, 1]; 1 keeps all.
        key_B: One random key per sequence; a draw folds the token's position into it.
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    key_B: jax.Array


def choose(
    logits_BV: jax.Array, choice: Choice, positions_B: jax.Array, n_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Draw the next token of each sequence.

    Temperature applies first, then top-k, then top-p (nucleus, arXiv:1904.09751: the most likely
    tokens up to and including the one that reaches p) among what top-k left. Equal logits rank by
    token id, so exactly k tokens stay.

    Args:
        positions_B: Position the token will stand at; gives each draw its own randomness.
        n_tokens: Ids from here on are padding of the vocabulary and are never drawn.

    Returns:
        `tokens_B` (int32) and `logprobs_B` (float32): the natural log of each token's probability
        under the model itself, before temperature and filters, padding left out.
    """
    is_token_V = jnp.arange(logits_BV.shape[-1]) < n_tokens
    logits_BV = jnp.where(is_token_V, logits_BV.astype(jnp.float32), -jnp.inf)
    tokens_B = jax.vmap(_choose_one)(logits_BV, choice, positions_B)
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    return tokens_B, jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=-1)[:, 0]


def _choose_one(logits_V: jax.Array, choice: Choice, position: jax.Array) -> jax.Array:
    """Draw one token; `choice` holds this sequence's scalars."""
    temperature, top_k, top_p, key = choice
    order_V = jnp.argsort(-logits_V, stable=True)
    ranked_V = logits_V[order_V] / jnp.where(temperature == 0, 1.0, temperature)
    rank_V = jnp.arange(ranked_V.size)
    limit = jnp.where(temperature == 0, 1, jnp.where(top_k == 0, ranked_V.size, top_k))
    ranked_V = jnp.where(rank_V < limit, ranked_V, -jnp.inf)
    share_V = jax.nn.softmax(ranked_V)
    before_V = jnp.cumsum(share_V) - share_V
    kept_V = (before_V < top_p) | (rank_V == 0)
    drawn = jax.random.categorical(
        jax.random.fold_in(key, position), jnp.where(kept_V, ranked_V, -jnp.inf)
    )
    return order_V[drawn].astype(jnp.int32)
