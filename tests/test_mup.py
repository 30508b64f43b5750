"""In muP a wide model trains as its narrow base does, and a model that is its own base as ever."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import small

from mesh_transformer.checkpoints import families, original
from mesh_transformer.checkpoints.fitting import check_function
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.native import Checkpoints
from mesh_transformer.model.decoder import make_model
from mesh_transformer.model.mup import widths_of
from mesh_transformer.pod.worker import Worker
from mesh_transformer.training.optimizer import make_optimizer

ITSELF = {"mup_base_d_model": 32, "mup_base_d_ff": 128, "mup_base_d_head": 4}
"""The small model's own sizes."""
BASE: dict[str, Any] = {
    **{"mup_base_d_model": 16, "mup_base_d_ff": 32, "mup_base_d_head": 2},
    **{"mup_attention_alpha": 3.0, "mup_output_alpha": 5.0},
}
"""Of which it is twice as wide, and four times in its feed-forward layers."""

BATCHES = small.tokens(2, 1, 8, small.KEYS["seq"] + 1)


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Return a parameter tree's arrays by their paths."""
    return {
        f"{module}/{name}": np.asarray(value)
        for module, values in tree.items()
        for name, value in values.items()
    }


@functools.cache
def trained(dp: int = 1, mp: int = 1, **keys: Any) -> tuple[Any, list[float]]:
    """Train on `BATCHES`: the weights after them, and the loss of each."""
    state, losses = small.start(dp, mp, **keys), []
    for batch in BATCHES:
        state, metrics = small.steps(dp, mp, **keys).train(state, batch, None)
        losses.append(float(metrics["loss"]))
    return jax.device_get(state.params), losses


@pytest.mark.thorough
def test_a_model_that_is_its_own_base_is_in_the_standard_parametrisation_bit_for_bit() -> None:
    """Its first weights and its training step are computed by the very same programs."""

    def programs(**keys: Any) -> list[str]:
        steps = small.steps(**keys)
        shape = jax.ShapeDtypeStruct(BATCHES[0].shape, np.int32)
        lowered = (
            steps.init.lower(jax.random.key(0)), steps.train.lower(steps.state, shape, None)
        )  # fmt: skip
        return [program.as_text() for program in lowered]

    assert programs(**ITSELF) == programs()
    assert programs(**ITSELF)[1] != programs(**BASE)[1]


def test_scales_follow_from_the_base() -> None:
    model = small.parsed(**BASE).model
    np.testing.assert_allclose(model.attention_scale, 3.0 * np.sqrt(2) / 4, rtol=1e-12)
    assert model.output_scale == 5.0 * 16 / 32
    plain = small.parsed().model
    assert (plain.attention_scale, plain.output_scale) == (4**-0.5, 1.0)


def test_the_first_weights_are_as_large_as_table_8_has_them() -> None:
    """Beside the standard ones, which have a variance of 1 / d_model, the draws being the same."""
    ours, standard = flat(small.start(**BASE).params), flat(small.start().params)
    base_over_standard = {
        # The head's as in the base: variance 1 / 16 instead of 1 / 32.
        "decoder/unembed/w": np.sqrt(32 / 16),
        # The base's variance, 1 / 16 but for the depth, over 128 / 32: 1 / 64 instead of 1 / 32.
        "decoder/layers/block/ff/out/w": np.sqrt(32 / 64),
    }
    for path, weight in ours.items():
        expected = standard[path] * np.float32(base_over_standard.get(path, 1))
        np.testing.assert_allclose(weight, expected, rtol=1e-6, err_msg=path)


def test_adam_s_steps_are_divided_by_the_features_summed_up_and_decay_is_not() -> None:
    """The first step of Adam is the learning rate long, whatever the gradient's size."""
    config = dataclasses.replace(small.parsed(**BASE).optimizer, lr=0.5, weight_decay=0.1)
    optimizer = make_optimizer(config, "layernorm", widths_of(small.parsed(**BASE).model))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), small.start().params)
    gradient = jax.tree.map(lambda leaf: 0.01 * leaf, params)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    divided = {
        **{f"decoder/layers/block/attention/{name}/w": 2 for name in "qkvo"},
        **{"decoder/layers/block/ff/in/w": 2, "decoder/layers/block/ff/out/w": 4},
    }
    for path, moved in flat(updates).items():
        decay = 0.1 if path.endswith(("/w", "embeddings")) else 0.0
        expected = -0.5 * (1 / divided.pop(path, 1) + decay)
        # Adam's epsilon is 1e-8, the clipped gradient 1e-4.
        np.testing.assert_allclose(moved, expected, rtol=2e-4, err_msg=path)
    assert not divided, "these are no parameters"


