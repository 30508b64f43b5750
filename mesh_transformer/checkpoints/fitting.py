"""What a model needs of a checkpoint, and what makes one fit: its dtype and its vocabulary."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from mesh_transformer.checkpoints.layout import CheckpointError, by_path, first_of
from mesh_transformer.checkpoints.source import MU, NU, PARAMS, TABLE, Array, Counts, Key, Source
from mesh_transformer.config import ModelConfig
from mesh_transformer.model.decoder import make_model
from mesh_transformer.model.layers import PADDING_BIAS
from mesh_transformer.network_rules import FREE, LENGTHS

MADE_TO_FIT = frozenset({"n_vocab", "pe_offset"})
"""Keys in which `fitted` makes up for a difference, or says why it cannot."""

_POSITIONS = "decoder/positions/embeddings"
_VOCAB_AXIS = {TABLE.path: 0, "decoder/unembed/w": 1, "decoder/unembed/b": 0}

_logger = logging.getLogger(__name__)


def model_arrays(model: ModelConfig) -> dict[Key, tuple[int, ...]]:
    """List the weights of a model, one layer at a time, with their shapes."""
    shapes = by_path(jax.eval_shape(make_model(model).init, jax.random.key(0)))
    arrays: dict[Key, tuple[int, ...]] = {}
    for path, leaf in shapes.items():
        if "/layers/" in path:
            arrays |= {Key(PARAMS, path, i): leaf.shape[1:] for i in range(leaf.shape[0])}
        else:
            arrays[Key(PARAMS, path)] = leaf.shape
    return arrays


def cast(array: np.ndarray, dtype: np.dtype[Any], what: str) -> np.ndarray:
    """Cast an array.

    Raises:
        CheckpointError: A finite number would become infinite.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if dtype == np.float16 and not np.isfinite(result).all() and np.isfinite(array).all():
        raise CheckpointError(
            f"{what} holds {np.abs(array.astype(np.float32)).max():g}, more than {dtype} can: "
            "choose bfloat16 or float32"
        )
    return result


def check_function(
    known: Mapping[str, Any], model: ModelConfig, where: str, made_to_fit: Collection[str] = ()
) -> None:
    """Refuse weights of another function: of other shapes, or of the same by chance.

    Args:
        known: What a checkpoint says of its model; of keys that are absent, nothing.
        where: The checkpoint, for the message.
        made_to_fit: Keys that may differ.

    Raises:
        CheckpointError: Every key in which it is of another model is listed.
    """
    problems = [
        f"{key} is {known[key]!r} there, {value!r} in the configuration"
        for key, value in _unlike(known, model).items()
        if key not in made_to_fit
    ]
    if problems:
        heading = f"{where} is of another model; mend the configuration, or read another:"
        raise CheckpointError("\n  - ".join([heading, *problems]))


