#!/usr/bin/env python3
"""Sample text from a checkpoint on this host's devices.

    python device_sample.py --config configs/quickstart.json --prompt "def "

Without --prompt it asks for prompts until end of input. --model takes a run's folder (model_dir) or
a step folder in it, instead of the configuration it was trained by.
"""

from __future__ import annotations

import argparse
import logging
import sys

from mesh_transformer import config
from mesh_transformer.data import tokenizer
from mesh_transformer.errors import run_command
from mesh_transformer.pod.worker import Worker, host_devices, stored_config
from mesh_transformer.serving import text
from mesh_transformer.session import Sampling


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", help="configuration of the run to sample from")
    model.add_argument("--model", metavar="PATH", help="a run's folder, or a step folder in it")
    parser.add_argument("--prompt", help="continue this text once; otherwise ask")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temp", type=float, default=0.75, help="0 is greedy (%(default)s)")
    parser.add_argument("--top-p", type=float, default=0.9, help="1 is off (%(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="0 is off (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)

    if args.config:
        run = config.load(args.config)
    else:
        run = config.parse(stored_config(args.model), source=args.model)
    path = args.model or run.checkpoint.root
    tokens = tokenizer.load(run.data.tokenizer)
    worker = Worker(run, host_devices(run))
    worker.load_weights(path)
    sampling = Sampling(
        temperature=args.temp,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop_ids=(tokens.eot_id,),
    )
    prompts = [args.prompt] if args.prompt is not None else text.asked_prompts()
    for prompt in prompts:
        pieces = text.continuation(
            worker, tokens, prompt, sampling, max_new_tokens=args.max_new_tokens, seq=run.model.seq
        )
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
