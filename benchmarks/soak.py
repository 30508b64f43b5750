#!/usr/bin/env python3
"""Kill processes of train.py at random while it trains; the run must end as one that lost nothing.

    python benchmarks/soak.py --steps 200 --every 20 --seed 0

Trains a small model on local hosts twice: undisturbed, then with a SIGKILL every `--every` seconds
or so, of a host or (one time in `--driver-odds`) of the driver, which is started again at once.
Compares weights, moments and log bit by bit, and prints what happened, last as one JSON line.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax

from mesh_transformer import metrics_file

ROOT = pathlib.Path(__file__).parent.parent
sys.path += [str(ROOT), str(ROOT / "tests")]

import hosts  # noqa: E402
import runs  # noqa: E402

KEYS = {
    **{"layers": 4, "d_model": 192, "per_replica_batch": 64, "zero_stage": 1},
    **{"val_every": 50, "ckpt_every": 10, "keep_every": 100, "pod_retries": 50},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--hosts", type=int, default=2)
    add("--steps", type=int, default=200)
    add("--every", type=float, default=20.0, help="seconds between kills, give or take half")
    add("--driver-odds", type=int, default=4, help="one kill in so many is of the driver")
    add("--seed", type=int, default=0)
    add("--limit", type=float, default=3600.0, help="seconds after which a run is given up")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.hosts)
    with tempfile.TemporaryDirectory() as folder:
        keys = KEYS | {"tpu_size": args.hosts, "total_steps": args.steps}
        whole = runs.make(pathlib.Path(folder), **keys, anneal_steps=args.steps)
        undisturbed = train(whole, args, disturbed=False)
        run = whole.but("disturbed")
        told = train(run, args, disturbed=True)
        told["undisturbed_seconds"] = undisturbed["seconds"]
        told["same_log"] = run.log() == whole.log()
        told["same_bits"] = all(
            mine.tobytes() == theirs.tobytes()
            for mine, theirs in zip(run.arrays(args.steps), whole.arrays(args.steps), strict=True)
        )
    print("\n".join(f"{name}: {value}" for name, value in told.items()))
    print(json.dumps(vars(args) | told))
    sys.exit(not (told["same_log"] and told["same_bits"]))


def train(run: runs.Run, args: argparse.Namespace, *, disturbed: bool) -> dict[str, Any]:
    """Run train.py until it ends well, killing what chance says; return what happened."""
    chance, kills = random.Random(args.seed), collections.Counter[str]()
    log = run.root.with_suffix(".log")
    command = ("train.py", "--config", str(run.config), "--hosts", str(args.hosts))
    begun, status = time.monotonic(), None
    with log.open("w") as output:
        process = run.start(*command, output=output)
        while status is None:
            wait = args.every * chance.uniform(0.5, 1.5) if disturbed else args.limit
            try:
                status = process.wait(timeout=wait)
                continue
            except subprocess.TimeoutExpired:
                if time.monotonic() - begun > args.limit:
                    process.kill()
                    sys.exit(f"not done after {args.limit:.0f} s; it wrote\n{log.read_text()}")
            victims = hosts.pids_below(process.pid)
            if chance.randrange(args.driver_odds) and victims:
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(chance.choice(victims), signal.SIGKILL)
                    kills["host"] += 1
            else:
                process.kill()
                process.wait()
                kills["driver"] += 1
                process = run.start(*command, output=output)
            print(f"{time.monotonic() - begun:.0f} s: {dict(kills)}", file=sys.stderr, flush=True)
    if status:
        sys.exit(f"train.py ended with status {status}; it wrote\n{log.read_text()}")
    return summary(run, log.read_text(), kills, time.monotonic() - begun)


def summary(
    run: runs.Run, told: str, kills: collections.Counter[str], seconds: float
) -> dict[str, Any]:
    """Say what happened; goodput is over all drivers: time of the steps kept by time of the run."""
    steps = [
        line["train/step_seconds"]
        for line in metrics_file.read(str(run.root))[1:]
        if "train/loss" in line
    ]
    kept = sum(step for step in steps if step is not None)
    again = [float(x) for x in re.findall(r"training again ([\d.]+) s after the loss", told)]
    return {
        "kills": dict(kills),
        "restarts": told.count("starting again from") + kills["driver"],
        "seconds": round(seconds, 1),
        "goodput": round(kept / seconds, 3),
        "median_recovery_seconds": statistics.median(again) if again else None,
    }


if __name__ == "__main__":
    main()
