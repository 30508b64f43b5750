from __future__ import annotations

import dataclasses
import io
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from original_data import FOLDER, SETS, StubTokenizer, expected

import create_finetune_tfrecords
from mesh_transformer.data import DataError, dataset, encoding, prepare, tokenizer
from mesh_transformer.data.batches import ValidationBatches
from mesh_transformer.data.documents import Piece
from mesh_transformer.data.prepare import Options

ROOT = Path(__file__).parent.parent


def read(path: Path, seq: int) -> np.ndarray:
    data = ValidationBatches(str(path), batch=1000, seq=seq, n_vocab=2**31)
    return np.concatenate([tokens_BT1[mask_BT[:, 0]] for tokens_BT1, mask_BT in data])


def create(
    text: str | Path, folder: Path, chosen: tokenizer.Tokenizer | None = None, **options: Any
) -> prepare.Made:
    """Make a data set of a text, or of what is at a path."""
    if isinstance(text, str):
        folder.mkdir(exist_ok=True)
        (folder / "input.txt").write_text(text)
        text = folder / "input.txt"
    chosen = chosen or tokenizer.load("bytes")
    return prepare.create(text, "set", chosen, Options(**options), output_dir=folder, workers=1)


def made_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "input.txt")


@pytest.mark.thorough
@pytest.mark.parametrize("name", SETS)
def test_the_sequences_are_those_of_the_original(tmp_path: Path, name: str) -> None:
    args = {
        key: value for key, value in SETS[name]["args"].items() if key not in ("name", "verbose")
    }
    made = create(FOLDER / "text", tmp_path, StubTokenizer(), **args)
    np.testing.assert_array_equal(read(made.path, 2048), expected(name))
    assert made.path.name == f"set_{len(expected(name))}.tfrecords"
    if name == "shuffled_seed10":
        original = FOLDER / "shuffled_seed10_9.tfrecords"
        assert made.path.read_bytes() == original.read_bytes()


def test_a_last_sequence_that_is_just_full_is_kept(tmp_path: Path) -> None:
    made = create("x" * 29, tmp_path, seq=9, preserve_data_order=True)
    assert read(made.path, 9).tolist() == [[120] * 10, [120] * 10, [120] * 9 + [256]]
    assert made.losses == [prepare.Loss(n_trailing=0, n_excluded=0)]


def test_end_of_text_parts_documents_or_is_text(tmp_path: Path) -> None:
    text = "one<|endoftext|><|endoftext|>two"
    parted = read(create(text, tmp_path / "a", seq=7, preserve_data_order=True).path, 7)
    assert parted.tolist() == [[*b"one", 256, *b"two", 256]]
    for name in ("bytes", "gpt2"):
        loaded = tokenizer.load(name)
        whole = [*loaded.encode(text), loaded.eot_id]
        made = create(text, tmp_path / name, loaded, seq=len(whole) - 1, treat_eot_as_text=True)
        assert read(made.path, len(whole) - 1).tolist() == [whole]
        assert loaded.decode(whole[:-1]) == text and made.origin.documents == 1


def test_texts_are_cleaned_in_the_originals_order(tmp_path: Path) -> None:
    made = create(
        "schÃ¶n ﬁne , so\n",
        tmp_path,
        seq=16,
        normalize_with_ftfy=True,
        normalize_with_wikitext_detokenize=True,
    )
    assert bytes(read(made.path, 16)[0, :-1].tolist()).decode() == "schön fine, so\n"


def test_the_description_and_the_index_go_with_the_data(tmp_path: Path) -> None:
    made = create("été " * 50, tmp_path, seq=20, min_unique_tokens=2)
    origin = dataset.read_origin(str(made.path))
    assert origin == made.origin
    assert origin is not None and origin.tokenizer == "bytes" and origin.seq == 20
    assert (origin.documents, origin.document_bytes, origin.document_tokens) == (1, 300, 301)
    assert origin.sequences == 14 and origin.size == made.path.stat().st_size
    assert origin.options["min_unique_tokens"] == 2
    assert made.index == tmp_path / "set.index" and made.index.read_text() == "set_14.tfrecords\n"
    assert read(made.index, 20).shape == (14, 21)
    with pytest.raises(DataError, match="set tokenizer to bytes, or make the data set again"):
        ValidationBatches(
            str(made.index), batch=1, seq=20, n_vocab=50400, tokenizer=tokenizer.load("gpt2")
        )


