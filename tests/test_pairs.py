"""Data sets of inputs and outputs: every token where it belongs, nothing lost unsaid."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pairs_of_texts
import pytest

import create_finetune_tfrecords
from mesh_transformer.data import DataError, dataset, prepare, tokenizer
from mesh_transformer.data.batches import TokenBatches, ValidationBatches
from mesh_transformer.data.prepare import Options

SHAPE: dict[str, Any] = {"encoder_seq": 6, "seq": 4}
PAIRS = {"a": "b", "abc": "", "": "abc", "abcdefgh": "abcdefgh", "bc": "cb"}
NEWLINE = "\n"
A = 4  # the id of "a"; 3 is the space that every text begins with


def create(folder: Path, pairs: Any = PAIRS, chosen: Any = None, **options: Any) -> prepare.Made:
    folder.mkdir(exist_ok=True)
    chosen = chosen or tokenizer.load(pairs_of_texts.write_tokenizer(folder / "tokenizer"))
    path = pairs_of_texts.write(folder / "pairs.jsonl", pairs)
    chosen_options = Options(**{**SHAPE, "preserve_data_order": True, **options})
    return prepare.create(path, "set", chosen, chosen_options, output_dir=folder, workers=1)


def read(made: prepare.Made, **record: Any) -> tuple[np.ndarray, np.ndarray]:
    data = ValidationBatches(str(made.path), batch=100, n_vocab=64, **{**SHAPE, **record})
    ((tokens_BT1, mask_BT),) = list(data)
    return tokens_BT1[: made.origin.sequences], mask_BT


def test_a_record_is_an_input_a_start_and_an_output_each_filled_up(tmp_path: Path) -> None:
    made = create(tmp_path)
    tokens_BT1, mask_BT = read(made)
    assert tokens_BT1.tolist() == [
        [3, A, 1, 0, 0, 0] + [0] + [3, A + 1, 1, 0],
        [3, A, A + 1, A + 2, 1, 0] + [0] + [1, 0, 0, 0],
        [1, 0, 0, 0, 0, 0] + [0] + [3, A, A + 1, A + 2],
        [3, A, A + 1, A + 2, A + 3, 1] + [0] + [3, A, A + 1, A + 2],
        [3, A + 1, A + 2, 1, 0, 0] + [0] + [3, A + 2, A + 1, 1],
    ]
    lengths = [3, 1, 4, 4, 4]
    assert mask_BT[:5].tolist() == [[i < n for i in range(4)] for n in lengths]
    assert not mask_BT[5:].any()


def test_what_is_cut_is_counted_and_told(tmp_path: Path) -> None:
    made = create(tmp_path)
    assert made.n_cut == (1, 2)
    assert made.summary().splitlines() == [
        f"{made.path}: 5 sequences of 11 tokens",
        f"{made.index}: its index, for train_set or val_set",
        f"read 5 pairs: 46 tokens of {made.origin.tokenizer}, 28 bytes (0.61 bytes per token)",
        "cut 1 inputs of more than 6 tokens and 2 outputs of more than 4, their ends of text "
        "included",
    ]


def test_pairs_stay_together_in_every_pass_and_order(tmp_path: Path) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = {letter: letter * 2 for letter in letters}
    made = create(tmp_path, pairs, preserve_data_order=False, n_repack_epochs=3, seed=1)
    tokens_BT1, _ = read(made)
    inputs, outputs = tokens_BT1[:, 1], tokens_BT1[:, 8:10]
    np.testing.assert_array_equal(outputs, np.stack([inputs, inputs], 1))
    passes = inputs.reshape(3, 26).tolist()
    assert all(sorted(one) == list(range(A, A + 26)) for one in passes)
    assert len(set(map(tuple, passes))) == 3
    again = create(tmp_path / "b", pairs, preserve_data_order=False, n_repack_epochs=3, seed=1)
    assert again.path.read_bytes() == made.path.read_bytes()


def test_training_reads_them_as_any_other_records(tmp_path: Path) -> None:
    made = create(tmp_path)
    batches = TokenBatches(str(made.index), shape=(1, 2), n_vocab=64, **SHAPE)
    assert next(batches).shape == (1, 2, 11)
    batches.close()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ({"in_text": "a"}, '{"in_text": "a"}'),
        ({"in_text": "a", "out_text": 3}, '{"in_text": "a", "out_text": 3}'),
        ("text", '"text"'),
    ],
)
def test_a_line_that_is_no_pair_is_refused_by_its_place(
    tmp_path: Path, line: Any, found: str
) -> None:
    path = pairs_of_texts.write(tmp_path / "pairs.jsonl", PAIRS)
    path.write_text(path.read_text() + json.dumps(line) + "\n")
    chosen = tokenizer.load(pairs_of_texts.write_tokenizer(tmp_path / "tokenizer"))
    with pytest.raises(DataError) as error:
        prepare.create(path, "set", chosen, Options(**SHAPE), output_dir=tmp_path, workers=1)
    assert str(error.value) == (
        f'{path}:6: needed an object with the strings "in_text" and "out_text", found '
        f"{found + NEWLINE!r}"
    )


def test_running_text_is_no_pair(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("some text")
    with pytest.raises(DataError, match="text.txt: pairs are lines of JSON with in_text and out_t"):
        prepare.create(path, "set", tokenizer.load("bytes"), Options(**SHAPE), output_dir=tmp_path)


def test_an_empty_file_of_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the input holds no pair of in_text and out_text"):
        create(tmp_path, {})


def test_a_text_with_the_token_that_pads_is_refused(tmp_path: Path) -> None:
    """By its file and line, also where pairs are shuffled."""
    for pairs, line in (({"a": "b", "c": "d"}, 2), ({"a": "b", "d": "", "e": "abc"}, 3)):
        with pytest.raises(DataError) as error:
            chosen = tokenizer.load("bytes")
            create(tmp_path, pairs, chosen, pad_id=99, preserve_data_order=False)
        assert str(error.value) == (
            f"{tmp_path}/pairs.jsonl:{line}: a text holds the token 99, which is what records are "
            "filled up with: choose another --pad-id"
        )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"min_unique_tokens": 3}, "--min-unique-tokens and --treat-eot-as-text are of"),
        ({"treat_eot_as_text": True}, "--min-unique-tokens and --treat-eot-as-text are of running"),
        ({"encoder_seq": 0, "pad_id": 3}, "--pad-id 3 is of pairs, which --encoder-seq asks for"),
        ({"encoder_seq": -1}, "--encoder-seq is -1 and --pad-id 0; neither can be below 0"),
        ({"pad_id": 30}, "--pad-id 30 must be a token of .*, below 30, and not 1, its end of text"),
        ({"pad_id": 1}, "--pad-id 1 must be a token of .*, below 30, and not 1, its end of text"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(DataError, match=problem):
        create(tmp_path, **options)


@pytest.mark.parametrize("changed", [{"encoder_seq": 7}, {"encoder_seq": 0}, {"pad_id": 5}])
def test_records_of_another_shape_are_refused(tmp_path: Path, changed: dict[str, int]) -> None:
    made = create(tmp_path)
    wanted = {"encoder_seq": 6, "pad_id": 0} | changed
    with pytest.raises(DataError) as error:
        read(made, **changed)
    assert str(error.value) == (
        f"{made.path}: was made with --encoder-seq 6 and --pad-id 0, and encoder_seq is "
        f"{wanted['encoder_seq']} and pad_id {wanted['pad_id']}: set these alike, or make the data "
        f"set again with --encoder-seq {wanted['encoder_seq']} --pad-id {wanted['pad_id']}"
    )


def test_records_of_another_length_without_a_word_of_their_origin_are_refused(
    tmp_path: Path,
) -> None:
    made = create(tmp_path)
    Path(dataset.origin_path(str(made.path))).unlink()
    with pytest.raises(DataError) as error:
        read(made, encoder_seq=9)
    assert str(error.value) == (
        f'{made.path}: record 0 holds 11 tokens in its feature "text"; encoder_seq 9 and seq 4 '
        "need 14: make the data set again with --encoder-seq 9 --seq 4"
    )


def test_the_command_makes_pairs_on_several_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices("abc", k=5)) for _ in range(40)]
    path = pairs_of_texts.write(tmp_path / "pairs.jsonl", [(text, text[::-1]) for text in texts])
    folder = pairs_of_texts.write_tokenizer(tmp_path / "tokenizer")
    flags = ["--encoder-seq", "8", "--seq", "8", "--tokenizer", folder, "--workers", "2"]
    where = ["--output-dir", str(tmp_path)]
    assert create_finetune_tfrecords.main([str(path), "set", *flags, *where]) == 0
    told = capsys.readouterr().out
    assert "40 sequences of 17 tokens" in told and "cut 0 inputs" in told
