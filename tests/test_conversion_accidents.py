"""Conversions that are killed, run out of room or may not write: what they leave and say."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import memory_source
import numpy as np
import pytest
import runs
import small
from processes import ended, wait_until

from mesh_transformer import storage
from mesh_transformer.checkpoints import conversion, opening, places
from mesh_transformer.checkpoints.conversion import Conversion
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.config import Config, load
from mesh_transformer.errors import InUse

FORMATS = ("native", "original", "slim", "hf")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def convert(config: Config, target: Path, format: str, *, overwrite: bool = False) -> None:
    source = memory_source.of_model(config.model, moments=True)
    what = Conversion(format=format)  # type: ignore[arg-type]
    conversion.convert(source, config, str(target), what, position={}, overwrite=overwrite)


# Killed


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A checkpoint that takes many times as long to convert as it takes to see it begin."""
    folder = tmp_path_factory.mktemp("large")
    path = folder / "run.json"
    keys = {"train_set": "absent", "val_batches": 0, "model_dir": str(folder / "step_7")}
    path.write_text(json.dumps(runs.KEYS | keys | {"d_model": 512, "layers": 6}))
    convert(load(path), folder / "step_7", "original")
    return runs.Run(path, folder / "step_7", folder / "compiled")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("format", "overwrite"),
    [
        ("slim", True),
        *(
            pytest.param(format, overwrite, marks=pytest.mark.slow)
            for format, overwrite in (("native", False), ("original", True), ("hf", False))
        ),
    ],
)
def test_a_killed_conversion_leaves_nothing_that_looks_whole_and_runs_again(
    step: runs.Run, tmp_path: Path, format: str, overwrite: bool
) -> None:
    target = tmp_path / "target"
    before = {}
    if overwrite:
        convert(small.parsed(), target, "hf")
        before = contents(target)
    flags = ["--config", str(step.config), "--input", str(step.root), "--format", format]
    flags += ["--output", str(target), *(["--overwrite"] if overwrite else [])]
    process = step.start("resharding_example.py", *flags)
    unfinished = tmp_path / "target.unfinished"
    begun = wait_until(
        lambda: unfinished.is_dir() and len(os.listdir(unfinished)) > 1,  # more than the marker
        process,
    )
    process.kill()
    status, _, told = ended(process)
    assert begun and status == -signal.SIGKILL, told
    assert unfinished.is_dir() and contents(target) == before
    shutil.copytree(unfinished, tmp_path / "copied")
    for folder in (unfinished, tmp_path / "copied", *(() if overwrite else (target,))):
        with pytest.raises(CheckpointError, match="was never finished|does not exist"):
            opening.find(str(folder))
    shutil.rmtree(tmp_path / "copied")
    status, _, told = ended(step.start("resharding_example.py", *flags))
    assert status == 0, told
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    model = load(step.config).model
    found = opening.open_source(opening.find(str(target)), model)
    wanted = opening.open_source(opening.find(str(step.root)), model)
    for key, array in found.arrays.items():
        if "decoder/embed/" not in key.path:  # Hugging Face's table has the bias in it
            np.testing.assert_array_equal(found.read(key), wanted.read(key).astype(array.dtype))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "stopped_at", ["begin", "rename 1", "rename 2", "mark", "marking", "removal"]
)
def test_a_replacement_that_was_killed_at_any_time_is_ended_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: str
) -> None:
    """What stands under the target's name is the old folder or the new one, and whole."""
    target, config = tmp_path / "target", small.parsed()
    replaced, unfinished = tmp_path / "target.replaced", tmp_path / "target.unfinished"
    convert(config, target, "hf")
    before = contents(target)
    mark = places._MARK
    half_a_mark = f".unfinished.{'0a' * 16}"  # as it is called until it is written
    if stopped_at == "begin":
        unfinished.mkdir()
        (unfinished / half_a_mark).touch()
    else:
        convert(config, tmp_path / "new", "slim")
    if stopped_at in ("rename 1", "rename 2"):
        (tmp_path / "new").rename(unfinished)
    if stopped_at not in ("begin", "rename 1"):
        target.rename(replaced)
    if stopped_at in ("mark", "marking", "removal"):
        (tmp_path / "new").rename(target)
    if stopped_at == "marking":
        (replaced / half_a_mark).touch()
    if stopped_at == "removal":
        (replaced / "unfinished").write_text(mark)
        (replaced / "config.json").unlink()
    for left in (replaced, unfinished):
        if left.exists():
            with pytest.raises(CheckpointError, match="was never finished|was replacing when it "):
                opening.find(str(left))
    with pytest.raises(CheckpointError, match="target is there already"):
        convert(config, target, "slim")
    if stopped_at.startswith(("begin", "rename")):
        assert contents(target) == before
    if stopped_at == "mark":  # nothing says whose it is: it may be the user's own
        with pytest.raises(
            CheckpointError, match=r"target\.replaced is in the way: .*move it away"
        ):
            convert(config, target, "slim", overwrite=True)
        assert contents(replaced)
        shutil.rmtree(replaced)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    convert(config, target, "slim", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert not (target / "config.json").exists() and not (target / "unfinished").exists()


def test_a_replacement_that_fails_between_its_renames_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, config = tmp_path / "target", small.parsed()
    convert(config, target, "hf")
    before, rename = contents(target), os.rename

    def fails(old: str, new: str) -> None:
        if str(old).endswith(".unfinished"):
            raise OSError(errno.EIO, "Input/output error")
        rename(old, new)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="Input/output error"):
        convert(config, target, "slim", overwrite=True)
    assert contents(target) == before and len(list(tmp_path.iterdir())) == 1


