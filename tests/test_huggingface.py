"""Hugging Face folders without their library: names, files, sizes, and everything refused."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Any

import memory_source
import numpy as np
import pytest
import small
from memory_source import MemorySource

from mesh_transformer import config
from mesh_transformer.checkpoints import huggingface, pytorch, safetensors
from mesh_transformer.checkpoints.families import config_json, config_keys
from mesh_transformer.checkpoints.family import ACTIVATIONS
from mesh_transformer.checkpoints.fitting import model_arrays
from mesh_transformer.checkpoints.huggingface import HuggingFace, is_huggingface
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.npz import BFLOAT16
from mesh_transformer.checkpoints.source import PARAMS, Array, Key
from mesh_transformer.checkpoints.tensors import transposed
from mesh_transformer.config import ModelConfig
from mesh_transformer.network_rules import FREE

ROOT = pathlib.Path(__file__).parent.parent
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]
FLOAT32 = DTYPES[0]
ACTIVATION_NAMES = ", ".join(f'"{name}"' for name in ACTIVATIONS)
TABLE, TABLE_BIAS = Key(PARAMS, "decoder/embed/embeddings"), Key(PARAMS, "decoder/embed/b")
PUBLISHED = {
    # What EleutherAI/gpt-j-6B says of itself, as far as the model depends on it.
    "activation_function": "gelu_new", "architectures": ["GPTJForCausalLM"], "attn_pdrop": 0.0,
    "bos_token_id": 50256, "embd_pdrop": 0.0, "eos_token_id": 50256, "initializer_range": 0.02,
    "gradient_checkpointing": False, "layer_norm_epsilon": 1e-05, "model_type": "gptj",
    "n_embd": 4096, "n_head": 16, "n_inner": None, "n_layer": 28, "n_positions": 2048,
    "resid_pdrop": 0.0, "rotary": True, "rotary_dim": 64, "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer", "use_cache": True, "vocab_size": 50400,
}  # fmt: skip


def a_model(**keys: Any) -> ModelConfig:
    return small.parsed(**{"pe_rotary_dims": 2} | keys).model


def written(folder: pathlib.Path, source: MemorySource, model: ModelConfig, **how: Any) -> str:
    """Write a folder and return its path."""
    folder.mkdir()
    huggingface.write(str(folder), source, model, **{"dtype": FLOAT32} | how)
    return str(folder)


def folded(source: MemorySource, dtype: np.dtype[Any]) -> dict[Key, np.ndarray]:
    """Return what comes back of a source that was written."""
    table, bias = (source.contents[key].astype(np.float32) for key in (TABLE, TABLE_BIAS))
    arrays = {**source.contents, TABLE: table + bias, TABLE_BIAS: np.zeros_like(bias)}
    return {key: array.astype(dtype) for key, array in arrays.items()}


def assert_holds(source: HuggingFace, arrays: dict[Key, np.ndarray]) -> None:
    """Compare what a source says and reads with arrays, bit by bit."""
    expected = {key: Array(array.shape, array.dtype) for key, array in arrays.items()}
    assert dict(source.arrays) == expected
    for key, array in arrays.items():
        found = source.read(key)
        assert Array(found.shape, found.dtype) == expected[key]
        assert found.tobytes() == array.tobytes(), key


def change(folder: str, **keys: Any) -> None:
    """Change a folder's config.json; None takes a key away."""
    path = pathlib.Path(folder, "config.json")
    values = {k: v for k, v in (json.loads(path.read_text()) | keys).items() if v is not None}
    path.write_text(json.dumps(values))


def test_the_published_configuration_is_the_one_that_is_here() -> None:
    ours = config.load(ROOT / "configs" / "gptj_6B_v3-8.json").model
    keys = config_keys(PUBLISHED)
    assert keys == {key: getattr(ours, key) for key in keys}
    assert keys["d_ff"] == 16384
    assert ModelConfig(**keys, n_tokens=ours.n_tokens) == ours
    again = config_json(ours, np.dtype(np.float16))
    assert again["torch_dtype"] == again["dtype"] == "float16"
    common = again.keys() & PUBLISHED.keys()
    assert {key: again[key] for key in common} == {key: PUBLISHED[key] for key in common}
    assert again.keys() - common == {"dtype", "torch_dtype"}
    ignored = {"gradient_checkpointing", "rotary", "scale_attn_weights", "tokenizer_class"}
    assert PUBLISHED.keys() - common == ignored


