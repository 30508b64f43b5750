"""The training loop, driven with a session that only writes down what it is asked to do."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import record_files
from configurations import MINIMAL
from fake_session import N_SEQUENCES, Fake

from mesh_transformer import metrics_file
from mesh_transformer.config import Config, parse
from mesh_transformer.data import DataError
from mesh_transformer.errors import UserError
from mesh_transformer.metrics import MetricsLog
from mesh_transformer.session import Restored
from mesh_transformer.training import loop
from mesh_transformer.training.loop import Finished, StopSignals, TrainingError

SEQ = 4
PER_STEP = 4


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in a folder with a training set, and leave the signals' handlers as they were."""
    monkeypatch.chdir(tmp_path)
    record_files.write(Path("train.tfrecords"), record_files.numbered(N_SEQUENCES, seq=SEQ))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    signal.signal(signal.SIGINT, before)


def configured(**keys: Any) -> Config:
    ours = {
        "seq": SEQ,
        "tokenizer": "bytes",
        "per_replica_batch": PER_STEP // 2,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 1,
        "anneal_steps": 1,
        "train_set": "train.tfrecords",
        "model_dir": "run",
        "keep_every": keys.get("ckpt_every", 5),
    }
    return parse(MINIMAL | ours | keys)


def train(session: Fake, **keys: Any) -> Finished:
    config = configured(**keys)
    with StopSignals() as signals:
        data = loop.Data(config, 1)
        return loop.train(session, config, data, signals, n_devices=1, device_kind="cpu")


def lines() -> list[dict[str, Any]]:
    """The log, without what differs from run to run."""
    timeless = metrics_file.read("run")
    return [{k: v for k, v in line.items() if k not in metrics_file.TIMING} for line in timeless]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fake], None]:
    """Let what is done to the log stand among a session's events."""

    def among(session: Fake) -> None:
        def noting(name: str) -> None:
            method = getattr(MetricsLog, name)

            def noted(log: MetricsLog, *args: Any) -> None:
                session.events.append((f"log {name}", *args[:1]))
                method(log, *args)

            monkeypatch.setattr(MetricsLog, name, noted)

        for name in ("train", "validation", "flush"):
            noting(name)

    return among


# What happens when


def test_metrics_are_looked_at_two_steps_late_and_all_of_them_before_a_checkpoint(
    logged: Callable[[Fake], None],
) -> None:
    session = Fake()
    logged(session)
    assert train(session, total_steps=5, ckpt_every=100) == Finished(5, None)
    assert [" ".join(map(str, event[:2])) for event in session.events] == [
        "restore None",
        *("train 1", "train 2", "train 3", "log train 1", "train 4", "log train 2", "train 5"),
        *("log train 3", "log train 4", "log train 5", "log flush", "save 5"),
    ]


def test_a_step_is_logged_then_validated_then_saved(logged: Callable[[Fake], None]) -> None:
    record_files.write(Path("val.tfrecords"), record_files.numbered(5, seq=SEQ))
    session = Fake()
    logged(session)
    keys = {"val_set": {"v": "val.tfrecords"}, "val_batches": 2, "val_every": 2}
    train(session, total_steps=5, ckpt_every=4, **keys)
    validated = ["evaluate", "evaluate", "log validation"]
    assert [event[0] for event in session.events] == [
        *("restore", "train", "train", "log train", "log train", *validated),
        *("train", "train", "log train", "log train", *validated, "log flush", "save"),
        *("train", "log train", *validated, "log flush", "save"),
    ]
    assert session.named("log validation") == [("log validation", step) for step in (2, 4, 5)]
    assert session.named("save") == [("save", 4), ("save", 5)]


def test_each_step_takes_the_next_batch_and_is_logged_once() -> None:
    session = Fake()
    train(session, total_steps=20, ckpt_every=7)
    fed = [event for event in session.events if event[0] == "train"]
    assert [event[1] for event in fed] == list(range(1, 21))
    assert [n for event in fed for n in event[2]] == [n % N_SEQUENCES for n in range(80)]
    assert [(line["step"], line["train/loss"]) for line in lines()] == [
        (step, step) for step in range(1, 21)
    ]
    saves = [event[1:] for event in session.events if event[0] == "save"]
    assert saves == [(step, step * PER_STEP) for step in (7, 14, 20)]


def test_without_val_batches_nothing_is_validated() -> None:
    session = Fake()
    train(session, val_every=1)
    assert not session.named("evaluate")


# Going on


