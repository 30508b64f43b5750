"""Shards of the KoboldAI fork's other models (`compat`), as its converters make them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import memory_source
import named_arrays
import numpy as np
import pytest
import small
import source_logits

from mesh_transformer.checkpoints import conversion, opening, original
from mesh_transformer.checkpoints.conversion import Conversion
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.source import Key
from mesh_transformer.config import ModelConfig

D, VOCAB, SEQ, LAYERS, SHARDS = 32, 48, 16, 11, 2  # layer 10 comes before layer 2
LONG = {
    **{"vocab_size": VOCAB, "max_position_embeddings": SEQ, "hidden_size": D},
    **{"num_hidden_layers": LAYERS, "num_attention_heads": 4},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "neo": {
        **{"model_type": "gpt_neo", "vocab_size": VOCAB, "max_position_embeddings": SEQ},
        **{"hidden_size": D, "num_layers": 12, "num_heads": 4, "window_size": 5},
        "attention_types": [[["global", "local"], 6]],
    },
    "opt": {**LONG, "model_type": "opt", "ffn_dim": 4 * D},
    "opt, as 350m": {
        **{**LONG, "model_type": "opt", "ffn_dim": 4 * D, "do_layer_norm_before": False},
        "word_embed_proj_dim": 16,
    },
    "neox": {**LONG, "model_type": "gpt_neox", "intermediate_size": 4 * D, "rotary_pct": 0.5},
    "bloom": {
        **{"model_type": "bloom", "vocab_size": VOCAB, "hidden_size": D, "n_layer": LAYERS},
        **{"n_head": 4, "seq_length": SEQ},
    },
}
ROOT, NORM = "causal_transformer_shard/~/", "replicated_layer_norm"
COLUMNS, ROWS, SUMMED, COPIES = "columns", "rows", "summed", "copies"
LAYER = {
    # In the fork's order: queries, values, keys.
    **dict.fromkeys(("q_proj",), ("linear", COLUMNS)),
    **dict.fromkeys(("v_proj",), ("linear_1", COLUMNS)),
    **dict.fromkeys(("k_proj",), ("linear_2", COLUMNS)),
    **dict.fromkeys(("query_key_value",), ("combined_qkv", COLUMNS)),
    **dict.fromkeys(
        ("attention.out_proj", "self_attn.out_proj", "attention.dense", "self_attention.dense"),
        ("linear_3", ROWS),
    ),
    **dict.fromkeys(("c_fc", "fc1", "dense_h_to_4h"), ("linear_4", COLUMNS)),
    **dict.fromkeys(("mlp.c_proj", "fc2", "dense_4h_to_h"), ("linear_5", ROWS)),
    **dict.fromkeys(("ln_1", "self_attn_layer_norm", "input_layernorm"), (NORM, COPIES)),
    **dict.fromkeys(
        ("ln_2", "final_layer_norm", "post_attention_layernorm"), (f"{NORM}_1", COPIES)
    ),
}
ELSE = {
    **dict.fromkeys(
        ("wte", "embed_tokens", "embed_in", "word_embeddings"), ("embedding_shard/~/linear", ROWS)
    ),
    **dict.fromkeys(("wpe", "embed_positions"), ("embedding_shard", COLUMNS)),
    "word_embeddings_layernorm": (f"embedding_shard/~/{NORM}", COPIES),
    "project_in": ("embedding_shard", COLUMNS),
    "project_out": ("projection_shard", COLUMNS),
    "embed_out": ("projection_shard/~/linear", COLUMNS),
    **dict.fromkeys(("ln_f", "final_layer_norm"), (f"projection_shard/~/{NORM}", COPIES)),
}


def leaves(kind: str, held: dict[str, np.ndarray]) -> dict[tuple[str, str], tuple[str, np.ndarray]]:
    """Return each array by the fork's module and name, with what shards hold of it."""
    made: dict[tuple[str, str], tuple[str, np.ndarray]] = {}
    for name, value in held.items():
        module, _, leaf = name.rpartition(".")
        found = re.search(r"\.(\d+)\.", name)
        table = LAYER if found else ELSE
        ends = [it for it in table if re.search(rf"(^|\.){re.escape(it)}$", module)]
        theirs, role = table[max(ends, key=len)]
        if found:
            theirs = f"layer_{found[1]}/~/{theirs}"
        if role is COPIES:
            leaf = {"weight": "scale", "bias": "offset"}[leaf]
        elif theirs.endswith("_shard"):
            leaf = {"project_in": "project_in", "project_out": "project_out"}.get(
                module.rpartition(".")[2], "pos_embs"
            )
            if leaf == "pos_embs":
                value = value[2:] if kind.startswith("opt") else value  # OPT's first two are unused
            else:
                value = value.T
        else:
            is_table = theirs.startswith("embedding")
            if leaf == "bias" and role is ROWS:
                role = SUMMED
            leaf, value = leaf[0], value if leaf == "bias" or is_table else value.T
        made[ROOT + theirs, leaf] = (role, value)
    return made


def part(role: str, value: np.ndarray, shard: int) -> np.ndarray:
    if role in (COLUMNS, ROWS):
        return np.split(value, SHARDS, -1 if role is COLUMNS else 0)[shard]
    if role is SUMMED:
        return value / SHARDS
    return value if shard == 0 else np.full_like(value, np.nan)  # of copies the first is used


