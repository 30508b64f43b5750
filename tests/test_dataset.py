from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
from original_data import StubTokenizer
from record_files import (
    LD,
    LD_ARGS,
    SEQ,
    batches,
    first_tokens,
    numbered,
    validation,
    write,
)

from mesh_transformer.data import DataError, dataset, framing
from mesh_transformer.data.batches import Position


def test_paths_are_looked_for_beside_the_index_then_here_then_in_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("sets", "here", "here/data"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    index = tmp_path / "sets" / "set.index"
    index.write_text("a.tfrecords\n")
    for folder in ("here/data", "here", "sets"):
        write(tmp_path / folder / "a.tfrecords", numbered(1))
        (listed,) = dataset.read_index(str(index))
        assert Path(listed.path).resolve() == tmp_path / folder / "a.tfrecords"
    index.rename(tmp_path / "here" / "data" / "set.index")
    assert dataset.read_index("set.index")[0].path == "data/a.tfrecords"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "a.tfrecords\n\nb.tfrecords\n",
            r"set\.index, line 3: b\.tfrecords: no such file .*data/b",
        ),
        ("/b.tfrecords", r"set\.index, line 1: /b\.tfrecords: no such file \(looked for /b"),
        ("# nothing\n\n", r"set\.index: lists no file"),
        ("s3://bucket/a.tfrecords", r"set\.index, line 1: s3://.*reads local files and gs:// only"),
        ("a.tfrecords\nempty.tfrecords\n", r"set\.index, line 2: .*the file is empty"),
        ("a.tfrecords\nfolder\n", r"set\.index, line 2: .*cannot be read: Is a directory"),
    ],
)
def test_a_bad_index_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path / "a.tfrecords", numbered(1))
    (tmp_path / "empty.tfrecords").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "set.index").write_text(content)
    with pytest.raises(DataError, match=message):
        batches(str(tmp_path / "set.index"), (1,))


def test_a_missing_index_and_a_misnamed_one_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"index file .*none\.index: no such file"):
        batches(str(tmp_path / "none.index"), (1,))
    write(tmp_path / "a.records", numbered(300))
    with pytest.raises(DataError, match="not an index file .* must end in .tfrecords"):
        batches(str(tmp_path / "a.records"), (1,))


ORIGIN = dataset.Origin(
    tokenizer="stub",
    fingerprint="0" * 64,
    n_tokens=50257,
    eot_id=50256,
    seq=SEQ,
    sequences=16,
    size=0,
    documents=1,
    document_tokens=99,
    document_bytes=98,
    options={},
)


def write_origin(path: Path, **changes: object) -> None:
    origin = dataclasses.replace(ORIGIN, size=path.stat().st_size, **changes)  # type: ignore[arg-type]
    Path(dataset.origin_path(str(path))).write_text(origin.to_json())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer": "other", "fingerprint": "1" * 64},
            r"tokenizer other \(fingerprint 111111111111\), and the configuration says stub "
            r"\(000000000000\): set tokenizer to other, or .* --tokenizer stub",
        ),
        ({"seq": 256}, r"was made with --seq 256, and seq is 4: set seq to 256, or .* --seq 4"),
        ({"n_tokens": 50258}, r"has 50258 tokens, and n_vocab is 50257: raise n_vocab"),
    ],
)
def test_a_set_that_was_made_for_something_else_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = write(tmp_path / "a.tfrecords", numbered(16))
    write_origin(path)
    stub = StubTokenizer()
    batches(str(path), (4,), n_vocab=50257, tokenizer=stub)
    write_origin(path, **changes)
    with pytest.raises(DataError, match=message):
        batches(str(path), (4,), n_vocab=50257, tokenizer=stub)
    with pytest.raises(DataError, match=message):
        validation(path, 4, n_vocab=50257, tokenizer=stub)


def test_a_truncated_copy_is_found_before_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tfrecords", numbered(16))
    write_origin(path)
    path.write_bytes(path.read_bytes()[: -43 * 2])
    with pytest.raises(
        DataError, match="the copy is incomplete, or the two do not belong together"
    ):
        batches(str(path), (4,), n_vocab=50257)


@pytest.mark.parametrize("content", ["{", "[]", '{"tokenizer": "gpt2"}'])
def test_a_damaged_description_is_an_error(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "a.tfrecords", numbered(16))
    Path(dataset.origin_path(str(path))).write_text(content)
    with pytest.raises(DataError, match=r"a\.tfrecords\.json: not a description of a data set"):
        batches(str(path), (4,))


def test_files_without_a_description_are_taken_with_a_note(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    next(batches(LD, (2,), tokenizer=StubTokenizer(), **LD_ARGS))
    assert "2 of 2 files" in caplog.text and "taken to be stub" in caplog.text


def test_a_recorded_length_saves_the_counting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.tfrecords", numbered(16))
    write_origin(path)
    monkeypatch.setattr(framing, "count", None)
    data = batches(str(path), (4,), n_vocab=50257, position=Position(2, 6))
    assert first_tokens(next(data)) == [6, 7, 8, 9]
