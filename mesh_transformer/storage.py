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
import functools
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import IO, Any

from mesh_transformer.errors import UserError

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
    _sync_folder(target.parent)


def write_text_atomically(path: str, text: str) -> None:
    """Write a UTF-8 file so that readers see the old content or the new, never a part."""
    write_bytes_atomically(path, text.encode("utf-8"))


def _sync_folder(folder: pathlib.Path) -> None:
    """Make a rename in a folder survive a power failure; Windows has no such call."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
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


class _GoogleStore:
    """The few calls to Google Cloud Storage that smart-open does not make."""

    def __init__(self) -> None:
        import google.cloud.storage

        self.client = google.cloud.storage.Client()

    def put(self, bucket: str, key: str, data: bytes) -> None:
        self.client.bucket(bucket).blob(key).upload_from_string(
            data, content_type="application/octet-stream"
        )

    def keys(self, bucket: str, prefix: str) -> Iterator[str]:
        return (blob.name for blob in self.client.list_blobs(bucket, prefix=prefix))


class _S3Store:
    """The few calls to S3 that smart-open does not make."""

    def __init__(self) -> None:
        import boto3.session

        self.client = boto3.session.Session().client("s3")

    def put(self, bucket: str, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=bucket, Key=key, Body=data)

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
