"""A session without a model, for what drives one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import record_files

from mesh_transformer.session import Evaluation, Generation, Metrics, Restored

N_SEQUENCES = 64
"""In the training set that it is fed from."""


class Fake:
    """A session that trains nothing: the loss of step s is s, that of a target t is t / 8 nats."""

    def __init__(self, restored: Restored | None = None) -> None:
        self.events: list[Any] = []
        self.restored = restored
        self.step = restored.step if restored else 0
        self.metrics: dict[int, dict[str, Any]] = {}
        self.during: dict[Any, Callable[[], None]] = {}

    def does(self, *event: Any) -> None:
        self.events.append(event)
        self.during.get(event[:2], lambda: None)()

    def train(self, tokens_ABT1: np.ndarray, mask_ABT: np.ndarray | None = None) -> Metrics:
        self.step += 1
        self.does("train", self.step, record_files.first_tokens(tokens_ABT1))
        usual = {"loss": self.step, "last_loss": 0, "grad_norm": 1, "micro_grad_norm": 1, "lr": 0.1}
        return usual | self.metrics.get(self.step, {})

    def evaluate(self, tokens_BT1: np.ndarray, mask_BT: np.ndarray | None = None) -> Evaluation:
        self.does("evaluate", self.step, len(tokens_BT1))
        assert mask_BT is not None
        loss_BT = tokens_BT1[:, 1:].astype(np.float32) / 8
        return Evaluation(loss_BT * mask_BT, (tokens_BT1[:, 1:] % 2 == 0) & mask_BT)

    def save(self, step: int, position: Mapping[str, Any]) -> None:
        self.does("save", step, position["epoch"] * N_SEQUENCES + position["sample"])

    def restore(self, step: int | None = None) -> Restored | None:
        self.does("restore", step)
        return self.restored

    def generate(self, *_: object) -> Generation:
        raise NotImplementedError

    def named(self, *kinds: str) -> list[tuple[str, int]]:
        """The events of these kinds, with their steps."""
        return [event[:2] for event in self.events if event[0] in kinds]
