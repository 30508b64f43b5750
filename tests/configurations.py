"""Configurations that tests of the configuration share."""

from __future__ import annotations

import pathlib
import random

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.json"))

MINIMAL = {
    "layers": 2,
    "d_model": 64,
    "n_heads": 4,
    "n_vocab": 512,
    "seq": 32,
    "per_replica_batch": 1,
    "warmup_steps": 2,
    "anneal_steps": 8,
    "lr": 1e-3,
    "end_lr": 1e-4,
    "weight_decay": 0.1,
    "total_steps": 10,
    "train_set": "data/train.index",
    "model_dir": "runs/test",
    "ckpt_every": 5,
    "keep_every": 10,
    "name": "test",
}
"""Every key that has no default."""

WITH_ENCODER = {"encoder_layers": 2, "residual": "sequential", "pe": "t5"}

BASE = {"mup_base_d_model": 32, "mup_base_d_ff": 128, "mup_base_d_head": 8}
"""Of which the minimal configuration is twice as wide."""

OF_THE_MODEL: list[tuple[dict, str]] = [
    (
        {"pe_rotary_dims": 18},
        "pe_rotary_dims 18 must be an even number from 2 to d_head 16, since rotary positions turn "
        "pairs of features within a head",
    ),
    (
        {"pe_rotary_dims": 5},
        "pe_rotary_dims 5 must be an even number from 2 to d_head 16, since rotary positions turn "
        "pairs of features within a head",
    ),
    (
        {"pe_rotary_dims": 0},
        "pe_rotary_dims 0 must be an even number from 2 to d_head 16, since rotary positions turn "
        "pairs of features within a head",
    ),
    (
        {"n_kv_heads": 3},
        "n_kv_heads 3 does not divide n_heads 4, so query heads cannot share them evenly; "
        "1, 2, 4 would",
    ),
    (
        {"n_kv_heads": 1, "d_head": 2, "cores_per_replica": 4, "pe_rotary_dims": 2},
        "cores_per_replica 4 does not divide the 2 features of keys (n_kv_heads 1 of d_head 2); "
        "1, 2 would",
    ),
    (
        {"d_embed": 3, "tpu_size": 2},
        "zero_stage 1 cannot spread d_embed 3 over 2 replicas; set zero_stage to 0 or change "
        "d_embed",
    ),
    (
        {"pe_scaling": "llama3", "pe_scaling_factors": {"factor": 8.0}},
        "pe_scaling 'llama3' needs pe_scaling_factors with factor, low_freq_factor, "
        "high_freq_factor, original_max_position_embeddings",
    ),
    (
        {"residual": "post-norm"},
        "residual 'post-norm' ends with a norm, so that final_norm must be false",
    ),
    (
        {"encoder_layers": 2, "residual": "sequential", "window": 3},
        "encoder_layers 2 needs pe 't5', not 'rotary'; window 0, not 3",
    ),
    (
        {**WITH_ENCODER, "attention": "splash"},
        "encoder_layers 2 needs attention 'auto' or 'xla', not 'splash'",
    ),
    (
        {"encoder_layers": 2, "pe": "t5"},
        "encoder_layers 2 needs residual 'sequential', not 'parallel'",
    ),
    (
        {**WITH_ENCODER, "dropout_embedding": 0.1, "dropout_attention": 0.2},
        "encoder_layers 2 needs dropout_embedding 0.0, not 0.1; dropout_attention 0.0, not 0.2",
    ),
    (
        {**WITH_ENCODER, "dropout_residual": 0.1, "head_qk_trick": True},
        "encoder_layers 2 needs dropout_residual 0.0, not 0.1; head_qk_trick false, not true",
    ),
    (
        {**WITH_ENCODER, "residual": "parallel", "use_static_sgu": True},
        "encoder_layers 2 needs residual 'sequential', not 'parallel'; use_static_sgu false, not "
        "true",
    ),
    (
        WITH_ENCODER | BASE,
        "encoder_layers 2 needs mup_base_d_model 0, not 32",
    ),
    (
        {"encoder_seq": 9},
        "encoder_seq 9 and pad_id 0 are of an encoder, and encoder_layers is 0; set "
        "encoder_layers, or leave them out",
    ),
    (
        {"pad_id": 1},
        "encoder_seq 0 and pad_id 1 are of an encoder, and encoder_layers is 0; set "
        "encoder_layers, or leave them out",
    ),
    (
        {**WITH_ENCODER, "encoder_seq": 0},
        "encoder_layers 2 needs an encoder_seq of 1 or more",
    ),
    (
        {**WITH_ENCODER, "pad_id": 512},
        "pad_id 512 is no token of n_vocab 512; lower it to 511 or less",
    ),
    (
        {"pe": "t5", "pe_buckets": 40, "pe_max_distance": 20},
        "pe_buckets 40 with pe_max_distance 20: the first 20 distances have a bucket each, which "
        "must be 1 or more, and fewer than pe_max_distance",
    ),
    (
        {**WITH_ENCODER, "pe_buckets": 3},
        "pe_buckets 3 with pe_max_distance 128: the first 0 distances have a bucket each, which "
        "must be 1 or more, and fewer than pe_max_distance",
    ),
    (
        {"window": 8, "attention": "splash"},
        "attention 'splash' sees all slots before a query, not a window of 8; set attention to "
        "'auto' or 'xla'",
    ),
    (
        {"window_every": 2},
        "window_every 2 has no effect without a window; set window or leave window_every out",
    ),
    (
        {"pe_offset": 2},
        "pe_offset 2 is of the table that pe 'fixed' has, and pe is 'rotary'; leave pe_offset out",
    ),
    (
        {"pe": "none", "pe_theta": 5e5},
        "pe_theta 500000.0 is of rotary positions, and pe is 'none'; leave pe_theta out",
    ),
    (
        {"pe": "alibi", "pe_scaling": "linear", "pe_scaling_factors": {"factor": 2.0}},
        "pe_scaling 'linear' is of rotary positions, and pe is 'alibi'; leave pe_scaling out",
    ),
    (
        {"dropout_attention": 0.1, "attention": "splash"},
        "attention 'splash' drops no weights, and dropout_attention is 0.1; set attention to "
        "'auto' or 'xla'",
    ),
    (
        {"use_static_sgu": True, "residual": "sequential"},
        "use_static_sgu splits what a parallel block reads, and residual is 'sequential'; set "
        "residual to 'parallel'",
    ),
    (
        {"use_static_sgu": True, "n_heads": 64},
        "n_heads 64 does not divide half of d_model 64, which attention is of beside "
        "use_static_sgu; change one of them or set d_head",
    ),
    (
        {"use_static_sgu": True, "tpu_size": 64},
        "use_static_sgu halves d_model 64, and zero_stage 1 spreads halves over 64 replica(s), "
        "which do not divide them; change d_model",
    ),
    (
        {"mup_base_d_model": 32, "mup_base_d_head": 8},
        "mup_base_d_model and mup_base_d_head without mup_base_d_ff: muP needs all three sizes of "
        "the base; give them or none",
    ),
    (
        BASE | {"attention_scale": 0.25},
        "attention_scale 0.25 is not what muP makes it, mup_attention_alpha sqrt(mup_base_d_head) "
        "/ d_head = 0.1767766952966369; leave it out and set mup_attention_alpha",
    ),
    (
        BASE | {"output_scale": 1.0},
        "output_scale 1.0 is not what muP makes it, mup_output_alpha mup_base_d_model / d_model = "
        "0.5; leave it out and set mup_output_alpha",
    ),
    (
        {"mup_attention_alpha": 4.0},
        "mup_attention_alpha 4.0 is of muP, and there is no mup_base_d_model; give one, or set "
        "attention_scale",
    ),
    (
        {"mup_output_alpha": 2.22},
        "mup_output_alpha 2.22 is of muP, and there is no mup_base_d_model; give one, or set "
        "output_scale",
    ),
    (
        BASE | {"norm": "rmsnorm"},
        "norm 'rmsnorm' has a scale that is as large as the root of d_model, which muP keeps from "
        "growing; set norm to 'layernorm' or 'rmsnorm-mean', or leave the mup keys out",
    ),
    (
        BASE | {"head_qk_trick": True},
        "head_qk_trick has as many features at any d_model, and muP has no rule for them; leave it "
        "out, or the mup keys",
    ),
    (
        BASE | {"d_embed": 32},
        "d_embed 32 is not d_model 64, and muP has no rule for what projects one to the other; "
        "leave d_embed out, or the mup keys",
    ),
    (
        BASE | {"original_shards": 8},
        "original_shards 8 cannot be followed: attention_scale is 0.1767766952966369, 0.25 in "
        "mesh-transformer-jax; output_scale is 0.5, 1.0 in mesh-transformer-jax; mup_base_d_model "
        "is 32, 0 in mesh-transformer-jax; leave original_shards out",
    ),
]
"""What is impossible in a network, and the sentences that say so."""

