#!/usr/bin/env python3
"""Train on many hosts, as a driver: of TPU VMs, of a Ray cluster, or of processes on this machine.

    python train.py --config configs/quickstart.json --hosts 2
    python train.py --config configs/gptj_6B_v3-8.json --tpu mesh --tpu_region europe-west4-a

The driver reads the data and keeps the log; the hosts hold the model. Run again, it goes on from
the newest checkpoint in `model_dir`, on the TPU VMs that are there. Lost hosts are replaced, and
Ctrl-C and SIGTERM save a checkpoint before they end it.
"""

from __future__ import annotations

import argparse

from mesh_transformer import config
from mesh_transformer.errors import UserError, run_command

GO_ON = "To go on from the newest checkpoint, run the same command again (without --new)."


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, help="JSON or YAML file of the run")
    add("--tune-model-path", metavar="PATH", help="begin with this checkpoint at step 0")
    add("--fresh-opt", action="store_true", help="take its weights, but not its Adam moments")
    add("--new", action="store_true", help="give up the checkpoints and metrics in model_dir")
    places = parser.add_mutually_exclusive_group(required=True)
    places.add_argument("--hosts", type=int, metavar="N", help="N host processes on this machine")
    places.add_argument("--address", help="a running Ray cluster; each machine takes one host")
    places.add_argument("--tpu", nargs="+", metavar="NAME", help="TPU slices; made if need be")
    add("--tpu_region", "--tpu-region", metavar="ZONE", help="where they are: europe-west4-a")
    add("--preemptible", action="store_true", help="make them spot ones")
    add("--delete-tpu-on-exit", action="store_true", help="delete them however this ends")
    args = parser.parse_args()
    if args.fresh_opt and not args.tune_model_path:
        parser.error("--fresh-opt says what to leave of --tune-model-path, which is not given")
    if args.hosts is not None and args.hosts < 1:
        parser.error("--hosts must be 1 or more")
    if bool(args.tpu) != bool(args.tpu_region):
        parser.error("--tpu NAME and --tpu_region ZONE belong together")
    if (args.preemptible or args.delete_tpu_on_exit) and not args.tpu:
        parser.error("--preemptible and --delete-tpu-on-exit are about --tpu, which is not given")
    return args


def main() -> int:
    args = parse()
    run = config.load(args.config)
    try:
        from mesh_transformer import driver
        from mesh_transformer.pod.machines import Pod
        from mesh_transformer.pod.slices import SlicePod
    except ModuleNotFoundError as error:
        raise UserError(f'{error}: pip install -e ".[pods]" -c constraints.txt') from error
    pod: driver.Places = Pod(n_local=args.hosts, address=args.address)
    if args.tpu:
        how = {"spot": args.preemptible, "delete_on_exit": args.delete_tpu_on_exit}
        pod = SlicePod(args.tpu, args.tpu_region, run, also_read=args.tune_model_path, **how)
    tuned = args.tune_model_path
    done = driver.train(run, pod, new=args.new, tune_model_path=tuned, fresh_opt=args.fresh_opt)
    print(done.told(run, args.config, GO_ON))
    return done.status


if __name__ == "__main__":
    run_command(main, when_interrupted=GO_ON)
