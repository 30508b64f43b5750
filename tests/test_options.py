"""Options of a decoder of which families take one or another: every value, by its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from mesh_transformer import network, position_rules
from mesh_transformer.checkpoints.family import ACTIVATIONS as BY_THEIR_NAMES
from mesh_transformer.model.block import ACTIVATIONS
from mesh_transformer.model.positions import rotary_frequencies
from mesh_transformer.session import Sampling

TOKENS_ABT1 = small.tokens(1, 8, small.KEYS["seq"] + 1)
PROMPTS = [small.tokens(n, seed=n).tolist() for n in (3, 9)]


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


FORMULAS: dict[str, Callable[[float], float]] = {
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_new": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * logistic(1.702 * x),
    "silu": lambda x: x * logistic(x),
    "relu": lambda x: max(x, 0.0),
    "relu_squared": lambda x: max(x, 0.0) ** 2,
    "mish": lambda x: x * math.tanh(math.log(1 + math.exp(x))),
    "sigmoid": logistic,
    "tanh": math.tanh,
}


def test_no_activation_and_no_stretching_of_positions_is_left_out_of_these_tests() -> None:
    assert set(FORMULAS) == set(get_args(network.Activation)) == set(ACTIVATIONS)
    assert set(BY_THEIR_NAMES.values()) == set(FORMULAS)
    assert set(FREQUENCIES) == set(position_rules.SCALING_FACTORS)


@pytest.mark.parametrize("name", FORMULAS)
def test_activations_follow_their_formulas(name: str) -> None:
    """Within a few roundings of float32, whose numbers here are below 40."""
    points = np.linspace(-6, 6, 241)
    expected = [FORMULAS[name](x) for x in points]
    found = np.asarray(ACTIVATIONS[name](jnp.asarray(points, jnp.float32)))
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


TRAINED, FACTOR, THETA, N_ROTATED = 64.0, 4.0, 10_000.0, 16


def plain(i: int) -> float:
    return float(THETA ** (-2 * i / N_ROTATED))


def llama3(i: int) -> float:
    """As Llama 3.1's own code: by wavelength, in three ranges."""
    wavelength, low, high = 2 * math.pi / plain(i), 1.0, 4.0
    if wavelength < TRAINED / high:
        return plain(i)
    if wavelength > TRAINED / low:
        return plain(i) / FACTOR
    smooth = (TRAINED / wavelength - low) / (high - low)
    return (1 - smooth) * plain(i) / FACTOR + smooth * plain(i)


def yarn(i: int) -> float:
    """By the pairs that turn 32 times and once in the trained length, rounded outwards."""
    turning = [
        N_ROTATED * math.log(TRAINED / (times * 2 * math.pi)) / (2 * math.log(THETA))
        for times in (32, 1)
    ]
    first, last = max(math.floor(turning[0]), 0), min(math.ceil(turning[1]), N_ROTATED - 1)
    stretched = min(max((i - first) / (last - first), 0), 1)
    return plain(i) / FACTOR * stretched + plain(i) * (1 - stretched)


FREQUENCIES: dict[str, Callable[[int], float]] = {
    "none": plain,
    "linear": lambda i: plain(i) / FACTOR,
    "llama3": llama3,
    "yarn": yarn,
}


@pytest.mark.parametrize("scaling", FREQUENCIES)
def test_positions_are_stretched_as_their_formulas_say(scaling: str) -> None:
    """To the rounding of float32."""
    factors = {
        **{"factor": FACTOR, "original_max_position_embeddings": TRAINED},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    }
    found_R, size = rotary_frequencies(N_ROTATED, THETA, scaling, factors)
    expected = [FREQUENCIES[scaling](i) for i in range(N_ROTATED // 2)]
    np.testing.assert_allclose(found_R, expected, rtol=1e-6)
    assert size == pytest.approx(0.1 * math.log(FACTOR) + 1 if scaling == "yarn" else 1)
    if scaling in ("llama3", "yarn"):  # some pairs are kept, some stretched, some between
        kept = np.isclose(found_R, [plain(i) for i in range(N_ROTATED // 2)], rtol=1e-6)
        stretched = np.isclose(found_R * FACTOR, [plain(i) for i in range(8)], rtol=1e-6)
        assert kept.any() and stretched.any() and not (kept | stretched).all()


def trained_and_continued(dp: int, mp: int, **keys: Any) -> tuple[Any, Any, Any]:
    """Return loss and norm, gradients, and greedy continuations of a mesh."""
    keys |= {"variant": "llama", "d_model": 36, "d_head": 4, "d_ff": 144, "n_vocab": 72}
    keys |= {"zero_stage": 3 if dp > 1 else 0}
    worker = small.worker(dp, mp, **keys)
    worker.state = small.start(dp, mp, **keys)
    said = worker.generate(PROMPTS, Sampling(temperature=0), 5)
    state, metrics = worker.steps.train(worker.state, TOKENS_ABT1, None)
    gradients = jax.device_get(optax.tree.get(state.opt_state, "mu"))
    return (float(metrics["loss"]), float(metrics["grad_norm"])), gradients, said


@pytest.mark.parametrize(
    ("dp", "mp", "n_heads", "n_kv_heads"),
    [
        (2, 2, 6, 3),  # two copies of each head of keys, one on each of two devices
        pytest.param(1, 3, 9, 3, marks=pytest.mark.slow),
        pytest.param(2, 4, 8, 2, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_devices_shares_the_heads_of_keys(
    dp: int, mp: int, n_heads: int, n_kv_heads: int
) -> None:
    """Whether or not it divides them; in float32, whose sums are in another order on a mesh."""
    keys = {"n_heads": n_heads, "n_kv_heads": n_kv_heads}
    expected, their_gradients, theirs = trained_and_continued(1, 1, **keys)
    seen, gradients, ours = trained_and_continued(dp, mp, **keys)
    np.testing.assert_allclose(seen, expected, rtol=1e-5)
    small.assert_close(gradients, their_gradients, 1e-5)
    assert ours.tokens == theirs.tokens
    for row, expected_row in zip(ours.logprobs, theirs.logprobs, strict=True):
        np.testing.assert_allclose(row, expected_row, rtol=0, atol=1e-5)
