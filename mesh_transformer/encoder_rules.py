"""What the keys of a network with an encoder must satisfy together, as a table."""

from __future__ import annotations

from typing import Any

from mesh_transformer.relations import Rule, unless
from mesh_transformer.schema import shown

WITH_ENCODER: dict[str, tuple[Any, ...]] = {
    "residual": ("sequential",),
    "pe": ("t5",),
    "window": (0,),
    "attention": ("auto", "xla"),
    "dropout_embedding": (0.0,),
    "dropout_attention": (0.0,),
    "dropout_residual": (0.0,),
    "use_static_sgu": (False,),
    "head_qk_trick": (False,),
    "mup_base_d_model": (0,),
}
"""What a decoder with an encoder must have."""


def _with_encoder(encoder_layers: int, **keys: Any) -> str | None:
    problems = [
        f"{key} {' or '.join(map(shown, kept))}, not {shown(keys[key])}"
        for key, kept in WITH_ENCODER.items()
        if keys.get(key, kept[0]) not in kept
    ]
    needed = f"encoder_layers {encoder_layers} needs {'; '.join(problems)}"
    return unless(not encoder_layers or not problems, needed)


ENCODER_RULES: tuple[Rule, ...] = (
    _with_encoder,
    lambda encoder_layers, encoder_seq, pad_id: unless(
        encoder_layers > 0 or encoder_seq == pad_id == 0,
        f"encoder_seq {encoder_seq} and pad_id {pad_id} are of an encoder, and encoder_layers is "
        "0; set encoder_layers, or leave them out",
    ),
    lambda encoder_layers, encoder_seq: unless(
        encoder_layers == 0 or encoder_seq > 0,
        f"encoder_layers {encoder_layers} needs an encoder_seq of 1 or more",
    ),
    lambda encoder_layers, pad_id, n_vocab: unless(
        encoder_layers == 0 or pad_id < n_vocab,
        f"pad_id {pad_id} is no token of n_vocab {n_vocab}; lower it to {n_vocab - 1} or less",
    ),
    lambda pe, pe_buckets, pe_max_distance, encoder_layers: unless(
        pe != "t5" or 1 <= pe_buckets // (4 if encoder_layers else 2) < pe_max_distance,
        f"pe_buckets {pe_buckets} with pe_max_distance {pe_max_distance}: the first "
        f"{pe_buckets // (4 if encoder_layers else 2)} distances have a bucket each, which must be "
        "1 or more, and fewer than pe_max_distance",
    ),
    lambda encoder_layers, seq_warmup: unless(
        encoder_layers == 0 or not seq_warmup,
        f"seq_warmup has stages of a decoder alone, and encoder_layers is {encoder_layers}; leave "
        "seq_warmup out",
    ),
)
