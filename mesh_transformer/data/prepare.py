"""Making a data set: text files in, one file of shuffled records and its index out."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from mesh_transformer import progress, storage
from mesh_transformer.data import DataError, dataset, documents, framing, packing
from mesh_transformer.data.encoding import Encoder, encode_to
from mesh_transformer.data.pairs import Pairs
from mesh_transformer.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_BYTES_PER_WORKER = 1 << 21


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What decides the content of a data set, besides its text and its tokenizer.

    Attributes:
        seq: Sequences hold seq + 1 tokens.
        encoder_seq: If not 0, the text is pairs of inputs and outputs, for an encoder and its
            decoder: sequences hold so many tokens more, first of all.
        pad_id: The token that fills up pairs.
        normalize_with_ftfy: Repair broken encodings, and NFKC.
        normalize_with_wikitext_detokenize: Undo WikiText's spacing.
        min_unique_tokens: Leave out sequences with fewer different tokens.
        n_repack_epochs: Use all documents this often, shuffled and cut differently each time.
        seed: Seeds the shuffling.
        preserve_data_order: Do not shuffle; files are taken in the order of their names.
        treat_eot_as_text: The end-of-text string inside a text is text, not a border of documents.
    """

    seq: int = 2048
    encoder_seq: int = 0
    pad_id: int = 0
    normalize_with_ftfy: bool = False
    normalize_with_wikitext_detokenize: bool = False
    min_unique_tokens: int = 0
    n_repack_epochs: int = 1
    seed: int = 10
    preserve_data_order: bool = False
    treat_eot_as_text: bool = False

    def __post_init__(self) -> None:
        if self.seq < 1:
            raise DataError(f"--seq is {self.seq}; it must be 1 or more")
        if self.n_repack_epochs < 1:
            raise DataError(f"--n-repack-epochs is {self.n_repack_epochs}; it must be 1 or more")
        if self.encoder_seq < 0 or self.pad_id < 0:
            raise DataError(
                f"--encoder-seq is {self.encoder_seq} and --pad-id {self.pad_id}; neither can be "
                "below 0"
            )
        if self.pad_id and not self.encoder_seq:
            raise DataError(f"--pad-id {self.pad_id} is of pairs, which --encoder-seq asks for")
        if self.encoder_seq and (self.min_unique_tokens > 0 or self.treat_eot_as_text):
            raise DataError(
                "--min-unique-tokens and --treat-eot-as-text are of running text; leave them out "
                "with --encoder-seq, whose pairs are taken as they are"
            )


@dataclasses.dataclass(frozen=True)
class Loss:
    """What an epoch leaves out.

    Attributes:
        n_trailing: Tokens at the end, too few for a sequence.
        n_excluded: Sequences with too few different tokens.
    """

    n_trailing: int
    n_excluded: int


@dataclasses.dataclass(frozen=True)
class Made:
    """What was made.

    Attributes:
        path: The TFRecord file.
        index: The index file that names it.
        replaced: Whether there was a TFRecord file of this name before.
        origin: What stands beside it.
        losses: What was left out, one entry for each epoch; of pairs nothing is.
        n_cut: Inputs and outputs that were too long for a record.
    """

    path: Path
    index: Path
    replaced: bool
    origin: dataset.Origin
    losses: list[Loss]
    n_cut: tuple[int, int] = (0, 0)

    def summary(self) -> str:
        """Say in a few lines what was written and what was left out."""
        of, bytes_per_token = self.origin, self.origin.document_bytes / self.origin.document_tokens
        read = "pairs" if of.encoder_seq else "documents"
        lines = [
            f"{self.path}: {of.sequences} sequences of {of.encoder_seq + of.seq + 1} tokens"
            + (" (replaced)" if self.replaced else ""),
            f"{self.index}: its index, for train_set or val_set",
            f"read {of.documents} {read}: {of.document_tokens} tokens of {of.tokenizer}, "
            f"{of.document_bytes} bytes ({bytes_per_token:.2f} bytes per token)",
        ]
        if of.encoder_seq:
            inputs, outputs = self.n_cut
            lines.append(
                f"cut {inputs} inputs of more than {of.encoder_seq} tokens and {outputs} outputs "
                f"of more than {of.seq}, their ends of text included"
            )
        for epoch, loss in enumerate(self.losses):
            excluded = f"{loss.n_excluded} sequences with too few different tokens and "
            lines.append(
                f"epoch {epoch}: left out {excluded if loss.n_excluded else ''}"
                f"{loss.n_trailing} tokens at the end, too few for a sequence"
            )
        return "\n".join(lines)


