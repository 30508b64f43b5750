"""Storage: one small API over local paths and buckets."""

import gzip
import os
import pathlib
import stat
import sys

import pytest
from object_stores import Gateway

from mesh_transformer import buckets, storage


def test_what_is_written_is_what_is_read(root: str) -> None:
    path = storage.join(root, "deep", "notes.txt")
    storage.write_text_atomically(path, "Grüße\n")
    assert storage.read_text(path) == "Grüße\n"
    assert storage.read_bytes(path) == "Grüße\n".encode()
    storage.write_text_atomically(path, "second")
    assert storage.read_text(path) == "second"


def test_an_opened_file_takes_and_gives_text_and_bytes(root: str) -> None:
    with storage.open(storage.join(root, "a.txt"), "w") as file:
        file.write("first\nzweité\n")
    with storage.open(storage.join(root, "a.txt")) as file:
        assert file.readlines() == ["first\n", "zweité\n"]
    with storage.open(storage.join(root, "a.bin"), "wb") as file:
        file.write(bytes(range(256)) * 40)
    with storage.open(storage.join(root, "a.bin"), "rb") as file:
        file.seek(255)
        assert file.read(3) == b"\xff\x00\x01"


def test_a_range_of_a_file_is_read_by_itself(root: str) -> None:
    path = storage.join(root, "a.bin")
    storage.write_bytes_atomically(path, bytes(range(256)))
    assert storage.size(path) == 256
    for begin, n in ((0, 256), (3, 10), (250, 6), (9, 0)):
        buffer = bytearray(n)
        assert storage.read_into(path, begin, memoryview(buffer)) == n
        assert buffer == bytes(range(begin, begin + n))
    assert storage.read_into(path, 250, memoryview(bytearray(10))) == 6
    for call in (storage.size, lambda path: storage.read_into(path, 0, memoryview(bytearray(1)))):
        with pytest.raises(FileNotFoundError, match=r"none\.bin"):
            call(storage.join(root, "none.bin"))


def test_a_range_of_a_remote_file_is_one_request(remote: str, store: Gateway) -> None:
    path = storage.join(remote, "a.bin")
    storage.write_bytes_atomically(path, bytes(1000))
    store.requests.clear()
    storage.read_into(path, 10, memoryview(bytearray(100)))
    (request,) = store.fetched()
    assert (request.range, request.received) == ("bytes=10-109", 100)


def test_compressed_files_come_back_as_they_are(root: str) -> None:
    packed = gzip.compress(b"text")
    with storage.open(storage.join(root, "a.gz"), "wb") as file:
        file.write(packed)
    assert storage.read_bytes(storage.join(root, "a.gz")) == packed


def test_files_and_folders_exist_once_written(root: str) -> None:
    path = storage.join(root, "step_10", "a")
    assert not storage.exists(path)
    assert not storage.exists(root)
    storage.write_bytes_atomically(path, b"")
    assert storage.exists(path) and storage.is_file(path)
    assert storage.exists(storage.join(root, "step_10"))
    assert not storage.is_file(storage.join(root, "step_10"))
    assert not storage.is_file(storage.join(root, "step_1"))
    assert not storage.exists(storage.join(root, "step_1"))


def test_children_are_the_names_in_a_folder(root: str) -> None:
    assert storage.children(storage.join(root, "none")) == []
    for name in ("a/x", "a/deep/y", "a/deep/z", "b"):
        storage.write_text_atomically(storage.join(root, "top", name), "")
    assert storage.children(storage.join(root, "top")) == ["a", "b"]
    assert storage.children(storage.join(root, "top", "a")) == ["deep", "x"]


def test_a_removed_file_is_gone(root: str) -> None:
    path = storage.join(root, "file")
    storage.write_text_atomically(path, "text")
    storage.remove(path)
    assert not storage.exists(path)


def test_a_missing_file_is_a_file_not_found_error_that_names_it(root: str) -> None:
    path = storage.join(root, "none.txt")
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        storage.read_text(path)
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        storage.open(path, "rb")


def test_a_remote_file_whose_writing_fails_does_not_appear(remote: str) -> None:
    def write_half() -> None:
        with storage.open(storage.join(remote, "a"), "wb") as file:
            file.write(b"half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_half()
    assert not storage.exists(remote)


def test_a_store_that_refuses_is_one_error_that_says_how_to_log_in(
    remote: str, store: Gateway
) -> None:
    store.refuses = True
    for call in (storage.read_bytes, storage.exists):
        with pytest.raises(storage.StorageError, match=f"{remote}.*To log in: "):
            call(remote)
    with pytest.raises(storage.StorageError, match=f"{remote}.*To log in: "):
        storage.write_bytes_atomically(remote, b"x")


def test_remote_files_cannot_be_appended_to(remote: str) -> None:
    with pytest.raises(storage.StorageError, match="mode 'a' is for local files"):
        storage.open(remote, "a")


def test_missing_credentials_say_how_to_log_in(
    remote: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    for name in ("STORAGE_EMULATOR_HOST", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    buckets._connect.cache_clear()
    with pytest.raises(storage.StorageError, match="To log in: "):
        storage.read_bytes(remote)


@pytest.mark.parametrize(("scheme", "extra"), [("gs", "gcs"), ("s3", "s3")])
def test_a_missing_package_names_the_extra_to_install(
    scheme: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = {"gs": "google.cloud.storage", "s3": "boto3"}[scheme]
    monkeypatch.setitem(sys.modules, package, None)
    buckets._connect.cache_clear()
    with pytest.raises(storage.StorageError, match=rf'pip install -e "\.\[{extra}\]" -c const'):
        storage.read_bytes(f"{scheme}://bucket/a")


@pytest.mark.parametrize(
    ("path", "message"),
    [("ftp://host/a", "ftp:// is not supported"), ("gs:///a", "a bucket's name is needed")],
)
def test_an_unusable_address_says_what_is_wrong_with_it(path: str, message: str) -> None:
    with pytest.raises(storage.StorageError, match=message):
        storage.exists(path)


def test_joining_uses_single_slashes() -> None:
    assert storage.join("gs://bucket/run/", "/deep/", "a") == "gs://bucket/run/deep/a"
    assert storage.join("run", "a") == os.path.join("run", "a")


def test_a_local_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def full(handle: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        storage.write_text_atomically(str(path), "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_atomically_written_file_has_ordinary_permissions(tmp_path: pathlib.Path) -> None:
    (tmp_path / "ordinary").write_text("")
    storage.write_text_atomically(str(tmp_path / "atomic"), "")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "atomic")}
    assert len(modes) == 1
