"""Models of transformers as llama.cpp's conversion to GGUF has them: names, order, metadata."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

VOCAB, SEQ, D, LAYERS, FF = 48, 24, 64, 2, 96
LONG = {
    **{"vocab_size": VOCAB, "max_position_embeddings": SEQ, "hidden_size": D},
    **{"num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": FF},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**LONG, "model_type": "llama", "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "llama, tied": {
        **{**LONG, "model_type": "llama", "num_key_value_heads": 4, "rope_theta": 130_000.0},
        "tie_word_embeddings": True,
    },
    "llama, as 3.2": {
        **{**LONG, "model_type": "llama", "num_key_value_heads": 2, "rope_theta": 500_000.0},
        "rope_scaling": {
            **{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        },
    },
    "qwen2": {**LONG, "model_type": "qwen2", "num_key_value_heads": 2, "rope_theta": 1e6},
    "qwen3": {**LONG, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32},
    "gpt2": {
        **{"vocab_size": VOCAB, "n_positions": SEQ, "n_embd": D, "n_layer": LAYERS, "n_head": 4},
        **{"model_type": "gpt2"},
    },
    "gptneox": {**LONG, "model_type": "gpt_neox", "rotary_pct": 0.5},
    "bloom": {
        **{"vocab_size": VOCAB, "hidden_size": D, "n_layer": LAYERS, "n_head": 4},
        **{"seq_length": SEQ, "model_type": "bloom"},
    },
}
"""By the architecture's name in GGUF, and what is particular."""

_MODULES = {
    **dict.fromkeys(("embed_tokens", "wte", "embed_in", "word_embeddings"), "token_embd"),
    **{"wpe": "position_embd", "word_embeddings_layernorm": "token_embd_norm"},
    **dict.fromkeys(("model.norm", "ln_f", "final_layer_norm"), "output_norm"),
    **dict.fromkeys(("lm_head", "embed_out"), "output"),
    **dict.fromkeys(("input_layernorm", "ln_1"), "attn_norm"),
    **dict.fromkeys(("post_attention_layernorm", "ln_2"), "ffn_norm"),
    **{f"self_attn.{it}_proj": f"attn_{it}" for it in "qkv"},
    **{f"self_attn.{it}_norm": f"attn_{it}_norm" for it in "qk"},
    **dict.fromkeys(("query_key_value", "c_attn"), "attn_qkv"),
    **dict.fromkeys(("self_attn.o_proj", "attn.c_proj", "dense"), "attn_output"),
    **dict.fromkeys(("mlp.up_proj", "mlp.c_fc", "dense_h_to_4h"), "ffn_up"),
    **dict.fromkeys(("mlp.down_proj", "mlp.c_proj", "dense_4h_to_h"), "ffn_down"),
    "mlp.gate_proj": "ffn_gate",
}


def converted(kind: str, held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename arrays, and reorder them as the conversion does."""
    config, made = CONFIGS[kind], {}
    for name, value in held.items():
        module, _, leaf = name.rpartition(".")
        layer = re.search(r"\.(\d+)\.", name)
        ends = [it for it in _MODULES if module == it or module.endswith(f".{it}")]
        theirs = _MODULES[max(ends, key=len)]
        if kind.startswith("llama") and theirs in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if theirs == "attn_q" else "num_key_value_heads"]
            value = neighbours(value, heads)
        if theirs == "attn_qkv" and kind != "gpt2":
            heads = heads_of(config)
            value = side_by_side(value, heads)
        if kind == "gpt2" and theirs.startswith(("attn_qkv", "attn_out", "ffn_up", "ffn_down")):
            value = value.T
        made[f"blk.{layer[1]}.{theirs}.{leaf}" if layer else f"{theirs}.{leaf}"] = value
    return made


def heads_of(config: dict[str, Any]) -> int:
    n_heads: int = config["n_head" if "n_head" in config else "num_attention_heads"]
    return n_heads


def neighbours(value: np.ndarray, heads: int) -> np.ndarray:
    """Put feature i of each head beside the one half a head further."""
    rows = value.reshape(heads, 2, -1, *value.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(value.shape)


def side_by_side(value: np.ndarray, heads: int) -> np.ndarray:
    """Put all queries before all keys, where each head had its three together."""
    rows = value.reshape(heads, 3, -1, *value.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(0, 1)).reshape(value.shape)


def metadata(kind: str) -> dict[str, Any]:
    """Describe a model as the conversion does."""
    architecture, config = kind.partition(",")[0], CONFIGS[kind]
    heads = heads_of(config)
    epsilon = (
        "layer_norm_rms_epsilon"
        if architecture in ("llama", "qwen2", "qwen3")
        else ("layer_norm_epsilon")
    )
    width: int = config["n_embd" if "n_embd" in config else "hidden_size"]
    about: dict[str, Any] = {
        "context_length": SEQ,
        "embedding_length": width,
        "block_count": config.get("num_hidden_layers", LAYERS),
        "feed_forward_length": config.get("intermediate_size", 4 * width),
        "attention.head_count": heads,
        f"attention.{epsilon}": config.get("rms_norm_eps", 1e-6 if "rms" in epsilon else 1e-5),
    }
    if "num_key_value_heads" in config:
        about["attention.head_count_kv"] = config["num_key_value_heads"]
        about["rope.freq_base"] = float(config.get("rope_theta", 10_000.0))
    if architecture == "llama":
        about |= {"rope.dimension_count": width // heads, "vocab_size": config["vocab_size"]}
    if architecture == "qwen3":
        about |= {"attention.key_length": 32, "attention.value_length": 32}
    if architecture == "gptneox":
        about |= {"rope.dimension_count": width // heads // 2, "use_parallel_residual": True}
    named = {f"{architecture}.{name}": value for name, value in about.items()}
    words = [chr(0x21 + i) for i in range(VOCAB)]
    tokens = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": words}
    return {"general.architecture": architecture, "general.name": "x", **named, **tokens}


def factors() -> np.ndarray:
    """Return by what the conversion divides the frequencies of "llama, as 3.2"."""
    frequencies = 500_000.0 ** (-np.arange(0, D // 4, 2) / (D // 4))
    made = []
    for wavelength in 2 * np.pi / frequencies:
        if wavelength < 8192 / 4:
            made.append(1.0)
        elif wavelength > 8192:
            made.append(32.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            made.append(1 / ((1 - smooth) / 32.0 + smooth))
    return np.array(made, np.float32)
