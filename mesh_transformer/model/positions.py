"""Where tokens stand, and what follows from it: rotary angles, biases of attention, tables.

Slot s of the keys holds position s, in training and in the cache alike, so what depends on a
query's position and a slot's number needs nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.config import ModelConfig
from mesh_transformer.model import initial
from mesh_transformer.position_rules import YARN_TURNS
from mesh_transformer.sharding import shard


class Positions(NamedTuple):
    """Positions of the tokens fed; computed once, used by every layer.

    Attributes:
        ids_BT: int32 position of each token; B may be 1 where all sequences agree.
        cos_BTR: float32 cosine of the rotary angle of each pair of features, or None.
        sin_BTR: And its sine.
        bias_BHTS: float32 added to the attention logits, or None.
        seen_BS: bool, slots that every query sees; None: those up to its own position.
    """

    ids_BT: jax.Array
    cos_BTR: jax.Array | None = None
    sin_BTR: jax.Array | None = None
    bias_BHTS: jax.Array | None = None
    seen_BS: jax.Array | None = None


def positions_of(
    ids_BT: jax.Array, n_slots: int, config: ModelConfig, *, both_ways: bool = False
) -> Positions:
    """Return the positions, with the angles or the bias that the model's `pe` makes of them.

    Args:
        both_ways: Whether queries see slots after their own too, as an encoder's do.
    """
    if config.pe.startswith("rotary"):
        return Positions(ids_BT, *rotary(ids_BT, config))
    if config.pe == "t5":
        bias = RelativePositions(config, both_ways, name="relative_positions")
        return Positions(ids_BT, bias_BHTS=bias(ids_BT, jnp.arange(n_slots)))
    if config.pe == "alibi":
        return Positions(ids_BT, bias_BHTS=alibi(ids_BT, jnp.arange(n_slots), config.n_heads))
    return Positions(ids_BT)


def rotary(positions_BT: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Return cosine and sine, `BTR`, of position times frequency for each pair of features.

    In float32: bfloat16 rounds position 257 to 256, and the sine of the two is very different.
    """
    frequency_R, size = rotary_frequencies(
        config.pe_rotary_dims, config.pe_theta, config.pe_scaling, config.pe_scaling_factors
    )
    angles_BTR = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(frequency_R)
    return jnp.cos(angles_BTR) * size, jnp.sin(angles_BTR) * size


