"""What the shards of a mesh-transformer-jax checkpoint hold of each parameter, by name.

The original runs one program per shard: some parameters are cut into parts, of others every shard
has a copy, which the forward pass sums, averages or, but for the first, ignores. `ROLES` says which
by name; nothing is ever concluded from values.

Parts put together, copies of which one is used and means of equal weights are exact. A sum of n
copies is rounded to the array's dtype, and so is its n-th part, which each gets: to split and then
merge, or the other way round, changes no bit if n is a power of two (unless a part is too small for
all its digits, as float16's may be), and else perhaps the last one. So it is with moments that are
scaled: of gathered parts and of averages.

Moments follow from what the original's gradients are. Each summed copy has the gradient of the sum;
of a norm's copies only the first, which is the one used, has any; an averaged copy has its part of
the mean's; of the learned positions the transpose of a gather counts the gradient once per shard.
Ours are those of the one whole parameter.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mesh_transformer import network_rules
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.source import MU, NU, PARAMS
from mesh_transformer.config import ModelConfig


class Role(enum.Enum):
    """What shards hold of a parameter."""

    COLUMNS = "parts along the last axis"
    ROWS = "parts along the first axis"
    GATHERED = "parts along the last axis, gathered before use"
    SUMMED = "copies that the forward pass sums"
    FIRST = "copies of which the first is used"
    AVERAGED = "copies that the forward pass averages"
    EACH = "a parameter of each shard's own"


class Row(NamedTuple):
    """A parameter of the original.

    Attributes:
        module: Its Haiku module below "causal_transformer_shard/~/"; {} is the layer's number.
        name: In the module.
        path: Ours, below "decoder/".
        role: What the shards hold.
    """

    module: str
    name: str
    path: str
    role: Role


EMBED, LAYER, HEAD = "embedding_shard", "layer_{}/~/", "projection_shard/~/"
ATTENTION, FF = "layers/block/attention/", "layers/block/ff/"

ROLES = (
    Row(EMBED + "/~/linear", "w", "embed/embeddings", Role.ROWS),
    Row(EMBED + "/~/linear", "b", "embed/b", Role.SUMMED),
    Row(EMBED, "pos_embs", "positions/embeddings", Role.GATHERED),
    Row("relative_position_embs", "rel_embedding", "relative_positions/embeddings", Role.ROWS),
    Row(LAYER + "linear", "w", ATTENTION + "q/w", Role.COLUMNS),
    Row(LAYER + "linear_1", "w", ATTENTION + "v/w", Role.COLUMNS),  # not k
    Row(LAYER + "linear_2", "w", ATTENTION + "k/w", Role.COLUMNS),
    Row(LAYER + "linear_3", "w", ATTENTION + "o/w", Role.ROWS),
    Row(LAYER + "linear_4", "w", FF + "in/w", Role.COLUMNS),
    Row(LAYER + "linear_4", "b", FF + "in/b", Role.COLUMNS),
    Row(LAYER + "linear_5", "w", FF + "out/w", Role.ROWS),
    Row(LAYER + "linear_5", "b", FF + "out/b", Role.SUMMED),
    Row(HEAD + "linear", "w", "unembed/w", Role.COLUMNS),
    Row(HEAD + "linear", "b", "unembed/b", Role.COLUMNS),
)

COMBINED = "[qkv]"  # in a path: of queries, keys and values, each head's three together
_FORKED_QKV = tuple(
    Row(LAYER + linear, "b", f"{ATTENTION}{name}/b", Role.COLUMNS)
    for linear, name in (("linear", "q"), ("linear_1", "v"), ("linear_2", "k"))
)
_COMBINED_QKV = tuple(
    Row(LAYER + "combined_qkv", name, f"{ATTENTION}{COMBINED}/{name}", Role.COLUMNS)
    for name in "bw"
)
_FORKED = (
    Row(EMBED, "project_in", "embed/project/w", Role.COLUMNS),
    Row(HEAD.removesuffix("/~/"), "project_out", "unembed/project/w", Role.COLUMNS),
    Row(LAYER + "linear_3", "b", ATTENTION + "o/b", Role.SUMMED),
    *(
        Row(module, name, f"{path}/{name}", Role.FIRST)
        for module, path in (
            (EMBED + "/~/replicated_layer_norm", "embed/norm"),
            (LAYER + "replicated_layer_norm_1", "layers/block/ff_norm"),
        )
        for name in ("scale", "offset")
    ),
)
"""What the KoboldAI fork's models have beyond the original's (`compat` neo, opt, neox, bloom)."""

NORMS = {
    "layernorm": ("replicated_layer_norm", Role.FIRST),
    "layernorm-nobias": ("replicated_layer_norm", Role.FIRST),
    "layernorm-desync": ("layer_norm", Role.EACH),
    "rmsnorm": ("rms_norm", Role.AVERAGED),
    "rmsnorm-bias": ("rms_norm", Role.AVERAGED),
    "scalenorm": ("rms_norm", Role.AVERAGED),
    "scalenorm-bias": ("rms_norm", Role.AVERAGED),
}
"""Module of each `norm` in the original, and its role."""


def rows_of(model: ModelConfig) -> list[Row]:
    """List the parameters that a model may have, the original's and those of its fork.

    The fork makes queries, keys and values of GPT-NeoX and of BLOOM by one matrix.
    """
    rows = list(ROLES)
    if not network_rules.unlike(network_rules.ORIGINAL, vars(model)):
        return [*rows, *norm_rows(model.norm)]
    if model.embed_norm or not model.tie_embeddings:
        rows = [row for row in rows if not re.match(f"{ATTENTION}[qkv]/", row.path)]
        return [*rows, *_COMBINED_QKV, *_FORKED, *norm_rows(model.norm)]
    return [*rows, *_FORKED_QKV, *_FORKED, *norm_rows(model.norm)]


def norm_rows(norm: str) -> list[Row]:
    """Give the parameters of a kind of norm, each layer's and the last one."""
    module, role = NORMS[norm]
    scale, offset = ("gain", "shift") if norm.startswith("scalenorm") else ("scale", "offset")
    return [
        Row(place + module, name, path + ours, role)
        for place, path in ((LAYER, "layers/block/norm/"), (HEAD, "final_norm/"))
        for name, ours in (("scale", scale), ("offset", offset))
    ]


