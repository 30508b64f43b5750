#!/usr/bin/env python3
"""Time the training step of a transformers GPT-J in PyTorch, sized by one of our configurations.

    python benchmarks/torch_step.py --config benchmarks/cpu_27M.json

The peer of train_step.py, with the same JSON line: the same sizes, precision, accumulation and
clipping, and AdamW with the same decayed weights; fused kernels and `torch.compile` where there is
a GPU. Needs the extra [parity].
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from typing import Any

import torch
import transformers

from mesh_transformer import config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps(measure(config.load(args.config), args.steps, args.warm_up)))


def gptj(model: config.ModelConfig) -> transformers.GPTJForCausalLM:
    """Return a transformers GPT-J of the same sizes."""
    return transformers.GPTJForCausalLM(
        transformers.GPTJConfig(
            vocab_size=model.n_vocab,
            n_positions=model.seq,
            n_embd=model.d_model,
            n_layer=model.layers,
            n_head=model.n_heads,
            rotary_dim=model.pe_rotary_dims,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    )


def adamw(model: torch.nn.Module, rule: config.OptimizerConfig) -> torch.optim.Optimizer:
    """Return AdamW, fused, with the decay of matrices only."""
    matrices, vectors = (
        [p for p in model.parameters() if (p.ndim >= 2) == decayed] for decayed in (True, False)
    )
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": rule.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=rule.lr,
        betas=(0.9, 0.999),
        fused=True,
    )


def measure(run: config.Config, n_steps: int, n_warm_up: int) -> dict[str, Any]:
    """Return tokens/s, step time and memory of the same training step in PyTorch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model: Any = gptj(run.model)
    model.to(device)
    if run.model.remat == "full":
        model.gradient_checkpointing_enable()
    forward = torch.compile(model) if device == "cuda" else model
    optimizer = adamw(model, run.optimizer)
    n_micro = run.batch.gradient_accumulation_steps
    shape = (n_micro, run.batch.per_replica_batch, run.model.seq + 1)
    tokens = torch.randint(run.model.n_tokens, shape, device=device)
    half = torch.autocast(device, torch.bfloat16, enabled=run.model.compute_dtype == "bfloat16")

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for micro in tokens:
            with half:
                logits = forward(micro[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), micro[:, 1:].flatten()
            )
            (loss / n_micro).backward()
            total += loss.detach() / n_micro
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total.item()

    seconds = []
    for _ in range(n_warm_up + n_steps):
        begin = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - begin)
    step_seconds = statistics.median(seconds[n_warm_up:])
    n_tokens = shape[0] * shape[1] * run.model.seq
    memory = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {
        "config": run.run.name,
        "tokens_per_second": round(n_tokens / step_seconds, 1),
        "step_ms": round(step_seconds * 1e3, 2),
        "step_ms_min": round(min(seconds[n_warm_up:]) * 1e3, 2),
        "peak_memory_gib": round(memory / 2**30, 3),
        "loss": loss,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