@pytest.mark.parametrize("d_ff", [None, 96, 128])
def test_configurations_survive_both_ways(d_ff: int | None) -> None:
    model = a_model(d_ff=d_ff)
    theirs = config_json(model, BFLOAT16, ids={"bos_token_id": 7, "eos_token_id": [7, 8]})
    assert theirs["n_inner"] == (96 if d_ff == 96 else None)
    named = [theirs[f"{which}_token_id"] for which in ("bos", "eos", "pad")]
    assert named == [7, [7, 8], None]
    assert config_json(model, BFLOAT16)["eos_token_id"] is None, "50256 is not in the vocabulary"
    keys = config_keys(theirs)
    assert keys == {key: getattr(model, key) for key in keys}
    assert set(keys) == set(vars(model)) - FREE


def test_everything_in_a_configuration_that_is_not_computed_here_is_named_at_once() -> None:
    theirs = PUBLISHED | {
        "activation_function": "gelu_10",
        "layer_norm_epsilon": "1e-5",
        "tie_word_embeddings": True,
        "n_layer": "28",
        "n_inner": -1,
        "rotary_dim": None,
        "quantization_config": {"bits": 8},
    }
    del theirs["n_embd"]
    with pytest.raises(CheckpointError) as error:
        config_keys(theirs, "folder/config.json")
    assert str(error.value).splitlines() == [
        "folder/config.json describes a model that this library does not compute:",
        "  - tie_word_embeddings is true; GPT-J is computed with false here",
        '  - quantization_config is {"bits": 8}; GPT-J is computed with null here',
        "  - n_embd is absent; needed is a whole number above 0",
        '  - n_layer is "28"; needed is a whole number above 0',
        "  - n_inner is -1; needed is a whole number above 0",
        "  - rotary_dim is null; needed is a whole number above 0",
        f'  - activation_function is "gelu_10"; computed here: {ACTIVATION_NAMES}',
        '  - layer_norm_epsilon is "1e-5"; needed is a number above 0',
    ]
    with pytest.raises(CheckpointError, match="n_heads 15 does not divide d_model 4096"):
        config_keys(PUBLISHED | {"n_head": 15})
    with pytest.raises(
        CheckpointError, match="model_type is \"bert\"; this library reads 'gptj', "
    ):
        config_keys({"model_type": "bert"})
    with pytest.raises(CheckpointError, match="model_type is absent"):
        config_keys({})


def test_models_that_transformers_does_not_have_are_refused_with_every_reason() -> None:
    with pytest.raises(CheckpointError) as error:
        config_json(a_model(norm="rmsnorm", pe="t5", pe_rotary_dims=0, d_head=8), FLOAT32)
    assert str(error.value).splitlines() == [
        "the model cannot be written for transformers, which has no class that computes it; GPT-J "
        "comes closest:",
        "  - norm is 'rmsnorm'; GPT-J has 'layernorm'",
        "  - pe is 't5'; GPT-J has 'rotary'",
        "  - d_head is 8; GPT-J has 4",
        "  - rotary_dim is 0; needed is a whole number above 0",
    ]


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(9))
def test_what_is_written_in_files_of_any_size_is_read_again(
    seed: int, tmp_path: pathlib.Path
) -> None:
    rng = np.random.default_rng(seed)
    n_heads, d_head = (int(n) for n in rng.integers(1, 5, 2) * (1, 2))
    model = a_model(
        layers=int(rng.integers(1, 12)),
        n_heads=n_heads,
        d_model=n_heads * d_head,
        d_ff=int(rng.integers(1, 50)),
        n_vocab=int(rng.integers(1, 300)),
    )
    given, dtype = DTYPES[rng.integers(3)], DTYPES[seed % 3]
    source = memory_source.of_model(model, seed, given)
    limit = int(rng.integers(1500, 20000))
    told: list[int] = []
    folder = written(
        tmp_path / "hf", source, model, dtype=dtype, shard_bytes=limit, advance=told.append
    )
    assert len(source.reads) == len(set(source.reads)) == len(source.contents)
    found = HuggingFace(folder)
    assert_holds(found, folded(source, dtype))
    assert (found.step, found.counts, found.where) == (0, None, folder)
    assert ModelConfig(**found.known) == dataclasses.replace(
        model, compute_dtype=ModelConfig.compute_dtype, n_tokens=model.n_vocab
    )
    names = sorted(path.name for path in pathlib.Path(folder).glob("*.safetensors"))
    listed = {
        name: list(safetensors.read_header(str(pathlib.Path(folder, name)))) for name in names
    }
    for name, inside in listed.items():
        assert pathlib.Path(folder, name).stat().st_size <= limit or len(inside) == 1
    index_path = pathlib.Path(folder, "model.safetensors.index.json")
    if len(names) == 1:
        assert names == ["model.safetensors"] and not index_path.exists()
        assert found.about == f"GPT-J of transformers, 1 safetensors file, {dtype.name}"
        return
    n = len(names)
    assert names == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    index = json.loads(index_path.read_text())
    assert index["metadata"] == {"total_size": sum(told)}
    assert index["weight_map"] == {a: name for name, inside in listed.items() for a in inside}
    assert found.about == f"GPT-J of transformers, {n} safetensors files, {dtype.name}"


