"""Attention: one function, with an implementation for each platform, and the key-value cache.

Slot s of the keys holds position s, in training and in the cache alike, so one rule says what a
query sees: the slots up to its own position, or the last of these within a window. Sequences of
different lengths share a batch by padding on the right; a padded slot lies beyond every real
position until it is overwritten.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mesh_transformer.config import ModelConfig
from mesh_transformer.errors import UserError
from mesh_transformer.model.dropout import dropout
from mesh_transformer.model.positions import Positions
from mesh_transformer.network_rules import is_windowed
from mesh_transformer.sharding import axis_size, over_mp, shard

Implementation = Literal["xla", "cudnn", "splash"]


class Cache(NamedTuple):
    """Keys (already rotated) and values of all layers, written in place, one slot per position.

    Attributes:
        k_LBSGK: Keys in the compute dtype.
        v_LBSGK: Values in the compute dtype.
        layer: int32, the layer that reads and writes now.
        y_LBSD: Normed features that `use_static_sgu` mixes, or None.
        key_BSK: Keys of `head_qk_trick`, or None.
        tokens_BS: int32, the tokens that they point at, or None.
        cross: What all layers make of an encoder's output, or None.
    """

    k_LBSGK: jax.Array
    v_LBSGK: jax.Array
    layer: jax.Array
    y_LBSD: jax.Array | None = None
    key_BSK: jax.Array | None = None
    tokens_BS: jax.Array | None = None
    cross: CrossCache | None = None

    def append(self, k_BTGK: jax.Array, v_BTGK: jax.Array, positions_BT: jax.Array) -> Cache:
        """Write this layer's keys and values of the given tokens into their slots."""
        k_LBSGK, v_LBSGK = (
            _written(stack, self.layer, new_BTGK, positions_BT)
            for stack, new_BTGK in ((self.k_LBSGK, k_BTGK), (self.v_LBSGK, v_BTGK))
        )
        return self._replace(k_LBSGK=k_LBSGK, v_LBSGK=v_LBSGK)

    def append_mixed(self, y_BTD: jax.Array, positions_BT: jax.Array) -> Cache:
        """Write this layer's features of the given tokens, for `use_static_sgu`."""
        assert self.y_LBSD is not None
        return self._replace(y_LBSD=_written(self.y_LBSD, self.layer, y_BTD, positions_BT))

    def mixed(self) -> jax.Array:
        """Return this layer's features, `BSD`."""
        assert self.y_LBSD is not None
        y_BSD = jax.lax.dynamic_index_in_dim(self.y_LBSD, self.layer, keepdims=False)
        return shard(y_BSD, "BSD")

    def append_pointed(
        self, key_BTK: jax.Array, tokens_BT: jax.Array, positions_BT: jax.Array
    ) -> Cache:
        """Write the given tokens and their keys, for `head_qk_trick`."""
        assert self.key_BSK is not None and self.tokens_BS is not None
        key_1BSK, tokens_1BS = (
            _written(stack[None], jnp.int32(0), new, positions_BT)
            for stack, new in ((self.key_BSK, key_BTK), (self.tokens_BS, tokens_BT))
        )
        return self._replace(key_BSK=key_1BSK[0], tokens_BS=tokens_1BS[0])

    def pointed(self) -> tuple[jax.Array, jax.Array]:
        """Return keys `BSK` and tokens `BS`."""
        assert self.key_BSK is not None and self.tokens_BS is not None
        return shard(self.key_BSK, "BSK"), shard(self.tokens_BS, "BS")

    def keys_and_values(self) -> tuple[jax.Array, jax.Array]:
        """Return this layer's keys and values, `BSGK` each."""
        k_BSGK, v_BSGK = (
            jax.lax.dynamic_index_in_dim(stack, self.layer, keepdims=False)
            for stack in (self.k_LBSGK, self.v_LBSGK)
        )
        return shard(k_BSGK, "BSGK"), shard(v_BSGK, "BSGK")


def _written(
    stack: jax.Array, layer: jax.Array, new: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """Write what is new of one layer, `BT` and more, into its slots of a stack, `LBS` and more."""
    slots_BT = jnp.broadcast_to(positions_BT, new.shape[:2])
    at_BT2 = jnp.stack((jnp.full_like(slots_BT, layer), slots_BT), axis=-1)
    # B as a batch of the scatter, not an index: so it stays spread over `dp`.
    dims = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(2, new.ndim)),
        inserted_window_dims=(0, 2),
        scatter_dims_to_operand_dims=(0, 2),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(stack, at_BT2, new.astype(stack.dtype), dims, mode="drop")


