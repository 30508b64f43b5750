"""Checkpoints of Cerebras's model zoo: what it makes of transformers' models is read as them."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import memory_source
import named_arrays
import numpy as np
import pytest
import source_logits
import yaml

from mesh_transformer.checkpoints import cerebras_writer, huggingface, opening
from mesh_transformer.checkpoints.huggingface import HuggingFace
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.source import PARAMS, Key
from mesh_transformer.config import ModelConfig

torch: Any = pytest.importorskip("torch", reason="reads and writes PyTorch's own files")

D, LAYERS, SEQ, VOCAB = 32, 2, 24, 48
LONG = {
    **{"vocab_size": VOCAB, "max_position_embeddings": SEQ, "hidden_size": D},
    **{"num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48},
}
GPT = {"vocab_size": VOCAB, "n_positions": SEQ, "n_embd": D, "n_layer": LAYERS, "n_head": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "gptj": {**GPT, "rotary_dim": 4, "n_inner": 128},
    "gpt2": {**GPT, "n_inner": 128, "activation_function": "gelu"},
    "gpt_neox": {**LONG, "rotary_pct": 0.5},
    "llama": {**LONG, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0},
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "gptj": {
        **{"position_embedding_type": "rotary", "rotary_dim": 4, "nonlinearity": "gelu_new"},
        **{"use_untied_layer_norm": False, "share_embedding_weights": False, "filter_size": 128},
        **{"use_projection_bias_in_attention": False, "use_bias_in_output": True},
    },
    "gpt2": {"share_embedding_weights": True, "nonlinearity": "gelu", "filter_size": 128},
    "gpt_neox": {
        **{"position_embedding_type": "rotary", "rotary_dim": 4, "nonlinearity": "gelu"},
        **{"use_untied_layer_norm": True, "share_embedding_weights": False, "filter_size": 48},
    },
    "llama": {
        **{"position_embedding_type": "rotary", "rotary_dim": 8, "rope_theta": 500_000.0},
        **{"norm_type": "rmsnorm", "nonlinearity": "swiglu", "share_embedding_weights": False},
        **{"attention_module": "multiquery_attention", "filter_size": 48},
        "extra_attention_params": {"num_kv_groups": 2},
    },
}
BASE = {"mup_base_hidden_size": 16, "mup_base_filter_size": 64}
"""Of muP: all are twice as wide."""
NAMES = {
    **dict.fromkeys(("wte", "embed_in", "embed_tokens"), "embedding_layer.word_embeddings"),
    "wpe": "embedding_layer.position_embeddings",
    **dict.fromkeys(("ln_f", "final_layer_norm", "model.norm"), "transformer_decoder.norm"),
    **dict.fromkeys(("lm_head", "embed_out"), "lm_head"),
    **dict.fromkeys(("ln_1", "input_layernorm"), "norm1"),
    **dict.fromkeys(("ln_2", "post_attention_layernorm"), "norm3"),
    **{f"{it}_proj": f"self_attn.proj_{it}_dense_layer" for it in "qkv"},
    **dict.fromkeys(
        ("attn.out_proj", "attn.c_proj", "attention.dense", "o_proj"),
        "self_attn.proj_output_dense_layer",
    ),
    **dict.fromkeys(("fc_in", "c_fc", "dense_h_to_4h", "up_proj"), "ffn.ffn.0.linear_layer"),
    **dict.fromkeys(
        ("fc_out", "mlp.c_proj", "dense_4h_to_h", "down_proj"), "ffn.ffn.1.linear_layer"
    ),
    "gate_proj": "ffn.ffn.0.linear_layer_for_glu",
}


def interleaved(value: np.ndarray, heads: int, n_rotated: int) -> np.ndarray:
    """Put feature i of each head's turned ones beside the one half of them further."""
    rows = value.reshape(heads, -1, *value.shape[1:]).copy()
    turned = rows[:, :n_rotated].reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2)
    rows[:, :n_rotated] = turned.reshape(rows[:, :n_rotated].shape)
    return rows.reshape(value.shape)


