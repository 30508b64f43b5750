"""What a configuration means: its defaults, derived values, flat form and the shipped files."""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
import pickle
import random
import re

import pytest
from configurations import CONFIGS, MINIMAL, random_flat

from mesh_transformer import config as configuration
from mesh_transformer import rules
from mesh_transformer.config import ConfigError

GPT_J = [path for path in CONFIGS if "residual" not in json.loads(path.read_text())]
OURS = [path for path in GPT_J if path.stem not in ("6B_roto_256", "example_config")]

ORIGINAL_6B = {
    "layers": 28,
    "d_model": 4096,
    "n_heads": 16,
    "n_vocab": 50400,
    "norm": "layernorm",
    "pe": "rotary",
    "pe_rotary_dims": 64,
    "seq": 2048,
    "cores_per_replica": 8,
    "per_replica_batch": 1,
    "gradient_accumulation_steps": 16,
}


def closed_formula(flat: dict) -> int:
    """Parameters of a GPT-J: embedding with bias, blocks with one norm, norm and untied head."""
    d, f, v = flat["d_model"], 4 * flat["d_model"], flat["n_vocab"]
    block = 4 * d * d + 2 * d * f + f + d + 2 * d
    return (v * d + d) + flat["layers"] * block + (2 * d + d * v + v)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_file_parses_without_a_doubt_and_round_trips(path: pathlib.Path) -> None:
    config = configuration.load(path)
    assert configuration.parse(json.loads(json.dumps(config.to_flat()))) == config
    written = json.loads(path.read_text())
    assert {key: config.to_flat()[key] for key in written} == written
    if config.mesh.tpu_size:
        assert config.replicas(config.mesh.tpu_size) >= 1


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_the_comment_states_the_number_of_parameters(path: pathlib.Path) -> None:
    flat = json.loads(path.read_text())
    stated = re.match(r"([\d,]+) parameters: ", flat["comment"])
    assert stated and int(stated[1].replace(",", "")) == closed_formula(flat)


def test_the_formula_gives_the_published_size_of_gpt_j() -> None:
    # 6,050,882,784 in the Hugging Face model, which has no bias of the embedding.
    assert closed_formula(ORIGINAL_6B) == 6_050_882_784 + 4096


def test_the_named_sizes_are_what_their_names_say() -> None:
    sizes = {path.stem: closed_formula(json.loads(path.read_text())) for path in GPT_J}
    assert 1.8e6 < sizes["quickstart"] < 2e6
    assert 1.3e9 < sizes["gpt_1.3B"] < 1.5e9
    assert 20e9 < sizes["gptj_20B"] < 21e9
    flat = json.loads((CONFIGS[0].parent / "gpt_125M.json").read_text())
    tied = closed_formula(flat) - flat["n_vocab"] * flat["d_model"]  # as GPT-3 counts
    assert 120e6 < tied < 130e6


def test_the_original_pile_run_parses_unchanged() -> None:
    original = ORIGINAL_6B | {
        "warmup_steps": 3000,
        "anneal_steps": 300000,
        "lr": 1.2e-4,
        "end_lr": 1.2e-5,
        "weight_decay": 0.1,
        "total_steps": 350000,
        "tpu_size": 256,
        "bucket": "neo-models",
        "model_dir": "mesh_jax_pile_6B_rotary",
        "train_set": "pile.train.index",
        "val_set": {"pile": "pile.val.index", "owt": "openwebtext2_new_inputs.val.index"},
        "eval_harness_tasks": [
            "lambada", "piqa", "hellaswag", "winogrande", "mathqa", "pubmedqa",
        ],
        "val_batches": 100,
        "val_every": 500,
        "ckpt_every": 500,
        "keep_every": 10000,
        "name": "GPT3_6B_pile_rotary",
        "comment": "",
    }  # fmt: skip
    config = configuration.parse(original)
    assert config.checkpoint.root == "gs://neo-models/mesh_jax_pile_6B_rotary"
    assert config.sequences_per_step(256) == 512
    assert config.tokens_per_step(256) == 512 * 2048
    assert (config.model.d_head, config.model.d_ff, config.model.n_tokens) == (256, 16384, 50257)
    assert_equal_but_for_index_paths("6B_roto_256", original)


def test_the_original_fine_tuning_example_parses_unchanged() -> None:
    original = ORIGINAL_6B | {
        "warmup_steps": 7,
        "anneal_steps": 65,
        "lr": 5e-5,
        "end_lr": 1e-5,
        "weight_decay": 0.1,
        "total_steps": 72,
        "tpu_size": 8,
        "bucket": "your-bucket",
        "model_dir": "finetune_dir",
        "train_set": "example.train.index",
        "val_set": {},
        "eval_harness_tasks": [],
        "val_batches": 0,
        "val_every": 80,
        "ckpt_every": 72,
        "keep_every": 72,
        "name": "example_model",
        "wandb_project": "mesh-transformer-jax",
        "comment": "",
    }
    assert configuration.parse(original).replicas(8) == 1
    assert_equal_but_for_index_paths("example_config", original)