def create(
    input_path: Path,
    name: str,
    tokenizer: Tokenizer,
    options: Options,
    *,
    output_dir: Path = Path(),
    index: Path | None = None,
    workers: int | None = None,
) -> Made:
    """Make `{name}_{number of sequences}.tfrecords` from a text file or a folder of them.

    The file, a description of how it was made and an index file appear, in this order, once they
    are complete; older ones of the same name are replaced. Until then tokens wait on the disk of
    `output_dir`, 2 to 4 bytes each; memory is needed for some 40 bytes per document.

    Args:
        input_path: What to read.
        name: What to call the data set.
        tokenizer: What turns text into ids.
        options: What else decides the content.
        output_dir: Folder to write to; made if need be.
        index: Index file to write; `{output_dir}/{name}.index` by default.
        workers: Processes that tokenise; as many as there are cores by default. The outcome does
            not depend on it.

    Raises:
        DataError: The input cannot be read or does not fill a sequence, or nothing can be written.
    """
    index = index or output_dir / f"{name}.index"
    try:
        files = documents.find_files(input_path)
        _check_names(name, output_dir, index)
        output_dir.mkdir(parents=True, exist_ok=True)
        return _create(files, name, tokenizer, options, output_dir, index, workers)
    except OSError as error:
        raise DataError(f"{error.filename or output_dir}: {error.strerror}") from error


def _create(
    files: list[Path],
    name: str,
    tokenizer: Tokenizer,
    options: Options,
    output_dir: Path,
    index: Path,
    workers: int | None,
) -> Made:
    rng = None if options.preserve_data_order else random.Random(options.seed)
    if rng:
        rng.shuffle(files)
    _check_pad(tokenizer, options)
    with tempfile.TemporaryFile(dir=output_dir) as spool, _beside(output_dir, name) as temporary:
        texts, n_bytes = _tokenise(files, spool, tokenizer, options, workers)
        n_cut, losses = (0, 0), list[Loss]()
        if options.encoder_seq:
            pairs = Pairs(texts, options.encoder_seq, options.seq, options.pad_id)
            sequences, n_cut = _write_pairs(temporary, pairs, options, rng), pairs.n_cut()
        else:
            sequences, losses = _write(temporary, texts, tokenizer, options, rng)
        if not sequences:
            raise _nothing(texts, losses, options)
        origin = dataset.Origin(
            tokenizer=tokenizer.name,
            fingerprint=tokenizer.fingerprint,
            n_tokens=tokenizer.n_tokens,
            eot_id=tokenizer.eot_id,
            seq=options.seq,
            encoder_seq=options.encoder_seq,
            pad_id=options.pad_id,
            sequences=sequences,
            size=temporary.stat().st_size,
            documents=len(texts) // (2 if options.encoder_seq else 1),
            document_tokens=len(texts.tokens),
            document_bytes=n_bytes,
            options=dataclasses.asdict(options),
        )
        path = output_dir / f"{name}_{sequences}.tfrecords"
        replaced = path.exists()
        temporary.replace(path)
    storage.write_text_atomically(dataset.origin_path(str(path)), origin.to_json())
    storage.write_text_atomically(str(index), _as_seen_from(path, index.parent) + "\n")
    return Made(path, index, replaced, origin, losses, n_cut)


def _check_pad(tokenizer: Tokenizer, options: Options) -> None:
    if options.encoder_seq and (
        options.pad_id >= tokenizer.n_tokens or options.pad_id == tokenizer.eot_id
    ):
        raise DataError(
            f"--pad-id {options.pad_id} must be a token of {tokenizer.name}, below "
            f"{tokenizer.n_tokens}, and not {tokenizer.eot_id}, its end of text"
        )


