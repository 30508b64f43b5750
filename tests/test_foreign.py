"""Formats of other programs, written: read again they are the same; what they lack is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import sys
from typing import Any, get_args

import memory_source
import numpy as np
import pytest
import small
import yaml

from mesh_transformer.checkpoints import conversion, flax_writer, jaxseq, opening, pytorch
from mesh_transformer.checkpoints.conversion import Conversion
from mesh_transformer.checkpoints.foreign import FOREIGN
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.npz import BFLOAT16
from mesh_transformer.checkpoints.source import PARAMS, Array, Key
from mesh_transformer.config import ModelConfig

SIZES: dict[str, Any] = {"layers": 11, "d_model": 24, "n_heads": 6, "n_vocab": 20, "seq": 12}
GPTJ = {**SIZES, "norm": "layernorm", "pe": "rotary", "pe_rotary_dims": 2}
BIASED = {"qkv_bias": True, "o_bias": True, "embed_bias": False, "head_bias": False}
GPT2 = {
    **{**SIZES, **BIASED, "norm": "layernorm", "pe": "fixed", "residual": "sequential"},
    **{"tie_embeddings": True, "d_ff": 36},
}
NEOX = {
    **{**SIZES, **BIASED, "norm": "layernorm", "pe": "rotary-half", "pe_rotary_dims": 2},
    "residual": "parallel-untied",
}
BIAS_FREE = {"ff_bias": False, "embed_bias": False, "head_bias": False}
LLAMA = {
    **{**SIZES, **BIAS_FREE, "norm": "rmsnorm-mean", "pe": "rotary-half", "gated": True},
    **{"residual": "sequential", "activation": "silu", "norm_epsilon": 1e-6, "d_ff": 36},
}
T5 = {**SIZES, **small.ENCODER_DECODERS["t5"], "n_heads": 4, "d_model": 32}
ZERO = {
    **{**SIZES, **BIAS_FREE, "norm": "layernorm-nobias", "norm_epsilon": 1e-6, "pe": "alibi"},
    **{"residual": "sequential", "tie_embeddings": True},
}
ZERO_BIASED = {
    **ZERO,
    "norm": "layernorm",
    **dict.fromkeys(("qkv_bias", "o_bias", "ff_bias"), True),
}
MUP = {"mup_base_d_model": 12, "mup_base_d_ff": 48, "mup_base_d_head": 2}
ZEROS = {
    "ZeRO": ZERO,
    "ZeRO without positions": {**ZERO, "pe": "none"},
    "ZeRO, one norm": {**ZERO, "residual": "parallel"},
    "biases": ZERO_BIASED,
    "biases, one norm": {**ZERO_BIASED, "residual": "parallel"},
    "a table": {**ZERO_BIASED, "pe": "none", "embed_bias": True},
}
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "jaxseq": {
        "GPT-J": GPTJ,
        "GPT-2": GPT2,
        "OPT": {**GPT2, "activation": "relu", "pe_offset": 2},
        "LLaMA": LLAMA,
        "T5": T5,
        "LLaMA, padded": {**LLAMA, "n_tokens": 17},
    },
    "zero": ZEROS,
    "zero-torch": {kind: keys for kind, keys in ZEROS.items() if keys["pe"] == "alibi"},
    "cerebras": {
        "GPT-J": GPTJ,
        "GPT-J, tied": {**GPTJ, "tie_embeddings": True, "embed_bias": False},
        "GPT-2": GPT2,
        "NeoX": NEOX,
        "LLaMA": {**LLAMA, "n_kv_heads": 2},
        "no biases": {**NEOX, "norm": "layernorm-nobias", **BIAS_FREE, "qkv_bias": False},
        "muP": {**GPT2, **MUP, "mup_output_alpha": 2.22, "mup_attention_alpha": 2**-0.5},
        # Powers of two, by which positions and biases are scaled and nothing is rounded.
        "scaled": {**GPT2, "embed_scale": 8.0, "output_scale": 0.25, "attention_scale": 0.25},
        "scaled, untied": {
            **{**GPT2, "output_scale": 0.5, "embed_scale": 4.0},
            **{"tie_embeddings": False, "head_bias": True},
        },
    },
}


def needs_torch(format: str) -> None:
    if format in ("zero-torch", "cerebras"):
        pytest.importorskip("torch", reason="reads and writes PyTorch's own files")


def source_of(model: ModelConfig, dtype: Any = np.float32) -> memory_source.MemorySource:
    """Return random weights; most formats have no bias of the embedding that is not zero."""
    source = memory_source.of_model(model, dtype=dtype)
    bias = Key(PARAMS, "decoder/embed/b")
    if bias in source.contents and not model.tie_embeddings:
        source.contents = {**source.contents, bias: np.zeros_like(source.contents[bias])}
    return source


def convert(model: ModelConfig, source: Any, target: pathlib.Path, format: str, **more: Any) -> Any:
    config = dataclasses.replace(small.parsed(), model=model)
    keys = {key: more.pop(key) for key in ("dtype", "n_vocab") if key in more}
    what = Conversion(format=format, **keys)  # type: ignore[arg-type]
    conversion.convert(source, config, str(target), what, position={}, **more)
    needed = model if format.startswith("zero") else None
    return opening.open_source(opening.find(str(target)), needed)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("format", "kind"), [(format, kind) for format, kinds in KINDS.items() for kind in kinds]
)
def test_what_is_written_is_read_as_it_was(format: str, kind: str, tmp_path: pathlib.Path) -> None:
    needs_torch(format)
    model = ModelConfig(**KINDS[format][kind])
    dtype = BFLOAT16 if kind in ("GPT-J", "ZeRO") else np.dtype(np.float32)
    source = source_of(model, dtype)
    totals: list[int] = []
    advanced: list[int] = []

    def stage(n_bytes: int) -> Any:
        totals.append(n_bytes)
        return contextlib.nullcontext(advanced.append)

    found = convert(model, source, tmp_path / "target", format, stage=stage)
    assert totals == [sum(advanced)]
    told = {key: getattr(model, key) for key in found.known}
    assert dict(found.known) == {
        key: pytest.approx(value, rel=1e-15) if isinstance(value, float) else value
        for key, value in told.items()
    }
    assert found.arrays == source.arrays
    for key, value in source.contents.items():
        # float32 divided and multiplied by the scale of muP: two roundings
        rtol = 2**-22 if kind == "muP" and key.path == "decoder/unembed/b" else 0
        np.testing.assert_allclose(found.read(key), value, rtol=rtol, atol=0, err_msg=str(key))
    again = convert(model, found, tmp_path / "again", format)
    assert again.step == found.step == (0 if format == "jaxseq" else 7)
    for path in (tmp_path / "target").iterdir() if kind != "muP" else ():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.thorough
@pytest.mark.parametrize("format", FOREIGN)
def test_it_replaces_nothing_unasked_and_is_replaced_when_asked(
    format: str, tmp_path: pathlib.Path
) -> None:
    needs_torch(format)
    model = ModelConfig(**next(iter(KINDS[format].values())))
    source, target = source_of(model), tmp_path / "target"
    convert(model, source, target, format)
    with pytest.raises(CheckpointError, match=r"is there already: .*--overwrite"):
        convert(model, source, target, format)
    half = convert(model, source, target, format, overwrite=True, dtype="bfloat16")
    assert {array.dtype for array in half.arrays.values()} == {BFLOAT16}
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize(
    ("format", "keys", "told"),
    [
        (
            "jaxseq",
            {**LLAMA, "pe_theta": 5e5, "n_kv_heads": 2},
            ["pe_theta is 500000.0; LLaMA has 10000.0", "n_kv_heads is 2; LLaMA has 6"],
        ),
        (
            "zero",
            {**ZERO, "norm_epsilon": 1e-5, "qkv_bias": True, "pe": "fixed"},
            [
                "norm_epsilon is 1e-05; ZeRO-transformer has 1e-06",
                "pe is 'fixed'; ZeRO-transformer has 'alibi', 'none'",
                "qkv_bias is True and o_bias is False and ff_bias is False; ZeRO-transformer has "
                "False, True for all of them",
                "norm is 'layernorm-nobias'; ZeRO-transformer has 'layernorm' where qkv_bias is "
                "true, and 'layernorm-nobias' where it is false",
                "embed_bias is False; ZeRO-transformer has one, which is its table of positions, "
                "where qkv_bias is true and pe is 'none', and only there",
            ],
        ),
        (
            "zero-torch",
            {**ZERO, "d_ff": 36, "pe": "none"},
            [
                "d_ff is 36; ZeRO-transformer's port to PyTorch has 96",
                "pe is 'none'; ZeRO-transformer's port to PyTorch has 'alibi'",
            ],
        ),
        (
            "cerebras",
            {**NEOX, "pe": "alibi", "norm": "rmsnorm", "window": 4, "pe_rotary_dims": 0},
            [
                "window is 4; Cerebras model has 0",
                "norm is 'rmsnorm'; Cerebras model has 'layernorm', 'layernorm-nobias' where "
                "residual is 'parallel-untied'",
                "pe is 'alibi'; Cerebras model has 'fixed', 'rotary-half'",
            ],
        ),
        (
            "cerebras",
            {
                **{**GPTJ, "embed_scale": 2.0, "output_scale": 0.5, "attention_scale": 0.25},
                **{"embed_bias": False, "pe_theta": 5e5},
            },
            [
                "pe_theta is 500000.0; Cerebras model has 10000.0",
                "attention_scale is 0.25; Cerebras model has 0.5 where residual is 'parallel'",
                "output_scale is 0.5; Cerebras model has 1.0 where residual is 'parallel'",
                "embed_scale is 2.0; Cerebras model has 1.0 where residual is 'parallel'",
            ],
        ),
        (
            "cerebras",
            {**LLAMA, "norm": "layernorm-nobias", "attention_scale": 0.125},
            [
                "norm is 'layernorm-nobias'; Cerebras model has 'layernorm', 'rmsnorm-mean' where "
                "residual is 'sequential'",
                "attention_scale is 0.125; Cerebras model has 0.5, 0.25",
            ],
        ),
        (
            "cerebras",
            {**GPTJ, "tie_embeddings": True},
            ["embed_bias is True; Cerebras model has False"],
        ),
    ],
)
def test_each_key_that_a_format_cannot_hold_is_named_before_anything_is_written(
    format: str, keys: dict[str, Any], told: list[str], tmp_path: pathlib.Path
) -> None:
    needs_torch(format)
    model = ModelConfig(**keys)
    with pytest.raises(CheckpointError) as error:
        convert(model, source_of(model), tmp_path / "target", format)
    heading, *lines = str(error.value).splitlines()
    assert heading.startswith(f"the model cannot be written for {FOREIGN[format].program}, ")
    assert lines == [f"  - {it}" for it in told]
    assert not any(tmp_path.iterdir())


def test_what_a_stream_has_no_room_for_is_refused_before_anything_is_replaced(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(**LLAMA)
    monkeypatch.setattr(flax_writer, "_LONGEST", 24 * 36 * 2 + 100)
    monkeypatch.setattr(conversion.places, "becoming", None)
    with pytest.raises(CheckpointError) as error:
        convert(model, source_of(model), tmp_path / "target", "jaxseq", overwrite=True)
    assert "transformer/h/10/feed_forward/w3/kernel is 34" in str(error.value)
    jaxseq.check_sizes(model, BFLOAT16)


@pytest.mark.parametrize("format", ["zero", "cerebras"])
def test_padding_that_a_format_cannot_tell_is_cut_off_or_asked_for(
    format: str, tmp_path: pathlib.Path
) -> None:
    needs_torch(format)
    keys = {**next(iter(KINDS[format].values())), "n_tokens": 17, "head_bias": False}
    model = ModelConfig(**keys)
    source = source_of(model)
    with pytest.raises(CheckpointError) as error:
        convert(model, source, tmp_path / "target", format)
    assert f"which {FOREIGN[format].program} cannot know" in str(error.value)
    assert not any(tmp_path.iterdir())
    config = dataclasses.replace(small.parsed(), model=model)
    what = Conversion(format=format, n_vocab=17)  # type: ignore[arg-type]
    conversion.convert(source, config, str(tmp_path / "cut"), what, position={})
    cut = opening.open_source(
        opening.find(str(tmp_path / "cut")), dataclasses.replace(model, n_vocab=17)
    )
    assert cut.arrays[Key(PARAMS, "decoder/embed/embeddings")].shape[0] == 17


@pytest.mark.parametrize("format", ["zero-torch", "cerebras"])
def test_files_of_pytorch_s_are_refused_without_it(
    format: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    model = ModelConfig(**next(iter(KINDS[format].values())))
    with pytest.raises(CheckpointError, match="pip install torch, or choose another --format"):
        convert(model, source_of(model), tmp_path / "target", format)
    assert not any(tmp_path.iterdir())


def test_the_command_offers_each_format() -> None:
    text = (pathlib.Path(__file__).parent.parent / "resharding_example.py").read_text()
    names = get_args(conversion.Format)
    assert FOREIGN.keys() < {*names}
    assert f"formats = ({', '.join(map(json.dumps, names))})" in text


@pytest.mark.thorough
def test_what_is_beside_weights_says_what_the_programs_need(tmp_path: pathlib.Path) -> None:
    model = ModelConfig(**KINDS["jaxseq"]["LLaMA, padded"])
    convert(model, source_of(model), tmp_path / "jaxseq", "jaxseq")
    config = json.loads((tmp_path / "jaxseq" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["max_sequence_length"] == SIZES["seq"]
    assert (config["vocab_size"], config["unpadded_vocab_size"]) == (20, 17)
    model = ModelConfig(**ZERO)
    convert(model, source_of(model), tmp_path / "zero", "zero")
    text = (tmp_path / "zero" / "model_config.yaml").read_text()
    assert yaml.safe_load(text) == {
        "converted": {
            **{"embedding_dim": 24, "vocab_size": 20, "num_head": 6, "N": 11, "block_size": 12},
            **{"alibi_attn": True, "dropout": 0.0},
        }
    }
    needs_torch("cerebras")
    for residual in ("sequential", "parallel"):
        model = ModelConfig(**{**ZERO, "residual": residual})
        convert(model, source_of(model), tmp_path / residual, "zero-torch")
        told = yaml.safe_load((tmp_path / residual / "model_config.yaml").read_text())["converted"]
        # The port that calls a block's one norm `ln` takes no such key.
        assert told.get("use_alibi") is (True if residual == "sequential" else None)
    told = {}
    for kind in ("muP", "GPT-J", "LLaMA", "no biases"):
        model = ModelConfig(**KINDS["cerebras"][kind])
        convert(model, source_of(model), tmp_path / kind, "cerebras")
        told[kind] = yaml.safe_load((tmp_path / kind / "params.yaml").read_text())["model"]
    assert told["muP"]["mixed_precision"] is True, "its trainer has no default"
    assert told["muP"]["output_logits_scale"] == pytest.approx(2.22 * 12 / 24)
    assert told["muP"]["scale_qk_dot_by_d"] is True
    gptj = told["GPT-J"]
    assert gptj["use_untied_layer_norm"] is False and gptj["use_bias_in_output"] is True
    # Release 1.9 has these, and takes no notice of the later norm_type.
    assert told["LLaMA"]["use_rms_norm"] is True and told["no biases"]["use_biasless_norm"] is True
    later = ("rope_theta", "mup_base_hidden_size", "output_logits_alpha", "attention_logits_alpha")
    assert not any(key in keys for keys in told.values() for key in later)


def test_a_file_of_pytorch_s_is_as_it_writes_it_and_needs_memory_for_one_array(
    tmp_path: pathlib.Path,
) -> None:
    torch: Any = pytest.importorskip("torch", reason="reads and writes PyTorch's own files")
    arrays = {f"w.{i}": Array((1000, 1000), np.dtype(np.float32)) for i in range(8)}
    arrays |= {"half": Array((2, 3, 5), BFLOAT16), "one": Array((), np.dtype(np.float16))}
    path = str(tmp_path / "file.pth")

    def read(name: str) -> np.ndarray:
        rng = np.random.default_rng(len(name) + ord(name[-1]))
        return np.asarray(rng.normal(size=arrays[name].shape)).astype(arrays[name].dtype)

    def write(inside: str = "") -> None:
        pytorch.write(path, arrays, read, inside=inside, copies={"copy": "w.3"})

    # The numbers are made in float64: an array of 4 MB and one of 8.
    assert memory_source.peak_bytes(write) < 1.25 * 12_000_000
    for mapped in (True, False):
        found = torch.load(path, mmap=mapped, weights_only=True)
        assert list(found) == [*arrays, "copy"]
        assert found["copy"].data_ptr() == found["w.3"].data_ptr()
        assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())
        for name in arrays:
            theirs = found[name].to(torch.float32).numpy()
            np.testing.assert_array_equal(theirs, read(name).astype(np.float32))
    write("model")
    inner = torch.load(path, mmap=True, weights_only=True)
    assert list(inner) == ["model"] and list(inner["model"]) == list(found)
    assert torch.equal(inner["model"]["w.7"], found["w.7"])
