"""Layers one after the other, each with its part of weights that are stacked along L."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

_NAME = "layers"


def in_turn(
    block: Callable[[Any, jax.Array], Any], carry: Any, *, n_layers: int, unroll: int
) -> Any:
    """Return what the last layer makes of what the one before made, and so on.

    In a loop, `unroll` layers a round. If that is all of them there is no loop, which would stack
    what layers keep for backward: a step of 6 small layers on CPUs is 3 to 4 % faster without.
    Weights are `layers/...` where this is called, each with a first dimension L.

    Args:
        block: Makes of a carry and the layer's number (int32, from 0) a carry of the same shapes,
            with weights, but without Haiku's state or random keys.
        carry: Any tree of arrays.
    """
    if unroll < n_layers or hk.running_init():  # which makes the weights in every case
        stack = hk.layer_stack(n_layers, with_per_layer_inputs=True, unroll=unroll, name=_NAME)
        layers = stack(lambda carry, layer: (block(carry, layer), None))
        return layers(carry, jnp.arange(n_layers))[0]
    run = hk.without_apply_rng(hk.transform(block))
    stacked = hk.lift(run.init, name=_NAME)(None, carry, jnp.int32(0))  # reads; nothing is made
    for layer, params in enumerate(_apart(stacked, n_layers)):
        carry = run.apply(params, carry, jnp.int32(layer))
    return carry


def _apart(stacked: Any, n_layers: int) -> list[Any]:
    """Split every leaf along L; an index's gradient would be a stack of zeros but for one part."""
    leaves, tree = jax.tree.flatten(stacked)
    parts = [[part[0] for part in jnp.split(leaf, n_layers)] for leaf in leaves]
    return [jax.tree.unflatten(tree, layer) for layer in zip(*parts, strict=True)]
