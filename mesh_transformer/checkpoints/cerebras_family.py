"""The model of Cerebras's model zoo: its names and parameters, for `cerebras` and its writer.

Its one decoder is configured as GPT-J, GPT-NeoX, GPT-2 or LLaMA, and arrays have the same names in
all. It turns neighbouring features; what it has converted from GPT-NeoX and LLaMA has queries and
keys in that order, so that all but GPT-J's are in halves here, as transformers has them.

Read are the parameters of all releases; written those of 1.9, the last that has such files, which
takes no notice of a parameter that it does not know. Its rotary positions have theta 10000, and of
its two classes GPT-2's, of sequential blocks, has RMSNorm and the scales of muP, and GPT-J's, of
parallel ones, norms without a bias (modelzoo/common/pytorch of github.com/Cerebras/modelzoo).

Of muP, what it computes is read: the scales of embeddings, of the products of queries and keys, and
of logits. The base's sizes say beside that how a model was trained, which is told by the
configuration that trains on: see docs/howto_mup.md.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from mesh_transformer import relations, rules
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
from mesh_transformer.config import ModelConfig
from mesh_transformer.network_rules import MUP

LAYER, _BLOCK = "transformer_decoder.layers.{}.", "layers/block/"
UNTIED = "use_untied_layer_norm"  # of a parallel block: whether each of its branches has a norm
BIASES = {
    "use_projection_bias_in_attention": ("qkv_bias", f"{LAYER}self_attn.proj_q_dense_layer.bias"),
    "use_ffn_bias_in_attention": ("o_bias", f"{LAYER}self_attn.proj_output_dense_layer.bias"),
    "use_ffn_bias": ("ff_bias", f"{LAYER}ffn.ffn.0.linear_layer.bias"),
    "use_bias_in_output": ("head_bias", "lm_head.bias"),
}
"""Parameters that say which biases there are, with our keys and what is there if so."""
_GATED = {"swiglu": "silu", "reglu": "relu", "geglu": "gelu"}
_NORMS = {"layernorm": "layernorm", "rmsnorm": "rmsnorm-mean",
          "biasless-layernorm": "layernorm-nobias"}  # fmt: skip
_OF_TRAINING = {
    **{"dropout_rate": 0.0, "embedding_dropout_rate": 0.0, "attention_dropout_rate": 0.0},
    **{"residual_dropout_rate": 0.0, "mixed_precision": True},
}
"""What its trainer asks for; precision as its own converter has it."""
_PLAIN = Choice("nonlinearity", "activation", ACTIVATIONS, "gelu")


def _rows(*, pairs: bool) -> tuple[Row, ...]:
    def attention(theirs: str, ours: str) -> tuple[Row, ...]:
        found = pair(f"{LAYER}self_attn.proj_{theirs}_dense_layer", f"{_BLOCK}attention/{ours}")
        return tuple(row._replace(pairs=pairs and ours in "qk") for row in found)

    return (
        Row("embedding_layer.word_embeddings.weight", "embed/embeddings"),
        Row("embedding_layer.position_embeddings.weight", "positions/embeddings"),
        *norm(LAYER + "norm1", _BLOCK + "norm"),
        *attention("q", "q"),
        *attention("k", "k"),
        *attention("v", "v"),
        *attention("output", "o"),
        *norm(LAYER + "norm3", _BLOCK + "ff_norm"),
        *pair(LAYER + "ffn.ffn.0.linear_layer_for_glu", _BLOCK + "ff/gate"),
        *pair(LAYER + "ffn.ffn.0.linear_layer", _BLOCK + "ff/in"),
        *pair(LAYER + "ffn.ffn.1.linear_layer", _BLOCK + "ff/out"),
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
    """Write the parameter of 1.9, and that of releases from 2.0, which have no other."""
    other = "rmsnorm" if model.residual == "sequential" else "biasless-layernorm"
    kinds = {kind: _NORMS[kind] for kind in ("layernorm", other)}
    try:
        (kind,) = Choice("norm_type", "norm", kinds, None).write(model).values()
    except ValueError as error:
        raise ValueError(f"{error} where residual is {model.residual!r}") from error
    old = {"rmsnorm": "use_rms_norm", "biasless-layernorm": "use_biasless_norm"}
    return {"norm_type": kind, **({old[kind]: True} if kind in old else {})}


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


def _write_positions(model: ModelConfig) -> Json:
    kinds = {"learned": "fixed", "rotary": "rotary-half"}
    if model.residual == "parallel":
        kinds["rotary"] = "rotary"
    kind = Choice("position_embedding_type", "pe", kinds, None).write(model)
    if model.pe == "fixed":
        return kind
    return {**kind, "rotary_dim": model.pe_rotary_dims}


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
    if UNTIED not in config:
        return {"residual": "sequential"}
    return {"residual": "parallel-untied" if config[UNTIED] else "parallel"}


def _write_residual(model: ModelConfig) -> Json:
    if model.residual == "sequential":
        return {}
    return Choice(UNTIED, "residual", {False: "parallel", True: "parallel-untied"}, None).write(
        model
    )


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


def _write_attention_scale(model: ModelConfig) -> Json:
    usual = relations.apply(rules.DERIVED["attention_scale"], {**vars(model), **MUP})
    if model.attention_scale == usual:
        return {}
    by_d, where = 1 / model.d_head, f" where residual is {model.residual!r}"
    if model.residual != "sequential":
        raise ValueError(f"attention_scale is {model.attention_scale}; {{}} has {usual}{where}")
    if not math.isclose(model.attention_scale, by_d, rel_tol=1e-15):
        raise ValueError(f"attention_scale is {model.attention_scale}; {{}} has {usual}, {by_d}")
    return {"scale_qk_dot_by_d": True}


def _write_output_scale(model: ModelConfig) -> Json:
    return _write_scale(model, "output_scale", "output_logits_scale")


def _write_embed_scale(model: ModelConfig) -> Json:
    return _write_scale(model, "embed_scale", "embeddings_scale")


def _write_scale(model: ModelConfig, ours: str, theirs: str) -> Json:
    scale = getattr(model, ours)
    if scale != 1 and model.residual != "sequential":
        raise ValueError(f"{ours} is {scale}; {{}} has 1.0 where residual is {model.residual!r}")
    return {} if scale == 1 else {theirs: scale}


def _read_embed_bias(config: Json, keys: Json) -> Json:
    foldable = not keys.get("tie_embeddings") and keys.get("embed_scale", 1) == 1
    return {} if foldable else {"embed_bias": False}


FAMILY = Family(
    name="Cerebras model",
    model_type="", architecture="", prefix="", also=_OF_TRAINING, begin_id=0, eot_id=0,
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
        *(Choice(theirs, ours, BOOLEAN, False) for theirs, (ours, _) in BIASES.items()),
        Derived("norm", _read_norm, _write_norm),
        Derived("pe pe_rotary_dims pe_theta", _read_positions, _write_positions),
        Derived("activation gated", _read_activation, _write_activation),
        Derived("n_kv_heads", _read_kv_heads, _write_kv_heads),
        Derived("attention_scale", _read_attention_scale, _write_attention_scale),
        Derived("output_scale", _read_output_scale, _write_output_scale),
        Derived("embed_scale", _read_embed_scale, _write_embed_scale),
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
AS_GPTJ = dataclasses.replace(
    FAMILY,
    keys=(*FAMILY.keys, Derived("embed_bias", _read_embed_bias, lambda model: {})),
    ours={},
    rows=_rows(pairs=False),
)
"""Of parallel blocks with one norm, which turn neighbours here too."""


def scales(model: ModelConfig) -> dict[str, float]:
    """Say by how much arrays are larger here, by path, where Cerebras scales a sum with them.

    It scales embeddings once positions are added to them, and logits once their bias is.
    """
    return {
        "decoder/positions/embeddings": model.embed_scale,
        "decoder/unembed/b": model.output_scale,
    }


def scaled(array: np.ndarray, scale: float) -> np.ndarray:
    """Multiply an array, in float32."""
    return array if scale == 1 else (array.astype(np.float32) * scale).astype(array.dtype)