def assert_equal_but_for_index_paths(stem: str, original: dict) -> None:
    shipped = json.loads((CONFIGS[0].parent / f"{stem}.json").read_text())
    shipped["train_set"] = shipped["train_set"].removeprefix("data/")
    shipped["val_set"] = {k: v.removeprefix("data/") for k, v in shipped["val_set"].items()}
    assert shipped == original
    assert list(shipped) == list(original)


def test_every_key_without_a_default_is_in_the_minimal_configuration() -> None:
    config = configuration.parse(MINIMAL)
    assert config.to_flat() | MINIMAL == config.to_flat()
    assert {f"missing key {key!r}" for key in MINIMAL} == set(missing_from_nothing())


def missing_from_nothing() -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        configuration.parse({})
    return caught.value.problems


def test_every_key_belongs_to_exactly_one_section() -> None:
    names = [field.name for section in configuration.SECTIONS.values() for field in
             dataclasses.fields(section)]  # fmt: skip
    assert len(names) == len(set(names)) == len(configuration.KEYS)
    assert not set(names) & set(rules.RETIRED)
    assert set(rules.HINTS) | set(rules.DERIVED) <= set(names)


def test_every_key_has_a_meaning_in_the_docstring_of_its_section() -> None:
    for section in configuration.SECTIONS.values():
        said = set(re.findall(r"\w+", section.__doc__ or ""))
        assert not {field.name for field in dataclasses.fields(section)} - said


def test_derived_values_follow_from_the_others() -> None:
    model = configuration.parse(MINIMAL | {"tokenizer": "bytes"}).model
    assert (model.d_head, model.d_ff, model.pe_rotary_dims, model.n_tokens) == (16, 256, 16, 257)
    assert configuration.parse(MINIMAL).model.n_tokens == 512  # GPT-2 has more than n_vocab
    assert configuration.parse(MINIMAL | {"tokenizer": "some/name"}).model.n_tokens == 512
    for pe in ("t5", "fixed", "none"):
        assert configuration.parse(MINIMAL | {"pe": pe}).model.pe_rotary_dims == 0


@pytest.mark.parametrize(
    ("tpu_type", "runtime", "devices"),
    [
        ("v2-8", "tpu-ubuntu2204-base", 8),
        ("v3-32", "tpu-ubuntu2204-base", 32),
        ("v4-32", "tpu-ubuntu2204-base", 16),
        ("v5litepod-64", "v2-alpha-tpuv5-lite", 64),
        ("v5p-128", "v2-alpha-tpuv5", 64),
        ("v6e-1", "v2-alpha-tpuv6e", 1),
    ],
)
def test_the_runtime_and_the_devices_follow_from_the_generation(
    tpu_type: str, runtime: str, devices: int
) -> None:
    pod = configuration.parse(MINIMAL | {"tpu_type": tpu_type}).pod
    assert (pod.tpu_type, pod.tpu_runtime) == (tpu_type, runtime)
    assert rules.devices_of(tpu_type) == devices


def test_the_slice_is_a_v3_as_large_as_the_run_unless_named() -> None:
    assert configuration.parse(MINIMAL | {"tpu_size": 8}).pod.tpu_type == "v3-8"
    named = configuration.parse(MINIMAL | {"tpu_size": 32, "tpu_type": "v4-64"}).pod
    assert (named.tpu_type, named.tpu_runtime) == ("v4-64", "tpu-ubuntu2204-base")
    assert configuration.parse(MINIMAL).pod.tpu_type is None
    assert configuration.PodConfig(tpu_type="v6e-8").tpu_runtime == "v2-alpha-tpuv6e"


def test_given_values_are_not_derived() -> None:
    given = {"d_head": 10, "d_ff": 100, "pe_rotary_dims": 4, "n_tokens": 3, "n_heads": 5}
    model = configuration.parse(MINIMAL | given).model
    assert {key: getattr(model, key) for key in given} == given


def test_whole_numbers_stand_for_floats_and_lists_become_tuples() -> None:
    config = configuration.parse(MINIMAL | {"lr": 1, "eval_harness_tasks": ["piqa"]})
    assert (config.optimizer.lr, type(config.optimizer.lr)) == (1.0, float)
    assert config.run.eval_harness_tasks == ("piqa",)


def test_null_leaves_an_optional_key_out() -> None:
    absent = dict.fromkeys(["bucket", "tpu_size", "d_head", "d_ff", "n_tokens", "pe_rotary_dims"])
    config = configuration.parse(MINIMAL | absent)
    assert config == configuration.parse(MINIMAL)
    assert "bucket" not in config.to_flat()


