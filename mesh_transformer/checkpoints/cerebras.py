"""Checkpoints of Cerebras's model zoo (PyTorch, releases 1.6 to 1.9), by its names.

    checkpoint_250.mdl    a state dict, or one below "model"
    params.yaml           the run's parameters, of which "model" says what it is

Its one decoder is configured as GPT-J, GPT-NeoX, GPT-2 or LLaMA, and arrays have the same names in
all. It turns neighbouring features; what it has converted from GPT-NeoX and LLaMA has queries and
keys in that order, so that all but GPT-J's go back to halves here, as transformers has them.
Whether there are biases, and how branches are added, the arrays say; parameters may leave it out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import yaml

from mesh_transformer import storage
from mesh_transformer.checkpoints import pytorch
from mesh_transformer.checkpoints.families import described, keys_by
from mesh_transformer.checkpoints.family import (
    ACTIVATIONS,
    BOOLEAN,
    Choice,
    Derived,
    Family,
    Json,
    Number,
    Row,
    Size,
    norm,
    number,
    pair,
    shown,
)
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.named import NamedSource, Stored
from mesh_transformer.checkpoints.renaming import Renamed
from mesh_transformer.checkpoints.source import Source
from mesh_transformer.config import ModelConfig

_STEP = re.compile(r"(?:checkpoint_)?(\d+)\.mdl")
_HDF5 = b"\x89HDF"
_L, _BLOCK = "transformer_decoder.layers.{}.", "layers/block/"
_FINAL_NORM, _ALSO_FINAL_NORM = "transformer_decoder.norm.", "ln_f."
_UNTIED = "use_untied_layer_norm"  # of a parallel block: whether each of its branches has a norm
_BIASES = {
    "use_projection_bias_in_attention": ("qkv_bias", f"{_L}self_attn.proj_q_dense_layer.bias"),
    "use_ffn_bias_in_attention": ("o_bias", f"{_L}self_attn.proj_output_dense_layer.bias"),
    "use_ffn_bias": ("ff_bias", f"{_L}ffn.ffn.0.linear_layer.bias"),
    "use_bias_in_output": ("head_bias", "lm_head.bias"),
}
"""Parameters that say which biases there are, with our keys and what is there if so."""
_GATED = {"swiglu": "silu", "reglu": "relu", "geglu": "gelu"}
_NORMS = {"layernorm": "layernorm", "rmsnorm": "rmsnorm-mean",
          "biasless-layernorm": "layernorm-nobias"}  # fmt: skip
_NO_DROPOUT = dict.fromkeys(
    ("dropout_rate", "embedding_dropout_rate", "attention_dropout_rate", "residual_dropout_rate"),
    0.0,
)
_PLAIN = Choice("nonlinearity", "activation", ACTIVATIONS, "gelu")


def _rows(*, pairs: bool) -> tuple[Row, ...]:
    def attention(theirs: str, ours: str) -> tuple[Row, ...]:
        found = pair(f"{_L}self_attn.proj_{theirs}_dense_layer", f"{_BLOCK}attention/{ours}")
        return tuple(row._replace(pairs=pairs and ours in "qk") for row in found)

    return (
        Row("embedding_layer.word_embeddings.weight", "embed/embeddings"),
        Row("embedding_layer.position_embeddings.weight", "positions/embeddings"),
        *norm(_L + "norm1", _BLOCK + "norm"),
        *attention("q", "q"),
        *attention("k", "k"),
        *attention("v", "v"),
        *attention("output", "o"),
        *norm(_L + "norm3", _BLOCK + "ff_norm"),
        *pair(_L + "ffn.ffn.0.linear_layer_for_glu", _BLOCK + "ff/gate"),
        *pair(_L + "ffn.ffn.0.linear_layer", _BLOCK + "ff/in"),
        *pair(_L + "ffn.ffn.1.linear_layer", _BLOCK + "ff/out"),
        *norm("transformer_decoder.norm", "final_norm"),
        *pair("lm_head", "unembed"),
    )


def _read_norm(config: Json, keys: Json) -> Json:
    old = "rmsnorm" if config.get("use_rms_norm") else "layernorm"
    old = "biasless-layernorm" if config.get("use_biasless_norm") else old
    kind = config.get("norm_type", old)
    if kind not in _NORMS:
        raise ValueError(f"norm_type is {shown(config, 'norm_type')}; read are {', '.join(_NORMS)}")
    return {"norm": _NORMS[kind]}


def _write_norm(model: ModelConfig) -> Json:
    return Choice("norm_type", "norm", _NORMS, None).write(model)


def _read_positions(config: Json, keys: Json) -> Json:
    kind = config.get("position_embedding_type", "learned")
    if kind == "learned":
        return {"pe": "fixed"}
    if kind != "rotary":
        raise ValueError(
            f"position_embedding_type is {shown(config, 'position_embedding_type')}; computed "
            "here: learned, rotary"
        )
    given: dict[str, Any] = {
        "pe": "rotary" if keys.get("residual") == "parallel" else "rotary-half"
    }
    if config.get("rotary_dim") is not None:
        given["pe_rotary_dims"] = Size("rotary_dim", "").read(config, keys)[""]
    return {**given, "pe_theta": number(config, "rope_theta", 10_000.0)}


def _write_positions(model: ModelConfig) -> Json:
    kinds = {"learned": "fixed", "rotary": "rotary-half"}
    if model.residual == "parallel":
        kinds["rotary"] = "rotary"
    kind = Choice("position_embedding_type", "pe", kinds, None).write(model)
    if model.pe == "fixed":
        return kind
    return {**kind, "rotary_dim": model.pe_rotary_dims, "rope_theta": model.pe_theta}


def _read_activation(config: Json, keys: Json) -> Json:
    kind = config.get("nonlinearity", "gelu")
    if kind in _GATED:
        return {"activation": _GATED[kind], "gated": True}
    return {**_PLAIN.read(config, keys), "gated": False}


def _write_activation(model: ModelConfig) -> Json:
    if not model.gated:
        return _PLAIN.write(model)
    return Choice("nonlinearity", "activation", _GATED, None).write(model)


def _read_kv_heads(config: Json, keys: Json) -> Json:
    if config.get("attention_module", "aiayn_attention") == "aiayn_attention":
        return {}
    extra = config.get("extra_attention_params")
    if config["attention_module"] != "multiquery_attention" or not isinstance(extra, dict):
        raise ValueError(
            f"attention_module is {shown(config, 'attention_module')}; computed here: "
            "aiayn_attention, multiquery_attention with extra_attention_params"
        )
    return dict(Size("num_kv_groups", "n_kv_heads").read(extra, keys))


def _write_kv_heads(model: ModelConfig) -> Json:
    if model.n_kv_heads == model.n_heads:
        return {}
    return {
        "attention_module": "multiquery_attention",
        "extra_attention_params": {"num_kv_groups": model.n_kv_heads},
    }


def _read_residual(config: Json, keys: Json) -> Json:
    if _UNTIED not in config:
        return {"residual": "sequential"}
    return {"residual": "parallel-untied" if config[_UNTIED] else "parallel"}


def _write_residual(model: ModelConfig) -> Json:
    if model.residual == "sequential":
        return {}
    return Choice(_UNTIED, "residual", {False: "parallel", True: "parallel-untied"}, None).write(
        model
    )


_FAMILY = Family(
    name="Cerebras model",
    model_type="", architecture="", prefix="", also=_NO_DROPOUT, begin_id=0, eot_id=0,
    keys=(
        Size("vocab_size", "n_vocab"),
        Size("max_position_embeddings", "seq"),
        Size("hidden_size", "d_model"),
        Size("num_hidden_layers", "layers"),
        Size("num_heads", "n_heads"),
        Size("filter_size", "d_ff"),
        Number("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Choice("share_embedding_weights", "tie_embeddings", BOOLEAN, True),
        Derived("residual", _read_residual, _write_residual),
        *(Choice(theirs, ours, BOOLEAN, False) for theirs, (ours, _) in _BIASES.items()),
        Derived("norm", _read_norm, _write_norm),
        Derived("pe pe_rotary_dims pe_theta", _read_positions, _write_positions),
        Derived("activation gated", _read_activation, _write_activation),
        Derived("n_kv_heads", _read_kv_heads, _write_kv_heads),
    ),
    same={
        **{"attention_type": "scaled_dot_product", "norm_first": True, "moe_params": None},
        **{"embedding_layer_norm": False, "fixed_sparse_attention": None},
        **{"attention_sliding_window_length": None, "pos_scaling_factor": 1.0},
        **{"output_logits_scale": None, "output_logits_alpha": None, "embeddings_scale": 1.0},
        **{"scale_qk_dot_by_d": False, "attention_logits_alpha": 1.0},
    },
    ours={"embed_bias": False},
    rows=_rows(pairs=True),
    constants=r"ln_f\.(weight|bias)|.*\.(masked_bias|rotary_emb\.inv_freq)",
)  # fmt: skip
_AS_GPTJ = dataclasses.replace(_FAMILY, ours={}, rows=_rows(pairs=False))


def find(path: str) -> str | None:
    """Name the file that a path means: itself, or a folder's newest; None if there is none."""
    if path.endswith(".mdl"):
        return path if storage.exists(path) else None
    files = [name for name in storage.children(path) if name.endswith(".mdl")]
    return storage.join(path, max(files, key=lambda name: (_step(name), name))) if files else None


