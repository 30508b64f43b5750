"""A deeper model begins as a shallower one's layers, repeated; several checkpoints have a mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import memory_source
import numpy as np
import pytest
import runs
import small
from memory_source import MemorySource
from processes import Ended

import resharding_example
from mesh_transformer.checkpoints import conversion, opening
from mesh_transformer.checkpoints.averaging import Mean
from mesh_transformer.checkpoints.conversion import Conversion
from mesh_transformer.checkpoints.deepening import WithLayers, layer_before
from mesh_transformer.checkpoints.fitting import fitted
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.source import PARAMS, Key, Source
from mesh_transformer.pod.worker import Worker

MODEL = small.parsed().model
Q, KEY_WEIGHT = (f"decoder/layers/block/attention/{name}/w" for name in "qk")
EMBED = "decoder/embed/embeddings"


def source_of(n_layers: int = 2, step: int = 7, **options: Any) -> MemorySource:
    source = memory_source.of_model(dataclasses.replace(MODEL, layers=n_layers), **options)
    source.step, source.where = step, f"step_{step}"
    return source


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    return lambda *flags: runs.called(capsys, resharding_example.main, *map(str, flags))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The checkpoints of a run: of steps 20 and 40, with moments."""
    config = small.parsed(model_dir=str(tmp_path / "run"))
    for step in (20, 40):
        source = source_of(step=step, seed=step, moments=True)
        folder = tmp_path / f"run{step}"
        what = Conversion(format="native")
        conversion.convert(source, config, str(folder), what, position={"epoch": 0, "sample": 0})
    return tmp_path


def opened(folder: Path) -> Source:
    return opening.open_source(opening.find(str(folder)), None)


def test_eighteen_layers_become_thirty_six_and_twenty_four_as_zero_transformer_has_them() -> None:
    assert [layer_before(i, 18, 36) for i in range(36)] == np.repeat(range(18), 2).tolist()
    pairs = {0: 2, 1: 1, 2: 1}  # copies of each layer, by its number modulo 3
    expected = [i for i in range(18) for _ in range(pairs[i % 3])]
    assert [layer_before(i, 18, 24) for i in range(24)] == expected


@pytest.mark.parametrize(
    ("before", "after", "taken"),
    [(2, 4, [0, 0, 1, 1]), (2, 5, [0, 0, 0, 1, 1]), (3, 4, [0, 0, 1, 2]), (2, 2, [0, 1])],
)
def test_each_layer_begins_as_one_of_the_shallower_model(
    before: int, after: int, taken: list[int]
) -> None:
    source = source_of(before, moments=True)
    deeper = WithLayers(source, after)
    assert deeper.counts is None and all(key.kind == PARAMS for key in deeper.arrays)
    fitted(deeper, dataclasses.replace(MODEL, layers=after))
    stacked = np.stack([deeper.read(Key(PARAMS, Q, i)) for i in range(after)])
    shallow = np.stack([source.contents[Key(PARAMS, Q, i)] for i in range(before)])
    np.testing.assert_array_equal(stacked, shallow[taken])
    whole = Key(PARAMS, EMBED)
    np.testing.assert_array_equal(deeper.read(whole), source.contents[whole])


def test_a_model_is_not_made_shallower() -> None:
    with pytest.raises(CheckpointError) as caught:
        WithLayers(source_of(2), 1)
    assert str(caught.value) == (
        "step_7 has 2 layers, and 1 are asked for: a model is made deeper, never shallower; ask "
        "for as many or more"
    )


def test_a_model_with_an_encoder_has_a_mean_but_is_not_made_deeper() -> None:
    model = small.parsed(**small.ENCODER_DECODERS["t5"]).model
    one, other = (memory_source.of_model(model, seed=seed) for seed in (1, 2))
    one.known, other.known = {"encoder_seq": 20}, {"encoder_seq": 10}  # lengths, of no matter
    key = Key(PARAMS, "encoder/layers/block/attention/q/w", 1)
    expected = (one.contents[key] + other.contents[key]) / 2
    np.testing.assert_allclose(Mean([one, other]).read(key), expected, rtol=0, atol=5e-7)
    with pytest.raises(CheckpointError) as caught:
        WithLayers(one, 8)
    assert str(caught.value) == (
        f"{one.where} has an encoder, whose layers are no decoder's: only models without one are "
        "made deeper"
    )


