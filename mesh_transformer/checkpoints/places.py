"""Where a conversion writes: a folder on a local disk or in a bucket, which is whole or not there.

target.unfinished/            on a disk: what is being written, beside its place, and then renamed
target.unfinished/unfinished  the marker of what a conversion has begun
target.replaced/              on a disk: what was there, between two renames and until it is gone
target.replaced/unfinished    the marker again, once the new folder is in its place
target/unfinished             in a bucket, which cannot rename: the marker of what is not whole
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping

from mesh_transformer import buckets, storage
from mesh_transformer.checkpoints import opening
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.opening import REPLACED, UNFINISHED, Format
from mesh_transformer.checkpoints.source import Source

GIGABYTE = 10**9

_FULL = "make room there, or name a folder on another disk"
_LOCKED = "name a folder in which you may write"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ADVICE = dict.fromkeys(_NO_ROOM, _FULL) | dict.fromkeys(
    (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST), _LOCKED
)
_MARK = "mesh-transformer writes here: while this file is there, what is beside it is not whole\n"
_MARKING = re.compile(rf"\.{UNFINISHED}\.[0-9a-f]{{32}}")
"""The marker, until it has its name: what is left where a conversion is killed that writes it."""
_MADE_OF: Mapping[Format, str] = {
    "native": r"checkpoints(/step_\d+.*)?"
    r"|about|state|files\.json|_CHECKPOINT_METADATA|commit_success\.txt",
    "original": r"shard_\d+",
    "huggingface": r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|(generation_|tokenizer_)?config\.json|(tokenizer|vocab|added_tokens|special_tokens_map)\.json"
    r"|(merges|vocab)\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.(json|jinja)"
    r"|additional_chat_templates|\.gitattributes|README\.md|LICENSE|USE_POLICY\.md",
    "jaxseq": r"params\.msgpack|config\.json",
    "zero-transformer": r"params_\d+(\.pth)?|model_config\.yaml",
    "cerebras": r"checkpoint_\d+\.mdl|params\.yaml",
}
"""What lies in a folder of each format that a conversion writes, and in the published ones."""
_ONE: Mapping[Format, str] = {
    "native": r"checkpoints/step_\d+",
    "zero-transformer": r"params_\d+(\.pth)?",
    "cerebras": r"checkpoint_\d+\.mdl",
}
"""What is a checkpoint by itself, of which a folder can hold several: a run's."""
_TOLD_BY: Mapping[Format, str] = {
    "zero-transformer": "model_config.yaml", "cerebras": "params.yaml",
}  # fmt: skip
"""What lies beside files that are written, where a name alone makes a checkpoint of any file."""


def check_apart(output: str, source: Source) -> None:
    """Refuse to write where the checkpoint lies that is read.

    Raises:
        CheckpointError: What is written would replace it, or what it lies in.
    """
    written, read = _whole(output), _whole(source.where)
    if f"{read}/".startswith(f"{written}/"):
        raise CheckpointError(
            f"{output} holds {source.where}, which is read: name another folder to write"
        )


def _whole(path: str) -> str:
    return (path if storage.is_remote(path) else os.path.realpath(path)).rstrip("/")


@contextlib.contextmanager
def becoming(folder: str, needed: int, *, overwrite: bool) -> Iterator[str]:
    """Give a folder to write into, which becomes `folder` when the block ends without an error.

    On a local disk it is written beside and renamed. In a bucket, where nothing can be renamed, a
    file named "unfinished" is in it until it is whole: what is replaced there is given up first.

    Raises:
        CheckpointError: There is something at `folder`, or too little space for `needed` bytes, or
            it cannot be written.
    """
    folder = folder.rstrip("/")
    if storage.is_remote(folder):
        yield from _in_bucket(folder, overwrite=overwrite)
        return
    folder = os.path.realpath(folder)
    with _told_by_name(folder):
        yield from _beside(folder, needed, overwrite=overwrite)


def _check_free(folder: str, *, overwrite: bool) -> None:
    """Refuse to replace what is there unasked, and what is no single checkpoint even so.

    A mistyped path must not cost its contents: a home may hold the file of a checkpoint by chance,
    and a run holds more than was ever converted.
    """
    if not storage.exists(folder):
        return
    if not overwrite:
        raise CheckpointError(
            f"{folder} is there already: delete it or name another, or give --overwrite"
        )
    if not storage.children(folder):
        if os.path.isdir(folder):
            return
        raise _irreplaceable(folder, "a file")
    try:
        format = opening.find(folder).format
    except CheckpointError as error:
        raise _irreplaceable(folder, "no checkpoint") from error
    names = _names(folder)
    told = _TOLD_BY.get(format)
    if format not in _MADE_OF or (told and told not in names):
        raise _irreplaceable(folder, "no checkpoint that is written here")
    if others := [name for name in names if not re.fullmatch(_MADE_OF[format], name)]:
        raise _irreplaceable(folder, f"holds {others[0]}, which is no part of a checkpoint")
    several = [name for name in names if re.fullmatch(_ONE.get(format, "(?!)"), name)][:2]
    if several[1:]:
        raise _irreplaceable(folder, f"holds more than one checkpoint, {' and '.join(several)}")


def _irreplaceable(folder: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} is there already and {what}, so --overwrite does not replace it: delete it or "
        "name another"
    )


def _names(folder: str) -> list[str]:
    """Name what lies in a folder, and in the folder of a run's checkpoints in it."""
    inside = storage.join(folder, "checkpoints")
    return [
        *storage.children(folder),
        *(f"checkpoints/{name}" for name in storage.children(inside)),
    ]


