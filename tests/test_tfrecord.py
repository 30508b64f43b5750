from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from original_data import FOLDER, expected
from record_files import (
    SEQ,
    batches,
    first_tokens,
    make_set,
    numbered,
    validation,
    write,
)

from mesh_transformer.data import DataError, framing
from mesh_transformer.data.batches import Position


@pytest.mark.parametrize("name", ["known_small", "known_small_zstd"])
def test_the_originals_records_are_read(name: str) -> None:
    ((tokens_BT1, mask_BT),) = validation(FOLDER / f"{name}.tfrecords", 4, seq=9, n_vocab=2**31)
    np.testing.assert_array_equal(tokens_BT1, expected("known_small"))
    assert tokens_BT1.dtype == np.int32 and mask_BT.all()


@pytest.mark.parametrize(
    ("name", "file"),
    [("known_small", "known_small"), ("shuffled_seed10", "shuffled_seed10_9")],
)
def test_files_are_written_byte_for_byte_as_tensorflow_does(name: str, file: str) -> None:
    buffer = io.BytesIO()
    assert framing.write(buffer, expected(name)) == len(expected(name))
    assert buffer.getvalue() == (FOLDER / f"{file}.tfrecords").read_bytes()


def test_tensorflow_reads_what_is_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for length in (1, 2, 100, 2049):
        sequences = rng.integers(0, 2 ** rng.integers(1, 32, (1300, length)), dtype=np.int64)
        sequences[0] = 0
        path = write(tmp_path / f"{length}.tfrecords", sequences.astype(np.uint32))
        read = [x for x, _ in validation(path, 1300, seq=length - 1, n_vocab=2**31)]
        np.testing.assert_array_equal(np.concatenate(read), sequences)


def flip(byte: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:byte] + bytes([data[byte] ^ 1]) + data[byte + 1 :]


def shorten(by: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:-by]


