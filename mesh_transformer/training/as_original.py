"""How mesh-transformer-jax trains over S shards, where that differs from training one copy.

Its shards held some parameters S times, and its gradients and its global norm counted the copies.
With `original_shards` S a run of it goes on as it would have there: the norm, and so the clipping,
counts what its S shards counted; summed biases move S times as far; and the z-loss is on logits
less the largest of them. The mesh that we train on has no part in this. With 0, the default,
nothing is done and nothing is compiled; with 1 only the z-loss differs.

Adam's moments are of the gradient of the one parameter here, in either case. A copy's moments are
brought to that scale where a checkpoint is read: those of averaged norms times S (first) and S^2
(second), those of learned positions divided by the same, all others as they are. Adam's step does
not depend on this scale but for its epsilon, 1e-8, which then weighs S times as much or as little
beside the root of the second moment as it did there.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax

from mesh_transformer.model.loss import TokenLoss, z_loss
from mesh_transformer.network import Norm


class Powers(NamedTuple):
    """What S shards made of one parameter, as powers of S.

    Attributes:
        length: Of the factor by which its gradient is longer in the global norm.
        step: Of the factor by which its update is larger.
    """

    length: float
    step: int


HELD = (
    # S whole copies, of which the model used the sum: each had the gradient of the sum, counted in
    # the norm, and took a whole step of Adam.
    ("embed/b", ".*", Powers(1 / 2, 1)),
    ("layers/block/ff/out/b", ".*", Powers(1 / 2, 1)),
    # The transpose of a gather added one gradient up S times. Adam divides that out again.
    ("positions/embeddings", ".*", Powers(1, 0)),
    # S whole copies, of which the model used the mean: each had a share 1/S of the gradient.
    ("(layers/block/norm|final_norm)/.*", "(rmsnorm|scalenorm).*", Powers(-1 / 2, 0)),
)
"""Path of a parameter below `decoder/` and name of the model's norm (regular expressions), and what
S shards made of it. All others count once: parts of matrices, and layernorms, of whose copies only
the first was used.
"""


def powers(path: str, norm: Norm) -> Powers:
    """Return what S shards made of a parameter, by its whole path and the model's norm."""
    below = path.split("/", 1)[1]
    for pattern, norms, held in HELD:
        if re.fullmatch(pattern, below) and re.fullmatch(norms, norm):
            return held
    return Powers(0, 0)


def counted(gradient: Any, shards: int, norm: Norm) -> Any:
    """Return a gradient, as params, as long as the original's shards together had it."""
    return _scaled(gradient, shards, norm, "length")


def moved(updates: Any, shards: int, norm: Norm) -> Any:
    """Return Adam's updates, as params, as far as they moved what the original computed with."""
    return _scaled(updates, shards, norm, "step")


def _scaled(tree: Any, shards: int, norm: Norm, kind: str) -> Any:
    def scaled(path: str, value: jax.Array) -> jax.Array:
        factor = max(1, shards) ** getattr(powers(path, norm), kind)
        return value if factor == 1 else value * factor

    return {
        module: {name: scaled(f"{module}/{name}", value) for name, value in values.items()}
        for module, values in tree.items()
    }


def penalty(seen: TokenLoss, shards: int) -> jax.Array:
    """Return the z-loss of each token, `penalty_BT`, before its weight.

    The original took log(Z) after it had subtracted the largest logit.
    """
    return z_loss(seen.log_z_BT - seen.max_BT if shards else seen.log_z_BT)
