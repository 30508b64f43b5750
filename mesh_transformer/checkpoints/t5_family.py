"""Table of T5 (arXiv:1910.10683), T5 v1.1 and Flan-T5, for `families`."""

from __future__ import annotations

from typing import Any

from mesh_transformer.checkpoints.family import (
    ACTIVATIONS,
    HEAD,
    Derived,
    Family,
    Json,
    Number,
    Row,
    Size,
    as_json,
    shown,
)
from mesh_transformer.config import ModelConfig

_LENGTH, _TARGET_LENGTH = 512, "max_target_positions"


def _read_feed_forward(config: Json, keys: Json) -> Json:
    """Read "relu", or "gated-" and an activation, of which "gelu" means the approximation then."""
    kind = config.get("feed_forward_proj", "relu")
    names = {**ACTIVATIONS, **{f"gated-{name}": ours for name, ours in ACTIVATIONS.items()}}
    names["gated-gelu"] = "gelu_new"
    if not isinstance(kind, str) or kind not in names:
        listed = ", ".join(map(as_json, names))
        raise ValueError(f"feed_forward_proj is {as_json(kind)}; computed here: {listed}")
    return {"activation": names[kind], "gated": kind.startswith("gated-")}


def _write_feed_forward(model: ModelConfig) -> Json:
    named = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if not model.gated:
        return {"feed_forward_proj": named[model.activation]}
    if model.activation == "gelu":
        raise ValueError("activation is 'gelu'; gated, {} has its approximation, 'gelu_new'")
    named["gelu_new"] = "gelu"
    return {"feed_forward_proj": f"gated-{named[model.activation]}"}


def _read_head(config: Json, keys: Json) -> Json:
    """Read whether the head is the embeddings, which T5 then has smaller logits of.

    Releases of `transformers` from 5 on write `tie_word_embeddings` true for all models, and
    `scale_decoder_outputs` false for those with a head of their own.
    """
    tied = config.get("tie_word_embeddings", True)
    scaled = config.get("scale_decoder_outputs", tied)
    for name, value in (("tie_word_embeddings", tied), ("scale_decoder_outputs", scaled)):
        if type(value) is not bool:
            raise ValueError(f"{name} is {as_json(value)}; needed is true or false")
    if scaled and not tied:
        raise ValueError("scale_decoder_outputs is true; computed here with embeddings as the head")
    scale = keys["d_model"] ** -0.5 if scaled and "d_model" in keys else 1.0
    return {"tie_embeddings": scaled, "output_scale": scale}


def _write_head(model: ModelConfig) -> Json:
    scale = model.d_model**-0.5 if model.tie_embeddings else 1.0
    if model.output_scale != scale:
        raise ValueError(
            f"tie_embeddings is {model.tie_embeddings} and output_scale {model.output_scale}; {{}} "
            f"has {scale} there"
        )
    return {"tie_word_embeddings": model.tie_embeddings}


def _read_padding(config: Json, keys: Json) -> Json:
    pad_id = config.get("pad_token_id", 0)
    if type(pad_id) is not int or pad_id < 0:
        raise ValueError(f"pad_token_id is {as_json(pad_id)}; needed is a token")
    start_id = config.get("decoder_start_token_id", pad_id)
    if start_id != pad_id:
        raise ValueError(
            f"decoder_start_token_id is {as_json(start_id)}; computed here with pad_token_id, "
            f"{pad_id}"
        )
    return {"pad_id": pad_id}


def _write_padding(model: ModelConfig) -> Json:
    return {"pad_token_id": model.pad_id, "decoder_start_token_id": model.pad_id}


def _read_lengths(config: Json, keys: Json) -> Json:
    """Read how long texts are: relative positions limit neither the model nor what it was fed."""
    encoder_seq = config.get("n_positions", _LENGTH)
    lengths = {"n_positions": encoder_seq, _TARGET_LENGTH: config.get(_TARGET_LENGTH, encoder_seq)}
    for name, value in lengths.items():
        if type(value) is not int or value < 2:
            raise ValueError(f"{name} is {as_json(value)}; needed is a whole number, 2 or more")
    return {"encoder_seq": encoder_seq, "seq": lengths[_TARGET_LENGTH]}


def _write_lengths(model: ModelConfig) -> Json:
    return {"n_positions": model.encoder_seq, _TARGET_LENGTH: model.seq}