# A record of `numbered(10)` takes 40 bytes: 12, then 24 of data, then 4.
DAMAGES = {
    "a flipped bit": (flip(150), r"record 3 cannot be read: corrupted record"),
    "a flipped bit in a length": (flip(130), r"record 3 (cannot be read|is cut short or corrupt)"),
    "cut in the data": (shorten(10), r"record 9 is cut short or corrupt"),
    "cut in the length": (shorten(34), r"record 9 is cut short or corrupt"),
    "nothing": (lambda data: b"", r"the file is empty \(0 bytes\)"),
    "text": (lambda data: b"Once upon a time", r"needed TFRecords, plain or ZLIB; found bytes 4f"),
    "one byte": (lambda data: b"x", r"needed TFRecords, plain or ZLIB; found bytes 78"),
    "gzip": (lambda data: b"\x1f\x8b" + data, r".* found a gzip file: unpack it"),
    "zstandard": (lambda data: b"\x28\xb5\x2f\xfd" + data, r".* found a zstandard file: unpack it"),
    "cut ZLIB": (lambda data: zlib.compress(data)[:-9], r"record \d cannot be read"),
    "flipped ZLIB": (lambda data: flip(60)(zlib.compress(data)), r"record \d cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["training", "validation"])
def test_damage_is_named_with_its_file_and_record(tmp_path: Path, damage: str, kind: str) -> None:
    change, message = DAMAGES[damage]
    make_set(tmp_path, [10, 10])
    path = tmp_path / "part1.tfrecords"
    data = change(write(path, numbered(10, seq=SEQ)).read_bytes())
    path.write_bytes(data)
    index = str(tmp_path / "set.index")
    message = "part1.tfrecords: " + message
    with pytest.raises(DataError, match=message):
        if kind == "training":
            training = batches(index, (2,))
            for _ in range(20):
                next(training)
        else:
            list(validation(index, 4))


def test_what_lies_before_the_damage_is_delivered(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tfrecords", numbered(10))
    path.write_bytes(flip(150)(path.read_bytes()))
    data = batches(str(path), (1,))
    assert [first_tokens(next(data)) for _ in range(3)] == [[0], [1], [2]]
    with pytest.raises(DataError, match="record 3 cannot be read"):
        next(data)
    assert data.position == Position(0, 3)


def test_resuming_does_not_read_the_damage_that_lies_before(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tfrecords", numbered(10))
    path.write_bytes(flip(150)(path.read_bytes()))
    data = batches(str(path), (1,), position=Position(0, 4))
    assert first_tokens(next(data)) == [4]


@pytest.mark.parametrize("shape", [(1,), (7,)])
def test_a_record_of_another_length_is_named(tmp_path: Path, shape: tuple[int]) -> None:
    buffer = io.BytesIO()
    framing.write(buffer, numbered(5))
    framing.write(buffer, numbered(5, seq=SEQ + 2))
    (tmp_path / "a.tfrecords").write_bytes(buffer.getvalue())
    data = batches(str(tmp_path / "a.tfrecords"), shape)
    message = r"a\.tfrecords: record 5 holds 7 tokens .* seq 4 needs 5: set seq to 6, or .* --seq 4"
    with pytest.raises(DataError, match=message):
        [next(data) for _ in range(10)]


@pytest.mark.parametrize("token", [-1, 500, 2**40])
def test_an_id_outside_the_vocabulary_is_named(tmp_path: Path, token: int) -> None:
    sequences = numbered(9)
    sequences[6, 2] = token
    path = write_examples(tmp_path / "a.tfrecords", sequences)
    message = rf"a\.tfrecords: record 6 holds token id {token} \(at place 2\), but n_vocab is 500"
    with pytest.raises(DataError, match=message):
        list(validation(path, 4, n_vocab=500))


def write_examples(path: Path, sequences: np.ndarray, feature: str = "text") -> Path:
    """Write by TensorFlow, which knows more values than the library writes."""
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path)) as writer:
        for row in sequences.tolist():
            if isinstance(row[0], int):
                kind = {"int64_list": tf.train.Int64List(value=row)}
            else:
                kind = {"float_list": tf.train.FloatList(value=row)}
            features = tf.train.Features(feature={feature: tf.train.Feature(**kind)})
            writer.write(tf.train.Example(features=features).SerializeToString())
    return path


def test_records_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = write_examples(tmp_path / "a.tfrecords", numbered(3), feature="tokens")
    with pytest.raises(DataError, match='record 0 holds 0 tokens in its feature "text"'):
        list(validation(path, 2))
    path = write_examples(tmp_path / "b.tfrecords", numbered(3).astype(float))
    with pytest.raises(DataError, match=r"b\.tfrecords: record 0 cannot be read: .*float"):
        list(validation(path, 2))


def test_compression_is_told_by_the_content_whatever_the_name_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write(tmp_path / "a.tfrecords", numbered(3), compress=True)
    write(tmp_path / "b_zstd.tfrecords", numbered(3))
    for name in ("a.tfrecords", "b_zstd.tfrecords"):
        ((tokens_BT1, _),) = validation(tmp_path / name, 3)
        assert first_tokens(tokens_BT1) == [0, 1, 2]
    assert "a.tfrecords: is ZLIB, though its name does not say so" in caplog.text
    assert "b_zstd.tfrecords: is plain, though its name does not say so" in caplog.text


def test_tensorflow_starts_silently_and_leaves_devices_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tfrecords", numbered(3))
    program = (
        "from mesh_transformer.data.batches import ValidationBatches\n"
        f"print(len(list(ValidationBatches({str(path)!r}, batch=2, seq={SEQ}, n_vocab=999))))\n"
        "import tensorflow as tf; print(tf.config.get_visible_devices())"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.stderr == ""
    count, devices = done.stdout.splitlines()
    assert count == "2" and "GPU" not in devices and "TPU" not in devices
