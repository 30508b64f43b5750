"""Gradients of one optimizer step: microbatch by microbatch, then summed over `dp` once.

While gradients accumulate, `dp` is manual and `mp` automatic: each replica works on its own
sequences, and no reduction over `dp` stands inside the accumulation loop. Left to the partitioner,
the same step would reduce over `dp` in every microbatch.

What ZeRO (arXiv:1910.02054) spreads over `dp`, by stage:

    0  nothing
    1  masters and optimizer state; the compute-dtype copies are gathered once per step
    2  and the summed gradient: one reduce-scatter instead of an all-reduce
    3  and the weights in use: gathered layer by layer, their gradients summed layer by layer
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mesh_transformer.config import Config
from mesh_transformer.model.decoder import Model
from mesh_transformer.model.loss import TokenLoss
from mesh_transformer.model.weights import Weight, sum_into_shards
from mesh_transformer.sharding import (
    COMPUTE,
    axis_size,
    is_matrix,
    over_mp,
    shard,
    spec,
    spread_axis,
    sum_of,
)
from mesh_transformer.training import as_original, examples

SCATTERED, SPREAD = 2, 3
"""The first stage that scatters the gradient sum, and the first that spreads weights in use."""


DROPOUT = 2**32 - 1
"""What the seed's key is folded with for dropout."""


class Gradients(NamedTuple):
    """The mean gradient over all valid tokens of a step, and what was seen on the way.

    Attributes:
        mean: As params, float32, in the layout of the optimizer state.
        loss: Mean cross-entropy in nats per valid token.
        last_loss: The same at the last position of each sequence. As the original reported them,
            with `original_shards`, both include the mean z-loss of all valid tokens.
        micro_norm: Root mean square, over microbatches, of the norm of the gradient of one
            microbatch's mean loss. A microbatch is one replica's; in stage 3, all replicas'. None
            where the step is one microbatch.
    """

    mean: Any
    loss: jax.Array
    last_loss: jax.Array
    micro_norm: jax.Array | None


def over_dp(function: Any, in_specs: Any, out_specs: Any) -> Any:
    """Run `function` once per replica, on the replica's own part; `mp` stays automatic."""
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names={"dp"}, check_vma=False
    )


def weights_in_use(params: Any, dims: Any, config: Config) -> Any:
    """Return what the model computes with: masters, or gathered copies of spread masters."""
    if config.mesh.zero_stage in (0, SPREAD):
        return params
    return compute_copies(params, dims, config)


def compute_copies(params: Any, dims: Any, config: Config) -> Any:
    """Return the weights in the compute dtype, each replica with all of its own."""

    def copy(param: jax.Array, letters: str) -> jax.Array:
        dtype = config.model.compute_dtype if is_matrix(letters) else param.dtype
        return shard(param.astype(dtype), letters)

    return jax.tree.map(copy, params, dims)


def dp_specs(dims: Any, *, spread: bool) -> Any:
    """Return the part of each parameter's partition that concerns `dp`."""

    def dp_spec(letters: str) -> PartitionSpec:
        at = spread_axis(letters) if spread else None
        return PartitionSpec(*("dp" if i == at else None for i in range(len(letters))))

    return jax.tree.map(dp_spec, dims)


def accumulate(
    model: Model,
    config: Config,
    params: Any,
    dims: Any,
    tokens_ABT1: jax.Array,
    mask_ABT: jax.Array | None,
    step: jax.Array,
) -> Gradients:
    """Return the gradient of the mean loss over A microbatches of B sequences.

    The mean is over valid tokens (mask 1) of the whole step, however they fall into microbatches.

    Args:
        step: int32, steps taken before: with the seed, all that says what dropout drops.
    """
    stage = config.mesh.zero_stage
    weights = weights_in_use(params, dims, config)
    data_spec = PartitionSpec(None, "dp")
    mask_spec = None if mask_ABT is None else data_spec
    grads_specs = dp_specs(dims, spread=stage >= SCATTERED)
    replica = functools.partial(_on_one_replica, model, config, dims)
    mean, loss, last_loss, micro_norm = over_dp(
        replica,
        in_specs=(dp_specs(dims, spread=stage >= SPREAD), data_spec, mask_spec, PartitionSpec()),
        out_specs=(grads_specs, PartitionSpec(), PartitionSpec(), PartitionSpec()),
    )(weights, tokens_ABT1, mask_ABT, step)
    return Gradients(mean, loss, last_loss, micro_norm)


