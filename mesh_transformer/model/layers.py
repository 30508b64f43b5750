"""The parts of a decoder: norms, position encodings, attention heads, feed-forward, block.

Modules take positions and cache as arguments and infer nothing from lengths; every module that
may change the cache returns it. Weights are made under explicit names, which checkpoints keep.
Initial values and formulas are those of mesh-transformer-jax, the program that trained GPT-J-6B.
"""

from __future__ import annotations

import dataclasses
import math

import haiku as hk
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.attention import Cache, Positions, attention
from mesh_transformer.sharding import columns, lookup, rows, shard

PRODUCT = "product"
"""Names, for rematerialisation, what is dear to compute again: products and attention."""

ROTARY_BASE = 10_000.0
T5_BUCKETS = 32
T5_MAX_DISTANCE = 128


@dataclasses.dataclass
class Norm(hk.Module):
    """Normalise features, in float32, to the input's dtype.

    `layernorm` (arXiv:1607.06450), with epsilon 1e-5 inside the root; `layernorm-nobias` has no
    offset. `rmsnorm` and `scalenorm` (arXiv:1910.05895) divide by the length of the vector plus
    1e-5 and multiply by a scale that starts at sqrt(D), a vector for the one, a number for the
    other; the `-bias` forms add an offset of the same shape.
    """

    config: ModelConfig
    name: str | None = None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        kind, d_model = self.config.norm, self.config.d_model
        y_BTD = x_BTD.astype(jnp.float32)
        if kind.startswith("layernorm"):
            y_BTD = y_BTD - y_BTD.mean(-1, keepdims=True)
            y_BTD = y_BTD * jax.lax.rsqrt(jnp.square(y_BTD).mean(-1, keepdims=True) + 1e-5)
            shape, scale, offset, start = [d_model], "scale", "offset", 1.0
            has_offset = kind != "layernorm-nobias"
        else:
            length = jnp.sqrt(jnp.square(y_BTD).sum(-1, keepdims=True))
            y_BTD = y_BTD / (length + 1e-5)
            vector = kind.startswith("rmsnorm")
            shape = [d_model] if vector else []
            scale, offset = ("scale", "offset") if vector else ("gain", "shift")
            start, has_offset = math.sqrt(d_model), kind.endswith("-bias")
        y_BTD = y_BTD * hk.get_parameter(scale, shape, init=hk.initializers.Constant(start))
        if has_offset:
            y_BTD = y_BTD + hk.get_parameter(offset, shape, init=jnp.zeros)
        return y_BTD.astype(x_BTD.dtype)


@dataclasses.dataclass
class Matrix(hk.Module):
    """A weight `[n_in, n_out]`, truncated normal, and its bias; `columns` and `rows` multiply."""

    n_in: int
    n_out: int
    stddev: float
    name: str | None = None

    def __call__(self) -> jax.Array:
        init = hk.initializers.TruncatedNormal(stddev=self.stddev)
        return hk.get_parameter("w", [self.n_in, self.n_out], init=init)

    def bias(self, dtype: jnp.dtype) -> jax.Array:
        """Return the bias `[n_out]` that goes with the weight; it starts at 0."""
        return hk.get_parameter("b", [self.n_out], init=jnp.zeros).astype(dtype)


