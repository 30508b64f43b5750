"""GGUF files: every architecture that is read, quantised or not, and what is refused."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import gguf_names
import memory_source
import named_arrays
import numpy as np
import packed_files
import pytest
from gguf_names import CONFIGS

from mesh_transformer.checkpoints import gguf_files, huggingface, opening
from mesh_transformer.checkpoints.huggingface import HuggingFace
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.npz import BFLOAT16
from mesh_transformer.checkpoints.source import PARAMS, Key
from mesh_transformer.config import ModelConfig
from mesh_transformer.data import tokenizer
from mesh_transformer.errors import UserError

gguf: Any = pytest.importorskip("gguf", reason="needs the package gguf; EXTRAS=test,gguf ./test")


def write(
    path: pathlib.Path, kind: str, how: str = "F32", **changed: Any
) -> tuple[str, memory_source.MemorySource]:
    """Write a model; matrices in a quantisation, the rest in float32, as the conversion does."""
    source, held = named_arrays.of_config(CONFIGS[kind])
    tensors = {
        name: (how if value.ndim == 2 else "F32", value)
        for name, value in gguf_names.converted(kind, held).items()
    }
    if kind == "llama, as 3.2":
        tensors["rope_freqs.weight"] = ("F32", changed.pop("factors", gguf_names.factors()))
    about = {**gguf_names.metadata(kind), **changed}
    path.write_bytes(packed_files.gguf({k: v for k, v in about.items() if v is not None}, tensors))
    return str(path), source


def opened(path: str) -> Any:
    return opening.open_source(opening.find(path), None)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_file_is_the_model_that_it_was_made_of(kind: str, tmp_path: pathlib.Path) -> None:
    path, expected = write(tmp_path / "model.gguf", kind)
    source = opened(str(tmp_path))
    assert source.where == path and source.about.endswith(" in GGUF, F32, float32")
    ours = {**expected.known, "seq": gguf_names.SEQ}
    assert dict(source.known) == ours
    assert source.arrays == expected.arrays
    for key in source.arrays:
        assert source.read(key).tobytes() == expected.contents[key].tobytes(), key


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["F16", "BF16", "Q8_0"])
def test_quantised_numbers_are_those_that_they_stand_for(how: str, tmp_path: pathlib.Path) -> None:
    path, expected = write(tmp_path / "model.gguf", "gpt2", how)
    source = opened(path)
    for name, key in (
        ("token_embd", Key(PARAMS, "decoder/embed/embeddings")),
        ("ffn_up", Key(PARAMS, "decoder/layers/block/ff/in/w", 1)),
    ):
        value = expected.contents[key] if name == "token_embd" else expected.contents[key].T
        meant = {
            "F16": lambda value: value.astype(np.float16),
            "BF16": lambda value: (value.view(np.uint32) >> 16).astype(np.uint16).view(BFLOAT16),
            "Q8_0": packed_files.from_q8_0,
        }[how](np.ascontiguousarray(value))
        found = source.read(key)
        assert found.dtype == meant.dtype
        np.testing.assert_array_equal(found, meant if name == "token_embd" else meant.T)
    assert how in source.about


def test_a_llama_becomes_the_hugging_face_folder_that_it_was(tmp_path: pathlib.Path) -> None:
    path, expected = write(tmp_path / "model.gguf", "llama, as 3.2")
    source = opened(path)
    (tmp_path / "hf").mkdir()
    model = ModelConfig(**source.known)
    huggingface.write(str(tmp_path / "hf"), source, model, dtype=np.dtype(np.float32))
    again = HuggingFace(str(tmp_path / "hf"))
    assert dict(again.known) == dict(source.known)
    for key in source.arrays:
        np.testing.assert_array_equal(again.read(key), expected.contents[key])


@pytest.mark.thorough
def test_what_a_file_says_that_is_not_computed_is_refused(tmp_path: pathlib.Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"general.architecture": "falcon"}, "of the architecture 'falcon'; of GGUF files are re"),
        ({"llama.expert_count": 8}, "expert_count is 8; LLaMA in GGUF is computed with 0 here"),
        ({"llama.attention.sliding_window": 9}, "attention.sliding_window is 9; LLaMA in GGUF is"),
        ({"llama.rope.dimension_count": 8}, "turns 8 features of each head; LLaMA in GGUF is com"),
        ({"llama.rope.scaling.type": "longrope"}, 'rope_type "longrope"; computed here: "default'),
        ({"llama.block_count": None}, "block_count is absent; needed is a whole number above 0"),
        ({"llama.block_count": 3}, "blk.2.attn_norm.weight is missing"),
        ({"llama.feed_forward_length": 64}, r"ffn_gate.weight is \[96, 64\], \[64, 64\] by metad"),
        ({"split.count": 3}, "is one of 3 files of a model: make them one first, with llama-gguf"),
    ]
    for changed, message in refused:
        path, _ = write(tmp_path / "model.gguf", "llama", **changed)
        with pytest.raises(CheckpointError, match=message):
            opened(path)
    path, _ = write(tmp_path / "model.gguf", "llama, as 3.2", factors=np.full(8, 2, np.float32))
    with pytest.raises(CheckpointError, match="stretches rotary positions otherwise than LLaMA 3"):
        opened(path)


def test_yarn_and_linear_positions_are_read(tmp_path: pathlib.Path) -> None:
    scaling = {"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.original_context_length": 6}
    for kind, factors in (
        ("linear", {"factor": 4.0}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 6}),
    ):
        changed: dict[str, Any] = {**scaling, "llama.rope.scaling.type": kind}
        path, _ = write(tmp_path / "model.gguf", "llama", **changed)
        known = opened(path).known
        assert (known["pe_scaling"], known["pe_scaling_factors"]) == (kind, factors)


def test_a_quantisation_that_the_package_cannot_undo_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = write(tmp_path / "model.gguf", "llama", "Q8_0")

    def refuse(data: Any, kind: Any) -> Any:
        raise NotImplementedError(f"Dequantization for {kind.name} is not yet implemented")

    gguf_files._can_dequantise.cache_clear()
    monkeypatch.setattr(gguf, "dequantize", refuse)
    told = "blk.0.attn_q.weight in .*model.gguf is Q8_0, which the package gguf does not dequantise"
    with pytest.raises(CheckpointError, match=told):
        opened(path)
    gguf_files._can_dequantise.cache_clear()


def test_the_package_that_is_missing_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = write(tmp_path / "model.gguf", "llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    told = r'model.gguf needs the package gguf: pip install -e "\.\[gguf\]" -c constraints.txt, or'
    with pytest.raises(CheckpointError, match=told):
        opened(path)


def test_a_file_that_ends_early_is_refused(tmp_path: pathlib.Path) -> None:
    path, _ = write(tmp_path / "model.gguf", "llama")
    whole = pathlib.Path(path).read_bytes()
    for n in (0, 3, 10, 30, 100, 900, 2000, len(whole) // 2, len(whole) - 1):
        pathlib.Path(path).write_bytes(whole[:n])
        with pytest.raises(CheckpointError, match="model.gguf is cut off or damaged"):
            opened(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        opened(str(tmp_path / "absent.gguf"))
    with pytest.raises(CheckpointError, match="read from a local disk only"):
        gguf_files.Gguf("gs://bucket/model.gguf")


def test_of_several_files_one_must_be_named_and_an_empty_folder_has_none(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty holds no complete checkpoint; needed is"):
        opened(str(tmp_path / "empty"))
    write(tmp_path / "a.gguf", "llama")
    path, _ = write(tmp_path / "b.gguf", "gpt2")
    with pytest.raises(CheckpointError, match=r"holds a.gguf, b.gguf: name the one to read"):
        opened(str(tmp_path))
    assert opened(path).about.startswith("GPT-2 in GGUF")


def test_its_tokenizer_is_one_that_lies_beside_it(tmp_path: pathlib.Path) -> None:
    path, _ = write(tmp_path / "model.gguf", "llama")
    run = opening.stored_config(path)
    assert run.data.tokenizer == str(tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer.json, so that nothing says which"):
        tokenizer.load(run.data.tokenizer)


def test_memory_for_one_array_suffices(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 1024}
    monkeypatch.setitem(CONFIGS, "llama", {**CONFIGS["llama"], **sizes, "num_hidden_layers": 4})
    path, _ = write(tmp_path / "model.gguf", "llama", "Q8_0")
    source = opened(path)
    largest = max(array.n_bytes for array in source.arrays.values())
    total = sum(array.n_bytes for array in source.arrays.values())
    peak = memory_source.peak_bytes(lambda: memory_source.read_all(source))
    assert peak < 4 * largest < total / 4
