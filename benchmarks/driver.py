#!/usr/bin/env python3
"""Time train.py's driver with one host against device_train.py, in turns; prints one JSON line.

    python benchmarks/driver.py --config configs/quickstart.json --steps 60 --rounds 3

Both train the configuration for `--steps` steps in folders of their own, without validation. The
speed of a run is that of its steps from the tenth on, as `metrics.jsonl` has them.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

from mesh_transformer import config

ROOT = pathlib.Path(__file__).parent.parent
COMMANDS = {"driver": ["train.py", "--hosts", "1"], "one_process": ["device_train.py"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    flat = config.load(args.config).to_flat() | {
        "total_steps": args.steps,
        "ckpt_every": args.steps,
        "keep_every": args.steps,
        "val_batches": 0,
    }
    speeds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.rounds):
        for name, command in COMMANDS.items():
            speeds[name].append(tokens_per_second(command, flat))
            print(f"{name}: {speeds[name][-1]:.1f} tokens/s", file=sys.stderr, flush=True)
    medians = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
    ratio = round(medians["driver"] / medians["one_process"], 3)
    print(json.dumps({"ratio": ratio, **medians, "rounds": speeds}))


def tokens_per_second(command: list[str], flat: dict[str, object]) -> float:
    """Train in a new folder, and return the median speed of the steps from the tenth on."""
    with tempfile.TemporaryDirectory() as folder:
        run, written = pathlib.Path(folder) / "run", pathlib.Path(folder) / "run.json"
        written.write_text(json.dumps(flat | {"model_dir": str(run)}))
        subprocess.run(
            [sys.executable, *command, "--config", str(written)],
            cwd=ROOT,
            check=True,
            stdout=sys.stderr,
        )
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return statistics.median(
            line["train/tokens_per_sec"] for line in lines if line["step"] >= 10
        )


if __name__ == "__main__":
    main()
