"""Files in gs:// and s3:// buckets: the calls to Google Cloud Storage and to S3.

Object stores have no folders: a folder is what names have in common up to a slash. They cannot
append, and a file appears, whole, when it is closed. What a store refuses is an error that names
the path, never "nothing is there".
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

from mesh_transformer.errors import UserError

EXTRAS = {"gs": "gcs", "s3": "s3"}
"""The optional dependencies, `[gcs]` and `[s3]`, that each scheme needs."""

_LOG_IN = {
    "gs": "To log in: gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "To log in: aws configure, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
_MAKE = {
    "gs": "gcloud storage buckets create gs://{bucket}",
    "s3": "aws s3 mb s3://{bucket}",
}
_PART_BYTES = 32 * 2**20
"""Of an upload: what is held of a file that is being written. S3 takes 10,000 parts: 335 GB."""

_AT_A_TIME = 2**22  # bytes of an answer, which urllib3 holds once more
_NOT_FOUND, _NOT_IN_RANGE = 404, 416

T = TypeVar("T")


class StorageError(UserError):
    """Raised when a store cannot be reached at all: package, credentials, bucket or scheme."""


def open(path: str, mode: str, encoding: str | None) -> IO[Any]:
    """Open a file to read ("r", "rb") or to write ("w", "wb").

    Raises:
        FileNotFoundError: There is no such file to read.
        StorageError: The store cannot be reached, now or later, or it is asked to append.
    """
    if mode.rstrip("bt") not in ("r", "w"):
        raise StorageError(f"{path}: mode {mode!r} is for local files; object stores know r and w")
    import smart_open

    with _named_errors(path):
        shared: dict[str, Any] = {"client": _store(path).client}
        if mode[0] == "w":
            shared["min_part_size"] = _PART_BYTES
        opened: Any = smart_open.open(
            path, f"{mode[0]}b", compression="disable", transport_params=shared
        )
    if encoding and mode[0] == "r":
        opened = io.TextIOWrapper(opened, encoding)
    stream: Any = _Stream(path, opened, encoding or "")
    return stream


class _Stream:
    """A remote file that is open: what is written is passed on in parts, and errors are told."""

    def __init__(self, path: str, file: Any, encoding: str) -> None:
        self._path, self._file, self._encoding = path, file, encoding
        self.read = self._told(file.read)
        self.readline = self._told(file.readline)
        self.readlines = self._told(file.readlines)
        self.close = self._told(file.close)
        self._pass_on = self._told(file.write)

    def write(self, data: Any) -> int:
        """Write in parts, for Google's client would hold all that it is given at once."""
        whole = memoryview(data.encode(self._encoding) if isinstance(data, str) else data).cast("B")
        for begin in range(0, len(whole), _PART_BYTES):
            self._pass_on(whole[begin : begin + _PART_BYTES])
        return len(data) if isinstance(data, str) else len(whole)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __iter__(self) -> Iterator[Any]:
        while line := self.readline():
            yield line

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *raised: Any) -> None:
        if raised[0] is not None and self._file.writable():
            # Both clients complete an upload when it is collected, should giving it up fail too.
            self._file.close = lambda: None
            with contextlib.suppress(StorageError):  # what has been raised says why
                self._told(self._file.terminate)()
            return
        self._told(self._file.__exit__)(*raised)

    def _told(self, call: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(call)
        def told(*args: Any) -> T:
            with _named_errors(self._path):
                return call(*args)

        return told


def put(path: str, data: bytes) -> None:
    """Write a file by one request."""
    bucket, key = _split(path)
    with _named_errors(path):
        _store(path).put(bucket, key, data)


def size(path: str) -> int:
    """Give the length of a file in bytes.

    Raises:
        FileNotFoundError: There is no such file.
    """
    bucket, key = _split(path)
    with _named_errors(path):
        return _store(path).size(bucket, key)


def read_into(path: str, begin: int, buffer: memoryview) -> int:
    """Fill a buffer with a range of a file, by one request; return how many bytes there were.

    Raises:
        FileNotFoundError: There is no such file.
    """
    bucket, key = _split(path)
    with _named_errors(path):
        try:
            return _store(path).read_into(bucket, key, begin, buffer)
        except _store_errors(_scheme(path)) as error:
            if _status(error) == _NOT_IN_RANGE:
                return 0
            raise


def exists(path: str) -> bool:
    """Whether there is a file, or a folder with something in it, at a path."""
    bucket, key = _split(path)
    key = key.rstrip("/")
    if key:
        with contextlib.suppress(FileNotFoundError):
            size(path.rstrip("/"))
            return True
    prefix = key and key + "/"
    with _named_errors(path):
        # A folder may have been made as such, which is an empty file of its name.
        first = itertools.islice(_store(path).keys(bucket, prefix, at_most=2), 2)
        return any(other != prefix for other in first)


def children(path: str) -> list[str]:
    """List the names of what is in a folder, in order; nothing if there is none."""
    bucket, key = _split(path)
    prefix = key.rstrip("/") + "/" if key.strip("/") else ""
    with _named_errors(path):
        found = _store(path).children(bucket, prefix)
        return sorted({other.removeprefix(prefix).rstrip("/") for other in found} - {""})


def files(folder: str) -> list[str]:
    """List all files in a folder and in folders in it, as paths from there, in order."""
    bucket, key = _split(folder.rstrip("/") + "/")
    with _named_errors(folder):
        found = (other.removeprefix(key) for other in _store(folder).keys(bucket, key))
        return sorted(name for name in found if name and not name.endswith("/"))


def remove(path: str) -> None:
    """Delete a file.

    Raises:
        FileNotFoundError: There is none; S3 itself would not say so.
    """
    size(path)
    bucket, key = _split(path)
    with _named_errors(path):
        _store(path).remove(bucket, key)


def remove_folder(path: str, but: str | None = None) -> None:
    """Delete all that is in a folder, and in folders in it; do nothing if there is none.

    Args:
        but: A file in it that stays.
    """
    bucket, key = _split(path.rstrip("/") + "/")
    kept = but and f"{key}{but}"
    with _named_errors(path):
        for other in list(_store(path).keys(bucket, key)):
            if other != kept:
                _store(path).remove(bucket, other)


class _Sink:
    """A stream to write to that fills a buffer."""

    def __init__(self, buffer: memoryview) -> None:
        self._buffer, self.done = buffer, 0

    def write(self, data: bytes) -> int:
        self._buffer[self.done : self.done + len(data)] = data
        self.done += len(data)
        return len(data)


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

    def keys(self, bucket: str, prefix: str, at_most: int | None = None) -> Iterator[str]:
        found = self.client.list_blobs(bucket, prefix=prefix, max_results=at_most)
        return (blob.name for blob in found)

    def children(self, bucket: str, prefix: str) -> Iterator[str]:
        found = self.client.list_blobs(bucket, prefix=prefix, delimiter="/")
        yield from (blob.name for blob in found)
        yield from found.prefixes


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
        done = 0
        with contextlib.closing(
            self.client.get_object(Bucket=bucket, Key=key, Range=wanted)["Body"]
        ) as body:
            while n := body.readinto(buffer[done : done + _AT_A_TIME]):
                done += n
        return done

    def keys(self, bucket: str, prefix: str, at_most: int | None = None) -> Iterator[str]:
        asked: dict[str, Any] = {"PaginationConfig": {"MaxItems": at_most}} if at_most else {}
        pages = self._pages(bucket, prefix, **asked)
        return (found["Key"] for page in pages for found in page.get("Contents", ()))

    def children(self, bucket: str, prefix: str) -> Iterator[str]:
        for page in self._pages(bucket, prefix, Delimiter="/"):
            yield from (found["Key"] for found in page.get("Contents", ()))
            yield from (found["Prefix"] for found in page.get("CommonPrefixes", ()))

    def _pages(self, bucket: str, prefix: str, **asked: Any) -> Any:
        listing = self.client.get_paginator("list_objects_v2")
        return listing.paginate(Bucket=bucket, Prefix=prefix, **asked)


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
            f'pip install -e ".[{EXTRAS[scheme]}]" -c constraints.txt'
        ) from error
    except _store_errors(scheme) + (ValueError,) as error:
        if not _is_of_store(scheme, error):
            raise
        if _status(error) != _NOT_FOUND:
            raise StorageError(
                f"{path}: the store refuses or cannot be reached ({error}). {_LOG_IN[scheme]}"
            ) from error
        bucket, _ = _split(path)
        if _is_missing(scheme, bucket):
            raise StorageError(
                f"{path}: there is no bucket {bucket!r}: correct its name, or make it "
                f"({_MAKE[scheme].format(bucket=bucket)})"
            ) from error
        raise FileNotFoundError(errno.ENOENT, "no such file", path) from error


