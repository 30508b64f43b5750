"""Numbers that mesh-transformer-jax itself computed, put into our parameter tree by name.

`golden/original/NAME.npz` holds a run of the original program on CPU, in float32: its weights as
its shards hold them, under its own names; the loss of every token of four sequences; the gradient
of one training step; greedy continuations. `A` holds weights rounded to bfloat16, as the original's
slim checkpoints do, and the numbers that follow from those. Runs that are `CONTINUED` also hold
Adam's moments and what the next five steps were fed and reported, in float32; but for `A`, which
would be large: its is read from the original's folder. The files were packed from folders that the
original wrote (`full/step_20/shard_*/*.npz`, `record.npz`, ...) with

    python tests/original.py FOLDER...
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import sys
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer import config

GOLDEN = pathlib.Path(__file__).parent / "golden" / "original"
CONFIGS = GOLDEN / "configs.json"
FOLDERS = pathlib.Path(
    os.environ.get("ORIGINAL_FIXTURES") or pathlib.Path(__file__).parents[2] / "shared" / "fixtures"
)
"""Where the folders that the original wrote are, if they are here."""
CONTINUED = (
    *("A", "B_small", "C_t5", "D_fixed"),
    *("E_rmsnorm", "E_scalenorm", "E_layernorm-nobias", "E_rmsnorm_mp4"),
)
ROOT = "causal_transformer_shard/~/"
OTHER_KEYS = {
    "compute_dtype": "float32",
    "remat": "none",
    "train_set": "train.index",
    "model_dir": "runs/original",
    "ckpt_every": 10,
    "keep_every": 10,
    "zero_stage": 0,
}
"""What the original's own files leave to others, or what makes ours compute as it did."""

LAYER = r"layer_(\d+)/~/"
PLACES = (
    # The original's name, ours, and what its shards hold. Its linear_1 is v and its linear_2 is k.
    ("embedding_shard/~/linear/w", "embed/embeddings", "rows"),
    ("embedding_shard/~/linear/b", "embed/b", "summed"),
    ("embedding_shard/pos_embs", "positions/embeddings", "gathered columns"),
    ("relative_position_embs/rel_embedding", "relative_positions/embeddings", "rows"),
    (LAYER + "linear/w", "layers/block/attention/q/w", "columns"),
    (LAYER + "linear_1/w", "layers/block/attention/v/w", "columns"),
    (LAYER + "linear_2/w", "layers/block/attention/k/w", "columns"),
    (LAYER + "linear_3/w", "layers/block/attention/o/w", "rows"),
    (LAYER + "linear_4/w", "layers/block/ff/in/w", "columns"),
    (LAYER + "linear_4/b", "layers/block/ff/in/b", "columns"),
    (LAYER + "linear_5/w", "layers/block/ff/out/w", "rows"),
    (LAYER + "linear_5/b", "layers/block/ff/out/b", "summed"),
    ("projection_shard/~/linear/w", "unembed/w", "columns"),
    ("projection_shard/~/linear/b", "unembed/b", "columns"),
    (LAYER + "replicated_layer_norm/(scale|offset)", "layers/block/norm/{}", "first"),
    ("projection_shard/~/replicated_layer_norm/(scale|offset)", "final_norm/{}", "first"),
    (LAYER + "rms_norm/(scale|offset)", "layers/block/norm/{}", "averaged"),
    ("projection_shard/~/rms_norm/(scale|offset)", "final_norm/{}", "averaged"),
)
MERGE_WEIGHT = {
    "rows": lambda parts: np.concatenate(list(parts), 0),
    "columns": lambda parts: np.concatenate(list(parts), -1),
    "gathered columns": lambda parts: np.concatenate(list(parts), -1),
    "summed": lambda parts: parts.sum(0),
    "first": lambda parts: parts[0],
    "averaged": lambda parts: parts.mean(0),
}
MERGE_GRADIENT = MERGE_WEIGHT | {
    # Each of the summed copies has the gradient of their sum.
    "summed": lambda parts: parts[0],
    # A mean hands each of n copies 1/n of its gradient.
    "averaged": lambda parts: parts.sum(0),
    # The transpose of the gather adds the same gradient up once per shard.
    "gathered columns": lambda parts: np.concatenate(list(parts), -1) / len(parts),
}
MERGE_FIRST_MOMENT = MERGE_GRADIENT
MERGE_SECOND_MOMENT = MERGE_GRADIENT | {
    "averaged": lambda parts: parts.sum(0) * len(parts),
    "gathered columns": lambda parts: np.concatenate(list(parts), -1) / len(parts) ** 2,
}
"""To moments of the true gradient: a mean of squares goes as the square of what a copy had."""