def converted(kind: str, held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Name arrays as the zoo's converter from transformers does, and order them so."""
    made: dict[str, np.ndarray] = {}

    def put(layer: str, theirs: str, leaf: str, value: np.ndarray) -> None:
        made[f"{layer and f'transformer_decoder.layers.{layer}.'}{theirs}.{leaf}"] = value

    for name, value in held.items():
        module, _, leaf = name.rpartition(".")
        found = re.search(r"\.(\d+)\.", name)
        layer = found[1] if found else ""
        if kind == "gpt2" and layer and value.ndim == 2:
            value = value.T
        if module.endswith(("c_attn", "query_key_value")):
            by_head = module.endswith("query_key_value")
            rows = (
                value.reshape(4, 3, -1, *value.shape[1:])
                if by_head
                else value.reshape(1, 3, -1, *value.shape[1:])
            )
            for i, it in enumerate("qkv"):
                part = rows[:, i].reshape(-1, *value.shape[1:])
                part = interleaved(part, 4, 4) if by_head and it != "v" else part
                put(layer, NAMES[f"{it}_proj"], leaf, part)
            continue
        theirs = NAMES[max((it for it in NAMES if module.endswith(it)), key=len)]
        if kind == "llama" and module.endswith(("q_proj", "k_proj")):
            value = interleaved(value, 4 if module.endswith("q_proj") else 2, 8)
        put(layer, theirs, leaf, value)
        if theirs == "transformer_decoder.norm":
            made[f"ln_f.{leaf}"] = value
    return made


def write(folder: pathlib.Path, kind: str, how: str = "", **changed: Any) -> tuple[str, Any]:
    source, held = named_arrays.of_config({**CONFIGS[kind], "model_type": kind})
    arrays = {name: torch.tensor(it.copy()) for name, it in converted(kind, held).items()}
    if how == "model.":
        arrays = {f"model.{name}": it for name, it in arrays.items()}
        if kind == "gpt2":
            arrays["model.lm_head.weight"] = arrays["model.embedding_layer.word_embeddings.weight"]
    config = CONFIGS[kind]
    model = {
        **{"vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": LAYERS, "num_heads": 4},
        **{"max_position_embeddings": SEQ, "attention_type": "scaled_dot_product"},
        **{"layer_norm_epsilon": config.get("rms_norm_eps", 1e-5)},
        **{**PARAMETERS[kind], **changed},
    }
    folder.mkdir(exist_ok=True)
    whole: Any = {"model": arrays, "global_step": torch.tensor(7)} if how == "model" else arrays
    torch.save(whole, folder / "checkpoint_7.mdl")
    inner = {"trainer": {"init": {"model": model}}} if how == "model" else {"model": model}
    (folder / "params.yaml").write_text(yaml.safe_dump(inner))
    return str(folder), source


def opened(path: str) -> Any:
    return opening.open_source(opening.find(path), None)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("how", ["", "model.", "model"])
def test_what_its_converter_makes_of_a_model_is_read_as_that_model(
    kind: str, how: str, tmp_path: pathlib.Path
) -> None:
    folder, expected = write(tmp_path / "zoo", kind, how)
    source = opened(folder)
    assert source.where == f"{folder}/checkpoint_7.mdl" and source.step == 7
    assert dict(source.known) == dict(expected.known)
    for key, value in expected.contents.items():
        np.testing.assert_array_equal(source.read(key), value, err_msg=str(key))
    (tmp_path / "again").mkdir()
    # Of theta, which release 1.9 cannot be told, no array depends.
    model = dataclasses.replace(ModelConfig(**source.known), pe_theta=10_000.0)
    cerebras_writer.write(
        str(tmp_path / "again"), source, model, dtype=np.dtype(np.float32), advance=lambda n: None
    )
    theirs = torch.load(f"{folder}/checkpoint_7.mdl")
    theirs = theirs["model"] if how == "model" else theirs
    theirs = {re.sub("^model[.]", "", name): it for name, it in theirs.items()}
    ours = torch.load(tmp_path / "again" / "checkpoint_7.mdl")["model"]  # as its trainer does
    # The head is the embeddings, which the converter leaves out and the zoo's own files have twice.
    assert ours.keys() - theirs.keys() <= ({"lm_head.weight"} if model.tie_embeddings else set())
    for name, it in theirs.items():
        np.testing.assert_array_equal(ours[name].numpy(), it.numpy(), err_msg=name)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", CONFIGS)
def test_and_becomes_a_hugging_face_folder_of_it(kind: str, tmp_path: pathlib.Path) -> None:
    folder, expected = write(tmp_path / "zoo", kind)
    source = opened(folder)
    (tmp_path / "hf").mkdir()
    model = ModelConfig(**source.known)
    huggingface.write(str(tmp_path / "hf"), source, model, dtype=np.dtype(np.float32))
    again = HuggingFace(str(tmp_path / "hf"))
    for key, value in expected.contents.items():
        np.testing.assert_array_equal(again.read(key), value)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kind", "given", "scales"),
    [
        ("gpt2", {}, (1, 1, 1)),
        # As Cerebras-GPT's own, of releases up to 2.2.
        (
            "gpt2",
            {"embeddings_scale": 10, "scale_qk_dot_by_d": True, "output_logits_scale": 0.25},
            (10, 8**-0.5, 0.25),
        ),
        ("gptj", BASE, (1, 8**-0.5, 0.5)),  # products are over d_head unless it is said otherwise
        (
            "gptj",
            {**BASE, "embeddings_scale": 14.6, "attention_logits_alpha": 4.0,
             "output_logits_alpha": 2.22, "scale_output_logits_by_d": False},
            (14.6, 4 * 8**-0.5, 2.22 * 0.5**0.5),
        ),
        (
            "gptj",
            {**BASE, "scale_qk_dot_by_d": False, "attention_logits_alpha": 3.0,
             "output_logits_alpha": None, "embeddings_scale": None},
            (1, 3, 0.5),
        ),
    ],
)  # fmt: skip
def test_what_mup_scales_is_as_if_its_weights_were_so_large(
    kind: str, given: dict[str, Any], scales: tuple[float, float, float], tmp_path: pathlib.Path
) -> None:
    """Weights of embeddings and positions, of keys, and of the head with its bias.

    So Cerebras' own converter makes a standard model of one in muP.
    """
    found = opened(write(tmp_path / "mup", kind, **given)[0])
    plain = opened(write(tmp_path / "plain", kind)[0])
    embed, key, head = map(np.float32, scales)
    contents = {it: plain.read(it) for it in plain.arrays}
    for it, array in contents.items():
        if it.path.endswith(("embed/embeddings", "positions/embeddings")):
            contents[it] = array * embed
        elif "/attention/k/" in it.path:
            contents[it] = array * key
        elif "/unembed/" in it.path:
            contents[it] = array * head
    model = dataclasses.replace(ModelConfig(**plain.known), tie_embeddings=False)
    if plain.known["tie_embeddings"]:
        table = Key(PARAMS, "decoder/embed/embeddings")
        contents[Key(PARAMS, "decoder/unembed/w")] = plain.read(table).T * head
    standard = memory_source.MemorySource(contents)
    tokens_BT = np.random.default_rng(0).integers(0, VOCAB, (2, SEQ), np.int32)
    ours = source_logits.logits(found, ModelConfig(**found.known), tokens_BT)
    theirs = source_logits.logits(standard, model, tokens_BT)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.thorough
