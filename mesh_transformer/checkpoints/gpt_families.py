"""Tables of GPT-J, GPT-2, GPT-Neo, GPT-NeoX (Pythia), OPT and BLOOM, for `families`."""

from __future__ import annotations

from mesh_transformer.checkpoints.family import (
    ACTIVATIONS,
    BOOLEAN,
    HEAD,
    USUAL_SIZES,
    Choice,
    Family,
    Number,
    Row,
    Size,
    conv,
    norm,
    pair,
    tied,
)
from mesh_transformer.checkpoints.family_keys import NEO_WINDOW, OPT_NORMS, rotary

_BLOCK = "layers/block/"
_GPT_SIZES = (
    Size("vocab_size", "n_vocab"),
    Size("n_positions", "seq", also=("n_ctx", "max_position_embeddings")),
    Size("n_embd", "d_model"),
    Size("n_layer", "layers"),
    Size("n_head", "n_heads"),
    Size("n_inner", "d_ff", nullable=True),
)
_GELU_AND_EPSILON = (
    Choice("activation_function", "activation", ACTIVATIONS, "gelu_new"),
    Number("layer_norm_epsilon", "norm_epsilon", 1e-5),
)
_ALSO = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
_GPT_ALSO = {
    **{"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    **{"initializer_range": 0.02, "use_cache": True},
}
_BIASED = {"qkv_bias": True, "o_bias": True, "embed_bias": False, "head_bias": False}
_BIAS_FREE = {"embed_bias": False, "head_bias": False}


_H = "transformer.h.{}."


def _bias_free_qkv(theirs: str) -> tuple[Row, ...]:
    return tuple(
        Row(f"{theirs}.{name}_proj.weight", f"{_BLOCK}attention/{name}/w", transposed=True)
        for name in "qkv"
    )


GPTJ = Family(
    name="GPT-J",
    model_type="gptj",
    architecture="GPTJForCausalLM",
    prefix="transformer.",
    keys=(
        *_GPT_SIZES,
        Size("rotary_dim", "pe_rotary_dims"),
        *_GELU_AND_EPSILON,
    ),
    same={"tie_word_embeddings": False},
    ours={"norm": "layernorm", "pe": "rotary"},
    also=_GPT_ALSO,
    begin_id=50256,
    eot_id=50256,
    rows=(
        Row("transformer.wte.weight", "embed/embeddings"),
        *norm(_H + "ln_1", _BLOCK + "norm"),
        *_bias_free_qkv(_H + "attn"),
        Row(_H + "attn.out_proj.weight", _BLOCK + "attention/o/w", transposed=True),
        *pair(_H + "mlp.fc_in", _BLOCK + "ff/in"),
        *pair(_H + "mlp.fc_out", _BLOCK + "ff/out"),
        *norm("transformer.ln_f", "final_norm"),
        *pair("lm_head", "unembed"),
    ),
    constants=r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions|.*inv_freq)",
)

GPT2 = Family(
    name="GPT-2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    keys=(
        *_GPT_SIZES,
        *_GELU_AND_EPSILON,
        tied(True),
    ),
    same={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    ours={**_BIASED, "residual": "sequential", "norm": "layernorm", "pe": "fixed"},
    also=_GPT_ALSO,
    begin_id=50256,
    eot_id=50256,
    rows=(
        Row("transformer.wte.weight", "embed/embeddings"),
        Row("transformer.wpe.weight", "positions/embeddings"),
        *norm(_H + "ln_1", _BLOCK + "norm"),
        *conv(_H + "attn.c_attn", _BLOCK + "attention/[qkv]"),
        *conv(_H + "attn.c_proj", _BLOCK + "attention/o"),
        *norm(_H + "ln_2", _BLOCK + "ff_norm"),
        *conv(_H + "mlp.c_fc", _BLOCK + "ff/in"),
        *conv(_H + "mlp.c_proj", _BLOCK + "ff/out"),
        *norm("transformer.ln_f", "final_norm"),
        HEAD,
    ),
    constants=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
)

GPT_NEO = Family(
    name="GPT-Neo",
    model_type="gpt_neo",
    architecture="GPTNeoForCausalLM",
    prefix="transformer.",
    keys=(
        Size("vocab_size", "n_vocab"),
        Size("max_position_embeddings", "seq"),
        Size("hidden_size", "d_model"),
        Size("num_layers", "layers"),
        Size("num_heads", "n_heads"),
        Size("intermediate_size", "d_ff", nullable=True),
        NEO_WINDOW,
        *_GELU_AND_EPSILON,
        tied(True),
    ),
    same={},
    ours={
        **{"residual": "sequential", "norm": "layernorm", "pe": "fixed", "attention_scale": 1.0},
        **_BIASED,
        "qkv_bias": False,
    },
    also=_ALSO | {"embed_dropout": 0.0, "resid_dropout": 0.0},
    begin_id=50256,
    eot_id=50256,
    rows=(
        Row("transformer.wte.weight", "embed/embeddings"),
        Row("transformer.wpe.weight", "positions/embeddings"),
        *norm(_H + "ln_1", _BLOCK + "norm"),
        *_bias_free_qkv(_H + "attn.attention"),
        *pair(_H + "attn.attention.out_proj", _BLOCK + "attention/o"),
        *norm(_H + "ln_2", _BLOCK + "ff_norm"),
        *pair(_H + "mlp.c_fc", _BLOCK + "ff/in"),
        *pair(_H + "mlp.c_proj", _BLOCK + "ff/out"),
        *norm("transformer.ln_f", "final_norm"),
        HEAD,
    ),
    constants=r"transformer\.h\.\d+\.attn\.attention\.(bias|masked_bias)",
)

