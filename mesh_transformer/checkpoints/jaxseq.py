"""Checkpoints of JAXSeq: config.json and a stream of weights, by the names of Flax.

    config.json            what the model is, in the words of transformers
    params.msgpack         its weights, one after the other
    train_state.msgpack    the same with an optimizer's state: the weights are read, and not written

Flax's names follow from those of transformers: scale, kernel and embedding instead of weight, and
every matrix the other way round; T5's norms keep theirs. Only its LLaMA has names of its own; it
turns neighbouring features and knows neither shared heads of keys nor another theta.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from mesh_transformer import storage
from mesh_transformer.checkpoints import flax_files, flax_writer
from mesh_transformer.checkpoints.families import config_json, described, keys_by
from mesh_transformer.checkpoints.family import Family, Number, Row, Size, shown
from mesh_transformer.checkpoints.gpt_families import GPT2, GPTJ, OPT
from mesh_transformer.checkpoints.huggingface import CONFIG, read_json, write_json
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.llama_families import LLAMA
from mesh_transformer.checkpoints.named import NamedSource
from mesh_transformer.checkpoints.renaming import Renamed
from mesh_transformer.checkpoints.source import Array, Source
from mesh_transformer.checkpoints.t5_family import T5
from mesh_transformer.checkpoints.tensors import tensors
from mesh_transformer.config import ModelConfig

FILES = ("params.msgpack", "train_state.msgpack")

_PROGRAM = "JAXSeq"
_PADDED_FROM = "unpadded_vocab_size"
_T = "transformer/h/{}/"
_BLOCK = "layers/block/"
_LLAMA_ROWS = (
    Row("transformer/wte/embedding", "embed/embeddings"),
    Row(_T + "attention_norm/kernel", _BLOCK + "norm/scale"),
    Row(_T + "attention/wq/kernel", _BLOCK + "attention/q/w", pairs=True),
    Row(_T + "attention/wk/kernel", _BLOCK + "attention/k/w", pairs=True),
    Row(_T + "attention/wv/kernel", _BLOCK + "attention/v/w"),
    Row(_T + "attention/wo/kernel", _BLOCK + "attention/o/w"),
    Row(_T + "ffn_norm/kernel", _BLOCK + "ff_norm/scale"),
    Row(_T + "feed_forward/w1/kernel", _BLOCK + "ff/gate/w"),
    Row(_T + "feed_forward/w3/kernel", _BLOCK + "ff/in/w"),
    Row(_T + "feed_forward/w2/kernel", _BLOCK + "ff/out/w"),
    Row("transformer/ln_f/kernel", "final_norm/scale"),
    Row("lm_head/kernel", "unembed/w"),
)


def _of_flax(row: Row, scale: str) -> Row:
    """Return a row of transformers by the name that Flax has for it, a norm's being `scale`."""
    module, _, leaf = row.theirs.replace(".", "/").rpartition("/")
    if leaf == "weight":
        kinds = {"embeddings": "embedding", "scale": scale, "w": "kernel"}
        leaf = kinds[row.ours.rpartition("/")[2]]
    transposed = row.transposed != (leaf == "kernel")
    return row._replace(theirs=f"{module}/{leaf}", transposed=transposed)


def _with_flax_names(family: Family, scale: str = "scale") -> Family:
    rows = tuple(_of_flax(row, scale) for row in family.rows)
    return dataclasses.replace(family, rows=rows, constants="(?!)")


FAMILIES: tuple[Family, ...] = (
    *map(_with_flax_names, (GPT2, GPTJ, OPT)),
    dataclasses.replace(
        LLAMA,
        keys=(
            Size("vocab_size", "n_vocab"),
            Size("max_sequence_length", "seq"),
            Size("hidden_size", "d_model"),
            Size("num_hidden_layers", "layers"),
            Size("num_attention_heads", "n_heads"),
            Size("intermediate_size", "d_ff"),
            Number("rms_norm_eps", "norm_epsilon", 1e-6),
        ),
        same={"tie_word_embeddings": False},
        ours={**LLAMA.ours, "activation": "silu", "ff_bias": False},
        rows=_LLAMA_ROWS,
        constants="(?!)",
    ),
    _with_flax_names(T5, "weight"),
)


def find(path: str) -> str | None:
    """Name the file that a path means: a folder's, or the file itself; None if there is none."""
    folder, _, name = path.rpartition("/")
    if name in FILES and storage.is_file(path):
        return path if storage.exists(storage.join(folder or ".", CONFIG)) else None
    files = [storage.join(path, name) for name in FILES]
    if not storage.exists(storage.join(path, CONFIG)):
        return None
    return next((file for file in files if storage.is_file(file)), None)


class JaxSeq(NamedSource):
    """A file of JAXSeq's, checked against the config.json beside it.

    Raises:
        CheckpointError: It is damaged, of a model that ours does not compute, or its arrays are not
            those of its configuration; every difference is listed.
    """

    def __init__(self, path: str) -> None:
        where = storage.join(path.rpartition("/")[0] or ".", CONFIG)
        config = read_json(where)
        family = next((it for it in FAMILIES if it.model_type == config.get("model_type")), None)
        if family is None:
            listed = ", ".join(repr(it.model_type) for it in FAMILIES)
            raise CheckpointError(
                f"{where}: model_type is {shown(config, 'model_type')}; of JAXSeq are read {listed}"
            )
        known = keys_by(family, config, where)
        model = ModelConfig(**known)
        stored = flax_files.read_stream(path)
        if path.endswith(FILES[1]):
            stored = {
                re.sub("^(params/)+", "", name): it
                for name, it in stored.items()
                if name.startswith("params/")
            }
        what = f"{family.name} of JAXSeq"
        known |= _padded(config, model)
        super().__init__(path, what, family, model, known, stored, CONFIG)


def _padded(config: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Say where the padding of a vocabulary begins, which JAXSeq gives no probability."""
    n_tokens = config.get(_PADDED_FROM)
    if type(n_tokens) is not int or not 0 < n_tokens < model.n_vocab:
        return {}
    return {"n_tokens": n_tokens}


def check(model: ModelConfig) -> None:
    """Refuse a model that JAXSeq does not compute.

    Raises:
        CheckpointError: Every reason is listed.
    """
    described(model, FAMILIES, _PROGRAM)


def check_sizes(model: ModelConfig, dtype: np.dtype[Any]) -> None:
    """Refuse weights that a stream has no room for in a dtype.

    Raises:
        CheckpointError: Some are too large, or JAXSeq does not compute such a model.
    """
    family, _ = described(model, FAMILIES, _PROGRAM)
    arrays = {it.name: Array(it.shape, dtype) for it in tensors(family, model)}
    flax_writer.check_stream(arrays)


def write(
    folder: str,
    source: Source,
    model: ModelConfig,
    *,
    dtype: np.dtype[Any],
    advance: Callable[[int], object],
) -> None:
    """Write what JAXSeq saves as `params`, and config.json, as `foreign.Foreign.write` says."""
    config = config_json(model, dtype, families=FAMILIES, program=_PROGRAM)
    family = next(it for it in FAMILIES if it.model_type == config["model_type"])
    if model.n_tokens < model.n_vocab:
        config[_PADDED_FROM] = model.n_tokens
    weights = Renamed(source, family, model, dtype, advance)
    path = storage.join(folder, FILES[0])
    flax_writer.write_stream(path, weights.arrays, weights.read)
    write_json(storage.join(folder, CONFIG), config)
