"""From any format to any other, array by array: what is written appears when it is whole."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from mesh_transformer import network_rules, storage
from mesh_transformer.checkpoints import huggingface, native_writer, opening, original
from mesh_transformer.checkpoints.fitting import WithVocabulary, fitted, n_bytes, weights_dtype
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.npz import BFLOAT16
from mesh_transformer.checkpoints.opening import UNFINISHED
from mesh_transformer.checkpoints.source import Source
from mesh_transformer.config import Config

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}
GIGABYTE = 10**9

_REPLACED = "replaced"  # ends the name of an old folder while the new one takes its place
_FULL = "make room there, or name a folder on another disk"
_LOCKED = "name a folder in which you may write"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ADVICE = dict.fromkeys(_NO_ROOM, _FULL) | dict.fromkeys(
    (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST), _LOCKED
)

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to make of a checkpoint.

    Attributes:
        format: "native"; "original", with optimizer state if there is any; "slim", the same without
            it and in bfloat16; "hf".
        n_shards: Of "original" and "slim".
        dtype: Of the weights: a key of `DTYPES`. None leaves them as they are, and makes float32
            ones bfloat16 in "slim".
        n_vocab: Rows of the vocabulary, padded or cut from what there are. None keeps them.
        file_gb: Gigabytes in each file of "hf", at most.
    """

    format: Literal["native", "original", "slim", "hf"]
    n_shards: int = 1
    dtype: str | None = None
    n_vocab: int | None = None
    file_gb: float = 5.0


class Plan(NamedTuple):
    """What a conversion will write.

    Attributes:
        dtype: Of the weights; None leaves each as it is.
        moments: Whether optimizer state is among it.
        n_bytes: How much, in all.
    """

    dtype: np.dtype[Any] | None
    moments: bool
    n_bytes: int


def plan(source: Source, what: Conversion) -> Plan:
    """Say what a conversion of a checkpoint will write."""
    dtype = DTYPES[what.dtype] if what.dtype else None
    if what.format == "slim" and dtype is None and weights_dtype(source) == np.float32:
        dtype = BFLOAT16
    if what.format == "hf":
        dtype = dtype or weights_dtype(source)
    moments = what.format in ("native", "original") and source.counts is not None
    return Plan(dtype, moments, n_bytes(source, dtype, moments=moments))


def convert(
    source: Source,
    config: Config,
    output: str,
    what: Conversion,
    *,
    position: Mapping[str, Any],
    overwrite: bool = False,
    eot_id: int | None = None,
    write_tokenizer: Callable[[str], None] = lambda folder: None,
    advance: Callable[[int], object] = lambda n: None,
) -> None:
    """Write a checkpoint in another format.

    Args:
        source: What to write.
        config: Of its model.
        output: Folder to write; for "native" a run's, in which training can go on.
        position: Where training would go on in its data, for "native"; no other format says.
        overwrite: Whether an existing folder is replaced, once the new one is whole.
        eot_id: The tokenizer's end of text, for "hf".
        write_tokenizer: Adds a tokenizer's files to a Hugging Face folder.
        advance: Called with the bytes of each array written; the plan knows their sum.

    Raises:
        CheckpointError: The checkpoint does not fit the configuration or is damaged, the format
            cannot hold the model, or there is something at `output` or too little space.
    """
    if not what.file_gb > 0:
        raise CheckpointError(f"files of {what.file_gb:g} GB are asked for; needed is more than 0")
    if what.n_vocab is not None:
        model = dataclasses.replace(config.model, n_vocab=what.n_vocab)
        config = dataclasses.replace(config, model=model)
        source = WithVocabulary(source, what.n_vocab)
    check_apart(output, source)
    source, model = fitted(source, config.model), config.model
    dtype, moments, total = plan(source, what)
    _check_shards(what, config)
    if source.counts is not None and not moments:
        _logger.info("the optimizer state is left out: %s holds weights alone", what.format)
    with becoming(output, total, overwrite=overwrite) as folder:
        if what.format == "native":
            step = storage.join(folder, "checkpoints", f"step_{source.step}")
            extra = {"config": config.to_flat(), "position": dict(position)}
            native_writer.write(
                step, source, extra=extra, dtype=dtype, moments=moments, advance=advance
            )
        elif what.format == "hf":
            shown: Any = {"shard_bytes": int(what.file_gb * GIGABYTE), "eot_id": eot_id}
            dtype = dtype or weights_dtype(source)
            huggingface.write(folder, source, model, dtype=dtype, advance=advance, **shown)
            write_tokenizer(folder)
        else:
            shared: Any = {"n_shards": what.n_shards, "dtype": dtype, "moments": moments}
            original.write(folder, source, model, advance=advance, **shared)


def check_apart(output: str, source: Source) -> None:
    """Refuse to write where the checkpoint lies that is read.

    Raises:
        CheckpointError: Says so.
    """
    if storage.is_remote(output) or storage.is_remote(source.where):
        return
    written, read = (os.path.realpath(path) for path in (output, source.where))
    if os.path.commonpath([written, read]) == written:
        raise CheckpointError(
            f"{output} holds {source.where}, which is read: name another folder to write"
        )


