"""Where every dimension lives: the mesh, two maps, one table, and the products that cross `mp`.

One letter names a dimension everywhere: in array suffixes, einsum subscripts and this table.

    A  gradient-accumulation microbatches    H  attention heads
    B  sequences                             K  features per head
    T  tokens fed now (queries)              F  feed-forward features
    S  tokens attended to (cache slots)      V  vocabulary
    D  model features                        L  layers, stacked
    R  buckets of relative positions         G  heads of keys and values
    E  features of an embedding, where they are not those of the model
    M  one for each index of `mp`: copies of an activation, or parts of a result
    N  tokens of all sequences, B times T

Letters are global sizes; in a weight, H stands for heads times features per head, and so does G:
heads are split over devices, never one head (of a G that `mp` does not divide, devices hold copies
while it is in use). Two mesh axes exist: `dp`, over which sequences (and under
ZeRO weights and optimizer state) are spread, and `mp`, over which each layer is split
(Megatron-LM, arXiv:1909.08053). The model calls `columns`, `rows` and `lookup`, which hold the
only communication over `mp` that a layer needs, its loss `parts_over_mp`, and all of it `shard`
for what the compiler must keep. Without a mesh all of them are plain arithmetic.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, PartitionSpec

COMPUTE = {"B": "dp", "H": "mp", "G": "mp", "F": "mp", "V": "mp", "M": "mp"}
"""Mesh axis of each dimension of activations, and of weights while in use."""

STORAGE = COMPUTE | {"D": "dp"}
"""Mesh axis of each dimension of what ZeRO spreads over `dp`."""

PARAM_DIMS = (
    ("embed/embeddings", "VD"),
    ("embed/b", "D"),
    ("embed/project/w", "ED"),
    ("embed/norm/(scale|offset)", "D"),
    ("positions/embeddings", "TD"),
    ("relative_positions/embeddings", "HR"),
    ("layers/block/(norm|cross_norm|ff_norm)/(scale|offset)", "LD"),
    ("layers/block/(norm|cross_norm|ff_norm)/(gain|shift)", "L"),
    ("layers/block/(attention|cross)/q/w", "LDH"),
    ("layers/block/(attention|cross)/[kv]/w", "LDG"),
    ("layers/block/(attention|cross)/q/b", "LH"),
    ("layers/block/(attention|cross)/[kv]/b", "LG"),
    ("layers/block/(attention|cross)/[qk]_norm/scale", "LK"),
    ("layers/block/(attention|cross)/o/w", "LHD"),
    ("layers/block/(attention|cross)/o/b", "LD"),
    ("layers/block/ff/(in|gate)/w", "LDF"),
    ("layers/block/ff/(in|gate)/b", "LF"),
    ("layers/block/ff/out/w", "LFD"),
    ("layers/block/ff/out/b", "LD"),
    ("final_norm/(scale|offset)", "D"),
    ("final_norm/(gain|shift)", ""),
    ("head_qk/[qk]/w", "DK"),
    ("unembed/project/w", "DE"),
    ("unembed/w", "DV"),
    ("unembed/b", "V"),
)
"""Path of each parameter below `decoder/` or `encoder/` (a regular expression), its dimensions."""


def make_mesh(dp: int, mp: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of `dp` replicas of `mp` devices each.

    Axes are Auto: under JAX's default Explicit axes sharding constraints raise.
    """
    devices = jax.devices() if devices is None else devices
    if dp * mp != len(devices):
        raise ValueError(f"a {dp} x {mp} mesh needs {dp * mp} devices, found {len(devices)}")
    grid = np.asarray(devices).reshape(dp, mp)
    return Mesh(grid, ("dp", "mp"), axis_types=(AxisType.Auto, AxisType.Auto))


def fetch(*arrays: jax.Array) -> list[np.ndarray]:
    """Return arrays whole, also what devices of other hosts hold; all hosts call it alike."""
    if jax.process_count() > 1:
        return [multihost_utils.process_allgather(array, tiled=True) for array in arrays]
    return [np.asarray(array) for array in arrays]


