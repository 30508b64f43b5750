"""What only buckets have: parts, ranges, listings, rights, and names that may be mistyped."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from object_stores import Gateway, asked

from mesh_transformer import buckets, storage

CALLS: dict[str, Callable[[str], Any]] = {
    "read": storage.read_bytes,
    "open": lambda path: storage.open(path, "rb"),
    "read a range": lambda path: storage.read_into(path, 0, memoryview(bytearray(1))),
    "size": storage.size,
    "exists": storage.exists,
    "children": storage.children,
    "put": lambda path: storage.write_bytes_atomically(path, b"x"),
    "write": lambda path: written(path, b"x"),
    "write much": lambda path: written(path, bytes(2**19)),
    "remove": storage.remove,
    "remove all": storage.remove_folder,
}


def written(path: str, data: bytes) -> None:
    with storage.open(path, "wb") as file:
        file.write(data)


@pytest.mark.thorough
@pytest.mark.parametrize("call", CALLS)
def test_a_denied_access_is_never_taken_for_nothing(remote: str, store: Gateway, call: str) -> None:
    storage.write_bytes_atomically(f"{remote}/a", b"content")
    store.refuses = True
    with pytest.raises(storage.StorageError, match=f"{remote}/a: the store refuses .*To log in: "):
        CALLS[call](f"{remote}/a")
    store.refuses = False
    assert storage.read_bytes(f"{remote}/a") == b"content"


@pytest.mark.parametrize("call", CALLS)
def test_a_missing_bucket_is_one_error_that_says_how_to_make_it(remote: str, call: str) -> None:
    path = remote.replace("//bucket", "//mistyped")
    with pytest.raises(storage.StorageError) as told:
        CALLS[call](path)
    assert str(told.value).startswith(
        f"{path}: there is no bucket 'mistyped': correct its name, or"
    )
    assert str(told.value).endswith("//mistyped)")


def test_s3_s_own_refusal_is_told_as_such(
    s3: str, stores: dict[str, Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moto has users and their rights, which the emulator of Google's store has not."""
    import boto3

    storage.write_bytes_atomically(f"{s3}/a", b"content")
    users = boto3.client("iam")
    users.create_user(UserName="nobody")
    key = users.create_access_key(UserName="nobody")["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    buckets._connect.cache_clear()
    port = stores["s3"].port
    try:
        assert asked(port, "POST", "/moto-api/reset-auth", b"0")[0] == 200
        for call in (storage.read_bytes, storage.exists, storage.children):
            with pytest.raises(
                storage.StorageError, match="the store refuses .*Access ?Denied|403"
            ):
                call(f"{s3}/a")
    finally:
        asked(port, "POST", "/moto-api/reset-auth", b"inf")


@pytest.mark.thorough
def test_any_bytes_come_back_as_they_were(remote: str) -> None:
    """Also line ends and what looks like a request's own marks, at either end."""
    rng = random.Random(0)
    ends = [b"", b"\r", b"\n", b"\r\n", b"--", b"\r\n--", b" ", b"\0"]
    for begin in ends:
        content = begin + rng.randbytes(rng.randrange(300)) + rng.choice(ends)
        storage.write_bytes_atomically(f"{remote}/put", content)
        written(f"{remote}/written", content)
        assert storage.read_bytes(f"{remote}/put") == content
        assert storage.read_bytes(f"{remote}/written") == content
        assert storage.size(f"{remote}/put") == len(content)


def test_a_range_beyond_the_end_is_empty(root: str) -> None:
    storage.write_bytes_atomically(storage.join(root, "a"), b"content")
    for begin in (7, 8, 1000):
        assert storage.read_into(storage.join(root, "a"), begin, memoryview(bytearray(3))) == 0


@pytest.mark.thorough
def test_a_long_file_goes_out_in_parts_as_it_comes(remote: str, store: Gateway) -> None:
    part = buckets._PART_BYTES
    content = random.Random(0).randbytes(part + 1000)
    with storage.open(f"{remote}/a", "wb") as file:
        file.write(memoryview(content)[:100])
        assert file.write(content[100:]) == len(content) - 100
        assert any(request.sent >= part for request in store.requests)
        assert not storage.exists(f"{remote}/a")
    assert max(request.sent for request in store.requests) <= part
    assert storage.read_bytes(f"{remote}/a") == content


def test_a_part_that_is_refused_is_told_and_nothing_appears(remote: str, store: Gateway) -> None:
    def refused_late() -> None:
        with storage.open(f"{remote}/a", "wb") as file:
            file.write(bytes(buckets._PART_BYTES))
            store.refuses = True
            file.write(bytes(buckets._PART_BYTES))

    with pytest.raises(storage.StorageError, match=f"{remote}/a: the store refuses"):
        refused_late()
    store.refuses = False
    assert not storage.exists(f"{remote}/a")


def test_a_folder_is_listed_without_what_is_deeper_in_it(remote: str, store: Gateway) -> None:
    for name in ("a", *(f"deep/{n}" for n in range(30)), "deeper/x/y"):
        storage.write_text_atomically(f"{remote}/{name}", "")
    storage.write_text_atomically(f"{remote}2", "")
    store.requests.clear()
    assert storage.children(remote) == ["a", "deep", "deeper"]
    assert sum(request.received for request in store.requests) < 4000


@pytest.mark.slow
def test_a_listing_of_many_pages_is_whole(s3: str) -> None:
    """S3 gives a thousand names at a time; the emulator of Google's store knows no pages."""
    for n in range(1005):
        storage.write_bytes_atomically(f"{s3}/{n:04}", b"")
    assert storage.children(s3) == [f"{n:04}" for n in range(1005)]
    storage.remove_folder(s3)
    assert storage.children(s3) == []


def test_a_removed_folder_is_gone_with_all_that_is_in_it_and_nothing_else(root: str) -> None:
    for name in ("run/a", "run/deep/b", "run/deep/er/c", "run2/a"):
        storage.write_text_atomically(storage.join(root, name), "")
    storage.remove_folder(storage.join(root, "run"))
    assert storage.children(root) == ["run2"]
    storage.remove_folder(storage.join(root, "run"))


def test_a_file_that_is_not_there_cannot_be_removed(root: str) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        storage.remove(storage.join(root, "none"))


def test_a_folder_that_was_only_made_is_not_there(remote: str) -> None:
    """Consoles of object stores make one as an empty file whose name ends in a slash."""
    storage.write_bytes_atomically(f"{remote}/", b"")
    assert not storage.exists(remote) and storage.children(remote) == []
    storage.write_bytes_atomically(f"{remote}/a", b"")
    assert storage.exists(remote) and storage.children(remote) == ["a"]