def test_logits_are_scaled_before_their_bias() -> None:
    model = small.parsed(**BASE).model
    plain = dataclasses.replace(small.parsed().model, attention_scale=model.attention_scale)
    params = small.start(**BASE).params
    bias_V = np.linspace(-1, 1, model.n_vocab, dtype=np.float32)
    params = {**params, "decoder/unembed": {**params["decoder/unembed"], "b": bias_V}}
    tokens, positions = BATCHES[0, 0, :, :-1], np.arange(small.KEYS["seq"])[None]
    ours, theirs = (
        np.asarray(jax.jit(make_model(it).apply)(params, tokens, positions)[0])
        for it in (model, plain)
    )
    np.testing.assert_allclose(ours, 2.5 * (theirs - bias_V) + bias_V, rtol=0, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("dp", "mp", "zero_stage"), [(2, 4, 3), pytest.param(4, 2, 1, marks=pytest.mark.slow)]
)
def test_every_mesh_trains_as_one_device(dp: int, mp: int, zero_stage: int) -> None:
    """The tolerance is that of losses in other orders of sums, after two steps of Adam."""
    _, here = trained(dp, mp, zero_stage=zero_stage, **BASE)
    _, alone = trained(**BASE)
    np.testing.assert_allclose(here, alone, rtol=0, atol=2e-5)


@pytest.mark.thorough
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    config = small.parsed(model_dir=str(tmp_path), **BASE)
    through, _ = trained(**BASE)
    with Checkpoints(str(tmp_path)) as checkpoints:
        worker = Worker(config, jax.devices()[:1], checkpoints)
        worker.steps, worker.state = small.steps(**BASE), small.start(**BASE)
        worker.train(BATCHES[0])
        worker.save(1, {"epoch": 0, "sample": 8})
    with Checkpoints(str(tmp_path)) as checkpoints:
        again = Worker(config, jax.devices()[:1], checkpoints)
        again.steps = small.steps(**BASE)
        assert again.restore() is not None
        for batch in BATCHES[1:]:
            again.train(batch)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.state.params), through)


def test_weights_of_other_logits_are_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        check_function({"output_scale": 1.0}, small.parsed(**BASE).model, "step_1")
    assert "output_scale is 1.0 there, 2.5 in the configuration" in str(caught.value)


def test_other_programs_are_not_given_what_they_do_not_compute() -> None:
    model = small.parsed(**BASE).model
    with pytest.raises(CheckpointError) as caught:
        families.config_json(model, np.dtype(np.float32))
    text = str(caught.value)
    assert "output_scale is 2.5; GPT-J has 1.0" in text
    assert "attention_scale is 1.06066" in text and "GPT-J has 0.5" in text
    with pytest.raises(CheckpointError) as caught:
        original.check_computed(model)
    assert "output_scale is 2.5, 1.0 in mesh-transformer-jax" in str(caught.value)
    assert re.search("attention_scale is 1.0606\\d+, 0.5 in mesh", str(caught.value))


def test_what_is_its_own_base_is_written_for_other_programs() -> None:
    written = families.config_json(small.parsed(**ITSELF).model, np.dtype(np.float32))
    assert written == families.config_json(small.parsed().model, np.dtype(np.float32))


def test_the_optimizer_s_state_has_the_tree_that_checkpoints_know() -> None:
    ours, theirs = (jax.tree.structure(small.steps(**keys).state) for keys in (BASE, {}))
    assert {ours} == {theirs}
    assert optax.tree.get(small.steps(**BASE).state.opt_state, "mu") is not None


@pytest.mark.slow
def test_activations_do_not_grow_with_the_width() -> None:
    """Four steps of Adam at a rate that the base bears: at four times its width, mean sizes."""
    path = Path(__file__).parent.parent / "benchmarks" / "mup_coordinates.py"
    spec = importlib.util.spec_from_file_location("mup_coordinates", path)
    assert spec is not None and spec.loader is not None
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    wide, narrow = (
        {mup: check.measured(width, mup=mup, steps=(4,)) for mup in (False, True)}
        for width in (256, 64)
    )
    growth = {mup: wide[mup].features[0] / narrow[mup].features[0] for mup in (False, True)}
    assert growth[False] > 2, growth
    assert abs(growth[True] - 1) < 0.1, growth
    assert wide[True].logits[0] < narrow[True].logits[0], "they begin smaller and grow alike"
