"""A block of a decoder: attention heads and a feed-forward layer, each added to its input.

Initial values and formulas are those of mesh-transformer-jax, the program that trained GPT-J-6B.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.attention import Cache, attention, n_kv_heads_held
from mesh_transformer.model.dropout import NOTHING_DROPPED, LayerKeys, dropout
from mesh_transformer.model.initial import stddevs
from mesh_transformer.model.layers import (
    PRODUCT,
    Matrix,
    Norm,
    Product,
    mean_square_normalised,
    plus,
)
from mesh_transformer.model.mixing import static_sgu
from mesh_transformer.model.positions import Positions, rotate
from mesh_transformer.sharding import columns, columns_of_copies, rows, shard

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": jax.nn.gelu,  # the tanh approximation
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "mish": jax.nn.mish,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}
"""By the names that Hugging Face's config.json files use."""


class Encoded(NamedTuple):
    """What an encoder makes of its tokens, for the decoder's layers to attend to.

    Attributes:
        y_MBSD: Features; a copy for each index of `mp`, so that their gradient is summed once.
        seen_BS: bool, whether a slot holds a token, not padding.
    """

    y_MBSD: jax.Array
    seen_BS: jax.Array


@dataclasses.dataclass
class Block(hk.Module):
    """One layer: attention and feed-forward, each added to its input (`residual` says how).

    GPT-J's parallel form, `x + Attention(Norm(x)) + FeedForward(Norm(x))`, has one norm: both
    branches read one input and add into one output, so the block needs one all-reduce over `mp`
    forward and one backward. "parallel-untied" is GPT-NeoX's, "sequential" GPT-2's, and
    "post-norm", the first transformer's, normalises each sum. With an encoder, a sequential block
    attends to its output between the two.

    With `use_static_sgu` attention reads and writes the second half of the features alone, and the
    first half is mixed by fixed weights (`mixing.static_sgu`). This, and `dropout_residual`, which
    drops what each branch adds, cost the parallel forms a second all-reduce forward.
    """

    config: ModelConfig
    name: str | None = None

    def __call__(
        self,
        x_BTD: jax.Array,
        positions: Positions,
        cache: Cache | None,
        window: jax.Array | None = None,
        keys: LayerKeys = NOTHING_DROPPED,
        encoded: Encoded | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        cfg = self.config
        heads, ff = Heads.of(cfg), FeedForward.of(cfg)
        dropped = functools.partial(dropout, dims="BTD", rate=cfg.dropout_residual)
        norm = Norm(cfg, name="norm")
        ff_norm = norm if cfg.residual == "parallel" else Norm(cfg, name="ff_norm")
        if cfg.residual in ("sequential", "post-norm"):
            post = cfg.residual == "post-norm"
            read, then = (lambda x: x, norm) if post else (norm, lambda x: x)
            made = _products(read(x_BTD), heads.inputs())
            a_BTH, cache = attend(heads, made, positions, cache, cfg, window, keys.attention)
            a_BTD = heads.add_bias(rows((a_BTH, heads.o(), "HD")))
            a_BTD = dropped(a_BTD, key=keys.after_attention)
            x_BTD = then(shard(x_BTD + a_BTD, "BTD"))
            if encoded is not None or (cache is not None and cache.cross is not None):
                x_BTD, cache = _across(x_BTD, positions, cache, encoded, cfg)
            read, then = (lambda x: x, ff_norm) if post else (ff_norm, lambda x: x)
            h_BTF = ff.hidden(_products(read(x_BTD), ff.inputs()))
            h_BTD = ff.add_bias(rows((h_BTF, ff.out(), "FD")))
            return then(shard(x_BTD + dropped(h_BTD, key=keys.after_ff), "BTD")), cache
        y_BTD, mixed_BTD = norm(x_BTD), None
        if cfg.use_static_sgu:
            mixed_BTD, attended_BTD = jnp.split(y_BTD, [cfg.d_mixed], axis=-1)
            mixed_BTD, cache = _mix(mixed_BTD, positions, cache)
            made = (*_products(attended_BTD, heads.inputs()), *_products(y_BTD, ff.inputs()))
        elif cfg.residual == "parallel":
            made = _products(y_BTD, (*heads.inputs(), *ff.inputs()))
        else:
            made = (*_products(y_BTD, heads.inputs()), *_products(ff_norm(x_BTD), ff.inputs()))
        a_BTH, cache = attend(heads, made[:3], positions, cache, cfg, window, keys.attention)
        out, ff_out = (a_BTH, heads.o(), "HD"), (ff.hidden(made[3:]), ff.out(), "FD")
        if mixed_BTD is None and (keys.after_ff is None or cfg.dropout_residual == 0):
            z_BTD = ff.add_bias(heads.add_bias(rows(out, ff_out)))
            return shard(x_BTD + z_BTD, "BTD"), cache
        a_BTD = dropped(heads.add_bias(rows(out)), key=keys.after_attention)
        if mixed_BTD is not None:
            a_BTD = jnp.concatenate((mixed_BTD, a_BTD), axis=-1)
        h_BTD = dropped(ff.add_bias(rows(ff_out)), key=keys.after_ff)
        return shard(x_BTD + a_BTD + h_BTD, "BTD"), cache


def _products(y_BTD: jax.Array, weights: tuple[Product, ...]) -> tuple[jax.Array, ...]:
    return tuple(checkpoint_name(product, PRODUCT) for product in columns(y_BTD, *weights))


def _mix(
    y_BTD: jax.Array, positions: Positions, cache: Cache | None
) -> tuple[jax.Array, Cache | None]:
    """Mix features with those of the tokens before them, which a cache keeps."""
    if cache is not None:
        cache = cache.append_mixed(y_BTD, positions.ids_BT)
        y_BTD = cache.mixed()
    return static_sgu(y_BTD, positions.ids_BT), cache


class FeedForward(NamedTuple):
    """The weights of a feed-forward layer: to hidden features, their gate if any, and back."""

    up: Matrix
    gate: Matrix | None
    out: Matrix
    config: ModelConfig

    @staticmethod
    def of(config: ModelConfig) -> FeedForward:
        spread, d_model, d_ff = stddevs(config), config.d_model, config.d_ff
        with hk.name_scope("ff"):
            up = Matrix(d_model, d_ff, spread.ff_in, name="in")
            gate = Matrix(d_model, d_ff, spread.ff_in, name="gate") if config.gated else None
            out = Matrix(d_ff, d_model, spread.ff_out, name="out")
            return FeedForward(up, gate, out, config)

    def inputs(self) -> tuple[Product, ...]:
        """Return what the layer's input is multiplied by."""
        return tuple((it(), "DF") for it in (self.up, self.gate) if it is not None)

    def hidden(self, products: tuple[jax.Array, ...]) -> jax.Array:
        """Return the hidden features `BTF` of the products with `inputs`."""
        act = ACTIVATIONS[self.config.activation]
        matrices = [it for it in (self.up, self.gate) if it is not None]
        made = [
            plus(x_BTF, it.bias()) if self.config.ff_bias else x_BTF
            for x_BTF, it in zip(products, matrices, strict=True)
        ]
        return shard(act(made[0]) if self.gate is None else made[0] * act(made[1]), "BTF")

    def add_bias(self, z_BTD: jax.Array) -> jax.Array:
        return plus(z_BTD, self.out.bias()) if self.config.ff_bias else z_BTD


class Heads(NamedTuple):
    """The weights of attention: to queries, keys and values, and back from what heads return."""

    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    q_norm: HeadNorm
    k_norm: HeadNorm
    config: ModelConfig

    @staticmethod
    def of(config: ModelConfig, name: str = "attention") -> Heads:
        d_attended, width = config.d_attended, config.n_heads * config.d_head
        spread = stddevs(config)
        kv_width = config.n_kv_heads * config.d_head
        with hk.name_scope(name):
            return Heads(
                Matrix(d_attended, width, spread.qkv, name="q"),
                Matrix(d_attended, kv_width, spread.qkv, name="k"),
                Matrix(d_attended, kv_width, spread.qkv, name="v"),
                Matrix(width, d_attended, spread.o, name="o"),
                HeadNorm(config, name="q_norm"),
                HeadNorm(config, name="k_norm"),
                config,
            )

    def inputs(self) -> tuple[Product, ...]:
        """Return what the layer's input is multiplied by."""
        kv = ((self._copied(it()), "DG") for it in (self.k, self.v))
        return ((self.q(), "DH"), *kv)

    def split(self, products: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries `BTHK`, keys and values `BTGK` of the products with `inputs`."""
        cfg = self.config
        q_BTH, k_BTG, v_BTG = products
        if cfg.qkv_bias:
            q_BTH = plus(q_BTH, self.q.bias())
            k_BTG = plus(k_BTG, self._copied(self.k.bias()))
            v_BTG = plus(v_BTG, self._copied(self.v.bias()))
        q_BTHK, k_BTGK, v_BTGK = (
            shard(x.reshape(*x.shape[:2], -1, cfg.d_head), dims)
            for x, dims in ((q_BTH, "BTHK"), (k_BTG, "BTGK"), (v_BTG, "BTGK"))
        )
        if cfg.qk_norm:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        return q_BTHK, k_BTGK, v_BTGK

    def _copied(self, x: jax.Array) -> jax.Array:
        """Repeat heads of keys or values, the last axis, where `mp` does not divide them."""
        cfg = self.config
        copies = n_kv_heads_held(cfg) // cfg.n_kv_heads
        if copies == 1:
            return x
        heads = x.reshape(*x.shape[:-1], cfg.n_kv_heads, cfg.d_head)
        return jnp.repeat(heads, copies, axis=-2).reshape(*x.shape[:-1], -1)

    def add_bias(self, z_BTD: jax.Array) -> jax.Array:
        return plus(z_BTD, self.o.bias()) if self.config.o_bias else z_BTD


@dataclasses.dataclass
class HeadNorm(hk.Module):
    """RMSNorm of each head's features, all heads by one scale (arXiv:2302.05442, Qwen3's form)."""

    config: ModelConfig
    name: str | None = None

    def __call__(self, x_BTHK: jax.Array) -> jax.Array:
        y_BTHK = mean_square_normalised(x_BTHK.astype(jnp.float32), self.config.norm_epsilon)
        scale_K = hk.get_parameter("scale", [self.config.d_head], init=jnp.ones)
        return (y_BTHK * scale_K).astype(x_BTHK.dtype)


def attend(
    heads: Heads,
    products: tuple[jax.Array, ...],
    positions: Positions,
    cache: Cache | None,
    config: ModelConfig,
    window: jax.Array | None,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Split heads, rotate, append to the cache if there is one, and attend; `BTH`."""
    q_BTHK, k_BTGK, v_BTGK = heads.split(products)
    if positions.cos_BTR is not None and positions.sin_BTR is not None:
        halves = config.pe == "rotary-half"
        q_BTHK, k_BTGK = (
            rotate(x, positions.cos_BTR, positions.sin_BTR, halves=halves) for x in (q_BTHK, k_BTGK)
        )
    if cache is not None:
        cache = cache.append(k_BTGK, v_BTGK, positions.ids_BT)
        k_BTGK, v_BTGK = cache.keys_and_values()
    y_BTHK = attention(
        *(q_BTHK, k_BTGK, v_BTGK, positions, config),
        cached=cache is not None,
        window=window,
        dropout_key=dropout_key,
    )
    y_BTH = shard(y_BTHK.reshape(*y_BTHK.shape[:2], -1), "BTH")
    return checkpoint_name(y_BTH, PRODUCT), cache


def _across(
    x_BTD: jax.Array,
    positions: Positions,
    cache: Cache | None,
    encoded: Encoded | None,
    cfg: ModelConfig,
) -> tuple[jax.Array, Cache | None]:
    """Attend to an encoder's output, or to what the cache keeps of it, and add the result."""
    heads, norm = Heads.of(cfg, "cross"), Norm(cfg, name="cross_norm")
    q_DH, *kv_DG = heads.inputs()
    (q_BTH,) = _products(norm(x_BTD), (q_DH,))
    if encoded is not None:
        k_BSG, v_BSG = (
            checkpoint_name(product, PRODUCT)
            for product in columns_of_copies(encoded.y_MBSD, *kv_DG)
        )
        seen_BS = encoded.seen_BS
        if cache is not None and cache.cross is not None:
            cache = cache._replace(cross=cache.cross.write(cache.layer, k_BSG, v_BSG))
    else:
        assert cache is not None and cache.cross is not None, "the caller has looked"
        k_BSG, v_BSG = cache.cross.read(cache.layer)
        seen_BS = cache.cross.seen_BS
    q_BTHK, k_BSGK, v_BSGK = heads.split((q_BTH, k_BSG, v_BSG))
    seen = Positions(positions.ids_BT, seen_BS=seen_BS)
    y_BTHK = attention(q_BTHK, k_BSGK, v_BSGK, seen, cfg, cached=True)
    y_BTH = checkpoint_name(shard(y_BTHK.reshape(*y_BTHK.shape[:2], -1), "BTH"), PRODUCT)
    a_BTD = heads.add_bias(rows((y_BTH, heads.o(), "HD")))
    return shard(x_BTD + a_BTD, "BTD"), cache
