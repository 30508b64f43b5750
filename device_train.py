#!/usr/bin/env python3
"""Train on this host's devices: a TPU VM, a GPU box, or a CPU.

    python device_train.py --config configs/quickstart.json

Run again, the same command goes on from the newest checkpoint in `model_dir`, where metrics.jsonl
is kept too. Ctrl-C and SIGTERM save a checkpoint first.
"""

from __future__ import annotations

import argparse
import logging

from mesh_transformer import config
from mesh_transformer.errors import run_command

GO_ON = "To go on from the newest checkpoint, run the same command again (without --new)."


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, help="JSON or YAML file of the run")
    add("--tune-model-path", metavar="PATH", help="begin with this checkpoint at step 0")
    add("--fresh-opt", action="store_true", help="take its weights, but not its Adam moments")
    add("--new", action="store_true", help="give up the checkpoints and metrics in model_dir")
    args = parser.parse_args()
    if args.fresh_opt and not args.tune_model_path:
        parser.error("--fresh-opt says what to leave of --tune-model-path, which is not given")
    run = config.load(args.config)

    # These take seconds: mistakes above are told at once, and Ctrl-C below in one line.
    from mesh_transformer.checkpoints.native import Checkpoints
    from mesh_transformer.pod.devices import host_devices
    from mesh_transformer.pod.worker import Worker
    from mesh_transformer.training import loop

    loop.check_tasks(run)
    devices = host_devices(run)
    n_devices, kind = len(devices), devices[0].device_kind
    data = loop.Data(run, n_devices)
    root, keep_n, keep_every = run.checkpoint.root, run.checkpoint.keep_n, run.checkpoint.keep_every
    with (
        loop.StopSignals() as signals,
        Checkpoints(root, keep_n=keep_n, keep_every=keep_every) as checkpoints,
    ):
        worker = Worker(run, devices, checkpoints)
        loop.announce(run, worker.n_parameters, n_devices, kind)
        if args.tune_model_path and (args.new or checkpoints.latest() is None):
            worker.tune_from(args.tune_model_path, fresh_opt=args.fresh_opt)
        elif args.tune_model_path:
            logging.warning("%s goes on as it is; --new starts over from --tune-model-path", root)
        if args.new:  # only now, when nothing that the new run needs was found missing
            checkpoints.clear()
        done = loop.train(worker, run, data, signals, n_devices=n_devices, device_kind=kind)
    print(done.told(run, args.config, GO_ON))
    return done.status


if __name__ == "__main__":
    run_command(main, when_interrupted=GO_ON)
