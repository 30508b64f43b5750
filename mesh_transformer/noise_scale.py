"""The gradient noise scale: the batch size that a gradient is worth, from norms at two sizes.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", arXiv:1812.06162, A.1.
A gradient averaged over b sequences has E |G_b|^2 = |G|^2 + S / b, with G the true gradient and S
the trace of the covariance of one sequence's gradient. Two batch sizes give two equations, hence
unbiased estimates of |G|^2 and S. Their running averages give the noise scale B_simple = S / |G|^2
in sequences: well below it a larger batch saves steps in proportion, well above it hardly any.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple


class Estimate(NamedTuple):
    """One step's unbiased estimates; each may be negative by chance.

    Attributes:
        g_squared: |G|^2, the squared norm of the true gradient.
        s: Trace of the covariance of one sequence's gradient.
    """

    g_squared: float
    s: float


def estimate(
    *, micro_grad_norm: float, grad_norm: float, micro_sequences: int, sequences: int
) -> Estimate | None:
    """Estimate |G|^2 and S from gradient norms at two batch sizes.

    Args:
        micro_grad_norm: Root of the mean, over microbatches and data-parallel replicas, of the
            squared norm of the gradient of each one's mean loss. (The mean of squares is what is
            unbiased; a mean of norms is not.)
        grad_norm: Norm of the gradient of the whole batch's mean loss, before clipping.
        micro_sequences: Sequences behind each of the small gradients.
        sequences: Sequences in the whole batch.

    Returns:
        None where there is nothing to compare: one microbatch on one replica is the whole batch.
        None, too, where a norm is not finite.
    """
    if micro_sequences >= sequences:
        return None
    small, big = micro_grad_norm * micro_grad_norm, grad_norm * grad_norm
    if not (math.isfinite(small) and math.isfinite(big)):
        return None
    return Estimate(
        g_squared=(sequences * big - micro_sequences * small) / (sequences - micro_sequences),
        s=(small - big) / (1 / micro_sequences - 1 / sequences),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningAverage:
    """Exponential moving averages of |G|^2 and S, apart: the ratio of averages converges.

    Updated with the same estimates in the same order it has the same bits, so a run that resumes
    replays its log through it.

    Attributes:
        alpha: Weight of the newest estimate.
        weight: Total weight of the estimates so far; dividing by it takes out the start at 0.
    """

    alpha: float
    g_squared_sum: float = 0.0
    s_sum: float = 0.0
    weight: float = 0.0

    def updated(self, new: Estimate) -> RunningAverage:
        """Take in one more estimate."""
        keep = 1 - self.alpha
        return dataclasses.replace(
            self,
            g_squared_sum=keep * self.g_squared_sum + self.alpha * new.g_squared,
            s_sum=keep * self.s_sum + self.alpha * new.s,
            weight=keep * self.weight + self.alpha,
        )

    @property
    def average(self) -> Estimate | None:
        """The averages, free of bias towards the start; None before the first estimate."""
        if self.weight == 0:
            return None
        return Estimate(self.g_squared_sum / self.weight, self.s_sum / self.weight)

    @property
    def b_simple(self) -> float | None:
        """The simple noise scale S / |G|^2 in sequences; None until |G|^2 averages above zero."""
        average = self.average
        if average is None or average.g_squared <= 0:
            return None
        return average.s / average.g_squared
