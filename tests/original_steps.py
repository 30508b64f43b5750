"""Step folders that mesh-transformer-jax itself wrote.

`data/original/NAME` holds some of them, with `leaves.json`, the original's own list of its arrays.
All of them are in the folder that `ORIGINAL_FIXTURES` names; tests that need one of those which are
not copied are skipped without it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import original
import pytest

from mesh_transformer import config

HERE = Path(__file__).parent / "data" / "original"
COPIED = {
    "C_t5": "slim", "E_scalenorm": "full", "E_rmsnorm_mp4": "full", "E_layernorm-nobias": "full",
}  # fmt: skip
STEPS = [
    (name, size)
    for name in dict.fromkeys(("A", "B_small", "C_t5", "D_fixed", "E_rmsnorm", *COPIED))
    for size in ("full", "slim")
    if not (name.startswith("E_") and size == "slim")
]


class Step(NamedTuple):
    """A step folder.

    Attributes:
        leaves: The original's list of its arrays: name, file, key, shape_per_shard, dtype.
    """

    folder: Path
    leaves: list[dict[str, Any]]
    config: config.Config

    @property
    def n_shards(self) -> int:
        return self.config.mesh.cores_per_replica


def find(name: str, size: str) -> Step:
    """Find a step folder, or skip the test."""
    keys = json.loads(original.CONFIGS.read_text())[name]
    run = config.parse(keys | original.OTHER_KEYS, name)
    if COPIED.get(name) == size:
        folder = HERE / name
        return Step(folder / "step_20", json.loads((folder / "leaves.json").read_text()), run)
    folder = original.FOLDERS / name
    if not folder.exists():
        pytest.skip(f"{name} is not copied here, and ORIGINAL_FIXTURES names no folder with it")
    listed = json.loads((folder / f"{size}_leaves.json").read_text())
    return Step(folder / size / "step_20", listed, run)