_N = "gpt_neox.layers.{}."

GPT_NEOX = Family(
    name="GPT-NeoX",
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    keys=(
        *USUAL_SIZES,
        Size("intermediate_size", "d_ff"),
        rotary("rotary_emb_base", "rotary_pct"),
        Choice(
            "use_parallel_residual",
            "residual",
            {True: "parallel-untied", False: "sequential"},
            True,
        ),
        Choice("attention_bias", "qkv_bias o_bias", BOOLEAN, True),
        Choice("hidden_act", "activation", ACTIVATIONS, "gelu"),
        Number("layer_norm_eps", "norm_epsilon", 1e-5),
        tied(False),
    ),
    same={},
    ours={**_BIAS_FREE, "norm": "layernorm", "pe": "rotary-half"},
    also=_ALSO | {"hidden_dropout": 0.0},
    begin_id=0,
    eot_id=0,
    rows=(
        Row("gpt_neox.embed_in.weight", "embed/embeddings"),
        *norm(_N + "input_layernorm", _BLOCK + "norm"),
        *norm(_N + "post_attention_layernorm", _BLOCK + "ff_norm"),
        *pair(_N + "attention.query_key_value", _BLOCK + "attention/[qkv]", by_head=True),
        *pair(_N + "attention.dense", _BLOCK + "attention/o"),
        *pair(_N + "mlp.dense_h_to_4h", _BLOCK + "ff/in"),
        *pair(_N + "mlp.dense_4h_to_h", _BLOCK + "ff/out"),
        *norm("gpt_neox.final_layer_norm", "final_norm"),
        Row("embed_out.weight", "unembed/w", transposed=True),
    ),
    constants=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
)

_O = "model.decoder.layers.{}."

OPT = Family(
    name="OPT",
    model_type="opt",
    architecture="OPTForCausalLM",
    prefix="model.",
    keys=(
        *USUAL_SIZES,
        Size("ffn_dim", "d_ff"),
        Size("word_embed_proj_dim", "d_embed", nullable=True),
        OPT_NORMS,
        Choice("activation_function", "activation", ACTIVATIONS, "relu"),
        Choice("enable_bias", "qkv_bias o_bias ff_bias", BOOLEAN, True),
        tied(True),
    ),
    same={"layer_norm_elementwise_affine": True},
    ours={**_BIAS_FREE, "norm": "layernorm", "pe": "fixed", "pe_offset": 2},
    also={
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "layerdrop": 0.0,
        "init_std": 0.02,
        "pad_token_id": 1,
        "use_cache": True,
    },
    begin_id=2,
    eot_id=2,
    rows=(
        Row("model.decoder.embed_tokens.weight", "embed/embeddings"),
        Row("model.decoder.project_in.weight", "embed/project/w", transposed=True),
        Row("model.decoder.embed_positions.weight", "positions/embeddings"),
        *norm(_O + "self_attn_layer_norm", _BLOCK + "norm"),
        *pair(_O + "self_attn.q_proj", _BLOCK + "attention/q"),
        *pair(_O + "self_attn.k_proj", _BLOCK + "attention/k"),
        *pair(_O + "self_attn.v_proj", _BLOCK + "attention/v"),
        *pair(_O + "self_attn.out_proj", _BLOCK + "attention/o"),
        *norm(_O + "final_layer_norm", _BLOCK + "ff_norm"),
        *pair(_O + "fc1", _BLOCK + "ff/in"),
        *pair(_O + "fc2", _BLOCK + "ff/out"),
        *norm("model.decoder.final_layer_norm", "final_norm"),
        Row("model.decoder.project_out.weight", "unembed/project/w", transposed=True),
        HEAD,
    ),
    constants="(?!)",
)

BLOOM = Family(
    name="BLOOM",
    model_type="bloom",
    architecture="BloomForCausalLM",
    prefix="transformer.",
    keys=(
        Size("vocab_size", "n_vocab"),
        # Which ALiBi does not limit: how long the texts were that the model was trained with.
        Size("seq_length", "seq", default=2048),
        Size("hidden_size", "d_model", also=("n_embed",)),
        Size("n_layer", "layers", also=("num_hidden_layers",)),
        Size("n_head", "n_heads", also=("num_attention_heads",)),
        Number("layer_norm_epsilon", "norm_epsilon", 1e-5),
        tied(True),
    ),
    same={"apply_residual_connection_post_layernorm": False},
    ours={
        **{"residual": "sequential", "norm": "layernorm", "pe": "alibi", "embed_norm": True},
        **_BIASED,
    },
    also=_ALSO | {"hidden_dropout": 0.0},
    begin_id=1,
    eot_id=2,
    rows=(
        Row("transformer.word_embeddings.weight", "embed/embeddings"),
        *norm("transformer.word_embeddings_layernorm", "embed/norm"),
        *norm(_H + "input_layernorm", _BLOCK + "norm"),
        *pair(_H + "self_attention.query_key_value", _BLOCK + "attention/[qkv]", by_head=True),
        *pair(_H + "self_attention.dense", _BLOCK + "attention/o"),
        *norm(_H + "post_attention_layernorm", _BLOCK + "ff_norm"),
        *pair(_H + "mlp.dense_h_to_4h", _BLOCK + "ff/in"),
        *pair(_H + "mlp.dense_4h_to_h", _BLOCK + "ff/out"),
        *norm("transformer.ln_f", "final_norm"),
        HEAD,
    ),
    constants="(?!)",
)
