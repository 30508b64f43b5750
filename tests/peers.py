"""Tiny random models of transformers, of every family that is read, in the shapes that it has."""

from __future__ import annotations

from typing import Any

import pytest

WHY = "compares with transformers; run EXTRAS=test,parity ./test"
torch: Any = pytest.importorskip("torch", reason=WHY)
transformers: Any = pytest.importorskip("transformers", reason=WHY)

N_VOCAB, SEQ = 64, 24

_HEADS = {"num_attention_heads": 8, "num_hidden_layers": 3, "hidden_size": 32}
_LONG = {**_HEADS, "vocab_size": N_VOCAB, "max_position_embeddings": SEQ}
_LLAMA = {**_LONG, "intermediate_size": 48, "num_key_value_heads": 4}
_GPT = {"vocab_size": N_VOCAB, "n_positions": SEQ, "n_embd": 32, "n_layer": 3, "n_head": 8}
_LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 8, "rope_theta": 500.0},
}
_YARN = {
    **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "rope_theta": 100.0,
}
_WHOLE_YARN = {
    **{**_YARN, "beta_fast": 2.0, "beta_slow": 0.5},
    **{"mscale": 1.0, "mscale_all_dim": 0.5},
}
_NEOX = {**_LONG, "hidden_size": 64, "intermediate_size": 48, "rotary_pct": 0.5}
_NEO = {
    **{"vocab_size": N_VOCAB, "max_position_embeddings": SEQ, "hidden_size": 32, "num_heads": 8},
    "window_size": 5,
}

PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj": ("GPTJ", {**_GPT, "rotary_dim": 2}),
    "gpt2": ("GPT2", _GPT),
    "gpt2, untied and narrow": (
        "GPT2",
        {**_GPT, "n_inner": 40, "tie_word_embeddings": False, "activation_function": "gelu"},
    ),
    "neo": ("GPTNeo", {**_NEO, "num_layers": 4, "attention_types": [[["global", "local"], 2]]}),
    "neo, global": ("GPTNeo", {**_NEO, "num_layers": 2, "attention_types": [[["global"], 2]]}),
    "neo, local": ("GPTNeo", {**_NEO, "num_layers": 2, "attention_types": [[["local"], 2]]}),
    "neox": ("GPTNeoX", {**_NEOX, "rotary_emb_base": 50.0}),
    "neox, sequential": (
        "GPTNeoX",
        {**_NEOX, "use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_new"},
    ),
    "neox, without biases": (
        "GPTNeoX",
        {**_NEOX, "attention_bias": False, "tie_word_embeddings": True},
    ),
    "opt, as 125m": ("OPT", {**_LONG, "ffn_dim": 48}),
    "opt, as 350m": (
        "OPT",
        {**_LONG, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "opt, without a final norm": (
        "OPT",
        {**_LONG, "ffn_dim": 48, "_remove_final_layer_norm": True},
    ),
    "opt, without biases": ("OPT", {**_LONG, "ffn_dim": 48, "enable_bias": False}),
    "bloom": (
        "Bloom",
        {"vocab_size": N_VOCAB, "hidden_size": 32, "n_layer": 3, "n_head": 8, "seq_length": SEQ},
    ),
    "bloom, 12 heads": (
        "Bloom",
        {"vocab_size": N_VOCAB, "hidden_size": 48, "n_layer": 2, "n_head": 12, "seq_length": SEQ},
    ),
    "llama": ("Llama", {**_LLAMA, "num_key_value_heads": 8}),
    "llama, as 3.2": (
        "Llama",
        {**_LLAMA, "rope_parameters": _LLAMA3, "tie_word_embeddings": True, "head_dim": 8},
    ),
    "llama, linear": (
        "Llama",
        {**_LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 100.0},
    ),
    "llama, yarn": ("Llama", {**_LLAMA, "rope_parameters": _YARN}),
    "llama, yarn in full": ("Llama", {**_LLAMA, "head_dim": 16, "rope_parameters": _WHOLE_YARN}),
    "llama, biased": ("Llama", {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": 5}),
    "mistral, whole": ("Mistral", {**_LLAMA, "sliding_window": None, "head_dim": 8}),
    "qwen2": ("Qwen2", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2, a window": (
        "Qwen2",
        {**_LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen2, a window in every other layer": (
        "Qwen2",
        {
            **{**_LLAMA, "use_sliding_window": True, "sliding_window": 5},
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 8}),
    "gemma, one head of keys": ("Gemma", {**_LLAMA, "num_key_value_heads": 1, "head_dim": 8}),
    "gemma": ("Gemma", {**_LLAMA, "num_key_value_heads": 8, "head_dim": 8}),
}
"""By a name for people: the class, without what all their names end in, and its configuration."""


def make(name: str) -> Any:
    """Return a model with weights for which logits are of the size of 1 to 10."""
    family, keys = PEERS[name]
    ends = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, f"{family}Config")(**keys, **ends)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, family + head)(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            is_scale = "norm" in path.lower() or ".ln_" in path
            around = 1.0 if is_scale and path.endswith("weight") and family != "Gemma" else 0.0
            parameter.normal_(around, 0.2)
    return model.eval()


def logits(model: Any, tokens_BT: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor(tokens_BT.astype("int64"))).logits.float().numpy()


def continued(model: Any, prompt: list[int], n: int) -> list[int]:
    """Return the likeliest tokens after a prompt, as `generate` finds them with its cache."""
    asked = torch.tensor([prompt])
    whole = model.generate(
        asked,
        attention_mask=torch.ones_like(asked),
        do_sample=False,
        max_new_tokens=n,
        min_new_tokens=n,
        pad_token_id=0,
    )
    return whole[0, len(prompt) :].tolist()


def load(folder: str) -> Any:
    """Load as transformers does, and be sure that it missed and ignored nothing."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()
