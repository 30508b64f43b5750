"""TPU VMs: one slice is created, adopted, waited for, replaced and deleted under one name.

`TpuVm.ensure` looks at what there is and does what that calls for, round by round, until the slice
is ready. So it does not matter who was interrupted where: a driver that starts again adopts the
slice that it left behind, in whatever state, and what was preempted is deleted and asked for anew.

Nothing is created before the zone was asked whether it has what is wanted. Only slices that this
library created are adopted or deleted; a label says which these are.

What the user has to mend is a `UserError`. What may pass is an `OSError` (`NoCapacity` among them):
to call `ensure` again, later, is always right.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

from mesh_transformer.config import PodConfig
from mesh_transformer.errors import UserError
from mesh_transformer.pod.tpu_api import SCOPE, NoCapacity, TpuApi, connect

__all__ = ["NoCapacity", "Slice", "TpuVm", "list_vms"]

logger = logging.getLogger(__name__)

LABEL = ("created-by", "mesh-transformer")
SCRIPT = "startup-script"

REMAINS = frozenset({"PREEMPTED", "TERMINATED", "SUSPENDED", "FAILED", "ACTIVE"})
"""States of what will not come back. ACTIVE is a queued resource whose node was deleted."""
LEAVING = frozenset({"DELETING", "SUSPENDING"})
DELETE_MINUTES = 15


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice as it was when Google Cloud was asked.

    Attributes:
        state: Of the node; of its queued resource where there is no node (yet).
        addresses: Internal addresses of its hosts in the order of TPU workers; "" where a host has
            none yet.
        queued: Whether it belongs to a queued resource.
        ours: Whether this library created it.
        script: What its hosts run when they start.
        failure: Code and message of what a queued resource failed of.
    """

    name: str
    state: str
    addresses: tuple[str, ...]
    tpu_type: str
    runtime: str
    queued: bool
    ours: bool
    script: str = dataclasses.field(repr=False)
    failure: tuple[int, str] | None = None

    @property
    def ready(self) -> bool:
        """Whether every host is up and can be reached."""
        return self.state == "READY" and len(self.addresses) > 0 and all(self.addresses)

    def __str__(self) -> str:
        missing = self.addresses.count("")
        of = f", {missing} of {len(self.addresses)} hosts without an address" if missing else ""
        return f"{self.state}{of}"


def _slice(node: Any, request: Any) -> Slice | None:
    """Make one value of a node, its queued resource, or both."""
    found = request if node is None else node
    if found is None:
        return None
    described = request.tpu.node_spec[0].node if node is None else node
    asked = "" if request is None else request.state.state.name
    ends_node = asked in LEAVING or asked in ("SUSPENDED", "FAILED")
    state = asked if node is None or ends_node else node.state.name
    status = request.state.failed_data.error if asked == "FAILED" else None
    return Slice(
        name=found.name.rpartition("/")[2],
        state=state,
        addresses=() if node is None else tuple(e.ip_address for e in node.network_endpoints),
        tpu_type=described.accelerator_type,
        runtime=described.runtime_version,
        queued=request is not None,
        ours=described.labels.get(LABEL[0]) == LABEL[1],
        script=described.metadata.get(SCRIPT, ""),
        failure=None if status is None else (status.code, status.message),
    )


def list_vms(zone: str, project: str | None = None, *, api: TpuApi | None = None) -> list[Slice]:
    """List the slices that this library created in a zone, waiting ones too."""
    api = api or connect(zone, project)
    nodes = {node.name.rpartition("/")[2]: node for node in api.list_all("node")}
    requests = {item.name.rpartition("/")[2]: item for item in api.list_all("queued_resource")}
    found = (_slice(nodes.get(name), requests.get(name)) for name in sorted({*nodes, *requests}))
    return [item for item in found if item is not None and item.ours]


