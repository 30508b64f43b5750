"""Gradient noise scale: unbiased whatever the split, silent where there is nothing to compare."""

import dataclasses
import math

import numpy as np
import pytest

from mesh_transformer import noise_scale
from mesh_transformer.noise_scale import Estimate, RunningAverage

FEATURES = 20


@pytest.mark.parametrize(
    ("replicas", "microbatches", "micro_sequences"),
    [(1, 2, 1), (1, 4, 3), (4, 1, 2), (2, 3, 4)],
)
def test_estimates_are_unbiased_for_any_replicas_and_accumulation(
    replicas: int, microbatches: int, micro_sequences: int
) -> None:
    rng = np.random.default_rng(0)
    steps, parts = 4000, replicas * microbatches
    true_gradient = rng.normal(size=FEATURES)
    deviations = rng.uniform(0.5, 3, size=FEATURES)
    noise = rng.normal(size=(steps, parts, micro_sequences, FEATURES)) * deviations
    micro_gradients = (true_gradient + noise).mean(axis=2)
    micro_norms = np.sqrt((micro_gradients**2).sum(axis=2).mean(axis=1))
    norms = np.linalg.norm(micro_gradients.mean(axis=1), axis=1)

    estimates = np.array(
        [
            noise_scale.estimate(
                micro_grad_norm=small,
                grad_norm=big,
                micro_sequences=micro_sequences,
                sequences=parts * micro_sequences,
            )
            for small, big in zip(micro_norms, norms, strict=True)
        ]
    )

    standard_errors = estimates.std(axis=0) / math.sqrt(steps)
    truth = np.array([(true_gradient**2).sum(), (deviations**2).sum()])
    assert (np.abs(estimates.mean(axis=0) - truth) < 4 * standard_errors).all()
    assert (standard_errors < 0.05 * truth).all()


def test_one_microbatch_on_one_replica_gives_no_estimate() -> None:
    assert _estimate(micro_sequences=8, sequences=8) is None


@pytest.mark.parametrize("norm", [math.nan, math.inf, 1e200])
def test_a_norm_that_is_not_finite_gives_no_estimate(norm: float) -> None:
    assert _estimate(micro_grad_norm=norm) is None


def test_noise_alone_averages_to_no_noise_scale_rather_than_a_negative_one() -> None:
    average = RunningAverage(alpha=0.5).updated(Estimate(g_squared=-0.1, s=3.0))
    assert average.average == Estimate(-0.1, 3.0)
    assert average.b_simple is None


def test_before_the_first_estimate_there_is_no_average() -> None:
    assert RunningAverage(alpha=0.01).average is None
    assert RunningAverage(alpha=0.01).b_simple is None


def test_the_average_of_a_constant_is_the_constant_from_the_first_step_on() -> None:
    average = RunningAverage(alpha=0.01)
    for _ in range(5):
        average = average.updated(Estimate(g_squared=2.0, s=6.0))
        assert average.average == pytest.approx((2.0, 6.0), rel=1e-12)
        assert average.b_simple == pytest.approx(3.0, rel=1e-12)


def test_the_newest_estimate_weighs_alpha_in_the_long_run() -> None:
    average = RunningAverage(alpha=0.1)
    for _ in range(500):
        average = average.updated(Estimate(g_squared=1.0, s=1.0))
    average = average.updated(Estimate(g_squared=2.0, s=11.0))
    assert average.average == pytest.approx((1.1, 2.0))


def test_averaging_s_and_g_apart_differs_from_averaging_their_ratio() -> None:
    average = RunningAverage(alpha=0.5)
    for new in (Estimate(1.0, 4.0), Estimate(3.0, 2.0)):
        average = average.updated(new)
    assert average.b_simple == pytest.approx((4.0 + 2 * 2.0) / (1.0 + 2 * 3.0))


def test_replaying_the_same_estimates_gives_the_same_bits() -> None:
    estimates = [Estimate(*pair) for pair in np.random.default_rng(1).normal(size=(50, 2)).tolist()]
    averages = []
    for _ in range(2):
        average = RunningAverage(alpha=0.01)
        for new in estimates:
            average = average.updated(new)
        averages.append(dataclasses.astuple(average))
    assert averages[0] == averages[1]


def _estimate(
    *,
    micro_grad_norm: float = 2.0,
    grad_norm: float = 1.0,
    micro_sequences: int = 1,
    sequences: int = 4,
) -> Estimate | None:
    return noise_scale.estimate(
        micro_grad_norm=micro_grad_norm,
        grad_norm=grad_norm,
        micro_sequences=micro_sequences,
        sequences=sequences,
    )