def test_a_resumed_run_feeds_and_logs_what_an_uninterrupted_one_does() -> None:
    whole = Fake()
    train(whole, ckpt_every=6)
    log = lines()
    rest = Fake(Restored(6, {"epoch": 0, "sample": 6 * PER_STEP}))
    train(rest, ckpt_every=6)
    assert rest.events[1:] == [event for event in whole.events if event[1] and event[1] > 6]
    assert lines() == log


def test_at_the_last_step_there_is_nothing_to_do(caplog: pytest.LogCaptureFixture) -> None:
    train(Fake())
    before = Path("run/metrics.jsonl").read_bytes()
    caplog.set_level("INFO")
    session = Fake(Restored(10, {"epoch": 0, "sample": 40}))
    assert train(session) == Finished(10, None)
    assert session.events == [("restore", None)]
    assert Path("run/metrics.jsonl").read_bytes() == before
    assert "nothing to do: total_steps is 10" in caplog.text


# What is wrong


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"train_set": "absent.index"}, "index file absent.index: no such file"),
        ({"per_replica_batch": N_SEQUENCES}, "holds 64 sequences, less than one batch of 128"),
        ({"val_set": {"v": "absent.index"}, "val_batches": 1}, "absent.index: no such file"),
        ({"tokenizer": "absent.json"}, "tokenizer absent.json: there is no file"),
    ],
)
def test_data_that_cannot_be_used_is_told_before_anything_is_asked_of_the_session(
    keys: dict[str, Any], told: str
) -> None:
    session = Fake()
    with pytest.raises(DataError, match=told):
        train(session, **keys)
    assert not session.events and not Path("run").exists()


def test_data_that_ends_before_the_position_is_told_before_training() -> None:
    session = Fake(Restored(5, {"epoch": 0, "sample": 65}))
    with pytest.raises(DataError, match="holds 64 sequences, but reading is to go on after 65"):
        train(session)
    assert session.events == [("restore", None)]


