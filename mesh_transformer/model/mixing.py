"""The static spatial gating unit: neighbouring tokens mixed by fixed weights (`use_static_sgu`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mesh_transformer.network import SGU_WIDTH


def static_sgu(y_BSD: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Return the mixture of each token's features and those of the 127 before it, `BTD`.

    z_t = sum over s of y_s / (t - s + 2), for 0 <= t - s < 128; no gradient flows back.

    The channel-split static SGU of fattorib/transformer: a relative of gMLP's gating unit
    (arXiv:2105.08050) that learns nothing and gates nothing. There one half of the features was so
    mixed, and the other attended to; the weights that it shipped were all 0 by a slip, those here
    are what its formula evidently meant. It stopped the gradient, and so does this.

    Args:
        y_BSD: Features by position: slot s holds position s, as in a cache of keys.
        positions_BT: int32; B may be 1 where all sequences agree.
    """
    distance_BTS = positions_BT[:, :, None] - jnp.arange(y_BSD.shape[1])
    is_near_BTS = (distance_BTS >= 0) & (distance_BTS < SGU_WIDTH)
    weights_BTS = jnp.where(is_near_BTS, 1 / (jnp.abs(distance_BTS) + 2.0), 0)
    weights_BTS = jnp.broadcast_to(weights_BTS, (y_BSD.shape[0], *weights_BTS.shape[1:]))
    z_BTD = jnp.einsum(
        "bts,bsd->btd",
        weights_BTS.astype(y_BSD.dtype),
        jax.lax.stop_gradient(y_BSD),
        preferred_element_type=jnp.float32,
    )
    return z_BTD.astype(y_BSD.dtype)
