"""Attention: one function, with an implementation for each platform, and the key-value cache.

Slot s of the keys holds position s, in training and in the cache alike, so one rule says what a
query sees: the slots up to its own position. Sequences of different lengths share a batch by
padding on the right; a padded slot lies beyond every real position until it is overwritten.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mesh_transformer.config import ModelConfig
from mesh_transformer.errors import UserError
from mesh_transformer.sharding import over_mp, shard

Implementation = Literal["xla", "cudnn", "splash"]


class Positions(NamedTuple):
    """Where the tokens stand, and what follows from it; computed once, used by every layer.

    Attributes:
        ids_BT: int32 position of each token; B may be 1 where all sequences agree.
        angles_BTR: float32 rotary angle of each rotated pair of features, or None.
        bias_BHTS: float32 added to the attention logits, or None.
    """

    ids_BT: jax.Array
    angles_BTR: jax.Array | None = None
    bias_BHTS: jax.Array | None = None


class Cache(NamedTuple):
    """Keys (already rotated) and values of all layers, written in place, one slot per position.

    Attributes:
        k_LBSHK: Keys in the compute dtype.
        v_LBSHK: Values in the compute dtype.
        layer: int32, the layer that reads and writes now.
    """

    k_LBSHK: jax.Array
    v_LBSHK: jax.Array
    layer: jax.Array

    def append(self, k_BTHK: jax.Array, v_BTHK: jax.Array, positions_BT: jax.Array) -> Cache:
        """Write this layer's keys and values of the given tokens into their slots."""
        slots_BT = jnp.broadcast_to(positions_BT, k_BTHK.shape[:2])
        at_BT2 = jnp.stack((jnp.full_like(slots_BT, self.layer), slots_BT), axis=-1)
        # B as a batch of the scatter, not an index: so it stays spread over `dp`.
        dims = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(2, 3),
            inserted_window_dims=(0, 2),
            scatter_dims_to_operand_dims=(0, 2),
            operand_batching_dims=(1,),
            scatter_indices_batching_dims=(0,),
        )
        k_LBSHK, v_LBSHK = (
            jax.lax.scatter(stack, at_BT2, new_BTHK, dims, mode="drop")
            for stack, new_BTHK in ((self.k_LBSHK, k_BTHK), (self.v_LBSHK, v_BTHK))
        )
        return Cache(k_LBSHK, v_LBSHK, self.layer)

    def keys_and_values(self) -> tuple[jax.Array, jax.Array]:
        """Return this layer's keys and values, `BSHK` each."""
        k_BSHK, v_BSHK = (
            jax.lax.dynamic_index_in_dim(stack, self.layer, keepdims=False)
            for stack in (self.k_LBSHK, self.v_LBSHK)
        )
        return shard(k_BSHK, "BSHK"), shard(v_BSHK, "BSHK")


def attention(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    positions: Positions,
    *,
    cached: bool,
    implementation: str,
) -> jax.Array:
    """Let each query attend to the slots up to its position; softmax in float32.

    Args:
        cached: Whether keys and values come from a cache; otherwise query t stands at slot t, and
            a fused kernel can be used.
        implementation: As `implementation_for` returns it. Fused kernels serve whole sequences of a
            multiple of 128 tokens without a bias; anything else is left to XLA.
    """
    fusible = not cached and positions.bias_BHTS is None and q_BTHK.shape[1] % 128 == 0
    if implementation == "xla" or not fusible:
        return plain(q_BTHK, k_BSHK, v_BSHK, positions)
    kernel = {"cudnn": cudnn, "splash": splash}[implementation]
    return over_mp(kernel, ("BTHK", "BSHK", "BSHK"), "BTHK")(q_BTHK, k_BSHK, v_BSHK)


def plain(
    q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, positions: Positions
) -> jax.Array:
    """Attention in XLA operations: on every platform, for any positions, with a bias or not.

    Values are weighed by exponentials and their sum is divided by that of the weights, as in
    FlashAttention (arXiv:2205.14135): one division per feature instead of one per slot, and a
    backward pass that sums over features, not slots. Heads stand before tokens, as products want.
    """
    q_BHTK, k_BHSK, v_BHSK = (x.swapaxes(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    q_BHTK = q_BHTK * jnp.asarray(q_BHTK.shape[-1] ** -0.5, q_BHTK.dtype)
    logits_BHTS = jnp.einsum("bhtk,bhsk->bhts", q_BHTK, k_BHSK, preferred_element_type=jnp.float32)
    if positions.bias_BHTS is not None:
        logits_BHTS = logits_BHTS + positions.bias_BHTS
    slots_S = jnp.arange(k_BHSK.shape[2])
    seen_BTS = slots_S <= positions.ids_BT[:, :, None]
    logits_BHTS = jnp.where(seen_BTS[:, None], logits_BHTS, -1e10)
    max_BHT1 = jax.lax.stop_gradient(logits_BHTS.max(-1, keepdims=True))
    weights_BHTS = jnp.exp(logits_BHTS - max_BHT1)
    y_BHTK = jnp.einsum(
        "bhts,bhsk->bhtk",
        weights_BHTS.astype(v_BHSK.dtype),
        v_BHSK,
        preferred_element_type=jnp.float32,
    )
    y_BHTK = y_BHTK / weights_BHTS.sum(-1, keepdims=True)
    return y_BHTK.swapaxes(1, 2).astype(v_BSHK.dtype)


def cudnn(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array) -> jax.Array:
    """Causal attention by cuDNN's fused kernel (NVIDIA GPUs, 16-bit floats)."""
    return jax.nn.dot_product_attention(
        q_BTHK, k_BTHK, v_BTHK, is_causal=True, implementation="cudnn"
    )


def splash(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array) -> jax.Array:
    """Causal attention by JAX's splash kernel (TPU v4 and newer): no T x T logits in memory."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    length, n_heads, d_head = q_BTHK.shape[1:]
    mask = kernels.MultiHeadMask([kernels.CausalMask((length, length))] * n_heads)
    attend = kernels.make_splash_mha(mask, head_shards=1, q_seq_shards=1)
    q_BHTK, k_BHTK, v_BHTK = (x.swapaxes(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    return jax.vmap(attend)(q_BHTK * d_head**-0.5, k_BHTK, v_BHTK).swapaxes(1, 2)


def implementation_for(config: ModelConfig, device: jax.Device) -> Implementation:
    """Return the attention implementation that runs this model on this kind of device.

    Raises:
        UserError: The configuration forces one that cannot run there; every reason is named.
    """
    has_bias = (config.pe == "t5", "it takes no bias, which pe t5 adds")
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
        ],
        "splash": [
            (
                device.platform != "tpu" or not is_v4_or_newer,
                f"it needs a TPU v4 or newer, this is {device.device_kind}",
            ),
            whole,
            (config.d_head % 128 != 0, f"it needs d_head a multiple of 128, it is {config.d_head}"),
            has_bias,
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
