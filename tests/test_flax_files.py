"""Flax's msgpack files: what is in them is found and read, one array at a time, or refused."""

from __future__ import annotations

import pathlib
from typing import Any

import memory_source
import numpy as np
import packed_files
import pytest

from mesh_transformer.checkpoints import flax_files
from mesh_transformer.checkpoints.flax_files import read_stream, read_tree
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.npz import BFLOAT16
from mesh_transformer.checkpoints.source import Array

SHAPES = [(), (1,), (0, 3), (3, 4), (2, 3, 5), (40, 300), (1, 2), (70000,)]


def some_arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {}
    for i in range(int(rng.integers(1, 20))):  # more than 15: a map's head is longer then
        shape = SHAPES[rng.integers(len(SHAPES))]
        dtype = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)[rng.integers(3)]
        value = np.frombuffer(rng.bytes(Array(shape, dtype).n_bytes), dtype).reshape(shape)
        arrays[f"{'ab'[i % 2]}/{i}/{'x' * int(rng.integers(1, 60))}"] = value
    return arrays


def write(path: pathlib.Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def assert_same(listed: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    assert {name: it.array for name, it in listed.items()} == {
        name: Array(it.shape, it.dtype) for name, it in arrays.items()
    }
    for name, value in arrays.items():
        assert listed[name].read().tobytes() == value.tobytes(), name


@pytest.mark.parametrize("seed", range(8))
def test_every_bit_is_read_of_trees_and_of_streams(seed: int, tmp_path: pathlib.Path) -> None:
    arrays = some_arrays(seed)
    tree = packed_files.tree(packed_files.nested(arrays))
    assert_same(read_tree(write(tmp_path / "tree", tree)), arrays)
    stream = packed_files.stream(arrays)
    assert_same(read_stream(write(tmp_path / "stream", stream)), arrays)


def test_what_is_no_array_is_passed_over(tmp_path: pathlib.Path) -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    parts = {
        **{"step": 300, "none": b"\xc0", "text": packed_files.text("x"), "empty": b"\x80"},
        **{
            "real": b"\xcb" + bytes(8),
            "complex": packed_files.with_length(b"\x92\x01\x02", 0xC7, b"\2"),
        },
        **{"bytes": b"\xc4\2ab", "list": packed_files.listed(b"\1", packed_files.array(weight))},
        "weight": packed_files.in_pieces(weight, 4),
        "scalar": packed_files.array(weight[1, 1], 3),
    }
    found = read_tree(write(tmp_path / "tree", packed_files.tree(parts)))
    assert_same(found, {"list/1": weight, "weight": weight, "scalar": weight[1, 1]})
    assert len(found["weight"].pieces) == 2
    found = read_stream(write(tmp_path / "stream", packed_files.stream(parts)))
    assert_same(found, {"list/1": weight, "weight": weight, "scalar": weight[1, 1]})


def test_dtypes_that_weights_never_have_are_refused_when_they_are_asked_for(
    tmp_path: pathlib.Path,
) -> None:
    path = write(tmp_path / "tree", packed_files.tree({"count": np.arange(3)}))
    with pytest.raises(CheckpointError, match="count in .*tree is int64, which is not read here"):
        read_tree(path)["count"].read()


@pytest.mark.parametrize("read", [read_tree, read_stream])
def test_a_file_that_ends_early_is_refused_wherever_it_ends(
    read: Any, tmp_path: pathlib.Path
) -> None:
    arrays = {"a/b": np.ones((2, 3), np.float32), "c": np.ones(300, np.float32)}
    packed = packed_files.tree(packed_files.nested(arrays))
    whole = packed if read is read_tree else packed_files.stream(arrays)
    boundary = len(packed_files.stream({"a/b": arrays["a/b"]}))
    for n in range(1, len(whole)):
        if read is read_stream and n == boundary:
            continue  # the table of names misses what a stream lacks from here on
        with pytest.raises(CheckpointError, match=r"is cut off; copy it again|is damaged, or not"):
            read(write(tmp_path / "cut", whole[:n]))
    with pytest.raises(CheckpointError, match="missing"):
        read(str(tmp_path / "absent"))


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_give_an_error_of_ours_or_the_names_they_had(
    seed: int, tmp_path: pathlib.Path
) -> None:
    rng = np.random.default_rng(seed)
    arrays = {"a/b": np.ones((2, 3), np.float32), "c": np.ones(3, np.float32)}
    data = bytearray(packed_files.tree(packed_files.nested(arrays)))
    for at in rng.integers(0, len(data), 3):
        data[at] = rng.integers(256)
    for read in (read_tree, read_stream):
        try:
            for stored in read(write(tmp_path / "damaged", bytes(data))).values():
                stored.read()
        except CheckpointError as error:
            assert str(tmp_path / "damaged") in str(error)


def test_what_contradicts_itself_is_refused(tmp_path: pathlib.Path) -> None:
    weight = packed_files.array(np.ones((2, 3), np.float32))
    twice = packed_files.stream({"a": np.ones(2)}) * 2
    with pytest.raises(CheckpointError, match="a is there twice"):
        read_stream(write(tmp_path / "stream", twice))
    shape = weight.replace(b"\x92\x02\x03", b"\x92\x02\x04")
    with pytest.raises(CheckpointError, match=r"a: float32\[2, 4\] in 24 bytes"):
        read_tree(write(tmp_path / "tree", packed_files.tree({"a": shape})))
    deep = b"\x81\xa1a" * 70 + weight
    with pytest.raises(CheckpointError, match="maps lie deeper than 64"):
        read_tree(write(tmp_path / "deep", deep))
    pieces = packed_files.in_pieces(np.ones(6, np.float32), 4)
    with pytest.raises(CheckpointError, match=r"a: float32\[7\] in pieces of \[16, 8\]"):
        broken = pieces.replace(b"\xa5shape\x81\xa10\x06", b"\xa5shape\x81\xa10\x07")
        read_tree(write(tmp_path / "pieces", packed_files.tree({"a": broken})))


@pytest.mark.parametrize("read", [read_tree, read_stream])
def test_memory_for_one_array_suffices(read: Any, tmp_path: pathlib.Path) -> None:
    arrays = {f"w/{i}": np.ones(1_000_000, np.float32) for i in range(12)}
    packed = packed_files.tree(packed_files.nested(arrays))
    path = write(tmp_path / "large", packed if read is read_tree else packed_files.stream(arrays))
    listed: dict[str, flax_files.Packed] = {}
    assert memory_source.peak_bytes(lambda: listed.update(read(path))) < 500_000

    def read_all() -> None:
        for stored in listed.values():
            stored.read()

    assert memory_source.peak_bytes(read_all) < 1.5 * 4_000_000
