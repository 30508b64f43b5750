"""Families of transformers without their library: published models, tables, what is refused."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import memory_source
import numpy as np
import pytest
import small
from memory_source import MemorySource
from published import N_PARAMETERS, published

from mesh_transformer.checkpoints import huggingface, safetensors
from mesh_transformer.checkpoints.families import FAMILIES, GPT_NEOX, config_json, config_keys
from mesh_transformer.checkpoints.fitting import fitted, model_arrays
from mesh_transformer.checkpoints.huggingface import HuggingFace
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.source import PARAMS, Array, Key
from mesh_transformer.checkpoints.tensors import tensors
from mesh_transformer.config import ModelConfig
from mesh_transformer.pod.worker import Worker

FLOAT32 = np.dtype(np.float32)
LOCAL = {"use_sliding_window": True}
SIZES: dict[str, Any] = {"layers": 3, "d_model": 32, "n_heads": 4, "n_vocab": 64, "seq": 16}


def a_model(family: Any, **keys: Any) -> ModelConfig:
    """Return a small model of a family."""
    return ModelConfig(**{**SIZES, "compute_dtype": "float32", **family.ours, **keys})


def as_family(family: Any) -> ModelConfig:
    """Return a small model that is written as this family and as none before it."""
    keys: dict[str, dict[str, Any]] = {
        "GPT-J": {"pe_rotary_dims": 4},
        "GPT-2": {"tie_embeddings": True},
        "GPT-Neo": {"tie_embeddings": True, "window": 3, "window_every": 2},
        "GPT-NeoX": {"residual": "parallel-untied", "qkv_bias": True, "o_bias": True},
        "OPT": {
            **{"residual": "post-norm", "final_norm": False, "d_embed": 16, "qkv_bias": True},
            **{"o_bias": True, "tie_embeddings": True, "activation": "relu"},
        },
        "BLOOM": {"tie_embeddings": True},
        "LLaMA": {"n_kv_heads": 2, "d_ff": 48, "ff_bias": False, "activation": "silu"},
        "Mistral": {"n_kv_heads": 2, "d_ff": 48, "window": 5, "activation": "silu"},
        "Qwen2": {"n_kv_heads": 2, "d_ff": 48, "tie_embeddings": True, "activation": "silu"},
        "Qwen3": {"n_kv_heads": 2, "d_head": 16, "d_ff": 48, "activation": "silu"},
        "T5": {"encoder_layers": 2, "d_ff": 48, "gated": True, "pad_id": 2, "encoder_seq": 9},
        "Gemma": {"n_kv_heads": 1, "d_head": 16, "embed_scale": 32**0.5, "tie_embeddings": True},
    }
    return a_model(family, **keys[family.name])


def written(folder: pathlib.Path, source: MemorySource, model: ModelConfig) -> str:
    folder.mkdir()
    huggingface.write(str(folder), source, model, dtype=FLOAT32)
    return str(folder)


@pytest.mark.thorough
@pytest.mark.parametrize("name", N_PARAMETERS)
def test_published_models_are_read_with_their_published_number_of_parameters(name: str) -> None:
    keys = config_keys(published(name))
    model = ModelConfig(**keys)
    count = sum(math.prod(shape) for shape in model_arrays(model).values())
    assert count == N_PARAMETERS[name]
    assert not model.embed_bias, "no family has one"


@pytest.mark.parametrize("name", N_PARAMETERS)
def test_published_configurations_survive_both_ways(name: str) -> None:
    theirs = published(name)
    keys = config_keys(theirs)
    again = config_json(ModelConfig(**keys), FLOAT32)
    assert config_keys(again) == keys
    assert again["model_type"] == theirs["model_type"]
    assert again["architectures"] == theirs["architectures"]
    # Said otherwise, or of no matter: dropout, scalings' older name, a window that is not used.
    differs = {"torch_dtype", "intermediate_size", "sliding_window", "initializer_range", "dropout"}
    differs |= {"rope_scaling", "bos_token_id", "eos_token_id", "hidden_act", "hidden_activation"}
    differs |= {"attn_pdrop", "embd_pdrop", "resid_pdrop", "word_embed_proj_dim", "head_dim"}
    differs |= {"dropout_rate"}
    differs |= {"num_key_value_heads"}  # null is as many as others
    common = (again.keys() & theirs.keys()) - differs
    assert {key: again[key] for key in common} == {key: theirs[key] for key in common}


def test_what_differs_between_published_models_is_read() -> None:
    llama = config_keys(published("meta-llama/Llama-3.2-1B"))
    assert (llama["pe_scaling"], llama["pe_theta"]) == ("llama3", 500_000.0)
    assert llama["pe_scaling_factors"] == {
        **{"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 8192.0,
    }
    neo = config_keys(published("EleutherAI/gpt-neo-125m"))
    assert (neo["window"], neo["window_every"], neo["attention_scale"]) == (256, 2, 1.0)
    assert (neo["qkv_bias"], neo["o_bias"], neo["d_ff"]) == (False, True, 3072)
    assert config_keys(published("mistralai/Mistral-7B-v0.1"))["window"] == 4096
    assert config_keys(published("Qwen/Qwen2-0.5B"))["window"] == 0
    gemma = config_keys(published("google/gemma-2b"))
    assert (gemma["embed_scale"], gemma["activation"]) == (2048**0.5, "gelu_new")
    assert (gemma["tie_embeddings"], gemma["d_head"]) == (True, 256)
    pythia = config_keys(published("EleutherAI/pythia-70m"))
    assert (pythia["residual"], pythia["pe_rotary_dims"]) == ("parallel-untied", 16)
    small_opt = config_keys(published("facebook/opt-125m"))
    middle_opt = config_keys(published("facebook/opt-350m"))
    assert (small_opt["residual"], small_opt["final_norm"]) == ("sequential", True)
    assert (middle_opt["residual"], middle_opt["final_norm"]) == ("post-norm", False)
    assert (middle_opt["d_embed"], middle_opt["d_model"]) == (512, 1024)


def test_both_forms_of_rotary_keys_mean_the_same() -> None:
    older = published("meta-llama/Llama-3.2-1B")
    newer = {key: value for key, value in older.items() if not key.startswith("rope_")}
    newer["rope_parameters"] = {**older["rope_scaling"], "rope_theta": older["rope_theta"]}
    assert config_keys(newer) == config_keys(older)
    neox = published("EleutherAI/pythia-70m", rotary_pct=0.5, rotary_emb_base=100)
    newer = {key: value for key, value in neox.items() if not key.startswith("rotary_")}
    newer["rope_parameters"] = {"rope_theta": 100, "partial_rotary_factor": 0.5}
    assert config_keys(newer) == config_keys(neox)
    for n_rotated in range(2, 97, 2):  # whatever fraction of a head is written, it means as many
        shape = {"d_model": 384, "pe_rotary_dims": n_rotated, "residual": "parallel-untied"}
        model = a_model(GPT_NEOX, **shape)
        assert config_keys(config_json(model, FLOAT32))["pe_rotary_dims"] == n_rotated


@pytest.mark.parametrize(
    ("name", "changed", "problem"),
    [
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is false; GPT-2 is computed"),
        ("gpt2", {"activation_function": "gelu_10"}, "activation_function is .gelu_10.; computed"),
        ("gpt2", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1; computed here: false, "),
        (
            "EleutherAI/gpt-neo-125m",
            {"attention_types": [[["local", "global"], 6]]},
            "attention_types has local layers that are not every n-th one",
        ),
        (
            "EleutherAI/gpt-neo-125m",
            {"attention_types": [[["global"], 5]]},
            "needed is global or local for each of 12 layers",
        ),
        (
            "meta-llama/Llama-3.2-1B",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_scaling has rope_type .dynamic.; computed here: .default., .linear., .llama3., ",
        ),
        (
            "meta-llama/Llama-3.2-1B",
            {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
            "llama3 positions lack low_freq_factor",
        ),
        (
            "meta-llama/Llama-3.2-1B",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
            "truncate is false; YaRN is computed with true",
        ),
        (
            "meta-llama/Llama-3.2-1B",
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5; all of a head is turned",
        ),
        ("EleutherAI/gpt-neo-125m", {"attention_types": [[[[]], 12]]}, "needed is global or local"),
        ("EleutherAI/pythia-70m", {"rope_scaling": 2.0}, "rope_scaling is 2.0; needed is an obj"),
        ("EleutherAI/pythia-70m", {"rope_scaling": {"type": []}}, "rope_scaling has rope_type .."),
        ("mistralai/Mistral-7B-v0.1", {"layer_types": [[]]}, "all layers are computed alike here"),
        ("Qwen/Qwen2-0.5B", {**LOCAL, "max_window_layers": None}, "max_window_layers is null"),
        ("Qwen/Qwen2-0.5B", {**LOCAL, "layer_types": []}, "needed is one for each of 24"),
        ("mistralai/Mistral-7B-v0.1", {"sliding_window": 0}, "sliding_window is 0; needed is a wh"),
        (
            "Qwen/Qwen2-0.5B",
            {**LOCAL, "max_window_layers": 7},
            "max_window_layers has local layers that are not every n-th one",
        ),
        ("google/gemma-2b", {"hidden_activation": "gelu"}, "hidden_activation is .gelu.; computed"),
        (
            "facebook/opt-125m",
            {"do_layer_norm_before": 1},
            "do_layer_norm_before is 1; needed is t",
        ),
        (
            "facebook/opt-125m",
            {"layer_norm_elementwise_affine": False},
            "layer_norm_elementwise_affine is false; OPT is computed with true here",
        ),
        ("EleutherAI/pythia-70m", {"rotary_pct": "1/4"}, 'rotary_pct is "1/4"; needed is a number'),
        (
            "bigscience/bloom-560m",
            {"apply_residual_connection_post_layernorm": True, "quantization_config": {"bits": 8}},
            "_post_layernorm is true; BLOOM .*\n  - quantization_config is {.bits.: 8}; BLOOM is c",
        ),
    ],
)
def test_what_is_not_computed_here_is_refused(
    name: str, changed: Mapping[str, Any], problem: str
) -> None:
    with pytest.raises(CheckpointError, match=problem):
        config_keys(published(name, **changed))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_has_every_array_of_its_models_once(family: Any) -> None:
    model = as_family(family)
    assert config_json(model, FLOAT32)["model_type"] == family.model_type
    keys = [key for tensor in tensors(family, model) for key in tensor.keys]
    assert sorted(keys) == sorted(model_arrays(model).keys() - {Key(PARAMS, "decoder/embed/b")})
    names = [row.theirs for row in family.rows]
    assert len(names) == len(set(names))
    spoken_of = [name for row in family.keys for name in row.ours.split()]
    assert not family.ours.keys() & set(spoken_of)
    assert set(vars(model)) >= {*spoken_of, *family.ours}


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_is_written_is_read_again_bit_by_bit(family: Any, tmp_path: pathlib.Path) -> None:
    model = as_family(family)
    source = memory_source.of_model(model)
    if model.embed_bias:
        source.contents[Key(PARAMS, "decoder/embed/b")][...] = 0
    folder = written(tmp_path / "hf", source, model)
    found = HuggingFace(folder)
    assert ModelConfig(**found.known, compute_dtype="float32") == model
    assert found.arrays == source.arrays
    for key, array in source.contents.items():
        assert found.read(key).tobytes() == array.tobytes(), key

    # As the models alone are saved, with the constants that older releases wrote, and with a copy
    # of the embeddings as the head.
    path = str(pathlib.Path(folder, "model.safetensors"))
    arrays = {name: it.read() for name, it in safetensors.read_header(path).items()}
    bare = {name.removeprefix(family.prefix): array for name, array in arrays.items()}
    more = {
        "GPT-2": "h.0.attn.bias", "GPT-Neo": "h.2.attn.attention.masked_bias",
        "GPT-J": "h.1.attn.masked_bias", "GPT-NeoX": "layers.0.attention.rotary_emb.inv_freq",
        "LLaMA": "layers.1.self_attn.rotary_emb.inv_freq",
    }  # fmt: skip
    if family.name in more:
        bare[more[family.name]] = np.zeros(4, np.float32)
    if model.tie_embeddings:
        bare["lm_head.weight"] = np.zeros((2, 2), np.float32)
    listed = {name: Array(array.shape, array.dtype) for name, array in bare.items()}
    safetensors.write(path, listed, bare.__getitem__)
    again = HuggingFace(folder)
    for key, array in source.contents.items():
        assert again.read(key).tobytes() == array.tobytes(), key


def test_three_arrays_in_one_lie_as_each_family_has_them(tmp_path: pathlib.Path) -> None:
    """GPT-2: q, k, v side by side. GPT-NeoX: those of a head side by side, transposed."""
    by_name = {family.name: family for family in FAMILIES}
    for name, theirs in (
        ("GPT-2", "transformer.h.1.attn.c_attn."),
        ("GPT-NeoX", "gpt_neox.layers.1.attention.query_key_value."),
    ):
        model = as_family(by_name[name])
        source = memory_source.of_model(model)
        folder = written(tmp_path / name, source, model)
        stored = safetensors.read_header(str(pathlib.Path(folder, "model.safetensors")))
        weight, bias = (stored[theirs + part].read() for part in ("weight", "bias"))
        parts = {
            part: np.stack(
                [source.contents[Key(PARAMS, f"decoder/layers/block/attention/{x}/{part}", 1)]
                 for x in "qkv"]
            )
            for part in "wb"
        }  # fmt: skip
        if name == "GPT-2":
            np.testing.assert_array_equal(weight, np.concatenate(parts["w"], axis=1))
            np.testing.assert_array_equal(bias, np.concatenate(parts["b"]))
            continue
        by_head = parts["w"].reshape(3, 32, model.n_heads, model.d_head).transpose(2, 0, 3, 1)
        np.testing.assert_array_equal(weight, by_head.reshape(3 * 32, 32))
        by_head = parts["b"].reshape(3, model.n_heads, model.d_head, 1).swapaxes(0, 1)
        np.testing.assert_array_equal(bias, by_head.reshape(-1))


class Zeros(MemorySource):
    """A source that holds nothing: each array is made when it is read."""

    def read(self, key: Key) -> np.ndarray:
        return np.zeros_like(self.contents[key])


@pytest.mark.thorough
def test_three_arrays_in_one_take_no_more_memory_than_two_of_it(tmp_path: pathlib.Path) -> None:
    shape = {"d_model": 768, "d_ff": 64, "residual": "parallel-untied", "pe_rotary_dims": 2}
    model = a_model(GPT_NEOX, **shape, qkv_bias=True, o_bias=True, activation="gelu")
    source = Zeros(memory_source.of_model(model).contents)
    largest = 3 * 768 * 768 * 4
    writing = memory_source.peak_bytes(lambda: written(tmp_path / "hf", source, model))
    opened = HuggingFace(str(tmp_path / "hf"))
    reading = memory_source.peak_bytes(lambda: memory_source.read_all(opened))
    assert writing < 2 * largest + 3 * 2**20
    assert reading < 2 * largest + 2**20


def test_a_model_is_written_as_the_first_family_that_computes_it() -> None:
    by_name = {family.name: family for family in FAMILIES}
    assert config_json(a_model(by_name["Mistral"]), FLOAT32)["model_type"] == "llama"
    qwen = as_family(by_name["Qwen2"])
    assert config_json(qwen, FLOAT32)["layer_types"] == ["full_attention"] * 3
    every_other = a_model(by_name["Qwen2"], window=4, window_every=2)
    theirs = config_json(every_other, FLOAT32)
    assert theirs["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]
    assert theirs["use_sliding_window"] is True and theirs["sliding_window"] == 4


@pytest.mark.parametrize(
    ("name", "changed", "problems"),
    [
        (
            "LLaMA",
            {"embed_bias": True, "tie_embeddings": True},
            ["embed_bias is True; LLaMA has F"],
        ),
        ("LLaMA", {"qkv_bias": True, "o_bias": True, "window": 4}, ["window is 4; LLaMA has 0"]),
        (
            "GPT-Neo",
            {"n_kv_heads": 2, "attention_scale": 0.5},
            ["attention_scale is 0.5; GPT-Neo has 1.0", "n_kv_heads is 2; GPT-Neo has 4"],
        ),
        (
            "OPT",
            {"residual": "parallel-untied", "qkv_bias": True},
            [
                "residual is 'parallel-untied'; OPT has 'sequential' or, without",
                "qkv_bias is True and o_bias is False and ff_bias is True; OPT has False, True for",
            ],
        ),
        ("Gemma", {"embed_scale": 2.0, "d_head": 16}, ["embed_scale is 2.0; Gemma has 5.65685424"]),
    ],
)
def test_what_no_family_computes_is_refused_with_reasons_of_the_closest(
    name: str, changed: dict[str, Any], problems: list[str]
) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    with pytest.raises(CheckpointError) as error:
        config_json(a_model(family, **changed), FLOAT32)
    lines = str(error.value).splitlines()
    assert lines[0].endswith(f"{name} comes closest:")
    assert len(lines) == len(problems) + 1
    for line, problem in zip(lines[1:], problems, strict=True):
        assert line.startswith(f"  - {problem}")


def test_an_embedding_bias_is_added_to_the_table_where_the_head_is_another(
    tmp_path: pathlib.Path,
) -> None:
    llama = next(family for family in FAMILIES if family.name == "LLaMA")
    model = a_model(llama, embed_bias=True)
    source = memory_source.of_model(model)
    found = HuggingFace(written(tmp_path / "hf", source, model))
    table = Key(PARAMS, "decoder/embed/embeddings")
    bias = Key(PARAMS, "decoder/embed/b")
    assert found.known["embed_bias"] is False and bias not in found.arrays
    expected = source.contents[table] + source.contents[bias]
    np.testing.assert_array_equal(found.read(table), expected)


@pytest.mark.thorough
def test_rows_that_pad_a_vocabulary_get_no_probability(tmp_path: pathlib.Path) -> None:
    """Of a head without a bias, tied or not, as long as the configuration says which they are."""
    tokens_BT1 = small.tokens(2, 17) % 60
    for variant in ("gpt2", "llama"):
        keys = {**small.VARIANTS[variant], "n_tokens": 60}
        model = small.parsed(**keys, n_vocab=60).model
        source = memory_source.of_model(model)
        for array in source.contents.values():
            array *= 0.3
        folder = written(tmp_path / variant, source, model)
        seen = []
        for n_vocab, n_devices, cores in ((60, 1, 1), (72, 1, 1), (72, 8, 4)):
            config = small.parsed(**keys, n_vocab=n_vocab, cores_per_replica=cores)
            worker = Worker(config, jax.devices()[:n_devices])
            worker.load_weights(folder)
            seen.append(worker.evaluate(tokens_BT1).loss_BT)
        assert np.abs(seen[0]).max() > 1
        for padded in seen[1:]:
            np.testing.assert_allclose(padded, seen[0], rtol=0, atol=1e-5)
        wrong = small.parsed(**{**keys, "n_vocab": 72, "n_tokens": 72}).model
        with pytest.raises(CheckpointError, match="set n_tokens to 60 or less"):
            fitted(HuggingFace(folder), wrong)
