"""What the keys of the network must satisfy together, as tables.

`ORIGINAL`, `FUSED` and `FORK` say what models are within reach of mesh-transformer-jax and of its
fork, for what reads and writes their checkpoints too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mesh_transformer.encoder_rules import ENCODER_RULES
from mesh_transformer.position_rules import POSITION_RULES
from mesh_transformer.relations import Rule, apply, divisors, next_multiple, unless
from mesh_transformer.schema import shown

TOKENIZER_SIZES = {"gpt2": 50257, "bytes": 257}

MUP: dict[str, Any] = {
    **{"mup_base_d_model": 0, "mup_base_d_ff": 0, "mup_base_d_head": 0},
    **{"mup_attention_alpha": 1.0, "mup_output_alpha": 1.0},
}
"""The keys of muP, as they are in the standard parametrisation. They say how a model is trained;
what it computes `attention_scale` and `output_scale` say, which follow from them."""

FREE = frozenset({
    *("n_tokens", "compute_dtype", "remat", "unroll", "attention", "z_loss", *MUP),
    *("dropout_embedding", "dropout_attention", "dropout_residual"),
})  # fmt: skip
"""Keys that say how a model is computed, trained and sampled. All others say which function its
weights are the weights of."""
LENGTHS = frozenset({"seq", "encoder_seq"})
"""But how much it is fed at most: of two checkpoints of one model these may differ."""


def _odd(d_model: int) -> str:
    return f"use_static_sgu halves d_model {d_model}, which is odd; change d_model"


def _d_head(d_model: int, n_heads: int, use_static_sgu: bool = False) -> int:
    if use_static_sgu:
        if d_model % 2:
            raise ValueError(_odd(d_model))
        if d_model % (2 * n_heads):
            raise ValueError(
                f"n_heads {n_heads} does not divide half of d_model {d_model}, which attention is "
                "of beside use_static_sgu; change one of them or set d_head"
            )
        return d_model // 2 // n_heads
    if d_model % n_heads:
        raise ValueError(
            f"n_heads {n_heads} does not divide d_model {d_model}; change one of them or set d_head"
        )
    return d_model // n_heads


def _attention_scale(d_head: int, mup_base_d_head: int, mup_attention_alpha: float) -> float:
    base = mup_base_d_head or d_head
    return mup_attention_alpha * d_head**-0.5 * (base / d_head) ** 0.5


def _output_scale(d_model: int, mup_base_d_model: int, mup_output_alpha: float) -> float:
    return mup_output_alpha * (mup_base_d_model or d_model) / d_model


DERIVED: dict[str, Callable[..., Any]] = {
    "d_head": _d_head,
    "d_ff": lambda d_model: 4 * d_model,
    "d_embed": lambda d_model: d_model,
    "n_kv_heads": lambda n_heads: n_heads,
    "attention_scale": _attention_scale,
    "output_scale": _output_scale,
    "pe_rotary_dims": lambda pe, d_head: d_head if pe.startswith("rotary") else 0,
    "encoder_seq": lambda encoder_layers, seq: seq if encoder_layers else 0,
    "n_tokens": lambda n_vocab, tokenizer="": min(n_vocab, TOKENIZER_SIZES.get(tokenizer, n_vocab)),
}


ORIGINAL: dict[str, Any] = {
    "encoder_layers": (0,),
    "residual": ("parallel",),
    "norm": (
        *("layernorm", "layernorm-nobias", "layernorm-desync"),
        *("rmsnorm", "rmsnorm-bias", "scalenorm", "scalenorm-bias"),
    ),
    "norm_epsilon": (1e-5,),
    "final_norm": (True,),
    "pe": ("rotary", "t5", "fixed", "none"),
    "pe_theta": (10_000.0,),
    "pe_scaling": ("none",),
    "pe_offset": (0,),
    "pe_buckets": (32,),
    "pe_max_distance": (128,),
    "d_head": DERIVED["d_head"],
    "n_kv_heads": DERIVED["n_kv_heads"],
    "window": (0,),
    "attention_scale": DERIVED["attention_scale"],
    "qk_norm": (False,),
    "d_ff": DERIVED["d_ff"],
    "activation": ("gelu_new",),
    "gated": (False,),
    "qkv_bias": (False,),
    "o_bias": (False,),
    "ff_bias": (True,),
    "embed_bias": (True,),
    "head_bias": (True,),
    "tie_embeddings": (False,),
    "embed_norm": (False,),
    "embed_scale": (1.0,),
    "d_embed": DERIVED["d_embed"],
    "use_static_sgu": (False,),
    "head_qk_trick": (False,),
    "output_scale": (1.0,),
    "mup_base_d_model": (0,),
}
"""What mesh-transformer-jax's first model computes: each key's values, or what it follows from."""
FUSED = {key: theirs for key, theirs in ORIGINAL.items() if key != "d_head"} | {
    "norm": ("layernorm",),
    "pe": ("rotary",),
    "gated": (True,),
    "qkv_bias": (True,),
}
"""What its second model computes."""


def is_windowed(window: int, seq: int) -> bool:
    """Say whether a window hides anything: one as long as what is fed does not."""
    return 0 < window < seq


FORK = {
    key: theirs
    for key, theirs in ORIGINAL.items()
    if key not in ("final_norm", "window", "attention_scale", "activation", "d_embed")
} | {
    "residual": ("sequential", "parallel-untied", "post-norm"),
    "norm": ("layernorm", "layernorm-nobias"),
    "pe": ("rotary", "rotary-half", "fixed", "sinusoidal", "alibi"),
    **dict.fromkeys(("qkv_bias", "o_bias", "tie_embeddings", "embed_norm"), (False, True)),
    "embed_bias": (False,),
    "head_bias": (False,),
}
"""What the KoboldAI fork computes for `compat` neo, opt, neox and bloom."""


def unlike(theirs: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Say of each key of a model what `ORIGINAL`, `FUSED` or `FORK` has instead of its value."""
    whose = "mesh-transformer-jax's fork" if theirs is FORK else "mesh-transformer-jax"
    problems = []
    for key, kept in theirs.items():
        if key not in values:
            continue
        try:
            allowed = (apply(kept, {**values, **MUP}),) if callable(kept) else kept
        except ValueError as error:
            problems.append(str(error))
            continue
        # Of None: what it would follow from is unsound, and reported as such.
        if values[key] not in allowed and allowed != (None,):
            there = " or ".join(map(shown, allowed))
            problems.append(f"{key} is {shown(values[key])}, {there} in {whose}")
    return problems


