"""Trackers: event files that TensorFlow reads, and a W&B run that goes on under its id."""

import pathlib
import sys
import types
from typing import Any

import pytest

from mesh_transformer import config, trackers
from mesh_transformer.config import Config


@pytest.fixture
def run(tmp_path: pathlib.Path) -> Config:
    return config.parse(
        {
            "layers": 2, "d_model": 64, "n_heads": 4, "n_vocab": 256, "n_tokens": 256, "seq": 32,
            "norm": "layernorm", "pe": "rotary", "per_replica_batch": 3, "warmup_steps": 1,
            "anneal_steps": 9, "lr": 1e-3, "end_lr": 1e-4, "weight_decay": 0.1, "total_steps": 10,
            "ckpt_every": 5, "keep_every": 10, "train_set": "train.index", "name": "first try",
            "model_dir": str(tmp_path), "tokenizer": "tokenizer.json", "comment": "why",
            "trackers": ["tensorboard", "wandb"], "wandb_project": "models",
        }
    )  # fmt: skip


def _events(folder: pathlib.Path) -> list[Any]:
    """Read every event, checksums included, with TensorFlow."""
    tf = pytest.importorskip("tensorflow")
    [file] = folder.iterdir()
    assert file.name.startswith("events.out.tfevents.")
    records = tf.data.TFRecordDataset(str(file)).as_numpy_iterator()
    return [tf.compat.v1.Event.FromString(record) for record in records]


def test_tensorflow_reads_the_scalars_of_an_event_file(tmp_path: pathlib.Path) -> None:
    board = trackers.TensorBoard(str(tmp_path), step=0)
    board.write(1, {"train/loss": 2.5, "val/loss_π": -1.0})
    board.write(300_000, {"noise/S_noise": 1e300})
    board.close()
    version, _, first, last = _events(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert first.step == 1
    assert first.wall_time > 1.7e9
    scalars = {value.tag: value.simple_value for value in first.summary.value}
    assert scalars == {"train/loss": 2.5, "val/loss_π": -1.0}
    assert last.step == 300_000
    assert last.summary.value[0].simple_value == float("inf")


def test_an_event_file_tells_tensorboard_to_forget_the_steps_taken_again(
    tmp_path: pathlib.Path,
) -> None:
    trackers.TensorBoard(str(tmp_path), step=500).close()
    start = _events(tmp_path)[1]
    assert start.step == 501
    assert start.session_log.status == start.session_log.START


def test_events_are_in_the_file_as_soon_as_they_are_written(tmp_path: pathlib.Path) -> None:
    board = trackers.TensorBoard(str(tmp_path), step=0)
    board.write(1, {"train/loss": 2.5})
    assert len(_events(tmp_path)) == 3
    board.close()


class FakeRun:
    def __init__(self, **given: Any) -> None:
        self.given = given
        self.axes: dict[str, str | None] = {}
        self.logged: list[dict[str, float]] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, fields: dict[str, float]) -> None:
        self.logged.append(fields)

    def finish(self) -> None:
        self.finished = True


class FakeError(Exception):
    pass


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """Put a module in the place of wandb that notes the runs it is asked for."""
    runs: list[FakeRun] = []

    def init(**given: Any) -> FakeRun:
        runs.append(FakeRun(**given))
        return runs[-1]

    module = types.SimpleNamespace(init=init, errors=types.SimpleNamespace(Error=FakeError))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_wandb_is_told_the_run_and_plots_over_our_steps(
    run: Config, wandb_runs: list[FakeRun]
) -> None:
    tracker = trackers.WandB(run, step=0)
    tracker.write(7, {"train/loss": 2.5})
    tracker.close()
    [started] = wandb_runs
    assert started.given["project"] == "models"
    assert started.given["name"] == "first try"
    assert started.given["notes"] == "why"
    assert started.given["config"] == run.to_flat()
    assert started.axes == {"step": None, "*": "step"}
    assert started.logged == [{"step": 7, "train/loss": 2.5}]
    assert started.finished


def test_a_resumed_run_keeps_its_wandb_id_and_a_new_one_gets_another(
    run: Config, wandb_runs: list[FakeRun]
) -> None:
    for step in (0, 500, 0):
        trackers.WandB(run, step).close()
    first, resumed, new = (started.given["id"] for started in wandb_runs)
    assert first == resumed != new
    assert {started.given["resume"] for started in wandb_runs} == {"allow"}


def test_a_wandb_that_refuses_is_an_error_that_says_what_to_do_and_ends_the_other_trackers(
    run: Config, wandb_runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**given: Any) -> None:
        raise FakeError("api_key not configured")

    closed: list[trackers.TensorBoard] = []
    close = trackers.TensorBoard.close

    def note(board: trackers.TensorBoard) -> None:
        closed.append(board)
        close(board)

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    monkeypatch.setattr(trackers.TensorBoard, "close", note)
    with pytest.raises(trackers.TrackerError, match=r"api_key not configured.*WANDB_MODE=offline"):
        trackers.start(run, step=0)
    assert len(closed) == 1


def test_without_the_package_the_error_names_the_extra(
    run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(trackers.TrackerError, match=r'pip install -e "\.\[wandb\]" -c constr'):
        trackers.WandB(run, step=0)


def test_the_trackers_asked_for_start_in_order(run: Config, wandb_runs: list[FakeRun]) -> None:
    started = trackers.start(run, step=0)
    assert [type(tracker) for tracker in started] == [trackers.TensorBoard, trackers.WandB]
    for tracker in started:
        tracker.close()
