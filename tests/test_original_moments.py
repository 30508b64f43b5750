"""Adam's moments over the original's shards: each role's own rule, by an independent merge."""

from __future__ import annotations

from pathlib import Path

import memory_source
import numpy as np
import original as golden
import pytest
import small

from mesh_transformer.checkpoints import original, original_writer
from mesh_transformer.checkpoints.source import Key


@pytest.mark.parametrize(
    ("norm", "pe"),
    [
        ("layernorm", "fixed"),  # whose positions are gathered
        ("rmsnorm", "t5"),  # whose norms are averaged
        ("scalenorm-bias", "rotary"),
        ("layernorm-nobias", "none"),
    ],
)
def test_moments_of_shards_are_those_of_the_true_gradient(
    tmp_path: Path, norm: str, pe: str
) -> None:
    """By `golden.merge`, which is written apart from the library."""
    model = small.parsed(norm=norm, pe=pe).model
    source = memory_source.of_model(model, moments=True)
    how = {"n_shards": 4, "dtype": None, "moments": True, "advance": lambda n: None}
    original_writer.write(str(tmp_path), source, model, **how)  # type: ignore[arg-type]
    names = [leaf.name.replace(golden.ROOT, "") for leaf in original.leaves(model, moments=True)]
    shards = []
    for shard in range(4):
        files = [np.load(tmp_path / f"shard_{shard}" / f"{i}.npz") for i in range(16)]
        shards.append([file[f"arr_{i}"] for file in files for i in range(len(file.files))])
    parts = {name: np.stack(copies) for name, *copies in zip(names, *shards, strict=True)}
    kinds = {"mu": golden.MERGE_FIRST_MOMENT, "nu": golden.MERGE_SECOND_MOMENT}
    for kind, rules in kinds.items():
        held = {n.removeprefix(f"{kind}/"): p for n, p in parts.items() if n.startswith(f"{kind}/")}
        merged = golden.merge(held, rules, model)
        n_compared = 0
        for module, leaves in merged.items():
            for name, whole in leaves.items():
                stacked = "/layers/" in module
                for layer in range(model.layers) if stacked else (None,):
                    ours = source.contents[Key(kind, f"{module}/{name}", layer)]
                    theirs = whole if layer is None else whole[layer]
                    # A float32 sum of four copies, each rounded: 2^-22.
                    np.testing.assert_allclose(theirs, ours, rtol=2**-22, atol=0)
                    n_compared += 1
        assert n_compared == sum(key.kind == kind for key in source.arrays)
