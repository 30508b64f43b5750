"""Stages of shorter sequences: how long each step's are, in what is trained on and in the log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import record_files
from configurations import MINIMAL
from fake_session import N_SEQUENCES, Fake

from mesh_transformer import config, metrics_file
from mesh_transformer.metrics import BatchSizes, MetricsLog
from mesh_transformer.sections import Lengths
from mesh_transformer.session import Metrics, Restored
from mesh_transformer.training import loop
from mesh_transformer.training.loop import StopSignals

STAGES = Lengths(seq=8, warmup=((2, 2), (3, 4)))
AT = [2, 2, 4, 4, 4, 8, 8, 8]


def test_each_stage_lasts_its_steps_and_the_rest_is_of_seq() -> None:
    assert [STAGES.at(step) for step in range(1, 9)] == AT
    assert [STAGES.through(step) for step in range(9)] == [sum(AT[:n]) for n in range(9)]
    assert [step for step in range(1, 9) if STAGES.begins(step)] == [1, 3, 6]
    assert [Lengths(8).at(1), Lengths(8).through(5), Lengths(8).begins(2)] == [8, 40, False]


def configured(**keys: object) -> config.Config:
    given = {"seq": 8, "seq_warmup": [[2, 2], [3, 4]], "n_vocab": 1024, "total_steps": 8}
    given |= {
        "tokenizer": "bytes",
        "train_set": "train.tfrecords",
        "model_dir": "run",
        "anneal_steps": 6,
    }
    return config.parse(MINIMAL | given | keys)


def test_stages_are_pairs_in_plain_json_values() -> None:
    assert configured().lengths == STAGES
    assert configured().to_flat()["seq_warmup"] == [[2, 2], [3, 4]]
    for given, told in (
        ([[2]], "expected a list of 2, got [2]"),
        ([2], "expected a list, got 2 (int)"),
        ([[2, 1]], "expected 2 or more, got 1"),
        ([[0, 4]], "expected 1 or more, got 0"),
    ):
        with pytest.raises(config.ConfigError) as caught:
            configured(seq_warmup=given)
        assert caught.value.problems == (f"seq_warmup: {told}",)


class Seeing(Fake):
    """A session that keeps what it is trained on."""

    def __init__(self, restored: Restored | None = None) -> None:
        super().__init__(restored)
        self.seen: list[np.ndarray] = []

    def train(self, tokens_ABT1: np.ndarray, mask_ABT: np.ndarray | None = None) -> Metrics:
        self.seen.append(tokens_ABT1)
        return super().train(tokens_ABT1, mask_ABT)


def test_a_run_trains_on_the_beginning_of_each_record_and_a_resumed_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record_files.write(Path("train.tfrecords"), record_files.numbered(N_SEQUENCES, seq=8))

    def run(session: Seeing, **keys: object) -> None:
        made = configured(**keys)
        with StopSignals() as signals:
            data = loop.Data(made, 1)
            loop.train(session, made, data, signals, n_devices=1, device_kind="cpu")

    plain, whole = Seeing(), Seeing()
    run(plain, seq_warmup=[], model_dir="plain")
    run(whole)
    for full, short, length in zip(plain.seen, whole.seen, AT, strict=True):
        np.testing.assert_array_equal(short, full[..., : length + 1])
    lines = [line for line in metrics_file.read("run") if "train/loss" in line]
    assert [line["tokens_processed"] for line in lines] == np.cumsum(AT).tolist()

    resumed = Seeing(Restored(4, {"epoch": 0, "sample": 4}))
    run(resumed)
    for ours, theirs in zip(resumed.seen, whole.seen[4:], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    again = [line for line in metrics_file.read("run") if "train/loss" in line]
    assert [line["tokens_processed"] for line in again] == np.cumsum(AT).tolist()


def test_rates_are_of_the_tokens_of_a_step_and_the_end_is_told_by_those_that_are_left(
    tmp_path: Path,
) -> None:
    now = 0.0
    told: list[tuple[float | None, float | None, float | None]] = []

    class Screen:
        def show(self, step: int, status: object) -> None:
            told.append((status.tokens_per_second, status.eta_seconds, status.mfu))  # type: ignore

        def say(self, message: str) -> None: ...
        def close(self) -> None: ...

    with MetricsLog(
        str(tmp_path),
        total_steps=8,
        batch=BatchSizes(sequences=3, micro_sequences=3, lengths=STAGES),
        flops_per_token=lambda length: 100.0 * length,
        peak_flops_per_second=1e4,
        shown=Screen(),
        clock=lambda: now,
    ) as log:
        metrics = dict.fromkeys(("loss", "last_loss", "grad_norm", "micro_grad_norm", "lr"), 1.0)
        for step, length in enumerate(AT, 1):
            now += length / 2 + (60 if STAGES.begins(step) else 0)  # 6 tokens a second
            log.train(step, metrics)
    lines = metrics_file.read(str(tmp_path))
    expected = [None, 6.0, None, 6.0, 6.0, None, 6.0, 6.0]
    assert [line["train/tokens_per_sec"] for line in lines] == expected
    assert [rate for rate, _, _ in told] == expected
    # At the pace of tokens so far, a sixth of a second for each, those of three sequences are left.
    assert told[1][1] == pytest.approx((1 / 6) * 3 * (sum(AT) - 4))
    assert told[-1][1] == 0
    assert [mfu for _, _, mfu in told][1::6] == pytest.approx([6 * 200 / 1e4, 6 * 800 / 1e4])
