#!/usr/bin/env python3
"""Turn a checkpoint into another format or another number of shards, in little memory.

    python resharding_example.py --config configs/6B_roto_256.json --input step_383500/ \\
        --output gpt-j-hf --format hf

--input takes a run or a step of this library or of mesh-transformer-jax, a Hugging Face folder, or
what JAXSeq, ZeRO-transformer, Cerebras or llama.cpp (GGUF) has written, on a local disk or, mostly,
in a bucket. --verify compares a checkpoint's checksums; --prompt loads it onto the devices there
are, whatever its shards, and samples from it.
"""

from __future__ import annotations

import argparse
import warnings

from mesh_transformer import config
from mesh_transformer.errors import run_command
from mesh_transformer.session import Sampling


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", required=True, nargs="+", metavar="PATH", help="to read; of several, their mean")
    add("--config", help="of the run that wrote it; mesh-transformer-jax's hold none")
    add("--output", metavar="PATH", help="folder to write, of one checkpoint; of a run for native")
    formats = ("native", "original", "slim", "hf", "jaxseq", "zero", "zero-torch", "cerebras")
    add("--format", choices=formats, default="original", help="slim: weights alone; %(default)s")
    add("--shards", type=int, default=1, metavar="N", help="of original and slim; %(default)s")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights; as they are")
    add("--n-vocab", type=int, metavar="N", help="rows of the vocabulary, padded or cut")
    add("--layers", type=int, metavar="N", help="of a deeper model to begin, by repeating layers")
    add("--file-gb", type=float, default=5.0, metavar="GB", help="of hf's files; %(default)s")
    add("--overwrite", action="store_true", help="replace what is at --output, once all is done")
    add("--verify", action="store_true", help="read everything; compare a checkpoint's checksums")
    add("--prompt", help="load the model and continue this text")
    args = parser.parse_args()
    if not (args.output or args.verify or args.prompt):
        parser.error("say what to do: --output PATH, --verify or --prompt TEXT")
    if (args.layers and not args.output) or (args.prompt and (args.layers or args.input[1:])):
        parser.error("--layers needs --output, and --prompt samples from one --input as it is")
    warnings.simplefilter("ignore", config.ConfigWarning)  # they concern training
    run = config.load(args.config) if args.config else None

    from mesh_transformer import resharding  # takes seconds: mistakes above are told at once
    from mesh_transformer.checkpoints.conversion import Conversion
    from mesh_transformer.serving import loading

    opened = [resharding.open_checkpoint(path, run) for path in args.input]
    for found, source, _ in opened if args.verify else ():
        resharding.verify(found, source)
    if args.output:
        source, run = resharding.combined(opened, args.output, args.layers)
        keys = {"n_shards": args.shards, "n_vocab": args.n_vocab, "file_gb": args.file_gb}
        what = Conversion(format=args.format, dtype=args.dtype, **keys)
        resharding.write(source, run, args.output, what, overwrite=args.overwrite)
    if args.prompt:
        model = loading.load(args.input[0], run)
        for piece in model.answered(args.prompt, Sampling(temperature=0.75, top_p=0.9)):
            print(piece, end="", flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
