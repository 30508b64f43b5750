"""Throughput: FLOPs by the stated formula, peaks by device, step times without what is no step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import small

from mesh_transformer import throughput
from mesh_transformer.config import ModelConfig
from mesh_transformer.model.decoder import make_model

GPT_J_6B = ModelConfig(
    layers=28, d_model=4096, n_heads=16, n_vocab=50400, seq=2048, pe="rotary", pe_rotary_dims=64
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_weights_that_multiply_in_gpt_j_6b_are_all_but_embedding_biases_and_norms() -> None:
    all_parameters = 6_050_882_784  # of the model as published in the transformers format
    embedding = 50400 * 4096
    norms_and_biases = 28 * (2 * 4096 + 16384 + 4096) + 2 * 4096 + 50400
    expected = all_parameters - embedding - norms_and_biases
    assert throughput.matmul_parameters(GPT_J_6B) == expected


def test_a_trained_token_costs_six_operations_per_weight_and_attention_unhalved() -> None:
    small = ModelConfig(
        layers=1, d_model=8, n_heads=2, d_head=3, d_ff=5, n_vocab=10, seq=7, pe="none"
    )
    weights = 4 * 8 * 6 + 2 * 8 * 5 + 8 * 10
    assert throughput.train_flops_per_token(small) == 6 * weights + 12 * 6 * 7


def test_an_encoder_s_work_is_counted_with_the_tokens_that_are_trained() -> None:
    model = ModelConfig(
        layers=3,
        encoder_layers=2,
        seq=7,
        encoder_seq=11,
        d_model=8,
        n_heads=2,
        d_head=3,
        d_ff=5,
        n_vocab=10,
        gated=True,
        pe="t5",
        residual="sequential",
    )
    attention, feed_forward = 4 * 8 * 6, 3 * 8 * 5
    # Of the second attention, keys and values are made of the encoder's tokens, once per sequence.
    sources = 11 * (2 * (attention + feed_forward) + 3 * attention / 2)
    targets = 7 * (3 * (attention * 3 / 2 + feed_forward) + 8 * 10)
    attended = 2 * 11 * 11 + 3 * (7 * 7 + 7 * 11)
    expected = (6 * (sources + targets) + 12 * 6 * attended) / 7
    assert throughput.train_flops_per_token(model) == pytest.approx(expected)


def test_a_static_sgu_and_head_qk_cost_what_they_multiply() -> None:
    model = ModelConfig(
        **{"layers": 3, "d_model": 8, "n_heads": 2, "d_head": 3, "d_ff": 5},  # type: ignore
        **{"n_vocab": 10, "seq": 200, "pe": "none"},  # type: ignore
        use_static_sgu=True,
        head_qk_trick=True,
    )
    weights = 3 * (4 * 4 * 6 + 2 * 8 * 5) + 2 * 8 * 256 + 8 * 10
    assert throughput.matmul_parameters(model) == weights
    attention, head_qk, mixing = 12 * 3 * 6 * 200, 6 * 256 * 200, 2 * 3 * 4 * 128
    expected = 6 * weights + attention + head_qk + mixing
    assert throughput.train_flops_per_token(model) == expected


def test_attention_of_shorter_sequences_costs_less() -> None:
    per_token = throughput.train_flops_per_token(GPT_J_6B, 512)
    whole = throughput.train_flops_per_token(GPT_J_6B)
    assert whole - per_token == 12 * 28 * 4096 * (2048 - 512)


def operations_of_products(jaxpr: Any) -> int:
    """Count two operations for each multiplication in the matrix products of a program."""
    total = 0
    for step in jaxpr.eqns:
        if step.primitive.name == "dot_general":
            (contracted, _), _ = step.params["dimension_numbers"]
            left, result = step.invars[0].aval.shape, step.outvars[0].aval.shape
            total += 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)
            continue
        inner = sum(
            operations_of_products(getattr(part, "jaxpr", part))
            for value in step.params.values()
            for part in (value if isinstance(value, (tuple, list)) else [value])
            if hasattr(getattr(part, "jaxpr", part), "eqns")
        )
        assert step.primitive.name not in ("while", "cond") or not inner
        total += inner * (step.params["length"] if step.primitive.name == "scan" else 1)
    return total


@pytest.mark.thorough
@pytest.mark.parametrize("variant", ["", *small.VARIANTS, *small.ENCODER_DECODERS])
def test_what_a_model_costs_is_what_its_program_multiplies(variant: str) -> None:
    """Forward and backward, nothing recomputed; the program masks a window, which costs it all."""
    keys = {"layers": 3, "d_head": 8, "d_ff": 24, "remat": "none"}
    variants = small.VARIANTS | small.ENCODER_DECODERS
    model = small.parsed(**{**variants.get(variant, {}), **keys}).model
    tokens_BT = small.tokens(2, model.seq)
    positions_BT = jnp.arange(model.seq)[None]
    options = {"targets_BT": tokens_BT}
    if model.encoder_layers:
        options["sources_BS"] = small.tokens(2, model.encoder_seq)

    def loss(params: Any) -> jax.Array:
        seen, _ = make_model(model).apply(params, tokens_BT, positions_BT, **options)
        return seen.loss_BT.sum()

    params = jax.eval_shape(make_model(model).init, jax.random.key(0))
    program = jax.make_jaxpr(jax.grad(loss))(params)
    whole = dataclasses.replace(model, window=0, window_every=1)
    expected = throughput.train_flops_per_token(whole) * tokens_BT.size
    if model.head_qk_trick:  # rows of zeros and a one look up, and are no arithmetic of the model's
        expected += 4 * model.seq * model.n_vocab * tokens_BT.size
    assert operations_of_products(program.jaxpr) == expected


def test_a_window_costs_what_its_layers_see() -> None:
    model = dataclasses.replace(GPT_J_6B, layers=5, window=100, window_every=2)
    whole, local = (
        throughput.train_flops_per_token(dataclasses.replace(model, window=window, window_every=1))
        for window in (0, 100)
    )
    of_attention = 12 * 16 * 256
    assert whole - local == of_attention * 5 * (2048 - 100)
    assert whole - throughput.train_flops_per_token(model) == of_attention * 2 * (2048 - 100)
    wide = dataclasses.replace(model, window=5000)
    assert throughput.train_flops_per_token(wide) == whole


def test_a_published_llama_costs_what_its_shape_says() -> None:
    """Llama-3.2-1B: 1,235,814,400 parameters, all but 33 norms, the head being the embeddings."""
    model = ModelConfig(
        layers=16, d_model=2048, n_heads=32, n_kv_heads=8, d_ff=8192, n_vocab=128256, seq=2048,
        gated=True, tie_embeddings=True, pe="rotary-half",
    )  # fmt: skip
    assert throughput.matmul_parameters(model) == 1_235_814_400 - 33 * 2048


def test_mfu_is_the_share_of_the_peak_and_unknown_without_one() -> None:
    assert throughput.mfu(100.0, 6e9, 1.2e12) == pytest.approx(0.5)
    assert throughput.mfu(100.0, 6e9, None) is None


@pytest.mark.parametrize(
    ("device_kind", "peak"),
    [
        ("TPU v2", 22.5e12),
        ("TPU v3", 61.5e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 70e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
    ],
)
def test_the_peak_of_a_device_is_found_by_the_name_jax_gives_it(
    device_kind: str, peak: float
) -> None:
    assert throughput.peak_flops_per_device(device_kind) == peak


@pytest.mark.parametrize(
    "device_kind", ["cpu", "TPU v4 lite", "TPU v9", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", ""]
)
def test_a_device_that_is_not_in_the_table_has_no_known_peak(device_kind: str) -> None:
    assert throughput.peak_flops_per_device(device_kind) is None


def test_the_first_step_is_not_timed() -> None:
    clock = Clock()
    pace = throughput.Pace(clock)
    clock.now += 60  # compiling
    assert pace.tick() is None
    assert pace.recent_seconds is None
    assert pace.wall_seconds is None
    clock.now += 2
    assert pace.tick() == 2
    assert pace.recent_seconds == pace.wall_seconds == 2


def test_a_step_that_compiles_is_not_timed_and_the_recent_pace_begins_anew() -> None:
    clock = Clock()
    pace = throughput.Pace(clock)
    pace.tick(10)
    for size, seconds, compiled in ((10, 1, False), (20, 60, True), (20, 4, False)):
        clock.now += seconds
        seen = pace.tick(size, compiled=compiled)
        assert seen == (None if compiled else seconds)
    assert pace.recent_seconds == 4
    assert pace.wall_seconds == 65 / 50


def test_pauses_count_towards_the_end_of_the_run_but_not_towards_steps() -> None:
    clock = Clock()
    pace = throughput.Pace(clock)
    pace.tick()
    clock.now += 1
    with pace.paused():
        clock.now += 30
    clock.now += 1
    assert pace.tick() == 2
    assert pace.recent_seconds == 2
    assert pace.wall_seconds == 32


def test_a_pause_that_fails_is_left_out_as_well() -> None:
    clock = Clock()
    pace = throughput.Pace(clock)
    pace.tick()

    def fail() -> None:
        with pace.paused():
            clock.now += 30
            raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        fail()
    clock.now += 1
    assert pace.tick() == 1


def test_the_pace_shown_follows_the_last_twenty_steps() -> None:
    clock = Clock()
    pace = throughput.Pace(clock)
    for seconds in [0.0, *[9.0] * 30, *[1.0] * 20]:
        clock.now += seconds
        pace.tick()
    assert pace.recent_seconds == 1