def test_what_it_says_that_is_not_computed_is_refused(tmp_path: pathlib.Path) -> None:
    for kind, changed, message in (
        ("gptj", {"position_embedding_type": "alibi"}, "position_embedding_type is .alibi.; com"),
        ("gpt2", {"attention_type": "dot_product"}, "attention_type is .dot_product.; Cerebras mo"),
        ("gpt2", {"norm_type": "scalenorm"}, "norm_type is .scalenorm.; read are layernorm, rms"),
        ("gpt2", {"scale_qk_dot_by_d": 1}, "scale_qk_dot_by_d is 1; computed here: false, true"),
        ("gpt2", {"mup_base_hidden_size": 16}, "mup_base_hidden_size is given without mup_base_f"),
        ("gpt2", {"mup_base_filter_size": 16}, "mup_base_filter_size is given without mup_base_h"),
        ("gpt2", BASE | {"mup_base_filter_size": 0}, "mup_base_filter_size is 0; needed is a num"),
        ("gpt2", BASE | {"output_logits_alpha": -1}, "output_logits_alpha is -1; needed is a num"),
        ("gpt2", BASE | {"output_logits_scale": 0.5}, "output_logits_scale and mup_base_hidden_s"),
        ("gpt2", {"output_logits_alpha": 2.0}, "output_logits_alpha is 2.0, which needs a mup_ba"),
        ("gpt2", {"scale_output_logits_by_d": False}, "output_logits_by_d is false, which needs "),
        ("gpt2", {"position_embedding_offset": 2}, "position_embedding_offset is 2; Cerebras mod"),
        ("gptj", {"rotary_dim": None}, "rotary_dim is null; needed is a whole number above 0"),
        ("gpt2", {"nonlinearity": "gelu_10"}, "nonlinearity is .gelu_10.; computed here: "),
        ("llama", {"attention_module": "sparse"}, "attention_module is .sparse.; computed here: "),
        ("llama", {"filter_size": 40}, r"linear_layer.weight is \[48, 32\], \[40, 32\] by "),
        ("gpt2", {"num_hidden_layers": 3}, "transformer_decoder.layers.2.norm1.weight is missing"),
    ):
        folder, _ = write(tmp_path / "zoo", kind, **changed)
        with pytest.raises(CheckpointError, match=message):
            opened(folder)


def test_files_that_are_missing_or_damaged_are_named(tmp_path: pathlib.Path) -> None:
    folder, _ = write(tmp_path / "zoo", "gpt2")
    path, parameters = (tmp_path / "zoo" / it for it in ("checkpoint_7.mdl", "params.yaml"))
    text = parameters.read_text()
    for bad in ("- 1\n", "model: {", "other: {}\n", "model: 3\n"):
        parameters.write_text(bad)
        with pytest.raises(CheckpointError, match="params.yaml is damaged, or has no section"):
            opened(folder)
    parameters.unlink()
    with pytest.raises(CheckpointError, match="beside it as params.yaml; there is no such file"):
        opened(folder)
    parameters.write_text(text)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="checkpoint_7.mdl is damaged, or no file of weights"):
        opened(folder)
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(CheckpointError, match="is HDF5, as Cerebras's releases from 2.0 write"):
        opened(folder)
    torch.save({"model": {"x": pathlib.Path("y")}}, path)
    with pytest.raises(CheckpointError, match="checkpoint_7.mdl is damaged, or no file of weights"):
        opened(folder)
