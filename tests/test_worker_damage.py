"""One host: it goes on past damaged checkpoints, and takes weights that are converted or old."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small
from etils import epath
from test_worker import assert_equal, batch, on_disk, values

from mesh_transformer.checkpoints import layout, native_writer
from mesh_transformer.checkpoints.averaging import Mean
from mesh_transformer.checkpoints.native import CheckpointError, Checkpoints, Damaged
from mesh_transformer.checkpoints.native_source import NativeSource
from mesh_transformer.checkpoints.opening import stored_config
from mesh_transformer.pod.worker import Worker
from mesh_transformer.session import Restored


@pytest.fixture
def run(tmp_path: Path) -> tuple[Worker, Path]:
    """A run on one device that has taken three steps, saved the last and ended."""
    worker, checkpoints = on_disk(tmp_path / "run")
    with checkpoints:
        worker.state = small.start()
        for step in range(3):
            worker.train(batch(step))
        worker.save(3, {"epoch": 0, "sample": 24})
    return worker, tmp_path / "run"


def cut_short(folder: Path) -> None:
    """Damage a checkpoint as a disk that lost the end of a file does."""
    (path,) = folder.glob("state/manifest.ocdbt")
    path.write_bytes(path.read_bytes()[:-9])


def test_past_damage_the_run_goes_on_from_the_checkpoint_before(
    run: tuple[Worker, Path], caplog: pytest.LogCaptureFixture
) -> None:
    before, folder = values(run[0].state), run[1] / "checkpoints"
    worker, checkpoints = on_disk(run[1])
    with checkpoints:
        for step in (4, 5):
            worker.restore()
            worker.train(batch(step))
            worker.save(step, {"epoch": 0, "sample": 8 * step})
        checkpoints.wait()
        for step in (4, 5):
            cut_short(folder / f"step_{step}")
        with pytest.raises(Damaged, match=r"step_5 is damaged: state/manifest.ocdbt \(changed\)"):
            worker.restore(5)
        assert worker.restore() == Restored(3, {"epoch": 0, "sample": 24})
        assert_equal(values(worker.state), before)
        assert "step_5 is damaged: state/manifest.ocdbt (changed)" in caplog.text
        assert f"set aside in {folder}/damaged_step_5; going on from step 4 instead" in caplog.text
        assert f"set aside in {folder}/damaged_step_4; going on from step 3 instead" in caplog.text
        worker.train(batch(4))
        worker.save(4, {"epoch": 0, "sample": 32})
    names = ["damaged_step_4", "damaged_step_5", "step_3", "step_4"]
    assert sorted(path.name for path in folder.iterdir()) == names
    with Checkpoints(str(run[1]), keep_n=1) as checkpoints:
        checkpoints.clear()
    assert sorted(path.name for path in folder.iterdir()) == names[:2]


def test_where_all_is_damaged_the_run_does_not_begin_anew(run: tuple[Worker, Path]) -> None:
    worker, checkpoints = on_disk(run[1])
    cut_short(run[1] / "checkpoints" / "step_3")
    with checkpoints:
        for _ in range(2):
            with pytest.raises(Damaged, match="step_3 is damaged"):
                worker.restore()


def test_an_outage_or_another_model_is_not_taken_for_damage(
    run: tuple[Worker, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, checkpoints = on_disk(run[1])
    with checkpoints:
        worker.restore()
        worker.save(4, {"epoch": 0, "sample": 32})
        checkpoints.wait()
        for error in (PermissionError(13, "Permission denied"), OSError(5, "Input/output error")):
            with monkeypatch.context() as patch, pytest.raises(CheckpointError) as told:
                patch.setattr(layout, "_file_summary", Mock(side_effect=error))
                worker.restore()
            assert not isinstance(told.value, Damaged)
        other, _ = on_disk(run[1].parent / "other", n_heads=4)
        other._checkpoints = checkpoints
        with pytest.raises(CheckpointError, match="of another model") as told:
            other.restore()
        assert not isinstance(told.value, Damaged)
        assert checkpoints.steps() == [3, 4]


SAYINGS = [
    (ValueError('NOT_FOUND: Error opening "zarr3" driver: Metadata at local file "/a" missing'), 1),
    (ValueError("DATA_LOSS: Error reading gs://bucket/run/step_3/state: checksum mismatch"), 1),
    (ValueError("FAILED_PRECONDITION: Error reading local file: bad magic"), 1),
    (json.JSONDecodeError("Expecting value", "", 0), 1),
    (FileNotFoundError(2, "No such file or directory", "run/step_3/about/about.json"), 1),
    (FileNotFoundError("bucket/run/step_3/about/about.json"), 0),
    (FileNotFoundError(2, "No such file or directory", "gs://bucket/run/about.json"), 0),
    (PermissionError(13, "Permission denied", "run/step_3/state"), 0),
    (ConnectionError("Cannot connect to host storage.googleapis.com:443"), 0),
    (TimeoutError("timed out"), 0),
    (ValueError("PERMISSION_DENIED: Error opening local file: NOT_FOUND"), 0),
    (ValueError("UNAVAILABLE: CURL error Couldn't resolve host name: NOT_FOUND"), 0),
    (ValueError("NOT_FOUND: Error reading gs://bucket/run: HTTP response code: 404"), 0),
    (ValueError('FAILED_PRECONDITION: [tensorstore_spec=\'{"kvstore":{"driver":"gcs"}}\']'), 0),
    (ValueError("OUT_OF_RANGE: Error reading https://storage.googleapis.com/bucket/run"), 0),
]


@pytest.mark.parametrize(("error", "damage"), SAYINGS)
def test_only_bytes_that_are_lost_or_wrong_are_damage(error: Exception, damage: int) -> None:
    around = RuntimeError("restoring failed")
    around.__cause__ = error
    assert layout.tells_of_damage(error) == layout.tells_of_damage(around) == bool(damage)


def test_what_is_no_damage_sets_no_checkpoint_aside(
    run: tuple[Worker, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run[1] / "checkpoints" / "step_3", run[1] / "checkpoints" / "step_2")
    worker, checkpoints = on_disk(run[1])
    with checkpoints:
        for error in (error for error, damage in SAYINGS if not damage):
            refuses = Mock(side_effect=error)
            with monkeypatch.context() as patch, pytest.raises(CheckpointError) as told:
                patch.setattr(ocp.PyTreeCheckpointHandler, "restore", refuses)
                worker.restore()
            assert "step_3 cannot be read" in str(told.value)
            assert not isinstance(told.value, Damaged)
            assert checkpoints.steps() == [2, 3]


def test_a_folder_that_goes_away_while_it_is_read_is_not_damaged(
    run: tuple[Worker, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run[1] / "checkpoints" / "step_3"
    gone = folder.with_name("gone")
    find = layout._damaged_files

    def goes_away(path: epath.Path) -> list[str]:
        folder.rename(gone)
        return find(path)

    worker, checkpoints = on_disk(run[1])
    with checkpoints:
        monkeypatch.setattr(layout, "_damaged_files", goes_away)
        with pytest.raises(CheckpointError, match="went away while it was read") as told:
            worker.restore(3)
        assert not isinstance(told.value, Damaged)


def test_a_list_of_files_that_is_cut_short_is_damage(run: tuple[Worker, Path]) -> None:
    worker, checkpoints = on_disk(run[1])
    with checkpoints:
        for text in ("", "{", "{}", "[]", "3", "null"):
            (run[1] / "checkpoints" / "step_3" / "files.json").write_text(text)
            with pytest.raises(Damaged, match=r"step_3 is damaged: files.json \(changed\)"):
                worker.restore(3)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_converted_weights_are_tuned_and_sampled_from_in_float32(
    run: tuple[Worker, Path], tmp_path: Path, dtype: str
) -> None:
    worker, root = run
    folder = str(tmp_path / "converted" / "checkpoints" / "step_0")
    native_writer.write(
        folder,
        NativeSource(str(root / "checkpoints" / "step_3")),
        extra={"config": worker.config.to_flat()},
        dtype=np.dtype(dtype),
        moments=False,
    )
    wanted = jax.tree.map(lambda a: a.astype(dtype).astype("float32"), worker.state.params)
    tuned, checkpoints = on_disk(tmp_path / "tuned")
    with checkpoints:
        for fresh_opt in (True, False):  # there are no moments to keep
            tuned.tune_from(str(tmp_path / "converted"), fresh_opt=fresh_opt)
            assert_equal(tuned.state.params, wanted)
    reading = Worker(worker.config, jax.devices()[:1])
    reading.load_weights(folder)
    assert_equal(reading.state.params, wanted)


@pytest.mark.thorough
@pytest.mark.parametrize("read", ["restore", "tune_from", "load_weights"])
def test_a_key_that_a_checkpoint_is_older_than_had_its_default(
    run: tuple[Worker, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, read: str
) -> None:
    """Its configuration holds no key that has a default, nor any that follows from others."""
    caplog.set_level("INFO", "mesh_transformer.pod.worker")
    worker, root = run
    old, new = tmp_path / "old", NativeSource(str(root / "checkpoints" / "step_3"))
    keys = small.KEYS | {"model_dir": str(old)}
    extra = {"config": keys, "position": {"epoch": 0, "sample": 24}}
    folder = old / "checkpoints" / "step_3"
    native_writer.write(str(folder), new, extra=extra)
    assert stored_config(str(old)) == small.parsed(model_dir=str(old))

    def reading(**other: Any) -> Worker:
        reader, checkpoints = on_disk(old if read == "restore" else tmp_path / "tuned", **other)
        with checkpoints:
            if read == "restore":
                reader.restore()
            elif read == "tune_from":
                reader.tune_from(str(old), fresh_opt=False)
            else:
                reader.load_weights(str(old))
        return reader

    assert_equal(reading(tpu_project="p").state.params, worker.state.params)
    if read == "restore":
        assert caplog.messages == ["changed since that checkpoint: tpu_project left out -> 'p'"]
    with pytest.raises(CheckpointError) as told:
        reading(window=5, attention_scale=1.0, output_scale=0.5, head_qk_trick=True)
    assert str(told.value).splitlines()[1:] == [
        "  - window is 0 there, 5 in the configuration",
        "  - attention_scale is 0.5 there, 1.0 in the configuration",
        "  - output_scale is 1.0 there, 0.5 in the configuration",
        "  - head_qk_trick is False there, True in the configuration",
    ]
    mean = Mean([NativeSource(str(folder)), new])  # of one model, however old its checkpoints
    assert mean.known["output_scale"] == 1.0
