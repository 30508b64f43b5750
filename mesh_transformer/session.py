"""The session protocol: all that a training loop, an evaluation or a server knows of a model.

A `pod.worker.Worker` implements it on one host; a cluster of hosts implements it over remote calls.
Arrays that cross this border are NumPy arrays of token ids and scalars; weights never do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

Metrics = Mapping[str, float]
"""Float32 scalars of one optimizer step: loss, last_loss, grad_norm, micro_grad_norm, lr."""

Position = Mapping[str, Any]
"""Where a data set has been read up to, in plain JSON values."""


class Evaluation(NamedTuple):
    """What the model makes of given tokens.

    Attributes:
        loss_BT: float32, nats per token; 0 where the mask is 0, and of padding.
        correct_BT: bool, whether greedy decoding would have given the token.
    """

    loss_BT: np.ndarray
    correct_BT: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from the logits.

    Filters apply in the order other libraries use: temperature, then top-k, then top-p.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token (greedy).
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches p; 1 keeps all.
        seed: Seeds the draw. The same seed, prompt and place in the batch give the same tokens,
            whatever the other prompts are.
        stop_ids: Token ids that end a sequence; the stopping token is not part of the output.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < math.inf:
            problems.append(
                f"temperature is {self.temperature}; it must be 0 (greedy) or more, and finite"
            )
        if self.top_k < 0:
            problems.append(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}; it must be above 0 and at most 1 (off)")
        if not 0 <= self.seed < 2**32:
            problems.append(f"seed is {self.seed}; it must be from 0 to {2**32 - 1}")
        if problems:
            raise ValueError("; ".join(problems))


class Generation(NamedTuple):
    """The tokens that follow each prompt, and the log-probability of each.

    Attributes:
        tokens: One list of token ids per prompt, without prompt and stopping token.
        logprobs: As `tokens`: natural log of each token's probability under the model,
            before temperature and filters.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]


class Restored(NamedTuple):
    """What `restore` found: the checkpoint's optimizer step and data position."""

    step: int
    position: Position


class SessionLost(RuntimeError):
    """The devices that held a session are gone, or hang; a new one can go on from a checkpoint.

    The message names the host, and holds what it raised.
    """


class Session(Protocol):
    """A sharded model that can be trained, evaluated, sampled from, saved and restored."""

    def train(self, tokens_ABT1: np.ndarray, mask_ABT: np.ndarray | None = None) -> Metrics:
        """Take one optimizer step over A microbatches of B sequences.

        The shift into inputs and targets happens here; a mask of 0 leaves a target out of the loss.
        With an encoder its tokens come first: see `training.examples`.
        """
        ...

    def evaluate(self, tokens_BT1: np.ndarray, mask_BT: np.ndarray | None = None) -> Evaluation:
        """Score the given tokens with the current weights."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int
    ) -> Generation:
        """Continue each prompt by up to `max_new_tokens` tokens; with an encoder, answer it."""
        ...

    def save(self, step: int, position: Position) -> None:
        """Begin to write a checkpoint; it counts once it is complete on disk."""
        ...

    def restore(self, step: int | None = None) -> Restored | None:
        """Load the newest (or the given) complete checkpoint; None if there is none yet."""
        ...
