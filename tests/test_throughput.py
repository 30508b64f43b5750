"""Throughput: FLOPs by the stated formula, peaks by device, step times without what is no step."""

import pytest

from mesh_transformer import throughput
from mesh_transformer.config import ModelConfig

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