def test_without_an_embedding_bias_no_bit_is_changed(tmp_path: pathlib.Path) -> None:
    model = a_model()
    source = memory_source.of_model(model, dtype=BFLOAT16)
    rng = np.random.default_rng(0)
    contents = {
        key: np.frombuffer(rng.bytes(array.nbytes), BFLOAT16).reshape(array.shape)
        for key, array in source.contents.items()
    }
    contents[TABLE] = contents[TABLE].copy()
    contents[TABLE][0] = -0.0
    contents[TABLE_BIAS] = np.zeros_like(contents[TABLE_BIAS])
    folder = written(tmp_path / "hf", MemorySource(contents), model, dtype=BFLOAT16)
    assert_holds(HuggingFace(folder), contents)


def test_layers_are_written_one_after_the_other(tmp_path: pathlib.Path) -> None:
    model = a_model(layers=11)
    source = memory_source.of_model(model)
    written(tmp_path / "hf", source, model)
    layers = [key.layer for key in source.reads if key.layer is not None]
    assert layers == sorted(layers)
    assert [key.path for key in source.reads[:2]] == [TABLE_BIAS.path, TABLE.path]
    assert source.reads[-1].path == "decoder/unembed/b"


class Forgetful(MemorySource):
    """A source that holds nothing: each array is made when it is read."""

    @property
    def arrays(self) -> dict[Key, Array]:
        return {key: Array(shape, FLOAT32) for key, shape in self.shapes.items()}

    shapes: dict[Key, tuple[int, ...]]

    def read(self, key: Key) -> np.ndarray:
        return np.ones(self.shapes[key], np.float32)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_never_more_than_two_arrays_are_in_memory(
    dtype: np.dtype[Any], tmp_path: pathlib.Path
) -> None:
    model = a_model(d_model=512, n_heads=8, n_vocab=2048, layers=3, d_ff=2048)
    source = Forgetful({})
    source.shapes = model_arrays(model)
    largest = 512 * 2048 * 4
    writing = memory_source.peak_bytes(lambda: written(tmp_path / "hf", source, model, dtype=dtype))
    opened = HuggingFace(str(tmp_path / "hf"))
    reading = memory_source.peak_bytes(lambda: memory_source.read_all(opened))
    # The copies of 256 x 256 numbers that transposing makes, and what XLA keeps of the shapes.
    assert writing < 2 * largest + 3 * 2**20
    assert reading < 2 * largest * dtype.itemsize // 4 + 2**20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposing_is_exact_for_any_shape(dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (3, 700), (256, 256), (257, 511), (513, 2), (0, 4), (600, 600)):
        n_bytes = Array(shape, dtype).n_bytes
        matrix = np.frombuffer(rng.bytes(n_bytes), dtype).reshape(shape)
        result = transposed(matrix)
        assert result.dtype == dtype and result.flags.c_contiguous
        assert result.tobytes() == matrix.T.tobytes()
        assert transposed(matrix.T).tobytes() == matrix.tobytes()


@pytest.mark.parametrize("key", [TABLE, Key(PARAMS, "decoder/layers/block/ff/in/w", 1)], ids=str)
def test_a_weight_too_large_for_the_dtype_is_named(key: Key, tmp_path: pathlib.Path) -> None:
    model = a_model()
    source = memory_source.of_model(model)
    source.contents[key][0, 0] = 1e5
    with pytest.raises(CheckpointError) as error:
        written(tmp_path / "hf", source, model, dtype=np.dtype(np.float16))
    assert str(key) in str(error.value) and "choose bfloat16 or float32" in str(error.value)
    assert not is_huggingface(str(tmp_path / "hf")), "config.json comes last"


