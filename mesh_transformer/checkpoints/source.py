"""What every format is read as: arrays by our own names, one layer at a time.

A `Source` knows what a checkpoint holds before any array of it is read, and then reads one array at
a time. So conversion and loading need memory for one array of one layer, whatever the model's size.
Writers ask a source for what they need, in the order in which they need it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

PARAMS, MU, NU = "params", "mu", "nu"
"""Kinds of arrays: weights, and Adam's two moments, which have the weights' paths and shapes."""


class Key(NamedTuple):
    """Which array.

    Attributes:
        kind: PARAMS, MU or NU.
        path: As in our parameter trees: "decoder/layers/block/attention/q/w".
        layer: Which of the layers, which our trees stack; None for what is not part of a layer.
    """

    kind: str
    path: str
    layer: int | None = None

    def __str__(self) -> str:
        return f"{self.kind}/{self.path}" + ("" if self.layer is None else f"[{self.layer}]")


TABLE = Key(PARAMS, "decoder/embed/embeddings")
TABLE_BIAS = Key(PARAMS, "decoder/embed/b")
"""The embedding, and its bias, which other programs' models lack."""


class Array(NamedTuple):
    """An array that is not read yet; its shape is that of one layer's, where layers are stacked."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Counts(NamedTuple):
    """How many updates the parts of an optimizer have seen.

    Attributes:
        adam: Of Adam, for the correction of its moments' bias.
        schedule: Of the learning-rate schedule.
    """

    adam: int
    schedule: int


class Source(Protocol):
    """A checkpoint of any format, opened and checked; nothing of its arrays is read yet."""

    @property
    def where(self) -> str:
        """Its path or URL, for messages."""
        ...

    @property
    def about(self) -> str:
        """What it is, in a few words: "original checkpoint of 8 shards, bfloat16"."""
        ...

    @property
    def step(self) -> int:
        """Optimizer steps that its weights have taken; 0 where the format does not say."""
        ...

    @property
    def counts(self) -> Counts | None:
        """Of the optimizer whose moments it holds; None where it holds weights alone."""
        ...

    @property
    def known(self) -> Mapping[str, Any]:
        """The keys of a configuration that the checkpoint itself holds; empty if none."""
        ...

    @property
    def arrays(self) -> Mapping[Key, Array]:
        """Everything in it: each weight, and each moment if `counts` is given."""
        ...

    def read(self, key: Key) -> np.ndarray:
        """Read one array, in the dtype and shape that `arrays` says.

        Raises:
            CheckpointError: It is damaged or cannot be read; the message names its file.
        """
        ...


Wanted = TypeVar("Wanted")


@contextlib.contextmanager
def ahead(
    read: Callable[[Wanted], np.ndarray], wanted: Iterable[Wanted]
) -> Iterator[Callable[[Wanted], np.ndarray]]:
    """Give what reads arrays, to be asked for in this order: each while the one before is used.

    The one that is given and what reading the next one needs are in memory at once, if who is given
    one lets go of it before asking for the next.
    """
    left = iter(wanted)
    coming: list[tuple[Wanted, concurrent.futures.Future[np.ndarray]]] = []
    with concurrent.futures.ThreadPoolExecutor(1) as reader:

        def begin_next() -> None:
            for what in itertools.islice(left, 1):
                coming.append((what, reader.submit(read, what)))

        def next_one(what: Wanted) -> np.ndarray:
            expected, future = coming.pop()
            assert expected == what, f"{what} is asked for before {expected}"
            array = future.result()
            begin_next()
            return array

        begin_next()
        yield next_one