def _unlike(known: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Return the model's values of keys by which what is known would be another function."""
    free = FREE | LENGTHS
    if not any(0 < window < model.seq for window in (model.window, known.get("window", 0))):
        free |= {"window", "window_every"}  # all tokens before are seen, in every layer
    return {
        key: value
        for key, value in dataclasses.asdict(model).items()
        if key in known and key not in free and not _same(known[key], value)
    }


def _same(one: Any, other: Any) -> bool:
    """Whether values are equal: numbers as float32, in which some formats keep them."""
    if isinstance(one, float) and isinstance(other, float):
        return bool(np.float32(one) == np.float32(other))
    return bool(one == other)


def fitted(source: Source, model: ModelConfig) -> Source:
    """Return a source as the model needs it: checked, its vocabulary padded if need be.

    Of a table of learned positions that is longer than the model's, the first are taken.

    Raises:
        CheckpointError: It lacks arrays of the model, or has others; every one is listed. Or rows
            that pad its vocabulary would be taken for tokens, or positions are missing.
    """
    table = source.arrays.get(TABLE)
    if table and len(table.shape) == 2 and table.shape[0] < model.n_vocab:
        if not model.head_bias and model.n_tokens > table.shape[0]:
            raise CheckpointError(
                f"{source.where} has {table.shape[0]} rows in its vocabulary, n_vocab is "
                f"{model.n_vocab}; a head without a bias must be told which of them are padding: "
                f"set n_tokens to {table.shape[0]} or less"
            )
        source = WithVocabulary(source, model.n_vocab)
    learned = source.arrays.get(Key(PARAMS, _POSITIONS))
    if learned and model.pe == "fixed" and len(learned.shape) == 2:
        source = _with_positions(source, learned.shape[0], model)
    needed = model_arrays(model)
    held = {key: array.shape for key, array in source.arrays.items() if key.kind == PARAMS}
    problems = [
        f"{key}: {list(held[key]) if key in held else 'nothing'} in the checkpoint, "
        f"{list(needed[key]) if key in needed else 'nothing'} by the configuration"
        for key in sorted(held.keys() | needed.keys(), key=str)
        if held.get(key) != needed.get(key)
    ]
    if problems:
        keys = [
            f"configuration key {key}: {source.known[key]!r} in the checkpoint, {value!r} here"
            for key, value in _unlike(source.known, model).items()
        ]
        heading = f"{source.where} does not fit the configuration:"
        raise CheckpointError("\n  - ".join([heading, *first_of(problems), *keys]))
    return source


def _with_positions(source: Source, n_rows: int, model: ModelConfig) -> Source:
    """Return a source with as many learned positions as the model has."""
    offset = source.known.get("pe_offset", model.pe_offset)
    if offset < model.pe_offset:
        raise CheckpointError(
            f"{source.where} has its first position in row {offset} of their table, pe_offset is "
            f"{model.pe_offset}: set pe_offset to {offset}"
        )
    if (n_learned := n_rows - offset) < model.seq:
        raise CheckpointError(
            f"{source.where} has learned {n_learned} positions, seq is {model.seq}: set seq to "
            f"{n_learned} or less"
        )
    if offset > model.pe_offset:
        source = without_offset(source, offset - model.pe_offset)
    if n_learned == model.seq:
        return source
    _logger.info(
        "%s has learned %d positions; the first %d are taken (seq)",
        *(source.where, n_learned, model.seq),
    )
    return WithPositions(source, model.seq + model.pe_offset)


def without_offset(source: Source, n: int) -> Source:
    """Return a source of whose table of learned positions the first rows, unused, are cut off."""
    learned = source.arrays.get(Key(PARAMS, _POSITIONS))
    return source if learned is None else WithPositions(source, learned.shape[0] - n, n)


class WithPositions:
    """A source of whose table of learned positions some rows are taken: from one on, so many."""

    def __init__(self, source: Source, n_rows: int, begin: int = 0) -> None:
        self._source, self._n_rows, self._begin = source, n_rows, begin
        self.where, self.about, self.step = source.where, source.about, source.step
        self.counts: Counts | None = source.counts
        self.known: Mapping[str, Any] = source.known
        if begin and "pe_offset" in source.known:
            self.known = {**source.known, "pe_offset": source.known["pe_offset"] - begin}
        self.arrays: Mapping[Key, Array] = {
            key: array._replace(shape=(n_rows, *array.shape[1:]))
            if key.path == _POSITIONS
            else array
            for key, array in source.arrays.items()
        }

    def read(self, key: Key) -> np.ndarray:
        """Read an array, without the rows that are not taken."""
        array = self._source.read(key)
        rows = slice(self._begin, self._begin + self._n_rows)
        return array[rows] if key.path == _POSITIONS else array


class WithVocabulary:
    """A source with another number of rows in its vocabulary.

    Rows that are added are zeros, with a bias in the head by which they get no probability. A head
    without one gives them none from the configuration's `n_tokens` on. Who has rows cut off must
    know that they are padding.
    """

    def __init__(self, source: Source, n_vocab: int) -> None:
        self._source, self._n_vocab = source, n_vocab
        self.where, self.about, self.step = source.where, source.about, source.step
        self.counts: Counts | None = source.counts
        self.known: Mapping[str, Any] = {**source.known, "n_vocab": n_vocab}
        self.arrays: Mapping[Key, Array] = {
            key: array._replace(shape=self._shape(key, array.shape))
            for key, array in source.arrays.items()
        }

    def _shape(self, key: Key, shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = _VOCAB_AXIS.get(key.path)
        if axis is None:
            return shape
        return (*shape[:axis], self._n_vocab, *shape[axis + 1 :])

    def read(self, key: Key) -> np.ndarray:
        """Read an array, with rows added or cut off if it is of the vocabulary."""
        array = self._source.read(key)
        axis = _VOCAB_AXIS.get(key.path)
        if axis is None:
            return array
        more = self._n_vocab - array.shape[axis]
        if more <= 0:
            return array[(slice(None),) * axis + (slice(self._n_vocab),)]
        is_bias = key.kind == PARAMS and key.path.endswith("unembed/b")
        pads = [(0, more if i == axis else 0) for i in range(array.ndim)]
        return np.pad(array, pads, constant_values=PADDING_BIAS if is_bias else 0)


def weights_dtype(source: Source) -> np.dtype[Any]:
    """Return the dtype of a source's weights: of the largest, if they differ."""
    arrays = [array for key, array in source.arrays.items() if key.kind == PARAMS]
    return max(arrays, key=lambda array: array.n_bytes).dtype


def n_bytes(source: Source, dtype: np.dtype[Any] | None, *, moments: bool) -> int:
    """Return how many bytes a source's arrays are, its weights in `dtype` if that is given."""
    return sum(
        array.n_bytes
        if key.kind in (MU, NU) or dtype is None
        else array.n_bytes // array.dtype.itemsize * dtype.itemsize
        for key, array in source.arrays.items()
        if moments or key.kind == PARAMS
    )