def part_shape(role: Role, shape: tuple[int, ...], n_shards: int) -> tuple[int, ...]:
    """Give the shape of what one shard holds of an array; 0 along an axis that cannot be shared."""
    axis = split_axis(role)
    if axis is None:
        return shape
    each, left = divmod(shape[axis], n_shards)
    part = list(shape)
    part[axis] = 0 if left else each
    return tuple(part)


def split_axis(role: Role) -> int | None:
    """Give the axis along which shards hold parts; None for copies."""
    if role in (Role.COLUMNS, Role.GATHERED):
        return -1
    return 0 if role is Role.ROWS else None


def gathered_scale(role: Role, kind: str, n_shards: int) -> float:
    """Give what a whole moment is of the one that a shard holds: a factor."""
    factor = {Role.GATHERED: 1 / n_shards, Role.AVERAGED: float(n_shards)}.get(role, 1.0)
    return {PARAMS: 1.0, MU: factor, NU: factor**2}[kind]


def merge_copies(role: Role, kind: str, copies: Sequence[np.ndarray], what: str) -> np.ndarray:
    """Make one array of the shards' copies, in float64 on the way, so that equal ones stay exact.

    Raises:
        CheckpointError: They are parameters of each shard's own, and differ.
    """
    n, dtype = len(copies), copies[0].dtype
    if role is Role.EACH and any(not np.array_equal(copies[0], copy) for copy in copies[1:]):
        raise CheckpointError(
            f"{what} differs from shard to shard, as layernorm-desync lets it: no one norm computes"
            f" what these {n} do, so this checkpoint can only be used by the program that wrote it"
        )
    if n == 1 or role in (Role.FIRST, Role.EACH) or (role is Role.SUMMED and kind != PARAMS):
        return copies[0]
    total = sum(copy.astype(np.float64) for copy in copies)
    if role is Role.SUMMED:
        return np.asarray(total).astype(dtype)
    return np.asarray(total / n * gathered_scale(role, kind, n)).astype(dtype)


def copy_for(
    role: Role, kind: str, name: str, whole: np.ndarray, shard: int, n_shards: int
) -> np.ndarray:
    """Make a shard's copy of an array; merged, they give the array, as exactly as sums are.

    Copies that are not used hold what the original leaves there: what they began with.
    """
    if role is Role.FIRST and shard > 0:
        return np.full_like(whole, 1 if kind == PARAMS and name == "scale" else 0)
    if role is Role.SUMMED and kind == PARAMS:
        return np.asarray(whole.astype(np.float64) / n_shards).astype(whole.dtype)
    scale = gathered_scale(role, kind, n_shards)
    if scale == 1:
        return whole
    return np.asarray(whole.astype(np.float64) / scale).astype(whole.dtype)
