"""Layers one after the other, each with its part of weights that are stacked along L."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp


def in_turn(
    block: Callable[[Any, jax.Array], Any], carry: Any, *, n_layers: int, unroll: int
) -> Any:
    """Return what `block(carry, layer)` makes of what the one before made, layer by layer.

    In a loop, `unroll` layers a round. If that is all of them there is no loop: each layer's
    activations and gradients then stay apart, which a loop stacks.
    """
    if unroll < n_layers or hk.running_init():
        stack = hk.layer_stack(n_layers, with_per_layer_inputs=True, unroll=unroll, name="layers")
        return stack(lambda carry, layer: (block(carry, layer), None))(carry, jnp.arange(n_layers))[
            0
        ]
    run = hk.without_apply_rng(hk.transform(block))
    stacked = hk.lift(run.init, name="layers")(None, carry, jnp.int32(0))
    for layer, params in enumerate(_apart(stacked, n_layers)):
        carry = run.apply(params, carry, jnp.int32(layer))
    return carry


def _apart(stacked: Any, n_layers: int) -> list[Any]:
    """Split along L; unlike indices, whose gradients are whole stacks of zeros but for one part."""
    leaves, tree = jax.tree.flatten(stacked)
    parts = [[part[0] for part in jnp.split(leaf, n_layers)] for leaf in leaves]
    return [jax.tree.unflatten(tree, layer) for layer in zip(*parts, strict=True)]
