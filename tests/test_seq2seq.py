"""From lines of JSON to answers: records, training in two parts, export, sampling from both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pairs_of_texts
import pytest
import runs
import small

import create_finetune_tfrecords
import device_sample
import device_train
import resharding_example

pytestmark = pytest.mark.slow

PAIRS = {f"double {letter}": f"{letter} {letter}" for letter in "abcdefgh"}
N_STEPS = 150


def configuration(folder: Path, **keys: Any) -> str:
    """Write the configuration of a run on pairs, on all eight devices of the tests."""
    whole = {
        **{**small.KEYS, **small.ENCODER_DECODERS["t5 v1.1"], "n_vocab": 32, "pad_id": 0},
        **{"encoder_seq": 12, "seq": 8, "per_replica_batch": 4, "cores_per_replica": 4},
        **{"tpu_size": 8, "zero_stage": 3, "lr": 3e-3, "end_lr": 3e-4, "weight_decay": 0.0},
        **{"total_steps": N_STEPS, "anneal_steps": 100, "ckpt_every": 100, "val_every": 100},
        **{"train_set": str(folder / "pairs.index"), "val_batches": 1},
        **{"val_set": {"same": str(folder / "pairs.index")}, "model_dir": str(folder / "run")},
        "tokenizer": str(folder / "tokenizer"),
        **keys,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(whole))
    return str(path)


def test_a_model_is_tuned_on_pairs_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pairs_of_texts.write(tmp_path / "pairs.jsonl", PAIRS)
    tokenizer = pairs_of_texts.write_tokenizer(tmp_path / "tokenizer")
    shape = ["--encoder-seq", "12", "--seq", "8", "--tokenizer", tokenizer]
    arguments = [str(path), "pairs", "--output-dir", str(tmp_path), "--workers", "1", *shape]
    assert create_finetune_tfrecords.main(arguments) == 0
    config = configuration(tmp_path, total_steps=100)
    assert runs.called(capsys, device_train.main, "--config", config).status == 0
    config = configuration(tmp_path)  # and on from the checkpoint of step 100
    assert runs.called(capsys, device_train.main, "--config", config).status == 0
    logged = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [line["train/loss"] for line in logged if "train/loss" in line]
    assert len(losses) == N_STEPS
    assert losses[0] > 3 and np.mean(losses[-5:]) < 0.1
    (scored,) = (line for line in logged if line.get("val/loss_same") and line["step"] == N_STEPS)
    assert scored["val/loss_same"] < 0.1, "padding is counted"
    exported = str(tmp_path / "hf")
    written = ("--input", str(tmp_path / "run"), "--output", exported, "--format", "hf")
    assert runs.called(capsys, resharding_example.main, *written).status == 0
    for model in (("--config", config), ("--model", exported)):
        for source, target in [("double c", "c c"), ("double f", "f f")]:
            flags = (*model, "--temp", "0", "--max-new-tokens", "6", "--prompt", source)
            done = runs.called(capsys, device_sample.main, *flags)
            assert (done.status, done.output) == (0, f"{source}\n{target}\n"), done
