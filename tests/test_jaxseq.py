"""Checkpoints of JAXSeq: its models compute the same here, and what is refused."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import jax
import memory_source
import numpy as np
import packed_files
import pytest
import source_logits

from mesh_transformer.checkpoints import huggingface, jaxseq, opening
from mesh_transformer.checkpoints.families import config_keys, family_of
from mesh_transformer.checkpoints.huggingface import HuggingFace
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.tensors import tensors
from mesh_transformer.config import ModelConfig
from mesh_transformer.pod.worker import Worker
from mesh_transformer.session import Sampling

VOCAB, SEQ, D, HEADS, LAYERS, FF = 32, 12, 16, 4, 2, 24
GPT = {"vocab_size": VOCAB, "n_positions": SEQ, "n_embd": D, "n_layer": LAYERS, "n_head": HEADS}
LLAMA = {
    **{"model_type": "llama", "vocab_size": VOCAB, "max_sequence_length": SEQ, "hidden_size": D},
    **{"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": FF},
    **{"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "mesh": None},
}
TOKENS_BT = np.random.default_rng(1).integers(0, VOCAB, (2, SEQ))


def random(*shape: int, around: float = 0.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng((seed, *shape))
    return (around + 0.3 * rng.normal(size=shape)).astype(np.float32)


def llama_weights() -> dict[str, np.ndarray]:
    """Return random weights by the names that JAXSeq gives those of its LLaMA."""
    made = {"transformer/wte/embedding": random(VOCAB, D), "lm_head/kernel": random(D, VOCAB)}
    for i in range(LAYERS):
        block = f"transformer/h/{i}/"
        for n, name in enumerate(("wq", "wk", "wv", "wo")):
            made[f"{block}attention/{name}/kernel"] = random(D, D, seed=10 * i + n)
        for n, (name, shape) in enumerate({"w1": (D, FF), "w2": (FF, D), "w3": (D, FF)}.items()):
            made[f"{block}feed_forward/{name}/kernel"] = random(*shape, seed=10 * i + n)
        for n, name in enumerate(("attention_norm", "ffn_norm")):
            made[f"{block}{name}/kernel"] = random(D, around=1, seed=10 * i + n)
    return {**made, "transformer/ln_f/kernel": random(D, around=1, seed=99)}


def llama_forward(held: dict[str, np.ndarray]) -> np.ndarray:
    """Compute the logits as JAXSeq's LLaMA does: neighbours turned as complex numbers."""

    def normed(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * held[f"{name}/kernel"]

    def turned(x: np.ndarray) -> np.ndarray:
        frequencies = 10_000 ** (-np.arange(0, D // HEADS, 2) / (D // HEADS))
        turns = np.exp(1j * np.outer(np.arange(SEQ), frequencies))[:, None]
        y = (x[..., ::2] + 1j * x[..., 1::2]) * turns
        return np.stack([y.real, y.imag], -1).reshape(x.shape)

    x = held["transformer/wte/embedding"][TOKENS_BT].astype(np.float64)
    for i in range(LAYERS):
        block = f"transformer/h/{i}/"
        y = normed(x, block + "attention_norm")
        q, k, v = (
            (y @ held[f"{block}attention/{it}/kernel"]).reshape(2, SEQ, HEADS, -1)
            for it in ("wq", "wk", "wv")
        )
        q, k, v = (it.swapaxes(1, 2) for it in (turned(q), turned(k), v))
        scores = q @ k.swapaxes(2, 3) / math.sqrt(D // HEADS)
        scores = np.where(np.tril(np.ones((SEQ, SEQ))), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = ((shares / shares.sum(-1, keepdims=True)) @ v).swapaxes(1, 2)
        x = x + mixed.reshape(2, SEQ, D) @ held[f"{block}attention/wo/kernel"]
        y = normed(x, block + "ffn_norm")
        gate = y @ held[f"{block}feed_forward/w1/kernel"]
        hidden = gate / (1 + np.exp(-gate)) * (y @ held[f"{block}feed_forward/w3/kernel"])
        x = x + hidden @ held[f"{block}feed_forward/w2/kernel"]
    return normed(x, "transformer/ln_f") @ held["lm_head/kernel"]


def write(folder: pathlib.Path, config: dict[str, Any], held: Any, name: str = "params") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / f"{name}.msgpack").write_bytes(packed_files.stream(held))
    return str(folder)


def opened(path: str) -> Any:
    return opening.open_source(opening.find(path), None)


def test_its_llama_computes_the_same_here_and_as_a_hugging_face_folder(
    tmp_path: pathlib.Path,
) -> None:
    held = llama_weights()
    source = opened(write(tmp_path / "theirs", LLAMA, held))
    assert source.about == "LLaMA of JAXSeq, float32"
    model = ModelConfig(**source.known)
    assert (model.pe, model.seq, model.d_ff) == ("rotary-half", SEQ, FF)
    expected = llama_forward(held)
    assert np.abs(expected).max() > 1
    found = source_logits.logits(source, model, TOKENS_BT)
    # float32 against float64, over two layers
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)
    assert_written_again(source, model, held, tmp_path)
    (tmp_path / "hf").mkdir()
    huggingface.write(str(tmp_path / "hf"), source, model, dtype=np.dtype(np.float32))
    again = HuggingFace(str(tmp_path / "hf"))
    for key in source.arrays:
        np.testing.assert_array_equal(again.read(key), source.read(key))


def flax_names(held: dict[str, Any], kind: str) -> dict[str, Any]:
    """Rename arrays of GPT-2, GPT-J, OPT or T5 as transformers' Flax classes have them."""
    made = {}
    tables = ("embed", "wte", "wpe", "shared", "relative_attention_bias")
    for name, value in held.items():
        module, leaf = name.replace(".", "/").rsplit("/", 1)
        last = module.rsplit("/", 1)[-1]
        if leaf == "weight" and ("ln_" in last or "norm" in last):
            leaf = "weight" if kind == "t5" else "scale"
        elif leaf == "weight" and last.startswith(tables):
            leaf = "embedding"
        elif leaf == "weight":
            # PyTorch's linear layers are the other way round than Flax's; and so are GPT-2's
            leaf, value = "kernel", value.T
        made[f"{module}/{leaf}"] = value
    return made


T5 = {
    **{
        "model_type": "t5",
        "vocab_size": VOCAB,
        "d_model": D,
        "d_kv": 8,
        "d_ff": FF,
        "num_heads": 4,
    },
    **{"num_layers": LAYERS, "num_decoder_layers": 3, "relative_attention_num_buckets": 8},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {**GPT, "n_inner": FF},
    "gptj": {**GPT, "rotary_dim": 2, "tie_word_embeddings": False},
    "opt": {
        **{"vocab_size": VOCAB, "max_position_embeddings": SEQ, "hidden_size": D, "ffn_dim": FF},
        **{"num_hidden_layers": LAYERS, "num_attention_heads": HEADS},
    },
    "t5": T5,
    "flan-t5": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", ["params", "train_state"])
def test_flax_s_names_hold_what_pytorch_s_do(kind: str, name: str, tmp_path: pathlib.Path) -> None:
    config = {"model_type": kind, **FAMILIES[kind]}
    family = family_of(config)
    assert family is not None
    model = ModelConfig(**config_keys(config))
    listed = tensors(family, model)
    source = memory_source.of_model(model)
    held: dict[str, Any] = {}
    for tensor in listed:
        whole = np.empty(tensor.shape, np.float32)
        for key in tensor.keys:
            whole = tensor.put(whole, key, source.read(key))
        held[tensor.name] = whole
    named = flax_names(held, config["model_type"])
    if kind == "flan-t5":
        gate = "decoder/block/2/layer/2/DenseReluDense/wi_0/kernel"
        norm = "encoder/block/1/layer/1/layer_norm/weight"
        first = "block/0/layer/0/SelfAttention/relative_attention_bias/embedding"
        assert (named[gate].shape, named[norm].shape) == ((D, FF), (D,))
        assert named[f"encoder/{first}"].shape == named[f"decoder/{first}"].shape == (8, HEADS)
    if name == "train_state":
        count = {"step": np.int32(7).reshape(()), "opt_state/inner/0/count": np.zeros((), np.int32)}
        named = {**count, **{f"params/{key}": it for key, it in named.items()}}
    found = opened(write(tmp_path / "jaxseq", config, named, name))
    assert found.counts is None
    for key, value in source.contents.items():
        if key in found._places:
            np.testing.assert_array_equal(found.read(key), value)
        else:
            assert key.path == "decoder/embed/b" and not found.read(key).any()
    assert_written_again(found, ModelConfig(**found.known), named, tmp_path)


def assert_written_again(
    source: Any, model: ModelConfig, held: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    """Be sure that all bytes of the weights are theirs, in the order of Flax's trees."""
    (tmp_path / "again").mkdir()
    dtype = np.dtype(np.float32)
    jaxseq.write(str(tmp_path / "again"), source, model, dtype=dtype, advance=lambda n: None)
    params = {name.removeprefix("params/"): it for name, it in held.items()}
    names = sorted((it for it in params if not it.startswith(("step", "opt_state"))),
                   key=lambda it: it.split("/"))  # fmt: skip
    expected = packed_files.stream({name: params[name] for name in names})
    assert (tmp_path / "again" / "params.msgpack").read_bytes() == expected
    assert dict(opened(str(tmp_path / "again")).known) == dict(source.known)


@pytest.mark.thorough
def test_a_padded_vocabulary_gets_no_probability(tmp_path: pathlib.Path) -> None:
    held, config = llama_weights(), {**LLAMA, "unpadded_vocab_size": 27}
    folder = write(tmp_path / "theirs", config, held)
    flat = opening.stored_config(folder).to_flat()
    assert flat["n_tokens"] == 27
    run = opening.stored_config(folder)
    worker = Worker(run, jax.devices()[:1])
    worker.load_weights(folder)
    likely, _ = worker.generate([[1, 2, 3]], Sampling(), 8)
    assert max(likely[0]) < 27


def test_what_does_not_fit_is_refused(tmp_path: pathlib.Path) -> None:
    held = llama_weights()
    folder = write(tmp_path / "theirs", {**LLAMA, "model_type": "bert"}, held)
    with pytest.raises(CheckpointError, match='model_type is "bert"; of JAXSeq are read .gpt2., .'):
        opened(folder)
    folder = write(tmp_path / "theirs", {**LLAMA, "num_hidden_layers": 3}, held)
    with pytest.raises(CheckpointError, match="transformer/h/2/attention_norm/kernel is missing"):
        opened(folder)
    folder = write(tmp_path / "theirs", {**LLAMA, "intermediate_size": 32}, held)
    with pytest.raises(
        CheckpointError, match=r"w1/kernel is \[16, 24\], \[16, 32\] by config.json"
    ):
        opened(folder)
    whole = (tmp_path / "theirs" / "params.msgpack").read_bytes()
    (tmp_path / "theirs" / "params.msgpack").write_bytes(whole[:-40])
    with pytest.raises(CheckpointError, match="params.msgpack is cut off; copy it again"):
        opened(folder)
    assert jaxseq.find(folder + "/params.msgpack") == folder + "/params.msgpack"
    assert jaxseq.find(str(tmp_path)) is None
