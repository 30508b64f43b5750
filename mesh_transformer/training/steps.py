"""The compiled steps of one mesh: pure functions with declared shardings and donation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mesh_transformer.config import Config
from mesh_transformer.model.attention import Cache, implementation_for
from mesh_transformer.model.decoder import Model, empty_cache, make_model
from mesh_transformer.model.mup import widths_of
from mesh_transformer.model.sampling import Choice, choose
from mesh_transformer.model.weights import Weight
from mesh_transformer.sharding import COMPUTE, param_dims, shard, spec, stored_spec
from mesh_transformer.training import as_original, examples
from mesh_transformer.training.gradients import (
    SPREAD,
    accumulate,
    compute_copies,
    dp_specs,
    over_dp,
    score,
    weights_in_use,
)
from mesh_transformer.training.optimizer import (
    learning_rate,
    make_optimizer,
    schedule_count,
)


class TrainState(NamedTuple):
    """All that training changes.

    Attributes:
        step: [] int32, optimizer steps taken.
        params: Float32 masters; spread over `dp` as well from ZeRO stage 1 on.
        opt_state: Of the one optax chain; its moments lie as the params do, spread from stage 1 on.
    """

    step: jax.Array
    params: hk.Params
    opt_state: optax.OptState


class Continuation(NamedTuple):
    """Sequences being continued, by position.

    Attributes:
        tokens_BS: int32, prompt and what was drawn after it.
        logprobs_BS: float32, of the drawn tokens.
        position_B: int32, position of the last token so far: the next one to feed.
        last_B: int32, position after which a sequence must end.
        done_B: bool.
        cache: Keys and values of all positions before `position_B`.
    """

    tokens_BS: jax.Array
    logprobs_BS: jax.Array
    position_B: jax.Array
    last_B: jax.Array
    done_B: jax.Array
    cache: Cache | None


class Compiled:
    """A function compiled on its first call, with the mesh in force while it is traced."""

    def __init__(self, mesh: Mesh, function: Callable[..., Any], **options: Any) -> None:
        self._mesh = mesh
        self._jitted = jax.jit(function, **options)

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self._mesh):
            return self._jitted(*args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """Lower for arguments that may be shapes, to look at the program or compile it ahead."""
        with jax.set_mesh(self._mesh):
            return self._jitted.lower(*args)


class Steps(NamedTuple):
    """The compiled functions of one configuration on one mesh.

    Attributes:
        state: TrainState of shapes, dtypes and shardings.
        init: key -> TrainState.
        train: TrainState (donated), tokens_ABT1, mask_ABT | None -> TrainState, metrics: loss,
            last_loss, grad_norm, micro_grad_norm, lr; float32 scalars.
        evaluate: params, tokens_BT1 -> loss_BT, correct_BT.
        copies: params -> the weights in the compute dtype, for `prefill` and `decode`.
        prefill: copies, tokens_BT, S -> Cache with room for S positions; tokens are what an
            encoder is fed, if there is one.
        decode: copies, Continuation (donated), Choice, stop_ids, n -> Continuation, n tokens on.
    """

    state: TrainState
    init: Compiled
    train: Compiled
    evaluate: Compiled
    copies: Compiled
    prefill: Compiled
    decode: Compiled


def make_steps(config: Config, mesh: Mesh) -> Steps:
    """Return the steps of a configuration on a mesh; nothing is compiled before it is called.

    Raises:
        UserError: The model cannot run on the mesh's devices as configured.
    """
    implementation = implementation_for(config.model, mesh.devices.flat[0])
    decided = dataclasses.replace(config.model, attention=implementation)
    # One replica has none to spread its state over: the stages differ in name only.
    stage = config.mesh.zero_stage if mesh.shape["dp"] > 1 else 0
    config = dataclasses.replace(
        config, model=decided, mesh=dataclasses.replace(config.mesh, zero_stage=stage)
    )
    model = make_model(config.model)
    optimizer = make_optimizer(config.optimizer, config.model.norm, widths_of(config.model))
    state, dims = abstract_state(config, mesh, model, optimizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_microbatch, by_sequence = (
        NamedSharding(mesh, spec(letters, COMPUTE)) for letters in ("ABT", "BT")
    )
    bound = functools.partial(functools.partial, config=config, model=model, dims=dims)
    compiled = functools.partial(Compiled, mesh)
    return Steps(
        state=state,
        init=compiled(functools.partial(init, model, optimizer), out_shardings=shardings),
        train=compiled(
            bound(train, optimizer=optimizer),
            in_shardings=(shardings, by_microbatch, by_microbatch),
            out_shardings=(shardings, everywhere),
            donate_argnums=0,
        ),
        evaluate=compiled(
            bound(evaluate),
            in_shardings=(shardings.params, by_sequence),
            out_shardings=everywhere,
        ),
        copies=compiled(bound(copies), in_shardings=(shardings.params,)),
        prefill=compiled(bound(prefill), static_argnums=2),
        decode=compiled(bound(decode), donate_argnums=1),
    )


def abstract_state(
    config: Config, mesh: Mesh, model: Model, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Any]:
    """Return shapes, dtypes and shardings of the train state, and the dimensions of the params."""
    shapes = jax.eval_shape(functools.partial(init, model, optimizer), jax.random.key(0))
    dims = param_dims(shapes.params)

    def placed(leaf: Any, letters: str = "") -> Any:
        sharding = NamedSharding(mesh, stored_spec(letters, config.mesh.zero_stage))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = TrainState(
        step=placed(shapes.step),
        params=jax.tree.map(placed, shapes.params, dims),
        opt_state=optax.tree.map_params(
            optimizer, placed, shapes.opt_state, dims, transform_non_params=placed
        ),
    )
    return state, dims


def init(model: Model, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Return the state before the first step; the same for every mesh."""
    params = model.init(key)
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def train(
    state: TrainState,
    tokens_ABT1: jax.Array,
    mask_ABT: jax.Array | None,
    *,
    optimizer: optax.GradientTransformation,
    config: Config,
    model: Model,
    dims: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one optimizer step."""
    gradients = accumulate(model, config, state.params, dims, tokens_ABT1, mask_ABT, state.step)
    stage = config.mesh.zero_stage
    mean = jax.tree.map(
        lambda g, letters: jax.lax.with_sharding_constraint(g, stored_spec(letters, stage)),
        gradients.mean,
        dims,
    )
    shards, norm = config.optimizer.original_shards, config.model.norm
    grad_norm = optax.tree.norm(as_original.counted(mean, shards, norm))
    updates, opt_state = optimizer.update(mean, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "loss": gradients.loss,
        "last_loss": gradients.last_loss,
        "grad_norm": grad_norm,
        "micro_grad_norm": grad_norm if gradients.micro_norm is None else gradients.micro_norm,
        "lr": learning_rate(config.optimizer)(schedule_count(state.opt_state)),
    }
    metrics = {name: jnp.float32(value) for name, value in metrics.items()}
    return TrainState(state.step + 1, params, opt_state), metrics


def evaluate(
    params: hk.Params, tokens_BT1: jax.Array, *, config: Config, model: Model, dims: Any
) -> tuple[jax.Array, jax.Array]:
    """Return the loss of each token in nats, and whether it is the most likely one.

    Of padding: 0 and False.
    """
    spread = config.mesh.zero_stage >= SPREAD

    def on_one_replica(weights: Any, tokens_BT1: jax.Array) -> tuple[jax.Array, jax.Array]:
        params = jax.tree.map(
            lambda weight, letters: Weight(weight, weight, letters, spread), weights, dims
        )
        seen = score(model, params, tokens_BT1)
        if config.model.encoder_layers:
            is_valid_BT = examples.weighed(tokens_BT1, None, config.model) > 0
            return jnp.where(is_valid_BT, seen.loss_BT, 0), seen.correct_BT & is_valid_BT
        return seen.loss_BT, seen.correct_BT

    return over_dp(
        on_one_replica,
        in_specs=(dp_specs(dims, spread=spread), PartitionSpec("dp")),
        out_specs=PartitionSpec("dp"),
    )(weights_in_use(params, dims, config), tokens_BT1)


def copies(params: hk.Params, *, config: Config, model: Model, dims: Any) -> Any:
    """Return the weights in the compute dtype; each replica holds all of them, split over `mp`."""
    return compute_copies(params, dims, config)


def prefill(
    weights: Any, tokens_BT: jax.Array, n_slots: int, *, config: Config, model: Model, dims: Any
) -> Cache | None:
    """Return the keys and values of prompts padded on the right, with room for `n_slots` positions.

    What lies past a prompt's end is junk: beyond the positions that any query sees, and
    overwritten as decoding gets there.
    """
    if config.model.encoder_layers:
        sources_BS = shard(tokens_BT, "BT")
        cache = empty_cache(config.model, sources_BS.shape[0], n_slots, sources_BS)
        # Whatever the first token makes of it, decoding computes anew; the encoder's part stays.
        start_BT = jnp.full((sources_BS.shape[0], 1), config.model.pad_id)
        start = shard(start_BT, "BT"), jnp.zeros((1, 1), jnp.int32)
        return model.apply(weights, *start, cache, sources_BS=sources_BS)[1]
    cache = empty_cache(config.model, tokens_BT.shape[0], n_slots)
    positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    return model.apply(weights, shard(tokens_BT, "BT"), positions_BT, cache)[1]


def decode(
    weights: Any,
    start: Continuation,
    choice: Choice,
    stop_ids: jax.Array,
    n: jax.Array,
    *,
    config: Config,
    model: Model,
    dims: Any,
) -> Continuation:
    """Draw up to `n` tokens for each sequence; a stop token or the last position ends one.

    Each round feeds the token at `position_B` and draws the one after it.
    """
    rows_B = jnp.arange(start.position_B.shape[0])

    def unfinished(carry: tuple[jax.Array, Continuation]) -> jax.Array:
        i, now = carry
        return (i < n) & ~now.done_B.all()

    def one_token(carry: tuple[jax.Array, Continuation]) -> tuple[jax.Array, Continuation]:
        i, now = carry
        fed_B1 = now.tokens_BS[rows_B, now.position_B][:, None]
        logits_BTV, cache = model.apply(weights, fed_B1, now.position_B[:, None], now.cache)
        # The draw looks at whole rows, several times: gather them once.
        logits_BV = jax.lax.with_sharding_constraint(logits_BTV[:, 0], PartitionSpec("dp"))
        next_B = now.position_B + 1
        token_B, logprob_B = choose(logits_BV, choice, next_B, config.model.n_tokens)
        done_B = now.done_B | (token_B[:, None] == stop_ids).any(-1)
        write_B = jnp.where(done_B, now.tokens_BS.shape[1], next_B)  # out of range: dropped
        position_B = jnp.where(done_B, now.position_B, next_B)
        return i + 1, Continuation(
            tokens_BS=now.tokens_BS.at[rows_B, write_B].set(token_B, mode="drop"),
            logprobs_BS=now.logprobs_BS.at[rows_B, write_B].set(logprob_B, mode="drop"),
            position_B=position_B,
            last_B=now.last_B,
            done_B=done_B | (position_B >= now.last_B),
            cache=cache,
        )

    return jax.lax.while_loop(unfinished, one_token, (jnp.int32(0), start))[1]