class TpuVm:
    """One slice, by its name.

    Args:
        name: Of the slice and of its queued resource.
        zone: Where it is.
        config: What it is to be.
        spot: Whether it may be preempted.
        startup_script: What its hosts run when they start; see `pod.startup`. It may be set until
            `ensure`. A slice that exists is given it too, for hosts that look for a newer one.
        api: The zone's API. Left out: the real one.

    Raises:
        UserError: There can be no such slice.
    """

    def __init__(
        self,
        name: str,
        zone: str,
        config: PodConfig,
        *,
        spot: bool,
        startup_script: str = "",
        api: TpuApi | None = None,
    ) -> None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", name):
            raise UserError(
                f"--tpu {name!r} cannot be a TPU's name: write small letters, digits and -, a "
                "letter first"
            )
        if spot and config.tpu_reserved:
            raise UserError("--preemptible contradicts tpu_reserved; leave out one of them")
        if config.tpu_type is None:
            raise UserError("set tpu_type to the slice to create, such as 'v3-8', or tpu_size")
        self.name, self.zone = name, zone
        self._config, self._spot, self.startup_script = config, spot, startup_script
        self._api = api or connect(zone, config.tpu_project)
        self._checked = False
        self._operation: str | None = None  # of the creation, while nobody knows how it ended

    def check(self) -> None:
        """Ask whether the zone has what is wanted; create nothing.

        Raises:
            UserError: It has not, or the user may not ask.
        """
        self._api.check(self._config.tpu_type, self._config.tpu_runtime)
        self._checked = True

    def state(self) -> Slice | None:
        """Ask what there is; None if nothing of this name exists."""
        # In this order: a node that is created in between is seen, and not taken for a lost one.
        request = self._api.get("queued_resource", self.name)
        return _slice(self._api.get("node", self.name), request)

    def ensure(self) -> Slice:
        """Adopt or create the slice, and wait until every host is up.

        What was preempted, terminated or suspended, before or meanwhile, is deleted and asked for
        anew; what was stopped is started.

        Raises:
            UserError: It cannot be created, or what has this name is something else.
            NoCapacity: It was refused, or is not ready within `tpu_wait_minutes`. In the second
                case the request goes on: to ask again is to wait on.
            ConnectionError: The API does not answer.
        """
        minutes = self._config.tpu_wait_minutes
        wait = _Wait(self.name, self._api, minutes, NoCapacity, "tpu_wait_minutes")
        coming = False
        if not self._checked:
            self.check()
        while True:
            found = self.state()
            self._raise_failure(found, coming=coming)
            if found is None:
                self._create()
                coming = True
            elif self._is_ours(found) and found.state in REMAINS:
                self._ask_to_delete(found)
            elif found.state not in LEAVING and self._suits(found):
                coming = True
                if found.state == "STOPPED":
                    self._api.start(self.name)
                elif found.ready and self._has_script(found):
                    self._operation = None
                    logger.info("TPU %s is ready: %d host(s)", self.name, len(found.addresses))
                    return found
            wait.pause("asked for" if found is None else str(found))

    def replace(self) -> Slice:
        """Delete what has this name, whatever its state, and create it anew; see `ensure`."""
        self.delete()
        return self.ensure()

    def delete(self) -> None:
        """Delete the slice and wait until it is gone; if there is none, that is well.

        Raises:
            UserError: It was not created by this library.
            TimeoutError: It is still there.
        """
        wait = _Wait(self.name, self._api, DELETE_MINUTES, TimeoutError, "deletion")
        self._operation = None
        while (found := self.state()) is not None:
            if self._is_ours(found) and found.state not in LEAVING:
                self._ask_to_delete(found)
            wait.pause(str(found))

    def _create(self) -> None:
        how = "spot" if self._spot else "reserved" if self._config.tpu_reserved else "on demand"
        logger.info(
            "TPU %s: creating a %s in %s (%s)", self.name, self._config.tpu_type, self.zone, how
        )
        if not self._config.tpu_queued:
            scheduling = {"spot": self._spot, "reserved": self._config.tpu_reserved}
            body = self._node() | {"scheduling_config": scheduling}
            self._operation = self._api.create("node", self.name, body)
            return
        spec = {"parent": self._api.parent, "node_id": self.name, "node": self._node()}
        minutes = self._config.tpu_wait_minutes
        request: dict[str, Any] = {
            "tpu": {"node_spec": [spec]},
            # A driver that nobody restarts leaves no request behind that comes true one day.
            "queueing_policy": {"valid_until_duration": {"seconds": 60 * minutes}},
        }
        if self._spot:
            request["spot"] = {}
        elif self._config.tpu_reserved:
            request["guaranteed"] = {"reserved": True}
        self._operation = self._api.create(
            "queued_resource", self.name, request, alpha=self._config.tpu_reserved
        )

    def _node(self) -> dict[str, Any]:
        config = self._config
        return {
            "accelerator_type": config.tpu_type,
            "runtime_version": config.tpu_runtime,
            "network_config": {
                "network": config.tpu_network or "",
                "subnetwork": config.tpu_subnetwork or "",
                "enable_external_ips": config.tpu_external_ips,
            },
            "service_account": {"email": config.tpu_service_account or "", "scope": [SCOPE]},
            "labels": dict(config.tpu_labels) | dict([LABEL]),
            "metadata": {SCRIPT: self.startup_script},
        }

    def _ask_to_delete(self, found: Slice) -> None:
        self._api.delete("queued_resource" if found.queued else "node", self.name)

    def _has_script(self, found: Slice) -> bool:
        """Whether the hosts run the script, or will soon since they look for newer ones."""
        return found.script == self.startup_script or self._api.set_metadata(
            self.name, SCRIPT, self.startup_script
        )

    def _raise_failure(self, found: Slice | None, *, coming: bool) -> None:
        """Raise what made the creation fail, once nothing is left of it."""
        failure = self._operation and self._api.failure(self._operation)
        if not failure and coming and found is not None and found.failure is not None:
            failure = self._api.refusal(*found.failure)
        if failure:
            self.delete()
            raise failure

    def _is_ours(self, found: Slice) -> bool:
        if found.ours:
            return True
        raise UserError(
            f"--tpu {self.name}: there is a TPU of this name in {self.zone} that this library did "
            f"not create (it lacks the label {'='.join(LABEL)}); choose another name"
        )

    def _suits(self, found: Slice) -> bool:
        wanted = {"tpu_type": self._config.tpu_type, "tpu_runtime": self._config.tpu_runtime}
        there = {"tpu_type": found.tpu_type, "tpu_runtime": found.runtime}
        if there == wanted:
            return True
        has, asks = (", ".join(f"{k} {v!r}" for k, v in d.items()) for d in (there, wanted))
        kind = "queued-resources" if found.queued else "tpu-vm"
        raise UserError(
            f"TPU {self.name} in {self.zone} has {has}, but the run asks for {asks}; choose "
            f"another --tpu name, or delete it: gcloud compute tpus {kind} delete {self.name} "
            f"--zone {self.zone}{' --force' if found.queued else ''}"
        )


class _Wait:
    """Rounds of looking at a slice: ever rarer while nothing changes, and up to a deadline."""

    def __init__(
        self, name: str, api: TpuApi, minutes: float, error: type[OSError], limit: str
    ) -> None:
        self._name, self._clock, self._sleep = name, api.clock, api.sleep
        self._minutes, self._error, self._limit = minutes, error, limit
        self._began = self._said = self._clock()
        self._state, self._pause = "", 0.0

    def pause(self, state: str) -> None:
        """Log what is new, or each minute that nothing is, and sleep."""
        now = self._clock()
        waited = (now - self._began) / 60
        if state != self._state:
            logger.info("TPU %s: %s", self._name, state)
            self._state, self._said, self._pause = state, now, 1.0
        elif waited >= self._minutes:
            raise self._error(
                f"TPU {self._name} is still {state} after {waited:.0f} min ({self._limit})"
            )
        elif now - self._said >= 60:
            logger.info("TPU %s: %s, after %.0f min", self._name, state, waited)
            self._said = now
        self._sleep(self._pause)
        self._pause = min(1.5 * self._pause, 15.0)
