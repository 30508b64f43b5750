"""Where a conversion writes: a folder on a local disk or in a bucket, which is whole or not there.

target.unfinished/    on a disk: what is being written, beside its place, and then renamed
target.replaced/      on a disk: what was there, between two renames
target/unfinished     in a bucket, which cannot rename: the marker of what is not whole
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator

from mesh_transformer import buckets, storage
from mesh_transformer.checkpoints import opening
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.opening import UNFINISHED
from mesh_transformer.checkpoints.source import Source

GIGABYTE = 10**9

_REPLACED = "replaced"  # ends the name of an old folder while the new one takes its place
_FULL = "make room there, or name a folder on another disk"
_LOCKED = "name a folder in which you may write"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ADVICE = dict.fromkeys(_NO_ROOM, _FULL) | dict.fromkeys(
    (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST), _LOCKED
)
_MARK = "mesh-transformer writes here: while this file is there, what is beside it is not whole\n"


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
    _take_back(folder)
    _check_free(folder, overwrite=overwrite)
    with _told_by_name(folder):
        yield from _beside(folder, needed, overwrite=overwrite)


def _check_free(folder: str, *, overwrite: bool) -> None:
    """Refuse to replace what is there unasked, and what is no checkpoint even so."""
    if not storage.exists(folder):
        return
    if not overwrite:
        raise CheckpointError(
            f"{folder} is there already: delete it or name another, or give --overwrite"
        )
    _check_replaceable(folder)


def _in_bucket(folder: str, *, overwrite: bool) -> Iterator[str]:
    """Give a folder of a bucket itself, with the marker in it until it is whole.

    The marker comes before all else and goes after all else, also when something is replaced: what
    a conversion leaves that is stopped at any time is known by it, and replaced by the next.
    """
    marker = storage.join(folder, UNFINISHED)
    if not _is_ours(marker):
        _check_free(folder, overwrite=overwrite)
        storage.write_text_atomically(marker, _MARK)
    buckets.remove_folder(folder, but=UNFINISHED)
    yield folder
    storage.remove(marker)


def _is_ours(marker: str) -> bool:
    """Whether a conversion has left a marker; of another file of its name nothing is known."""
    try:
        return storage.read_text(marker) == _MARK
    except FileNotFoundError:
        return False


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
