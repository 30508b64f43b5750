#!/usr/bin/env python3
"""Leave the optimizer out of a run's newest checkpoint, in mesh-transformer-jax's format.

    python slim_model.py --config configs/example_config.json

Writes MODEL_DIR_slim/step_N (with --f16 MODEL_DIR_slim_f16/step_N), of cores_per_replica shards, in
bfloat16 or float16. resharding_example.py --format slim does the same for any checkpoint.
"""

from __future__ import annotations

import argparse
import warnings

from mesh_transformer import config
from mesh_transformer.errors import run_command


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, help="configuration of the run")
    add("--ckpt-step", type=int, default=-1, metavar="N", help="step; the newest if not given")
    add("--f16", action="store_true", help="in float16 instead of bfloat16")
    add("--overwrite", action="store_true", help="replace what is there, once all is done")
    args = parser.parse_args()
    warnings.simplefilter("ignore", config.ConfigWarning)  # they concern training
    run = config.load(args.config)

    from mesh_transformer import resharding  # takes seconds: mistakes above are told at once
    from mesh_transformer.checkpoints.conversion import Conversion

    root = run.checkpoint.root
    path = root if args.ckpt_step < 0 else resharding.step_folder(root, args.ckpt_step)
    _, source, run = resharding.open_checkpoint(path, run)
    dtype, suffix = ("float16", "_slim_f16") if args.f16 else ("bfloat16", "_slim")
    what = Conversion(format="slim", n_shards=run.mesh.cores_per_replica, dtype=dtype)
    resharding.write(
        source, run, f"{root}{suffix}/step_{source.step}", what, overwrite=args.overwrite
    )
    return 0


if __name__ == "__main__":
    run_command(main)
