"""Memory that does not suffice: each use of it says what to change, whenever it shows."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import pytest
import small

from mesh_transformer.errors import UserError
from mesh_transformer.pod.worker import Worker
from mesh_transformer.session import Sampling


class Failed:
    """What a device computed in vain: it is called, or looked at, and raises."""

    def __init__(self, message: str) -> None:
        self._message = message

    def __call__(self, *_: object) -> Any:
        raise jax.errors.JaxRuntimeError(self._message)

    def __array__(self, *_: object, **__: object) -> Any:
        self()


USES: dict[str, Callable[[Worker], Any]] = {
    "init": lambda worker: worker.state,
    "train": lambda worker: worker.train(small.tokens(1, 1, 9)),
    "evaluate": lambda worker: worker.evaluate(small.tokens(1, 9)),
    "copies": lambda worker: worker.generate([[1]], Sampling(), 2),
    "prefill": lambda worker: worker.generate([[1]], Sampling(), 2),
    "decode": lambda worker: worker.generate([[1]], Sampling(), 2),
}
ADVICE = {
    "init": "for weights and moments: raise cores_per_replica or, with several .* zero_stage",
    "train": "for a step: lower per_replica_batch .* set remat to full, or raise cores_per_rep",
    "evaluate": r"for scoring: score fewer or shorter sequences at once \(val_batch_multiplier",
} | dict.fromkeys(
    ("copies", "prefill", "decode"), "for sampling: ask for fewer new tokens, give fewer or sh"
)


def failing(step: str, result: Any) -> Worker:
    """A host whose step does what `result` does."""
    worker = Worker(small.parsed(), jax.devices()[:1])
    worker.steps = small.steps()._replace(**{step: result})
    if step != "init":
        worker.state = small.start()
    return worker


@pytest.mark.parametrize("step", USES)
def test_memory_that_is_too_small_is_told_with_what_to_change(step: str) -> None:
    with pytest.raises(UserError, match=f"too small {ADVICE[step]}.*EXHAUSTED: 9 GiB"):
        USES[step](failing(step, Failed("RESOURCE_EXHAUSTED: 9 GiB")))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: cuDNN"):
        USES[step](failing(step, Failed("INTERNAL: cuDNN")))


@pytest.mark.parametrize("step", ["evaluate", "decode"])
def test_memory_that_did_not_suffice_is_told_when_results_are_looked_at(step: str) -> None:
    """Devices work behind: what failed there is an array at first."""
    failed = Failed("RESOURCE_EXHAUSTED: 9 GiB")
    fetched = dict.fromkeys(("tokens_BS", "logprobs_BS", "position_B", "done_B"), failed)
    results = {"evaluate": (failed, failed), "decode": SimpleNamespace(**fetched)}
    with pytest.raises(UserError, match=f"too small {ADVICE[step]}.*EXHAUSTED: 9 GiB"):
        USES[step](failing(step, lambda *_: results[step]))
