"""What devices exchange in a step, read from the compiled program; sizes make shapes telling."""

from __future__ import annotations

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import small
from compiled import Array, Program, compile_sampling, state_bytes

from mesh_transformer.config import Config
from mesh_transformer.sharding import make_mesh
from mesh_transformer.training.steps import Steps, make_steps

A, B, T, D, V = 5, 2, 24, 64, 4096  # B of one replica
SIZES = {"layers": 3, "d_model": D, "d_head": 16, "d_ff": 192, "n_vocab": V, "seq": T}
SIZES |= {"pe_rotary_dims": 4, "per_replica_batch": B, "gradient_accumulation_steps": A}

# LLVM's optimisation takes most of the time of a compilation, and no part in what is exchanged.
FAST: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}

PROGRAMS = [(2, 4, 0), (2, 4, 1), (2, 4, 2), (2, 4, 3), (4, 2, 2), (8, 1, 1), (8, 1, 3), (1, 8, 3)]
"""Replicas, devices of each, ZeRO stage."""

SPLIT = [program for program in PROGRAMS if program[1] > 1]
REPLICATED = [program for program in PROGRAMS if program[0] > 1]

BTD = f"f32[{B},{T},{D}]"


@functools.cache
def made(dp: int, mp: int, stage: int) -> tuple[Config, Steps]:
    config = small.parsed(**SIZES, cores_per_replica=mp, zero_stage=stage)
    return config, make_steps(config, make_mesh(dp, mp))


@functools.cache
def trained(dp: int, mp: int, stage: int) -> Program:
    """Return the compiled train step."""
    _, steps = made(dp, mp, stage)
    tokens_ABT1 = jax.ShapeDtypeStruct((A, B * dp, T + 1), jnp.int32)
    lowered = steps.train.lower(steps.state, tokens_ABT1, None)
    return Program(lowered.compile(FAST), dp, mp)


def weights(dp: int, mp: int) -> dict[str, Array]:
    """Return the part of each weight that one device multiplies by, by its path."""
    leaves, _ = jax.tree.flatten_with_path(made(dp, mp, 0)[1].state.params)
    return {
        "/".join(key.key for key in path): Array("f32", leaf.sharding.shard_shape(leaf.shape))
        for path, leaf in leaves
    }


def expected_over_dp(dp: int, mp: int, stage: int) -> collections.Counter[str]:
    """Return what ZeRO has replicas exchange, as `Program.exchanged` counts it."""
    own = weights(dp, mp)
    matrices = {path: own[path] for path in own if path.endswith(("/w", "/embeddings"))}
    vectors = [array for path, array in own.items() if path not in matrices]
    whole = [f" {array}" for array in matrices.values()]
    if stage < 3:
        reduction = "reduce-scatter" if stage == 2 else "all-reduce"
        found = [f"step: all-reduce {array}" for array in vectors]
        found += [f"step: {reduction}{array}" for array in whole]
        return collections.Counter(found + [f"step: all-gather{array}" for array in whole if stage])
    found = [f"rounds: all-reduce {array}" for array in vectors]
    for path, array in matrices.items():
        if "/layers/" in path:
            layer = Array("f32", array.dims[1:])
            found += [f"layers {way}: all-gather {layer}" for way in ("forward", "backward")]
            found += [f"layers backward: reduce-scatter {layer}"]
        else:
            found += [f"step: all-gather {array}", f"rounds: reduce-scatter {array}"]
    return collections.Counter(found)


@pytest.mark.parametrize("program", SPLIT)
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_block_exchanges_one_tensor_in_each_direction(
    program: tuple[int, int, int], way: str
) -> None:
    inside = [e for e in trained(*program).exchanges if e.loops == ("rounds", f"layers {way}")]
    over_mp = [(e.kind, *map(str, e.arrays)) for e in inside if "mp" in e.axis]
    assert over_mp == [("all-reduce", BTD)]


@pytest.mark.parametrize("program", SPLIT)
def test_between_blocks_a_replica_exchanges_embeddings_and_three_numbers_per_token(
    program: tuple[int, int, int],
) -> None:
    _, mp, _ = program
    # Largest logit, partition function and target's logit, of each device's part of the vocabulary;
    # backward once more, where logits are computed anew.
    numbers = {f"rounds: all-gather f32[{mp},3,{B},{T}]": 2}
    # The embedding forward, the head backward; blocks as tested above.
    blocks = {f"layers {way}: all-reduce {BTD}": 1 for way in ("forward", "backward")}
    found = trained(*program).exchanged("mp")
    assert found == numbers | {f"rounds: all-reduce {BTD}": 2} | blocks


@pytest.mark.parametrize("program", REPLICATED)
def test_replicas_exchange_what_zero_says(program: tuple[int, int, int]) -> None:
    assert trained(*program).exchanged("dp") == expected_over_dp(*program)