class Original(NamedTuple):
    """One run of the original.

    Attributes:
        config: Its configuration, in float32.
        arrays: Everything in the file: `params/NAME`, `grads/NAME`, ... stacked by shard, and
            `eval_tokens`, `all_loss`, `correct`, `next_tokens`, `prompts`, `prompt_lengths`,
            `generated`, `margins` (distance between the two best logits at each drawn token); of
            runs that are `CONTINUED` `later_tokens` [5, A, B, T + 1] and `later_metrics` [5, 4]:
            loss, last_loss, grad_norm of the sum over microbatches, mean norm of microbatches.
    """

    config: config.Config
    arrays: dict[str, np.ndarray]

    def shards(self, kind: str) -> dict[str, np.ndarray]:
        """Return "params", "grads", "mu", "nu" or "after": `[shard, ...]` by name."""
        return {
            name.removeprefix(f"{kind}/"): array
            for name, array in self.arrays.items()
            if name.startswith(f"{kind}/")
        }

    def params(self) -> dict[str, dict[str, np.ndarray]]:
        """Return the weights as our parameter tree."""
        return merge(self.shards("params"), MERGE_WEIGHT, self.config.model)

    def gradient(self) -> dict[str, dict[str, np.ndarray]]:
        """Return its gradient of `next_tokens`, summed over microbatches, as our tree."""
        return merge(self.shards("grads"), MERGE_GRADIENT, self.config.model)

    def moments(self) -> dict[str, Any]:
        """Return Adam's moments of the true gradient, "mu" and "nu", as our trees."""
        kinds = {"mu": MERGE_FIRST_MOMENT, "nu": MERGE_SECOND_MOMENT}
        return {
            kind: merge(self.shards(kind), rules, self.config.model)
            for kind, rules in kinds.items()
        }


@functools.cache
def load(name: str) -> Original:
    """Read one packed run."""
    keys = json.loads(CONFIGS.read_text())[name]
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: as_float32(file[key]) for key in file.files}
    return Original(config.parse(keys | OTHER_KEYS, name), arrays)


@functools.cache
def continued(name: str) -> Original | None:
    """Return what one run went on with for five steps; None if it is not here."""
    if name != "A":
        return load(name)
    if not (FOLDERS / name).is_dir():
        return None
    leaves = read_step(FOLDERS / name, "full")
    params = {key: value for key, value in leaves.items() if key.startswith("params/")}
    return Original(load(name).config, params | later(FOLDERS / name, leaves))


def merge(
    shards: dict[str, np.ndarray], rules: Any, model: config.ModelConfig
) -> dict[str, dict[str, np.ndarray]]:
    """Merge shards by the rule of each name, and stack layers."""
    merged: dict[str, Any] = {}
    for name, parts in shards.items():
        (match, place, rule) = next(
            (match, place, rule)
            for pattern, place, rule in PLACES
            if (match := re.fullmatch(pattern, name))
        )
        *layer, last = match.groups() if "{}" in place else (*match.groups(), "")
        if model.norm.startswith("scalenorm"):  # a number, not a vector
            last = {"scale": "gain", "offset": "shift"}.get(last, last)
        if model.norm == "layernorm-nobias" and last == "offset":  # stored, always 0, never used
            continue
        stack = merged.setdefault(place.format(last), {})
        stack[int(layer[0]) if layer else None] = rules[rule](parts)
    params: dict[str, dict[str, np.ndarray]] = {}
    for path, stack in merged.items():
        module, leaf = f"decoder/{path}".rsplit("/", 1)
        whole = stack[None] if None in stack else np.stack([stack[i] for i in range(model.layers)])
        params.setdefault(module, {})[leaf] = whole
    return params


