"""Checkpoints of Cerebras's model zoo (PyTorch, releases 1.6 to 1.9), by its names, only read.

    checkpoint_250.mdl    a state dict, or one below "model"
    params.yaml           the run's parameters, of which "model" says what it is

Its one decoder is configured as GPT-J, GPT-NeoX, GPT-2 or LLaMA, and arrays have the same names in
all. It turns neighbouring features; what it has converted from GPT-NeoX and LLaMA has queries and
keys in that order, so that all but GPT-J's go back to halves here, as transformers has them.

Of muP, what it computes is read: the scales of embeddings, of the products of queries and keys, and
of logits. The base's sizes say beside that how a model was trained, which is told by the
configuration that trains on: see docs/howto_mup.md.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from mesh_transformer import storage
from mesh_transformer.checkpoints import pytorch
from mesh_transformer.checkpoints.families import keys_by
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
from mesh_transformer.checkpoints.source import Key
from mesh_transformer.config import ModelConfig

_STEP = re.compile(r"(?:checkpoint_)?(\d+)\.mdl")
_HDF5 = b"\x89HDF"
_L, _BLOCK = "transformer_decoder.layers.{}.", "layers/block/"
_GATED = {"swiglu": "silu", "reglu": "relu", "geglu": "gelu"}
_NORMS = {"layernorm": "layernorm", "rmsnorm": "rmsnorm-mean",
          "biasless-layernorm": "layernorm-nobias"}  # fmt: skip


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
    # Left out, some releases turned all features and others a quarter of them.
    given["pe_rotary_dims"] = Size("rotary_dim", "").read(config, keys)[""]
    return {**given, "pe_theta": number(config, "rope_theta", 10_000.0)}


def _read_activation(config: Json, keys: Json) -> Json:
    kind = config.get("nonlinearity", "gelu")
    if kind in _GATED:
        return {"activation": _GATED[kind], "gated": True}
    return Choice("nonlinearity", "activation", ACTIVATIONS, "gelu").read(config, keys)


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


def _width(config: Json) -> float:
    """Return how many times as wide as muP's base a model is; 0 if there is no base."""
    sizes = {"mup_base_hidden_size": "hidden_size", "mup_base_filter_size": "filter_size"}
    given = [key for key in sizes if config.get(key) is not None]
    if not given:
        return 0.0
    if len(given) < len(sizes):
        (lacking,) = sizes.keys() - {*given}
        raise ValueError(f"{given[0]} is given without {lacking}, which muP needs as well")
    return [number(config, theirs, 0) / number(config, key, 0) for key, theirs in sizes.items()][0]


def _alpha(config: Json, key: str) -> float:
    return 1.0 if config.get(key) is None else number(config, key, 1.0)


def _flag(config: Json, key: str, default: bool) -> bool:
    given = {} if config.get(key) is None else config
    return bool(Choice(key, key, BOOLEAN, default).read(given, {})[key])


def _read_attention_scale(config: Json, keys: Json) -> Json:
    alpha = _alpha(config, "attention_logits_alpha")
    by_d = _flag(config, "scale_qk_dot_by_d", bool(config.get("mup_base_hidden_size")))
    if (alpha == 1 and not by_d) or not {"d_model", "n_heads"} <= keys.keys():
        return {}
    d_head = keys["d_model"] / keys["n_heads"]
    return {"attention_scale": alpha / (d_head if by_d else d_head**0.5)}


def _read_output_scale(config: Json, keys: Json) -> Json:
    width, alpha = _width(config), _alpha(config, "output_logits_alpha")
    by_d = _flag(config, "scale_output_logits_by_d", True)
    old = config.get("output_logits_scale")  # of releases before 2.3, which named no base
    if width and old is None:
        return {"output_scale": alpha / (width if by_d else width**0.5)}
    if width:
        raise ValueError(
            "output_logits_scale and mup_base_hidden_size are both given, of which the logits have "
            "but one; take out the other"
        )
    if alpha != 1 or not by_d:
        key = "output_logits_alpha" if alpha != 1 else "scale_output_logits_by_d"
        raise ValueError(f"{key} is {shown(config, key)}, which needs a mup_base_hidden_size")
    return {} if old is None else {"output_scale": number(config, "output_logits_scale", 1.0)}


