"""The encoder: blocks that see all tokens at once, padding left out, for a decoder to attend to."""

from __future__ import annotations

import dataclasses

import haiku as hk
import jax
import jax.numpy as jnp

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.block import Block, Encoded
from mesh_transformer.model.layers import Norm, kept_for_backward
from mesh_transformer.model.positions import positions_of
from mesh_transformer.model.stack import in_turn
from mesh_transformer.sharding import copied


@dataclasses.dataclass
class Encoder(hk.Module):
    """T5's encoder (arXiv:1910.10683): a stack of blocks as the decoder's, without a causal mask.

    Its biases of relative positions, one table for all its layers, look both ways.
    """

    config: ModelConfig
    name: str | None = None

    def __call__(self, x_BSD: jax.Array, seen_BS: jax.Array) -> Encoded:
        """Return the features of embedded tokens.

        Args:
            seen_BS: bool, whether a slot holds a token, not padding.
        """
        cfg = dataclasses.replace(self.config, layers=self.config.encoder_layers)
        n_slots = x_BSD.shape[1]
        positions = positions_of(jnp.arange(n_slots)[None], n_slots, cfg, both_ways=True)
        positions = positions._replace(seen_BS=seen_BS)

        def block(x_BSD: jax.Array, _: jax.Array) -> jax.Array:
            return Block(cfg, name="block")(x_BSD, positions, None)[0]

        kept = kept_for_backward(block, cfg.remat)
        y_BSD = in_turn(kept, x_BSD, n_layers=cfg.layers, unroll=cfg.unroll)
        if cfg.final_norm:
            y_BSD = Norm(cfg, name="final_norm")(y_BSD)
        return Encoded(copied(y_BSD), seen_BS)