def as_float32(array: np.ndarray) -> np.ndarray:
    """Widen the bits of bfloat16 numbers; leave anything else alone."""
    if array.dtype != np.uint16:
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)


def read_shards(folder: pathlib.Path, leaves: pathlib.Path, n_shards: int) -> dict[str, np.ndarray]:
    """Read a checkpoint that the original wrote: by leaf name, `[shard, ...]`."""
    return read_leaves(folder, json.loads(leaves.read_text()), n_shards)


def read_leaves(
    folder: pathlib.Path, leaves: list[dict[str, Any]], n_shards: int
) -> dict[str, np.ndarray]:
    """Read the arrays that the original's list of them names."""
    arrays = {}
    for leaf in leaves:
        parts = []
        for i in range(n_shards):
            with np.load(folder / f"shard_{i}" / leaf["file"]) as file:
                part = file[leaf["key"]]
            parts.append(part.view(np.uint16) if part.dtype == np.dtype("V2") else part)
        arrays[leaf["name"].replace(ROOT, "")] = np.stack(parts)
    return arrays


def read_step(folder: pathlib.Path, size: str) -> dict[str, np.ndarray]:
    """Read the checkpoint of step 20 of a run, "full" or "slim"."""
    n_shards = json.loads((folder / "config.json").read_text())["cores_per_replica"]
    return read_shards(folder / size / "step_20", folder / f"{size}_leaves.json", n_shards)


def later(folder: pathlib.Path, leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return Adam's moments, and what the next five steps were fed and reported."""
    arrays = {
        f"{moment}/{key.removeprefix(start)}": value
        for moment in ("mu", "nu")
        for key, value in leaves.items()
        if key.startswith(start := f"opt_state/2/{moment}/")
    }
    with np.load(folder / "record.npz") as record:
        arrays["later_tokens"] = record["next_tokens"]
    record = json.loads((folder / "record.json").read_text())
    arrays["later_metrics"] = np.array(record["next_train_f32"]["rows"], np.float32)
    return arrays


def pack(folder: pathlib.Path) -> None:
    """Copy what the tests need of one folder into `GOLDEN`."""
    keys = json.loads((folder / "config.json").read_text())
    name = folder.name
    size, weights = ("slim", "bf16") if name == "A" else ("full", "f32")
    leaves = read_step(folder, size)
    packed: dict[str, Any] = {k: v for k, v in leaves.items() if k.startswith("params/")}
    kept = {
        "eval_tokens": "eval_tokens",
        f"eval_{weights}_all_loss": "all_loss",
        f"eval_{weights}_correct": "correct",
        "gen_ctx": "prompts",
        "gen_ctx_length": "prompt_lengths",
        f"gen_{weights}weights_tokens": "generated",
        f"gen_{weights}weights_top1_top2_margin": "margins",
    }
    with np.load(folder / "record.npz") as record:
        packed |= {new: record[old] for old, new in kept.items() if old in record.files}
        packed["next_tokens"] = record["next_tokens"][0]
    extra = {"grads_f32_next0": "grads"} if size == "full" else {}
    if name == "E_rmsnorm":  # small: it also holds what one optimizer step ends with
        extra |= {"params_f32_after_next1": "after"}
    if name in CONTINUED and size == "full":
        packed |= later(folder, leaves)
    for file_name, kind in extra.items():
        with np.load(folder / f"{file_name}.npz") as file:
            for key in file.files:
                packed[f"{kind}/{key.replace('|', '/').replace(ROOT, '')}"] = file[key]
    np.savez_compressed(GOLDEN / f"{name}.npz", **packed)
    configs = json.loads(CONFIGS.read_text()) if CONFIGS.exists() else {}
    CONFIGS.write_text(json.dumps(configs | {name: keys}, indent=2) + "\n")


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        pack(pathlib.Path(folder))
