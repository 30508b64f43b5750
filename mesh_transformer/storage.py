"""Files on local disks, in gs:// and in s3:// buckets, by one small set of functions.

A path is a plain string. Anything with a scheme (`gs://bucket/run`, `s3://bucket/run`) is remote
and streamed by smart-open; anything else is a local path and needs the standard library alone.
Nothing is decompressed on the way: the bytes of a `.gz` file are what comes back.

Object stores have no folders and cannot append: a remote file appears, whole, when it is closed.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import functools
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import IO, Any

from mesh_transformer.errors import InUse, UserError

EXTRAS = {"gs": "gcs", "s3": "s3"}
"""The optional dependencies, `mesh-transformer[gcs]` and `[s3]`, that each scheme needs."""

_LOG_IN = {
    "gs": "To log in: gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "To log in: aws configure, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}


class StorageError(UserError):
    """Raised when a store cannot be reached at all: package, credentials, bucket or scheme."""


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
    if mode.rstrip("bt") not in ("r", "w"):
        raise StorageError(f"{path}: mode {mode!r} is for local files; object stores know r and w")
    import smart_open

    with _named_errors(path):
        return smart_open.open(
            path,
            mode,
            encoding=encoding,
            compression="disable",
            transport_params={"client": _store(path).client},
        )


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
    if not is_remote(path):
        return os.stat(path).st_size
    bucket, key = _split(path)
    with _named_errors(path):
        return _store(path).size(bucket, key)


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
    if not is_remote(path):
        with builtins.open(path, "rb", buffering=0) as file:
            file.seek(begin)
            return _fill(file, buffer)
    bucket, key = _split(path)
    with _named_errors(path):
        return _store(path).read_into(bucket, key, begin, buffer)


def _fill(file: Any, buffer: memoryview) -> int:
    """Read a stream into a buffer until one of them ends."""
    done = 0
    while done < len(buffer) and (n := file.readinto(buffer[done:])):
        done += n
    return done


class _Sink:
    """A stream to write to that fills a buffer."""

    def __init__(self, buffer: memoryview) -> None:
        self._buffer, self.done = buffer, 0

    def write(self, data: bytes) -> int:
        self._buffer[self.done : self.done + len(data)] = data
        self.done += len(data)
        return len(data)


def write_bytes_atomically(path: str, data: bytes) -> None:
    """Write a file so that readers, and a run killed meanwhile, see the old content or the new.

    Locally: a temporary file beside it, flushed to the disk, then renamed. Remotely: one put.
    """
    if is_remote(path):
        bucket, key = _split(path)
        with _named_errors(path):
            _store(path).put(bucket, key, data)
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
    if not is_remote(path):
        return os.path.exists(path)
    bucket, key = _split(path)
    with _named_errors(path):
        found = _store(path).keys(bucket, key.rstrip("/"))
        return any(other == key or other.startswith(key.rstrip("/") + "/") for other in found)


def children(path: str) -> list[str]:
    """List the names of what is in a folder; nothing if there is none."""
    if not is_remote(path):
        return sorted(os.listdir(path)) if os.path.isdir(path) else []
    bucket, key = _split(path)
    prefix = key.rstrip("/") + "/" if key.strip("/") else ""
    with _named_errors(path):
        found = _store(path).keys(bucket, prefix)
        return sorted({other.removeprefix(prefix).partition("/")[0] for other in found} - {""})


def remove(path: str) -> None:
    """Delete a file.

    Raises:
        FileNotFoundError: There is none.
    """
    if not is_remote(path):
        os.unlink(path)
        return
    bucket, key = _split(path)
    with _named_errors(path):
        _store(path).remove(bucket, key)


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


class _GoogleStore:
    """The few calls to Google Cloud Storage that smart-open does not make."""

    def __init__(self) -> None:
        import google.cloud.storage

        self.client = google.cloud.storage.Client()

    def put(self, bucket: str, key: str, data: bytes) -> None:
        self.client.bucket(bucket).blob(key).upload_from_string(
            data, content_type="application/octet-stream"
        )

    def remove(self, bucket: str, key: str) -> None:
        self.client.bucket(bucket).blob(key).delete()

    def size(self, bucket: str, key: str) -> int:
        blob = self.client.bucket(bucket).blob(key)
        blob.reload()
        return int(blob.size)

    def read_into(self, bucket: str, key: str, begin: int, buffer: memoryview) -> int:
        sink = _Sink(buffer)
        self.client.bucket(bucket).blob(key).download_to_file(
            sink, start=begin, end=begin + len(buffer) - 1, raw_download=True, checksum=None
        )
        return sink.done

    def keys(self, bucket: str, prefix: str) -> Iterator[str]:
        return (blob.name for blob in self.client.list_blobs(bucket, prefix=prefix))


class _S3Store:
    """The few calls to S3 that smart-open does not make."""

    def __init__(self) -> None:
        import boto3.session

        self.client = boto3.session.Session().client("s3")

    def put(self, bucket: str, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def remove(self, bucket: str, key: str) -> None:
        self.client.delete_object(Bucket=bucket, Key=key)

    def size(self, bucket: str, key: str) -> int:
        return int(self.client.head_object(Bucket=bucket, Key=key)["ContentLength"])

    def read_into(self, bucket: str, key: str, begin: int, buffer: memoryview) -> int:
        wanted = f"bytes={begin}-{begin + len(buffer) - 1}"
        with contextlib.closing(
            self.client.get_object(Bucket=bucket, Key=key, Range=wanted)["Body"]
        ) as body:
            return _fill(body, buffer)

    def keys(self, bucket: str, prefix: str) -> Iterator[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return (found["Key"] for page in pages for found in page.get("Contents", ()))


_STORES: dict[str, type[_GoogleStore] | type[_S3Store]] = {"gs": _GoogleStore, "s3": _S3Store}


def _scheme(path: str) -> str:
    scheme = path.partition("://")[0]
    if scheme not in _STORES:
        known = ", ".join(f"{known}://" for known in _STORES)
        raise StorageError(f"{path}: {scheme}:// is not supported; use a local path, {known}")
    return scheme


def _split(path: str) -> tuple[str, str]:
    """Split a remote path into its bucket and the key in it."""
    bucket, _, key = path.removeprefix(_scheme(path) + "://").partition("/")
    if not bucket:
        raise StorageError(f"{path}: a bucket's name is needed after ://")
    return bucket, key


@functools.cache
def _connect(scheme: str) -> _GoogleStore | _S3Store:
    return _STORES[scheme]()


def _store(path: str) -> _GoogleStore | _S3Store:
    return _connect(_scheme(path))


@contextlib.contextmanager
def _named_errors(path: str) -> Iterator[None]:
    """Say in one sentence what is wrong when a store, its package or a file in it is not there."""
    scheme = _scheme(path)
    try:
        yield
    except ImportError as error:
        raise StorageError(
            f"{path}: {scheme}:// needs a package that is not installed ({error}): "
            f'pip install "mesh-transformer[{EXTRAS[scheme]}]"'
        ) from error
    except _store_errors(scheme) as error:
        if _status(error) == 404:
            raise FileNotFoundError(errno.ENOENT, "no such file or bucket", path) from error
        raise StorageError(
            f"{path}: the store refuses or cannot be reached ({error}). {_LOG_IN[scheme]}"
        ) from error


def _store_errors(scheme: str) -> tuple[type[Exception], ...]:
    """Name what the scheme's package raises; it is installed, or `ImportError` came first."""
    if scheme == "gs":
        import google.api_core.exceptions
        import google.auth.exceptions

        return (
            google.api_core.exceptions.GoogleAPIError,
            google.auth.exceptions.GoogleAuthError,
            OSError,
        )
    import botocore.exceptions

    return (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, OSError)


def _status(error: Exception) -> int | None:
    """Find the HTTP status behind an error of either package, or of smart-open around it."""
    cause = error.__cause__ if isinstance(error, OSError) and error.__cause__ else error
    code = getattr(cause, "code", None)
    response = getattr(cause, "response", None)
    if isinstance(response, dict):
        code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return int(code) if code is not None else None