def rotary_frequencies(
    n_rotated: int, theta: float, scaling: str, factors: Mapping[str, float]
) -> tuple[np.ndarray, float]:
    """Return the angle per position of each pair, theta^(-2i / n_rotated), and the vectors' size.

    Rotary positions (arXiv:2104.09864). Stretched: "linear" divides positions (arXiv:2306.15595);
    "llama3" only frequencies with wavelengths beyond the trained length, with a ramp between
    (arXiv:2407.21783, the code of Llama 3.1); "yarn" those that turn less than `beta_slow` times in
    it, with a ramp up to `beta_fast` times, and makes queries and keys longer (arXiv:2309.00071).
    """
    frequency_R = theta ** (-np.arange(0, n_rotated, 2) / n_rotated)
    if scaling == "none":
        return frequency_R.astype(np.float32), 1.0
    factor = factors["factor"]
    if scaling == "linear":
        return (frequency_R / factor).astype(np.float32), 1.0
    trained = factors["original_max_position_embeddings"]
    if scaling == "llama3":
        low, high = factors["low_freq_factor"], factors["high_freq_factor"]
        turns_R = trained * frequency_R / (2 * np.pi)
        kept_R = np.clip((turns_R - low) / (high - low), 0, 1)
        size = 1.0
    else:
        kept_R = _kept_by_yarn(n_rotated, theta, trained, factors)
        size = factors.get("attention_factor", 0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    stretched_R = frequency_R / factor * (1 - kept_R) + frequency_R * kept_R
    return stretched_R.astype(np.float32), size


def _kept_by_yarn(
    n_rotated: int, theta: float, trained: float, factors: Mapping[str, float]
) -> np.ndarray:
    """Return how much of each pair's frequency YaRN keeps, from 1, of the fastest, down to 0."""

    def pair_that_turns(times: float) -> float:
        return n_rotated * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(theta))

    turns = {**YARN_TURNS, **factors}
    first = max(math.floor(pair_that_turns(turns["beta_fast"])), 0)
    last = min(math.ceil(pair_that_turns(turns["beta_slow"])), n_rotated - 1)
    ramp_R = (np.arange(n_rotated // 2) - first) / max(last - first, 1e-3)
    return 1 - np.clip(ramp_R, 0, 1)


def rotate(x_BTHK: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array, *, halves: bool) -> jax.Array:
    """Rotate the first 2 R features of each head in pairs; the remaining ones pass unchanged.

    Args:
        halves: Whether feature i is paired with i + R, as GPT-NeoX has it, or i is even and paired
            with i + 1, as the paper and GPT-J do.
    """
    n_rotated = 2 * cos_BTR.shape[-1]
    cos_BTHR, sin_BTHR = cos_BTR[:, :, None, :], sin_BTR[:, :, None, :]
    turned = x_BTHK[..., :n_rotated].astype(jnp.float32)
    if halves:
        a, b = jnp.split(turned, 2, -1)
    else:
        pairs = turned.reshape(*turned.shape[:-1], -1, 2)
        a, b = pairs[..., 0], pairs[..., 1]
    turned_pair = (a * cos_BTHR - b * sin_BTHR, b * cos_BTHR + a * sin_BTHR)
    rotated = jnp.concatenate(turned_pair, -1) if halves else jnp.stack(turned_pair, -1)
    rotated_BTHK = rotated.reshape(*x_BTHK.shape[:-1], n_rotated).astype(x_BTHK.dtype)
    return jnp.concatenate((rotated_BTHK, x_BTHK[..., n_rotated:]), axis=-1)


def alibi_slopes(n_heads: int) -> np.ndarray:
    """Return ALiBi's slope of each head (arXiv:2108.12409), for any number of heads.

    Of n heads, a power of two, head h has 2^(-8 (h + 1) / n). Other numbers take those of the next
    lower power of two, then every other one of the next higher.
    """
    n = 2 ** int(math.log2(n_heads))
    slopes = 2.0 ** (-8 * np.arange(1, n + 1) / n)
    between = 2.0 ** (-4 * np.arange(1, 2 * n + 1, 2) / n)
    return np.concatenate((slopes, between))[:n_heads].astype(np.float32)


def alibi(positions_BT: jax.Array, slots_S: jax.Array, n_heads: int) -> jax.Array:
    """Return ALiBi's bias: minus the distance from slot to query, times the head's slope."""
    distance_BTS = positions_BT[:, :, None] - slots_S
    slopes_H11 = jnp.asarray(alibi_slopes(n_heads))[:, None, None]
    return shard(-slopes_H11 * distance_BTS[:, None].astype(jnp.float32), "BHTS")


def sinusoidal(positions_BT: jax.Array, d_model: int) -> jax.Array:
    """Return the sines and cosines, interleaved, of arXiv:1706.03762, `BTD` in float32."""
    frequency_R = 10_000.0 ** (-np.arange(0, d_model, 2) / d_model)
    angles_BTR = positions_BT[..., None].astype(jnp.float32) * frequency_R.astype(np.float32)
    pairs = jnp.stack((jnp.sin(angles_BTR), jnp.cos(angles_BTR)), -1)
    return pairs.reshape(*positions_BT.shape, -1)[..., :d_model]


@dataclasses.dataclass
class LearnedPositions(hk.Module):
    """One learned vector per position (`pe: fixed`), added to the token embeddings."""

    config: ModelConfig
    name: str | None = None

    def __call__(self, positions_BT: jax.Array) -> jax.Array:
        cfg = self.config
        table_TD = hk.get_parameter(
            "embeddings",
            [cfg.seq + cfg.pe_offset, cfg.d_model],
            init=hk.initializers.TruncatedNormal(stddev=initial.POSITIONS),
        )
        return table_TD[positions_BT + cfg.pe_offset]


@dataclasses.dataclass
class RelativePositions(hk.Module):
    """T5's learned bias per head and bucket of distance (`pe: t5`), shared by all layers.

    arXiv:1910.10683. Of n buckets the first n / 2 hold one distance each, the others grow
    logarithmically up to `pe_max_distance`. Looking both ways, slots after the query have the
    second half of all buckets to themselves; else they share the bucket of distance 0.
    """

    config: ModelConfig
    both_ways: bool = False
    name: str | None = None

    def __call__(self, positions_BT: jax.Array, slots_S: jax.Array) -> jax.Array:
        cfg = self.config
        table_HR = hk.get_parameter(
            "embeddings",
            [cfg.n_heads, cfg.pe_buckets],
            init=hk.initializers.TruncatedNormal(stddev=initial.POSITIONS),
        )
        behind_BTS = positions_BT[:, :, None] - slots_S
        n_buckets = cfg.pe_buckets // 2 if self.both_ways else cfg.pe_buckets
        distance_BTS = jnp.abs(behind_BTS) if self.both_ways else jnp.maximum(behind_BTS, 0)
        exact = n_buckets // 2
        ratio_BTS = jnp.log(jnp.maximum(distance_BTS, 1) / exact)
        grown_BTS = ratio_BTS / math.log(cfg.pe_max_distance / exact) * (n_buckets - exact)
        far_BTS = jnp.minimum(exact + grown_BTS.astype(jnp.int32), n_buckets - 1)
        bucket_BTS = jnp.where(distance_BTS < exact, distance_BTS, far_BTS)
        if self.both_ways:
            bucket_BTS += jnp.where(behind_BTS < 0, n_buckets, 0)
        bias_HBTS = table_HR.astype(jnp.float32)[:, bucket_BTS]
        return shard(bias_HBTS.swapaxes(0, 1), "BHTS")