def spec(dims: str, axes: Mapping[str, str]) -> PartitionSpec:
    """Return the partition of an array with these dimensions under `COMPUTE` or `STORAGE`."""
    return PartitionSpec(*(axes.get(dim) for dim in dims))


def param_dims(params: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Return the dimensions of every parameter, as a tree like `params`.

    Raises:
        LookupError: A parameter matches no row of `PARAM_DIMS`, or several, or has another rank.
    """
    problems: list[str] = []

    def dims_of(path: str, rank: int) -> str:
        below = path.split("/", 1)[1]
        rows = [dims for pattern, dims in PARAM_DIMS if re.fullmatch(pattern, below)]
        if len(rows) != 1:
            problems.append(f"{path} matches {len(rows)} rows of PARAM_DIMS; exactly one is needed")
        elif len(rows[0]) != rank:
            problems.append(f"{path} has rank {rank}; its row of PARAM_DIMS says {rows[0]!r}")
        return rows[0] if rows else ""

    dims = {
        module: {name: dims_of(f"{module}/{name}", value.ndim) for name, value in values.items()}
        for module, values in params.items()
    }
    if problems:
        raise LookupError("; ".join(problems))
    return dims


def is_matrix(dims: str) -> bool:
    """Say whether a parameter is multiplied by, and so cast and spread; vectors are added."""
    return len(dims.replace("L", "")) >= 2


def spread_axis(dims: str) -> int | None:
    """Return which dimension of a parameter ZeRO spreads over `dp`; None for vectors."""
    if not is_matrix(dims):
        return None
    return next((i for i, dim in enumerate(dims) if STORAGE.get(dim) == "dp"), None)


def stored_spec(dims: str, zero_stage: int) -> PartitionSpec:
    """Return the partition of a parameter at rest, of its gradient and its Adam moments."""
    spread = zero_stage > 0 and spread_axis(dims) is not None
    return spec(dims, STORAGE if spread else COMPUTE)


def axis_size(axis: str) -> int:
    """Return the size of a mesh axis where tracing stands; 1 without a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def is_manual(axis: str) -> bool:
    """Say whether the code being traced already runs once per index of this mesh axis."""
    return axis in jax.sharding.get_abstract_mesh().manual_axes


def shard(x: jax.Array, dims: str) -> jax.Array:
    """Keep an activation spread over the mesh as `COMPUTE` says; the identity without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    axes = {dim: axis for dim, axis in COMPUTE.items() if not is_manual(axis)}
    return jax.lax.with_sharding_constraint(x, spec(dims, axes))


def over_mp(function: Any, in_dims: Sequence[str], out_dims: Any) -> Any:
    """Run `function` once per index of `mp`, on the local parts of its arguments.

    Only `mp` becomes manual: other axes stay as they are where tracing stands.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    mp_axes = {dim: axis for dim, axis in COMPUTE.items() if axis == "mp"}
    return jax.shard_map(
        function,
        in_specs=tuple(spec(dims, mp_axes) for dims in in_dims),
        out_specs=jax.tree.map(lambda dims: spec(dims, mp_axes), out_dims),
        axis_names={"mp"},
        check_vma=False,
    )


def sum_over_mp(x: jax.Array) -> jax.Array:
    """Sum the parts that the indices of `mp` hold; inside `over_mp` only."""
    return jax.lax.psum(x, "mp") if axis_size("mp") > 1 else x


def parts_over_mp(x: jax.Array) -> jax.Array:
    """Gather the parts that the indices of `mp` hold, along a new first axis M.

    One all-gather; inside `over_mp` only.
    """
    return jax.lax.all_gather(x, "mp") if axis_size("mp") > 1 else x[None]


def first_of_own(n: int) -> jax.Array | int:
    """Return where the part that this index of `mp` holds begins; each holds `n`."""
    return jax.lax.axis_index("mp") * n if axis_size("mp") > 1 else 0


def columns(
    x_BTD: jax.Array, *weights: tuple[jax.Array, str], dtype: Any = None
) -> tuple[jax.Array, ...]:
    """Multiply by weights whose columns are split over `mp`.

    No communication forward; backward one all-reduce, however many weights share the input.

    Args:
        weights: Pairs of a matrix and its dimensions: `(w_DH, "DH")`, `(w_DF, "DF")`...
        dtype: Of the products and the sums within; the input's if None.

    Returns:
        One product per weight: `BTH`, `BTF`...
    """
    dims = tuple(letters for _, letters in weights)
    return _columns(dims, dtype or x_BTD.dtype, x_BTD, tuple(w for w, _ in weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _columns(dims: Any, dtype: Any, x_BTD: jax.Array, weights: Any) -> tuple[jax.Array, ...]:
    def products(x_BTD: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(product(x_BTD, w, dtype) for w in weights)

    out_dims = tuple(f"BT{letters[1]}" for letters in dims)
    return over_mp(products, ("BTD", *dims), out_dims)(x_BTD, *weights)


def _columns_backward(dims: Any, dtype: Any, factors: Any, gradients: Any) -> tuple[jax.Array, Any]:
    x_BTD, weights = factors
    # Float32 logits of bfloat16 factors would make both products below float32 ones.
    gradients = [g.astype(x_BTD.dtype) for g in gradients]

    def products(x_BTD: jax.Array, *arrays: jax.Array) -> Any:
        weights, gradients = arrays[: len(dims)], arrays[len(dims) :]
        pairs = zip(gradients, weights, strict=True)
        return sum_over_mp(sum_of([product(g, w.T) for g, w in pairs])), tuple(
            _outer(x_BTD, g) for g in gradients
        )

    in_dims = ("BTD", *dims, *(f"BT{letters[1]}" for letters in dims))
    return over_mp(products, in_dims, ("BTD", dims))(x_BTD, *weights, *gradients)


_columns.defvjp(
    lambda dims, dtype, x_BTD, weights: (_columns(dims, dtype, x_BTD, weights), (x_BTD, weights)),
    _columns_backward,
)


def copied(x_BTD: jax.Array) -> jax.Array:
    """Give each index of `mp` a copy of its own, `MBTD`, for `columns_of_copies`.

    No communication forward. Each copy has the gradient of its own index; they are summed here, in
    one all-reduce however often the copies were multiplied.
    """
    return shard(jnp.broadcast_to(x_BTD, (axis_size("mp"), *x_BTD.shape)), "MBTD")


def columns_of_copies(x_MBTD: jax.Array, *weights: tuple[jax.Array, str]) -> tuple[jax.Array, ...]:
    """Multiply copies, as `columns` does what they are copies of, but without communication."""

    def products(x_MBTD: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(product(x_MBTD[0], w) for w in weights)

    dims = tuple(letters for _, letters in weights)
    out_dims = tuple(f"BT{letters[1]}" for letters in dims)
    return over_mp(products, ("MBTD", *dims), out_dims)(x_MBTD, *(w for w, _ in weights))


def rows(*factors: tuple[jax.Array, jax.Array, str]) -> jax.Array:
    """Multiply each input by a weight whose rows are split over `mp`, and add the products.

    One all-reduce forward, of the sum, however many products; none backward.

    Args:
        factors: Triples of an input, a matrix and the matrix's dimensions:
            `(x_BTH, w_HD, "HD")`, `(x_BTF, w_FD, "FD")`...
    """
    inputs, weights, dims = zip(*factors, strict=True)
    return _rows(dims, inputs, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(dims: Any, inputs: Any, weights: Any) -> jax.Array:
    def products(*arrays: jax.Array) -> jax.Array:
        pairs = zip(arrays[: len(dims)], arrays[len(dims) :], strict=True)
        return sum_over_mp(sum_of([product(x, w) for x, w in pairs]))

    in_dims = (*(f"BT{letters[0]}" for letters in dims), *dims)
    return over_mp(products, in_dims, "BTD")(*inputs, *weights)


def _rows_backward(dims: Any, factors: Any, g_BTD: jax.Array) -> tuple[Any, Any]:
    def products(g_BTD: jax.Array, *arrays: jax.Array) -> Any:
        inputs, weights = arrays[: len(dims)], arrays[len(dims) :]
        return tuple(product(g_BTD, w.T) for w in weights), tuple(_outer(x, g_BTD) for x in inputs)

    input_dims = tuple(f"BT{letters[0]}" for letters in dims)
    in_dims = ("BTD", *input_dims, *dims)
    inputs, weights = factors
    return over_mp(products, in_dims, (input_dims, dims))(g_BTD, *inputs, *weights)


_rows.defvjp(
    lambda dims, inputs, weights: (_rows(dims, inputs, weights), (inputs, weights)),
    _rows_backward,
)


def _outer(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Return the gradient of a weight: products of input and output, summed over tokens.

    As a product of two matrices: contracting B and T apart, XLA on CPUs computes the input anew in
    a transposed copy, a tenth of a training step.
    """
    x, gradient = (array.reshape(-1, array.shape[-1]) for array in (x, gradient))
    return product(jax.lax.platform_dependent(x, cpu=_turned, default=jnp.transpose), gradient)


def _turned(x_ND: jax.Array) -> jax.Array:
    """Transpose a matrix in memory, which XLA leaves to the product that reads it.

    On CPUs such a product is not among those it has kernels for: it takes a fourth longer in
    float32, and twice as long in bfloat16. In two copies, the first of 16 tokens at a time: XLA
    computes the matrix anew inside the copy, and would read what it is made of by columns.
    """

    def laid_out(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))

    n, d = x_ND.shape
    n_together = math.gcd(n, 16)
    blocks = laid_out(x_ND.reshape(-1, n_together, d).swapaxes(1, 2))
    return laid_out(blocks.swapaxes(0, 1).reshape(d, n))


def product(left: jax.Array, right: jax.Array, dtype: Any = None) -> jax.Array:
    """Multiply matrices; `dtype` of the result, the factors' if None.

    On CPUs 16-bit factors make a float32 product, which is rounded: it is what XLA has kernels for
    that use the processor's matrix instructions; others are many times slower.
    """
    dtype = dtype or left.dtype

    def rounded(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.matmul(left, right, preferred_element_type=jnp.float32).astype(dtype)

    def direct(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.matmul(left, right, preferred_element_type=dtype)

    if dtype == jnp.float32:
        return direct(left, right)
    return jax.lax.platform_dependent(left, right, cpu=rounded, default=direct)


def sum_of(terms: Sequence[jax.Array]) -> jax.Array:
    """Add arrays, left to right."""
    return functools.reduce(jnp.add, terms)


@jax.custom_vjp
def lookup(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Gather rows of a table whose rows are split over `mp`: each device looks up what it holds.

    One all-reduce forward, none backward, where a row's gradient is summed in float32: in bfloat16
    a token that is everywhere in a batch would stop to count.
    """

    def local(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        row_BT, mine_BT1 = _own_rows(table_VD, ids_BT)
        return sum_over_mp(jnp.where(mine_BT1, table_VD[row_BT], 0))

    return over_mp(local, ("VD", "BT"), "BTD")(table_VD, ids_BT)


def _lookup_backward(factors: Any, g_BTD: jax.Array) -> tuple[jax.Array, None]:
    def local(table_VD: jax.Array, ids_BT: jax.Array, g_BTD: jax.Array) -> jax.Array:
        row_BT, mine_BT1 = _own_rows(table_VD, ids_BT)
        mine_BTD = jnp.where(mine_BT1, g_BTD, 0).astype(jnp.float32)
        total_VD = jnp.zeros(table_VD.shape, jnp.float32).at[row_BT].add(mine_BTD)
        return total_VD.astype(table_VD.dtype)

    return over_mp(local, ("VD", "BT", "BTD"), "VD")(*factors, g_BTD), None


def _lookup_forward(table_VD: jax.Array, ids_BT: jax.Array) -> tuple[jax.Array, Any]:
    return lookup(table_VD, ids_BT), (table_VD, ids_BT)


lookup.defvjp(_lookup_forward, _lookup_backward)


def _own_rows(table_VD: jax.Array, ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return where each id stands in this device's part of the table, and whether it does."""
    n_rows = table_VD.shape[0]
    row_BT = ids_BT - first_of_own(n_rows)
    mine_BT = (row_BT >= 0) & (row_BT < n_rows)
    return jnp.where(mine_BT, row_BT, 0), mine_BT[..., None]
