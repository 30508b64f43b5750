"""An encoder and its decoder: on every mesh, in decoding, and whatever is padding, alike."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from mesh_transformer.model.decoder import make_model
from mesh_transformer.session import Sampling
from mesh_transformer.training.steps import TrainState

NAMES = tuple(small.ENCODER_DECODERS)
PROMPTS = [small.tokens(n, seed=n).tolist() for n in (3, 20, 1, 6)]
N_NEW = 6
MORE_MESHES = ((2, 4, 0), (4, 2, 1), (8, 1, 2), (1, 8, 3))


def config_of(name: str) -> Any:
    return small.parsed(**small.ENCODER_DECODERS[name]).model


def sharp(name: str) -> Any:
    """Return weights for which attention and positions matter."""
    params = small.start(variant=name).params
    params = jax.tree.map(lambda leaf: np.asarray(leaf) * 2, params)
    for module, values in params.items():
        if module.endswith("relative_positions"):
            shape = values["embeddings"].shape
            values["embeddings"] = np.float32(np.random.default_rng(0).normal(size=shape))
    return params


def with_weights(worker: Any, params: Any) -> Any:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, worker.steps.state)
    step = jax.device_put(jnp.int32(0), shardings.step)
    worker.state = TrainState(step, jax.device_put(params, shardings.params), ())
    return worker


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "mesh",
    [(2, 4, 3), *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MORE_MESHES)],
    ids=str,
)
def test_a_mesh_trains_as_one_device(mesh: tuple[int, int, int], name: str) -> None:
    """The second step sees what the first made of the weights; two microbatches are summed."""
    tokens_ABT1 = small.pairs(2, 8, variant=name)
    seen = []
    for dp, mp, zero_stage in ((1, 1, 0), mesh):
        keys = {"zero_stage": zero_stage, "variant": name, "gradient_accumulation_steps": 2}
        state = small.start(dp, mp, **keys)
        train = small.steps(dp, mp, **keys).train
        state, first = train(state, tokens_ABT1, None)
        gradients = jax.device_get(optax.tree.get(state.opt_state, "mu"))
        _, second = train(state, tokens_ABT1, None)
        names = ("loss", "last_loss", "grad_norm")
        numbers = [*(first[it] for it in names), second["loss"], second["last_loss"]]
        seen.append((np.array(numbers), gradients))
    (alone, theirs), (here, ours) = seen
    np.testing.assert_allclose(here, alone, rtol=1e-5)
    assert alone[3] < alone[0], "nothing was learned, so nothing was compared"
    small.assert_close(ours, theirs, 1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(theirs):
        assert np.any(leaf), f"{jax.tree_util.keystr(path)} has no gradient"


@pytest.mark.parametrize("name", NAMES)
def test_decoding_on_any_mesh_equals_computing_every_token_anew(name: str) -> None:
    config, params = config_of(name), sharp(name)
    apply = jax.jit(make_model(config).apply, compiler_options=small.COMPILED_FAST)
    for dp, mp in ((1, 1), (2, 4)):
        worker = with_weights(small.worker(dp, mp, variant=name), params)
        tokens, logprobs = worker.generate(PROMPTS, Sampling(temperature=0), N_NEW)
        sources_BS = np.full((len(PROMPTS), config.encoder_seq), config.pad_id, np.int32)
        inputs_BT = np.full((len(PROMPTS), config.seq), config.pad_id, np.int32)
        for row, prompt in enumerate(PROMPTS):
            sources_BS[row, : len(prompt)] = prompt
            inputs_BT[row, 1 : 1 + N_NEW] = tokens[row]
        positions_BT = jnp.arange(config.seq)[None]
        logits_BTV, _ = apply(params, inputs_BT, positions_BT, sources_BS=sources_BS)
        logprobs_BTV = jax.device_get(jax.nn.log_softmax(logits_BTV))
        for row in range(len(PROMPTS)):
            expected_TV = logprobs_BTV[row, :N_NEW]
            assert tokens[row] == expected_TV.argmax(-1).tolist()
            np.testing.assert_allclose(logprobs[row], expected_TV.max(-1), rtol=0, atol=1e-5)
