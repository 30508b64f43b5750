"""Every sentence that a configuration can be refused or doubted with."""

from __future__ import annotations

import dataclasses
import inspect
import warnings

import pytest
from configurations import MINIMAL
from impossible import DOUBTS_OF_LENGTHS, OF_LENGTHS, OF_THE_MODEL

from mesh_transformer import config as configuration
from mesh_transformer import relations, rules, schema
from mesh_transformer.config import ConfigError, ConfigWarning


def problems_of(**changes: object) -> tuple[str, ...]:
    """Everything that is wrong with the minimal configuration once changed."""
    with pytest.raises(ConfigError) as caught:
        configuration.parse(MINIMAL | changes)
    return caught.value.problems


def doubts_of(**changes: object) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        configuration.parse(MINIMAL | changes, "x.json")
    assert all(issubclass(warning.category, ConfigWarning) for warning in caught)
    return [str(warning.message) for warning in caught]


WRONG_VALUES = [
    ("layers", "28", "expected a whole number, got '28' (str); write 28 without quotes"),
    ("layers", "28.0", "expected a whole number, got '28.0' (str); write 28 without quotes"),
    ("layers", "28.5", "expected a whole number, got '28.5' (str)"),
    ("layers", "many", "expected a whole number, got 'many' (str)"),
    ("layers", "inf", "expected a whole number, got 'inf' (str)"),
    ("layers", 28.0, "expected a whole number, got 28.0 (float); write 28"),
    ("layers", 28.5, "expected a whole number, got 28.5 (float)"),
    ("layers", True, "expected a whole number, got true"),
    ("layers", [28], "expected a whole number, got [28] (list)"),
    ("layers", None, "expected a whole number, got null"),
    ("layers", 0, "expected 1 or more, got 0"),
    ("seq", 1, "expected 2 or more, got 1"),
    ("warmup_steps", -1, "expected 0 or more, got -1"),
    ("lr", 0, "expected a number above 0, got 0.0"),
    ("lr", "0.1", "expected a number, got '0.1' (str); write 0.1 without quotes"),
    (
        "lr",
        "1e-4",
        "expected a number, got '1e-4' (str); write 0.0001 without quotes "
        "(YAML takes 1e-4 for text: it lacks a dot)",
    ),
    (
        "lr",
        "2e-5",
        "expected a number, got '2e-5' (str); write 2.0e-05 without quotes "
        "(YAML takes 2e-5 for text: it lacks a dot)",
    ),
    ("lr", False, "expected a number, got false"),
    ("lr", float("nan"), "expected a finite number, got nan"),
    ("lr", float("inf"), "expected a finite number, got inf"),
    ("weight_decay", -0.1, "expected 0 or more, got -0.1"),
    ("original_shards", -1, "expected 0 or more, got -1"),
    ("original_shards", None, "expected a whole number, got null"),
    ("z_loss", -1, "expected 0 or more, got -1.0"),
    ("dropout_residual", 1, "expected 0 or more, below 1, got 1.0"),
    ("noise_scale_alpha", 0, "expected a number above 0 and at most 1, got 0.0"),
    ("noise_scale_alpha", 1.5, "expected a number above 0 and at most 1, got 1.5"),
    ("seed", -1, "expected 0 or more, below 2^32, got -1"),
    ("seed", 2**32, "expected 0 or more, below 2^32, got 4294967296"),
    ("name", " ", "expected some text, got ' '"),
    ("name", 6, "expected text, got 6 (int)"),
    ("comment", None, "expected text, got null"),
    ("stop_on_nan", 1, "expected true or false, got 1 (int)"),
    ("stop_on_nan", "true", "expected true or false, got 'true' (str)"),
    ("eval_harness_tasks", "piqa", "expected a list, got 'piqa' (str)"),
    ("eval_harness_tasks", ["piqa", 1], "expected text, got 1 (int)"),
    ("eval_harness_tasks", ["piqa", "piqa"], "'piqa' is listed more than once"),
    ("trackers", ["wanb"], "'wanb' is not one of 'tensorboard', 'wandb'; did you mean 'wandb'?"),
    (
        "val_set",
        "data/val.index",
        'expected an object of names and values such as {"name": "path"}, '
        "got 'data/val.index' (str)",
    ),
    ("val_set", {"": "data/val.index"}, "expected some text, got ''"),
    ("val_set", {"val": ["data/val.index"]}, "expected text, got ['data/val.index'] (list)"),
    ("zero_stage", 4, "4 is not one of 0, 1, 2, 3"),
    ("zero_stage", True, "true is not one of 0, 1, 2, 3"),
    ("zero_stage", "2", "'2' is not one of 0, 1, 2, 3; did you mean 2?"),
    (
        "norm",
        "LayerNrom",
        "'LayerNrom' is not one of 'layernorm', 'layernorm-nobias', 'layernorm-desync', "
        "'rmsnorm', 'rmsnorm-bias', 'scalenorm', 'scalenorm-bias', 'rmsnorm-mean', "
        "'rmsnorm-mean-plus-one'; did you mean 'layernorm'?",
    ),
    (
        "pe",
        None,
        "null is not one of 'rotary', 'rotary-half', 't5', 'fixed', 'sinusoidal', 'alibi', 'none'; "
        "did you mean 'none'?",
    ),
    (
        "pe",
        "xpos",
        "'xpos' is not one of 'rotary', 'rotary-half', 't5', 'fixed', 'sinusoidal', 'alibi', "
        "'none'",
    ),
    (
        "compute_dtype",
        "bf16",
        "'bf16' is not one of 'bfloat16', 'float32'; did you mean 'bfloat16'?",
    ),
    ("remat", False, "false is not one of 'full', 'dots', 'none'"),
    (
        "attention",
        "flash",
        "'flash' is not one of 'auto', 'xla', 'cudnn', 'splash'; did you mean 'splash'?",
    ),
    (
        "val_every",
        0,
        'expected 1 or more, got 0; to train without validation write "val_set": {} and leave '
        "val_every out",
    ),
    ("ckpt_every", 0, "expected 1 or more, got 0; to save only the last step, write total_steps"),
    (
        "keep_every",
        0,
        "expected 1 or more, got 0; to keep only the newest, write a multiple of ckpt_every beyond "
        "total_steps",
    ),
    ("tpu_size", 0, "expected 1 or more, got 0; to use every device, leave it out"),
    ("bucket", "", "expected some text, got ''; to write elsewhere than to a bucket, leave it out"),
    ("tpu_type", "v3", "expected an accelerator type such as 'v3-8', got 'v3'"),
    ("tpu_type", "v3-08", "expected an accelerator type such as 'v3-8', got 'v3-08'"),
    ("tpu_wait_minutes", 0, "expected 1 or more, got 0"),
    ("pod_step_seconds", 0, "expected 1 or more, got 0"),
    ("pod_heartbeat_seconds", 0.5, "expected a whole number, got 0.5 (float)"),
    ("pod_retries", -1, "expected 0 or more, got -1"),
    (
        "tpu_labels",
        {"Team": "a"},
        "expected a label of a small letter, then small letters, digits, - and _, 63 in all at "
        "most, got 'Team'",
    ),
    (
        "tpu_labels",
        {"team": "A"},
        "expected a label's value of small letters, digits, - and _, 63 in all at most, got 'A'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "problem"), WRONG_VALUES)
def test_a_wrong_value_is_refused_with(key: str, value: object, problem: str) -> None:
    assert problems_of(**{key: value}) == (f"{key}: {problem}",)


def test_each_key_with_a_hint_has_its_message_tested() -> None:
    for key, hint in rules.HINTS.items():
        assert any(key == case[0] and case[2].endswith(hint) for case in WRONG_VALUES)


IMPOSSIBLE: list[tuple[dict, str]] = [
    (
        {"cores_per_replica": 4, "tpu_size": 2},
        "cores_per_replica 4 does not divide tpu_size 2; 1, 2 would",
    ),
    ({"n_heads": 5}, "n_heads 5 does not divide d_model 64; change one of them or set d_head"),
    (
        {"cores_per_replica": 8, "d_head": 16},
        "cores_per_replica 8 does not divide n_heads 4; 1, 2, 4 would",
    ),
    (
        {"cores_per_replica": 4, "n_vocab": 50257},
        "cores_per_replica 4 does not divide n_vocab 50257; the next n_vocab that it divides is "
        "50260",
    ),
    (
        {"cores_per_replica": 4, "d_ff": 101},
        "cores_per_replica 4 does not divide d_ff 101; the next d_ff that it divides is 104",
    ),
    (
        {"cores_per_replica": 4, "tpu_size": 6},
        "cores_per_replica 4 does not divide tpu_size 6; 1, 2, 3, 6 would",
    ),
    (
        {"tpu_size": 3},
        "zero_stage 1 cannot spread d_model 64 over 3 replicas (3 devices / cores_per_replica 1), "
        "which do not divide it; set zero_stage to 0 or change d_model",
    ),
    *OF_THE_MODEL,
    *OF_LENGTHS,
    (
        {"n_tokens": 513},
        "n_tokens 513 is more than n_vocab 512; raise n_vocab to 513 or more",
    ),
    (
        {"attention": "cudnn", "compute_dtype": "float32"},
        "attention 'cudnn' computes in 16 bits only; set compute_dtype to 'bfloat16' or attention "
        "to 'auto'",
    ),
    (
        {"end_lr": 0.01},
        "end_lr 0.01 is above lr 0.001, from which it is annealed; lower it to 0.001 or less",
    ),
    (
        {"ckpt_every": 4},
        "keep_every 10 is not a multiple of ckpt_every 4, so only multiples of 20 would be kept; "
        "the next multiple is 12",
    ),
    (
        {"bucket": "gs://bucket"},
        "bucket 'gs://bucket' is not a bare name; write the name without gs://, and folders in "
        "model_dir",
    ),
    (
        {"bucket": "bucket", "model_dir": "/runs/a"},
        "model_dir '/runs/a' cannot lie in bucket 'bucket'; leave bucket out, or make model_dir a "
        "folder name",
    ),
    (
        {"bucket": "bucket", "model_dir": "s3://other/a"},
        "model_dir 's3://other/a' cannot lie in bucket 'bucket'; leave bucket out, or make "
        "model_dir a folder name",
    ),
    (
        {"original_shards": 8, "d_ff": 64, "qkv_bias": True},
        "original_shards 8 cannot be followed: d_ff is 64, 256 in mesh-transformer-jax; qkv_bias "
        "is true, false in mesh-transformer-jax; leave original_shards out",
    ),
    (
        {"original_shards": 8, "norm": "layernorm-desync"},
        "original_shards 8 cannot be followed with norm 'layernorm-desync', whose copies drifted "
        "apart on the original's shards and are one here; leave original_shards out",
    ),
    (
        {"pod_start_seconds": 60, "pod_step_seconds": 90},
        "pod_start_seconds 60 is less than pod_step_seconds 90, although the first step is "
        "compiled and taken within it; raise it to 90 or more",
    ),
    (
        {"tpu_type": "v5e-16"},
        "tpu_type 'v5e-16' has another name in Google Cloud; write 'v5litepod-16'",
    ),
    (
        {"tpu_type": "v9-8"},
        "tpu_runtime of tpu_type 'v9-8' is not known here; set it to one that `gcloud compute tpus "
        "tpu-vm versions list` shows",
    ),
]

DOUBTFUL: list[tuple[dict, str]] = [
    *DOUBTS_OF_LENGTHS,
    (
        {"norm": "layernorm-desync"},
        "norm 'layernorm-desync' is treated as 'layernorm': copies of a norm cannot drift apart",
    ),
    ({"pe": "t5", "pe_rotary_dims": 64}, "pe_rotary_dims 64 has no effect with pe 't5'"),
    (
        {"anneal_steps": 9},
        "warmup_steps 2 + anneal_steps 9 is more than total_steps 10, so the learning rate never "
        "reaches end_lr 0.0001",
    ),
    (
        {"val_set": {"a": "x"}},
        "val_batches is 0, so nothing is validated although val_set is given",
    ),
    (
        {"val_batches": 3},
        "val_set is empty, so nothing is validated although val_batches is 3",
    ),
    (
        {"tpu_type": "v4-32", "tpu_size": 8},
        "tpu_size 8 is no multiple of the 16 devices of a v4-32, so that no number of such slices "
        "is a whole run",
    ),
]


@pytest.mark.parametrize(("changes", "problem"), IMPOSSIBLE)
def test_an_impossible_combination_is_refused_with(changes: dict, problem: str) -> None:
    assert problems_of(**changes) == (problem,)


@pytest.mark.parametrize(("changes", "doubt"), DOUBTFUL)
def test_a_doubtful_combination_warns_with(changes: dict, doubt: str) -> None:
    assert doubts_of(**changes) == [f"x.json: {doubt}"]


def test_each_rule_has_its_message_tested() -> None:
    minimal = configuration.parse(MINIMAL).to_flat()
    for table, cases in ((rules.IMPOSSIBLE, IMPOSSIBLE), (rules.DOUBTFUL, DOUBTFUL)):
        for rule in table:
            named = inspect.signature(rule).parameters
            given = [(minimal | changes, text) for changes, text in cases]
            assert any(text == relations.apply(rule, flat) for flat, text in given), (
                f"no case breaks the rule on {', '.join(named)}"
            )


@pytest.mark.parametrize(
    "changes",
    [
        {"warmup_steps": 0, "anneal_steps": 0},
        {"end_lr": 1e-3},
        {"end_lr": 0, "weight_decay": 0, "z_loss": 0},
        {"ckpt_every": 10, "keep_every": 5},
        {"val_every": 1000, "ckpt_every": 1000, "keep_every": 1},
        {"zero_stage": 0, "tpu_size": 3},
        {"d_head": 6, "n_heads": 5},
        {"window": MINIMAL["seq"], "window_every": 2, "attention": "splash"},
        {"original_shards": 8},
        {"noise_scale_alpha": 1},
        {"pod_step_seconds": 1800, "pod_retries": 0},
        {"tpu_type": "v4-32", "tpu_size": 32},
        {"tpu_type": "v9-8", "tpu_runtime": "v9"},
    ],
)
def test_an_unusual_configuration_is_accepted_without_a_word(changes: dict) -> None:
    assert doubts_of(**changes) == []


def test_an_unknown_key_is_refused_with_the_closest_name_and_not_also_called_missing() -> None:
    unknown: dict = {"warmup_step": 2, "Val_Every": 1, "zzz": 0, 3: 4}  # YAML has numbers as keys
    flat = {key: value for key, value in MINIMAL.items() if key != "warmup_steps"}
    with pytest.raises(ConfigError) as caught:
        configuration.parse(flat | unknown)
    assert caught.value.problems == (
        "unknown key 'warmup_step'; did you mean 'warmup_steps'?",
        "unknown key 'Val_Every'; did you mean 'val_every'?",
        "unknown key 'zzz'",
        "unknown key 3",
    )


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("bf16_optimizer", "master weights and optimizer state are always float32"),
        (
            "early_cast",
            "master weights are always float32; compute_dtype says what they are cast to",
        ),
        ("early_collect", "zero_stage says whether weights are gathered layer by layer"),
        ("eval_only", "the command says whether anything is trained"),
        ("gen_length", "the sampling command says how many tokens to generate"),
        (
            "optimizer",
            "the optimizer follows from lr, end_lr, warmup_steps, anneal_steps, weight_decay",
        ),
        ("sampler", "the sampling command takes temperature, top-k and top-p"),
        ("transformer", "there is one model, which the other keys describe"),
        ("transformer_version", "there is one model, which the other keys describe"),
    ],
)
def test_a_retired_key_warns_and_is_ignored(key: str, reason: str) -> None:
    assert doubts_of(**{key: True}) == [f"x.json: key {key!r} is ignored: {reason}"]
    with pytest.warns(ConfigWarning):
        assert configuration.parse(MINIMAL | {key: True}) == configuration.parse(MINIMAL)
    assert len(rules.RETIRED) == 9


