"""The mean of the weights of several checkpoints of one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mesh_transformer.checkpoints.layout import CheckpointError, first_of
from mesh_transformer.checkpoints.source import PARAMS, Array, Counts, Key, Source
from mesh_transformer.config import ModelConfig
from mesh_transformer.network_rules import FREE, LENGTHS


class Mean:
    """The mean of several sources' weights, in float32, of each array as it is read.

    Of the last checkpoints of a run it is LAWA (arXiv:2209.14981). Moments are left out.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        """Compare what the sources say of themselves; nothing is read yet.

        Raises:
            CheckpointError: They are of different models: every key and array in which one differs
                from the first is listed.
        """
        first = sources[0]
        problems = [text for other in sources[1:] for text in _differences(first, other)]
        if problems:
            heading = f"only checkpoints of one model have a mean; {first.where} is unlike others:"
            raise CheckpointError("\n  - ".join([heading, *problems]))
        self._sources = tuple(sources)
        self.where, self.known = first.where, first.known
        self.step = max(source.step for source in sources)
        steps = ", ".join(str(source.step) for source in sources)
        self.about = f"mean of {len(sources)} checkpoints, of steps {steps}"
        self.counts: Counts | None = None
        float32 = np.dtype(np.float32)
        self.arrays: Mapping[Key, Array] = {
            key: array._replace(dtype=float32)
            for key, array in first.arrays.items()
            if key.kind == PARAMS
        }

    def read(self, key: Key) -> np.ndarray:
        """Read an array of each source, one after the other, and return their mean."""
        total = np.zeros(self.arrays[key].shape, np.float32)
        for source in self._sources:
            total += source.read(key)
        return total / np.float32(len(self._sources))


def _differences(one: Source, other: Source) -> list[str]:
    """Say in which keys of the model, and weights, one source differs from another."""
    keys = [
        f"{key} is {one.known.get(key)!r}, and {other.known.get(key)!r} in {other.where}"
        for key in (field.name for field in dataclasses.fields(ModelConfig))
        if key not in FREE | LENGTHS and one.known.get(key) != other.known.get(key)
    ]
    ours, theirs = _shapes(one), _shapes(other)
    arrays = [
        f"{key} is {ours.get(key, 'absent')}, and {theirs.get(key, 'absent')} in {other.where}"
        for key in sorted(ours.keys() | theirs.keys(), key=str)
        if ours.get(key) != theirs.get(key)
    ]
    return [*keys, *first_of(arrays)]


def _shapes(source: Source) -> dict[Key, list[int]]:
    return {key: list(it.shape) for key, it in source.arrays.items() if key.kind == PARAMS}