@pytest.mark.parametrize(
    ("bucket", "model_dir", "root"),
    [
        (None, "runs/a", "runs/a"),
        (None, "runs/a/", "runs/a"),
        (None, "/mnt/a", "/mnt/a"),
        (None, "/", "/"),
        (None, "s3://bucket/a/", "s3://bucket/a"),
        ("bucket", "a", "gs://bucket/a"),
        ("bucket", "a/b/", "gs://bucket/a/b"),
    ],
)
def test_the_root_is_the_folder_or_the_folder_in_the_bucket(
    bucket: str | None, model_dir: str, root: str
) -> None:
    config = configuration.parse(MINIMAL | {"bucket": bucket, "model_dir": model_dir})
    assert config.checkpoint.root == root


def test_derived_counts_have_the_units_that_they_say() -> None:
    config = configuration.parse(
        MINIMAL
        | {"cores_per_replica": 2, "per_replica_batch": 3, "gradient_accumulation_steps": 5}
        | {"val_batch_multiplier": 7}
    )
    assert config.replicas(8) == 4
    assert config.global_batch(8) == 4 * 3
    assert config.val_batch(8) == 4 * 3 * 7
    assert config.sequences_per_step(8) == 4 * 3 * 5
    assert config.tokens_per_step(8) == 4 * 3 * 5 * 32


@pytest.mark.parametrize("n_devices", [2, 6])
def test_replicas_refuse_devices_that_do_not_fill_them(n_devices: int) -> None:
    config = configuration.parse(MINIMAL | {"cores_per_replica": 4})
    divisors = {2: "1, 2", 6: "1, 2, 3, 6"}[n_devices]
    with pytest.raises(ConfigError) as caught:
        config.replicas(n_devices)
    assert str(caught.value) == (
        f"test: 1 problem(s)\n  - cores_per_replica 4 does not divide the {n_devices} device(s) "
        f"that there are; {divisors} would"
    )


def test_replicas_refuse_devices_that_cannot_share_a_zero_stage() -> None:
    config = configuration.parse(MINIMAL)
    with pytest.raises(ConfigError) as caught:
        config.replicas(3)
    assert caught.value.problems == (
        "zero_stage 1 cannot spread d_model 64 over 3 replicas (3 devices / cores_per_replica 1), "
        "which do not divide it; set zero_stage to 0 or change d_model",
    )
    assert configuration.parse(MINIMAL | {"zero_stage": 0}).replicas(3) == 3


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::mesh_transformer.config.ConfigWarning")
def test_flat_keys_round_trip_for_any_valid_configuration() -> None:
    rng = random.Random(0)
    seen: set[str] = set()
    for _ in range(300):
        flat = random_flat(rng)
        before = copy.deepcopy(flat)
        config = configuration.parse(flat)
        again = config.to_flat()
        assert flat == before
        assert {key: again[key] for key in flat} == flat
        assert configuration.parse(json.loads(json.dumps(again))) == config
        assert configuration.parse(json.loads(json.dumps(again))).to_flat() == again
        seen.update(flat)
    assert seen == set(configuration.KEYS)


def test_what_a_run_recorded_has_defaults_for_keys_that_it_had_none_of() -> None:
    whole = configuration.parse(MINIMAL).to_flat()
    assert configuration.recorded(MINIMAL) == whole
    assert configuration.recorded(whole) == whole
    strange = {"gone": 1, "lr": -1.0}  # kept, though no configuration of today's
    assert configuration.recorded(MINIMAL | strange) == whole | strange
    assert configuration.recorded(MINIMAL | {"pe_buckets": 64}) == whole  # without effect: no "t5"


def test_of_unsound_keys_no_more_is_said_than_that() -> None:
    whole = configuration.parse(MINIMAL | {"original_shards": 8}).to_flat()
    with pytest.raises(ConfigError) as caught:
        configuration.parse(whole | {"d_model": 0, "n_heads": "4"})
    assert caught.value.problems == (
        "d_model: expected 1 or more, got 0",
        "n_heads: expected a whole number, got '4' (str); write 4 without quotes",
    )


def test_a_configuration_cannot_change_through_its_flat_form() -> None:
    config = configuration.parse(MINIMAL | {"val_set": {"a": "x"}, "val_batches": 1})
    config.to_flat()["val_set"]["b"] = "y"
    assert config.data.val_set == {"a": "x"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.layers = 3  # type: ignore[misc]


def test_configurations_and_their_errors_travel_between_processes() -> None:
    config = configuration.parse(MINIMAL)
    assert pickle.loads(pickle.dumps(config)) == config
    error = ConfigError("x.json", ["first", "second"])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert len({config, configuration.parse(MINIMAL)}) == 1  # hashable, so usable as a static value
