"""Reading TFRecord files by tf.data: the only module that imports TensorFlow, and that late.

Every record is a `tf.train.Example` whose feature `text` is a list of token ids, one sequence.
Files are plain or ZLIB; by the original's convention the latter carry "zstd" in the path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import re
import sys
import types
import warnings
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np

from mesh_transformer import records, storage
from mesh_transformer.data import DataError, framing

Place = tuple[int, int]
"""The number of a file in a list of files, and the number of a record in it."""

logger = logging.getLogger(__name__)

_AGAIN = "make the file again with create_finetune_tfrecords.py, or copy it again if it is a copy"


@functools.cache
def _tensorflow() -> types.ModuleType:
    """Import TensorFlow without its start-up messages, and keep its hands off the accelerators."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _stderr_discarded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow as tf

        for kind in ("GPU", "TPU"):
            tf.config.set_visible_devices([], kind)
        tf.constant(0)  # the runtime starts here, and has its say
    return tf


@contextlib.contextmanager
def _stderr_discarded() -> Iterator[None]:
    """Send what native code writes to standard error nowhere: TensorFlow's cannot be turned off."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


@dataclasses.dataclass(frozen=True)
class RecordFile:
    """A file of records, as `inspect` found it.

    Attributes:
        path: A local path or a URL.
        compression: "" or "ZLIB".
        size: Its size in bytes.
    """

    path: str
    compression: str
    size: int

    @property
    def is_quickly_counted(self) -> bool:
        """Whether its records can be counted without reading them."""
        return not self.compression and not storage.is_remote(self.path)


def inspect(path: str) -> RecordFile:
    """Look at the beginning of a file and tell how to read it.

    Raises:
        DataError: There is no such file, it is empty, or it does not hold TFRecords.
    """
    size, head = _remote_head(path) if storage.is_remote(path) else _local_head(path)
    if not size:
        raise DataError(f"{path}: the file is empty (0 bytes); {_AGAIN}")
    if len(head) == 12 and records.masked_checksums([head[:8]])[0] == head[8:]:
        compression = ""
    elif head[0] & 0x0F == 8 and int.from_bytes(head[:2], "big") % 31 == 0:
        compression = "ZLIB"
    else:
        kinds = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstandard", b"\xfd7": "xz"}
        kind = kinds.get(head[:2])
        found = f"a {kind} file: unpack it" if kind else f"bytes {head.hex(' ')}: {_AGAIN}"
        raise DataError(f"{path}: needed TFRecords, plain or ZLIB; found {found}")
    if ("zstd" in path) != (compression == "ZLIB"):
        logger.info("%s: is %s, though its name does not say so", path, compression or "plain")
    return RecordFile(path, compression, size)


def _local_head(path: str) -> tuple[int, bytes]:
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size, file.read(12)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _remote_head(path: str) -> tuple[int, bytes]:
    tf = _tensorflow()
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            return file.size(), file.read(12)
    except tf.errors.UnimplementedError as error:
        raise DataError(
            f"{path}: TensorFlow reads local files and gs:// only; copy the file to one of them"
        ) from error
    except tf.errors.OpError as error:
        raise DataError(f"{path}: cannot be read: {error.message}") from error


def count(file: RecordFile, at_most: int = sys.maxsize) -> int:
    """Count the records of a file, up to a limit; plain local files are not read but skipped over.

    Raises:
        DataError: The file is corrupt or cut short.
    """
    if not file.is_quickly_counted:
        tf = _tensorflow()
        try:
            records = _records([file], (0, 0), repeat=False).take(at_most)
            return int(records.reduce(0, lambda n, *_: n + 1))
        except tf.errors.OpError as error:
            raise _explained(error, [file], (0, 0)) from error
    try:
        return framing.count(file.path, file.size, at_most)
    except EOFError as error:
        raise DataError(
            f"{file.path}: record {error.args[0]} is cut short or corrupt; {_AGAIN}"
        ) from error


def read_batches(
    files: Sequence[RecordFile],
    *,
    skip: Place,
    batch: int,
    length: int,
    n_vocab: int,
    repeat: bool,
    encoder_seq: int = 0,
) -> Generator[tuple[np.ndarray, list[Place]]]:
    """Read sequences in the order of the files, `batch` at a time, prefetching in the background.

    Args:
        files: The files of one epoch.
        skip: Where to begin: everything before this place is left out.
        batch: Sequences per array; the last array may hold fewer if not `repeat`.
        length: Tokens that every record must hold.
        n_vocab: Token ids must be below it.
        repeat: Begin again with the first file after the last, in the middle of a batch if need be.
        encoder_seq: How many of the tokens are for an encoder, for messages.

    Yields:
        int32 of shape (batch, length), and the place of each of its sequences.

    Raises:
        DataError: A record is corrupt, of another length, or holds an id outside the vocabulary.
    """
    tf = _tensorflow()
    dataset = _records(files, skip, repeat).batch(batch)
    dataset = dataset.map(functools.partial(_parse, length=length)).prefetch(8)
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = 2
    batches = dataset.with_options(options).as_numpy_iterator()
    place = skip
    while True:
        try:
            tokens, lengths, file_numbers, record_numbers = next(batches)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            raise _explained(error, files, place) from error
        places = list(zip(file_numbers.tolist(), record_numbers.tolist(), strict=True))
        _check(tokens, lengths, length, n_vocab, places, files, encoder_seq)
        place = (places[-1][0], places[-1][1] + 1)
        yield tokens.astype(np.int32), places


def _records(files: Sequence[RecordFile], skip: Place, repeat: bool) -> Any:
    """Make a tf.data pipeline of (serialized record, number of its file, number in the file)."""
    tf = _tensorflow()

    def numbered(path: Any, compression: Any, number: Any, n_skipped: Any) -> Any:
        records = tf.data.TFRecordDataset(path, compression_type=compression).skip(n_skipped)
        return records.enumerate(n_skipped).map(lambda i, record: (record, number, i))

    def epoch(first: int, n_skipped: int) -> Any:
        numbers = range(first, len(files))
        columns = (
            tf.constant([files[n].path for n in numbers], tf.string),
            tf.constant([files[n].compression for n in numbers], tf.string),
            tf.constant(list(numbers), tf.int64),
            tf.constant([n_skipped if n == first else 0 for n in numbers], tf.int64),
        )
        return tf.data.Dataset.from_tensor_slices(columns).flat_map(numbered)

    rest = epoch(*skip)
    return rest.concatenate(epoch(0, 0).repeat()) if repeat else rest


def _parse(records: Any, file_numbers: Any, record_numbers: Any, *, length: int) -> Any:
    tf = _tensorflow()
    features = {"text": tf.io.RaggedFeature(tf.int64)}
    tokens = tf.io.parse_example(records, features)["text"]
    return (
        tokens.to_tensor(shape=(None, length)),
        tokens.row_lengths(),
        file_numbers,
        record_numbers,
    )


def _check(
    tokens: np.ndarray,
    lengths: np.ndarray,
    length: int,
    n_vocab: int,
    places: list[Place],
    files: Sequence[RecordFile],
    encoder_seq: int,
) -> None:
    wrong = np.flatnonzero(lengths != length)
    if len(wrong):
        file, record = places[wrong[0]]
        found = lengths[wrong[0]]
        remedy = (
            f"set seq to {found - 1}, or make the data set again with --seq {length - 1}"
            if found > 2
            else "the file was made for something else; make the data set again"
        )
        seq = length - 1 - encoder_seq
        needed = f"seq {seq} needs {length}"
        if encoder_seq:
            needed = f"encoder_seq {encoder_seq} and seq {seq} need {length}"
            remedy = f"make the data set again with --encoder-seq {encoder_seq} --seq {seq}"
        raise DataError(
            f"{files[file].path}: record {record} holds {found} tokens in its feature "
            f'"text"; {needed}: {remedy}'
        )
    if tokens.min() < 0 or tokens.max() >= n_vocab:
        row, column = np.argwhere((tokens < 0) | (tokens >= n_vocab))[0]
        file, record = places[row]
        raise DataError(
            f"{files[file].path}: record {record} holds token id {tokens[row, column]} (at place "
            f"{column}), but n_vocab is {n_vocab}: raise n_vocab, or make the file with the "
            "tokenizer of this model"
        )


def _explained(error: Exception, files: Sequence[RecordFile], place: Place) -> DataError:
    """Find the record that tf.data failed on by reading one at a time from the last good place."""
    tf = _tensorflow()
    number, n = place
    for _ in range(len(files) + 1):
        records = _records(files[number : number + 1], (0, n), repeat=False).batch(1)
        records = records.map(functools.partial(_parse, length=0)).as_numpy_iterator()
        try:
            for _ in records:
                n += 1
        except tf.errors.OpError as found:
            reason = re.sub(r"\{\{.*?\}\} | \[Op:.*", "", found.message, flags=re.DOTALL)
            return DataError(f"{files[number].path}: record {n} cannot be read: {reason}; {_AGAIN}")
        number, n = (number + 1) % len(files), 0
    return DataError(f"{files[place[0]].path}: cannot be read from record {place[1]} on: {error}")
