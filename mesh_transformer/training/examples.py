"""What is fed and what is learned of records: the one place where they are split.

A decoder's record is T + 1 tokens: each but the last is fed, each but the first learned. With an
encoder `encoder_seq` tokens for that come first, filled up with `pad_id`; the decoder's T + 1 begin
with `pad_id`, and end with as many of it as fill them up, which are not learned.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mesh_transformer.config import ModelConfig


class Examples(NamedTuple):
    """Sequences to learn or to score.

    Attributes:
        inputs_BT: What the decoder is fed.
        targets_BT: What is to follow each.
        sources: What else `Model.apply` takes: `sources_BS`, what an encoder is fed.
    """

    inputs_BT: jax.Array
    targets_BT: jax.Array
    sources: dict[str, jax.Array]


def split(tokens_BT1: Any, config: ModelConfig) -> Examples:
    """Split records; they may have dimensions before B."""
    sources = {}
    if config.encoder_layers:
        sources["sources_BS"] = tokens_BT1[..., : config.encoder_seq]
        tokens_BT1 = tokens_BT1[..., config.encoder_seq :]
    return Examples(tokens_BT1[..., :-1], tokens_BT1[..., 1:], sources)


def weighed(tokens_BT1: jax.Array, mask_BT: jax.Array | None, config: ModelConfig) -> jax.Array:
    """Return the weight of each target in the loss, float32: the mask's, but none of padding."""
    targets_BT = split(tokens_BT1, config).targets_BT
    if config.encoder_layers:
        valid_BT = (targets_BT != config.pad_id).astype(jnp.float32)
        return valid_BT if mask_BT is None else valid_BT * mask_BT
    return jnp.ones(targets_BT.shape, jnp.float32) if mask_BT is None else mask_BT


def last_of(x_BT: jax.Array, weights_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Return what is at the last position; with an encoder, at the last that has a weight."""
    if not config.encoder_layers:
        return x_BT[..., -1]
    left_BT = jnp.cumsum((weights_BT != 0)[..., ::-1], axis=-1)[..., ::-1]
    return jnp.where((left_BT == 1) & (weights_BT != 0), x_BT, 0).sum(-1)
