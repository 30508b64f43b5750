"""A checkpoint in memory, for what reads checkpoints."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mesh_transformer.checkpoints.fitting import model_arrays
from mesh_transformer.checkpoints.source import MU, NU, PARAMS, Array, Counts, Key, Source
from mesh_transformer.config import ModelConfig


@dataclasses.dataclass
class MemorySource:
    """A source over arrays that are there.

    Attributes:
        contents: The arrays.
        reads: Keys in the order in which they were read.
    """

    contents: Mapping[Key, np.ndarray]
    step: int = 0
    counts: Counts | None = None
    known: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    where: str = "memory"
    about: str = "arrays in memory"
    reads: list[Key] = dataclasses.field(default_factory=list)

    @property
    def arrays(self) -> Mapping[Key, Array]:
        return {key: Array(array.shape, array.dtype) for key, array in self.contents.items()}

    def read(self, key: Key) -> np.ndarray:
        self.reads.append(key)
        return self.contents[key]


def of_model(
    model: ModelConfig, seed: int = 0, dtype: Any = np.float32, *, moments: bool = False
) -> MemorySource:
    """Fill a model's arrays with random numbers, no two alike."""
    rng = np.random.default_rng(seed)
    shapes = model_arrays(model)
    contents = {
        key: np.asarray(rng.normal(size=shape)).astype(dtype) for key, shape in shapes.items()
    }
    if moments:
        for kind in (MU, NU):
            for key, shape in shapes.items():
                numbers = np.asarray(rng.uniform(1e-3, 1, size=shape)).astype(np.float32)
                contents[key._replace(kind=kind)] = numbers
    assert all(key.kind in (PARAMS, MU, NU) for key in contents)
    return MemorySource(contents, step=7, counts=Counts(7, 5) if moments else None)


def peak_bytes(work: Callable[[], object]) -> int:
    """Do some work, and return by how much memory grew at most meanwhile."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def read_all(source: Source) -> None:
    """Read every array, and keep none."""
    for key in source.arrays:
        source.read(key)
