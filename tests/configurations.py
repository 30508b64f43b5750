"""Configurations that tests of the configuration share."""

from __future__ import annotations

import pathlib

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