class CrossCache(NamedTuple):
    """Products of an encoder's output with each layer's keys and values: written once, then read.

    Attributes:
        k_LBSG: In the compute dtype.
        v_LBSG: In the compute dtype.
        seen_BS: bool, whether a slot holds a token, not padding.
    """

    k_LBSG: jax.Array
    v_LBSG: jax.Array
    seen_BS: jax.Array

    def write(self, layer: jax.Array, k_BSG: jax.Array, v_BSG: jax.Array) -> CrossCache:
        """Keep a layer's products."""
        k_LBSG, v_LBSG = (
            jax.lax.dynamic_update_index_in_dim(stack, new_BSG, layer, 0)
            for stack, new_BSG in ((self.k_LBSG, k_BSG), (self.v_LBSG, v_BSG))
        )
        return self._replace(k_LBSG=k_LBSG, v_LBSG=v_LBSG)

    def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return a layer's products, `BSG` each."""
        k_BSG, v_BSG = (
            jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
            for stack in (self.k_LBSG, self.v_LBSG)
        )
        return shard(k_BSG, "BSG"), shard(v_BSG, "BSG")


def n_kv_heads_held(config: ModelConfig) -> int:
    """Return heads of keys and values in use: copies of each where `mp` does not divide them.

    Each device then has those that its query heads read, as Megatron-LM has it.
    """
    return math.lcm(config.n_kv_heads, axis_size("mp"))


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    positions: Positions,
    config: ModelConfig,
    *,
    cached: bool,
    window: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Let each query attend to the slots up to its position, or `seen_BS`; softmax in float32.

    Query head h reads head h G / H of the keys and values, of which G divides H.

    Args:
        config: Its `attention` is one that `implementation_for` returned.
        cached: Whether keys and values come from a cache; otherwise query t stands at slot t, and
            a fused kernel can be used.
        window: int32, how many slots a query sees, itself the last; all if None. Fused kernels
            serve whole sequences of a multiple of 128 tokens without a bias or a window; anything
            else is left to XLA.
        dropout_key: Of the weights that `dropout_attention` drops; none are if None.
    """
    special = positions.bias_BHTS is not None or positions.seen_BS is not None
    special |= window is not None
    scale = config.attention_scale
    if config.attention == "xla" or cached or special or q_BTHK.shape[1] % 128:
        rate = config.dropout_attention
        drop = functools.partial(dropout, dims="BHTS", rate=rate, key=dropout_key)
        return plain(q_BTHK, k_BSGK, v_BSGK, positions, scale, window, drop)
    kernel = functools.partial({"cudnn": cudnn, "splash": splash}[config.attention], scale=scale)
    return over_mp(kernel, ("BTHK", "BSGK", "BSGK"), "BTHK")(q_BTHK, k_BSGK, v_BSGK)


def plain(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    positions: Positions,
    scale: float,
    window: jax.Array | None = None,
    drop: Callable[[jax.Array], jax.Array] = lambda weights_BHTS: weights_BHTS,
) -> jax.Array:
    """Attention in XLA operations: on every platform, for any positions, with a bias or not.

    Values are weighed by exponentials and their sum is divided by that of the weights, as in
    FlashAttention (arXiv:2205.14135): one division per feature instead of one per slot, and a
    backward pass that sums over features, not slots; what `drop` leaves out of the weights stays in
    their sum. Heads stand before tokens, as products want;
    queries of heads that share keys stand one after the other, as more tokens of one head.
    """
    q_BHTK, k_BGSK, v_BGSK = (x.swapaxes(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
    shape_BHTK, shape_BHTS = q_BHTK.shape, (*q_BHTK.shape[:3], k_BGSK.shape[2])
    grouped = (*k_BGSK.shape[:2], -1)  # B G, and for T all tokens of a group's heads
    q_BGTK = q_BHTK.reshape(*grouped, shape_BHTK[-1])
    logits_BHTS = scale * _by_head(q_BGTK, k_BGSK.mT).reshape(shape_BHTS)
    if positions.bias_BHTS is not None:
        logits_BHTS = logits_BHTS + positions.bias_BHTS
    slots_S, ids_BT1 = jnp.arange(k_BGSK.shape[2]), positions.ids_BT[:, :, None]
    seen_BS = positions.seen_BS
    seen_BTS = slots_S <= ids_BT1 if seen_BS is None else seen_BS[:, None]
    if window is not None:
        seen_BTS &= slots_S > ids_BT1 - window
    logits_BHTS = jnp.where(seen_BTS[:, None], logits_BHTS, -1e10)
    max_BHT1 = jax.lax.stop_gradient(logits_BHTS.max(-1, keepdims=True))
    weights_BHTS = jnp.exp(logits_BHTS - max_BHT1)
    kept_BGTS = drop(weights_BHTS).astype(v_BGSK.dtype).reshape(*grouped, shape_BHTS[-1])
    y_BHTK = _by_head(kept_BGTS, v_BGSK).reshape(shape_BHTK)
    y_BHTK = y_BHTK / weights_BHTS.sum(-1, keepdims=True)
    return y_BHTK.swapaxes(1, 2).astype(v_BSGK.dtype)


@jax.custom_vjp
def _by_head(left: jax.Array, right: jax.Array) -> jax.Array:
    """Multiply the matrices of each head, factors of one dtype, summing in float32.

    Backward the gradient is rounded to the factors' dtype, so that all products are of that dtype:
    of 16 bits and 32, they would be made in 32, without the units that are there for 16.

    Args:
        left, right: `BGTK` and `BGKS`, or `BGTS` and `BGSK`.

    Returns:
        `BGTS` or `BGTK`, float32.
    """
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def _by_head_backward(
    factors: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    left, right = factors
    gradient = gradient.astype(left.dtype)
    left_gradient, right_gradient = _by_head(gradient, right.mT), _by_head(left.mT, gradient)
    return left_gradient.astype(left.dtype), right_gradient.astype(right.dtype)


_by_head.defvjp(lambda left, right: (_by_head(left, right), (left, right)), _by_head_backward)


def cudnn(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, scale: float) -> jax.Array:
    """Causal attention by cuDNN's fused kernel (NVIDIA GPUs, 16-bit floats)."""
    return jax.nn.dot_product_attention(
        q_BTHK, k_BTGK, v_BTGK, scale=scale, is_causal=True, implementation="cudnn"
    )


