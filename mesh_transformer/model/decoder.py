"""The decoder: tokens to logits, one Haiku module tree for training, scoring and decoding.

With an encoder (`encoder_layers`) every block also attends to what that makes of other tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.attention import Cache, CrossCache, n_kv_heads_held
from mesh_transformer.model.block import Block, Encoded
from mesh_transformer.model.copying import HeadQK, Pointers, copied
from mesh_transformer.model.dropout import dropout, embedding_key, layer_keys
from mesh_transformer.model.encoder import Encoder
from mesh_transformer.model.layers import (
    Embed,
    Head,
    Norm,
    Unembed,
    kept_for_backward,
    logits,
    plus,
)
from mesh_transformer.model.loss import TokenLoss, next_token_loss
from mesh_transformer.model.positions import LearnedPositions, positions_of, sinusoidal
from mesh_transformer.model.stack import in_turn
from mesh_transformer.model.weights import cast_at_use
from mesh_transformer.network import HEAD_QK_FEATURES
from mesh_transformer.network_rules import is_windowed
from mesh_transformer.sharding import shard


@dataclasses.dataclass
class Decoder(hk.Module):
    """A stack of blocks between embedding and head; layers in a loop, `unroll` a round."""

    config: ModelConfig
    name: str | None = None

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        cache: Cache | None = None,
        *,
        encoded: Encoded | None = None,
        targets_BT: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Any, Cache | None]:
        """Return what follows the tokens, and the cache after them.

        Args:
            positions_BT: int32; B may be 1 where all sequences agree.
            encoded: An encoder's output; its keys and values go to the cache, if one came in, and
                later calls with that cache need it no more.
            targets_BT: If given, the first result is the `TokenLoss` of these, not logits.
            dropout_key: Of what is dropped at the rates of `dropout_...`; nothing is if None.

        Returns:
            `logits_BTV` (float32, split over `mp`) or a `TokenLoss`; and the cache, if one came in.
        """
        cfg = self.config
        slots = tokens_BT.shape[1] if cache is None else cache.k_LBSGK.shape[2]
        x_BTD, table_VE = Embed(cfg, name="embed")(tokens_BT)
        x_BTD = _placed(x_BTD, positions_BT, cfg)
        x_BTD = dropout(x_BTD, "BTD", cfg.dropout_embedding, embedding_key(dropout_key))
        positions = positions_of(positions_BT, slots, cfg)

        def block(
            carry: tuple[jax.Array, Cache | None], layer: jax.Array
        ) -> tuple[jax.Array, Cache | None]:
            x_BTD, cache = carry
            cache = None if cache is None else cache._replace(layer=layer)
            window, keys = window_of(layer, cfg), layer_keys(dropout_key, layer)
            return Block(cfg, name="block")(x_BTD, positions, cache, window, keys, encoded)

        kept = kept_for_backward(block, cfg.remat)
        x_BTD, cache = in_turn(kept, (x_BTD, cache), n_layers=cfg.layers, unroll=cfg.unroll)
        if cfg.final_norm:
            x_BTD = Norm(cfg, name="final_norm")(x_BTD)
        # Read outside what backward recomputes: a spread head is then gathered once.
        head, pointers = Unembed(cfg, name="unembed")(table_VE), None
        if cfg.head_qk_trick:
            point = HeadQK(cfg, name="head_qk")
            pointers, cache = point(x_BTD, tokens_BT, positions_BT, cache)
        if targets_BT is None:
            return _predicted(cfg, x_BTD, head, pointers), cache

        def loss(targets_BT: jax.Array, *features: Any) -> TokenLoss:
            return next_token_loss(_predicted(cfg, *features), targets_BT)

        return kept_for_backward(loss, cfg.remat)(targets_BT, x_BTD, head, pointers), cache

    @hk.name_like("__call__")
    def embedded(self, tokens_BS: jax.Array) -> jax.Array:
        """Return the embeddings `BSD` of an encoder's tokens: both stacks share one table."""
        return Embed(self.config, name="embed")(tokens_BS)[0]


