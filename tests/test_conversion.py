"""Checkpoints from any format to any other, onto any mesh, and what is refused on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import memory_source
import numpy as np
import optax
import original as golden
import original_steps
import pytest
import small

from mesh_transformer import resharding
from mesh_transformer.checkpoints import conversion, opening, reading
from mesh_transformer.checkpoints.conversion import Conversion
from mesh_transformer.checkpoints.fitting import fitted
from mesh_transformer.checkpoints.layout import CheckpointError, by_path
from mesh_transformer.checkpoints.source import MU, NU, PARAMS, Key, Source
from mesh_transformer.config import Config
from mesh_transformer.pod.worker import Worker
from mesh_transformer.schema import ConfigError
from mesh_transformer.session import Sampling

POSITION = {"epoch": 0, "sample": 0}
FORMATS = ("native", "original", "slim", "hf")


def convert(
    source: Source, config: Config, output: Path | str, what: Conversion, **more: Any
) -> Source:
    """Convert, which tells beforehand how much is written, and open what was written."""
    told: list[int] = []

    def stage(n_bytes: int) -> Any:
        told.append(-n_bytes)
        return contextlib.nullcontext(told.append)

    conversion.convert(source, config, str(output), what, position=POSITION, stage=stage, **more)
    assert len(told) > 1 and sum(told) == 0
    return opening.open_source(opening.find(str(output)), config.model)


def assert_same_weights(a: Source, b: Source) -> None:
    weights = {key for key in b.arrays if key.kind == PARAMS}
    assert weights == {key for key in a.arrays if key.kind == PARAMS}
    for key in weights:
        x, y = a.read(key), b.read(key)
        assert (x.dtype, x.tobytes()) == (y.dtype, y.tobytes()), key


def without_embedding_bias(source: memory_source.MemorySource) -> memory_source.MemorySource:
    """Hugging Face's models have none, so that it is folded into the table."""
    key = Key(PARAMS, "decoder/embed/b")
    return dataclasses.replace(
        source, contents={**source.contents, key: np.zeros_like(source.contents[key])}
    )


@pytest.mark.thorough
@pytest.mark.parametrize(("first", "second"), [*itertools.product(FORMATS, FORMATS)])
def test_any_format_becomes_any_other_and_keeps_every_bit(
    tmp_path: Path, first: str, second: str
) -> None:
    config = small.parsed()
    source = without_embedding_bias(memory_source.of_model(config.model, moments=True))
    one = Conversion(format=first, n_shards=4, dtype="float32")  # type: ignore[arg-type]
    two = Conversion(format=second, n_shards=2, dtype="float32")  # type: ignore[arg-type]
    between = convert(source, config, tmp_path / "one", one)
    last = convert(between, config, tmp_path / "two", two)
    assert_same_weights(last, source)
    kept = {"native", "original"}
    assert (last.counts is not None) == ({first, second} <= kept)
    if last.counts is not None:
        assert (last.counts, last.step) == (source.counts, source.step)
        for key in source.arrays:
            np.testing.assert_array_equal(last.read(key), source.read(key))


def worker_of(config: Config, dp: int, mp: int, **keys: Any) -> Worker:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mesh = dataclasses.replace(config.mesh, cores_per_replica=mp, **keys)
    return Worker(dataclasses.replace(config, mesh=mesh), jax.devices()[: dp * mp])


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "size"), original_steps.STEPS)
def test_every_token_of_a_checkpoint_has_the_loss_that_the_original_gave_it(
    name: str, size: str
) -> None:
    """Float32 within 1e-5; bfloat16 weights are computed with in float32, as the original did."""
    step = original_steps.find(name, size)
    record = golden.load(name).arrays
    if (size == "slim") != (name == "A"):  # the goldens are of these weights
        pytest.skip("the original's losses are recorded here for the other size of this run")
    for dp, mp in ((1, 1), (1, min(step.n_shards, 4))):
        worker = worker_of(step.config, dp, mp)
        worker.load_weights(str(step.folder))
        seen = worker.evaluate(record["eval_tokens"])
        np.testing.assert_allclose(seen.loss_BT, record["all_loss"], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(seen.correct_BT, record["correct"])


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["E_scalenorm", "E_layernorm-nobias"])
def test_greedy_tokens_of_a_checkpoint_are_the_original_s(name: str) -> None:
    step, run = original_steps.find(name, "full"), golden.load(name)
    worker = worker_of(step.config, 1, 1)
    worker.load_weights(str(step.folder))
    expected, seq = run.arrays["generated"][0], run.config.model.seq
    n_prompt = int(run.arrays["prompt_lengths"][0])
    prompt = run.arrays["prompts"][0, seq - n_prompt :].tolist()
    n_new = min(len(expected), seq - n_prompt)
    close = np.flatnonzero(run.arrays["margins"][0, :n_new] <= 1e-3)
    n_new = int(close[0]) if len(close) else n_new
    assert n_new > 0
    generation = worker.generate([prompt], Sampling(temperature=0), n_new)
    assert generation.tokens == [expected[:n_new].tolist()]


