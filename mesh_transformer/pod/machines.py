"""The machines of a Ray cluster, and the places on them for host processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import ray
import ray.exceptions

from mesh_transformer.errors import UserError
from mesh_transformer.session import SessionLost

_logger = logging.getLogger(__name__)


class Node(NamedTuple):
    """A place for one host process.

    Attributes:
        id: Ray's id of the machine.
        address: Its IP address.
        resources: What the process takes of Ray's resources there: TPU, GPU.
    """

    id: str
    address: str
    resources: Mapping[str, float]


class Pod:
    """The machines of a Ray cluster, as places for host processes; to be used in a `with` block."""

    def __init__(self, *, n_local: int | None = None, address: str | None = None) -> None:
        """Connect to a Ray cluster, or begin one.

        Args:
            n_local: So many host processes on this machine, in a Ray cluster of its own that
                nothing outside this machine can reach.
            address: Of a running Ray cluster, each machine of which takes one host.

        Raises:
            UserError: There is no such cluster.
        """
        self._n_local = n_local
        options: dict[str, Any] = {"logging_level": logging.ERROR, "include_dashboard": False}
        try:
            if address is None:
                ray.init(address="local", _node_ip_address="127.0.0.1", **options)
            else:
                ray.init(address=address, logging_level=logging.ERROR)
        except (ConnectionError, ray.exceptions.RayError) as error:
            raise UserError(f"no Ray cluster answers at {address}: {error}") from error
        self._n_machines = len(_machines())

    def __enter__(self) -> Pod:
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()

    def nodes(self, seconds: int) -> list[Node]:
        """Give the places for hosts, in the order of hosts, once all machines are there (again).

        Args:
            seconds: How long to wait for machines: `pod_start_seconds`.

        Raises:
            SessionLost: Machines are missing, and did not come back in time.
            UserError: A machine's accelerators cannot be shared as asked.
        """
        if self._n_local is not None:
            return _shares(_machines()[0], self._n_local)
        end, told = time.monotonic() + seconds, 0
        while len(machines := _machines()) < self._n_machines:
            if time.monotonic() > end:
                raise SessionLost(
                    f"{len(machines)} of {self._n_machines} machines are there after "
                    f"{seconds} s; pod_start_seconds says how long to wait for the others"
                )
            if told != (told := len(machines)):
                _logger.info("waiting for machines: %d of %d", told, self._n_machines)
            time.sleep(1.0)
        # One more than there were would change the run; it is left aside.
        return [_shares(machine, 1)[0] for machine in machines[: self._n_machines]]


def _machines() -> list[Mapping[str, Any]]:
    """List the machines that are there, as their slices number them."""
    return sorted((node for node in ray.nodes() if node["Alive"]), key=_order)


def _order(machine: Mapping[str, Any]) -> tuple[Any, ...]:
    """Order machines as their slice numbers them, by Ray's labels or those of start-up scripts."""
    labels = machine.get("Labels", {})
    slice_name = labels.get("mesh-slice") or labels.get("ray.io/tpu-slice-name") or ""
    worker = labels.get("mesh-worker") or labels.get("ray.io/tpu-worker-id") or "0"
    return (slice_name, int(worker), machine["NodeManagerAddress"], machine["NodeID"])


def _shares(machine: Mapping[str, Any], n_hosts: int) -> list[Node]:
    """Divide a machine's accelerators among host processes."""
    resources = {}
    for kind in ("TPU", "GPU"):
        n = machine["Resources"].get(kind, 0)
        if n % n_hosts:
            raise UserError(
                f"{machine['NodeManagerAddress']} has {n:.0f} {kind}s, which {n_hosts} hosts "
                "cannot share alike: ask for another number of hosts"
            )
        if n:
            resources[kind] = n / n_hosts
    return [Node(machine["NodeID"], machine["NodeManagerAddress"], resources)] * n_hosts
