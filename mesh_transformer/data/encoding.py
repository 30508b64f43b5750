"""Encoding documents on every core: pieces of text in, token ids on disk out, order kept."""

from __future__ import annotations

import array
import collections
import concurrent.futures
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

import numpy as np

from mesh_transformer.data import DataError, borders, cleaning
from mesh_transformer.data.documents import Piece
from mesh_transformer.data.packing import Documents
from mesh_transformer.data.tokenizer import Tokenizer

_CHARACTERS_PER_TASK = 1 << 19


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What is done to every piece of text.

    Attributes:
        tokenizer: Turns it into ids.
        fix_encoding: Repair it with ftfy first.
        detokenize_wikitext: Undo WikiText's spacing first.
        pad_id: The token that no text may hold, since records are filled up with it; None: any may.
    """

    tokenizer: Tokenizer
    fix_encoding: bool = False
    detokenize_wikitext: bool = False
    pad_id: int | None = None

    @property
    def dtype(self) -> np.dtype:
        """The smallest type that holds every id."""
        return np.dtype(np.uint16 if self.tokenizer.n_tokens <= 1 << 16 else np.uint32)

    def __call__(self, pieces: list[Piece]) -> _Encoded:
        """Encode pieces, with what `borders` puts before and after documents."""
        begin = borders.document_begin(self.tokenizer)
        tokens: list[int] = []
        ends, n_bytes = [], 0
        for piece in pieces:
            text = piece.text
            if self.fix_encoding:
                text = cleaning.fix_encoding(text)
            if self.detokenize_wikitext:
                text = cleaning.detokenize_wikitext(text)
            n_bytes += len(text.encode())
            try:
                ids = self.tokenizer.encode(text)
            except Exception as error:  # the package tokenizers has no class of its own for errors
                raise DataError(f"{piece.place}: cannot be tokenised: {error!r}") from error
            ids = [*begin, *ids] if piece.begins else ids
            if self.pad_id in ids:
                raise DataError(
                    f"{piece.place}: a text holds the token {self.pad_id}, which is what records "
                    "are filled up with: choose another --pad-id"
                )
            tokens += ids
            if piece.ends:
                tokens.append(self.tokenizer.eot_id)
                ends.append(len(tokens))
        return _Encoded(np.array(tokens, self.dtype), ends, n_bytes)


class _Encoded(NamedTuple):
    tokens: np.ndarray
    ends: list[int]
    n_bytes: int


class TokenFile:
    """Token ids in a file. (Mapped into memory they would count as memory that is in use.)"""

    def __init__(self, file: IO[bytes], dtype: np.dtype, n_tokens: int) -> None:
        self._file = file
        self._dtype = dtype
        self._n_tokens = n_tokens

    def __len__(self) -> int:
        return self._n_tokens

    def __getitem__(self, stretch: slice) -> np.ndarray:
        begin, end, _ = stretch.indices(self._n_tokens)
        size = self._dtype.itemsize
        data = os.pread(self._file.fileno(), (end - begin) * size, begin * size)
        return np.frombuffer(data, self._dtype)


def encode_to(
    spool: IO[bytes], pieces: Iterable[Piece], encoder: Encoder, workers: int
) -> tuple[Documents, int]:
    """Encode documents into a file and leave them there.

    Args:
        spool: An empty file; it must stay open while its tokens are in use.
        pieces: The documents.
        encoder: What is done to them.
        workers: Processes to use; 1 stays in this one. The outcome does not depend on it.

    Returns:
        The documents, and the bytes of UTF-8 that were encoded.

    Raises:
        DataError: A piece cannot be read or encoded, or a worker died.
    """
    tasks = _tasks(pieces)
    results = map(encoder, tasks) if workers == 1 else _in_processes(encoder, tasks, workers)
    ends = array.array("q")
    n_tokens = n_bytes = 0
    for encoded in results:
        spool.write(encoded.tokens.tobytes())
        ends.extend(n_tokens + end for end in encoded.ends)
        n_tokens += len(encoded.tokens)
        n_bytes += encoded.n_bytes
    spool.flush()
    return Documents(TokenFile(spool, encoder.dtype, n_tokens), np.array(ends, np.int64)), n_bytes


def _tasks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    task, size = [], 0
    for piece in pieces:
        task.append(piece)
        size += len(piece.text)
        if size >= _CHARACTERS_PER_TASK:
            yield task
            task, size = [], 0
    if task:
        yield task


def _in_processes(
    encoder: Encoder, tasks: Iterator[list[Piece]], workers: int
) -> Iterator[_Encoded]:
    """Encode tasks in other processes, a few ahead, and yield the results in the tasks' order."""
    pool = concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(encoder,),
    )
    pending: collections.deque[tuple[str, concurrent.futures.Future[_Encoded]]] = (
        collections.deque()
    )
    try:
        for task in tasks:
            pending.append((task[0].place, _submitted(pool, task)))
            if len(pending) > 2 * workers:
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _submitted(
    pool: concurrent.futures.ProcessPoolExecutor, task: list[Piece]
) -> concurrent.futures.Future[_Encoded]:
    try:
        return pool.submit(_work, task)
    except concurrent.futures.process.BrokenProcessPool as error:
        # A worker died just now. Its own task comes first in the order and names the place.
        refused: concurrent.futures.Future[_Encoded] = concurrent.futures.Future()
        refused.set_exception(error)
        return refused


def _result(place: str, future: concurrent.futures.Future[_Encoded]) -> _Encoded:
    try:
        return future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise DataError(
            f"{place}: a process that tokenised the text from here on was killed, perhaps for lack "
            "of memory; try again with fewer --workers"
        ) from error


_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is enough
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _work(pieces: list[Piece]) -> _Encoded:
    return _encoder(pieces)