class Cerebras(NamedSource):
    """A file of weights, checked against the parameters beside it.

    Raises:
        CheckpointError: It is damaged, of a model that ours does not compute, or its arrays are not
            those of its parameters; every difference is listed.
    """

    def __init__(self, path: str) -> None:
        if storage.is_remote(path):
            raise CheckpointError(f"{path}: .mdl files are read from a local disk only")
        begin = bytearray(len(_HDF5))
        storage.read_into(path, 0, memoryview(begin))
        if begin == _HDF5:
            raise CheckpointError(
                f"{path} is HDF5, as Cerebras's releases from 2.0 write; convert it to a Hugging "
                "Face folder with their own converter, and name that"
            )
        where, config = _parameters(path)
        stored: dict[str, Stored] = {
            _plain(name): it for name, it in pytorch.read_header(path, inside="model").items()
        }
        told = _by_names(config, stored)
        family = _AS_GPTJ if told.get(_UNTIED) is False else _FAMILY
        told = {key: it for key, it in config.items() if key != _UNTIED} | told
        known = keys_by(family, told, where)
        what = f"state of a {family.name}"
        super().__init__(path, what, family, ModelConfig(**known), known, stored, where)
        self.step = max(_step(path.rpartition("/")[2]), 0)


def _plain(name: str) -> str:
    """Take off what some releases put around names."""
    name = re.sub(r"^(model\.)+", "", name)
    return name.replace("position_embeddings.embed.weight", "position_embeddings.weight")


