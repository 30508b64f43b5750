"""What the keys of a configuration must satisfy together, as tables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from mesh_transformer import network_rules
from mesh_transformer.relations import Rule, divisors, next_multiple, unless

# By generation: what a TPU VM runs for JAX (cloud.google.com/tpu/docs/runtimes), and the devices
# that JAX sees for each unit that an accelerator type counts. v4 and v5p count cores, of which two
# are one device.
RUNTIMES = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
CORES_PER_DEVICE = {"v4": 2, "v5p": 2}

HINTS = {
    "val_every": 'to train without validation write "val_set": {} and leave val_every out',
    "ckpt_every": "to save only the last step, write total_steps",
    "keep_every": "to keep only the newest, write a multiple of ckpt_every beyond total_steps",
    "tpu_size": "to use every device, leave it out",
    "bucket": "to write elsewhere than to a bucket, leave it out",
}
RETIRED = {
    "bf16_optimizer": "master weights and optimizer state are always float32",
    "early_cast": "master weights are always float32; compute_dtype says what they are cast to",
    "early_collect": "zero_stage says whether weights are gathered layer by layer",
    "eval_only": "the command says whether anything is trained",
    "gen_length": "the sampling command says how many tokens to generate",
    "optimizer": "the optimizer follows from lr, end_lr, warmup_steps, anneal_steps, weight_decay",
    "sampler": "the sampling command takes temperature, top-k and top-p",
    "transformer": "there is one model, which the other keys describe",
    "transformer_version": "there is one model, which the other keys describe",
}


def _tpu_runtime(tpu_type: str) -> str:
    generation = tpu_type.partition("-")[0]
    if generation not in RUNTIMES:
        raise ValueError(
            f"tpu_runtime of tpu_type {tpu_type!r} is not known here; set it to one that `gcloud "
            "compute tpus tpu-vm versions list` shows"
        )
    return RUNTIMES[generation]


def devices_of(tpu_type: str) -> int:
    """Devices that JAX sees in a whole slice: 32 in a v3-32, 16 in a v4-32."""
    generation, _, size = tpu_type.partition("-")
    return max(1, int(size) // CORES_PER_DEVICE.get(generation, 1))


DERIVED: dict[str, Callable[..., Any]] = network_rules.DERIVED | {
    "tpu_type": lambda tpu_size: f"v3-{tpu_size}",
    "tpu_runtime": _tpu_runtime,
}


IMPOSSIBLE: tuple[Rule, ...] = (
    *network_rules.IMPOSSIBLE,
    lambda tpu_size, cores_per_replica: unless(
        tpu_size % cores_per_replica == 0,
        f"cores_per_replica {cores_per_replica} does not divide tpu_size {tpu_size}; "
        f"{divisors(tpu_size)} would",
    ),
    lambda seq_warmup, seq: unless(
        all(a < b for a, b in itertools.pairwise([*(length for _, length in seq_warmup), seq])),
        f"seq_warmup has stages of {', '.join(str(length) for _, length in seq_warmup)} tokens, "
        f"which must grow, up to seq {seq}",
    ),
    lambda seq_warmup, attention: unless(
        attention in ("auto", "xla") or all(length % 128 == 0 for _, length in seq_warmup),
        f"attention {attention!r} takes multiples of 128 tokens, and seq_warmup has stages of "
        f"{', '.join(str(length) for _, length in seq_warmup)}; change them or set attention to "
        "'auto'",
    ),
    lambda end_lr, lr: unless(
        end_lr <= lr,
        f"end_lr {end_lr} is above lr {lr}, from which it is annealed; lower it to {lr} or less",
    ),
    lambda keep_every, ckpt_every: unless(
        keep_every % ckpt_every == 0 or ckpt_every % keep_every == 0,
        f"keep_every {keep_every} is not a multiple of ckpt_every {ckpt_every}, so only "
        f"multiples of {math.lcm(keep_every, ckpt_every)} would be kept; the next multiple is "
        f"{next_multiple(keep_every, ckpt_every)}",
    ),
    lambda bucket: unless(
        "/" not in bucket,
        f"bucket {bucket!r} is not a bare name; write the name without gs://, and folders in "
        "model_dir",
    ),
    lambda bucket, model_dir: unless(
        not model_dir.startswith("/") and "://" not in model_dir,
        f"model_dir {model_dir!r} cannot lie in bucket {bucket!r}; leave bucket out, or make "
        "model_dir a folder name",
    ),
    lambda pod_step_seconds, pod_start_seconds: unless(
        pod_step_seconds <= pod_start_seconds,
        f"pod_start_seconds {pod_start_seconds} is less than pod_step_seconds {pod_step_seconds}, "
        "although the first step is compiled and taken within it; raise it to "
        f"{pod_step_seconds} or more",
    ),
    lambda tpu_type: unless(
        not tpu_type.startswith("v5e-"),
        f"tpu_type {tpu_type!r} has another name in Google Cloud; write "
        f"{tpu_type.replace('v5e', 'v5litepod')!r}",
    ),
)
DOUBTFUL: tuple[Rule, ...] = (
    *network_rules.DOUBTFUL,
    lambda seq_warmup, total_steps, seq: unless(
        not seq_warmup or sum(steps for steps, _ in seq_warmup) < total_steps,
        f"seq_warmup has {sum(steps for steps, _ in seq_warmup)} steps, and total_steps is "
        f"{total_steps}, so that no step trains on seq {seq}",
    ),
    lambda warmup_steps, anneal_steps, total_steps, end_lr: unless(
        warmup_steps + anneal_steps <= total_steps,
        f"warmup_steps {warmup_steps} + anneal_steps {anneal_steps} is more than total_steps "
        f"{total_steps}, so the learning rate never reaches end_lr {end_lr}",
    ),
    lambda val_set, val_batches: unless(
        not val_set or val_batches > 0,
        "val_batches is 0, so nothing is validated although val_set is given",
    ),
    lambda val_set, val_batches: unless(
        bool(val_set) or val_batches == 0,
        f"val_set is empty, so nothing is validated although val_batches is {val_batches}",
    ),
    lambda tpu_type, tpu_size: unless(
        tpu_size % devices_of(tpu_type) == 0,
        f"tpu_size {tpu_size} is no multiple of the {devices_of(tpu_type)} devices of a "
        f"{tpu_type}, so that no number of such slices is a whole run",
    ),
)
