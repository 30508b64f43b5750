"""The maximal update parametrisation (muP): hyperparameters of a narrow model serve a wide one.

Tensor Programs V (arXiv:2203.03466, table 8, in its form for Adam), with the base sizes that
Cerebras' GPT-J configuration names. A model m times as wide as its base, with feed-forward layers
f times as wide, differs from one in the standard parametrisation in

    the logits                    times m^-1 before their bias: configuration key `output_scale`
    products of queries and keys  over d_head, not its root: configuration key `attention_scale`
    the head's initial weights    as large as the base's
    Adam's steps of matrices      over m, or f, where m or f times as many features are summed up
      between hidden features

All other initial values (`model.initial`) are of the size that they should be anyway: this library
divides those of a matrix by the root of the features that it sums up. Embeddings, biases and norms
move as in the base. So does weight decay, which multiplies by the learning rate alone, whatever the
width.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax

from mesh_transformer.config import ModelConfig


class Widths(NamedTuple):
    """How many times as wide as its base a model is.

    Attributes:
        d_model: In its features, m.
        d_ff: In hidden features of the feed-forward layers, f.
    """

    d_model: float = 1.0
    d_ff: float = 1.0


STANDARD = Widths()
"""Of a model that is its own base, or has none."""


SUMMED = (
    ("layers/block/attention/[qkvo]/w", "d_model"),
    ("layers/block/ff/(in|gate)/w", "d_model"),
    ("layers/block/ff/out/w", "d_ff"),
)
"""Path of each matrix between hidden features below `decoder/` (a regular expression), and of which
width the features are that it sums up: those of the heads grow as the model's do.
"""


def widths_of(config: ModelConfig) -> Widths:
    """Return the widths of a model; 1 where it is in the standard parametrisation."""
    if not config.mup_base_d_model:
        return STANDARD
    return Widths(
        config.d_model / config.mup_base_d_model,
        config.d_ff / config.mup_base_d_ff,
    )


def step_size(path: str, widths: Widths) -> float:
    """Return what multiplies Adam's step of a parameter, by its whole path."""
    below = path.split("/", 1)[1]
    for pattern, width in SUMMED:
        if re.fullmatch(pattern, below):
            return 1 / getattr(widths, width)
    return 1.0


def sized(updates: Any, widths: Widths) -> Any:
    """Return Adam's updates, as params, as large as they should be at these widths."""

    def resized(path: str, value: jax.Array) -> jax.Array:
        factor = step_size(path, widths)
        return value if factor == 1 else value * factor

    return {
        module: {name: resized(f"{module}/{name}", value) for name, value in values.items()}
        for module, values in updates.items()
    }
