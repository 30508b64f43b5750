#!/usr/bin/env python3
"""Draw the coordinate check of muP: how large activations become in training, by width.

    python benchmarks/mup_coordinates.py --output docs/mup_coordinates.png

A small GPT-J is trained for a few steps on one batch of random tokens at several widths, in the
standard parametrisation and in muP, at one learning rate. Its sizes should not depend on the width
(arXiv:2203.03466, appendix D.1).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer import config
from mesh_transformer.model.decoder import make_model
from mesh_transformer.network_rules import MUP
from mesh_transformer.sharding import make_mesh
from mesh_transformer.training.steps import make_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS, STEPS, N_HEADS, SEED = (64, 128, 256, 512), (0, 1, 2, 4, 8), 4, 0
BASE = {"mup_base_d_model": 64, "mup_base_d_ff": 256, "mup_base_d_head": 64 // N_HEADS}
KEYS: dict[str, Any] = {
    **{
        "layers": 2,
        "n_heads": N_HEADS,
        "n_vocab": 64,
        "seq": 16,
        "compute_dtype": "float32",
        "remat": "none",
    },
    **{"lr": 1e-2, "end_lr": 1e-2, "warmup_steps": 0, "anneal_steps": 1, "weight_decay": 0.0},
    **{"per_replica_batch": 4, "total_steps": 8, "train_set": "none", "model_dir": "none"},
    **{"ckpt_every": 8, "keep_every": 8, "name": "coordinates"},
}
TITLES = {False: "standard parametrisation", True: "muP"}


class Sizes(NamedTuple):
    """Mean absolute values, each after the steps of `STEPS` that were asked for.

    Attributes:
        features: Of the last block's output.
        logits: Of the logits.
    """

    features: list[float]
    logits: list[float]


def measured(width: int, *, mup: bool, steps: tuple[int, ...] = STEPS) -> Sizes:
    """Train at a width and measure on the way."""
    keys = {"d_model": width, "pe_rotary_dims": 8, **(BASE if mup else {})}
    run = config.parse(KEYS | keys)
    compiled_steps = make_steps(run, make_mesh(1, 1, jax.devices()[:1]))
    shape = (1, run.batch.per_replica_batch, run.model.seq + 1)
    tokens_ABT1 = np.random.default_rng(SEED).integers(0, run.model.n_vocab, shape, np.int32)
    tokens_BT = jnp.asarray(tokens_ABT1[0, :, :-1])
    state, sizes = compiled_steps.init(jax.random.key(SEED)), Sizes([], [])
    for step in range(max(steps) + 1):
        if step > 0:
            state, _ = compiled_steps.train(state, tokens_ABT1, None)
        if step in steps:
            sizes.features.append(size(features(state.params, tokens_BT, run.model)))
            sizes.logits.append(size(outputs(state.params, tokens_BT, run.model)))
    return sizes


@functools.cache
def compiled(model: config.ModelConfig) -> Any:
    return jax.jit(make_model(model).apply)


def outputs(params: Any, tokens_BT: jax.Array, model: config.ModelConfig) -> jax.Array:
    """Return the logits, `BTV`."""
    positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    return compiled(model)(params, tokens_BT, positions_BT)[0]


def features(params: Any, tokens_BT: jax.Array, model: config.ModelConfig) -> jax.Array:
    """Return the last block's output, `BTD`: the logits of a model whose head changes nothing."""
    width, table = model.d_model, "decoder/embed"
    bare: dict[str, Any] = {**MUP, "final_norm": False, "head_bias": False, "output_scale": 1.0}
    model = dataclasses.replace(model, n_vocab=width, n_tokens=width, **bare)
    rows = [(0, width - params[table]["embeddings"].shape[0]), (0, 0)]
    embed = params[table] | {"embeddings": jnp.pad(params[table]["embeddings"], rows)}
    head = {"decoder/unembed": {"w": jnp.eye(width)}}
    return outputs({**params, table: embed, **head}, tokens_BT, model)


def size(activations: jax.Array) -> float:
    return float(jnp.abs(activations).mean())


def draw(found: dict[tuple[bool, int], Sizes]) -> Figure:
    """Draw sizes, by parametrisation and width, over width: one line for each number of steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for row, what in enumerate(Sizes._fields):
        for column, mup in enumerate((False, True)):
            axes = panels[row][column]
            for i, steps in enumerate(STEPS):
                shade = str(0.75 - 0.75 * i / (len(STEPS) - 1))
                values = [getattr(found[mup, width], what)[i] for width in WIDTHS]
                axes.loglog(WIDTHS, values, color=shade, marker="o", label=f"after {steps} steps")
            axes.set_xticks(WIDTHS, [str(width) for width in WIDTHS], minor=False)
            axes.minorticks_off()
            axes.set_title(f"{what}, {TITLES[mup]}", fontsize=12)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e6e6e6", linewidth=0.8)
        panels[row][0].set_ylabel("mean absolute size")
    for axes in panels[1]:
        axes.set_xlabel("d_model")
    panels[0][0].legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="mup_coordinates.png", help="default: %(default)s")
    args = parser.parse_args()
    found = {(mup, n): measured(n, mup=mup) for mup in (False, True) for n in WIDTHS}
    for (mup, width), sizes in found.items():
        print(TITLES[mup], width, *(f"{n:.3g}" for n in (*sizes.features, *sizes.logits)))
    draw(found).savefig(args.output)


if __name__ == "__main__":
    main()