def _by_names(config: Json, stored: Mapping[str, Stored]) -> dict[str, Any]:
    """Say what is told by which arrays there are: how branches are added, and biases."""
    biases = {key: name.format(0) in stored for key, (_, name) in _BIASES.items()}
    untied = bool(config.get(_UNTIED))
    if f"{_L.format(0)}norm3.weight" in stored and not untied:
        return biases
    return {**biases, _UNTIED: untied}


def _parameters(path: str) -> tuple[str, dict[str, Any]]:
    """Read what the file beside a checkpoint says of its model."""
    folder = path.rpartition("/")[0] or "."
    files = [name for name in storage.children(folder) if name.endswith((".yaml", ".yml"))]
    name = "params.yaml" if "params.yaml" in files else files[0] if len(files) == 1 else None
    if name is None:
        found = f"there are {', '.join(files)}" if files else "there is no such file"
        raise CheckpointError(
            f"{path} says nothing of its model: put its run's parameters beside it as params.yaml; "
            f"{found}"
        )
    where = storage.join(folder, name)
    try:
        config = yaml.safe_load(storage.read_text(where))
        section = config.get("model") or config["trainer"]["init"]["model"]
        return where, dict(section)
    except (
        yaml.YAMLError,
        UnicodeDecodeError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f'{where} is damaged, or has no section "model" with a model\'s parameters ({error})'
        ) from error


def _step(name: str) -> int:
    match = _STEP.search(name)
    return int(match[1]) if match else -1


def check(model: ModelConfig) -> None:
    """Refuse a model that Cerebras's does not compute, and to write PyTorch's files without it.

    Raises:
        CheckpointError: Every reason is listed.
    """
    _described(model)
    pytorch.check("checkpoint_N.mdl")


def _described(model: ModelConfig) -> tuple[Family, Json]:
    family = _AS_GPTJ if model.residual == "parallel" else _FAMILY
    return described(model, (family,), "Cerebras's model zoo")


def write(
    folder: str,
    source: Source,
    model: ModelConfig,
    *,
    dtype: np.dtype[Any],
    advance: Callable[[int], object],
) -> None:
    """Write checkpoint_N.mdl and params.yaml; what modules share is there by all its names.

    Args:
        folder: There already, and empty.
        source: Of the model's arrays.
        dtype: Of the weights.
        advance: Called with the bytes of each array that is written.

    Raises:
        CheckpointError: Cerebras's model does not compute such a one, the source is not of it, or a
            weight is too large for the dtype; or there is no PyTorch.
    """
    family, keys = _described(model)
    weights = Renamed(source, family, model, dtype)
    copies = {
        name.replace(_FINAL_NORM, _ALSO_FINAL_NORM): name
        for name in weights.arrays
        if name.startswith(_FINAL_NORM)
    }
    if model.tie_embeddings:
        copies["lm_head.weight"] = "embedding_layer.word_embeddings.weight"
    path = storage.join(folder, f"checkpoint_{source.step}.mdl")
    pytorch.write(path, weights.arrays, weights.read, advance, copies=copies)
    same = {key: it for key, it in family.same.items() if it is not None}
    text = yaml.safe_dump({"model": {**same, **family.also, **keys}}, sort_keys=False)
    storage.write_text_atomically(storage.join(folder, "params.yaml"), text)