def test_folders_of_the_user_s_own_by_the_names_of_leftovers_are_not_touched(
    tmp_path: Path,
) -> None:
    """Also where a conversion to the name without the ending is made anew, or fails."""
    config, target = small.parsed(), tmp_path / "target"
    convert(config, tmp_path / "mine", "hf")
    (tmp_path / "mine").rename(tmp_path / "target.replaced")
    before = contents(tmp_path)
    with files_end_at(5000), pytest.raises(CheckpointError, match="make room there"):
        convert(config, target, "slim")
    assert contents(tmp_path) == before
    convert(config, target, "slim")
    assert contents(tmp_path / "target.replaced").items() <= before.items()
    (tmp_path / "other.unfinished").mkdir()
    (tmp_path / "other.unfinished" / "precious").write_text("mine")
    with pytest.raises(CheckpointError, match=r"other\.unfinished.* holds precious, which no conv"):
        convert(config, tmp_path / "other", "slim")
    assert (tmp_path / "other.unfinished" / "precious").read_text() == "mine"


# Full and locked disks


@contextmanager
def files_end_at(n_bytes: int) -> Iterator[None]:
    """Let every file end there, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("format", "overwrite"), [*((format, False) for format in FORMATS), ("slim", True)]
)
def test_a_disk_that_fills_up_is_one_error_and_nothing_is_left(
    tmp_path: Path, format: str, overwrite: bool
) -> None:
    config, target = small.parsed(d_model=64), tmp_path / "target"
    if overwrite:
        convert(config, target, "hf")
    before = contents(target)
    with files_end_at(5000), pytest.raises(CheckpointError) as told:
        convert(config, target, format, overwrite=overwrite)
    assert str(target) in str(told.value) and "too large" in str(told.value)
    assert "make room there, or name a folder on another disk" in str(told.value)
    assert "\n" not in str(told.value)
    assert contents(target) == before
    assert [path.name for path in tmp_path.iterdir()] == (["target"] if overwrite else [])
    convert(config, target, format, overwrite=overwrite)
    opening.find(str(target))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_may_not_be_written_is_told_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Root may write anywhere, so that the system's refusal is made up here."""

    def refuses(path: str, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "makedirs", refuses)
    told = f"target cannot be written .*{os.strerror(number)}.*name a folder in which you may write"
    with pytest.raises(CheckpointError, match=told):
        convert(small.parsed(), tmp_path / "target", "hf")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"file/target cannot be written .*Not a directory"):
        convert(small.parsed(), tmp_path / "file" / "target", "hf")
    assert (tmp_path / "file").read_text() == "mine"


# In each other's way, and in the user's


