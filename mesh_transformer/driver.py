"""What train.py does: hosts by Ray, data and log here, checkpoints by the hosts, and recovery.

This process reads the data and keeps the log, and never touches an accelerator: it does not even
import JAX.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence
from typing import Any, Protocol

from mesh_transformer.checkpoints import retention
from mesh_transformer.config import Config
from mesh_transformer.errors import UserError
from mesh_transformer.pod.cluster import Cluster
from mesh_transformer.pod.machines import Node
from mesh_transformer.session import SessionLost
from mesh_transformer.training import goodput, loop, recovery

_logger = logging.getLogger(__name__)


class Places(contextlib.AbstractContextManager[Any], Protocol):
    """Where hosts can be started, in a `with` block: `pod.machines.Pod`, `pod.slices.SlicePod`."""

    n_devices: int | None
    """That JAX will see, where that is known before hosts are there."""

    def nodes(self, seconds: int) -> Sequence[Node]:
        """Give a place for each host, in order, once the machines are there (again)."""
        ...


def train(
    config: Config,
    pod: Places,
    *,
    new: bool = False,
    tune_model_path: str | None = None,
    fresh_opt: bool = False,
) -> loop.Finished:
    """Train until `total_steps` or a signal, whatever is lost on the way.

    Args:
        pod: The places for hosts, not entered yet.
        new: Give up the checkpoints there are.
        tune_model_path: Begin with the weights of this run, if there are no checkpoints.
        fresh_opt: And with fresh optimizer moments.

    Raises:
        UserError: Something is wrong that the user can mend, or hosts were lost too often in a row.
    """
    loop.check_tasks(config)
    retention.check_kept(config.checkpoint.root)
    ledger = goodput.Ledger()
    data_for = functools.cache(functools.partial(loop.Data, config))
    if n_devices := config.mesh.tpu_size or pod.n_devices:
        data_for(n_devices)  # what is wrong with it shows before hosts are started
    to_clear, told = new, False

    def prepare(session: recovery.Running) -> None:
        nonlocal to_clear, told
        if tune_model_path and (to_clear or session.latest() is None):
            session.tune_from(tune_model_path, fresh_opt=fresh_opt)
            told = True  # checkpoints from here on are of that very path
        elif tune_model_path and not told:
            told = True
            root = config.checkpoint.root
            _logger.warning("%s goes on as it is; --new starts over from --tune-model-path", root)
        if to_clear:  # only now, when nothing that the new run needs was found missing
            session.clear()
            to_clear = False

    with loop.StopSignals() as signals, pod:
        try:
            return recovery.train(
                lambda: Cluster(config, pod.nodes(config.pod.pod_start_seconds)),
                config,
                data_for,
                signals,
                prepare=prepare,
                ledger=ledger,
            )
        except SessionLost as error:
            raise UserError(f"{error}; training is given up") from error
        finally:
            _logger.info("%s", ledger)