def _read_embed_scale(config: Json, keys: Json) -> Json:
    return {"embed_scale": _alpha(config, "embeddings_scale")}


def _only_read(model: ModelConfig) -> Json:
    raise ValueError("{} is only read")


_FAMILY = Family(
    name="Cerebras model",
    model_type="", architecture="", prefix="", also={}, begin_id=0, eot_id=0,
    keys=(
        Size("vocab_size", "n_vocab"),
        Size("max_position_embeddings", "seq"),
        Size("hidden_size", "d_model"),
        Size("num_hidden_layers", "layers"),
        Size("num_heads", "n_heads"),
        Size("filter_size", "d_ff"),
        Number("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Choice("share_embedding_weights", "tie_embeddings", BOOLEAN, True),
        Choice("residual", "residual", {it: it for it in ("parallel", "parallel-untied",
                                                         "sequential")}, None),
        *(Choice(key, key, BOOLEAN, False) for key in ("qkv_bias", "o_bias", "ff_bias",
                                                       "head_bias")),
        Derived("norm", _read_norm, _only_read),
        Derived("pe pe_rotary_dims pe_theta", _read_positions, _only_read),
        Derived("activation gated", _read_activation, _only_read),
        Derived("n_kv_heads", _read_kv_heads, _only_read),
        Derived("attention_scale", _read_attention_scale, _only_read),
        Derived("output_scale", _read_output_scale, _only_read),
        Derived("embed_scale", _read_embed_scale, _only_read),
    ),
    same={
        **{"attention_type": "scaled_dot_product", "norm_first": True, "moe_params": None},
        **{"embedding_layer_norm": False, "fixed_sparse_attention": None},
        **{"attention_sliding_window_length": None, "pos_scaling_factor": 1.0},
        **{"position_embedding_offset": 0, "scale_qk_dot_by_layer_idx": False},
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
        described = {**config, **_by_names(config, stored)}
        family = _AS_GPTJ if described["residual"] == "parallel" else _FAMILY
        known = keys_by(family, described, where)
        what = f"state of a {family.name}"
        super().__init__(path, what, family, ModelConfig(**known), known, stored, where)
        self.step = max(_step(path.rpartition("/")[2]), 0)
        self._scales = {
            "decoder/positions/embeddings": known["embed_scale"],
            "decoder/unembed/b": known["output_scale"],
        }

    def read(self, key: Key) -> np.ndarray:
        """Read one array, scaled if Cerebras scales it with another and we do not.

        It scales embeddings once positions are added to them, and logits once their bias is.
        """
        array, scale = super().read(key), self._scales.get(key.path, 1.0)
        return array if scale == 1 else (array.astype(np.float32) * scale).astype(array.dtype)


def _plain(name: str) -> str:
    """Take off what some releases put around names."""
    name = re.sub(r"^(model\.)+", "", name)
    return name.replace("position_embeddings.embed.weight", "position_embeddings.weight")


def _by_names(config: Json, stored: Mapping[str, Stored]) -> dict[str, Any]:
    """Say what is told by which arrays there are: how branches are added, and biases."""
    first = _L.format(0)
    untied = bool(config.get("use_untied_layer_norm"))
    residual = "parallel-untied" if untied else "sequential"
    return {
        "residual": residual if f"{first}norm3.weight" in stored else "parallel",
        "qkv_bias": f"{first}self_attn.proj_q_dense_layer.bias" in stored,
        "o_bias": f"{first}self_attn.proj_output_dense_layer.bias" in stored,
        "ff_bias": f"{first}ffn.ffn.0.linear_layer.bias" in stored,
        "head_bias": "lm_head.bias" in stored,
    }


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
