from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from original_data import FOLDER, expected
from record_files import (
    LD,
    LD_ARGS,
    SEQ,
    batches,
    first_tokens,
    make_set,
    numbered,
    validation,
    write,
)

from mesh_transformer.data import DataError, tfrecord
from mesh_transformer.data.batches import Position


def test_batches_hold_every_sequence_in_order_across_files_and_epochs() -> None:
    """The original dropped what remained at the end of each file: sequences 4 and 11 here."""
    record = json.loads((FOLDER / "loader.json").read_text())
    assert [i for call in record["sequential"][:5] for i in call["seq_ids"]] == [
        i for i in range(12) if i not in (4, 11)
    ]
    data = batches(LD, (2, 1), **LD_ARGS)
    for call in range(20):
        wanted = expected("loader_all_sequences")[[2 * call % 12, (2 * call + 1) % 12]]
        batch = next(data)
        assert batch.dtype == np.int32
        np.testing.assert_array_equal(batch, wanted[:, None])
    assert data.position == Position(3, 4)


SIZES = [5, 1, 7, 3]


@pytest.mark.thorough
@pytest.mark.parametrize("taken", [0, 1, 3, 4, 7, 11])
@pytest.mark.parametrize("shape", [(3,), (1, 2), (5, 1, 1)])
def test_resuming_anywhere_with_any_batch_shape_continues_the_same_order(
    tmp_path: Path, taken: int, shape: tuple[int, ...]
) -> None:
    index = make_set(tmp_path, SIZES)
    first = batches(index, (2, 2))
    seen = [i for _ in range(taken) for i in first_tokens(next(first))]
    position = Position.from_json(json.loads(json.dumps(first.position.to_json())))
    rest = batches(index, shape, position=position)
    while len(seen) < 70:
        batch = next(rest)
        assert batch.shape == (*shape, SEQ + 1)
        seen += first_tokens(batch)
    assert seen == [i % 16 for i in range(len(seen))]
    assert rest.position.epoch * 16 + rest.position.sample == len(seen)


def test_the_position_is_that_of_what_was_yielded_however_far_reading_is_ahead(
    tmp_path: Path,
) -> None:
    data = batches(make_set(tmp_path, SIZES), (4,))
    for n in range(1, 9):
        next(data)
        assert data.position.epoch * 16 + data.position.sample == 4 * n


def test_two_lines_may_name_one_file(tmp_path: Path) -> None:
    write(tmp_path / "a.tfrecords", numbered(3))
    (tmp_path / "set.index").write_text("a.tfrecords\na.tfrecords\n")
    data = batches(str(tmp_path / "set.index"), (2,))
    assert [i for _ in range(6) for i in first_tokens(next(data))] == [0, 1, 2] * 4
    resumed = batches(str(tmp_path / "set.index"), (1,), position=Position(0, 4))
    assert first_tokens(next(resumed)) == [1] and resumed.position == Position(0, 5)


@pytest.mark.parametrize("batch", [1, 3, 4, 16, 20])
def test_validation_counts_every_sequence_once_each_time(tmp_path: Path, batch: int) -> None:
    data = validation(make_set(tmp_path, SIZES), batch)
    for _ in range(2):
        seen: list[int] = []
        n_batches = 0
        for tokens_BT1, mask_BT in data:
            n_batches += 1
            assert tokens_BT1.shape == (batch, SEQ + 1) and mask_BT.shape == (batch, SEQ)
            assert mask_BT.dtype == bool and (mask_BT == mask_BT[:, :1]).all()
            assert not tokens_BT1[~mask_BT[:, 0]].any()
            seen += first_tokens(tokens_BT1[mask_BT[:, 0]])
        assert seen == list(range(16))
        assert n_batches == len(data)


def test_a_set_smaller_than_a_batch_is_one_error(tmp_path: Path) -> None:
    index = make_set(tmp_path, SIZES)
    batches(index, (4, 4))
    with pytest.raises(DataError, match=r"holds 16 sequences, less than one batch of 18 \(9 x 2\)"):
        batches(index, (9, 2))


def test_starting_does_not_wait_for_slow_counting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compressed and remote files can only be counted by reading them."""
    write(tmp_path / "a_zstd.tfrecords", numbered(30), compress=True)
    limits: list[int] = []

    def count(file: tfrecord.RecordFile, at_most: int = 0) -> int:
        limits.append(at_most)
        return at_most

    monkeypatch.setattr(tfrecord, "count", count)
    data = batches(str(tmp_path / "a_zstd.tfrecords"), (2,))
    assert first_tokens(next(data)) == [0, 1] and limits == [2]


def test_a_position_beyond_the_end_is_an_error(tmp_path: Path) -> None:
    index = make_set(tmp_path, SIZES)
    assert first_tokens(next(batches(index, (2,), position=Position(1, 16)))) == [0, 1]
    with pytest.raises(DataError, match="holds 16 sequences, .* after 17 of them: it is not the"):
        batches(index, (2,), position=Position(0, 17))


@pytest.mark.parametrize(
    "value", [{}, {"epoch": 0}, {"epoch": 0, "sample": -1}, {"epoch": 0, "sample": 1, "file": 2},
              {"epoch": "0", "sample": 1}]
)  # fmt: skip
def test_something_else_is_no_position(value: dict[str, object]) -> None:
    with pytest.raises(DataError, match='needs counts "epoch" and "sample"'):
        Position.from_json(value)


def test_closing_ends_the_batches_and_their_threads(tmp_path: Path) -> None:
    index = make_set(tmp_path, SIZES)
    next(batches(index, (2,)))
    before = threading.active_count()
    data = batches(index, (2,))
    next(data)
    data.close()
    assert list(data) == []
    assert threading.active_count() <= before
