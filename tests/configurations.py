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
    for pe, keys in {"fixed": {"pe_offset"}, "t5": {"pe_buckets", "pe_max_distance"}}.items():
        if kept.get("pe") != pe:
            kept = {key: value for key, value in kept.items() if key not in keys}
    stretching = {"pe_scaling", "pe_scaling_factors"}  # neither goes without the other
    if not stretching <= kept.keys():
        kept = {key: value for key, value in kept.items() if key not in stretching}
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
                {
                    "pe": "rotary-half",
                    "pe_scaling": "linear",
                    "pe_scaling_factors": {"factor": 2.5},
                },
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