OF_LENGTHS: list[tuple[dict, str]] = [
    (
        {"seq_warmup": [[2, 16], [2, 8]]},
        "seq_warmup has stages of 16, 8 tokens, which must grow, up to seq 32",
    ),
    (
        {"seq_warmup": [[2, 16], [2, 32]]},
        "seq_warmup has stages of 16, 32 tokens, which must grow, up to seq 32",
    ),
    (
        {"seq_warmup": [[2, 128], [2, 200]], "seq": 256, "attention": "splash"},
        "attention 'splash' takes multiples of 128 tokens, and seq_warmup has stages of 128, 200; "
        "change them or set attention to 'auto'",
    ),
    (
        {**WITH_ENCODER, "seq_warmup": [[2, 16]]},
        "seq_warmup has stages of a decoder alone, and encoder_layers is 2; leave seq_warmup out",
    ),
]
"""And in stages of `seq_warmup`."""

DOUBTS_OF_LENGTHS: list[tuple[dict, str]] = [
    (
        {"seq_warmup": [[4, 8], [6, 16]]},
        "seq_warmup has 10 steps, and total_steps is 10, so that no step trains on seq 32",
    ),
]
"""What stages of `seq_warmup` may not be meant."""


def random_flat(rng: random.Random) -> dict:
    """A valid configuration in random order, where every optional key may be left out."""
    cores, head = rng.choice([1, 2, 4]), 2 * rng.randint(1, 16)
    heads, replicas = cores * rng.randint(1, 3), rng.choice([1, 2, 4])
    vocab, d_model, ckpt = cores * rng.randint(2, 300), 4 * heads * head, rng.randint(1, 50)
    lr = 10 ** rng.uniform(-6, 0)
    required = {
        "layers": rng.randint(1, 99),
        "d_model": d_model,
        "n_heads": heads,
        "n_vocab": vocab,
        "seq": rng.randint(2, 4096),
        "per_replica_batch": rng.randint(1, 64),
        "cores_per_replica": cores,
        "warmup_steps": rng.randint(0, 99),
        "anneal_steps": rng.randint(0, 99),
        "lr": rng.choice([lr, 1]),
        "end_lr": lr * rng.random(),
        "weight_decay": rng.choice([0, 0.1]),
        "total_steps": rng.randint(1, 10**6),
        "train_set": "data/päth with space.index",
        "model_dir": rng.choice(["a", "a/b"]),
        "ckpt_every": ckpt,
        "keep_every": ckpt * rng.randint(1, 5),
        "name": rng.choice(["n", "näme\n2"]),
    }
    optional = random_options(rng, cores=cores, replicas=replicas, vocab=vocab, head=head)
    if rng.random() < 0.5:
        optional |= random_architecture(rng, heads=heads) | {"original_shards": 0}
    if rng.random() < 0.2:
        return random_mup(rng, required)
    kept = {key: value for key, value in optional.items() if rng.random() < 0.5}
    if kept.get("original_shards"):  # the original has no widths of its own
        kept = {key: value for key, value in kept.items() if key not in ("d_head", "d_ff")}
    if kept.get("pe") != "fixed":
        kept.pop("pe_offset", None)
    flat = list((required | kept).items())
    rng.shuffle(flat)
    return dict(flat)


