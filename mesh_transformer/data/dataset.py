"""Data sets: index files, and what stands beside a TFRecord file about how it was made."""

from __future__ import annotations

import dataclasses
import json
from pathlib import PurePath
from typing import NamedTuple

from mesh_transformer import storage
from mesh_transformer.data import DataError
from mesh_transformer.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """How a TFRecord file was made; kept as JSON beside it, under its name and ".json".

    Attributes:
        tokenizer: Name of the tokenizer.
        fingerprint: Its fingerprint.
        n_tokens: Its number of ids.
        eot_id: The id that ends a document.
        seq: Sequences hold seq + 1 tokens.
        encoder_seq: And so many more, first of all: see `pairs`; 0: there are no pairs.
        pad_id: What pairs are filled up with.
        sequences: How many there are.
        size: Size of the TFRecord file in bytes.
        documents: Documents read, once each.
        document_tokens: Tokens in them, ends of text included.
        document_bytes: Bytes of UTF-8 in them, after cleaning.
        options: The options that decide the content.
    """

    tokenizer: str
    fingerprint: str
    n_tokens: int
    eot_id: int
    seq: int
    encoder_seq: int = 0
    pad_id: int = 0
    sequences: int
    size: int
    documents: int
    document_tokens: int
    document_bytes: int
    options: dict[str, object]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def origin_path(path: str) -> str:
    """Name the file that says how the TFRecord file at `path` was made."""
    return path + ".json"


def read_origin(path: str) -> Origin | None:
    """Read how a TFRecord file was made; None if nothing stands beside it.

    Raises:
        DataError: What stands beside it is not such a description.
    """
    beside = origin_path(path)
    try:
        return Origin(**json.loads(storage.read_text(beside)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{beside}: not a description of a data set: {error}; make the data set again, or "
            "delete this file to go without its checks"
        ) from error


class Listed(NamedTuple):
    """A TFRecord file that an index names.

    Attributes:
        path: Where it is.
        place: The index and the line, for messages; "" for a file that was named directly.
    """

    path: str
    place: str


def read_index(index: str) -> list[Listed]:
    """List the TFRecord files of an index file, or of a TFRecord file that is itself named.

    An index file holds one path or URL a line; blank lines and lines that begin with # do not
    count. A relative path is looked for beside the index file, in the current folder, and in data/.

    Raises:
        DataError: A local file is missing, or the index lists none.
    """
    if index.endswith(".tfrecords"):
        return [Listed(_found(index, ["", "data"], ""), "")]
    index = _found(index, ["", "data"], "index file ")
    try:
        text = storage.read_text(index)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{index}: not an index file (a path a line); the name of a file of records must end "
            "in .tfrecords"
        ) from error
    folder = index.rpartition("/")[0] if storage.is_remote(index) else str(PurePath(index).parent)
    listed = []
    for number, name in names_in(text):
        place = f"{index}, line {number}: "
        listed.append(Listed(_found(name, [folder, "", "data"], place), place))
    if not listed:
        raise DataError(f"{index}: lists no file; it needs the path of a .tfrecords file a line")
    return listed


def names_in(index_text: str) -> list[tuple[int, str]]:
    """List the numbers of the lines of an index that count, and the paths there."""
    lines = ((number, line.strip()) for number, line in enumerate(index_text.splitlines(), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def _found(name: str, folders: list[str], place: str) -> str:
    """Return the first of the places for a name where there is a local file, or what is remote."""
    if storage.is_remote(name):
        return name
    paths = [storage.join(folder, name) if folder else name for folder in folders]
    for path in dict.fromkeys(paths):
        if storage.exists(path):
            return path
    raise DataError(
        f"{place}{name}: no such file (looked for {', '.join(dict.fromkeys(paths))}); "
        "create_finetune_tfrecords.py makes data sets and their index"
    )


def check_origin(
    origin: Origin,
    path: str,
    *,
    size: int,
    seq: int,
    n_vocab: int,
    tokenizer: Tokenizer | None,
    encoder_seq: int = 0,
    pad_id: int = 0,
) -> None:
    """Refuse a file that was made by another tokenizer, or for another model.

    Raises:
        DataError: They differ; the message names both.
    """
    if origin.size != size:
        raise DataError(
            f"{path}: has {size} bytes, but {origin_path(path)} was written for {origin.size}: "
            "the copy is incomplete, or the two do not belong together; copy both again"
        )
    if origin.seq != seq:
        raise DataError(
            f"{path}: was made with --seq {origin.seq}, and seq is {seq}: set seq to "
            f"{origin.seq}, or make the data set again with --seq {seq}"
        )
    made = (origin.encoder_seq, origin.pad_id if origin.encoder_seq else pad_id)
    if made != (encoder_seq, pad_id):
        raise DataError(
            f"{path}: was made with --encoder-seq {origin.encoder_seq} and --pad-id "
            f"{origin.pad_id}, and encoder_seq is {encoder_seq} and pad_id {pad_id}: set these "
            f"alike, or make the data set again with --encoder-seq {encoder_seq} --pad-id {pad_id}"
        )
    if tokenizer and origin.fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{path}: was made with the tokenizer {origin.tokenizer} (fingerprint "
            f"{origin.fingerprint[:12]}), and the configuration says {tokenizer.name} "
            f"({tokenizer.fingerprint[:12]}): set tokenizer to {origin.tokenizer}, or make the "
            f"data set again with --tokenizer {tokenizer.name}"
        )
    if origin.n_tokens > n_vocab:
        raise DataError(
            f"{path}: was made with the tokenizer {origin.tokenizer}, which has {origin.n_tokens} "
            f"tokens, and n_vocab is {n_vocab}: raise n_vocab"
        )