@dataclasses.dataclass
class Block(hk.Module):
    """GPT-J's parallel residual: `x + Attention(Norm(x)) + FeedForward(Norm(x))`, one norm.

    Both branches read one input and add into one output, so the block needs one all-reduce over
    `mp` forward and one backward. GELU is the tanh approximation (Hugging Face's `gelu_new`).
    """

    config: ModelConfig
    name: str | None = None

    def __call__(
        self, x_BTD: jax.Array, positions: Positions, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        cfg = self.config
        width, read_stddev = cfg.n_heads * cfg.d_head, cfg.d_model**-0.5
        write_stddev = 2 / cfg.layers / math.sqrt(cfg.d_model)
        with hk.name_scope("attention"):
            q, k, v = (Matrix(cfg.d_model, width, read_stddev, name=name) for name in "qkv")
            o = Matrix(width, cfg.d_model, write_stddev, name="o")
        with hk.name_scope("ff"):
            ff_in = Matrix(cfg.d_model, cfg.d_ff, read_stddev, name="in")
            ff_out = Matrix(cfg.d_ff, cfg.d_model, write_stddev, name="out")

        y_BTD = Norm(cfg, name="norm")(x_BTD)
        q_BTH, k_BTH, v_BTH, h_BTF = (
            checkpoint_name(product, PRODUCT)
            for product in columns(y_BTD, (q(), "DH"), (k(), "DH"), (v(), "DH"), (ff_in(), "DF"))
        )
        a_BTH, cache = attend(q_BTH, k_BTH, v_BTH, positions, cache, cfg)
        a_BTH = checkpoint_name(a_BTH, PRODUCT)
        h_BTF = shard(jax.nn.gelu(h_BTF + ff_in.bias(h_BTF.dtype)), "BTF")
        z_BTD = rows((a_BTH, o(), "HD"), (h_BTF, ff_out(), "FD"))
        return shard(x_BTD + z_BTD + ff_out.bias(z_BTD.dtype), "BTD"), cache


def attend(
    q_BTH: jax.Array,
    k_BTH: jax.Array,
    v_BTH: jax.Array,
    positions: Positions,
    cache: Cache | None,
    config: ModelConfig,
) -> tuple[jax.Array, Cache | None]:
    """Split heads, rotate, append to the cache if there is one, and attend."""
    q_BTHK, k_BTHK, v_BTHK = (
        shard(x.reshape(*x.shape[:2], config.n_heads, config.d_head), "BTHK")
        for x in (q_BTH, k_BTH, v_BTH)
    )
    if positions.angles_BTR is not None:
        q_BTHK, k_BTHK = (rotate(x, positions.angles_BTR) for x in (q_BTHK, k_BTHK))
    if cache is not None:
        cache = cache.append(k_BTHK, v_BTHK, positions.ids_BT)
        k_BTHK, v_BTHK = cache.keys_and_values()
    y_BTHK = attention(
        q_BTHK,
        k_BTHK,
        v_BTHK,
        positions,
        cached=cache is not None,
        implementation=config.attention,
    )
    return shard(y_BTHK.reshape(q_BTH.shape), "BTH"), cache


def rotary_angles(positions_BT: jax.Array, n_rotated: int) -> jax.Array:
    """Return the angle of each pair of features: position times 10000^(-2i / n_rotated).

    In float32: bfloat16 rounds position 257 to 256, and the sine of the two is very different.
    """
    frequency_R = ROTARY_BASE ** (-jnp.arange(0, n_rotated, 2, dtype=jnp.float32) / n_rotated)
    return positions_BT[..., None].astype(jnp.float32) * frequency_R


def rotate(x_BTHK: jax.Array, angles_BTR: jax.Array) -> jax.Array:
    """Rotate the first 2 R features of each head, in interleaved pairs, by their angles.

    Rotary positions (arXiv:2104.09864); the remaining features pass unchanged.
    """
    n_rotated = 2 * angles_BTR.shape[-1]
    cos_BTHR, sin_BTHR = (f(angles_BTR)[:, :, None, :] for f in (jnp.cos, jnp.sin))
    pairs = x_BTHK[..., :n_rotated].astype(jnp.float32)
    pairs = pairs.reshape(*pairs.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack((even * cos_BTHR - odd * sin_BTHR, odd * cos_BTHR + even * sin_BTHR), -1)
    rotated_BTHK = rotated.reshape(*x_BTHK.shape[:-1], n_rotated).astype(x_BTHK.dtype)
    return jnp.concatenate((rotated_BTHK, x_BTHK[..., n_rotated:]), axis=-1)


@dataclasses.dataclass
class Embed(hk.Module):
    """Token embeddings `[V, D]`, split over `mp` by V, and the original's one bias `[D]`."""

    config: ModelConfig
    name: str | None = None

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        cfg = self.config
        init = hk.initializers.TruncatedNormal(stddev=cfg.n_vocab**-0.5)
        table_VD = hk.get_parameter("embeddings", [cfg.n_vocab, cfg.d_model], init=init)
        b_D = hk.get_parameter("b", [cfg.d_model], init=jnp.zeros)
        # Added in float32, for the sake of the bias's gradient: a sum over all tokens.
        return shard((lookup(table_VD, tokens_BT) + b_D).astype(table_VD.dtype), "BTD")


@dataclasses.dataclass
class LearnedPositions(hk.Module):
    """One learned vector per position (`pe: fixed`), added to the token embeddings."""

    config: ModelConfig
    name: str | None = None

    def __call__(self, positions_BT: jax.Array) -> jax.Array:
        shape = [self.config.seq, self.config.d_model]
        table_TD = hk.get_parameter(
            "embeddings", shape, init=hk.initializers.TruncatedNormal(stddev=0.02)
        )
        return table_TD[positions_BT]


@dataclasses.dataclass
class RelativePositions(hk.Module):
    """T5's learned bias per head and bucket of distance (`pe: t5`), shared by all layers.

    arXiv:1910.10683, unidirectional: the first 16 of 32 buckets hold one distance each, the
    others grow logarithmically up to 128.
    """

    config: ModelConfig
    name: str | None = None

    def __call__(self, positions_BT: jax.Array, slots_S: jax.Array) -> jax.Array:
        table_HR = hk.get_parameter(
            "embeddings",
            [self.config.n_heads, T5_BUCKETS],
            init=hk.initializers.TruncatedNormal(stddev=0.02),
        )
        distance_BTS = jnp.maximum(positions_BT[:, :, None] - slots_S, 0)
        exact = T5_BUCKETS // 2
        ratio_BTS = jnp.log(jnp.maximum(distance_BTS, 1) / exact)
        grown_BTS = ratio_BTS / math.log(T5_MAX_DISTANCE / exact) * (T5_BUCKETS - exact)
        far_BTS = jnp.minimum(exact + grown_BTS.astype(jnp.int32), T5_BUCKETS - 1)
        bucket_BTS = jnp.where(distance_BTS < exact, distance_BTS, far_BTS)
        bias_HBTS = table_HR.astype(jnp.float32)[:, bucket_BTS]
        return shard(bias_HBTS.swapaxes(0, 1), "BHTS")


@dataclasses.dataclass
class Unembed(hk.Module):
    """The untied head `[D, V]` and its bias, split over `mp` by V; `logits` applies them."""

    config: ModelConfig
    name: str | None = None

    def __call__(self) -> tuple[jax.Array, jax.Array]:
        cfg = self.config
        init = hk.initializers.TruncatedNormal(stddev=cfg.d_model**-0.5)
        w_DV = hk.get_parameter("w", [cfg.d_model, cfg.n_vocab], init=init)
        return w_DV, hk.get_parameter("b", [cfg.n_vocab], init=jnp.zeros)


def logits(x_BTD: jax.Array, w_DV: jax.Array, b_V: jax.Array) -> jax.Array:
    """Return float32 logits, split over `mp` by V."""
    (logits_BTV,) = columns(x_BTD, (w_DV, "DV"), dtype=jnp.float32)
    return shard(logits_BTV + b_V.astype(jnp.float32), "BTV")