def _on_one_replica(
    model: Model,
    config: Config,
    dims: Any,
    weights: Any,
    tokens_ABT1: jax.Array,
    mask_ABT: jax.Array | None,
    step: jax.Array,
) -> tuple[Any, jax.Array, jax.Array, jax.Array | None]:
    stage, shards = config.mesh.zero_stage, config.optimizer.original_shards
    n_replicas, n_steps = jax.lax.axis_size("dp"), tokens_ABT1.shape[0]
    mask_ABT = examples.weighed(tokens_ABT1, mask_ABT, config.model)
    n_valid = jnp.maximum(sum_over_dp(mask_ABT.sum()), 1)
    last_AB = examples.last_of(mask_ABT, mask_ABT, config.model)
    n_valid_last = jnp.maximum(sum_over_dp(last_AB.sum()), 1)
    receivers = jax.tree.map(functools.partial(_receiver, config), weights, dims)
    keys_A = dropout_keys(config, step, n_steps)

    def objective(receivers: Any, tokens_BT1: jax.Array, mask_BT: jax.Array, key: Any) -> Any:
        params = jax.tree.map(
            lambda weight, receiver, letters: Weight(weight, receiver, letters, stage >= SPREAD),
            *(weights, receivers, dims),
        )
        seen = score(model, params, tokens_BT1, key)
        nll = (seen.loss_BT * mask_BT).sum() / n_valid
        penalty = (as_original.penalty(seen, shards) * mask_BT).sum() / n_valid
        last_loss_B = examples.last_of(seen.loss_BT * mask_BT, mask_BT, config.model)
        last_loss = last_loss_B.sum() / n_valid_last
        total = nll + config.model.z_loss * penalty
        if shards:
            return total, (total, last_loss + config.model.z_loss * penalty)
        return total, (nll, last_loss)

    def microbatch(carry: Any, batch: Any) -> Any:
        total, squares_M = carry
        grads, losses = jax.grad(objective, has_aux=True)(receivers, *batch)
        grads = jax.tree.map(lambda g, d: shard(g.astype(jnp.float32), d), grads, dims)
        if stage >= SPREAD:
            grads = jax.tree.map(
                lambda g, d: sum_over_dp(g, d) if spread_axis(d) is None else g, grads, dims
            )
        if n_units > 1:
            squares_M = squares_M + _own_squares(grads, dims, config, n_replicas)
        return (jax.tree.map(jnp.add, total, grads), squares_M), losses

    def zeros(receiver: jax.Array, letters: str) -> jax.Array:
        return shard(jnp.zeros(receiver.shape, jnp.float32), letters)

    n_units = n_steps if stage >= SPREAD else n_steps * n_replicas
    start = (jax.tree.map(zeros, receivers, dims), shard(jnp.zeros(axis_size("mp")), "M"))
    batches_A = (tokens_ABT1, mask_ABT, keys_A)
    if n_steps > 1:
        (total, squares_M), losses = jax.lax.scan(microbatch, start, batches_A)
    else:  # In a loop of one round all is invariant: TPU compilers hoist it, and run it twice.
        only = jax.tree.map(lambda batch_A: batch_A[0], batches_A)
        (total, squares_M), losses = microbatch(start, only)
    nll, last_loss = (sum_over_dp(loss_A.sum()) for loss_A in losses)
    micro_norm = jnp.sqrt(sum_over_dp(squares_M.sum()) * n_units) if n_units > 1 else None
    mean = jax.tree.map(functools.partial(_sum_between_replicas, stage), total, dims)
    return mean, nll, last_loss, micro_norm


def dropout_keys(config: Config, step: jax.Array, n_steps: int) -> jax.Array | None:
    """Return a random key for each microbatch of this replica; None if nothing is dropped.

    They follow from seed, step, microbatch and replica alone, so that a run that is resumed draws
    what it would have drawn.
    """
    cfg = config.model
    if not any((cfg.dropout_embedding, cfg.dropout_attention, cfg.dropout_residual)):
        return None
    # Initial weights are drawn from keys that the seed's own is split into; this is none of them.
    key = jax.random.fold_in(jax.random.key(config.run.seed), DROPOUT)
    key = jax.random.fold_in(jax.random.fold_in(key, step), jax.lax.axis_index("dp"))
    return jax.random.split(key, n_steps)


def score(
    model: Model, params: Any, tokens_BT1: jax.Array, dropout_key: jax.Array | None = None
) -> TokenLoss:
    """Return the loss of each token but the first that the decoder has, given those before it."""
    inputs_BT, targets_BT, sources = examples.split(tokens_BT1, model.config)
    positions_BT = jnp.arange(inputs_BT.shape[1])[None]
    options: dict[str, Any] = {"targets_BT": targets_BT, "dropout_key": dropout_key, **sources}
    return model.apply(params, inputs_BT, positions_BT, **options)[0]


def _receiver(config: Config, weight: jax.Array, dims: str) -> jax.Array:
    """Return zeros to differentiate by: a matrix's gradient comes in the dtype it was used in.

    Where backward sums over `dp` (stage 3), it does so in float32.
    """
    low = is_matrix(dims) and config.mesh.zero_stage < SPREAD
    return jnp.zeros(weight.shape, config.model.compute_dtype if low else jnp.float32)


def _own_squares(grads: Any, dims: Any, config: Config, n_replicas: int) -> jax.Array:
    """Return `[M]`: of the squared norm of a microbatch's gradient, each device's part.

    Not yet summed: once, after the last microbatch, is enough.
    """
    grads = as_original.counted(grads, config.optimizer.original_shards, config.model.norm)
    is_spread, all_dims = config.mesh.zero_stage >= SPREAD, jax.tree.leaves(dims)

    def n_holders(letters: str) -> int:
        n_copies = 1 if "mp" in spec(letters, COMPUTE) else axis_size("mp")
        return n_copies * (n_replicas if is_spread and spread_axis(letters) is None else 1)

    def squares(*parts: jax.Array) -> jax.Array:
        pairs = zip(parts, all_dims, strict=True)
        return sum_of([jnp.square(g).sum() / n_holders(letters) for g, letters in pairs])[None]

    return over_mp(squares, all_dims, "M")(*jax.tree.leaves(grads))


def sum_over_dp(x: jax.Array, dims: str = "") -> jax.Array:
    """Sum over replicas, a number by default: one all-reduce of each device's `mp` part."""
    if axis_size("dp") == 1:
        return x
    return over_mp(lambda part: jax.lax.psum(part, "dp"), (dims,), dims)(x)


def _sum_between_replicas(stage: int, total: jax.Array, dims: str) -> jax.Array:
    """Make the replicas' sums one, in the layout that the optimizer step wants."""
    if stage >= SPREAD:
        return total
    if stage >= SCATTERED and spread_axis(dims) is not None:
        return sum_into_shards(total, dims)
    return sum_over_dp(total, dims)