@pytest.mark.parametrize(
    ("step", "name"), [(3, "loss"), (5, "loss"), (5, "grad_norm"), (10, "grad_norm")]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_spoils_the_weights_is_logged_and_nothing_is_saved_from_it_on(
    step: int, name: str, value: float
) -> None:
    """A finite loss with a gradient that is not finite spoils the weights as well."""
    session = Fake()
    session.metrics = {step: {name: value}}
    with pytest.raises(TrainingError, match=rf"step {step}: {name} is {value}; lower lr \(now"):
        train(session)
    assert session.named("save") == [("save", 5)] * (step > 5)
    assert [line["step"] for line in lines()] == list(range(1, step + 1))


def test_a_run_may_be_told_to_train_on_regardless() -> None:
    session = Fake()
    session.metrics = {5: {"loss": math.nan}}
    assert train(session, stop_on_nan=False) == Finished(10, None)
    assert session.named("save") == [("save", 5), ("save", 10)]


class Failed:
    """What a device computed in vain, which shows when it is looked at."""

    def __float__(self) -> float:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB")


def test_memory_that_did_not_suffice_is_told_when_metrics_are_looked_at() -> None:
    session = Fake()
    session.metrics = {3: {"loss": Failed()}}
    with pytest.raises(UserError, match="small for a step: lower per_replica_batch .*D: 9 GiB"):
        train(session)
    assert [line["step"] for line in lines()] == [1, 2]


# Signals


def send(*numbers: signal.Signals) -> Callable[[], None]:
    def sending() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return sending


BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@BOTH
@pytest.mark.parametrize("step", [1, 5, 7])
def test_a_signal_ends_training_with_a_checkpoint_of_the_step_under_way(
    number: signal.Signals, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    session = Fake()
    session.during = {("train", step): send(number)}
    assert train(session) == Finished(step, number)
    assert session.events[-1] == ("save", step, step * PER_STEP)
    assert session.named("save").count(("save", step)) == 1
    assert [line["step"] for line in lines()] == list(range(1, step + 1))
    assert f"{number.name}: stopping once a checkpoint is saved" in caplog.text


def test_a_signal_while_saving_ends_training_there() -> None:
    session = Fake()
    session.during = {("save", 5): send(signal.SIGTERM)}
    assert train(session) == Finished(5, signal.SIGTERM)
    assert session.named("train", "save")[-2:] == [("train", 5), ("save", 5)]


def test_a_signal_in_the_last_step_changes_nothing() -> None:
    session = Fake()
    session.during = {("train", 10): send(signal.SIGTERM)}
    assert train(session) == Finished(10, None)


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    session = Fake()
    session.during = {("train", 3): send(signal.SIGINT, signal.SIGINT)}
    with pytest.raises(KeyboardInterrupt):
        train(session)
    assert session.events[-1][:2] == ("train", 3)


def test_a_second_sigterm_acts_as_it_did_before_training() -> None:
    acted = []
    before = signal.signal(signal.SIGTERM, lambda number, _: acted.append(number))
    session = Fake()
    session.during = {("train", 3): send(signal.SIGTERM, signal.SIGTERM)}
    train(session)
    assert acted == [signal.SIGTERM]
    signal.signal(signal.SIGTERM, before)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """Shells start what runs in the background so, for Ctrl-C to reach the foreground alone."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    session = Fake()
    session.during = {("train", 3): send(signal.SIGINT, signal.SIGINT)}
    assert train(session) == Finished(10, None)
    signal.signal(signal.SIGINT, before)


def test_signals_are_noted_from_the_first_step_until_the_block_ends() -> None:
    config = configured()
    data = loop.Data(config, 1)
    with StopSignals() as signals:
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)()
        loop.train(Fake(), config, data, signals, n_devices=1, device_kind="cpu")
        send(signal.SIGTERM)()  # as while the last checkpoint is written
        assert signals.received is signal.SIGTERM


# Validation


def val_set(name: str, targets: list[list[int]]) -> str:
    record_files.write(Path(f"{name}.tfrecords"), np.array([[0, *row] for row in targets]))
    return f"{name}.tfrecords"


def test_every_set_is_validated_by_means_over_its_first_batches() -> None:
    """Batches hold two sequences; of a batch that is not full, only what is there counts."""
    bytes_ = [[64, 64, 64, 65], [66, 66, 67, 256]]
    keys = {
        "a": val_set("a", bytes_ + bytes_[:1]),
        "b": val_set("b", [[2, 3, 3, 3]] * 5),
        "beyond": val_set("beyond", [[300, 301, 2, 2]]),
    }
    train(Fake(), val_set=keys, val_batches=2, total_steps=2)
    a, b, beyond = lines()[2:]
    sum_a = 2 * (64 * 3 + 65) + 66 * 2 + 67 + 256
    assert a == {
        "step": 2,
        "val/loss_a": sum_a / 8 / 12,
        "val/accuracy_a": 9 / 12,
        # 256 ends a document and stands for no byte, so 11 bytes.
        "val/bits_per_byte_a": pytest.approx(sum_a / 8 / math.log(2) / 11, rel=1e-14),
    }
    assert b["val/loss_b"] == 11 / 8 / 4 and b["val/accuracy_b"] == 1 / 4
    assert b["val/bits_per_byte_b"] == pytest.approx(11 / 8 / 4 / math.log(2), rel=1e-14)
    # Ids beyond the tokenizer's stand for no text either.
    assert beyond["val/bits_per_byte_beyond"] == pytest.approx(605 / 8 / math.log(2) / 2, rel=1e-14)


@pytest.mark.parametrize(("step", "scored"), [(4, 0), (4, 3), (8, 2), (10, 1), (10, 4)])
def test_a_signal_ends_validation_after_a_batch_and_what_is_left_comes_first_on_going_on(
    step: int, scored: int
) -> None:
    """Of two sets of two batches, at a step in between or the last; 0 is before the first batch."""
    sets = {name: val_set(name, [[2, 3, 4, n] for n in range(3)]) for name in ("a", "b")}
    keys = {"val_set": sets, "val_batches": 2, "val_every": 4}
    train(Fake(), **keys)
    whole = lines()
    shutil.rmtree("run")

    def n_scored(session: Fake) -> int:
        return session.named("evaluate").count(("evaluate", step))

    def stopping() -> None:
        if n_scored(session) == scored:
            send(signal.SIGTERM)()

    session = Fake()
    session.during = {("evaluate" if scored else "train", step): stopping}
    complete = step == 10 and scored == 4
    assert train(session, **keys) == Finished(step, None if complete else signal.SIGTERM)
    assert n_scored(session) == scored and session.events[-1][:2] == ("save", step)
    so_far = [line for line in whole if line["step"] <= step]
    assert lines() == so_far[: len(so_far) - 2 + scored // 2]

    rest = Fake(Restored(step, {"epoch": 0, "sample": step * PER_STEP}))
    assert train(rest, **keys) == Finished(10, None)
    assert n_scored(rest) == 4 - scored // 2 * 2
    assert rest.named("train") == [("train", later) for later in range(step + 1, 11)]
    assert lines() == whole
