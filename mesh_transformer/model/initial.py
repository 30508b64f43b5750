"""How large weights are at first: the standard deviation of each matrix, truncated normal.

mesh-transformer-jax has 1 / sqrt(n) for what reads n features, 2 / L of that for what writes to the
residual stream of L layers, and 1 / sqrt(V) for embeddings. muP (`model.mup`) differs in two: its
head is as large as its base's, and what leaves the feed-forward layer goes by that layer's width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.mup import widths_of

POSITIONS = 0.02
"""Of learned vectors and biases of positions."""


class Stddevs(NamedTuple):
    """Standard deviations.

    Attributes:
        embed: Of embeddings.
        embed_project: Of what makes model features of narrower embeddings.
        qkv: Of queries, keys and values.
        o: Of what writes attention's heads to the residual stream.
        ff_in: Of hidden features of the feed-forward layer, and of their gate.
        ff_out: Of what writes these to the residual stream.
        head: Of the head.
        head_project: Of what makes features as narrow as embeddings for it.
    """

    embed: float
    embed_project: float
    qkv: float
    o: float
    ff_in: float
    ff_out: float
    head: float
    head_project: float


def stddevs(config: ModelConfig) -> Stddevs:
    """Return how large the weights of a model are at first."""
    by_width, by_depth, widths = config.d_model**-0.5, 2 / config.layers, widths_of(config)
    return Stddevs(
        embed=config.n_vocab**-0.5,
        embed_project=config.d_embed**-0.5,
        qkv=config.d_attended**-0.5,
        o=by_depth / math.sqrt(config.d_attended),
        ff_in=by_width,
        # By d_ff it should be; by d_model is the same where both are as much wider than the base's.
        ff_out=by_depth / math.sqrt(config.d_model) * (widths.d_model / widths.d_ff) ** 0.5,
        head=by_width * widths.d_model**0.5,
        head_project=by_width,
    )