@pytest.mark.parametrize("program", [p for p in REPLICATED if p[2] < 3])
def test_before_stage_3_every_weight_has_its_gradient_reduced_once_per_step(
    program: tuple[int, int, int],
) -> None:
    dp, mp, _ = program
    reduced = [e for e in trained(*program).exchanges if e.axis == "dp" and "reduce" in e.kind]
    assert {array.dtype for e in reduced for array in e.arrays} == {"f32"}
    assert {e.loops for e in reduced} == {()}
    n_weights = sum(array.size for array in weights(dp, mp).values())
    assert sum(a.size for e in reduced for a in e.arrays if a.size > 1) == n_weights


@pytest.mark.parametrize("program", PROGRAMS)
def test_nothing_but_scalars_crosses_both_axes_or_an_axis_of_one_device(
    program: tuple[int, int, int],
) -> None:
    dp, mp, _ = program
    idle = {"dp mp", ""} | ({"dp"} if dp == 1 else set()) | ({"mp"} if mp == 1 else set())
    assert {axis: trained(*program).exchanged(axis) for axis in idle} == {axis: {} for axis in idle}


@pytest.mark.parametrize("program", SPLIT)
def test_no_device_holds_the_logits_of_the_whole_vocabulary(
    program: tuple[int, int, int],
) -> None:
    largest = max(trained(*program).arrays, key=lambda array: array.size)
    assert largest.size < B * T * V, largest


@pytest.mark.parametrize("program", PROGRAMS)
def test_only_the_head_multiplies_by_the_vocabulary(program: tuple[int, int, int]) -> None:
    own = V // program[1]
    products = [
        operation.instruction.outputs[0].dims
        for operation in trained(*program).operations
        if operation.instruction.opcode == "dot"
        and any(own in array.dims for array in operation.inputs)
    ]
    n_logits = products.count((B * T, own))
    assert n_logits in (1, 2)  # backward, the compiler may make them again
    # Backward: of the features and of the weight. An embedding by product would add to each.
    gradients = [dims for dims in products if dims != (B * T, own)]
    assert sorted(map(sorted, gradients)) == [sorted((B * T, D)), sorted((D, own))]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_step_runs_each_pass_over_the_layers_once(program: tuple[int, int, int]) -> None:
    assert trained(*program).loops == {"rounds": 1, "layers forward": 1, "layers backward": 1}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_step_writes_the_state_where_it_was_read(program: tuple[int, int, int]) -> None:
    memory = trained(*program).memory
    assert memory.alias_size_in_bytes == state_bytes(made(*program)[1].state)


def test_scoring_exchanges_what_the_forward_pass_does() -> None:
    dp, mp, stage = 2, 4, 3
    _, steps = made(dp, mp, stage)
    tokens_BT1 = jax.ShapeDtypeStruct((B * dp, T + 1), jnp.int32)
    program = Program(steps.evaluate.lower(steps.state.params, tokens_BT1).compile(FAST), dp, mp)
    assert program.exchanged("mp") == {
        f"layers forward: all-reduce {BTD}": 1,
        f"step: all-reduce {BTD}": 1,
        f"step: all-gather f32[{mp},3,{B},{T}]": 1,
    }
    training = trained(dp, mp, stage).exchanged("dp")
    forward = {key: n for key, n in training.items() if "layers forward" in key or "gather" in key}
    forward = {key: n for key, n in forward.items() if "backward" not in key}
    results = {f"step: all-gather f32[{B * dp},{T}]": 1, f"step: all-gather pred[{B * dp},{T}]": 1}
    assert program.exchanged("dp") == forward | results
    assert max(array.size for array in program.arrays) < B * T * V


def test_decoding_exchanges_one_tensor_per_block_and_the_embedding() -> None:
    dp, mp, stage = 2, 4, 1
    _, steps = made(dp, mp, stage)
    copies, prefill, decode = (
        Program(compiled, dp, mp) for compiled in compile_sampling(steps, B * dp, T, FAST)
    )
    own = weights(dp, mp)
    matrices = [array for path, array in own.items() if path.endswith(("/w", "/embeddings"))]
    assert copies.exchanged("dp") == collections.Counter(f"step: all-gather {a}" for a in matrices)
    assert prefill.exchanged("mp") == {
        f"layers forward: all-reduce {BTD}": 1,
        f"step: all-reduce {BTD}": 1,
    }
    assert decode.exchanged("mp") == {
        f"layers forward: all-reduce f32[{B},1,{D}]": 1,
        f"rounds: all-reduce f32[{B},1,{D}]": 1,
        f"rounds: all-gather f32[{B},1,{V}]": 1,
    }
    # Replicas tell each other the tokens that they drew.
    assert prefill.exchanged("dp") == {}
    told = (a for e in decode.exchanges if e.axis == "dp" for a in e.arrays)
    assert max(array.size for array in told) <= 2 * B * dp
    assert not any("layers forward" in e.loops for e in decode.exchanges if e.axis == "dp")
