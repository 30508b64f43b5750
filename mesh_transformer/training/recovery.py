"""Training that goes on whatever is lost on the way: hosts, slices, answers.

The unit of failure is all devices of the run together. When a session is lost, a new one is started
and goes on from the last checkpoint; as steps are functions of weights and data alone, the run ends
with the bits of one that nothing happened to.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from mesh_transformer.config import Config
from mesh_transformer.pod.host import Devices
from mesh_transformer.session import Session, SessionLost
from mesh_transformer.training import goodput, loop

_logger = logging.getLogger(__name__)


class Running(Session, Protocol):
    """A session that knows its devices and its newest checkpoint; `pod.cluster.Cluster` is one."""

    devices: Devices

    def latest(self) -> int | None:
        """Give the step of the newest complete checkpoint; None if there is none."""
        ...

    def tune_from(self, path: str, *, fresh_opt: bool) -> None:
        """Take the weights of another run, to train on from step 0."""
        ...

    def clear(self) -> None:
        """Give up every checkpoint, so that training can start over."""
        ...


class Retries(NamedTuple):
    """How often to start again.

    Attributes:
        budget: Losses in a row without a new checkpoint between them, after which it is given up.
        first_wait: Seconds before the first of them is retried; doubled for each more.
        longest_wait: Seconds that it is never doubled beyond.
    """

    budget: int = 5
    first_wait: float = 1.0
    longest_wait: float = 120.0


RETRIES = Retries()


def train(
    start: Callable[[], contextlib.AbstractContextManager[Running]],
    config: Config,
    data_for: Callable[[int], loop.Data],
    signals: loop.StopSignals,
    *,
    prepare: Callable[[Running], None],
    ledger: goodput.Ledger,
    retries: Retries = RETRIES,
    sleep: Callable[[float], None] = time.sleep,
) -> loop.Finished:
    """Train until `total_steps` or a signal, starting sessions as they are lost.

    Args:
        start: Starts a session on hosts that are there, replacing those that are not.
        data_for: Gives the data sets for a number of devices.
        prepare: Called with each session before it trains.
        ledger: Books where the time goes.

    Raises:
        SessionLost: `retries.budget` sessions were lost in a row and none saved a checkpoint.
        UserError: What would go wrong again; it is not retried.
    """
    losses, newest = 0, -1
    while True:
        try:
            with start() as session:
                prepare(session)
                n_devices, kind = session.devices.n, session.devices.kind
                losses, newest = _forgiven(losses, newest, session.latest())
                data = data_for(n_devices)
                if not ledger.restarts:
                    loop.announce(config, session.devices.n_parameters, n_devices, kind)
                return loop.train(
                    session,
                    config,
                    data,
                    signals,
                    n_devices=n_devices,
                    device_kind=kind,
                    ledger=ledger,
                )
        except SessionLost as error:
            losses += 1
            if losses > retries.budget:
                raise
            wait = min(retries.first_wait * 2 ** (losses - 1), retries.longest_wait)
            _logger.warning("%s", error)
            _logger.warning(
                "starting again from the last checkpoint in %.0f s (loss %d of at most %d without "
                "a new checkpoint)",
                wait,
                losses,
                retries.budget,
            )
            ledger.restarts += 1
            with ledger.during(goodput.WAITING):
                sleep(wait)
            ledger.now(goodput.STARTING)


def _forgiven(losses: int, newest: int, latest: int | None) -> tuple[int, int]:
    """Forget earlier losses if a checkpoint was saved since."""
    if latest is not None and latest > newest:
        return 0, latest
    return losses, newest