def _in_bucket(folder: str, *, overwrite: bool) -> Iterator[str]:
    """Give a folder of a bucket itself, with the marker in it until it is whole.

    The marker comes before all else and goes after all else, also when something is replaced: what
    a conversion leaves that is stopped at any time is known by it, and replaced by the next. That
    may still be writing, for all that can be told. So the marker says which began last; whoever
    finds another's at its end leaves its own, so that the other fails alike, and raises.
    """
    marker = storage.join(folder, UNFINISHED)
    if not _is_ours(marker):
        _check_free(folder, overwrite=overwrite)
    mark = f"{_MARK}{uuid.uuid4().hex}\n"
    storage.write_text_atomically(marker, mark)
    buckets.remove_folder(folder, but=UNFINISHED)
    with contextlib.ExitStack() as unless_whole:
        unless_whole.callback(_spoil, marker, mark)
        yield folder
        unless_whole.pop_all()
    if _leave_unfinished(marker, mark):
        raise CheckpointError(
            f"another process wrote {folder} at the same time, so that it is not whole: write it "
            "again, by one process"
        )
    storage.remove(marker)


def _spoil(marker: str, mark: str) -> None:
    """Do what `_leave_unfinished` does, if it can: its error would hide why that is done."""
    with contextlib.suppress(buckets.StorageError):
        _leave_unfinished(marker, mark)


def _leave_unfinished(marker: str, mark: str) -> bool:
    """Say whether a marker is another's, or gone; then write one's own, so that the other fails."""
    if _is_ours(marker, mark):
        return False
    storage.write_text_atomically(marker, mark)
    return True


def _is_ours(marker: str, mark: str = _MARK) -> bool:
    """Whether a conversion has left a marker; of another file of its name nothing is known."""
    try:
        return storage.read_bytes(marker).startswith(mark.encode())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False


def _beside(folder: str, needed: int, *, overwrite: bool) -> Iterator[str]:
    """Give a folder beside a local one, which it becomes or replaces when it is whole."""
    beside = f"{folder}.{UNFINISHED}"
    os.makedirs(beside, exist_ok=True)
    with storage.alone(beside, f"another process is writing {folder}: wait for it, or end it"):
        _mark(folder, beside)
        with contextlib.ExitStack() as unless_whole:
            unless_whole.callback(shutil.rmtree, beside, ignore_errors=True)
            _remove_replaced(folder)
            _check_free(folder, overwrite=overwrite)
            _remove_but_marker(beside)
            _check_room(folder, beside, needed)
            yield beside
            _replace(folder, beside, overwrite=overwrite)
            unless_whole.pop_all()
        _remove_replaced(folder)  # by now another process may have begun to write beside


def _mark(folder: str, beside: str) -> None:
    """Mark a folder as one to write in, if all that is in it has been left by a conversion.

    What is not marked any more was left between the renames, where the old folder has no name.
    """
    marker = storage.join(beside, UNFINISHED)
    if _is_ours(marker):
        return
    left = [name for name in _names(beside) if not _MARKING.fullmatch(name)]
    made_of = "|".join(_MADE_OF.values())
    if others := [name for name in left if not re.fullmatch(made_of, name)]:
        raise CheckpointError(
            f"{beside}, where all is written before it is whole, holds {others[0]}, which no "
            "conversion has left there: move it away"
        )
    if left:
        _take_back(folder)
    storage.write_text_atomically(marker, _MARK)


def _check_room(folder: str, beside: str, needed: int) -> None:
    """Refuse where the new folder, or the old one while it is replaced, would have no place."""
    replaced = f"{folder}.{REPLACED}"
    if os.path.lexists(folder) and os.path.lexists(replaced):
        raise CheckpointError(
            f"{replaced} is in the way: while {folder} is replaced it gets that name; move it away"
        )
    free = shutil.disk_usage(beside).free
    if free < needed:
        raise CheckpointError(
            f"{folder} needs {needed / GIGABYTE:.1f} GB, but {free / GIGABYTE:.1f} GB are free "
            "there: name a folder on another disk"
        )


def _replace(folder: str, beside: str, *, overwrite: bool) -> None:
    """Put a whole folder in its place."""
    replaced = f"{folder}.{REPLACED}"
    storage.sync(beside)
    os.unlink(storage.join(beside, UNFINISHED))
    is_there = storage.exists(folder)
    if is_there and not overwrite:
        raise CheckpointError(
            f"{folder} came to be there meanwhile: delete it or name another, or give --overwrite"
        )
    _check_free(folder, overwrite=overwrite)
    try:
        if is_there:
            os.rename(folder, replaced)
        os.rename(beside, folder)
    finally:
        if is_there:
            _take_back(folder)
    storage.sync_folder(os.path.dirname(folder))
    if is_there:
        storage.write_text_atomically(storage.join(replaced, UNFINISHED), _MARK)


def _take_back(folder: str) -> None:
    """Undo half of a replacement: one that was killed, or failed, between its two renames."""
    replaced = f"{folder}.{REPLACED}"
    if os.path.isdir(replaced) and not os.path.lexists(folder):
        os.rename(replaced, folder)


def _remove_replaced(folder: str) -> None:
    """Remove what was replaced, also where a conversion was killed that had begun to."""
    replaced = f"{folder}.{REPLACED}"
    marking = any(map(_MARKING.fullmatch, storage.children(replaced)))
    if marking or _is_ours(storage.join(replaced, UNFINISHED)):
        _remove_but_marker(replaced)
        shutil.rmtree(replaced)


def _remove_but_marker(folder: str) -> None:
    """Remove what a conversion has left in a folder; the marker tells of it to the last."""
    for left in os.scandir(folder):
        if left.is_dir(follow_symlinks=False):
            shutil.rmtree(left)
        elif left.name != UNFINISHED:
            os.unlink(left)


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