@pytest.mark.thorough
@pytest.mark.parametrize("format", FORMATS)
def test_a_run_is_tuned_from_any_format_on_a_mesh(tmp_path: Path, format: str) -> None:
    config = small.parsed(model_dir=str(tmp_path / "new"))
    source = without_embedding_bias(memory_source.of_model(config.model, moments=True))
    what = Conversion(format=format, n_shards=4, dtype="float32")  # type: ignore[arg-type]
    convert(source, config, tmp_path / "old", what)
    worker = worker_of(config, 2, 2, zero_stage=1)
    worker.tune_from(str(tmp_path / "old"), fresh_opt=False)
    state = worker.state
    kept = format in ("native", "original")
    held = {Key(PARAMS, path): leaf for path, leaf in by_path(state.params).items()}
    for part in state.opt_state if kept else ():
        if isinstance(part, optax.ScaleByAdamState):
            held |= {Key(MU, path): leaf for path, leaf in by_path(part.mu).items()}
            held |= {Key(NU, path): leaf for path, leaf in by_path(part.nu).items()}
    n_compared = 0
    for key, leaf in held.items():
        whole = np.asarray(leaf)
        stacked = key not in source.arrays
        for layer, part in enumerate(whole if stacked else [whole]):
            read = source.read(key._replace(layer=layer) if stacked else key)
            np.testing.assert_array_equal(part, read)
            n_compared += 1
    assert n_compared == len(source.arrays) // (1 if kept else 3)
    counts = [int(leaf) for path, leaf in by_path(state.opt_state).items() if "count" in path]
    assert counts == ([7, 0] if kept else [0, 0])
    moments = [leaf for path, leaf in by_path(state.opt_state).items() if "mu/" in path]
    assert any(np.asarray(leaf).any() for leaf in moments) == kept


@pytest.mark.thorough
def test_a_padded_vocabulary_gives_the_same_losses_and_is_cut_again(tmp_path: Path) -> None:
    config = small.parsed(n_tokens=60)
    source = without_embedding_bias(memory_source.of_model(config.model))
    wide = convert(source, config, tmp_path / "wide", Conversion(format="hf", n_vocab=72))
    assert wide.known["n_vocab"] == 72
    tokens_BT1 = small.tokens(2, 9)
    convert(source, config, tmp_path / "narrow", Conversion(format="hf"))
    losses = []
    for name, n_vocab in (("narrow", 64), ("wide", 72)):
        model = dataclasses.replace(config.model, n_vocab=n_vocab)
        worker = worker_of(dataclasses.replace(config, model=model), 1, 1)
        worker.load_weights(str(tmp_path / name))
        losses.append(worker.evaluate(tokens_BT1).loss_BT)
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1e-5)
    with pytest.raises(
        CheckpointError, match="configuration key n_vocab: 72 in the checkpoint, 64"
    ):
        fitted(wide, config.model)  # real tokens might be lost: cutting must be asked for
    wide_config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, n_vocab=wide.known["n_vocab"])
    )
    config_72 = opening.stored_config(str(tmp_path / "wide"))  # knows of no padding
    for name, known in (("back", wide_config), ("untold", config_72)):
        back = convert(wide, known, tmp_path / name, Conversion(format="hf", n_vocab=64))
        assert_same_weights(back, source)
        assert opening.stored_config(str(tmp_path / name)).model.n_tokens == 64
    with pytest.raises(ConfigError, match="n_tokens 60 is more than n_vocab 32"):
        convert(source, config, tmp_path / "cut", Conversion(format="hf", n_vocab=32))


