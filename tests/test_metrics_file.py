"""The metrics file: complete lines, to the bit, whatever kills the run that writes them."""

import json
import math
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from mesh_transformer import metrics_file, storage


@pytest.fixture
def path(tmp_path: pathlib.Path) -> str:
    return str(tmp_path / "run" / metrics_file.NAME)


def _write(path: str, *lines: metrics_file.Line) -> None:
    file = metrics_file.MetricsFile(path)
    for line in lines:
        file.write(line)
    file.close()


def test_numbers_come_back_with_the_same_bits(path: str) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 500, dtype=np.uint32)
    values = [float(x) for x in bits.view(np.float32) if np.isfinite(x)]
    _write(path, *({"step": step, "train/loss": value} for step, value in enumerate(values)))
    assert [line["train/loss"] for line in metrics_file.read(path)] == values


def test_each_line_is_strict_json_even_where_a_loss_is_not_finite(path: str) -> None:
    _write(path, {"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": None})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = storage.read_text(path)
    assert json.loads(text, parse_constant=refuse)["a"] == "NaN"
    [line] = metrics_file.read(path)
    assert math.isnan(line["a"])
    assert (line["b"], line["c"], line["d"]) == (math.inf, -math.inf, None)


def test_a_run_folder_stands_for_the_file_in_it(path: str) -> None:
    _write(path, {"step": 1})
    assert metrics_file.read(str(pathlib.Path(path).parent)) == [{"step": 1}]


@pytest.mark.parametrize("torn", [b"{", b'{"step": 3, "train/lo', b"\0\0\0\0", b"\xc3", b"123"])
def test_a_last_line_that_was_cut_off_is_left_out(path: str, torn: bytes) -> None:
    _write(path, {"step": 1}, {"step": 2})
    with storage.open(path, "ab") as file:
        file.write(torn)
    assert metrics_file.read(path) == [{"step": 1}, {"step": 2}]


def test_a_damaged_line_before_the_last_is_an_error_that_names_it(path: str) -> None:
    storage.write_text_atomically(path, '{"step": 1}\n{"step": 2, \n{"step": 3}\n')
    with pytest.raises(
        ValueError, match=r'metrics\.jsonl: line 2 is not a line of metrics: .{"step": 2'
    ):
        metrics_file.read(path)


def test_lines_after_the_restored_step_are_dropped(path: str) -> None:
    validation = {"step": 2, "val/loss_pile": 0.1}
    lines: list[metrics_file.Line] = [{"step": 1}, {"step": 2}, validation, {"step": 3}]
    _write(path, *lines)
    assert metrics_file.drop_after(path, 2) == lines[:3]
    assert metrics_file.read(path) == lines[:3]


def test_dropping_mends_a_torn_line_so_that_the_next_starts_afresh(path: str) -> None:
    storage.write_text_atomically(path, '{"step": 1}\n{"step": 2, "train')
    metrics_file.drop_after(path, 2)
    _write(path, {"step": 2})
    assert storage.read_text(path) == '{"step": 1}\n{"step": 2}\n'


def test_dropping_ends_a_whole_line_that_lacks_its_line_break(path: str) -> None:
    storage.write_text_atomically(path, '{"step": 1}')
    assert metrics_file.drop_after(path, 1) == [{"step": 1}]
    assert storage.read_text(path) == '{"step": 1}\n'


def test_a_new_run_drops_every_line(path: str) -> None:
    _write(path, {"step": 0, "val/loss_pile": 5.0}, {"step": 1})
    assert metrics_file.drop_after(path, 0) == []
    assert storage.read_text(path) == ""


def test_where_there_is_no_file_there_is_nothing_to_drop(path: str) -> None:
    assert metrics_file.drop_after(path, 5) == []


def test_a_validation_set_that_has_a_line_of_a_step_is_named(path: str) -> None:
    assert metrics_file.validated(path, 2) == set()
    lines: list[metrics_file.Line] = [
        {"step": 1, "val/loss_pile": 0.2},
        {"step": 2, "train/loss": 0.3},
        {"step": 2, "val/loss_code": 0.1, "val/accuracy_code": 0.5},
    ]
    _write(path, *lines)
    assert metrics_file.validated(path, 2) == {"code"}
    assert metrics_file.validated(path, 1) == {"pile"}
    assert metrics_file.validated(path, 3) == set()


def test_a_killed_process_loses_no_line_that_was_written(path: str) -> None:
    program = f"""
import os, signal
from mesh_transformer import metrics_file
file = metrics_file.MetricsFile({path!r})
for step in range(1, 101):
    file.write({{"step": step}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [line["step"] for line in metrics_file.read(path)] == [*range(1, 101)]


def test_closing_twice_is_harmless(path: str) -> None:
    file = metrics_file.MetricsFile(path)
    file.close()
    file.close()


def test_a_remote_file_is_complete_at_each_flush_and_goes_on_after_a_restart(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dictionary stands in for the bucket: test_storage shows that storage reaches real ones."""
    bucket: dict[str, bytes] = {}
    read, write = storage.read_bytes, storage.write_bytes_atomically

    def read_bytes(path: str) -> bytes:
        if not storage.is_remote(path):
            return read(path)
        if path not in bucket:
            raise FileNotFoundError(path)
        return bucket[path]

    def write_bytes_atomically(path: str, data: bytes) -> None:
        if storage.is_remote(path):
            bucket[path] = data
        else:
            write(path, data)

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    monkeypatch.setattr(storage, "write_bytes_atomically", write_bytes_atomically)
    monkeypatch.setattr(storage, "exists", lambda path: path in bucket)
    there = "gs://bucket/run/" + metrics_file.NAME

    assert metrics_file.drop_after(there, 0) == []
    killed = metrics_file.MetricsFile(there)
    killed.write({"step": 1})
    killed.write({"step": 2})
    killed.flush()
    killed.write({"step": 3})
    assert metrics_file.read(there) == [{"step": 1}, {"step": 2}]

    assert metrics_file.drop_after(there, 1) == [{"step": 1}]
    resumed = metrics_file.MetricsFile(there)
    resumed.write({"step": 2, "again": 1})
    resumed.close()
    assert metrics_file.read(there) == [{"step": 1}, {"step": 2, "again": 1}]
    killed.close()
