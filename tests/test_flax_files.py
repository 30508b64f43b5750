"""Flax's msgpack files: what is in them is found and read, one array at a time, or refused."""

from __future__ import annotations

import pathlib
from typing import Any

import memory_source
import numpy as np
import packed_files
import pytest

from mesh_transformer.checkpoints import flax_files, flax_writer
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
def test_every_bit_is_read_of_trees_and_of_streams_and_written_as_it_was(
    seed: int, tmp_path: pathlib.Path
) -> None:
    arrays = some_arrays(seed)
    arrays = {name: arrays[name] for name in sorted(arrays, key=lambda it: it.split("/"))}
    tree = packed_files.tree(packed_files.nested(arrays))
    assert_same(read_tree(write(tmp_path / "tree", tree)), arrays)
    stream = packed_files.stream(arrays)
    assert_same(read_stream(write(tmp_path / "stream", stream)), arrays)
    described = {name: Array(it.shape, it.dtype) for name, it in arrays.items()}
    nested = flax_writer.nested(described)
    flax_writer.write_tree(str(tmp_path / "tree"), nested, arrays.__getitem__)
    assert (tmp_path / "tree").read_bytes() == tree
    flax_writer.write_stream(str(tmp_path / "stream"), described, arrays.__getitem__)
    assert (tmp_path / "stream").read_bytes() == stream


def test_an_array_of_more_than_2_to_30_bytes_is_written_in_pieces(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert flax_writer.PIECE_BYTES == 2**30
    monkeypatch.setattr(flax_writer, "PIECE_BYTES", 19)  # no whole number of float32
    large, small = (np.arange(n, dtype=np.float32).reshape(-1, 2) for n in (10, 4))
    held = {"large": large, "small": small}
    described = {name: Array(it.shape, it.dtype) for name, it in held.items()}
    path = str(tmp_path / "file")
    flax_writer.write_stream(path, described, held.__getitem__)
    expected = {"large": packed_files.in_pieces(large, 4), "small": small}
    assert (tmp_path / "file").read_bytes() == packed_files.stream(expected)
    assert_same(read_stream(path), held)
    tree = {"step": 300, "none": None, "params": flax_writer.nested(described)}
    read = lambda name: held[name.removeprefix("params/")]  # noqa: E731
    flax_writer.write_tree(path, tree, read)
    theirs = {"step": 300, "none": b"\xc0", "params": expected}
    assert (tmp_path / "file").read_bytes() == packed_files.tree(theirs)


def test_what_a_stream_has_no_room_for_is_named() -> None:
    arrays = {f"a/{n}": Array((2**n, 1), np.dtype(np.float32)) for n in (28, 29, 30, 31)}
    with pytest.raises(CheckpointError) as error:
        flax_writer.check_stream(arrays)
    told = str(error.value)
    assert "4294967295 bytes together at most; choose a smaller dtype" in told
    assert [f"a/{n} is" in told for n in (28, 29, 30, 31)] == [False, False, True, True]


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
    described = {name: stored.array for name, stored in listed.items()}

    def write_all() -> None:
        target, one = str(tmp_path / "written"), lambda name: listed[name].read()
        if read is read_tree:
            flax_writer.write_tree(target, flax_writer.nested(described), one)
        else:
            flax_writer.write_stream(target, described, one)

    assert memory_source.peak_bytes(write_all) < 1.5 * 4_000_000