def _placed(x_BTD: jax.Array, positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Add to embeddings the vectors of their positions, if the model's `pe` has any."""
    if config.pe == "fixed":
        return plus(x_BTD, LearnedPositions(config, name="positions")(positions_BT))
    if config.pe == "sinusoidal":
        return x_BTD + sinusoidal(positions_BT, config.d_model).astype(x_BTD.dtype)
    return x_BTD


def _predicted(
    config: ModelConfig, x_BTD: jax.Array, head: Head, pointers: Pointers | None
) -> jax.Array:
    """Return the logits of the last features, those of tokens that were seen raised by Head-QK."""
    logits_BTV = logits(x_BTD, head, config.output_scale)
    return logits_BTV if pointers is None else copied(logits_BTV, pointers, x_BTD.dtype)


def window_of(layer: jax.Array, config: ModelConfig) -> jax.Array | None:
    """Return how many slots a query of a layer, counted from 0, sees; None if all ever do."""
    if not is_windowed(config.window, config.seq):
        return None
    is_local = (layer + 1) % config.window_every == 0
    return jnp.where(is_local, config.window, jnp.iinfo(jnp.int32).max // 2)


class Model(NamedTuple):
    """The decoder, with its encoder if it has one, as pure functions.

    Attributes:
        init: key -> params.
        apply: params, tokens_BT, positions_BT, cache, sources_BS=, targets_BT= -> as `Decoder`;
            sources_BS is what the encoder is fed, filled up with `pad_id`.
        config: The network.
    """

    init: Callable[[jax.Array], hk.Params]
    apply: Callable[..., tuple[Any, Cache | None]]
    config: ModelConfig


def make_model(config: ModelConfig) -> Model:
    """Return the model's pure functions; weights are cast to the compute dtype where used."""

    def forward(
        *args: Any, sources_BS: jax.Array | None = None, **options: Any
    ) -> tuple[Any, Cache | None]:
        with cast_at_use(jnp.dtype(config.compute_dtype)):
            decoder = Decoder(config, name="decoder")
            if sources_BS is not None:
                encoder, seen_BS = Encoder(config, name="encoder"), sources_BS != config.pad_id
                options["encoded"] = encoder(decoder.embedded(sources_BS), seen_BS)
            return decoder(*args, **options)

    transformed = hk.without_apply_rng(hk.transform(forward))

    def init(key: jax.Array) -> hk.Params:
        one_token_BT = jnp.zeros((1, 1), jnp.int32)
        sources = {"sources_BS": one_token_BT} if config.encoder_layers else {}
        return transformed.init(key, one_token_BT, one_token_BT, **sources)

    return Model(init, transformed.apply, config)


def empty_cache(
    config: ModelConfig, n_sequences: int, n_slots: int, sources_BS: jax.Array | None = None
) -> Cache:
    """Return a cache with room for `n_slots` positions of each sequence.

    Args:
        sources_BS: What an encoder is about to be fed.
    """
    shape = (config.layers, n_sequences, n_slots, n_kv_heads_held(config), config.d_head)
    zeros_LBSGK = shard(jnp.zeros(shape, config.compute_dtype), "LBSGK")
    cache = Cache(zeros_LBSGK, zeros_LBSGK, jnp.int32(0))
    by_slot = (n_sequences, n_slots)
    if config.use_static_sgu:
        mixed = (config.layers, *by_slot, config.d_mixed)
        cache = cache._replace(y_LBSD=shard(jnp.zeros(mixed, config.compute_dtype), "LBSD"))
    if config.head_qk_trick:
        key_BSK = shard(jnp.zeros((*by_slot, HEAD_QK_FEATURES), config.compute_dtype), "BSK")
        tokens_BS = shard(jnp.zeros(by_slot, jnp.int32), "BS")
        cache = cache._replace(key_BSK=key_BSK, tokens_BS=tokens_BS)
    if sources_BS is not None:
        width = n_kv_heads_held(config) * config.d_head
        zeros = jnp.zeros((config.layers, *sources_BS.shape, width), config.compute_dtype)
        zeros_LBSG = shard(zeros, "LBSG")
        cross = CrossCache(zeros_LBSG, zeros_LBSG, sources_BS != config.pad_id)
        cache = cache._replace(cross=cross)
    return cache
