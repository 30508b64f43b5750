"""What config.json says of positions and windows, in the forms that releases have written it."""

from __future__ import annotations

from typing import Any

import pytest
from published import published

from mesh_transformer.checkpoints.families import config_json, config_keys
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.npz import BFLOAT16
from mesh_transformer.config import ModelConfig

LLAMA, QWEN, MISTRAL = "meta-llama/Llama-3.2-1B", "Qwen/Qwen2-0.5B", "mistralai/Mistral-7B-v0.1"
NEOX, GEMMA = "EleutherAI/pythia-70m", "google/gemma-2b"
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 8192}


def refused(name: str, **changed: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        config_keys(published(name, **changed))
    return str(error.value)


def test_parameters_of_each_kind_of_layer_are_read_where_they_agree() -> None:
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    flat = config_keys(published(QWEN, rope_parameters=linear))
    assert (flat["pe_scaling"], flat["pe_theta"]) == ("linear", 5e5)
    by_kind = {"full_attention": linear, "sliding_attention": None}
    assert config_keys(published(QWEN, rope_parameters=by_kind)) == flat
    differing = {"full_attention": linear, "sliding_attention": {**linear, "factor": 4.0}}
    told = refused(QWEN, rope_parameters=differing)
    assert 'rope_parameters is {"full_attention": {"rope_type": "linear", ' in told
    assert "; all layers' positions are computed alike here" in told


def test_a_part_of_a_head_is_never_taken_for_the_whole() -> None:
    assert "partial_rotary_factor is 0.5; all of a head is turned" in refused(
        LLAMA, partial_rotary_factor=0.5
    )
    assert config_keys(published(LLAMA, partial_rotary_factor=1.0)) == config_keys(published(LLAMA))
    assert config_keys(published(NEOX, partial_rotary_factor=0.25)) == config_keys(published(NEOX))
    assert (
        "partial_rotary_factor is 0.5, but 0.25 is what rotary_pct or rope_parameters say; take one"
    ) in refused(NEOX, partial_rotary_factor=0.5)


def test_yarn_without_a_factor_stretches_to_the_longest_sequence() -> None:
    theirs = published(LLAMA, rope_scaling={**YARN, "factor": None})
    assert theirs["max_position_embeddings"] == 131072
    factors = {"factor": 16.0, "original_max_position_embeddings": 8192.0}
    assert config_keys(theirs)["pe_scaling_factors"] == factors
    assert "yarn positions lack factor" in refused(LLAMA, rope_scaling=YARN)


def test_settings_that_change_nothing_are_read() -> None:
    settings: list[tuple[str, dict[str, Any]]] = [
        (QWEN, {"head_dim": 64}),
        (QWEN, {"head_dim": None}),
        (GEMMA, {"use_bidirectional_attention": False}),
        (GEMMA, {"use_bidirectional_attention": None}),
        *((it, {"layer_types": ["full_attention"] * published(it)["num_hidden_layers"]})
          for it in (LLAMA, QWEN, GEMMA)),
    ]  # fmt: skip
    for name, harmless in settings:
        assert config_keys(published(name, **harmless)) == config_keys(published(name))
    told = refused(GEMMA, use_bidirectional_attention=True)
    assert "use_bidirectional_attention is true; computed here: null, false" in told


def test_a_window_that_no_layer_has_is_read_where_it_is_wide_enough() -> None:
    full = {"layer_types": ["full_attention"] * 32}
    short = published(MISTRAL, **full, max_position_embeddings=4096)
    assert config_keys(short)["window"] == 0
    assert "layer_types is" in refused(MISTRAL, **full)
    assert config_keys(published(MISTRAL, **full, sliding_window=None))["window"] == 0


def test_qwen2_s_heads_may_be_wider_than_their_share() -> None:
    keys = config_keys(published(QWEN, head_dim=128))
    assert (keys["d_head"], keys["pe_rotary_dims"]) == (128, 128)
    again = config_json(ModelConfig(**keys), BFLOAT16)
    assert again["head_dim"] == 128 and config_keys(again) == keys
    assert "head_dim" not in config_json(ModelConfig(**config_keys(published(QWEN))), BFLOAT16)
