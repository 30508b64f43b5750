"""Activations and positions are their papers' formulas, written out in NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer import network
from mesh_transformer.checkpoints.family import ACTIVATIONS as BY_THEIR_NAMES
from mesh_transformer.model.block import ACTIVATIONS
from mesh_transformer.model.positions import alibi, alibi_slopes, rotary_frequencies, sinusoidal
from mesh_transformer.position_rules import SCALING_FACTORS

X = np.linspace(-6, 6, 241)


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def tanh(x: np.ndarray) -> np.ndarray:
    return 1 - 2 / (np.exp(2 * x) + 1)


def normal_cdf(x: np.ndarray) -> np.ndarray:
    return np.array([(1 + math.erf(it / math.sqrt(2))) / 2 for it in x])


FORMULAS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu_new": lambda x: x / 2 * (1 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: x * normal_cdf(x),  # arXiv:1606.08415, which has the one above too
    "quick_gelu": lambda x: x * logistic(1.702 * x),
    "silu": lambda x: x * logistic(x),
    "relu": lambda x: np.where(x > 0, x, 0),
    "relu_squared": lambda x: np.where(x > 0, x * x, 0),  # arXiv:2109.08668
    "mish": lambda x: x * tanh(np.log(1 + np.exp(x))),  # arXiv:1908.08681
    "sigmoid": logistic,
    "tanh": tanh,
}


@pytest.mark.parametrize("name", get_args(network.Activation))
def test_an_activation_is_its_formula(name: str) -> None:
    assert set(ACTIVATIONS) == set(FORMULAS) == set(BY_THEIR_NAMES.values())
    y = ACTIVATIONS[name](jnp.asarray(X, jnp.float32))
    # The curves nearest to each other, of GELU and its tanh form, are 4.7e-4 apart.
    np.testing.assert_allclose(y, FORMULAS[name](X), rtol=1e-5, atol=2e-6)


def test_sinusoidal_positions_are_sines_and_cosines_of_geometric_wavelengths() -> None:
    d_model, positions_BT = 6, np.array([[0, 1, 2, 1000]])
    expected = np.zeros((4, d_model))
    for t, position in enumerate(positions_BT[0]):
        for i in range(d_model // 2):
            angle = position / 10_000 ** (2 * i / d_model)
            expected[t, 2 * i], expected[t, 2 * i + 1] = math.sin(angle), math.cos(angle)
    y_BTD = sinusoidal(jnp.asarray(positions_BT), d_model)
    # A float32 angle near 1000 is known to 6e-5.
    np.testing.assert_allclose(y_BTD[0], expected, rtol=0, atol=1e-4)
    odd_BTD = sinusoidal(jnp.asarray(positions_BT), 5)
    assert odd_BTD.shape == (1, 4, 5)


def slopes_by_recursion(n: int) -> list[float]:
    """Return the paper's slopes: a geometric sequence, filled up from that of twice as many."""
    if math.log2(n).is_integer():
        first = 2 ** (-8 / n)
        return [first ** (i + 1) for i in range(n)]
    lower = 2 ** math.floor(math.log2(n))
    return slopes_by_recursion(lower) + slopes_by_recursion(2 * lower)[0::2][: n - lower]


@pytest.mark.parametrize("n_heads", [*range(1, 18), 24, 40, 71, 112])
def test_alibi_has_the_paper_s_slopes_for_any_number_of_heads(n_heads: int) -> None:
    np.testing.assert_allclose(alibi_slopes(n_heads), slopes_by_recursion(n_heads), rtol=1e-6)


def test_alibi_lowers_logits_by_distance_times_slope() -> None:
    bias_BHTS = alibi(jnp.array([[5, 9]]), jnp.arange(10), 8)
    for head, slope in enumerate([0.5, 0.25, 0.125, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]):
        for t, position in enumerate((5, 9)):
            expected = [-slope * (position - slot) for slot in range(10)]
            np.testing.assert_allclose(bias_BHTS[0, head, t], expected, rtol=1e-6)


N_ROTATED, THETA = 128, 500_000.0
PLAIN = np.array([THETA ** (-2 * i / N_ROTATED) for i in range(N_ROTATED // 2)])


def test_no_stretching_of_positions_is_left_out_of_these_tests() -> None:
    assert set(SCALING_FACTORS) == {"none", "linear", "llama3", "yarn"}


def test_frequencies_fall_geometrically_and_linear_scaling_divides_them() -> None:
    plain, size = rotary_frequencies(N_ROTATED, THETA, "none", {})
    np.testing.assert_allclose(plain, PLAIN, rtol=1e-6)
    linear, linear_size = rotary_frequencies(N_ROTATED, THETA, "linear", {"factor": 4.0})
    np.testing.assert_allclose(linear, PLAIN / 4, rtol=1e-6)
    assert size == linear_size == 1


def test_llama_3_scaling_divides_long_wavelengths_alone() -> None:
    low, high, trained, factor = 1.0, 4.0, 8192.0, 8.0
    expected = []
    for frequency in PLAIN:
        wavelength = 2 * math.pi / frequency
        if wavelength < trained / high:
            expected.append(frequency)
        elif wavelength > trained / low:
            expected.append(frequency / factor)
        else:
            smooth = (trained / wavelength - low) / (high - low)
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    kinds = np.array(expected) / PLAIN
    assert (kinds == 1).any() and np.isclose(kinds, 1 / factor).any()
    assert ((kinds < 0.99) & (kinds > 1.01 / factor)).any(), "nothing lies on the ramp"
    factors = {
        **{"factor": factor, "low_freq_factor": low, "high_freq_factor": high},
        "original_max_position_embeddings": trained,
    }
    found, size = rotary_frequencies(N_ROTATED, THETA, "llama3", factors)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert size == 1


@pytest.mark.parametrize("trained", [4096.0, 64.0])  # in the shorter no pair turns 32 times
@pytest.mark.parametrize("given", [{}, {"beta_fast": 16.0, "beta_slow": 2.0}])
def test_yarn_keeps_what_turns_often_and_divides_what_does_not(
    given: dict[str, float], trained: float
) -> None:
    factor = 16.0
    fast, slow = given.get("beta_fast", 32.0), given.get("beta_slow", 1.0)

    def pair_of(turns: float) -> float:
        """The pair, not whole, whose wavelength fits so many times into the trained length."""
        return N_ROTATED / 2 * math.log(trained / (turns * 2 * math.pi), THETA)

    first, last = max(math.floor(pair_of(fast)), 0), math.ceil(pair_of(slow))
    expected = []
    for i, frequency in enumerate(PLAIN):
        divided = min(max((i - first) / (last - first), 0), 1)
        expected.append(frequency * (1 - divided) + frequency / factor * divided)
    factors = {"factor": factor, "original_max_position_embeddings": trained, **given}
    found, size = rotary_frequencies(N_ROTATED, THETA, "yarn", factors)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # The paper's size of queries and keys both, so that logits grow by its square.
    assert size == pytest.approx(0.1 * math.log(factor) + 1)
    given_size = rotary_frequencies(N_ROTATED, THETA, "yarn", factors | {"attention_factor": 1.5})
    assert given_size[1] == 1.5
    shorter = rotary_frequencies(N_ROTATED, THETA, "yarn", factors | {"factor": 0.5})
    assert shorter[1] == 1
