"""Random weights of a model by the names that transformers has for them."""

from __future__ import annotations

from typing import Any

import memory_source
import numpy as np
from memory_source import MemorySource

from mesh_transformer.checkpoints.families import config_keys, family_of
from mesh_transformer.checkpoints.tensors import tensors
from mesh_transformer.config import ModelConfig


def of_config(config: dict[str, Any]) -> tuple[MemorySource, dict[str, np.ndarray]]:
    """Return a model's weights by our names, and the same by those of its config.json.

    Logits made of them are of the size of 1 to 10.
    """
    family = family_of(config)
    assert family is not None
    model = ModelConfig(**config_keys(config))
    source = memory_source.of_model(model)
    source.known = config_keys(config)
    source.contents = {
        key: (0.2 * value + key.path.endswith("scale")).astype(np.float32)
        for key, value in source.contents.items()
        if key.path != "decoder/embed/b"
    }
    held = {}
    for tensor in tensors(family, model):
        whole = np.empty(tensor.shape, np.float32)
        for key in tensor.keys:
            whole = tensor.put(whole, key, source.contents[key])
        held[tensor.name] = whole
    return source, held
