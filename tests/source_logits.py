"""What our decoder makes of a checkpoint's weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import small

from mesh_transformer.checkpoints.fitting import fitted
from mesh_transformer.checkpoints.source import PARAMS, Source
from mesh_transformer.config import ModelConfig
from mesh_transformer.model.decoder import make_model


def logits(source: Source, model: ModelConfig, tokens_BT: np.ndarray) -> np.ndarray:
    """Return `[B, T, V]`, in float32."""
    model = dataclasses.replace(model, compute_dtype="float32")
    source = fitted(source, model)
    stacks: dict[str, Any] = {}
    for key in sorted(source.arrays, key=lambda key: key.layer or 0):
        if key.kind == PARAMS:
            stacks.setdefault(key.path, []).append(source.read(key))
    params: dict[str, Any] = {}
    for path, arrays in stacks.items():
        module, name = path.rsplit("/", 1)
        whole = np.stack(arrays) if "/layers/" in path else arrays[0]
        params.setdefault(module, {})[name] = whole.astype(np.float32)
    apply = jax.jit(make_model(model).apply, compiler_options=small.COMPILED_FAST)
    return np.asarray(apply(params, tokens_BT, jnp.arange(tokens_BT.shape[1])[None])[0])
