#!/usr/bin/env python3
"""Sample text from a checkpoint on this host's devices.

    python device_sample.py --config configs/quickstart.json --prompt "def "

Prints the prompt and, as it comes, the text that follows; on a line of its own if an encoder reads
the prompt. Without --prompt every line of standard input is a prompt; a terminal is asked for them.
--model takes a checkpoint of any format; one of mesh-transformer-jax or ZeRO-transformer needs
--config too. Runs may be training meanwhile.
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
    add("--config", help="configuration of the run to sample from")
    add("--model", metavar="PATH", help="any checkpoint; left out: the newest of --config's run")
    add("--prompt", help="continue this text and end")
    add("--max-new-tokens", type=int, metavar="N", help="half of seq, at most 256, if not given")
    add("--temp", type=float, default=0.75, help="0 is greedy; %(default)s if not given")
    add("--top-p", type=float, default=0.9, help="1 is off; %(default)s if not given")
    add("--top-k", type=int, default=0, help="0 is off; %(default)s if not given")
    add("--seed", type=int, default=0, help="%(default)s if not given")
    args = parser.parse_args()
    if not (args.config or args.model):
        parser.error("one of --config and --model is needed")
    try:
        sampling = Sampling(
            temperature=args.temp, top_k=args.top_k, top_p=args.top_p, seed=args.seed
        )
    except ValueError as error:
        parser.error(str(error))
    warnings.simplefilter("ignore", config.ConfigWarning)  # they concern training
    run = config.load(args.config) if args.config else None

    # These take seconds: mistakes above are told at once, and Ctrl-C below in one line.
    from mesh_transformer.serving import loading, text

    model = loading.load(args.model, run, max_new_tokens=args.max_new_tokens)
    for prompt in text.asked_prompts() if args.prompt is None else [args.prompt]:
        for piece in model.answered(prompt, sampling):
            print(piece, end="", flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