def _check_names(name: str, output_dir: Path, index: Path) -> None:
    if not name or "/" in name:
        raise DataError(f"name is {name!r}; it must be a file name: folders go to --output-dir")
    if re.match(r"\w+:/", str(output_dir)):
        raise DataError(f"--output-dir is {output_dir}; write to a local folder, then copy it")
    if index.exists():
        own = re.compile(re.escape(name) + r"_\d+\.tfrecords")
        listed = [path for _, path in dataset.names_in(index.read_text(errors="replace"))]
        others = [path for path in listed if not own.fullmatch(Path(path).name)]
        if others:
            raise DataError(
                f"{index}: this index exists and lists other files ({others[0]} ...); name "
                "another one with --index, or remove it"
            )


def _tokenise(
    files: list[Path], spool: IO[bytes], tokenizer: Tokenizer, options: Options, workers: int | None
) -> tuple[packing.Documents, int]:
    encoder = Encoder(
        tokenizer,
        options.normalize_with_ftfy,
        options.normalize_with_wikitext_detokenize,
        options.pad_id if options.encoder_seq else None,
    )
    separator = None if options.treat_eot_as_text else tokenizer.eot_text
    n_input = sum(file.stat().st_size for file in files)
    workers = workers or min(len(os.sched_getaffinity(0)), 1 + n_input // _BYTES_PER_WORKER)
    with progress.stage("Tokenising", n_input) as advance:
        if options.encoder_seq:
            pieces = (p for file in files for p in documents.read_pairs(file, advance))
        else:
            pieces = (p for file in files for p in documents.read(file, separator, advance=advance))
        return encode_to(spool, pieces, encoder, workers)


@contextlib.contextmanager
def _beside(folder: Path, name: str) -> Iterator[Path]:
    """Give the path of a new file to be written and renamed; it is removed if it was not."""
    path = folder / f".{name}.{os.getpid()}.incomplete"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _write(
    path: Path,
    texts: packing.Documents,
    tokenizer: Tokenizer,
    options: Options,
    rng: random.Random | None,
) -> tuple[int, list[Loss]]:
    """Pack the documents and write the sequences; return how many, and what was left out."""
    length = options.seq + 1
    keep = _filter(tokenizer, options.min_unique_tokens)
    passes = packing.passes(texts, length, options.n_repack_epochs, rng, keep)
    losses: list[Loss] = []
    n_expected = len(texts.tokens) // length * options.n_repack_epochs
    with progress.stage("Writing", n_expected) as advance, path.open("wb") as file:

        def sequences() -> Iterator[np.ndarray]:
            for one in passes:
                losses.append(Loss(one.n_trailing, one.n_excluded))
                for sequence in one:
                    advance(1)
                    yield sequence

        n_sequences = framing.write(file, sequences())
        os.fsync(file.fileno())
        return n_sequences, losses


def _write_pairs(path: Path, pairs: Pairs, options: Options, rng: random.Random | None) -> int:
    """Write a record of each pair, in every pass; return how many."""
    n_passes = options.n_repack_epochs
    with progress.stage("Writing", len(pairs) * n_passes) as advance, path.open("wb") as file:

        def records() -> Iterator[np.ndarray]:
            for one in pairs.passes(n_passes, rng):
                for record in one:
                    advance(1)
                    yield record

        n_records = framing.write(file, records())
        os.fsync(file.fileno())
        return n_records


def _filter(tokenizer: Tokenizer, minimum: int) -> Callable[[np.ndarray], bool] | None:
    if minimum <= 0:
        return None

    def keep(sequence: np.ndarray) -> bool:
        unique = len(np.unique(sequence))
        if unique < minimum and logger.isEnabledFor(logging.DEBUG):
            text = tokenizer.decode(sequence.tolist())
            logger.debug("left out for only %d different tokens: %r", unique, text)
        return unique >= minimum

    return keep


def _nothing(texts: packing.Documents, losses: list[Loss], options: Options) -> DataError:
    if options.encoder_seq:
        return DataError("the input holds no pair of in_text and out_text")
    n_excluded = sum(loss.n_excluded for loss in losses)
    if n_excluded:
        return DataError(
            f"all {n_excluded} sequences have fewer than {options.min_unique_tokens} different "
            "tokens: lower --min-unique-tokens"
        )
    return DataError(
        f"the input's {len(texts)} documents with {len(texts.tokens)} tokens do not fill one "
        f"sequence of {options.seq + 1}: add text, or lower --seq"
    )


def _as_seen_from(path: Path, folder: Path) -> str:
    relative = os.path.relpath(path, folder)
    return str(path.resolve()) if relative.startswith("..") else relative
