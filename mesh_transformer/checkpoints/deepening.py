"""A checkpoint as the beginning of a deeper model: each of its layers stands for several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.source import PARAMS, Array, Counts, Key, Source


def layer_before(layer: int, n_before: int, n_layers: int) -> int:
    """Return which of `n_before` layers a layer of the deeper model begins as.

    floor(layer n_before / n_layers), as ZeRO-transformer has it: copies of a layer follow each
    other, which Gopher's authors found to be the best start (arXiv:2112.11446, appendix G.3.3).
    """
    return layer * n_before // n_layers


class WithLayers:
    """The weights of a source, its layers repeated in place until there are as many as asked for.

    Of 18 layers, 36 take each twice, and 24 every third one twice. Moments of an optimizer are left
    out: they are of another model.
    """

    def __init__(self, source: Source, n_layers: int) -> None:
        """Repeat layers; nothing is read yet.

        Raises:
            CheckpointError: There are more layers than asked for, or there is an encoder.
        """
        if any(key.path.startswith("encoder/") for key in source.arrays):
            raise CheckpointError(
                f"{source.where} has an encoder, whose layers are no decoder's: only models "
                "without one are made deeper"
            )
        found = [key.layer for key in source.arrays if key.layer is not None]
        n_before = max(found, default=-1) + 1
        if not 0 < n_before <= n_layers:
            raise CheckpointError(
                f"{source.where} has {n_before} layers, and {n_layers} are asked for: a model is "
                "made deeper, never shallower; ask for as many or more"
            )
        self._source, self._n_before, self._n_layers = source, n_before, n_layers
        self.where, self.step = source.where, source.step
        self.about = f"{source.about}, {n_before} layers as {n_layers}"
        self.counts: Counts | None = None
        self.known: Mapping[str, Any] = {**source.known, "layers": n_layers}
        layers = range(n_layers)
        weights = [key for key in source.arrays if key.kind == PARAMS]
        deeper = [key._replace(layer=i) for key in weights if key.layer == 0 for i in layers]
        self.arrays: Mapping[Key, Array] = {
            key: source.arrays[self._before(key)]
            for key in [*(key for key in weights if key.layer is None), *deeper]
        }

    def _before(self, key: Key) -> Key:
        if key.layer is None:
            return key
        return key._replace(layer=layer_before(key.layer, self._n_before, self._n_layers))

    def read(self, key: Key) -> np.ndarray:
        """Read an array: of a layer, that of the one it begins as."""
        return self._source.read(self._before(key))