def test_only_one_process_writes_a_target(tmp_path: Path) -> None:
    unfinished = tmp_path / "target.unfinished"
    unfinished.mkdir()
    (unfinished / "unfinished").write_text(places._MARK)
    (unfinished / "of the other").touch()
    with (
        storage.alone(str(unfinished), "nobody"),
        pytest.raises(InUse, match=r"another process is writing .*target: wait for it, or end it"),
    ):
        convert(small.parsed(), tmp_path / "target", "hf")
    assert (unfinished / "of the other").exists()
    convert(small.parsed(), tmp_path / "target", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_comes_to_be_there_meanwhile_is_not_replaced_unasked(tmp_path: Path) -> None:
    config, target = small.parsed(), tmp_path / "target"

    def appears(folder: str) -> None:
        target.mkdir()
        (target / "precious").write_text("mine")

    source, what = memory_source.of_model(config.model), Conversion(format="hf")
    with pytest.raises(CheckpointError, match="came to be there meanwhile: .*--overwrite"):
        conversion.convert(source, config, str(target), what, position={}, write_tokenizer=appears)
    assert contents(tmp_path) == {target / "precious": b"mine"}


def test_only_checkpoints_are_replaced_and_never_the_one_that_is_read(tmp_path: Path) -> None:
    config = small.parsed()
    convert(config, tmp_path / "models" / "run", "native")
    (tmp_path / "models" / "notes").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint, so --overwrite does not replace it"):
        convert(config, tmp_path / "models", "hf", overwrite=True)
    source = opening.open_source(opening.find(str(tmp_path / "models" / "run")), config.model)
    for output in ("models/run", "models"):
        with pytest.raises(CheckpointError, match="step_7, which is read: name another folder"):
            conversion.convert(
                source,
                config,
                str(tmp_path / output),
                Conversion(format="hf"),
                position={},
                overwrite=True,
            )
    assert contents(tmp_path) == before


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("format", "at", "more", "told"),
    [
        ("hf", "", "notes", "holds notes, which is no part of a checkpoint"),
        ("slim", "", "notes", "holds notes, which is no part of a checkpoint"),
        ("native", "", "notes", "holds notes, which is no part of a checkpoint"),
        ("native", "", "checkpoints/notes", "holds checkpoints/notes, which is no part of"),
        ("native", "", "metrics.jsonl", "holds metrics.jsonl, which is no part of a checkpoint"),
        ("native", "", "tensorboard", "holds tensorboard, which is no part of a checkpoint"),
        ("native", "", "checkpoints/damaged_step_3", "holds checkpoints/damaged_step_3, which is"),
        ("native", "", "checkpoints/step_1", "holds .*checkpoints/step_1 and checkpoints/step_7"),
        ("slim", "step_7", None, "holds meta.json, which is no part of a checkpoint"),
        (None, "", "model.gguf", "no checkpoint that is written here"),
        (None, "", "params_7", "no checkpoint that is written here"),
        (
            None,
            "",
            "checkpoint_250.mdl checkpoint_500.mdl params.yaml",
            "holds more than one checkpoint, checkpoint_250.mdl and checkpoint_500.mdl",
        ),
        (
            None,
            "",
            "params_1000 params_2000 model_config.yaml",
            "holds more than one checkpoint, params_1000 and params_2000",
        ),
        (None, "", "7.mdl", "no checkpoint that is written here"),
    ],
)
def test_what_lies_beside_a_checkpoint_is_never_replaced_with_it(
    tmp_path: Path, format: str | None, at: str, more: str | None, told: str
) -> None:
    """A home, say, or the folder of a run with all its steps."""
    target = tmp_path / "home"
    if format is not None:
        convert(small.parsed(), target / at, format)
    else:
        target.mkdir()
    for name in (more or "").split():
        (target / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=rf"home is there already and {told}.*, so --overw"):
        convert(small.parsed(), target, "hf", overwrite=True)
    assert contents(tmp_path) == before


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(CheckpointError, match="is there already and a file, so --overwrite does"):
        convert(small.parsed(), tmp_path / "model.gguf", "hf", overwrite=True)
    assert contents(tmp_path) == {tmp_path / "model.gguf": b"mine"}


def test_an_empty_folder_is_in_nobody_s_way(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    convert(small.parsed(), tmp_path / "target", "hf", overwrite=True)
    opening.find(str(tmp_path / "target"))


def test_a_link_is_followed_to_what_it_means(tmp_path: Path) -> None:
    config, real, link = small.parsed(), tmp_path / "disk" / "real", tmp_path / "link"
    convert(config, real, "slim")
    link.symlink_to(real)
    convert(config, link, "hf", overwrite=True)
    assert link.is_symlink() and (real / "config.json").exists()
    assert [path.name for path in real.parent.iterdir()] == ["real"]
