"""Batches of sequences for training and validation, in an order that the files alone decide."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import logging
import math
from collections.abc import Generator, Iterator, Mapping

import numpy as np

from mesh_transformer.data import DataError, dataset, tfrecord
from mesh_transformer.data.tokenizer import Tokenizer

_LOOK_AT_ONCE = 16

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a data set has been read, counted in sequences: independent of the batch size.

    Attributes:
        epoch: How often the whole of it has been read before.
        sample: Sequences read in this epoch.
    """

    epoch: int = 0
    sample: int = 0

    def to_json(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> Position:
        """Read what `to_json` made.

        Raises:
            DataError: The value is something else.
        """
        match value:
            case {"epoch": int(epoch), "sample": int(sample)} if (
                len(value) == 2 and epoch >= 0 and sample >= 0
            ):
                return cls(epoch, sample)
        raise DataError(f'a data position needs counts "epoch" and "sample", found {value}')


class RecordSet:
    """The files of a data set, looked at once: their kind, their length, who made them.

    Args:
        index: An index file, or one .tfrecords file.
        seq: Sequences must hold seq + 1 tokens.
        encoder_seq: And so many more, first of all, for an encoder; 0: there is none.
        pad_id: What an encoder's and its decoder's are filled up with.
        n_vocab: Token ids must be below it.
        tokenizer: Files that say they were made by another one are refused.

    Raises:
        DataError: A file is missing, not a TFRecord file, or was made for something else.
    """

    def __init__(
        self,
        index: str,
        *,
        seq: int,
        n_vocab: int,
        tokenizer: Tokenizer | None,
        encoder_seq: int = 0,
        pad_id: int = 0,
    ) -> None:
        self.index = index
        self.length = encoder_seq + seq + 1
        self._encoder_seq = encoder_seq
        self.n_vocab = n_vocab

        wanted = {"seq": seq, "encoder_seq": encoder_seq, "pad_id": pad_id, "n_vocab": n_vocab}
        look = functools.partial(_look, wanted=wanted, tokenizer=tokenizer)
        with concurrent.futures.ThreadPoolExecutor(_LOOK_AT_ONCE) as pool:
            looked = list(pool.map(look, dataset.read_index(index)))
        self.files = [file for file, _ in looked]
        self._lengths = {
            file.path: origin.sequences if origin else tfrecord.count(file)
            for file, origin in looked
            if origin or file.is_quickly_counted
        }
        unknown = [file.path for file, origin in looked if not origin]
        if unknown:
            logger.info(
                "%s: %d of %d files (%s ...) come without a record of the tokenizer that made "
                "them; they are taken to be %s",
                index,
                len(unknown),
                len(self.files),
                unknown[0],
                tokenizer.name if tokenizer else "right",
            )

    def holds(self, n_sequences: int) -> bool:
        """Tell whether there are at least so many sequences, counting no further than that."""
        missing = n_sequences
        for file in self.files:
            missing -= self._lengths.get(file.path) or tfrecord.count(file, at_most=missing)
            if missing <= 0:
                return True
        return False

    def size(self) -> int:
        """Count the sequences."""
        return sum(map(self._length, self.files))

    def find(self, sample: int) -> tfrecord.Place:
        """Return the place of a sample; the place after the last one if that is what `sample` is.

        Raises:
            DataError: There are fewer.
        """
        left = sample
        for number, file in enumerate(self.files):
            if not left or left < self._length(file):
                return number, left
            left -= self._length(file)
        if left:
            raise DataError(
                f"{self.index}: holds {sample - left} sequences, but reading is to go on after "
                f"{sample} of them: it is not the data set that was read before"
            )
        return len(self.files), 0

    def _length(self, file: tfrecord.RecordFile) -> int:
        if file.path not in self._lengths:
            self._lengths[file.path] = tfrecord.count(file)
        return self._lengths[file.path]

    def read(
        self, place: tfrecord.Place, batch: int, *, repeat: bool
    ) -> Generator[tuple[np.ndarray, list[tfrecord.Place]]]:
        """Read from a place on: int32 arrays of shape (batch, T1), and where they were."""
        return tfrecord.read_batches(
            self.files,
            skip=place,
            batch=batch,
            length=self.length,
            encoder_seq=self._encoder_seq,
            n_vocab=self.n_vocab,
            repeat=repeat,
        )


def _look(
    listed: dataset.Listed, *, wanted: Mapping[str, int], tokenizer: Tokenizer | None
) -> tuple[tfrecord.RecordFile, dataset.Origin | None]:
    """Look at one file, and refuse it if it was made for something else."""
    try:
        file = tfrecord.inspect(listed.path)
        origin = dataset.read_origin(file.path)
        if origin:
            dataset.check_origin(origin, file.path, size=file.size, tokenizer=tokenizer, **wanted)
    except DataError as error:
        raise DataError(f"{listed.place}{error}") from error
    return file, origin


class TokenBatches:
    """Batches for training, without end; what is read from any position on is always the same.

    Batches run over the borders of files and epochs, so that no sequence is left out.

    Args:
        index: An index file, or one .tfrecords file.
        shape: Leading dimensions of a batch, for example (A, B).
        seq: Sequences hold seq + 1 tokens.
        encoder_seq, pad_id: As for `RecordSet`.
        n_vocab: Token ids must be below it.
        position: Where to go on; at the beginning by default.
        tokenizer: Files that say they were made by another one are refused.

    Raises:
        DataError: The data set cannot be used, holds less than a batch, or ends before `position`.
    """

    def __init__(
        self,
        index: str,
        *,
        shape: tuple[int, ...],
        seq: int,
        n_vocab: int,
        position: Position | None = None,
        tokenizer: Tokenizer | None = None,
        encoder_seq: int = 0,
        pad_id: int = 0,
    ) -> None:
        self._records = RecordSet(
            index,
            seq=seq,
            n_vocab=n_vocab,
            tokenizer=tokenizer,
            encoder_seq=encoder_seq,
            pad_id=pad_id,
        )
        self._shape = (*shape, self._records.length)
        self._batch = math.prod(shape)
        self._position = position or Position()
        if not self._records.holds(self._batch):
            raise DataError(
                f"{index}: holds {self._records.size()} sequences, less than one batch of "
                f"{self._batch} ({' x '.join(map(str, shape))}): add data, or lower "
                "per_replica_batch or gradient_accumulation_steps"
            )
        # The place of the sequence that was yielded last, or would have been.
        file, record = self._records.find(self._position.sample)
        self._last = file, record - 1
        self._batches = self._records.read((file, record), self._batch, repeat=True)

    @property
    def position(self) -> Position:
        """Where the next batch begins: exactly what has been yielded lies before it."""
        return self._position

    def __iter__(self) -> TokenBatches:
        return self

    def __next__(self) -> np.ndarray:
        tokens, places = next(self._batches)
        epoch, sample = self._position.epoch, self._position.sample
        for place in places:
            if place <= self._last:
                epoch, sample = epoch + 1, 0
            sample += 1
            self._last = place
        self._position = Position(epoch, sample)
        return tokens.reshape(self._shape)

    def close(self) -> None:
        """Stop reading ahead; there is no next batch then."""
        self._batches.close()


class ValidationBatches:
    """Every sequence of a data set once, as often as it is iterated over.

    Args:
        index: An index file, or one .tfrecords file.
        batch: Sequences per batch; the last batch is filled up with zeros that the mask leaves out.
        seq: Sequences hold seq + 1 tokens.
        encoder_seq, pad_id: As for `RecordSet`.
        n_vocab: Token ids must be below it.
        tokenizer: Files that say they were made by another one are refused.

    Raises:
        DataError: The data set cannot be used.
    """

    def __init__(
        self,
        index: str,
        *,
        batch: int,
        seq: int,
        n_vocab: int,
        tokenizer: Tokenizer | None = None,
        encoder_seq: int = 0,
        pad_id: int = 0,
    ) -> None:
        self._records = RecordSet(
            index,
            seq=seq,
            n_vocab=n_vocab,
            tokenizer=tokenizer,
            encoder_seq=encoder_seq,
            pad_id=pad_id,
        )
        self._batch = batch
        self._encoder_seq, self._pad_id = encoder_seq, pad_id

    def __len__(self) -> int:
        return -(-self._records.size() // self._batch)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield tokens_BT1 (int32) and mask_BT (bool, over the targets, which padding is not)."""
        for tokens, _ in self._records.read((0, 0), self._batch, repeat=False):
            tokens_BT1 = np.zeros((self._batch, tokens.shape[1]), np.int32)
            tokens_BT1[: len(tokens)] = tokens
            targets_BT = tokens_BT1[:, self._encoder_seq + 1 :]
            mask_BT = np.zeros(targets_BT.shape, bool)
            mask_BT[: len(tokens)] = True
            if self._encoder_seq:
                mask_BT &= targets_BT != self._pad_id
            yield tokens_BT1, mask_BT