def test_one_unsound_value_does_not_hide_or_invent_other_problems() -> None:
    assert problems_of(n_heads=0, pe_rotary_dims=3) == ("n_heads: expected 1 or more, got 0",)
    assert problems_of(cores_per_replica="8", end_lr=1) == (
        "cores_per_replica: expected a whole number, got '8' (str); write 8 without quotes",
        "end_lr 1.0 is above lr 0.001, from which it is annealed; lower it to 0.001 or less",
    )


def test_sections_made_in_code_are_checked_like_files() -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.ModelConfig(
            layers=0, d_model=64, n_heads=5, n_vocab=9, seq=2, pe_rotary_dims=1
        )
    assert str(caught.value) == (
        "ModelConfig: 2 problem(s)\n  - layers: expected 1 or more, got 0\n"
        "  - n_heads 5 does not divide d_model 64; change one of them or set d_head"
    )
    model = configuration.ModelConfig(layers=1, d_model=64, n_heads=4, n_vocab=9, seq=2)
    assert (model.d_head, model.d_ff, model.pe_rotary_dims, model.n_tokens) == (16, 256, 16, 9)


def test_sections_that_do_not_fit_together_are_refused() -> None:
    config = configuration.parse(MINIMAL)
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(config, mesh=configuration.MeshConfig(cores_per_replica=8))
    assert str(caught.value) == (
        "Config: 1 problem(s)\n  - cores_per_replica 8 does not divide n_heads 4; 1, 2, 4 would"
    )


def test_the_closest_name_is_the_end_of_a_sentence_or_nothing() -> None:
    assert schema.did_you_mean("layer", ["layers", "lr"]) == "; did you mean 'layers'?"
    assert schema.did_you_mean("xyz", ["layers", "lr"]) == ""
