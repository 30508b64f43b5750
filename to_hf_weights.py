#!/usr/bin/env python3
"""Turn a checkpoint of mesh-transformer-jax into a Hugging Face folder.

    python to_hf_weights.py --input-ckpt step_383500/ --config configs/6B_roto_256.json \\
        --output-path gpt-j-6B --dtype fp16

resharding_example.py --format hf does the same for any checkpoint. Weights are written as
safetensors, beside the model's configuration and the tokenizer's files.
"""

from __future__ import annotations

import argparse
import warnings

from mesh_transformer import config
from mesh_transformer.errors import run_command

DTYPES = {"fp16": "float16", "fp32": "float32", "bf16": "bfloat16"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input-ckpt", required=True, metavar="PATH", help="the checkpoint's step folder")
    add("--config", required=True, help="configuration of the run that wrote it")
    add("--output-path", required=True, metavar="PATH", help="folder to write")
    add("--dtype", choices=DTYPES, default="fp16", help="%(default)s if not given")
    add("--cpu", action="store_true", help="no difference: no accelerator is used in any case")
    add("--debug", action="store_true", help="no difference: every array is checked in any case")
    add("--overwrite", action="store_true", help="replace what is there, once all is done")
    args = parser.parse_args()
    warnings.simplefilter("ignore", config.ConfigWarning)  # they concern training
    run = config.load(args.config)

    from mesh_transformer import resharding  # takes seconds: mistakes above are told at once
    from mesh_transformer.checkpoints.conversion import Conversion

    _, source, run = resharding.open_checkpoint(args.input_ckpt, run)
    what = Conversion(format="hf", dtype=DTYPES[args.dtype])
    resharding.write(source, run, args.output_path, what, overwrite=args.overwrite)
    return 0


if __name__ == "__main__":
    run_command(main)