def _as_the_original(original_shards: int, **keys: Any) -> str | None:
    problems = unlike(ORIGINAL, keys) if original_shards else []
    if not problems or (original_shards == 1 and not unlike(FUSED, keys)):
        return None
    start = f"original_shards {original_shards} cannot be followed: "
    if not unlike(FUSED, keys):
        return f"{start}the original's second model held one copy of all parameters; set it to 1"
    return f"{start}{'; '.join(problems)}; leave original_shards out"


def _whole_base(mup_base_d_model: int, mup_base_d_ff: int, mup_base_d_head: int) -> str | None:
    base = {
        "mup_base_d_model": mup_base_d_model,
        "mup_base_d_ff": mup_base_d_ff,
        "mup_base_d_head": mup_base_d_head,
    }
    given, lacking = [key for key in base if base[key]], [key for key in base if not base[key]]
    return unless(
        not given or not lacking,
        f"{' and '.join(given)} without {' and '.join(lacking)}: muP needs all three sizes of the "
        "base; give them or none",
    )


def _follows(key: str, formula: str, alpha: str) -> Rule:
    """Return the rule that a scale is what muP makes it, if the model has a base."""

    def rule(mup_base_d_model: int, **keys: Any) -> str | None:
        keys["mup_base_d_model"] = mup_base_d_model
        meant = apply(DERIVED[key], keys)
        return unless(
            not mup_base_d_model or meant is None or keys.get(key) in (None, meant),
            f"{key} {keys.get(key)} is not what muP makes it, {formula} = {meant}; leave it out "
            f"and set {alpha}",
        )

    return rule


