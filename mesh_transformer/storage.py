"""Files on local disks, in gs:// and in s3:// buckets, by one small set of functions.

A path is a plain string. Anything with a scheme (`gs://bucket/run`, `s3://bucket/run`) is remote
and streamed by smart-open; anything else is a local path and needs the standard library alone.
Nothing is decompressed on the way: the bytes of a `.gz` file are what comes back.

Object stores have no folders and cannot append: a remote file appears, whole, when it is closed.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import IO, Any

from mesh_transformer import buckets
from mesh_transformer.buckets import StorageError as StorageError
from mesh_transformer.errors import InUse

_SMALL = (".json", ".txt", ".model", ".jinja")  # a model's words, and how it is spoken to
TEMPLATES = "additional_chat_templates"
"""The folder in which a tokenizer has more than one template of chats."""


def is_remote(path: str) -> bool:
    """Whether a path has a scheme, as `gs://bucket/key` has."""
    return "://" in path


def join(root: str, *parts: str) -> str:
    """Join a root, local or remote, and relative parts with single slashes."""
    if is_remote(root):
        return "/".join([root.rstrip("/"), *(part.strip("/") for part in parts)])
    return os.path.join(root, *parts)


def open(path: str, mode: str = "r") -> IO[Any]:
    """Open a file for reading or writing, as text (UTF-8) or bytes.

    Folders above a local file to be written are made. A remote file that is being written appears
    when it is closed, and does not appear if the `with` block around it raises.

    Raises:
        FileNotFoundError: There is no such file to read.
        StorageError: The store cannot be reached, or it is asked to append.
    """
    encoding = None if "b" in mode else "utf-8"
    if not is_remote(path):
        if mode[0] in "wax":
            pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        return builtins.open(path, mode, encoding=encoding)
    return buckets.open(path, mode, encoding)


def read_bytes(path: str) -> bytes:
    """Read a whole file.

    Raises:
        FileNotFoundError: There is no such file.
    """
    with open(path, "rb") as file:
        data: bytes = file.read()
    return data


def read_text(path: str) -> str:
    """Read a whole UTF-8 file.

    Raises:
        FileNotFoundError: There is no such file.
    """
    return read_bytes(path).decode("utf-8")


def size(path: str) -> int:
    """Give the length of a file in bytes.

    Raises:
        FileNotFoundError: There is no such file.
    """
    return buckets.size(path) if is_remote(path) else os.stat(path).st_size


def read_into(path: str, begin: int, buffer: memoryview) -> int:
    """Fill a buffer with a range of a file: of a remote one, by a single request.

    Opened and sought in, a remote file would be asked for to its end at every turn.

    Returns:
        How many bytes there were; fewer than asked for where the file ends before.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if not len(buffer):
        return 0
    if is_remote(path):
        return buckets.read_into(path, begin, buffer)
    done = 0
    with builtins.open(path, "rb", buffering=0) as file:
        file.seek(begin)
        while done < len(buffer) and (n := file.readinto(buffer[done:])):
            done += n
    return done


def write_bytes_atomically(path: str, data: bytes) -> None:
    """Write a file so that readers, and a run killed meanwhile, see the old content or the new.

    Locally: a temporary file beside it, flushed to the disk, then renamed. Remotely: one put.
    """
    if is_remote(path):
        buckets.put(path, data)
        return
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with builtins.open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def write_text_atomically(path: str, text: str) -> None:
    """Write a UTF-8 file so that readers see the old content or the new, never a part."""
    write_bytes_atomically(path, text.encode("utf-8"))


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make a rename in a folder survive a power failure; Windows has no such call."""
    if os.name != "nt":
        _sync_path(str(folder))


def _sync_path(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exists(path: str) -> bool:
    """Whether there is a file, or a folder with something in it, at a path."""
    return buckets.exists(path) if is_remote(path) else os.path.exists(path)


def is_file(path: str) -> bool:
    """Whether there is a file at a path, and no folder; in a bucket, which may have both, alone."""
    return exists(path) and not children(path) if is_remote(path) else os.path.isfile(path)


def children(path: str) -> list[str]:
    """List the names of what is in a folder; nothing if there is none."""
    if is_remote(path):
        return buckets.children(path)
    return sorted(os.listdir(path)) if os.path.isdir(path) else []


def files(folder: str) -> list[str]:
    """List all files in a folder and in folders in it, as paths from there, in order."""
    if is_remote(folder):
        return buckets.files(folder)
    inside = ((os.path.relpath(place, folder), names) for place, _, names in os.walk(folder))
    return sorted(
        os.path.normpath(os.path.join(at, name)) for at, names in inside for name in names
    )


def with_small_files_here(path: str) -> str:
    """Copy a remote folder's texts and tables to this disk, for what reads local files alone.

    Args:
        path: The folder, or a file in it. What there is not becomes an empty folder.

    Returns:
        The copy of that; it has no weights, of folders only that of templates of chats, and goes
        when this process ends.
    """
    folder, name = path.rsplit("/", 1) if is_file(path) else (path, "")
    target = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    templates = (f"{TEMPLATES}/{name}" for name in children(join(folder, TEMPLATES)))
    for beside in (*children(folder), *templates):
        if beside.endswith(_SMALL) and not beside.endswith(".index.json"):
            write_bytes_atomically(join(target, beside), read_bytes(join(folder, beside)))
    return join(target, name)


def remove(path: str) -> None:
    """Delete a file.

    Raises:
        FileNotFoundError: There is none.
    """
    if is_remote(path):
        buckets.remove(path)
    else:
        os.unlink(path)


def remove_folder(path: str) -> None:
    """Delete a folder and all that is in it; do nothing if there is none."""
    if is_remote(path):
        buckets.remove_folder(path)
    elif os.path.lexists(path):
        shutil.rmtree(path)


@contextlib.contextmanager
def alone(folder: str, taken: str) -> Iterator[None]:
    """Keep other processes out of a local folder, until the `with` block ends or this one dies.

    The lock is on the folder itself: no file is left, and what this process starts inherits none.

    Raises:
        InUse: Another process has it; the message is `taken`.
    """
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InUse(taken) from error
        yield
    finally:
        os.close(held)


def sync(folder: str) -> None:
    """Make all that is in a local folder survive a power failure."""
    for place, _, names in os.walk(folder):
        for name in names:
            _sync_path(os.path.join(place, name))
        sync_folder(place)