def _is_of_store(scheme: str, error: Exception) -> bool:
    """Whether an error comes from the scheme's package; smart-open puts its own around some."""
    errors = _store_errors(scheme)
    around = isinstance(error, ValueError) and isinstance(error.__cause__, errors)
    unsupported = isinstance(error, io.UnsupportedOperation)
    return (isinstance(error, errors) or around) and not unsupported


def _is_missing(scheme: str, bucket: str) -> bool:
    """Whether what was not found is the bucket itself; who may not list it is not told."""
    try:
        next(_connect(scheme).keys(bucket, "", at_most=1), None)
    except _store_errors(scheme) as error:
        return _status(error) == _NOT_FOUND
    return False


def _store_errors(scheme: str) -> tuple[type[Exception], ...]:
    """Name what the scheme's package raises; it is installed, or `ImportError` came first."""
    if scheme == "gs":
        import google.api_core.exceptions
        import google.auth.exceptions
        import google.cloud.storage.exceptions

        return (
            google.cloud.storage.exceptions.InvalidResponse,
            google.cloud.storage.exceptions.DataCorruption,
            google.api_core.exceptions.GoogleAPIError,
            google.auth.exceptions.GoogleAuthError,
            OSError,
        )
    import botocore.exceptions

    return (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, OSError)


def _status(error: BaseException) -> int | None:
    """Find the HTTP status behind an error of either package, or of smart-open around it."""
    if isinstance(error, OSError | ValueError) and error.__cause__:
        error = error.__cause__
    code = getattr(error, "code", None)
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif response is not None:
        code = getattr(response, "status_code", code)
    return int(code) if code is not None else None
