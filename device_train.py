#!/usr/bin/env python3
"""Train on this host's devices: a TPU VM, a GPU box, or a CPU.

    python device_train.py --config configs/quickstart.json

Run again, the same command goes on from the newest checkpoint in `model_dir`. Checkpoints, the
configuration and metrics.jsonl are written there; `python -m mesh_transformer.plot MODEL_DIR` draws
the loss. Ctrl-C or SIGTERM saves a checkpoint first.
"""

from __future__ import annotations

import argparse
import logging

from mesh_transformer import config
from mesh_transformer.checkpoints.native import Checkpoints
from mesh_transformer.errors import run_command
from mesh_transformer.pod.worker import Worker, host_devices
from mesh_transformer.training import loop


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="JSON or YAML file of the run")
    parser.add_argument("--tune-model-path", help="start from the weights of this run or step")
    parser.add_argument(
        "--fresh-opt", action="store_true", help="with --tune-model-path: without its optimizer"
    )
    parser.add_argument("--new", action="store_true", help="give up what model_dir holds")
    args = parser.parse_args()
    if args.fresh_opt and not args.tune_model_path:
        parser.error("--fresh-opt says what to leave of --tune-model-path, which is not given")
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)

    run = config.load(args.config)
    devices = host_devices(run)
    with Checkpoints(
        run.checkpoint.root, keep_n=run.checkpoint.keep_n, keep_every=run.checkpoint.keep_every
    ) as checkpoints:
        worker = Worker(run, devices, checkpoints)
        loop.announce(run, worker.n_parameters, len(devices), devices[0].device_kind)
        if args.new:
            checkpoints.clear()
        if args.tune_model_path and checkpoints.latest() is None:
            worker.tune_from(args.tune_model_path, fresh_opt=args.fresh_opt)
        done = loop.train(worker, run, n_devices=len(devices), device_kind=devices[0].device_kind)
    if done.stopped_by is None:
        return 0
    print(f"Stopped at step {done.step}, which is saved; the same command goes on from there.")
    return 128 + done.stopped_by


if __name__ == "__main__":
    run_command(main)