def _read_layers(config: Json, keys: Json) -> Json:
    names = {"encoder_layers": "num_layers", "layers": "num_decoder_layers"}
    given: dict[str, Any] = {"num_decoder_layers": config.get("num_layers"), **config}
    if given["num_decoder_layers"] is None:
        given["num_decoder_layers"] = config.get("num_layers")
    for name in names.values():
        if type(given.get(name)) is not int or given[name] < 1:
            raise ValueError(f"{name} is {shown(config, name)}; needed is a whole number above 0")
    return {ours: given[theirs] for ours, theirs in names.items()}


def _write_layers(model: ModelConfig) -> Json:
    if not model.encoder_layers:
        raise ValueError("encoder_layers is 0; {} has an encoder")
    return {"num_layers": model.encoder_layers, "num_decoder_layers": model.layers}


_BLOCK = "layers/block/"


def _attention(theirs: str, ours: str) -> tuple[Row, ...]:
    return tuple(Row(f"{theirs}.{x}.weight", f"{ours}/{x}/w", transposed=True) for x in "qkvo")


def _feed_forward(theirs: str, ours: str) -> tuple[Row, ...]:
    rows = (("wi", "in", False), ("wi_0", "gate", True), ("wi_1", "in", True), ("wo", "out", None))
    return tuple(
        Row(f"{theirs}.{name}.weight", f"{ours}/{it}/w", transposed=True, gated=gated)
        for name, it, gated in rows
    )


def _stack(theirs: str, ours: str, last: int) -> tuple[Row, ...]:
    """Return the rows that both stacks have, whose feed-forward layers are number `last`."""
    block, first = f"{theirs}.block.{{}}.layer.", f"{theirs}.block.0.layer.0.SelfAttention."
    return (
        Row(first + "relative_attention_bias.weight", f"{ours}relative_positions/embeddings", True),
        Row(f"{theirs}.final_layer_norm.weight", f"{ours}final_norm/scale"),
        *_attention(f"{block}0.SelfAttention", f"{ours}{_BLOCK}attention"),
        Row(f"{block}0.layer_norm.weight", f"{ours}{_BLOCK}norm/scale"),
        *_feed_forward(f"{block}{last}.DenseReluDense", f"{ours}{_BLOCK}ff"),
        Row(f"{block}{last}.layer_norm.weight", f"{ours}{_BLOCK}ff_norm/scale"),
    )


T5 = Family(
    name="T5",
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    prefix="",
    keys=(
        Size("vocab_size", "n_vocab"),
        Size("d_model", "d_model"),
        Size("d_kv", "d_head", default=64),
        Size("d_ff", "d_ff"),
        Size("num_heads", "n_heads"),
        Size("relative_attention_num_buckets", "pe_buckets", default=32),
        Size("relative_attention_max_distance", "pe_max_distance", default=128),
        Number("layer_norm_epsilon", "norm_epsilon", 1e-6),
        Derived("encoder_layers layers", _read_layers, _write_layers),
        Derived("encoder_seq seq", _read_lengths, _write_lengths),
        Derived("pad_id", _read_padding, _write_padding),
        Derived("activation gated", _read_feed_forward, _write_feed_forward),
        Derived("tie_embeddings output_scale", _read_head, _write_head),
    ),
    same={"is_encoder_decoder": True},
    ours={
        **{"residual": "sequential", "norm": "rmsnorm-mean", "pe": "t5", "attention_scale": 1.0},
        **{"ff_bias": False, "embed_bias": False, "head_bias": False},
    },
    also={"dropout_rate": 0.0, "initializer_factor": 1.0, "use_cache": True},
    begin_id=None,
    eot_id=1,
    rows=(
        Row("shared.weight", "embed/embeddings"),
        *_stack("encoder", "encoder/", 1),
        *_stack("decoder", "", 2),
        *_attention("decoder.block.{}.layer.1.EncDecAttention", _BLOCK + "cross"),
        Row("decoder.block.{}.layer.1.layer_norm.weight", _BLOCK + "cross_norm/scale"),
        HEAD,
    ),
    # Copies of the embeddings, and a table that the first release had without need.
    constants=r"(en|de)coder\.embed_tokens\.weight|decoder\.block\.0\.layer\.1\.EncDecAttention\."
    r"relative_attention_bias\.weight",
)