@pytest.fixture
def step(tmp_path: Path) -> str:
    config = small.parsed()
    source = memory_source.of_model(config.model, moments=True)
    convert(source, config, tmp_path / "step_7", Conversion(format="original", n_shards=2))
    return str(tmp_path / "step_7")


def test_what_is_there_is_replaced_only_when_asked_and_only_by_a_whole_one(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small.parsed()
    source = opening.open_source(opening.find(step), config.model)
    target = tmp_path / "there"
    convert(source, config, target, Conversion(format="slim"))
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="is there already.*--overwrite"):
        convert(source, config, target, Conversion(format="hf"))

    def fails(key: Key) -> np.ndarray:
        raise CheckpointError("damaged half-way")

    broken = dataclasses.replace(memory_source.of_model(config.model))
    monkeypatch.setattr(broken, "read", fails)
    with pytest.raises(CheckpointError, match="half-way"):
        convert(broken, config, target, Conversion(format="hf"), overwrite=True)
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir() if "there" in path.name] == ["there"]
    convert(source, config, target, Conversion(format="hf"), overwrite=True)
    assert (target / "config.json").exists() and not (target / "shard_0").exists()


def test_remains_of_a_killed_conversion_are_no_checkpoint_and_go_with_the_next(
    tmp_path: Path, step: str
) -> None:
    shutil.copytree(step, tmp_path / "target.unfinished")
    with pytest.raises(CheckpointError, match="was never finished"):
        opening.find(str(tmp_path / "target.unfinished"))
    config = small.parsed()
    source = opening.open_source(opening.find(step), config.model)
    convert(source, config, tmp_path / "target", Conversion(format="slim"))
    assert not (tmp_path / "target.unfinished").exists()


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    config = small.parsed()
    source = opening.open_source(opening.find(step), config.model)
    with pytest.raises(CheckpointError, match=r"needs 0\.\d GB, but 0\.0 GB are free"):
        convert(source, config, tmp_path / "target", Conversion(format="slim"))
    assert not list(tmp_path.glob("target*"))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"format": "original", "model": {"qkv_bias": True, "d_ff": 64}},
            "(?s)no checkpoints of such a model:.*d_ff is 64, 128 in .*qkv_bias is true, false in",
        ),
        (
            {"format": "original", "model": {"qkv_bias": True, "gated": True}},
            "second model is read but not written: choose --format native",
        ),
        ({"n_shards": 3}, "3 shards do not divide n_heads 8; 3 shards do not divide n_vocab 64"),
        *(
            ({"format": format, "dtype": "float16", "scale": 1e6}, "more than float16 can")
            for format in FORMATS
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    tmp_path: Path, keys: dict[str, Any], told: str
) -> None:
    keys = dict(keys)
    config = small.parsed(**keys.pop("model", {}))
    scale = keys.pop("scale", 1.0)
    source = memory_source.of_model(config.model)
    source.contents = {key: array * np.float32(scale) for key, array in source.contents.items()}
    what = Conversion(**({"format": "slim"} | keys))
    with pytest.raises(CheckpointError, match=told):
        convert(source, config, tmp_path / "target", what)
    assert not list(tmp_path.glob("target*"))


def test_a_checkpoint_of_another_model_names_the_keys() -> None:
    """And none of how it is computed, which a run may differ in."""
    config = small.parsed()
    source = memory_source.of_model(config.model)
    source.known = config.to_flat()
    other = small.parsed(d_ff=64, compute_dtype="bfloat16", remat="none")
    with pytest.raises(CheckpointError) as told:
        fitted(source, other.model)
    listed = [line for line in str(told.value).splitlines() if "configuration key" in line]
    assert listed == ["  - configuration key d_ff: 128 in the checkpoint, 64 here"]