def test_the_mean_is_numpy_s_in_float32_whatever_the_type_stored() -> None:
    dtypes = (np.float32, np.float16, conversion.BFLOAT16)
    sources = [
        source_of(step=step, seed=step, dtype=dtype, moments=step == 1)
        for step, dtype in enumerate(dtypes, 1)
    ]
    mean = Mean(sources)
    assert (mean.step, mean.counts) == (3, None)
    assert mean.about == "mean of 3 checkpoints, of steps 1, 2, 3"
    for key, array in mean.arrays.items():
        each = [source.contents[key].astype(np.float64) for source in sources]
        found = mean.read(key)
        assert found.dtype == array.dtype == np.float32
        # Of three numbers of size 1, float32 rounds the sum twice.
        np.testing.assert_allclose(found, np.mean(each, axis=0), rtol=0, atol=5e-7)
    assert [len(source.reads) for source in sources] == [len(mean.arrays)] * 3


def test_checkpoints_of_different_models_have_no_mean() -> None:
    first, deeper, other = source_of(step=1), source_of(3, step=2), source_of(step=3)
    first.known = {"layers": 2, "pe": "rotary", "seq": 16, "lr": 1.0}
    deeper.known = {"layers": 3, "pe": "rotary", "seq": 32, "lr": 2.0}
    other.known = {"layers": 2, "pe": "alibi", "seq": 16, "lr": 1.0}
    other.contents = {key: it for key, it in other.contents.items() if key.path != EMBED}
    with pytest.raises(CheckpointError) as caught:
        Mean([first, deeper, other])
    lines = str(caught.value).split("\n  - ")
    assert lines[0] == "only checkpoints of one model have a mean; step_1 is unlike others:"
    assert lines[1] == "layers is 2, and 3 in step_2"
    assert lines[2] == f"params/{KEY_WEIGHT}[2] is absent, and [32, 32] in step_2"
    assert lines[-3].startswith("and ") and lines[-3].endswith(" more")
    assert lines[-2:] == [
        "pe is 'rotary', and 'alibi' in step_3",
        f"params/{EMBED} is [64, 32], and absent in step_3",
    ]


@pytest.mark.thorough
def test_the_command_averages_and_deepens(root: Path, command: Callable[..., Ended]) -> None:
    inputs = (root / "run20" / "checkpoints" / "step_20", root / "run40")
    output = root / "deep"
    ended = command("--input", *inputs, "--output", output, "--format", "native", "--layers", 4)
    assert ended.status == 0, ended
    told = f"it holds weights alone: train them with --tune-model-path {output}"
    assert "mean of 2 checkpoints, of steps 20, 40, 2 layers as 4" in ended.told
    assert told in ended.told
    found, parts = opened(output), [opened(folder) for folder in inputs]
    for i in range(4):
        expected = np.mean([part.read(Key(PARAMS, Q, i // 2)) for part in parts], axis=0)
        np.testing.assert_allclose(found.read(Key(PARAMS, Q, i)), expected, rtol=0, atol=5e-7)
    assert opening.stored_config(str(output)).model == dataclasses.replace(MODEL, layers=4)
    worker = Worker(small.parsed(layers=4, model_dir=str(root / "new")), jax.devices()[:1])
    worker.tune_from(str(output), fresh_opt=True)
    begun = worker.state.params["decoder/layers/block/attention/q"]["w"]
    np.testing.assert_array_equal(begun[2], found.read(Key(PARAMS, Q, 2)))


def test_the_command_refuses_what_it_would_not_do(
    root: Path, command: Callable[..., Ended]
) -> None:
    inputs = (root / "run20", root / "run40")
    told = "--layers needs --output, and --prompt samples from one --input as it is"
    for flags in (("--verify", "--layers", 4), ("--output", root / "x", "--prompt", "a")):
        ended = command("--input", *inputs, *flags)
        assert ended.status == 2 and told in ended.told
    ended = command("--input", *inputs, "--output", inputs[1], "--format", "native", "--overwrite")
    read = inputs[1] / "checkpoints" / "step_40"
    assert ended.status == 1
    assert f"{inputs[1]} holds {read}, which is read: name another folder" in ended.told