def write(folder: Path, kind: str) -> tuple[Path, Any, ModelConfig]:
    source, held = named_arrays.of_config({**CONFIGS[kind]})
    listed = leaves(kind, held)
    for shard in range(SHARDS):
        parts = [part(*listed[key], shard).copy("C") for key in sorted(listed)]
        parts.append(np.asarray(3, np.int32))
        (folder / f"shard_{shard}").mkdir(parents=True)
        each, more = divmod(len(parts), 16)
        for i in range(16):
            n = each + (i < more)
            np.savez(folder / f"shard_{shard}" / f"{i}.npz", *parts[:n])
            parts = parts[n:]
    return folder, source, model_of(kind, source)


def model_of(kind: str, source: Any) -> ModelConfig:
    model = ModelConfig(**source.known)
    return dataclasses.replace(model, pe_offset=0) if kind.startswith("opt") else model


def expected_arrays(kind: str, source: Any) -> dict[Key, np.ndarray]:
    return {
        key: value[2:] if kind.startswith("opt") and "positions" in key.path else value
        for key, value in source.contents.items()
    }


@pytest.mark.thorough
@pytest.mark.parametrize("kind", CONFIGS)
def test_its_other_models_are_read(kind: str, tmp_path: Path) -> None:
    folder, expected, model = write(tmp_path / "step_3", kind)
    source = opening.open_source(opening.find(str(folder)), model)
    assert source.about.endswith("2 shard(s), float32, without optimizer state, step 3")
    for key, value in expected_arrays(kind, expected).items():
        np.testing.assert_array_equal(source.read(key), value, err_msg=str(key))
    opening.verify(opening.find(str(folder)), source, lambda n_bytes: None)
    tokens_BT = np.random.default_rng(0).integers(0, VOCAB, (1, SEQ))
    assert np.isfinite(source_logits.logits(source, model, tokens_BT)).all()


def test_another_model_s_configuration_is_refused(tmp_path: Path) -> None:
    folder, _, model = write(tmp_path / "step_3", "bloom")
    found = opening.find(str(folder))
    with pytest.raises(CheckpointError, match="has no checkpoints of such a model:"):
        opening.open_source(found, dataclasses.replace(model, layers=10))
    gated = dataclasses.replace(model, gated=True)
    with pytest.raises(CheckpointError) as error:
        opening.open_source(found, gated)
    assert "gated is true, false in mesh-transformer-jax" in str(error.value)
    with pytest.raises(
        CheckpointError, match="gated is true, false in mesh-transformer-jax's fork"
    ):
        original.check_held(gated)
    wide = dataclasses.replace(model, n_vocab=96)
    with pytest.raises(CheckpointError, match="n_vocab is 96, 48 in the files"):
        opening.open_source(found, wide)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", CONFIGS)
def test_its_other_models_are_written_as_its_converters_make_them(
    kind: str, tmp_path: Path
) -> None:
    expected, source, model = write(tmp_path / "theirs", kind)
    with_offset = ModelConfig(**source.known)
    source.step = 3
    what = Conversion(format="original", n_shards=SHARDS)
    config = dataclasses.replace(small.parsed(), model=with_offset)
    conversion.convert(source, config, str(tmp_path / "step_3"), what, position={})
    files = sorted(path.relative_to(expected) for path in expected.rglob("*.npz"))
    assert len(files) == 16 * SHARDS
    for path in files:
        theirs, ours = np.load(expected / path), np.load(tmp_path / "step_3" / path)
        assert theirs.files == ours.files
        for name in theirs.files:
            if not np.isnan(theirs[name]).any():  # of copies that are never used
                np.testing.assert_array_equal(ours[name], theirs[name], err_msg=f"{path}/{name}")
    found = opening.open_source(opening.find(str(tmp_path / "step_3")), model)
    for key, value in expected_arrays(kind, source).items():
        np.testing.assert_array_equal(found.read(key), value)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (
            small.VARIANTS["neox"] | {"norm_epsilon": 1e-6, "pe_theta": 5e5},
            {"norm_epsilon", "pe_theta"},
        ),
        (small.VARIANTS["llama"], {"ff_bias", "norm", "n_kv_heads", "gated", "pe_scaling"}),
        (
            small.VARIANTS["one head of keys"],
            {"ff_bias", "norm", "n_kv_heads", "gated", "qk_norm", "embed_scale"},
        ),
        (small.VARIANTS["research"], {"use_static_sgu", "head_qk_trick", "residual"}),
    ],
)
def test_what_neither_it_nor_the_original_has_is_refused_key_by_key(
    keys: dict[str, Any], named: set[str], tmp_path: Path
) -> None:
    config, what = small.parsed(**keys), Conversion(format="slim")
    source = memory_source.of_model(config.model)
    with pytest.raises(CheckpointError, match="no checkpoints of such a model") as refused:
        conversion.convert(source, config, str(tmp_path / "step_3"), what, position={})
    assert sorted(re.findall(r"- (\w+) is ", str(refused.value))) == sorted(named)
    assert not any(tmp_path.iterdir())


def test_shards_that_do_not_divide_narrow_embeddings_are_refused(tmp_path: Path) -> None:
    source, _ = named_arrays.of_config(CONFIGS["opt, as 350m"] | {"word_embed_proj_dim": 15})
    config = dataclasses.replace(small.parsed(), model=ModelConfig(**source.known))
    what = Conversion(format="slim", n_shards=2)
    with pytest.raises(CheckpointError, match="2 shards do not divide d_embed 15"):
        conversion.convert(source, config, str(tmp_path / "step_3"), what, position={})
    assert not any(tmp_path.iterdir())
