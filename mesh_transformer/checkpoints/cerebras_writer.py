"""Checkpoints of Cerebras's model zoo, release 1.9, written; `cerebras` says what is in them.

Modules that share a parameter, as the last norm is shared, have it by both their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import yaml

from mesh_transformer import storage
from mesh_transformer.checkpoints import pytorch
from mesh_transformer.checkpoints.cerebras_family import AS_GPTJ, FAMILY, scaled, scales
from mesh_transformer.checkpoints.families import described
from mesh_transformer.checkpoints.family import Family, Json
from mesh_transformer.checkpoints.renaming import Renamed
from mesh_transformer.checkpoints.source import Array, Counts, Key, Source
from mesh_transformer.config import ModelConfig

PROGRAM = "Cerebras's model zoo, release 1.9"

_FINAL_NORM, _ALSO_FINAL_NORM = "transformer_decoder.norm.", "ln_f."


def check(model: ModelConfig) -> None:
    """Refuse a model that Cerebras's does not compute, and to write PyTorch's files without it.

    Raises:
        CheckpointError: Every reason is listed.
    """
    _described(model)
    pytorch.check("checkpoint_N.mdl")


def _described(model: ModelConfig) -> tuple[Family, Json]:
    family = AS_GPTJ if model.residual == "parallel" else FAMILY
    return described(model, (family,), PROGRAM)


def write(
    folder: str,
    source: Source,
    model: ModelConfig,
    *,
    dtype: np.dtype[Any],
    advance: Callable[[int], object],
) -> None:
    """Write checkpoint_N.mdl and params.yaml, as `foreign.Foreign.write` says."""
    family, keys = _described(model)
    weights = Renamed(_Unscaled(source, model), family, model, dtype, advance)
    copies = {
        name.replace(_FINAL_NORM, _ALSO_FINAL_NORM): name
        for name in weights.arrays
        if name.startswith(_FINAL_NORM)
    }
    if model.tie_embeddings:
        copies["lm_head.weight"] = "embedding_layer.word_embeddings.weight"
    path = storage.join(folder, f"checkpoint_{source.step}.mdl")
    pytorch.write(path, weights.arrays, weights.read, inside="model", copies=copies)
    same = {key: it for key, it in family.same.items() if it is not None}
    text = yaml.safe_dump({"model": {**same, **family.also, **keys}}, sort_keys=False)
    storage.write_text_atomically(storage.join(folder, "params.yaml"), text)


class _Unscaled:
    """A source whose arrays are as large as Cerebras has them."""

    def __init__(self, source: Source, model: ModelConfig) -> None:
        self._source, self._scales = source, scales(model)
        self.where, self.about, self.step = source.where, source.about, source.step
        self.counts: Counts | None = source.counts
        self.known: Mapping[str, Any] = source.known
        self.arrays: Mapping[Key, Array] = source.arrays

    def read(self, key: Key) -> np.ndarray:
        """Read one array."""
        return scaled(self._source.read(key), 1 / self._scales.get(key.path, 1.0))
