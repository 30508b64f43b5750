"""What the keys of a configuration must satisfy together, as tables.

Every rule names the keys that it relates as its parameters. That is how `config` knows when it can
run: when all of them are given and each is sound by itself.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Rule = Callable[..., str | None]


@functools.cache
def _parameters(rule: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    return tuple(inspect.signature(rule).parameters.values())


def apply(rule: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """Call `rule` with the keys that it names; None if one that it needs is absent."""
    if any(p.default is p.empty and p.name not in values for p in _parameters(rule)):
        return None
    return rule(**{p.name: values[p.name] for p in _parameters(rule) if p.name in values})


def broken(table: Iterable[Rule], values: Mapping[str, Any]) -> list[str]:
    """What the rules of a table have to say against `values`."""
    return [text for rule in table if (text := apply(rule, values)) is not None]


TOKENIZER_SIZES = {"gpt2": 50257, "bytes": 257}

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


def _d_head(d_model: int, n_heads: int) -> int:
    if d_model % n_heads:
        raise ValueError(
            f"n_heads {n_heads} does not divide d_model {d_model}; change one of them or set d_head"
        )
    return d_model // n_heads


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


def _unless(holds: bool, problem: str) -> str | None:
    return None if holds else problem


def divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _next_multiple(number: int, unit: int) -> int:
    return number + -number % unit


DERIVED: dict[str, Callable[..., Any]] = {
    "d_head": _d_head,
    "d_ff": lambda d_model: 4 * d_model,
    "pe_rotary_dims": lambda pe, d_head: d_head if pe == "rotary" else 0,
    "n_tokens": lambda n_vocab, tokenizer="": min(n_vocab, TOKENIZER_SIZES.get(tokenizer, n_vocab)),
    "tpu_type": lambda tpu_size: f"v3-{tpu_size}",
    "tpu_runtime": _tpu_runtime,
}


IMPOSSIBLE: tuple[Rule, ...] = (
    lambda n_heads, cores_per_replica: _unless(
        n_heads % cores_per_replica == 0,
        f"cores_per_replica {cores_per_replica} does not divide n_heads {n_heads}; "
        f"{divisors(n_heads)} would",
    ),
    lambda n_vocab, cores_per_replica: _unless(
        n_vocab % cores_per_replica == 0,
        f"cores_per_replica {cores_per_replica} does not divide n_vocab {n_vocab}; "
        f"the next n_vocab that it divides is {_next_multiple(n_vocab, cores_per_replica)}",
    ),
    lambda d_ff, cores_per_replica: _unless(
        d_ff % cores_per_replica == 0,
        f"cores_per_replica {cores_per_replica} does not divide d_ff {d_ff}; "
        f"the next d_ff that it divides is {_next_multiple(d_ff, cores_per_replica)}",
    ),
    lambda tpu_size, cores_per_replica: _unless(
        tpu_size % cores_per_replica == 0,
        f"cores_per_replica {cores_per_replica} does not divide tpu_size {tpu_size}; "
        f"{divisors(tpu_size)} would",
    ),
    lambda zero_stage, d_model, tpu_size, cores_per_replica: _unless(
        zero_stage == 0 or d_model % max(1, tpu_size // cores_per_replica) == 0,
        f"zero_stage {zero_stage} cannot spread d_model {d_model} over "
        f"{tpu_size // cores_per_replica} replicas ({tpu_size} devices / cores_per_replica "
        f"{cores_per_replica}), which do not divide it; set zero_stage to 0 or change d_model",
    ),
    lambda pe, pe_rotary_dims, d_head: _unless(
        pe != "rotary" or (2 <= pe_rotary_dims <= d_head and pe_rotary_dims % 2 == 0),
        f"pe_rotary_dims {pe_rotary_dims} must be an even number from 2 to d_head {d_head}, "
        "since rotary positions turn pairs of features within a head",
    ),
    lambda n_tokens, n_vocab: _unless(
        n_tokens <= n_vocab,
        f"n_tokens {n_tokens} is more than n_vocab {n_vocab}; raise n_vocab to {n_tokens} or more",
    ),
    lambda attention, compute_dtype: _unless(
        attention != "cudnn" or compute_dtype == "bfloat16",
        "attention 'cudnn' computes in 16 bits only; set compute_dtype to 'bfloat16' or attention "
        "to 'auto'",
    ),
    lambda end_lr, lr: _unless(
        end_lr <= lr,
        f"end_lr {end_lr} is above lr {lr}, from which it is annealed; lower it to {lr} or less",
    ),
    lambda keep_every, ckpt_every: _unless(
        keep_every % ckpt_every == 0 or ckpt_every % keep_every == 0,
        f"keep_every {keep_every} is not a multiple of ckpt_every {ckpt_every}, so only "
        f"multiples of {math.lcm(keep_every, ckpt_every)} would be kept; the next multiple is "
        f"{_next_multiple(keep_every, ckpt_every)}",
    ),
    lambda bucket: _unless(
        "/" not in bucket,
        f"bucket {bucket!r} is not a bare name; write the name without gs://, and folders in "
        "model_dir",
    ),
    lambda bucket, model_dir: _unless(
        not model_dir.startswith("/") and "://" not in model_dir,
        f"model_dir {model_dir!r} cannot lie in bucket {bucket!r}; leave bucket out, or make "
        "model_dir a folder name",
    ),
    lambda pod_step_seconds, pod_start_seconds: _unless(
        pod_step_seconds <= pod_start_seconds,
        f"pod_start_seconds {pod_start_seconds} is less than pod_step_seconds {pod_step_seconds}, "
        "although the first step is compiled and taken within it; raise it to "
        f"{pod_step_seconds} or more",
    ),
    lambda tpu_type: _unless(
        not tpu_type.startswith("v5e-"),
        f"tpu_type {tpu_type!r} has another name in Google Cloud; write "
        f"{tpu_type.replace('v5e', 'v5litepod')!r}",
    ),
)
DOUBTFUL: tuple[Rule, ...] = (
    lambda norm: _unless(
        norm != "layernorm-desync",
        "norm 'layernorm-desync' is treated as 'layernorm': copies of a norm cannot drift apart",
    ),
    lambda pe, pe_rotary_dims: _unless(
        pe == "rotary" or pe_rotary_dims == 0,
        f"pe_rotary_dims {pe_rotary_dims} has no effect with pe {pe!r}",
    ),
    lambda warmup_steps, anneal_steps, total_steps, end_lr: _unless(
        warmup_steps + anneal_steps <= total_steps,
        f"warmup_steps {warmup_steps} + anneal_steps {anneal_steps} is more than total_steps "
        f"{total_steps}, so the learning rate never reaches end_lr {end_lr}",
    ),
    lambda val_set, val_batches: _unless(
        not val_set or val_batches > 0,
        "val_batches is 0, so nothing is validated although val_set is given",
    ),
    lambda val_set, val_batches: _unless(
        bool(val_set) or val_batches == 0,
        f"val_set is empty, so nothing is validated although val_batches is {val_batches}",
    ),
    lambda tpu_type, tpu_size: _unless(
        tpu_size % devices_of(tpu_type) == 0,
        f"tpu_size {tpu_size} is no multiple of the {devices_of(tpu_type)} devices of a "
        f"{tpu_type}, so that no number of such slices is a whole run",
    ),
)
