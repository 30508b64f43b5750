#!/usr/bin/env python3
"""Time the training step of a configuration on this host's devices; prints one JSON line.

    python benchmarks/train_step.py --config benchmarks/cpu_27M.json

Tokens are random. After `--warm-up` steps, `--steps` steps are timed one by one, each from host
tokens to finished metrics, and the median counts. Compilation is timed apart. Needs JAX, Haiku and
Optax, not the packages for data or clusters, nor that the project is installed (PYTHONPATH=. then).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from typing import Any

import jax
import numpy as np

from mesh_transformer import config, throughput
from mesh_transformer.pod.devices import host_devices
from mesh_transformer.sharding import make_mesh
from mesh_transformer.training.steps import make_steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps(measure(config.load(args.config), args.steps, args.warm_up)))


def measure(run: config.Config, n_steps: int, n_warm_up: int) -> dict[str, Any]:
    """Return tokens/s, step time, MFU, memory and compile time of a run's training step."""
    devices = host_devices(run)
    mp, n = run.mesh.cores_per_replica, len(devices)
    steps = make_steps(run, make_mesh(run.replicas(n), mp, devices))
    state = jax.block_until_ready(steps.init(jax.random.key(run.run.seed)))
    shape = (run.batch.gradient_accumulation_steps, run.global_batch(n), run.model.seq + 1)
    tokens = np.random.default_rng(0).integers(0, run.model.n_tokens, shape, dtype=np.int32)

    begin = time.perf_counter()
    compiled = steps.train.lower(state, tokens, None).compile()
    compile_seconds = time.perf_counter() - begin
    seconds = []
    for _ in range(n_warm_up + n_steps):
        begin = time.perf_counter()
        state, metrics = compiled(state, tokens, None)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - begin)
    step_seconds = statistics.median(seconds[n_warm_up:])
    tokens_per_second = run.tokens_per_step(n) / step_seconds
    peak = throughput.peak_flops_per_device(devices[0].device_kind)
    flops = throughput.train_flops_per_token(run.model)
    return {
        "config": run.run.name,
        "tokens_per_second": round(tokens_per_second, 1),
        "step_ms": round(step_seconds * 1e3, 2),
        "step_ms_min": round(min(seconds[n_warm_up:]) * 1e3, 2),
        "mfu": throughput.mfu(tokens_per_second, flops, None if peak is None else n * peak),
        "peak_flops_per_device": peak,
        "peak_memory_gib": round(peak_memory_bytes(devices[0]) / 2**30, 3),
        "compile_seconds": round(compile_seconds, 1),
        "loss": loss,
        "devices": f"{n} x {devices[0].device_kind}",
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def peak_memory_bytes(device: jax.Device) -> int:
    """Return the most memory one device held, or on CPU the most the process held."""
    statistics_of_device = device.memory_stats()
    if statistics_of_device is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return statistics_of_device["peak_bytes_in_use"]


if __name__ == "__main__":
    main()
