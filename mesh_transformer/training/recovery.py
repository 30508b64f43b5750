"""Training that goes on whatever is lost on the way: hosts, slices, answers.

The unit of failure is all devices of the run together. When a session is lost, a new one is started
and goes on from the last checkpoint; as steps are functions of weights and data alone, the run ends
with the bits of one that nothing happened to.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import time
from collections.abc import Callable
from typing import Protocol

from mesh_transformer.config import Config
from mesh_transformer.pod.host import Devices
from mesh_transformer.progress import PodStatus
from mesh_transformer.session import Session, SessionLost
from mesh_transformer.training import goodput, loop

_FIRST_WAIT = 1.0  # seconds before a loss is retried; doubled for each more without a checkpoint
_LONGEST_WAIT = 120.0

_logger = logging.getLogger(__name__)


class Running(Session, Protocol):
    """A session that knows its hosts and its newest checkpoint; `pod.cluster.Cluster` is one."""

    devices: Devices

    @property
    def n_alive(self) -> int:
        """Hosts that are alive, as far as is known."""
        ...

    def latest(self) -> int | None:
        """Give the step of the newest complete checkpoint; None if there is none."""
        ...

    def tune_from(self, path: str, *, fresh_opt: bool) -> None:
        """Take the weights of another run, to train on from step 0."""
        ...

    def clear(self) -> None:
        """Give up every checkpoint, so that training can start over."""
        ...


def train(
    start: Callable[[], contextlib.AbstractContextManager[Running]],
    config: Config,
    data_for: Callable[[int], loop.Data],
    signals: loop.StopSignals,
    *,
    prepare: Callable[[Running], None],
    ledger: goodput.Ledger,
    sleep: Callable[[float], None] = time.sleep,
) -> loop.Finished:
    """Train until `total_steps` or a signal, starting sessions as they are lost.

    Args:
        start: Starts a session on hosts that are there, replacing those that are not.
        data_for: Gives the data sets for a number of devices.
        prepare: Called with each session before it trains.
        ledger: Books where the time goes.

    Raises:
        SessionLost: More sessions than `pod_retries` were lost in a row without a new checkpoint.
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
                    pod=functools.partial(_status, session, ledger),
                )
        except SessionLost as error:
            signals.stop_watching()  # there is nothing to save: a signal now ends it at once
            if signals.received:
                _logger.warning("%s", error)
                signal.raise_signal(signals.received)
            losses += 1
            wait = _wait_after(error, losses, config.pod.pod_retries)
            ledger.lost()
            with ledger.during(goodput.WAITING):
                sleep(wait)
            ledger.now(goodput.STARTING)


def _status(session: Running, ledger: goodput.Ledger) -> PodStatus:
    return PodStatus(session.n_alive, ledger.restarts, ledger.goodput)


def _wait_after(error: SessionLost, losses: int, budget: int) -> float:
    """Tell of a loss, and say in how many seconds to start again.

    Raises:
        SessionLost: The budget is spent.
    """
    if losses > budget:
        raise SessionLost(
            f"{error}\nthat was loss {losses} without a new checkpoint, and pod_retries is {budget}"
        ) from error
    wait = min(_FIRST_WAIT * 2 ** (losses - 1), _LONGEST_WAIT)
    _logger.warning("%s", error)
    _logger.warning(
        "starting again from the last checkpoint in %.0f s (loss %d of at most %d without a new "
        "checkpoint)",
        wait,
        losses,
        budget,
    )
    return wait


def _forgiven(losses: int, newest: int, latest: int | None) -> tuple[int, int]:
    """Forget earlier losses if a checkpoint was saved since."""
    if latest is not None and latest > newest:
        return 0, latest
    return losses, newest