def random_architecture(rng: random.Random, *, heads: int) -> dict:
    return {
        "residual": rng.choice(["parallel", "parallel-untied", "sequential"]),
        "final_norm": rng.random() < 0.5,
        "norm_epsilon": 1e-6,
        **rng.choice(
            [
                {"pe": "rotary", "pe_theta": 5e5, "pe_scaling": "none"},
                {"pe": "rotary-half", "pe_scaling": "none", "pe_scaling_factors": {"factor": 2.5}},
                {"pe": "fixed", "pe_offset": rng.randint(0, 2)},
                {"pe": "t5", "pe_buckets": 64, "pe_max_distance": 256},
            ]
        ),
        **{"encoder_layers": 0, "encoder_seq": 0, "pad_id": 0},
        "n_kv_heads": heads,
        **rng.choice([{"window": 4096}, {"window": 0, "window_every": 1}]),
        "attention_scale": 0.5,
        "qk_norm": rng.random() < 0.5,
        "activation": rng.choice(["gelu", "silu"]),
        **{key: rng.random() < 0.5 for key in ("gated", "qkv_bias", "o_bias", "ff_bias")},
        **{key: rng.random() < 0.5 for key in ("embed_bias", "head_bias", "embed_norm")},
        "tie_embeddings": rng.random() < 0.5,
        "use_static_sgu": False,
        "head_qk_trick": rng.random() < 0.5,
        "embed_scale": 2.0,
        "output_scale": 0.25,
        "d_embed": 8,
    }


