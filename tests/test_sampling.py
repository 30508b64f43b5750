"""Tokens are drawn from the set, and with the chances, that temperature, top-k and top-p leave."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.model.sampling import Choice, choose

V, N_TOKENS, N_DRAWS = 12, 10, 4096
LOGITS_V = np.array([0.1, 2.0, -1.0, 1.5, 0.7, -0.3, 1.9, -2.0, 0.4, 1.1, 9.0, 9.0], np.float32)
"""The last two rows pad the vocabulary, and would win."""


def choice(n: int, temperature: float, top_k: int, top_p: float, seed: int = 0) -> Choice:
    """Return one choice for each of n sequences, with as many keys."""
    return Choice(
        temperature_B=jnp.full(n, temperature, jnp.float32),
        top_k_B=jnp.full(n, top_k, jnp.int32),
        top_p_B=jnp.full(n, top_p, jnp.float32),
        key_B=jax.random.split(jax.random.key(seed), n),
    )


compiled = jax.jit(choose, static_argnums=3)


def drawn(
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    *,
    seed: int = 0,
    logits_V: np.ndarray = LOGITS_V,
    position: int = 5,
) -> Any:
    """Draw from one set of logits many times: tokens and logprobs."""
    return jax.device_get(
        compiled(
            jnp.asarray(np.tile(logits_V, (N_DRAWS, 1))),
            choice(N_DRAWS, temperature, top_k, top_p, seed),
            jnp.full(N_DRAWS, position, jnp.int32),
            N_TOKENS,
        )
    )


def chances(temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Return the chance of each token: temperature, then top-k, then top-p, in NumPy."""
    logits = LOGITS_V[:N_TOKENS].astype(np.float64) / temperature
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    share = np.exp(logits[order] - logits.max())
    share /= share.sum()
    n_kept = int((np.cumsum(share) - share < top_p).sum())
    kept = np.zeros(V)
    kept[order[:n_kept]] = share[:n_kept] / share[:n_kept].sum()
    return kept


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 4, 100])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.8, 1.0])
def test_tokens_come_as_often_as_they_should(temperature: float, top_k: int, top_p: float) -> None:
    tokens_B, _ = drawn(temperature, top_k, top_p)
    expected = chances(temperature, top_k, top_p) * N_DRAWS
    seen = np.bincount(tokens_B, minlength=V)
    assert not seen[expected == 0].any(), "a token was drawn that the filters leave out"
    kept = expected > 0
    chi_square = (np.square(seen - expected)[kept] / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert chi_square <= freedom + 6 * np.sqrt(2 * freedom), "the draws do not follow the chances"


def test_top_p_counts_what_temperature_and_top_k_left() -> None:
    n_kept = [int((chances(t, k, 0.7) > 0).sum()) for t, k in ((1, 0), (3, 0), (3, 3))]
    assert n_kept == [4, 6, 3], "these cases tell the order apart"
    for (temperature, top_k), n in zip(((1, 0), (3, 0), (3, 3)), n_kept, strict=True):
        assert len(set(drawn(temperature, top_k, 0.7)[0])) == n


def test_temperature_zero_is_greedy_whatever_the_filters() -> None:
    for top_k, top_p in ((0, 1.0), (5, 0.9)):
        tokens_B, _ = drawn(0.0, top_k, top_p)
        assert set(tokens_B) == {1}


def test_ties_rank_by_token_id_so_that_exactly_k_stay() -> None:
    level_V = np.zeros(V, np.float32)
    assert set(drawn(1.0, 3, logits_V=level_V)[0]) == {0, 1, 2}
    assert set(drawn(0.0, logits_V=level_V)[0]) == {0}
    assert set(drawn(1.0, logits_V=level_V)[0]) == set(range(N_TOKENS))


def test_logprobs_are_the_model_s_own_without_padding() -> None:
    logits = LOGITS_V[:N_TOKENS].astype(np.float64)
    expected_V = logits - np.log(np.exp(logits).sum())
    for settings in ((1.0, 0, 1.0), (2.0, 4, 0.8), (0.0, 0, 1.0)):
        tokens_B, logprobs_B = drawn(*settings)
        assert (tokens_B.dtype, logprobs_B.dtype) == (np.int32, np.float32)
        np.testing.assert_allclose(logprobs_B, expected_V[tokens_B], rtol=0, atol=1e-6)


def test_a_draw_depends_on_its_key_and_position_alone() -> None:
    tokens_B, _ = drawn()
    np.testing.assert_array_equal(tokens_B, drawn()[0])
    assert (tokens_B != drawn(seed=1)[0]).any()
    assert (tokens_B != drawn(position=6)[0]).any()


def test_each_sequence_has_its_own_settings() -> None:
    mixed = Choice(
        temperature_B=jnp.array([0.0, 1.0, 1.0]),
        top_k_B=jnp.array([0, 1, 0]),
        top_p_B=jnp.array([1.0, 1.0, 0.01]),
        key_B=jax.random.split(jax.random.key(0), 3),
    )
    logits_BV = np.stack([np.roll(LOGITS_V[:N_TOKENS], i) for i in range(3)])
    tokens_B, _ = choose(jnp.asarray(logits_BV), mixed, jnp.arange(3), N_TOKENS)
    np.testing.assert_array_equal(tokens_B, [1, 2, 3])
