"""The safetensors format: what others write is read, and what is written others read."""

from __future__ import annotations

import json
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from mesh_transformer import storage
from mesh_transformer.checkpoints import safetensors
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.npz import BFLOAT16
from mesh_transformer.checkpoints.source import Array

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]
SHAPES = [(), (1,), (0, 3), (5,), (3, 4), (2, 0), (2, 3, 5), (17, 9)]


def some_arrays(seed: int) -> dict[str, np.ndarray]:
    """Return random bits, NaNs and infinities among them, in random shapes and dtypes."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for i in range(int(rng.integers(0, 6))):
        shape, dtype = SHAPES[rng.integers(len(SHAPES))], DTYPES[rng.integers(len(DTYPES))]
        n_bytes = Array(shape, dtype).n_bytes
        arrays[f"a.{i} ü"] = np.frombuffer(rng.bytes(n_bytes), dtype).reshape(shape)
    return arrays


def described(arrays: Mapping[str, np.ndarray]) -> dict[str, Array]:
    return {name: Array(array.shape, array.dtype) for name, array in arrays.items()}


def write(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    safetensors.write(path, described(arrays), lambda name: arrays[name])


def read(path: str) -> dict[str, np.ndarray]:
    return {name: stored.read() for name, stored in safetensors.read_header(path).items()}


def assert_same(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> None:
    """Compare arrays bit by bit."""
    assert described(ours) == described(theirs)
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize("seed", range(30))
def test_what_is_written_the_format_s_own_package_reads_and_the_other_way_round(
    seed: int, tmp_path: pathlib.Path
) -> None:
    package: Any = pytest.importorskip("safetensors.numpy", reason="needs the package safetensors")
    arrays = some_arrays(seed)
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    write(ours, arrays)
    assert_same(package.load_file(ours), arrays)
    package.save_file(arrays, theirs)
    assert_same(read(theirs), arrays)
    assert_same(read(ours), arrays)


def test_files_in_buckets_are_as_on_disks(root: str) -> None:  # noqa: F811
    path = storage.join(root, "model.safetensors")
    arrays = {"a": np.arange(5, dtype=np.float32), "b": np.ones((3, 2), BFLOAT16)}
    write(path, arrays)
    assert_same(read(path), arrays)


def test_data_begins_at_a_multiple_of_eight_and_says_that_it_is_pytorch_s(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "file"
    for name in ("a", "ab", "abc"):
        write(str(path), {name: np.ones(3, np.float32)})
        data = path.read_bytes()
        (n,) = struct.unpack("<Q", data[:8])
        assert (8 + n) % 8 == 0 and len(data) == 8 + n + 12
        assert json.loads(data[8 : 8 + n])["__metadata__"] == {"format": "pt"}


def test_arrays_are_asked_for_one_by_one(tmp_path: pathlib.Path) -> None:
    arrays: dict[str, np.ndarray] = {
        "a": np.ones(3, np.float32),
        "b": np.ones((2, 2), np.float16),
    }
    seen: list[Any] = []

    def one(name: str) -> np.ndarray:
        seen.append(name)
        return arrays[name]

    safetensors.write(str(tmp_path / "file"), described(arrays), one)
    assert seen == ["a", "b"]


def test_an_array_that_is_not_what_was_announced_is_refused(tmp_path: pathlib.Path) -> None:
    arrays = {"a": Array((2,), np.dtype(np.float32))}
    with pytest.raises(
        CheckpointError, match=r"a for .* is float32\[3\], announced was float32\[2\]"
    ):
        safetensors.write(str(tmp_path / "file"), arrays, lambda name: np.ones(3, np.float32))
    with pytest.raises(CheckpointError, match="a is int8, which is not written to safetensors"):
        safetensors.header({"a": Array((2,), np.dtype(np.int8))})


def test_other_dtypes_are_listed_and_refused_when_they_are_read(tmp_path: pathlib.Path) -> None:
    path = make(tmp_path, {"a": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}}, 16)
    stored = safetensors.read_header(path)["a"]
    assert stored.shape == (2,)
    with pytest.raises(CheckpointError, match="a in .* is F64, .*save it as F32, F16, BF16"):
        stored.read()


def make(folder: pathlib.Path, header: Any, n_data: int) -> str:
    """Write a file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "made.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(n_data))
    return str(path)


def f32(begin: int, end: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


def damages() -> Iterator[Any]:
    """Give headers, how many bytes of data follow, and what is said about them."""
    whole = {"a": f32(0, 8, 2), "b": f32(8, 12, 1)}
    yield pytest.param(whole, 11, "is cut off: .* bytes, its header says", id="cut off")
    yield pytest.param(whole, 13, "is damaged: .* its header accounts for", id="too long")
    gap = {"a": f32(0, 8, 2), "b": f32(12, 16, 1)}
    yield pytest.param(gap, 16, "b begins at byte .* leaves a gap before it", id="gap")
    overlap = {"a": f32(0, 8, 2), "b": f32(4, 8, 1)}
    yield pytest.param(overlap, 8, "b begins at byte .* overlaps what is before it", id="overlap")
    length = {"a": f32(0, 8, 3)}
    yield pytest.param(length, 8, r"a: F32\[3\] is 12 bytes, not 8", id="length")
    backwards = {"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [4, 0]}}
    yield pytest.param(backwards, 4, "is damaged: its header", id="backwards")
    yield pytest.param({"a": f32(0, 8, -2)}, 8, "is damaged: its header", id="negative")
    yield pytest.param({"a": {"dtype": "F32"}}, 8, "is damaged: its header", id="no shape")
    yield pytest.param({"a": 3}, 8, "is damaged: its header", id="no entry")
    yield pytest.param([1], 8, "is damaged: its header", id="no object")
    yield pytest.param(b"{\xff", 8, "is damaged: its header", id="no text")


@pytest.mark.parametrize(("header", "n_data", "message"), list(damages()))
def test_damaged_files_are_refused(
    header: Any, n_data: int, message: str, tmp_path: pathlib.Path
) -> None:
    path = make(tmp_path, header, n_data)
    with pytest.raises(CheckpointError, match=f"^{path} .*{message}"):
        safetensors.read_header(path)


@pytest.mark.parametrize("data", [b"", b"\x01\x00", b"version https://git-lfs.github.com/spec/v1"])
def test_files_without_a_header_are_refused(data: bytes, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is cut off or no safetensors file"):
        safetensors.read_header(str(path))


def test_a_file_that_is_cut_off_after_it_was_opened_is_told(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    write(str(path), {"a": np.ones(3, np.float32)})
    stored = safetensors.read_header(str(path))["a"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="a in .* is cut off; copy the file again"):
        stored.read()
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        safetensors.read_header(str(path))
