"""The metrics log: what a run logs, and that a resumed run logs the same."""

import logging
import math
import pathlib
from collections.abc import Mapping

import numpy as np
import pytest

from mesh_transformer import config, metrics_file, progress, trackers
from mesh_transformer.metrics import BatchSizes, MetricsLog
from mesh_transformer.sections import Lengths
from mesh_transformer.session import Metrics

SPLIT = BatchSizes(sequences=8, micro_sequences=2, lengths=Lengths(16))
WHOLE = BatchSizes(sequences=2, micro_sequences=2, lengths=Lengths(16))
TOTAL = 10


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Screen:
    """A person's view, as a list of what was shown; also stands in for a tracker."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, progress.Status]] = []
        self.said: list[str] = []
        self.tracked: list[tuple[int, Mapping[str, float]]] = []
        self.closed = 0

    def show(self, step: int, status: progress.Status) -> None:
        self.shown.append((step, status))

    def say(self, message: str) -> None:
        self.said.append(message)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self.tracked.append((step, scalars))

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        self.closed += 1


def step_metrics(step: int) -> Metrics:
    rng = np.random.default_rng(step)
    names = ("loss", "last_loss", "grad_norm", "micro_grad_norm", "lr")
    return dict(zip(names, rng.uniform(1, 2, size=5).astype(np.float32), strict=True))


def train(log: MetricsLog, first: int, last: int) -> None:
    """Train a pretended run, validating at every third step."""
    for step in range(first, last + 1):
        log.train(step, step_metrics(step))
        if step % 3 == 0:
            log.validation(step, "pile", 2.0 + 1 / step, 0.5, bytes_per_token=4.0)


def repeatable(root: pathlib.Path) -> list[metrics_file.Line]:
    lines = metrics_file.read(str(root))
    return [{k: v for k, v in line.items() if k not in metrics_file.TIMING} for line in lines]


def open_log(root: pathlib.Path, *, step: int = 0, batch: BatchSizes = SPLIT) -> MetricsLog:
    return MetricsLog(str(root), total_steps=TOTAL, batch=batch, step=step, shown=Screen())


def test_every_step_is_one_line_of_the_documented_fields(tmp_path: pathlib.Path) -> None:
    clock = Clock()
    with MetricsLog(
        str(tmp_path),
        total_steps=TOTAL,
        batch=SPLIT,
        flops_per_token=lambda length: 100.0,
        peak_flops_per_second=6400.0,
        shown=Screen(),
        clock=clock,
    ) as log:
        for step in (1, 2):
            log.train(step, step_metrics(step))
            clock.now += 4
    first, second = metrics_file.read(str(tmp_path))
    small, big = (float(step_metrics(2)[key]) ** 2 for key in ("micro_grad_norm", "grad_norm"))
    assert second["noise/G_noise"] == pytest.approx((8 * big - 2 * small) / 6)
    assert second["noise/S_noise"] == pytest.approx((small - big) / (1 / 2 - 1 / 8))
    noise = {key: second.pop(key) for key in [*second] if key.startswith("noise/")}
    assert [*noise] == [
        "noise/G_noise",
        "noise/S_noise",
        "noise/G_noise_avg",
        "noise/S_noise_avg",
        "noise/B_simple",
        "noise/B_simple_tokens",
    ]
    assert noise["noise/B_simple_tokens"] == 16 * noise["noise/B_simple"]
    assert second == {
        "step": 2,
        "train/loss": float(step_metrics(2)["loss"]),
        "train/last_loss": float(step_metrics(2)["last_loss"]),
        "train/grad_norm": float(step_metrics(2)["grad_norm"]),
        "train/micro_grad_norm": float(step_metrics(2)["micro_grad_norm"]),
        "train/learning_rate": float(step_metrics(2)["lr"]),
        "sequences_processed": 16,
        "tokens_processed": 256,
        "train/step_seconds": 4.0,
        "train/tokens_per_sec": 32.0,
        "train/mfu": 0.5,
    }
    assert {first[name] for name in metrics_file.TIMING if name in first} == {None}


@pytest.mark.parametrize("batch", [SPLIT, WHOLE])
@pytest.mark.parametrize(("saved", "killed"), [(3, 3), (4, 7), (9, 10)])
def test_a_killed_and_resumed_run_logs_what_an_uninterrupted_one_does(
    tmp_path: pathlib.Path, batch: BatchSizes, saved: int, killed: int
) -> None:
    with open_log(tmp_path / "whole", batch=batch) as log:
        train(log, 1, TOTAL)
    with open_log(tmp_path / "killed", batch=batch) as log:
        train(log, 1, killed)
    with (tmp_path / "killed" / metrics_file.NAME).open("a") as file:
        file.write('{"step": 99, "train/lo')
    with open_log(tmp_path / "killed", step=saved, batch=batch) as log:
        train(log, saved + 1, TOTAL)
    assert repeatable(tmp_path / "killed") == repeatable(tmp_path / "whole")


def test_a_run_that_starts_anew_leaves_nothing_of_the_old_log(tmp_path: pathlib.Path) -> None:
    with open_log(tmp_path) as log:
        train(log, 1, TOTAL)
    with open_log(tmp_path) as log:
        train(log, 1, 2)
    assert [line["step"] for line in metrics_file.read(str(tmp_path))] == [1, 2]


def test_resuming_with_another_batch_goes_on_counting(tmp_path: pathlib.Path) -> None:
    with open_log(tmp_path) as log:
        train(log, 1, 2)
    with open_log(tmp_path, step=2, batch=WHOLE) as log:
        train(log, 3, 3)
    line = metrics_file.read(str(tmp_path))[2]
    assert line["sequences_processed"] == 2 * 8 + 2
    assert line["tokens_processed"] == (2 * 8 + 2) * 16


def test_resuming_with_a_lost_log_warns_and_counts_by_the_batch(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), open_log(tmp_path, step=5) as log:
        train(log, 6, 6)
    assert "lacks steps 1 to 5" in caplog.text
    assert metrics_file.read(str(tmp_path))[0]["sequences_processed"] == 6 * 8


def test_steps_must_follow_one_another(tmp_path: pathlib.Path) -> None:
    with open_log(tmp_path, step=0) as log:
        train(log, 1, 1)
        for wrong in (1, 3):
            with pytest.raises(ValueError, match=f"step {wrong} follow those of step 1"):
                log.train(wrong, step_metrics(wrong))


def test_a_batch_of_one_microbatch_has_no_noise_scale(tmp_path: pathlib.Path) -> None:
    with open_log(tmp_path, batch=WHOLE) as log:
        train(log, 1, 2)
    for line in metrics_file.read(str(tmp_path)):
        assert {line[key] for key in line if key.startswith("noise/")} == {None}


def test_a_step_without_a_finite_norm_is_logged_and_left_out_of_the_noise_average(
    tmp_path: pathlib.Path,
) -> None:
    with open_log(tmp_path) as log:
        log.train(1, step_metrics(1))
        log.train(2, {**step_metrics(2), "loss": math.nan, "grad_norm": math.inf})
    first, second = metrics_file.read(str(tmp_path))
    assert math.isnan(second["train/loss"])
    assert second["noise/G_noise"] is None
    assert second["noise/G_noise_avg"] == first["noise/G_noise_avg"]


def test_validation_logs_and_says_loss_accuracy_and_bits_per_byte(tmp_path: pathlib.Path) -> None:
    screen = Screen()
    with MetricsLog(str(tmp_path), total_steps=TOTAL, batch=SPLIT, shown=screen) as log:
        log.validation(0, "pile", 2 * math.log(2), 0.25, bytes_per_token=4.0)
        log.validation(0, "code", 1.5, 0.5)
    pile, code = metrics_file.read(str(tmp_path))
    assert pile["val/bits_per_byte_pile"] == pytest.approx(0.5)
    assert pile["val/accuracy_pile"] == 0.25
    assert code == {"step": 0, "val/loss_code": 1.5, "val/accuracy_code": 0.5}
    assert screen.said == [
        "step 0  pile: loss 1.3863 nats/token, accuracy 25.0%, 0.5000 bits/byte",
        "step 0  code: loss 1.5000 nats/token, accuracy 50.0%",
    ]


def test_trackers_get_the_numbers_of_each_line_that_are_known(tmp_path: pathlib.Path) -> None:
    sink = Screen()
    with MetricsLog(
        str(tmp_path), total_steps=TOTAL, batch=WHOLE, sinks=[sink], shown=Screen()
    ) as log:
        log.train(1, step_metrics(1))
        log.validation(1, "pile", 2.0, 0.5)
    (step, scalars), validation = sink.tracked
    assert step == 1
    assert scalars["train/loss"] == step_metrics(1)["loss"]
    assert None not in scalars.values()
    assert validation == (1, {"val/loss_pile": 2.0, "val/accuracy_pile": 0.5})


def test_what_is_shown_has_the_pace_of_steps_and_an_eta_that_counts_pauses(
    tmp_path: pathlib.Path,
) -> None:
    clock, screen = Clock(), Screen()
    with MetricsLog(
        str(tmp_path), total_steps=TOTAL, batch=SPLIT, shown=screen, clock=clock
    ) as log:
        log.train(1, step_metrics(1))
        clock.now += 2
        with log.paused():
            clock.now += 6
        log.train(2, step_metrics(2))
    (_, compiling), (step, status) = screen.shown
    assert compiling.tokens_per_second is compiling.eta_seconds is None
    assert (step, status.tokens_per_second, status.mfu) == (2, 64.0, None)
    assert status.eta_seconds == 8 * 8.0


def test_how_the_hosts_of_a_pod_stand_is_logged_and_shown_as_it_differs_between_repetitions(
    tmp_path: pathlib.Path,
) -> None:
    sink, statuses = Screen(), iter([progress.PodStatus(4, 0, 0.0), progress.PodStatus(3, 1, 0.5)])
    with MetricsLog(
        str(tmp_path / "pod"),
        total_steps=TOTAL,
        batch=SPLIT,
        sinks=[sink],
        shown=sink,
        pod=lambda: next(statuses),
    ) as log:
        train(log, 1, 2)
    with open_log(tmp_path / "alone") as log:
        train(log, 1, 2)
    assert [status.pod for _, status in sink.shown] == [(4, 0, 0.0), (3, 1, 0.5)]
    second = metrics_file.read(str(tmp_path / "pod"))[1]
    told = {name: value for name, value in second.items() if name.startswith("pod/")}
    assert told == {"pod/hosts": 3, "pod/restarts": 1, "pod/goodput": 0.5}
    assert told.items() <= sink.tracked[1][1].items()
    assert repeatable(tmp_path / "pod") == repeatable(tmp_path / "alone")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_leaving_the_log_by_any_error_closes_everything_once(
    tmp_path: pathlib.Path, error: type[BaseException]
) -> None:
    screen, sink = Screen(), Screen()
    log = MetricsLog(str(tmp_path), total_steps=TOTAL, batch=SPLIT, sinks=[sink], shown=screen)
    with pytest.raises(error), log:
        raise error
    log.close()
    assert (screen.closed, sink.closed) == (1, 1)


def test_a_log_that_cannot_open_closes_the_trackers_it_was_given(tmp_path: pathlib.Path) -> None:
    (tmp_path / metrics_file.NAME).write_text("not JSON\n{}\n")
    sink = Screen()
    with pytest.raises(ValueError, match="line 1 is not a line of metrics"):
        MetricsLog(str(tmp_path), total_steps=TOTAL, batch=SPLIT, step=1, sinks=[sink])
    assert sink.closed == 1


def test_the_log_of_a_configured_run_counts_replicas_and_accumulation(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "start", lambda config, step: [])
    run = config.parse(
        {
            "layers": 2, "d_model": 64, "n_heads": 4, "n_vocab": 256, "n_tokens": 256, "seq": 32,
            "norm": "layernorm", "pe": "rotary", "cores_per_replica": 2, "per_replica_batch": 3,
            "gradient_accumulation_steps": 5, "warmup_steps": 1, "anneal_steps": 9, "lr": 1e-3,
            "end_lr": 1e-4, "weight_decay": 0.1, "total_steps": 10, "ckpt_every": 5,
            "keep_every": 10, "train_set": "train.index", "model_dir": str(tmp_path), "name": "x",
            "tokenizer": "tokenizer.json",
        }
    )  # fmt: skip
    with MetricsLog.for_run(run, step=0, n_devices=8, device_kind="TPU v4") as log:
        log.train(1, step_metrics(1))
        log.train(2, step_metrics(2))
    second = metrics_file.read(str(tmp_path))[1]
    assert second["sequences_processed"] == 2 * 4 * 3 * 5
    assert second["tokens_processed"] == second["sequences_processed"] * 32
    small, big = (float(step_metrics(2)[key]) ** 2 for key in ("micro_grad_norm", "grad_norm"))
    assert second["noise/S_noise"] == pytest.approx((small - big) / (1 / 3 - 1 / 60))
    flops_per_second = second["train/tokens_per_sec"] * (6 * (2 * 12 * 64**2 + 64 * 256) + 49152)
    assert second["train/mfu"] == pytest.approx(flops_per_second / (8 * 275e12))
