"""An encoder and its decoder: on every mesh, in decoding, and whatever is padding, alike."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from mesh_transformer.errors import UserError
from mesh_transformer.model.decoder import make_model
from mesh_transformer.session import Sampling
from mesh_transformer.training import examples
from mesh_transformer.training.steps import TrainState

NAMES = [pytest.param("t5", marks=pytest.mark.slow), "t5 v1.1"]
PROMPTS = [small.tokens(n, seed=n).tolist() for n in (3, 20, 1, 6)]
N_NEW = 6
MORE_MESHES = ((2, 4, 0), (4, 2, 1), (8, 1, 2), (1, 8, 3))


def config_of(name: str) -> Any:
    return small.parsed(**small.ENCODER_DECODERS[name]).model


def sharp(name: str) -> Any:
    """Return weights for which positions matter.

    No larger ones: attention is not scaled, and doubled weights make of float32's rounding 1e-3.
    """
    params = jax.tree.map(np.asarray, small.start(variant=name).params)
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


@pytest.mark.thorough
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


@pytest.mark.thorough
def test_an_encoder_sees_all_tokens_but_padding_and_a_decoder_those_before() -> None:
    name = "t5 v1.1"
    config, params = config_of(name), jax.device_put(sharp(name))
    tokens_BT1 = small.pairs(1, variant=name)
    tokens_BT1[0, : config.encoder_seq - 3] = 5 + np.arange(config.encoder_seq - 3)
    tokens_BT1[0, config.encoder_seq - 3 : config.encoder_seq + 1] = config.pad_id
    sources_BS, inputs_BT, _ = np.split(tokens_BT1, [config.encoder_seq, -1], axis=1)

    @jax.jit
    def logits(sources_BS: jax.Array, inputs_BT: jax.Array) -> jax.Array:
        positions_BT = jnp.arange(inputs_BT.shape[1])[None]
        made: jax.Array = make_model(config).apply(
            params, inputs_BT, positions_BT, sources_BS=sources_BS
        )[0]
        return made

    def changed(array: np.ndarray, at: int) -> np.ndarray:
        return np.where(np.arange(array.shape[1]) == at, 4, array)

    def moved(sources_BS: np.ndarray, inputs_BT: np.ndarray) -> np.ndarray:
        return np.abs(logits(sources_BS, inputs_BT) - before).max(-1)[0] > 1e-6

    before = logits(sources_BS, inputs_BT)
    for at in (0, 9, config.encoder_seq - 4):
        assert moved(changed(sources_BS, at), inputs_BT).all(), f"source {at} is not seen"
    after_T = moved(sources_BS, changed(inputs_BT, 6))
    assert not after_T[:6].any() and after_T[6:].all()
    shorter = logits(sources_BS[:, :-2], inputs_BT)
    np.testing.assert_allclose(shorter, before, rtol=0, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_padding_is_not_scored_and_a_mask_leaves_out_more(name: str) -> None:
    config = config_of(name)
    worker = with_weights(small.worker(2, 4, variant=name), sharp(name))
    tokens_BT1 = small.pairs(5, variant=name)
    targets_BT = tokens_BT1[:, config.encoder_seq + 1 :]
    seen = worker.evaluate(tokens_BT1)
    assert seen.loss_BT.shape == targets_BT.shape
    np.testing.assert_array_equal(seen.loss_BT > 0, targets_BT != config.pad_id)
    assert not seen.correct_BT[targets_BT == config.pad_id].any()
    mask_BT = np.arange(targets_BT.shape[1]) % 2 == np.zeros((5, 1))
    masked = worker.evaluate(tokens_BT1, mask_BT)
    np.testing.assert_array_equal(masked.loss_BT, np.where(mask_BT, seen.loss_BT, 0))


def test_the_last_loss_is_of_the_last_token_that_is_learned() -> None:
    config = config_of("t5")
    weights_BT = jnp.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], jnp.float32)
    losses_BT = jnp.arange(1, 17, dtype=jnp.float32).reshape(4, 4)
    found = examples.last_of(losses_BT * weights_BT, weights_BT, config)
    np.testing.assert_array_equal(found, [2, 8, 11, 0])
    decoder = small.parsed().model
    np.testing.assert_array_equal(examples.last_of(losses_BT, weights_BT, decoder), [4, 8, 12, 16])


def test_what_does_not_fit_is_refused() -> None:
    worker = small.worker(2, 4, variant="t5")
    with pytest.raises(UserError) as error:
        worker.generate([[1] * 21, [2]], Sampling(), 16)
    assert str(error.value) == (
        "prompt 0 has 21 tokens, but encoder_seq is 20: shorten the prompt; "
        "16 tokens are to follow a first one, but seq is 16: ask for fewer"
    )
    with pytest.raises(ValueError, match=r"T1 from 22 to 37 \(encoder_seq \+ seq \+ 1\)"):
        worker.evaluate(np.zeros((1, 21), np.int32))
    with pytest.raises(ValueError, match=r"the mask has the shape \(1, 36\); .* is \(1, 16\)"):
        worker.evaluate(np.zeros((1, 37), np.int32), np.ones((1, 36)))


@pytest.mark.thorough
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