@contextlib.contextmanager
def becoming(folder: str, needed: int, *, overwrite: bool) -> Iterator[str]:
    """Give a folder to write into, which becomes `folder` when the block ends without an error.

    On a local disk it is written beside and renamed. In a bucket, where nothing can be renamed, a
    file named "unfinished" is in it until it is whole, and nothing is ever replaced.

    Raises:
        CheckpointError: There is something at `folder`, or too little space for `needed` bytes, or
            it cannot be written.
    """
    folder = folder.rstrip("/")
    if not storage.is_remote(folder):
        folder = os.path.realpath(folder)
        _take_back(folder)
    if storage.exists(folder) and (storage.is_remote(folder) or not overwrite):
        marked = storage.exists(storage.join(folder, UNFINISHED))
        raise CheckpointError(
            f"{folder} is there already{', unfinished' if marked else ''}: delete it or name "
            "another" + ("" if storage.is_remote(folder) else ", or give --overwrite")
        )
    if storage.exists(folder):
        _check_replaceable(folder)
    if storage.is_remote(folder):
        marker = storage.join(folder, UNFINISHED)
        storage.write_text_atomically(marker, "")
        yield folder
        storage.remove(marker)
        return
    with _told_by_name(folder):
        yield from _beside(folder, needed, overwrite=overwrite)


def _check_replaceable(folder: str) -> None:
    """Refuse to replace what is no checkpoint: a mistyped path must not cost its contents."""
    if os.path.isdir(folder) and not os.listdir(folder):
        return
    try:
        opening.find(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} is there already and no checkpoint, so --overwrite does not replace it: "
            "delete it or name another"
        ) from error


def _beside(folder: str, needed: int, *, overwrite: bool) -> Iterator[str]:
    """Give a folder beside a local one, which it becomes or replaces when it is whole."""
    beside = f"{folder}.{UNFINISHED}"
    os.makedirs(beside, exist_ok=True)
    with storage.alone(beside, f"another process is writing {folder}: wait for it, or end it"):
        for left in os.scandir(beside):  # by a conversion that was killed
            if left.is_dir(follow_symlinks=False):
                shutil.rmtree(left)
            else:
                os.unlink(left)
        yield from _replacing(folder, beside, needed, overwrite=overwrite)


def _replacing(folder: str, beside: str, needed: int, *, overwrite: bool) -> Iterator[str]:
    try:
        free = shutil.disk_usage(beside).free
        if free < needed:
            raise CheckpointError(
                f"{folder} needs {needed / GIGABYTE:.1f} GB, but {free / GIGABYTE:.1f} GB are free "
                "there: name a folder on another disk"
            )
        yield beside
        storage.sync(beside)
        if storage.exists(folder):
            if not overwrite:
                raise CheckpointError(
                    f"{folder} came to be there meanwhile: delete it or name another, or give "
                    "--overwrite"
                )
            replaced = f"{folder}.{_REPLACED}"
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(folder, replaced)
            os.rename(beside, folder)
            shutil.rmtree(replaced)
        else:
            os.rename(beside, folder)
        storage.sync_folder(os.path.dirname(folder))
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        _take_back(folder)


def _take_back(folder: str) -> None:
    """Undo half of a replacement: one that was killed, or failed, between its two renames."""
    replaced = f"{folder}.{_REPLACED}"
    if os.path.isdir(replaced) and not os.path.lexists(folder):
        os.rename(replaced, folder)


@contextlib.contextmanager
def _told_by_name(folder: str) -> Iterator[None]:
    """Say what to do where the system does not let a folder be written."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0)
        if advice is None:
            raise
        raise CheckpointError(f"{folder} cannot be written ({error}): {advice}") from error
    except CheckpointError as error:  # TensorStore has the system's words, but no number
        if not any(os.strerror(number) in str(error) for number in _NO_ROOM):
            raise
        raise CheckpointError(f"{folder} cannot be written ({error}): {_FULL}") from error


def _check_shards(what: Conversion, config: Config) -> None:
    model = config.model
    if what.format not in ("original", "slim"):
        return
    if what.n_shards < 1:
        raise CheckpointError(f"{what.n_shards} shards are asked for; needed is 1 or more")
    if not network_rules.unlike(network_rules.FUSED, vars(model)):
        raise CheckpointError(
            "mesh-transformer-jax's second model is read but not written: choose --format native"
        )
    original.check_computed(model)
    held = {"n_heads": model.n_heads, "n_vocab": model.n_vocab, "d_ff": model.d_ff}
    problems = [
        f"{what.n_shards} shards do not divide {key} {n}"
        for key, n in held.items()
        if n % what.n_shards
    ]
    if model.norm == "layernorm-desync" and what.n_shards > 1:
        problems.append("norm 'layernorm-desync' has no shards that compute what one does")
    if problems:
        raise CheckpointError("; ".join(problems))
