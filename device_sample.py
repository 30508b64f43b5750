#!/usr/bin/env python3
"""Sample text from a checkpoint on this host's devices.

    python device_sample.py --config configs/quickstart.json --prompt "def "

Prints the prompt and, as it comes, the text that follows. Without --prompt every line of standard
input is a prompt; a terminal is asked for them. --model takes a run's folder (model_dir) or a step
folder in it instead of a configuration. The run may be training meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings

from mesh_transformer import config
from mesh_transformer.errors import run_command
from mesh_transformer.session import Sampling


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", help="configuration of the run to sample from")
    model.add_argument("--model", metavar="PATH", help="a run's folder, or a step folder in it")
    add = parser.add_argument
    add("--prompt", help="continue this text and end")
    add("--max-new-tokens", type=int, metavar="N", help="half of seq, at most 256, if not given")
    add("--temp", type=float, default=0.75, help="0 is greedy; %(default)s if not given")
    add("--top-p", type=float, default=0.9, help="1 is off; %(default)s if not given")
    add("--top-k", type=int, default=0, help="0 is off; %(default)s if not given")
    add("--seed", type=int, default=0, help="%(default)s if not given")
    args = parser.parse_args()
    try:
        sampling = Sampling(
            temperature=args.temp, top_k=args.top_k, top_p=args.top_p, seed=args.seed
        )
    except ValueError as error:
        parser.error(str(error))
    warnings.simplefilter("ignore", config.ConfigWarning)  # they concern training
    run = config.load(args.config) if args.config else None

    # These take seconds: mistakes above are told at once, and Ctrl-C below in one line.
    from mesh_transformer.data import tokenizer
    from mesh_transformer.pod.devices import one_replica
    from mesh_transformer.pod.worker import Worker, stored_config
    from mesh_transformer.serving import text

    run = run or stored_config(args.model)
    seq = run.model.seq
    length = {"max_new_tokens": text.checked_length(args.max_new_tokens, seq), "seq": seq}
    tokens = tokenizer.load(run.data.tokenizer)
    sampling = dataclasses.replace(sampling, stop_ids=(tokens.eot_id,))
    run, devices = one_replica(text.for_tokenizer(run, tokens))
    worker = Worker(run, devices)
    worker.load_weights(args.model or run.checkpoint.root)
    for prompt in text.asked_prompts() if args.prompt is None else [args.prompt]:
        print(prompt, end="", flush=True)
        for piece in text.continuation(worker, tokens, prompt, sampling, **length):
            print(piece, end="", flush=True)
        print(flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
