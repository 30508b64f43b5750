#!/usr/bin/env python3
"""Make a checkpoint of GPT-J-6B's size as mesh-transformer-jax leaves it, full of random numbers.

    python benchmarks/make_gptj.py --output step_383500 --shards 8

Slim: bfloat16 weights without optimizer state, 12.1 GB. What is random is made once and repeated:
the numbers do not matter, only that no two shards or layers are alike.
"""

from __future__ import annotations

import argparse

import numpy as np

from mesh_transformer import config, progress
from mesh_transformer.checkpoints import conversion, original_writer, places
from mesh_transformer.checkpoints.fitting import model_arrays
from mesh_transformer.checkpoints.npz import BFLOAT16
from mesh_transformer.checkpoints.source import Array, Counts, Key

NOISE = (np.random.default_rng(0).integers(0, 2**7, 2**22) | 0x3C00).astype(np.uint16)


class Random:
    """A source of arrays between 0.008 and 0.03, or so."""

    where, about, step = "nowhere", "random numbers", 383500
    counts: Counts | None = None

    def __init__(self, model: config.ModelConfig) -> None:
        self.known: dict[str, object] = {}
        self.arrays = {key: Array(s, np.dtype(BFLOAT16)) for key, s in model_arrays(model).items()}

    def read(self, key: Key) -> np.ndarray:
        shape = self.arrays[key].shape
        shift = sum(key.path.encode()) * 131 + 7919 * ((key.layer or 0) + 1)
        return np.resize(np.roll(NOISE, shift), shape).view(BFLOAT16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/6B_roto_256.json")
    parser.add_argument("--output", required=True)
    parser.add_argument("--shards", type=int, default=8)
    args = parser.parse_args()
    run = config.load(args.config)
    source = Random(run.model)
    what = conversion.Conversion(format="slim", n_shards=args.shards)
    total = conversion.plan(source, what).n_bytes
    with (
        progress.stage("Making", total) as advance,
        places.becoming(args.output, total, overwrite=False) as folder,
    ):
        original_writer.write(
            folder,
            source,
            run.model,
            n_shards=args.shards,
            dtype=None,
            moments=False,
            advance=advance,
        )


if __name__ == "__main__":
    main()
