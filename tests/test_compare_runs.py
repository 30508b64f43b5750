from __future__ import annotations

import json
import pathlib

import compare_runs
import pytest

STEPS = [
    {"step": 1, "train/loss": 5.5, "train/step_seconds": 0.5},
    {"step": 2, "train/loss": 5.25, "train/step_seconds": 0.25},
    {"step": 2, "val/loss_x": 5.0},
]


def run(folder: pathlib.Path, lines: list[dict[str, float]]) -> str:
    folder.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return str(folder)


def test_runs_that_differ_in_time_only_are_the_same(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slower = [line | {"train/step_seconds": 9.0} for line in STEPS]
    compare_runs.main([run(tmp_path / "a", STEPS), run(tmp_path / "b", slower)])
    assert capsys.readouterr().out == "the same 3 values in 3 lines\n"


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ([STEPS[0], STEPS[1] | {"train/loss": 5.5}, STEPS[2]], "step 2: train/loss 5.25 -> 5.5"),
        (STEPS[:2], "step 2: val/loss_x 5.0 -> None"),
        ([STEPS[0] | {"train/loss": float("nan")}, *STEPS[1:]], "step 1: train/loss 5.5 -> nan"),
    ],
)
def test_the_first_and_the_largest_difference_are_named(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    changed: list[dict[str, float]],
    line: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare_runs.main([run(tmp_path / "a", STEPS), run(tmp_path / "b", changed)])
    assert stopped.value.code == 1
    output = capsys.readouterr().out
    assert f"first: {line}\n" in output and f"largest: {line} (relative" in output


def test_differences_within_the_tolerance_pass(tmp_path: pathlib.Path) -> None:
    near = [line | {"train/loss": 5.5 * (1 + 1e-7)} for line in STEPS[:1]] + STEPS[1:]
    before, after = run(tmp_path / "a", STEPS), run(tmp_path / "b", near)
    compare_runs.main([before, after, "--tolerance", "1e-6"])
    with pytest.raises(SystemExit):
        compare_runs.main([before, after, "--tolerance", "1e-8"])


def test_runs_that_both_fail_the_same_way_are_the_same(tmp_path: pathlib.Path) -> None:
    failed = [{"step": 1, "train/loss": float("nan")}]
    compare_runs.main([run(tmp_path / "a", failed), run(tmp_path / "b", failed)])