def corpus(folder: Path, n_bytes: int) -> Path:
    """Write some files of random words with known seeds."""
    folder.mkdir()
    rng = random.Random(0)
    words = ["the ", "mesh\n", "été ", "北京", "transformer, ", "1234 ", "<|endoftext|>"]
    for number in range(3):
        text = "".join(rng.choices(words, [20, 9, 9, 9, 9, 9, 0.1], k=n_bytes // 18))
        (folder / f"{number}.txt").write_text(text)
    return folder


def test_the_outcome_does_not_depend_on_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_CHARACTERS_PER_TASK", 1 << 13)
    folder = corpus(tmp_path / "corpus", 1 << 18)
    contents = []
    for workers in (1, 3):
        output = tmp_path / str(workers)
        made = prepare.create(
            folder, "set", tokenizer.load("gpt2"), Options(), output_dir=output, workers=workers
        )
        contents.append((made.path.name, made.path.read_bytes(), made.origin))
    assert contents[0] == contents[1]


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    peaks = []
    for n_files in (12, 48):
        folder = tmp_path / str(n_files)
        folder.mkdir()
        for number in range(n_files):
            (folder / f"{number}.txt").write_text("a line of text\n" * 7_000)
        tracemalloc.start()
        create(folder, tmp_path / "out")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus", 1 << 14)
    sets = [
        read(create(folder, tmp_path / str(n), seq=63, seed=seed).path, 63)
        for n, seed in enumerate((10, 10, 11))
    ]
    assert (sets[0] == sets[1]).all() and (sets[0] != sets[2]).any()


class ManyTokens(StubTokenizer):
    """Has ids that do not fit into two bytes."""

    n_tokens = 70000
    eot_id = 69999

    def encode(self, text: str) -> list[int]:
        return [66000 + byte for byte in text.encode()]


def test_ids_of_large_vocabularies_are_kept(tmp_path: Path) -> None:
    made = create("ab", tmp_path, ManyTokens(), seq=2)
    assert read(made.path, 2).tolist() == [[66097, 66098, 69999]]


@pytest.mark.parametrize(
    ("output", "message"),
    [("input.txt", r"input\.txt: File exists"), ("/proc/none", r"/proc/none: No such file")],
)
def test_an_output_that_cannot_be_written_is_one_error(
    tmp_path: Path, output: str, message: str
) -> None:
    path = tmp_path / "input.txt"
    path.write_text("text")
    with pytest.raises(DataError, match=message):
        prepare.create(
            path, "set", tokenizer.load("bytes"), Options(), output_dir=tmp_path / output
        )


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, r"0 documents with 0 tokens do not fill one sequence of 11"),
        ("short", {}, r"1 documents with 6 tokens do not .* 11: add text, or lower --seq"),
        ("aaaaaaaaaaaa", {"min_unique_tokens": 3}, r"all 1 sequences have fewer than 3 different"),
        (b"one\nt\xffo", {}, r"input\.txt:2: not UTF-8 text"),
    ],
)
def test_nothing_is_left_behind_when_nothing_can_be_made(
    tmp_path: Path, text: str | bytes, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "input.txt").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError, match=message):
        create(tmp_path / "input.txt", tmp_path, seq=10, **options)
    assert made_files(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"seq": 0}, "--seq is 0; it must be"), ({"n_repack_epochs": 0}, "--n-repack-epochs is 0")],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Options(**options)


@pytest.mark.parametrize(
    ("name", "output", "message"),
    [("a/b", "x", "must be a file name"), ("", "x", "must be a file name"),
     ("set", "gs://bucket/sets", "write to a local folder, then copy it")],
)  # fmt: skip
def test_bad_names_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, output: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text("text")
    with pytest.raises(DataError, match=message):
        prepare.create(
            Path("input.txt"), name, tokenizer.load("bytes"), Options(), output_dir=Path(output)
        )
    assert made_files(tmp_path) == []


def test_making_a_set_again_replaces_it_and_its_index(tmp_path: Path) -> None:
    first = create("a" * 20, tmp_path, seq=9)
    again = create("b" * 20, tmp_path, seq=9)
    assert again.path == first.path and again.replaced and not first.replaced
    assert (read(again.path, 9)[:, :8] == ord("b")).all()
    longer = create("c" * 40, tmp_path, seq=9)
    assert longer.index.read_text() == "set_4.tfrecords\n" and not longer.replaced


def test_an_index_of_other_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "set.index").write_text("# mine\ngs://bucket/other_3.tfrecords\n")
    with pytest.raises(DataError, match=r"set\.index: .* lists other files .*other_3\.tfrecords"):
        create("a" * 20, tmp_path, seq=9)
    assert made_files(tmp_path) == ["set.index"]


def test_an_index_elsewhere_finds_the_data(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("a" * 30)
    for index, line in [
        (tmp_path / "train.index", "sets/set_3.tfrecords"),
        (tmp_path / "far" / "train.index", str(tmp_path / "sets" / "set_3.tfrecords")),
    ]:
        prepare.create(
            tmp_path / "input.txt",
            "set",
            tokenizer.load("bytes"),
            Options(seq=9),
            output_dir=tmp_path / "sets",
            index=index,
        )
        assert index.read_text() == line + "\n"
        assert read(index, 9).shape == (3, 10)


def test_the_text_that_is_left_out_is_shown_when_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "mesh_transformer")
    made = create("abcdefghij" + "z" * 20, tmp_path, seq=9, min_unique_tokens=3)
    assert made.origin.sequences == 1
    assert caplog.text.count("left out for only 1 different tokens: 'zzzzzzzzzz'") == 2
    assert "left out 2 sequences with too few different tokens and 1 tokens" in made.summary()