def random_mup(rng: random.Random, required: dict) -> dict:
    return required | {
        **{"mup_base_d_model": 64, "mup_base_d_ff": 200, "mup_base_d_head": rng.randint(1, 64)},
        **{"mup_attention_alpha": 4.0, "mup_output_alpha": rng.uniform(0.1, 9)},
    }


def random_options(rng: random.Random, *, cores: int, replicas: int, vocab: int, head: int) -> dict:
    return {
        "norm": rng.choice(["layernorm", "layernorm-nobias", "rmsnorm-bias", "scalenorm"]),
        "pe": rng.choice(["rotary", "t5", "fixed", "none"]),
        "pe_rotary_dims": 2,
        "d_head": head,
        "d_ff": cores * rng.randint(1, 999),
        "n_tokens": rng.randint(1, vocab),
        "compute_dtype": rng.choice(["bfloat16", "float32"]),
        "remat": rng.choice(["full", "dots", "none"]),
        "unroll": rng.choice([1, 2]),
        "attention": rng.choice(["auto", "xla", "splash"]),
        "z_loss": rng.choice([0, 1e-4]),
        "dropout_embedding": rng.choice([0, 0.1]),
        "dropout_attention": 0,
        "dropout_residual": rng.choice([0, 0.1]),
        "original_shards": rng.choice([0, 8]),
        "original_cores": rng.randint(1, 9),
        "tpu_size": cores * replicas,
        "zero_stage": rng.randint(0, 3),
        "gradient_accumulation_steps": rng.randint(1, 64),
        "val_batch_multiplier": rng.randint(1, 4),
        "seq_warmup": [],
        "val_set": rng.choice([{}, {"a": "x"}, {"b": "y", "a": "x"}]),
        "tokenizer": rng.choice(["gpt2", "bytes", "org/name"]),
        "bucket": "bucket",
        "keep_n": rng.randint(1, 9),
        "val_batches": rng.randint(0, 9),
        "val_every": rng.randint(1, 999),
        "eval_harness_tasks": rng.choice([[], ["piqa"], ["piqa", "lambada"]]),
        "wandb_project": "project",
        "trackers": rng.choice([[], ["wandb"], ["wandb", "tensorboard"]]),
        "noise_scale_alpha": rng.choice([1, 0.5, 1e-9]),
        "stop_on_nan": rng.random() < 0.5,
        "comment": rng.choice(["", "more"]),
        "seed": rng.randint(0, 2**32 - 1),
        "pod_start_seconds": rng.randint(900, 9999),
        "pod_step_seconds": rng.randint(1, 900),
        "pod_heartbeat_seconds": rng.randint(1, 100),
        "pod_retries": rng.randint(0, 9),
        "tpu_type": rng.choice(["v2-8", "v3-32", "v4-64", "v5litepod-16", "v5p-8", "v6e-4"]),
        "tpu_runtime": "some-runtime",
        "tpu_project": "project",
        "tpu_network": "network",
        "tpu_subnetwork": "subnetwork",
        "tpu_external_ips": rng.random() < 0.5,
        "tpu_service_account": "host@project.iam.gserviceaccount.com",
        "tpu_driver_address": "10.1.2.3",
        "tpu_token_secret": "token",
        "tpu_labels": rng.choice([{}, {"team": "language", "a-b_1": ""}]),
        "tpu_queued": rng.random() < 0.5,
        "tpu_reserved": rng.random() < 0.5,
        "tpu_wait_minutes": rng.randint(1, 10**4),
    }
