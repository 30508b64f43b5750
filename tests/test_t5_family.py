"""T5's config.json and arrays: its two forms, how releases of transformers write them, refusals."""

from __future__ import annotations

import pathlib
from typing import Any

import memory_source
import numpy as np
import pytest
import small
from test_families import FLOAT32, published

from mesh_transformer.checkpoints import huggingface, safetensors
from mesh_transformer.checkpoints.families import config_json, config_keys
from mesh_transformer.checkpoints.huggingface import HuggingFace
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.source import Array
from mesh_transformer.config import ModelConfig

SMALL, FLAN = "google-t5/t5-small", "google/flan-t5-base"


def test_both_forms_are_read() -> None:
    first, later = config_keys(published(SMALL)), config_keys(published(FLAN))
    assert (first["activation"], first["gated"]) == ("relu", False)
    assert (first["tie_embeddings"], first["output_scale"]) == (True, 512**-0.5)
    assert (later["activation"], later["gated"]) == ("gelu_new", True)
    assert (later["tie_embeddings"], later["output_scale"]) == (False, 1.0)
    assert (first["encoder_layers"], first["layers"], first["encoder_seq"]) == (6, 6, 512)
    uneven = config_keys(published(SMALL, num_decoder_layers=4, d_kv=32, max_target_positions=99))
    assert (uneven["encoder_layers"], uneven["layers"], uneven["d_head"]) == (6, 4, 32)
    assert (uneven["encoder_seq"], uneven["seq"]) == (512, 99)


def test_later_releases_of_transformers_write_the_same_otherwise() -> None:
    tied = {"tie_word_embeddings": True}
    assert config_keys(published(SMALL, **tied, scale_decoder_outputs=True)) == config_keys(
        published(SMALL)
    )
    assert config_keys(published(FLAN, **tied, scale_decoder_outputs=False)) == config_keys(
        published(FLAN)
    )


@pytest.mark.parametrize("kind", ["relu", "gelu", "silu", "gated-relu", "gated-gelu", "gated-silu"])
def test_activations_are_written_as_they_were_read(kind: str) -> None:
    model = ModelConfig(**config_keys(published(SMALL, feed_forward_proj=kind)))
    assert config_json(model, FLOAT32)["feed_forward_proj"] == kind


@pytest.mark.parametrize(
    ("name", "changed", "problem"),
    [
        (SMALL, {"feed_forward_proj": "gated"}, "feed_forward_proj is .gated.; com"),
        (SMALL, {"tie_word_embeddings": 1}, "tie_word_embeddings is 1; needed is t"),
        (
            FLAN,
            {"scale_decoder_outputs": True},
            "scale_decoder_outputs is true; computed here with embeddings as the head",
        ),
        (SMALL, {"pad_token_id": None}, "pad_token_id is null; needed is a token"),
        (
            SMALL,
            {"decoder_start_token_id": 5},
            "decoder_start_token_id is 5; computed here with pad_token_id, 0",
        ),
        (SMALL, {"n_positions": "512"}, 'n_positions is "512"; needed is a whole'),
        (SMALL, {"num_layers": 0}, "num_layers is 0; needed is a whole number abo"),
        (SMALL, {"is_encoder_decoder": False}, "is_encoder_decoder is false; T5 is"),
    ],
)
def test_what_is_not_computed_here_is_refused(
    name: str, changed: dict[str, Any], problem: str
) -> None:
    with pytest.raises(CheckpointError, match=problem):
        config_keys(published(name, **changed))


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"output_scale": 0.5}, "tie_embeddings is True and output_scale 0.5; T5 has 0.17677"),
        ({"qkv_bias": True}, "qkv_bias is True; T5 has False"),
        ({"gated": True, "activation": "gelu"}, "activation is 'gelu'; gated, T5 has its approx"),
    ],
)
def test_a_model_of_another_kind_is_not_written(keys: dict[str, Any], problem: str) -> None:
    model = small.parsed(**{**small.ENCODER_DECODERS["t5"], **keys}).model
    with pytest.raises(CheckpointError, match=problem):
        config_json(model, FLOAT32)


def test_copies_that_older_files_hold_are_passed_over(tmp_path: pathlib.Path) -> None:
    model = small.parsed(**small.ENCODER_DECODERS["t5"]).model
    source = memory_source.of_model(model)
    huggingface.write(str(tmp_path), source, model, dtype=FLOAT32)
    path = str(tmp_path / "model.safetensors")
    stored = {name: it.read() for name, it in safetensors.read_header(path).items()}
    stored |= {
        f"{it}.embed_tokens.weight": stored["shared.weight"] for it in ("encoder", "decoder")
    }
    arrays = {name: Array(value.shape, value.dtype) for name, value in stored.items()}
    safetensors.write(path, arrays, stored.__getitem__)
    found = HuggingFace(str(tmp_path))
    assert found.arrays.keys() == source.arrays.keys()
    for key in found.arrays:
        np.testing.assert_array_equal(found.read(key), source.read(key))
    assert found.about == "T5 of transformers, 1 safetensors file, float32"
