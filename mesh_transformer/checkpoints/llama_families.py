"""Tables of LLaMA and those that follow it, for `families`: Mistral, Qwen2, Qwen3, Gemma."""

from __future__ import annotations

import dataclasses

from mesh_transformer.checkpoints.family import (
    ACTIVATIONS,
    BOOLEAN,
    HEAD,
    USUAL_SIZES,
    Choice,
    Family,
    Keys,
    Number,
    Row,
    Size,
    pair,
    tied,
)
from mesh_transformer.checkpoints.family_keys import (
    HEAD_DIM,
    MISTRAL_WINDOW,
    QWEN_WINDOW,
    ROOT_SCALE,
    rotary,
)

_BLOCK = "layers/block/"
_L = "model.layers.{}."
_ROWS = (
    Row("model.embed_tokens.weight", "embed/embeddings"),
    Row(_L + "input_layernorm.weight", _BLOCK + "norm/scale"),
    *pair(_L + "self_attn.q_proj", _BLOCK + "attention/q"),
    *pair(_L + "self_attn.k_proj", _BLOCK + "attention/k"),
    *pair(_L + "self_attn.v_proj", _BLOCK + "attention/v"),
    Row(_L + "self_attn.q_norm.weight", _BLOCK + "attention/q_norm/scale"),
    Row(_L + "self_attn.k_norm.weight", _BLOCK + "attention/k_norm/scale"),
    *pair(_L + "self_attn.o_proj", _BLOCK + "attention/o"),
    Row(_L + "post_attention_layernorm.weight", _BLOCK + "ff_norm/scale"),
    *pair(_L + "mlp.gate_proj", _BLOCK + "ff/gate"),
    *pair(_L + "mlp.up_proj", _BLOCK + "ff/in"),
    *pair(_L + "mlp.down_proj", _BLOCK + "ff/out"),
    Row("model.norm.weight", "final_norm/scale"),
    HEAD,
)
"""Of LLaMA and those that follow it; which of the biases and norms there are, the keys say."""

_OURS = {
    **{"residual": "sequential", "norm": "rmsnorm-mean", "pe": "rotary-half", "gated": True},
    **{"embed_bias": False, "head_bias": False},
}
_SILU = Choice("hidden_act", "activation", ACTIVATIONS, "silu")
_ATTENTION_BIAS = Choice("attention_bias", "qkv_bias o_bias", BOOLEAN, False)


def _keys(*more: Keys, act: tuple[Keys, ...] = (_SILU,), tie: bool = False) -> tuple[Keys, ...]:
    """Return the keys that all have, with some more.

    Args:
        act: Which say the activation.
        tie: Whether the head is the embeddings if nothing is said.
    """
    return (
        *USUAL_SIZES,
        Size("intermediate_size", "d_ff"),
        rotary(),
        Number("rms_norm_eps", "norm_epsilon", 1e-6),
        tied(tie),
        *act,
        *more,
    )


def _kv_heads(default: int | None = None) -> Size:
    """Return the key of the heads of keys and values: as many as others without a default."""
    return Size("num_key_value_heads", "n_kv_heads", nullable=default is None, default=default)


LLAMA = Family(
    name="LLaMA",
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    keys=_keys(
        _kv_heads(),
        Size("head_dim", "d_head", nullable=True),
        _ATTENTION_BIAS,
        Choice("mlp_bias", "ff_bias", BOOLEAN, False),
    ),
    same={},
    ours=_OURS,
    also={"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True},
    begin_id=1,
    eot_id=2,
    rows=_ROWS,
    constants=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)

MISTRAL = dataclasses.replace(
    LLAMA,
    name="Mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=_keys(_kv_heads(8), Size("head_dim", "d_head", nullable=True), MISTRAL_WINDOW),
    ours={**_OURS, "ff_bias": False},
)

QWEN2 = dataclasses.replace(
    LLAMA,
    name="Qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=_keys(_kv_heads(32), HEAD_DIM, QWEN_WINDOW),
    ours={**_OURS, "qkv_bias": True, "o_bias": False, "ff_bias": False},
    begin_id=151643,
    eot_id=151643,
)

QWEN3 = dataclasses.replace(
    QWEN2,
    name="Qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=_keys(
        _kv_heads(32), Size("head_dim", "d_head", default=128), _ATTENTION_BIAS, QWEN_WINDOW
    ),
    ours={**_OURS, "qk_norm": True, "ff_bias": False},
)

_TANH: dict[str | None, str] = {"gelu_pytorch_tanh": "gelu_new"}

GEMMA = dataclasses.replace(
    LLAMA,
    name="Gemma",
    model_type="gemma",
    architecture="GemmaForCausalLM",
    keys=_keys(
        _kv_heads(16),
        Size("head_dim", "d_head", default=256),
        _ATTENTION_BIAS,
        ROOT_SCALE,
        Choice("use_bidirectional_attention", "", {None: None, False: None}, None),
        # The first models say "gelu" and mean its approximation; the second came to mend that.
        act=(
            Choice("hidden_act", "activation", _TANH | {"gelu": "gelu_new"}, "gelu_pytorch_tanh"),
            Choice("hidden_activation", "activation", _TANH | {None: "gelu_new"}, None),
        ),
        tie=True,
    ),
    same={},
    ours={**_OURS, "norm": "rmsnorm-mean-plus-one", "ff_bias": False},
    also={**LLAMA.also, "pad_token_id": 0},
    begin_id=2,
    eot_id=1,
)