MUP_RULES: tuple[Rule, ...] = (
    _whole_base,
    _follows(
        *("attention_scale", "mup_attention_alpha sqrt(mup_base_d_head) / d_head"),
        "mup_attention_alpha",
    ),
    _follows("output_scale", "mup_output_alpha mup_base_d_model / d_model", "mup_output_alpha"),
    lambda mup_base_d_model, mup_attention_alpha: unless(
        mup_base_d_model > 0 or mup_attention_alpha == 1,
        f"mup_attention_alpha {mup_attention_alpha} is of muP, and there is no mup_base_d_model; "
        "give one, or set attention_scale",
    ),
    lambda mup_base_d_model, mup_output_alpha: unless(
        mup_base_d_model > 0 or mup_output_alpha == 1,
        f"mup_output_alpha {mup_output_alpha} is of muP, and there is no mup_base_d_model; give "
        "one, or set output_scale",
    ),
    lambda mup_base_d_model, norm: unless(
        mup_base_d_model == 0 or norm.startswith(("layernorm", "rmsnorm-mean")),
        f"norm {norm!r} has a scale that is as large as the root of d_model, which muP keeps from "
        "growing; set norm to 'layernorm' or 'rmsnorm-mean', or leave the mup keys out",
    ),
    lambda mup_base_d_model, head_qk_trick: unless(
        mup_base_d_model == 0 or not head_qk_trick,
        "head_qk_trick has as many features at any d_model, and muP has no rule for them; leave it "
        "out, or the mup keys",
    ),
    lambda mup_base_d_model, d_embed, d_model: unless(
        mup_base_d_model == 0 or d_embed == d_model,
        f"d_embed {d_embed} is not d_model {d_model}, and muP has no rule for what projects one "
        "to the other; leave d_embed out, or the mup keys",
    ),
)
IMPOSSIBLE: tuple[Rule, ...] = (
    _as_the_original,
    *ENCODER_RULES,
    *POSITION_RULES,
    *MUP_RULES,
    lambda n_heads, cores_per_replica: unless(
        n_heads % cores_per_replica == 0,
        f"cores_per_replica {cores_per_replica} does not divide n_heads {n_heads}; "
        f"{divisors(n_heads)} would",
    ),
    lambda n_vocab, cores_per_replica: unless(
        n_vocab % cores_per_replica == 0,
        f"cores_per_replica {cores_per_replica} does not divide n_vocab {n_vocab}; "
        f"the next n_vocab that it divides is {next_multiple(n_vocab, cores_per_replica)}",
    ),
    lambda d_ff, cores_per_replica: unless(
        d_ff % cores_per_replica == 0,
        f"cores_per_replica {cores_per_replica} does not divide d_ff {d_ff}; "
        f"the next d_ff that it divides is {next_multiple(d_ff, cores_per_replica)}",
    ),
    lambda zero_stage, d_model, tpu_size, cores_per_replica: unless(
        zero_stage == 0 or d_model % max(1, tpu_size // cores_per_replica) == 0,
        f"zero_stage {zero_stage} cannot spread d_model {d_model} over "
        f"{tpu_size // cores_per_replica} replicas ({tpu_size} devices / cores_per_replica "
        f"{cores_per_replica}), which do not divide it; set zero_stage to 0 or change d_model",
    ),
    lambda n_kv_heads, n_heads: unless(
        n_heads % n_kv_heads == 0,
        f"n_kv_heads {n_kv_heads} does not divide n_heads {n_heads}, so query heads cannot share "
        f"them evenly; {divisors(n_heads)} would",
    ),
    lambda n_kv_heads, d_head, cores_per_replica: unless(
        n_kv_heads * d_head % cores_per_replica == 0,
        f"cores_per_replica {cores_per_replica} does not divide the {n_kv_heads * d_head} features "
        f"of keys (n_kv_heads {n_kv_heads} of d_head {d_head}); "
        f"{divisors(n_kv_heads * d_head)} would",
    ),
    lambda zero_stage, d_embed, d_model, tpu_size, cores_per_replica: unless(
        zero_stage == 0
        or d_embed == d_model
        or d_embed % max(1, tpu_size // cores_per_replica) == 0,
        f"zero_stage {zero_stage} cannot spread d_embed {d_embed} over "
        f"{tpu_size // cores_per_replica} replicas; set zero_stage to 0 or change d_embed",
    ),
    lambda residual, final_norm: unless(
        residual != "post-norm" or not final_norm,
        "residual 'post-norm' ends with a norm, so that final_norm must be false",
    ),
    lambda window, seq, attention: unless(
        not is_windowed(window, seq) or attention in ("auto", "xla"),
        f"attention {attention!r} sees all slots before a query, not a window of {window}; set "
        "attention to 'auto' or 'xla'",
    ),
    lambda window, window_every: unless(
        window > 0 or window_every == 1,
        f"window_every {window_every} has no effect without a window; set window or leave "
        "window_every out",
    ),
    lambda window, window_every, layers: unless(
        window == 0 or window_every <= layers,
        f"window_every {window_every} is more than layers {layers}, so that no layer has the window"
        f" of {window}; lower it to {layers} or less, or leave window and window_every out",
    ),
    lambda dropout_attention, attention: unless(
        dropout_attention == 0 or attention in ("auto", "xla"),
        f"attention {attention!r} drops no weights, and dropout_attention is {dropout_attention}; "
        "set attention to 'auto' or 'xla'",
    ),
    lambda use_static_sgu, residual: unless(
        not use_static_sgu or residual == "parallel",
        f"use_static_sgu splits what a parallel block reads, and residual is {residual!r}; set "
        "residual to 'parallel'",
    ),
    lambda use_static_sgu, d_model, d_head: unless(
        not use_static_sgu or d_model % 2 == 0, _odd(d_model)
    ),
    lambda use_static_sgu, d_model, zero_stage, tpu_size, cores_per_replica: unless(
        not use_static_sgu
        or zero_stage == 0
        or d_model % 2 != 0
        or d_model // 2 % max(1, tpu_size // cores_per_replica) == 0,
        f"use_static_sgu halves d_model {d_model}, and zero_stage {zero_stage} cannot spread "
        f"{d_model // 2} features over {tpu_size // cores_per_replica} replicas, which do not "
        "divide them; set zero_stage to 0 or change d_model",
    ),
    lambda n_tokens, n_vocab: unless(
        n_tokens <= n_vocab,
        f"n_tokens {n_tokens} is more than n_vocab {n_vocab}; raise n_vocab to {n_tokens} or more",
    ),
    lambda attention, compute_dtype: unless(
        attention != "cudnn" or compute_dtype == "bfloat16",
        "attention 'cudnn' computes in 16 bits only; set compute_dtype to 'bfloat16' or attention "
        "to 'auto'",
    ),
    lambda original_shards, norm: unless(
        original_shards == 0 or norm != "layernorm-desync",
        f"original_shards {original_shards} cannot be followed with norm 'layernorm-desync', whose "
        "copies drifted apart on the original's shards and are one here; leave original_shards out",
    ),
)
DOUBTFUL: tuple[Rule, ...] = (
    lambda norm: unless(
        norm != "layernorm-desync",
        "norm 'layernorm-desync' is treated as 'layernorm': copies of a norm cannot drift apart",
    ),
    lambda pe, pe_rotary_dims: unless(
        pe.startswith("rotary") or pe_rotary_dims == 0,
        f"pe_rotary_dims {pe_rotary_dims} has no effect with pe {pe!r}",
    ),
)
