"""A run folder of mesh-transformer-jax: steps that are written are listed, as it reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import memory_source
import pytest
import small

from mesh_transformer.checkpoints import conversion, opening, original_run
from mesh_transformer.checkpoints.conversion import Conversion
from mesh_transformer.checkpoints.layout import CheckpointError


def meta(folder: Path) -> Any:
    return json.loads((folder / "meta.json").read_text())


def test_a_step_that_is_converted_is_what_the_original_would_load(tmp_path: Path) -> None:
    config = small.parsed()
    source = memory_source.of_model(config.model, moments=True)
    for step, format in ((10, "original"), (20, "slim")):
        source.step = step
        what = Conversion(format=format)  # type: ignore[arg-type]
        conversion.convert(source, config, str(tmp_path / f"step_{step}"), what, position={})
    # As the original's device_sample.py reads it: the last of the list, and what goes with it.
    assert meta(tmp_path) == {"step": 20, "checkpoints": [10, 20], "aux": {"10": {}, "20": {}}}
    assert opening.find(str(tmp_path)).folder == str(tmp_path / "step_20")


def test_what_is_known_of_other_steps_is_kept_and_steps_that_are_gone_are_not(
    tmp_path: Path,
) -> None:
    aux = {"10": {"train_loader": {"used": ["a"], "file_idx": 3}}}
    (tmp_path / "meta.json").write_text(
        json.dumps({"step": 30, "checkpoints": [10, 30], "aux": aux, "other": 1})
    )
    for step in (10, 20):
        (tmp_path / f"step_{step}").mkdir()
    original_run.enlist(str(tmp_path / "step_20") + "/", 20)
    assert meta(tmp_path) == {
        "step": 20,
        "checkpoints": [10, 20],
        "aux": aux | {"20": {}},
        "other": 1,
    }


def test_a_folder_of_another_name_is_no_runs(tmp_path: Path) -> None:
    for name in ("slim", "step_3", "step_020"):
        original_run.enlist(str(tmp_path / name), 20)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", "[]", '{"checkpoints": [[]]}', '{"aux": 3}'])
def test_a_damaged_list_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"meta\.json is damaged"):
        original_run.enlist(str(tmp_path / "step_20"), 20)
    assert (tmp_path / "meta.json").read_text() == text