@pytest.mark.parametrize("format", ["native", "hf"])
def test_weights_are_not_taken_for_those_of_another_function(tmp_path: Path, format: Any) -> None:
    """Of shapes that fit, as a wrong --config has; lengths and what is made to fit may differ."""
    config, folder = small.parsed(), str(tmp_path / "it")
    convert(memory_source.of_model(config.model), config, folder, Conversion(format=format))
    other = {"pe_theta": 500000.0, "activation": "silu"}
    with pytest.raises(CheckpointError) as told:
        resharding.open_checkpoint(folder, small.parsed(**other))
    heading, *listed = str(told.value).splitlines()
    assert heading.endswith(" is of another model; mend the configuration, or read another:")
    assert listed == [
        "  - pe_theta is 10000.0 there, 500000.0 in the configuration",
        f"  - activation is {config.model.activation!r} there, 'silu' in the configuration",
    ]
    like = small.parsed(n_vocab=72, n_tokens=64, seq=8, remat="none")
    assert resharding.open_checkpoint(folder, like).config is like


def test_a_run_of_the_original_is_found_by_its_folder(tmp_path: Path, step: str) -> None:
    shutil.copytree(step, tmp_path / "run" / "step_3")
    shutil.copytree(step, tmp_path / "run" / "step_20")
    assert opening.find(str(tmp_path / "run")).folder.endswith("step_20")
    meta = {"step": 3, "checkpoints": [3, 30], "aux": {}}  # of which 30 is deleted
    (tmp_path / "run" / "meta.json").write_text(json.dumps(meta))
    assert opening.find(str(tmp_path / "run") + "/").folder.endswith("step_3")
    with pytest.raises(CheckpointError, match="holds a run of mesh-transformer-jax"):
        opening.check_unused(str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="hold no configuration: give --config"):
        opening.stored_config(str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="does not exist; needed is"):
        opening.find(str(tmp_path / "nowhere"))
    (tmp_path / "run" / "step_3" / "unfinished").touch()
    with pytest.raises(CheckpointError, match=r"run/step_3 was never finished; write it again"):
        opening.find(str(tmp_path / "run"))
    (tmp_path / "run" / "meta.json").write_text('{"checkpoints": [[]]}')
    with pytest.raises(CheckpointError, match=r"meta\.json is damaged"):
        opening.find(str(tmp_path / "run"))


@pytest.mark.parametrize("format", FORMATS)
def test_a_checkpoint_is_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    config = small.parsed()
    calls: list[Any] = []
    source = memory_source.of_model(config.model)
    convert(source, config, tmp_path / "it", Conversion(format=format))  # type: ignore[arg-type]

    def counted(call: Any) -> Any:
        def calling(*args: Any) -> Any:
            calls.append(call)
            return call(*args)

        return calling

    for name in ("find", "open_source"):
        monkeypatch.setattr(opening, name, counted(getattr(opening, name)))
    known = None if format in ("native", "hf") else config
    opened = resharding.open_checkpoint(str(tmp_path / "it"), known)
    assert len(calls) == 2 and opened.config.model.d_model == config.model.d_model


def test_a_run_that_is_converted_goes_on_in_its_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config, position = small.parsed(), {"epoch": 3, "sample": 17}
    source = memory_source.of_model(config.model, moments=True)
    conversion.convert(
        source, config, str(tmp_path / "run"), Conversion(format="native"), position=position
    )
    for name, kept in (("run", True), ("original", False)):
        opened = resharding.open_checkpoint(str(tmp_path / name), config).source
        to = tmp_path / f"from {name}"
        caplog.clear()
        resharding.write(opened, config, str(to), Conversion(format="native"))
        about = reading.read_extra(opening.find(str(to)).folder)
        assert (about["position"] == position) == kept
        assert ("the data begins anew" in caplog.text) != kept
        if kept:
            resharding.write(
                source, config, str(tmp_path / "original"), Conversion(format="original")
            )