def splash(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, scale: float) -> jax.Array:
    """Causal attention by JAX's splash kernel (TPU v4 and newer): no T x T logits in memory."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    length, n_heads = q_BTHK.shape[1:3]
    mask = kernels.MultiHeadMask([kernels.CausalMask((length, length))] * n_heads)
    attend = kernels.make_splash_mha(mask, head_shards=1, q_seq_shards=1)
    k_BTHK, v_BTHK = (jnp.repeat(x, n_heads // x.shape[2], axis=2) for x in (k_BTGK, v_BTGK))
    q_BHTK, k_BHTK, v_BHTK = (x.swapaxes(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    # The kernel has no scale: a factor in float32, and one rounding, none for a power of two.
    scaled_BHTK = (q_BHTK.astype(jnp.float32) * scale).astype(q_BHTK.dtype)
    return jax.vmap(attend)(scaled_BHTK, k_BHTK, v_BHTK).swapaxes(1, 2)


def implementation_for(config: ModelConfig, device: jax.Device) -> Implementation:
    """Return the attention implementation that runs this model on this kind of device.

    Raises:
        UserError: The configuration forces one that cannot run there; every reason is named.
    """
    has_bias = (config.pe in ("t5", "alibi"), f"it takes no bias, which pe {config.pe} adds")
    has_window = (
        is_windowed(config.window, config.seq),
        f"it sees all slots before a query, not {config.window}",
    )
    has_dropout = (
        config.dropout_attention > 0,
        f"it drops no weights, and dropout_attention is {config.dropout_attention}",
    )
    whole = (config.seq % 128 != 0, f"it needs seq a multiple of 128, seq is {config.seq}")
    is_v4_or_newer = not any(old in device.device_kind for old in ("v2", "v3"))
    widest = _widest_cudnn_head(device)
    obstacles: dict[Implementation, list[tuple[bool, str]]] = {
        "xla": [],
        "cudnn": [
            (widest == 0, f"it needs an NVIDIA GPU from Ampere on, this is {device.device_kind}"),
            (config.compute_dtype != "bfloat16", 'it needs "compute_dtype": "bfloat16"'),
            (
                config.d_head % 8 != 0 or config.d_head > (widest or 256),
                f"it needs d_head a multiple of 8 up to {widest or 256}, it is {config.d_head}",
            ),
            whole,
            has_bias,
            has_window,
            has_dropout,
        ],
        "splash": [
            (
                device.platform != "tpu" or not is_v4_or_newer,
                f"it needs a TPU v4 or newer, this is {device.device_kind}",
            ),
            whole,
            (config.d_head % 128 != 0, f"it needs d_head a multiple of 128, it is {config.d_head}"),
            has_bias,
            has_window,
            has_dropout,
        ],
    }
    reasons = {name: [why for no, why in found if no] for name, found in obstacles.items()}
    if config.attention == "auto":
        return next(name for name in ("cudnn", "splash", "xla") if not reasons[name])
    if why := reasons[config.attention]:
        raise UserError(
            f'"attention": "{config.attention}" cannot be used: {"; ".join(why)}; '
            'set "attention" to "auto" or "xla"'
        )
    return config.attention


def _widest_cudnn_head(device: jax.Device) -> int:
    """Return the largest `d_head` that cuDNN's attention takes on a device; 0 if it has none.

    As jax.nn.dot_product_attention checks it: 128, and 256 from Hopper on.
    """
    generation = str(getattr(device, "compute_capability", "")).partition(".")[0]
    if device.platform != "gpu" or not generation.isdecimal() or int(generation) < 8:
        return 0
    return 256 if int(generation) >= 9 else 128
