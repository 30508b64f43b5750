"""Dropout (arXiv:1207.0580): features left out at random while a model is trained.

Every mask follows from one key, of the microbatch, by the number of the layer and of the place in
it: so masks differ everywhere, and are drawn anew alike where the backward pass computes anew. They
do not depend on how an array is spread over `mp`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mesh_transformer.sharding import shard


class LayerKeys(NamedTuple):
    """A layer's random keys, by place; None where nothing is dropped.

    Attributes:
        attention: Of the attention weights.
        after_attention: Of what attention adds to the residual stream.
        after_ff: Of what the feed-forward layer adds to it.
    """

    attention: jax.Array | None = None
    after_attention: jax.Array | None = None
    after_ff: jax.Array | None = None


NOTHING_DROPPED = LayerKeys()


def embedding_key(key: jax.Array | None) -> jax.Array | None:
    """Return the key of the embeddings: place 0, before the layers."""
    return None if key is None else jax.random.fold_in(key, 0)


def layer_keys(key: jax.Array | None, layer: jax.Array | int) -> LayerKeys:
    """Return the keys of a layer, counted from 0, of a microbatch's key."""
    if key is None:
        return NOTHING_DROPPED
    return LayerKeys(*jax.random.split(jax.random.fold_in(key, layer + 1), 3))


def dropout(x: jax.Array, dims: str, rate: float, key: jax.Array | None) -> jax.Array:
    """Set each number to 0 with probability `rate`, and divide the others by 1 - rate.

    So the mean stays, and nothing need be done where nothing is dropped.

    Args:
        dims: Of the array, which say how its mask is spread.
        key: None leaves the array as it is.
    """
    if key is None or rate == 0:
        return x
    kept = shard(jax.random.bernoulli(key, 1 - rate, x.shape), dims)
    return jnp.where(kept, x.astype(jnp.float32) / (1 - rate), 0).astype(x.dtype)
