from __future__ import annotations

import json
import pathlib

import pytest
import quickstart_data


@pytest.fixture
def library(tmp_path: pathlib.Path) -> pathlib.Path:
    root = tmp_path / "library"
    for number in range(100):
        folder = root / f"package{number % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"module{number}.py").write_text(f"x = {number}\n")
    return root


def read(path: pathlib.Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_module_lands_on_exactly_one_side(library: pathlib.Path) -> None:
    sizes = quickstart_data.write_split(library, library.parent / "out")
    train, val = (read(library.parent / "out" / f"{side}.jsonl") for side in ("train", "val"))
    assert sorted(train + val) == sorted(f"x = {number}\n" for number in range(100))
    assert sizes["train"][0] == len(train) and sizes["val"][0] == len(val)
    assert 0 < len(val) < 20


def test_a_module_stays_on_its_side_when_others_come_or_go(library: pathlib.Path) -> None:
    quickstart_data.write_split(library, library.parent / "before")
    (library / "package1" / "module1.py").unlink()
    (library / "another.py").write_text("another\n")
    quickstart_data.write_split(library, library.parent / "after")
    before, after = (set(read(library.parent / name / "val.jsonl")) for name in ("before", "after"))
    assert before - {"x = 1\n"} == after - {"another\n"}


def test_installed_packages_and_tests_are_left_out(library: pathlib.Path) -> None:
    before = quickstart_data.source_files(library)
    for name in ("site-packages/numpy/core.py", "test/test_os.py", "json/tests/one.py", "a.txt"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text("left out\n")
    assert quickstart_data.source_files(library) == before


def test_text_is_decoded_as_the_file_declares(tmp_path: pathlib.Path) -> None:
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\n# na\u00efve\n".encode("latin-1"))
    assert list(quickstart_data.documents(tmp_path)) == [
        ("latin.py", "# coding: latin-1\n# na\u00efve\n")
    ]


@pytest.mark.thorough
def test_the_standard_library_gives_enough_text(tmp_path: pathlib.Path) -> None:
    quickstart_data.main([str(tmp_path)])
    assert (tmp_path / "train.jsonl").stat().st_size > 5e6
    assert (tmp_path / "val.jsonl").stat().st_size > 1e5
