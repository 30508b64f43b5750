#!/usr/bin/env python3
"""Train on many hosts, as a driver: of TPU VMs, of a Ray cluster, or of processes on this machine.

    python train.py --config configs/quickstart.json --hosts 2

The driver reads the data and keeps the log; the hosts hold the model. Run again, the same command
goes on from the newest checkpoint in `model_dir`. A host that is lost is replaced and training goes
on from there by itself. Ctrl-C and SIGTERM save a checkpoint first.
"""

from __future__ import annotations

import argparse

from mesh_transformer import config
from mesh_transformer.errors import UserError, run_command

GO_ON = "To go on from the newest checkpoint, run the same command again (without --new)."


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, help="JSON or YAML file of the run")
    add("--tune-model-path", metavar="PATH", help="begin with this run (or step folder) at step 0")
    add("--fresh-opt", action="store_true", help="take its weights, but not its Adam moments")
    add("--new", action="store_true", help="give up the checkpoints and metrics in model_dir")
    places = parser.add_mutually_exclusive_group(required=True)
    places.add_argument("--hosts", type=int, metavar="N", help="N host processes on this machine")
    places.add_argument("--address", help="a running Ray cluster; each machine takes one host")
    args = parser.parse_args()
    if args.fresh_opt and not args.tune_model_path:
        parser.error("--fresh-opt says what to leave of --tune-model-path, which is not given")
    if args.hosts is not None and args.hosts < 1:
        parser.error("--hosts must be 1 or more")
    run = config.load(args.config)

    try:
        from mesh_transformer import driver
    except ModuleNotFoundError as error:
        raise UserError(f'{error}: pip install -e ".[pods]" -c constraints.txt') from error

    done = driver.train(
        run,
        n_local=args.hosts,
        address=args.address,
        new=args.new,
        tune_model_path=args.tune_model_path,
        fresh_opt=args.fresh_opt,
    )
    print(done.told(run, args.config, GO_ON))
    return done.status


if __name__ == "__main__":
    run_command(main, when_interrupted=GO_ON)