def test_a_source_of_another_model_is_refused(tmp_path: pathlib.Path) -> None:
    source = memory_source.of_model(a_model(layers=1))
    with pytest.raises(CheckpointError, match="does not fit the configuration"):
        written(tmp_path / "hf", source, a_model(layers=2))


def test_constants_are_passed_over_and_all_else_that_is_wrong_is_named_at_once(
    tmp_path: pathlib.Path,
) -> None:
    model = a_model()
    folder = written(tmp_path / "hf", memory_source.of_model(model), model)
    path = str(tmp_path / "hf" / "model.safetensors")
    arrays = {name: it.read() for name, it in safetensors.read_header(path).items()}
    package: Any = pytest.importorskip("safetensors.numpy", reason="needs the package safetensors")
    whole = dict(arrays)
    for layer in range(2):
        whole[f"transformer.h.{layer}.attn.bias"] = np.tri(16, dtype=bool)[None, None]
        whole[f"transformer.h.{layer}.attn.masked_bias"] = np.array(-1e9, np.float32)
    package.save_file(whole, path)
    assert HuggingFace(folder).arrays.keys() == model_arrays(model).keys()

    del arrays["lm_head.bias"], arrays["transformer.h.0.ln_1.bias"]
    arrays["transformer.h.2.ln_1.bias"] = np.zeros(32, np.float32)
    arrays["transformer.wte.weight"] = np.zeros((63, 32), np.float32)
    arrays["transformer.ln_f.bias"] = np.zeros(32, np.int8)
    package.save_file(arrays, path)
    with pytest.raises(CheckpointError) as error:
        HuggingFace(folder)
    assert str(error.value).splitlines() == [
        f"{folder} is not what its config.json describes:",
        "  - transformer.h.0.ln_1.bias is missing",
        "  - lm_head.bias is missing",
        "  - transformer.h.2.ln_1.bias is no part of a GPT-J",
        "  - transformer.wte.weight is [63, 32], [64, 32] by config.json",
        f"  - transformer.ln_f.bias in {path} is I8, which is not read here; save it as F32, F16, "
        "BF16",
    ]
    change(folder, n_layer=9)
    with pytest.raises(CheckpointError, match=r"\n  - and \d+ more"):
        HuggingFace(folder)


def test_folders_are_told_from_others_and_what_they_lack_is_said(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "hf"
    assert not is_huggingface(str(folder))
    folder.mkdir()
    (folder / "config.json").write_text('{"layers": 2}')
    assert not is_huggingface(str(folder))
    model = a_model()
    (folder / "config.json").write_text(json.dumps(config_json(model, FLOAT32)))
    assert is_huggingface(str(folder))
    with pytest.raises(CheckpointError, match="holds no weights: needed is model.safetensors or"):
        HuggingFace(str(folder))
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match="config.json is damaged"):
        HuggingFace(str(folder))
    (folder / "config.json").write_text('["model_type"]')
    with pytest.raises(CheckpointError, match="config.json is damaged: it holds no JSON object"):
        HuggingFace(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json is missing"):
        HuggingFace(str(folder))


def test_what_is_wrong_with_an_index_is_said(tmp_path: pathlib.Path) -> None:
    model = a_model()
    folder = written(tmp_path / "hf", memory_source.of_model(model), model, shard_bytes=20000)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    lost = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"{lost} is missing"):
        HuggingFace(folder)
    outside = listed["weight_map"] | {"lm_head.bias": "../lost"}
    index.write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(CheckpointError, match="names '../lost', which is no file of its folder"):
        HuggingFace(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged: it has no weight_map"):
        HuggingFace(folder)


def test_pytorch_s_files_need_pytorch_and_a_local_disk(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = a_model()
    folder = written(tmp_path / "hf", memory_source.of_model(model), model)
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match="pip install torch, or save the model as safetens"):
        HuggingFace(folder)
    with pytest.raises(CheckpointError, match="local disk only; copy the folder to one, or save"):
        pytorch.read_header("gs://bucket/model/pytorch_model.bin")
