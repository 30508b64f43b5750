"""The Head-QK trick: logits raised for tokens that were seen before (`head_qk_trick`)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.attention import Cache
from mesh_transformer.model.layers import Matrix
from mesh_transformer.network import HEAD_QK_FEATURES
from mesh_transformer.sharding import shard


class Pointers(NamedTuple):
    """How strongly each token points at those up to it.

    Attributes:
        by_slot_BTS: float32, added to the logit of the token at the slot.
        tokens_BS: int32, that token.
    """

    by_slot_BTS: jax.Array
    tokens_BS: jax.Array


@dataclasses.dataclass
class HeadQK(hk.Module):
    """One head that points from each token at those up to it, by the last features x of each.

    c_ts = (W_q x_t) . (W_k x_s) / 256 for s <= t, without a softmax; `copied` adds c_ts to the
    logit of the token at s. BlinkDL's trick to learn to copy tokens and to avoid them (RWKV-LM's
    notes), as fattorib/transformer has it. Queries start at 0, and so the trick has no effect yet;
    keys start as orthogonal columns of length 0.1.
    """

    config: ModelConfig
    name: str | None = None

    def __call__(
        self,
        x_BTD: jax.Array,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        cache: Cache | None,
    ) -> tuple[Pointers, Cache | None]:
        d_model = self.config.d_model
        query = Matrix(d_model, HEAD_QK_FEATURES, 0.0, name="q")
        key = Matrix(d_model, HEAD_QK_FEATURES, init=hk.initializers.Orthogonal(0.1), name="k")
        q_BTK, k_BSK, tokens_BS = x_BTD @ query(), x_BTD @ key(), tokens_BT
        if cache is not None:
            cache = cache.append_pointed(k_BSK, tokens_BT, positions_BT)
            k_BSK, tokens_BS = cache.pointed()
        pointers_BTS = jnp.einsum("btk,bsk->bts", q_BTK, k_BSK, preferred_element_type=jnp.float32)
        is_seen_BTS = jnp.arange(k_BSK.shape[1]) <= positions_BT[:, :, None]
        return Pointers(
            jnp.where(is_seen_BTS, pointers_BTS / HEAD_QK_FEATURES, 0), tokens_BS
        ), cache


def copied(logits_BTV: jax.Array, pointers: Pointers, dtype: jnp.dtype) -> jax.Array:
    """Add to the float32 logits of each token, split over `mp`, all that points at it.

    As a product with rows of zeros and a one, which each device has of its own part of V.

    Args:
        dtype: Of the factors; sums are float32.
    """
    is_token_BSV = jnp.arange(logits_BTV.shape[-1]) == pointers.tokens_BS[..., None]
    added_BTV = jnp.einsum(
        "bts,bsv->btv",
        pointers.by_slot_BTS.astype(dtype),
        shard(is_token_BSV.astype(dtype), "BSV"),
        preferred_element_type=jnp.float32,
    )
    return shard(logits_BTV + added_BTV, "BTV")