@dataclasses.dataclass(frozen=True)
class Failing(StubTokenizer):
    """Fails, or dies, when it meets a word."""

    dies: bool

    def encode(self, text: str) -> list[int]:
        if "stop" in text:
            if self.dies:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("no more")
        return super().encode(text)


@pytest.mark.parametrize(("workers", "dies"), [(1, False), (2, False), (2, True)])
def test_a_failing_worker_is_one_error_that_names_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, dies: bool
) -> None:
    lines = [f"line {n}" for n in range(1, 100)]
    lines[41] = "stop"
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(encoding, "_CHARACTERS_PER_TASK", 1)
    message = (
        "was killed.*fewer --workers" if dies else r"a\.jsonl:42: cannot be tokenised: .*no more"
    )
    with pytest.raises(DataError, match=message):
        prepare.create(
            path, "set", Failing(dies), Options(seq=9), output_dir=tmp_path / "o", workers=workers
        )
    assert made_files(tmp_path / "o") == []


def test_a_worker_that_dies_before_more_text_is_read_is_the_same_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoding, "_CHARACTERS_PER_TASK", 1)

    def pieces() -> Iterator[Piece]:
        yield Piece("stop", "a.jsonl:1", ends=True)
        deadline = time.monotonic() + 60
        while multiprocessing.active_children():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield Piece("line", "a.jsonl:2", ends=True)

    encoder = encoding.Encoder(Failing(dies=True))
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*was killed"):
        encoding.encode_to(io.BytesIO(), pieces(), encoder, workers=2)


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "create_finetune_tfrecords.py")]
    return subprocess.run([*script, *arguments], cwd=cwd, capture_output=True, text=True)


def test_the_command_makes_a_set_and_says_so(tmp_path: Path) -> None:
    arguments = [str(FOLDER / "text"), "demo", "--output-dir", "out", "--tokenizer", "gpt2"]
    done = run(*arguments, "--seq", "255", "--n-repack-epochs", "2", "--workers", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "out/demo_40.tfrecords: 40 sequences of 256 tokens",
        "out/demo.index: its index, for train_set or val_set",
        "read 8 documents: 5234 tokens of gpt2, 18756 bytes (3.58 bytes per token)",
        "epoch 0: left out 114 tokens at the end, too few for a sequence",
        "epoch 1: left out 114 tokens at the end, too few for a sequence",
    ]
    assert "Tokenising: done" in done.stderr and "Writing: done" in done.stderr
    assert read(tmp_path / "out" / "demo.index", 255).shape == (40, 256)


def test_the_command_fails_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"one"\n{"text": 2}\n')
    done = run("a.jsonl", "demo", "--tokenizer", "bytes", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: a.jsonl:2: needed a JSON string")
    assert "Traceback" not in done.stderr
    assert made_files(tmp_path) == ["a.jsonl"]


def test_every_option_of_a_data_set_has_its_flag() -> None:
    flags = ["--normalize-with-ftfy", "--normalize-with-wikitext-detokenize", "--treat-eot-as-text"]
    numbers = ["--min-unique-tokens=2", "--n-repack-epochs=3", "--seed=4", "--seq=5"]
    args = create_finetune_tfrecords.parse(
        ["in", "name", *flags, "--preserve-data-order", *numbers]
    )
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Options)}
    assert Options(**given) == Options(
        seq=5,
        normalize_with_ftfy=True,
        normalize_with_wikitext_detokenize=True,
        min_unique_tokens=2,
        n_repack_epochs=3,
        seed=4,
        preserve_data_order=True,
        treat_eot_as_text=True,
    )
    args = create_finetune_tfrecords.parse(["in", "name"])
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Options)}
    assert Options(**given) == Options()


@pytest.mark.parametrize(("which", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 1)])
def test_a_stopped_command_leaves_nothing_behind(
    tmp_path: Path, which: signal.Signals, status: int
) -> None:
    (tmp_path / "input.txt").write_text("some text")
    program = (
        "import os, runpy, sys; from mesh_transformer.data import tokenizer\n"
        f"tokenizer.Bytes.encode = lambda self, text: os.kill(os.getpid(), {int(which)})\n"
        "sys.argv = ['create', 'input.txt', 'set', '--tokenizer', 'bytes']\n"
        f"runpy.run_path({str(ROOT / 'create_finetune_tfrecords.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status and "Stopped. Nothing was written." in done.stderr
    assert "Traceback" not in done.stderr and made_files(tmp_path) == []
