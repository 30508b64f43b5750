"""A run of mesh-transformer-jax's second model, by that program on eight CPU devices.

`data/original/F_v2` holds its checkpoint of step 20, arranged for four cores a replica, and what it
computed with it and in the five steps after it: in float32 and, as it was, in bfloat16.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import original

from mesh_transformer import config

RUN = Path(__file__).parent / "data" / "original" / "F_v2"
STEP = RUN / "step_20"
KEYS = {"gated": True, "qkv_bias": True}
CORES = 4


def run_config(**keys: Any) -> config.Config:
    """Return the run's own configuration, and what reads its checkpoint."""
    its = json.loads((RUN / "config.json").read_text())
    with warnings.catch_warnings():  # transformer_version is ignored
        warnings.simplefilter("ignore", config.ConfigWarning)
        given = its | original.OTHER_KEYS | {"name": "F_v2", "total_steps": 1} | KEYS
        return config.parse(given | {"original_cores": CORES, "cores_per_replica": 1} | keys)


def record() -> dict[str, np.ndarray]:
    with np.load(RUN / "record.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def later_losses() -> np.ndarray:
    """Return what the original went on with in float32: [5, 2], loss and last_loss."""
    return np.array(json.loads((RUN / "record.json").read_text())["next_train_f32"])
