"""What devices exchange for an encoder and its decoder, read from the compiled program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import small
from compiled import Program
from test_communication import FAST

from mesh_transformer.sharding import make_mesh
from mesh_transformer.training.steps import make_steps

A, B, S, T, D, V = 3, 2, 40, 24, 64, 4096  # B of one replica
SIZES = {"d_model": D, "d_head": 16, "d_ff": 192, "n_vocab": V, "encoder_seq": S, "seq": T}
BTD, BSD = f"f32[{B},{T},{D}]", f"f32[{B},{S},{D}]"


@pytest.mark.thorough
def test_a_layer_exchanges_one_tensor_more_for_what_it_reads_of_the_encoder() -> None:
    """Backward too: the gradients of all layers' keys and values are summed together, once.

    Nothing is computed anew, which would exchange again what only the next sum of a block needs.
    """
    dp, mp = 2, 4
    keys = {**small.ENCODER_DECODERS["t5"], **SIZES, "output_scale": D**-0.5}
    keys |= {"gradient_accumulation_steps": A, "cores_per_replica": mp, "remat": "none"}
    steps = make_steps(small.parsed(**keys), make_mesh(dp, mp))
    tokens_ABT1 = jax.ShapeDtypeStruct((A, B * dp, S + T + 1), jnp.int32)
    program = Program(steps.train.lower(steps.state, tokens_ABT1, None).compile(FAST), dp, mp)
    numbers = {f"rounds: all-gather f32[{mp},3,{B},{T}]": 1}
    blocks = {f"layers {way}: all-reduce {BTD}": 3 for way in ("forward", "backward")}
    blocks |= {f"encoder {way}: all-reduce {BSD}": 2 for way in ("forward", "backward")}
    # Embeddings forward; backward the head, and what all layers make of the encoder's output.
    between = {f"rounds: all-reduce {BTD}": 2, f"rounds: all-reduce {BSD}": 2}
    assert program.exchanged("mp") == numbers | between | blocks
    assert max(array.size for array in program.arrays) < B * T * V
