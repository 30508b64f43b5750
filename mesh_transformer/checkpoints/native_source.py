"""Read native checkpoints as every other format is read: one array of one layer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mesh_transformer.checkpoints import layout, reading
from mesh_transformer.checkpoints.fingerprint import as_digits, box_sum
from mesh_transformer.checkpoints.pieces import Pieces
from mesh_transformer.checkpoints.source import MU, PARAMS, Array, Counts, Key
from mesh_transformer.config import recorded


class NativeSource:
    """A step folder as a `Source`.

    An array of which every layer has been read, in any order, has been checked by its fingerprint.
    """

    def __init__(self, folder: str) -> None:
        """Open a step folder, as `reading.locate` gives it; no array is read but the counts.

        Raises:
            CheckpointError: It is not a native checkpoint, or damaged, or cannot be read.
        """
        self._pieces = Pieces(folder)
        self._stored = {path: self._pieces.array(path) for path in self._pieces.paths}
        self._paths: dict[Key, str] = {}
        self._sums: dict[str, dict[int | None, int]] = {}
        for path, stored in self._stored.items():
            kind, inner = _kind(path)
            if kind is None:
                continue
            layers = range(stored.shape[0]) if layout.is_stacked(path) else (None,)
            for layer in layers:
                self._paths[Key(kind, inner, layer)] = path
        self.arrays: Mapping[Key, Array] = {
            key: self._array(key, path) for key, path in self._paths.items()
        }
        self.counts: Counts | None = self._read_counts()

    @property
    def where(self) -> str:
        """Its path or URL."""
        return self._pieces.folder

    @property
    def about(self) -> str:
        """What it is, in a few words."""
        dtypes = {str(array.dtype) for key, array in self.arrays.items() if key.kind == PARAMS}
        moments = ", with moments" if self.counts else ""
        return f"native checkpoint of step {self.step}, {' and '.join(sorted(dtypes))}{moments}"

    @property
    def step(self) -> int:
        """Optimizer steps that its weights have taken."""
        return int(self._pieces.about["step"])

    @property
    def known(self) -> Mapping[str, Any]:
        """The flat configuration that it was saved with, and defaults of keys it had none of."""
        config = self._pieces.about["extra"].get("config")
        return recorded(config) if config else {}

    @property
    def position(self) -> Mapping[str, Any]:
        """Where the run that saved it would go on in its data."""
        return dict(self._pieces.about["extra"].get("position") or {})

    def read(self, key: Key) -> np.ndarray:
        """Read one array, in the dtype and shape that `arrays` says.

        Raises:
            Damaged: What is stored cannot be decoded, or all that has been read of the array does
                not have the fingerprint that it was saved with.
            CheckpointError: It cannot be read.
        """
        path = self._paths[key]
        shape = self._stored[path].shape
        whole = tuple(slice(0, size) for size in shape)
        first = key.layer or 0
        box = whole if key.layer is None else (slice(first, first + 1), *whole[1:])
        part = self._pieces.read(path, box)
        sums = self._sums.setdefault(path, {})
        sums[key.layer] = box_sum(part, [cut.start for cut in box], shape)
        known = self._pieces.about["fingerprints"][path]
        all_read = key.layer is None or len(sums) == shape[0]
        if all_read and as_digits(sum(sums.values())) != known:
            raise reading.damaged(self.where, [f"{path} (changed)"])
        return part if key.layer is None else part[0]

    def _array(self, key: Key, path: str) -> Array:
        stored = self._stored[path]
        return stored if key.layer is None else Array(stored.shape[1:], stored.dtype)

    def _read_counts(self) -> Counts | None:
        """Tell Adam's count from the schedule's: it stands beside the moments."""
        if not any(key.kind == MU for key in self.arrays):
            return None
        (adam,) = {path.split("/")[1] for path in self._stored if layout.MOMENT.fullmatch(path)}
        counts = {
            match[1]: int(self._pieces.read(path, ()))
            for path in self._stored
            if (match := layout.COUNT.fullmatch(path))
        }
        of_adam = counts.pop(adam)
        return Counts(of_adam, next(iter(counts.values()), of_adam))


def _kind(path: str) -> tuple[str | None, str]:
    """Tell what an array of a train state is, and its path among the weights."""
    if path.startswith("params/"):
        return PARAMS, path.removeprefix("params/")
    if match := layout.MOMENT.fullmatch(path):
        return match[2], match[3]
    return None, path
