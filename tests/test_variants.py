"""Every option of a decoder, as families combine them: on every mesh and in decoding alike."""

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

# With these the gradients of "one head of keys" change by 2e-6 when its weights change by half a
# last bit; with seed 0 by 1.7e-5, so that any other order of sums would look like an error.
TOKENS_ABT1 = small.tokens(1, 8, small.KEYS["seq"] + 1, seed=1)
PROMPTS = [small.tokens(n, seed=n).tolist() for n in (3, 9, 1, 6)]
N_NEW = 6


ALWAYS = ("llama", "one head of keys", "research")
"""What is tested fast too: between them they have most options."""


@pytest.fixture(
    params=[
        pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow)
        for name in small.VARIANTS
    ]
)
def variant(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.thorough
def test_a_mesh_trains_as_one_device(variant: str) -> None:
    """Everything is spread; the second step sees what the first made of the weights."""
    seen = []
    for dp, mp, zero_stage in ((1, 1, 0), (2, 4, 3)):
        state = small.start(dp, mp, zero_stage=zero_stage, variant=variant)
        train = small.steps(dp, mp, zero_stage=zero_stage, variant=variant).train
        state, first = train(state, TOKENS_ABT1, None)
        gradients = jax.device_get(optax.tree.get(state.opt_state, "mu"))
        _, second = train(state, TOKENS_ABT1, None)
        losses = [float(metrics["loss"]) for metrics in (first, second)]
        seen.append((np.array([*losses, first["grad_norm"]]), gradients))
    (alone, theirs), (here, ours) = seen
    np.testing.assert_allclose(here, alone, rtol=1e-5)
    assert alone[1] < alone[0], "nothing was learned, so nothing was compared"
    if small.VARIANTS[variant]["pe"] not in ("rotary", "rotary-half"):
        # What one number adds to all products of a query, its softmax does not see.
        for gradients in (ours, theirs):
            bias = gradients["decoder/layers/block/attention/k"].pop("b", np.zeros(1))
            np.testing.assert_allclose(bias, 0, atol=1e-8)
    small.assert_close(ours, theirs, 1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(theirs):
        # Queries of Head-QK start at 0, so its keys do not count at first.
        starts_idle = "head_qk/k" in jax.tree_util.keystr(path)
        assert np.any(leaf) or starts_idle, f"{jax.tree_util.keystr(path)} has no gradient"


@pytest.mark.thorough
def test_decoding_on_any_mesh_equals_computing_every_token_anew(variant: str) -> None:
    config = small.parsed(**small.VARIANTS[variant]).model
    params = jax.tree.map(lambda leaf: np.asarray(leaf) * 2, small.start(variant=variant).params)
    apply = jax.jit(make_model(config).apply, compiler_options=small.COMPILED_FAST)
    for dp, mp in ((1, 1), (2, 4)):
        worker = small.worker(dp, mp, variant=variant)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, worker.steps.state)
        step = jax.device_put(jnp.int32(0), shardings.step)
        worker.state = TrainState(step, jax.device_put(params, shardings.params), ())
        tokens, logprobs = worker.generate(PROMPTS, Sampling(temperature=0), N_NEW)
        sequences = np.zeros((len(PROMPTS), config.seq), np.int32)
        for row, prompt in enumerate(PROMPTS):
            sequences[row, : len(prompt) + N_NEW] = prompt + tokens[row]
        logits_BTV, _ = apply(params, sequences, jnp.arange(config.seq)[None])
        logprobs_BTV = jax.device_get(jax.nn.log_softmax(logits_BTV))
        for row, prompt in enumerate(PROMPTS):
            expected_TV = logprobs_BTV[row, len(prompt) - 1 : len(prompt) - 1 + N_NEW]
            assert tokens[row] == expected_TV.argmax(-1).tolist()
            np.testing.assert_allclose(logprobs[row], expected_TV.max(-1), rtol=0, atol=1e-5)


def trained_and_continued(dp: int, mp: int, **keys: Any) -> tuple[Any, Any, Any]:
    """Return loss and norm, gradients, and greedy continuations of a mesh."""
    keys |= {"variant": "llama", "d_model": 36, "d_ff": 144, "n_vocab": 72}
    keys |= {"zero_stage": 3 if dp > 1 else 0}
    worker = small.worker(dp, mp, **keys)
    worker.state = small.start(dp, mp, **keys)
    said = worker.generate(PROMPTS[:2], Sampling(temperature=0), 5)
    state, metrics = worker.steps.train(worker.state, TOKENS_ABT1, None)
    gradients = jax.device_get(optax.tree.get(state.opt_state, "mu"))
    return (float(metrics["loss"]), float(metrics["grad_norm"])), gradients, said


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("dp", "mp", "n_heads", "n_kv_heads", "d_head"),
    [
        (2, 2, 6, 3, 4),  # two copies of each head of keys, one on each of two devices
        pytest.param(2, 4, 8, 2, 4, marks=pytest.mark.slow),
        # Stored in three parts, none of which is a head.
        pytest.param(1, 3, 6, 2, 6, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_devices_shares_the_heads_of_keys(
    dp: int, mp: int, n_heads: int, n_kv_heads: int, d_head: int
) -> None:
    """Whether or not it divides them; in float32, whose sums are in another order on a mesh."""
    keys = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_head": d_head}
    expected, their_gradients, theirs = trained_and_continued(1, 1, **keys)
    seen, gradients, ours = trained_and_continued(dp, mp, **keys)
    np.testing.assert_allclose(seen, expected, rtol=1e-5)
    small.assert_close(gradients, their_gradients, 1e-5)
    assert ours.tokens == theirs.tokens
    for row, expected_row in zip(ours.logprobs, theirs.logprobs, strict=True):
        np.testing.assert_allclose(row, expected_row, rtol=0, atol=1e-5)
