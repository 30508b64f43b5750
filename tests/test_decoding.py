"""Decoding token by token, with a cache, gives what computing everything anew gives."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from mesh_transformer.model.decoder import make_model
from mesh_transformer.pod.worker import Worker
from mesh_transformer.session import Generation, Sampling
from mesh_transformer.training.steps import TrainState

PROMPTS = [small.tokens(n, seed=n).tolist() for n in (3, 9, 1, 6)]
N_NEW = 7
GREEDY = Sampling(temperature=0)
DRAWN = Sampling(temperature=1.2, top_k=40, top_p=0.95, seed=3)


@functools.cache
def host(
    dp: int = 1, mp: int = 1, zero_stage: int = 0, pe: str = "rotary", norm: str = "layernorm"
) -> Worker:
    """Return a worker that holds `small.weights`."""
    worker = small.worker(dp, mp, zero_stage=zero_stage, pe=pe, norm=norm)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, worker.steps.state)
    params = jax.device_put(small.weights(pe, norm), shardings.params)
    worker.state = TrainState(jax.device_put(jnp.int32(0), shardings.step), params, ())
    return worker


def generate(worker: Worker, prompts: Any, sampling: Sampling = GREEDY) -> Generation:
    """Continue prompts, always by as many tokens, so that one compiled decoder serves all tests."""
    return worker.generate(prompts, sampling, N_NEW)


@pytest.mark.parametrize(("pe", "norm"), small.KINDS)
def test_greedy_decoding_equals_computing_every_token_anew(pe: str, norm: str) -> None:
    tokens, logprobs = generate(host(pe=pe, norm=norm), PROMPTS)
    sequences = np.zeros((len(PROMPTS), small.KEYS["seq"]), np.int32)
    for row, prompt in enumerate(PROMPTS):
        assert len(tokens[row]) == len(logprobs[row]) == N_NEW
        sequences[row, : len(prompt) + N_NEW] = prompt + tokens[row]
    apply = make_model(small.parsed(pe=pe, norm=norm).model).apply
    positions_BT = jnp.arange(sequences.shape[1])[None]
    logits_BTV, _ = jax.jit(apply, compiler_options=small.COMPILED_FAST)(
        small.weights(pe, norm), sequences, positions_BT
    )
    logprobs_BTV = jax.device_get(jax.nn.log_softmax(logits_BTV))
    for row, prompt in enumerate(PROMPTS):
        expected_TV = logprobs_BTV[row, len(prompt) - 1 : len(prompt) - 1 + N_NEW]
        assert tokens[row] == expected_TV.argmax(-1).tolist()
        np.testing.assert_allclose(logprobs[row], expected_TV.max(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_what_else_is_in_the_batch_changes_nothing(sampling: Sampling) -> None:
    together = generate(host(), PROMPTS, sampling)
    for row, prompt in enumerate(PROMPTS):
        others = [small.tokens(8, seed=90 + i).tolist() for i in range(len(PROMPTS))]
        others[row] = prompt
        beside = generate(host(), others, sampling)
        assert beside.tokens[row] == together.tokens[row]
        np.testing.assert_allclose(beside.logprobs[row], together.logprobs[row], atol=1e-5)


def test_prompts_of_different_lengths_decode_in_one_batch_as_each_alone() -> None:
    together = generate(host(), PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(host(), [prompt])
        assert alone.tokens == [together.tokens[row]]
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[row], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "sampling"),
    [(small.KINDS[0], GREEDY), (small.KINDS[0], DRAWN), (small.KINDS[1], GREEDY)],
)
def test_a_sharded_model_decodes_as_one_device(kind: tuple[str, str], sampling: Sampling) -> None:
    """Four prompts on two replicas of four devices, and three, which leave a replica a row idle."""
    pe, norm = kind
    alone = generate(host(pe=pe, norm=norm), PROMPTS, sampling)
    for n in (4, 3):
        sharded = generate(host(2, 4, 3, pe, norm), PROMPTS[:n], sampling)
        assert sharded.tokens == alone.tokens[:n]
        for ours, theirs in zip(sharded.logprobs, alone.logprobs[:n], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_the_seed_decides_what_is_drawn() -> None:
    first, again = (generate(host(), PROMPTS, DRAWN) for _ in range(2))
    assert first == again
    other = Sampling(temperature=1.2, top_k=40, top_p=0.95, seed=4)
    assert generate(host(), PROMPTS, other).tokens != first.tokens
    repeated = generate(host(), [PROMPTS[0]] * 4, DRAWN).tokens
    assert repeated[0] != repeated[1], "one prompt given twice is drawn for twice"


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    few = Worker(small.parsed(n_tokens=3), jax.devices()[:1])
    few.state = host().state
    hot = Sampling(temperature=100.0)
    drawn = {token for row in generate(few, PROMPTS, hot).tokens for token in row}
    assert drawn == {0, 1, 2}
