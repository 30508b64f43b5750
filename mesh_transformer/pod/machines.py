"""The machines of a Ray cluster, and the places on them for host processes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import pathlib
import secrets
import signal
import socket
import sys
import tempfile
import time
import types
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Self

import ray
import ray.exceptions

from mesh_transformer.errors import UserError
from mesh_transformer.session import SessionLost

LOOPBACK = "127.0.0.1"
_TOKEN, _TOKEN_PATH, _MODE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"

# A machine that does not answer for about five seconds is lost (by Ray's own settings, fifteen);
# without this machine's part of Ray, everything ends after ten (sixty). And Ray is to take little
# of the cores that compute: by itself it reports resources ten times a second, and puts hosts (its
# workers) behind every other process.
_SETTINGS = {
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
    "gcs_rpc_server_reconnect_timeout_s": 10,
    "worker_niceness": 0,
    "raylet_report_resources_period_milliseconds": 1000,
    "enable_metrics_collection": False,
    "event_stats": False,
}

_SECONDS_TO_ANSWER = 10
_WHERE_RAY_TELLS = (
    "Ray did not start. What its processes said is in session_latest/logs of its folder, /tmp/ray "
    "unless RAY_TMPDIR is set; if they were slow or out of memory, run the same command again"
)

_logger = logging.getLogger(__name__)


class Node(NamedTuple):
    """A place for one host process.

    Attributes:
        id: Ray's id of the machine.
        address: Its IP address.
        resources: What the process takes of Ray's resources there: TPU, GPU.
        slice_name: Of the TPU slice that the machine belongs to, or "".
    """

    id: str
    address: str
    resources: Mapping[str, float]
    slice_name: str = ""


class Machine(NamedTuple):
    """A machine of a Ray cluster that is alive.

    Attributes:
        resources: By Ray's names: TPU, GPU, CPU.
        labels: By Ray's names, and by those that start-up scripts give.
    """

    id: str
    address: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    @property
    def slice_name(self) -> str:
        """Name of its TPU slice, by the label of start-up scripts or Ray's own; "" without one."""
        return self.labels.get("mesh-slice") or self.labels.get("ray.io/tpu-slice-name") or ""

    @property
    def worker(self) -> int:
        """Its number in the slice."""
        return int(self.labels.get("mesh-worker") or self.labels.get("ray.io/tpu-worker-id") or "0")

    @property
    def accelerators(self) -> dict[str, float]:
        """How many it has, by kind: TPU, GPU."""
        return {kind: n for kind in ("TPU", "GPU") if (n := self.resources.get(kind, 0))}

    def places(self, n_hosts: int) -> list[Node]:
        """Divide its accelerators among host processes.

        Raises:
            UserError: They cannot be shared alike.
        """
        for kind, n in self.accelerators.items():
            if n % n_hosts:
                raise UserError(
                    f"{self.address} has {n:.0f} {kind}s, which {n_hosts} hosts cannot share "
                    "alike: ask for another number of hosts"
                )
        shares = {kind: n / n_hosts for kind, n in self.accelerators.items()}
        return [Node(self.id, self.address, shares, self.slice_name)] * n_hosts


class RayCluster:
    """A Ray cluster that this process is connected to, in a `with` block.

    Args:
        address: Of one that is running. Left out: one of this process's own begins, whose head
            is this machine and which ends with the block.
        here: IP address at which the others reach this machine, if it is the head. Ray listens on
            all addresses of a machine, whatever this one is; the token is what keeps others out.
        token: What Ray asks of whoever connects to a cluster of our own. Left out: what the
            environment names, or one that is made up.
    """

    def __init__(
        self, address: str | None = None, *, here: str = LOOPBACK, token: str | None = None
    ) -> None:
        self._address, self._here, self._token = address, here, token

    def __enter__(self) -> Self:
        """Connect.

        Raises:
            UserError: The cluster at the given address cannot be joined.
        """
        self._on_sigterm = signal.getsignal(signal.SIGTERM)
        with contextlib.ExitStack() as undone:
            undone.callback(self.__exit__)
            if self._address is None:
                self._start()
            else:
                self._join(self._address)
            undone.pop_all()
        signal.signal(signal.SIGTERM, _end)  # Ray's own handler exits with another status
        return self

    def _start(self) -> None:
        _keep_token(self._token)
        # Ray would show all that libtpu logs, thousands of lines: it is to look where nothing is.
        # That is not the folder of the token, since Ray reads the files that it finds.
        empty = _private_folder() / "empty"
        empty.mkdir(exist_ok=True)
        os.environ["TPU_LOG_DIR"] = str(empty)
        try:
            ray.init(
                address="local",
                _node_ip_address=self._here,
                _system_config=_SETTINGS,
                num_cpus=0,  # no workers are kept for tasks, of which there are none
                include_dashboard=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:
            error.add_note(_WHERE_RAY_TELLS)
            raise

    def _join(self, address: str) -> None:
        try:
            if address != "auto":
                socket.create_connection(_host_and_port(address), _SECONDS_TO_ANSWER).close()
            with _one_try():
                ray.init(address=address, logging_level=logging.ERROR)
        except (ValueError, OSError, ray.exceptions.RayError) as error:
            raise UserError(
                f"cannot join the Ray cluster {address}: {error}; --address is host:port as `ray "
                "start --head` printed it on the first machine, and this machine has to be part of "
                "that cluster and have its token"
            ) from error

    def __exit__(self, *_: object) -> None:
        ray.shutdown()
        signal.signal(signal.SIGTERM, self._on_sigterm)

    @property
    def address(self) -> str:
        """IP address and port at which other machines join."""
        port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
        return f"{self._here}:{port}"

    @property
    def token(self) -> str:
        """What others need to connect to a cluster of our own; who has it can run programs there.

        Raises:
            UserError: The environment has turned it off.
        """
        mode = os.environ.get(_MODE, "")
        if mode.lower() != "token":
            raise UserError(f"{_MODE} is {mode!r}, but other machines join with a token; unset it")
        given = os.environ.get(_TOKEN)
        return given or pathlib.Path(os.environ[_TOKEN_PATH]).read_text().strip()

    def machines(self) -> list[Machine]:
        """List the machines that are there, as their slices number them."""
        found = [
            Machine(
                node["NodeID"],
                node["NodeManagerAddress"],
                node["Resources"],
                node.get("Labels", {}),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]
        return sorted(found, key=lambda m: (m.slice_name, m.worker, m.address, m.id))


class Pod:
    """The machines of a Ray cluster, as places for host processes; to be used in a `with` block.

    Args:
        n_local: So many host processes on this machine, in a Ray cluster of its own.
        address: Or of a running Ray cluster, each machine of which takes one host.
    """

    n_devices: int | None = None  # nobody knows before hosts are there

    def __init__(self, *, n_local: int | None = None, address: str | None = None) -> None:
        self._n_local = n_local
        self._cluster = RayCluster(address)
        self._n_machines = 0

    def __enter__(self) -> Self:
        """Connect to the cluster, or begin it.

        Raises:
            UserError: The cluster at the given address cannot be joined.
        """
        self._cluster.__enter__()
        self._n_machines = len(self._machines())
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.__exit__()

    def _machines(self) -> list[Machine]:
        """List the machines that take hosts: not a head without accelerators beside others."""
        found = self._cluster.machines()
        return [machine for machine in found if machine.accelerators] or found

    def nodes(self, seconds: int) -> Sequence[Node]:
        """Give the places for hosts, in the order of hosts, once all machines are there (again).

        Args:
            seconds: How long to wait for machines: `pod_start_seconds`.

        Raises:
            SessionLost: Machines are missing, and did not come back in time.
            UserError: A machine's accelerators cannot be shared as asked, or this machine's own
                part of Ray has ended.
        """
        if self._n_local is not None:
            alive = self._cluster.machines()
            if not alive:  # most often Ray ends this process before
                raise UserError(
                    "Ray has ended on this machine, killed or out of memory (dmesg knows): the "
                    "same command goes on from the last checkpoint"
                )
            (machine,) = alive
            if os.environ.get("JAX_PLATFORMS") == "cpu":  # then nothing else is wanted
                machine = machine._replace(resources={})
            return machine.places(self._n_local)
        end, told = time.monotonic() + seconds, 0
        while len(machines := self._machines()) < self._n_machines:
            if time.monotonic() > end:
                raise SessionLost(
                    f"{len(machines)} of {self._n_machines} machines are there after "
                    f"{seconds} s; pod_start_seconds says how long to wait for the others"
                )
            if told != (told := len(machines)):
                _logger.info("waiting for machines: %d of %d", told, self._n_machines)
            time.sleep(1.0)
        # One more than there were would change the run; it is left aside.
        return [machine.places(1)[0] for machine in machines[: self._n_machines]]


def _end(number: int, _: types.FrameType | None) -> None:
    """End as a process does that a signal kills, but leave `with` blocks first."""
    sys.exit(128 + number)


def _host_and_port(address: str) -> tuple[str, int]:
    """Take an address apart; ValueError if it is none."""
    place = urllib.parse.urlsplit(f"//{address}")
    if not place.hostname or not place.port:
        raise ValueError("a host or a port is missing")
    return place.hostname, place.port


@contextlib.contextmanager
def _one_try() -> Iterator[None]:
    """Let Ray try once to reach a head, for 40 seconds; it would 20 times, and tell nobody."""
    name = "RAY_gcs_server_port_wait_time_s"
    before = os.environ.get(name)
    os.environ[name] = before or "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _keep_token(token: str | None) -> None:
    """Let Ray find a token in a file of this user's, since its own is one that all can read."""
    if token is None and (os.environ.get(_TOKEN) or os.environ.get(_TOKEN_PATH)):
        return
    os.environ.pop(_TOKEN, None)
    path = _private_folder() / "token"
    path.touch(mode=0o600)
    path.write_text(token or path.read_text() or secrets.token_hex(32))
    os.environ[_TOKEN_PATH] = str(path)


@functools.cache
def _private_folder() -> pathlib.Path:
    """Make a folder that only this user can look into, and that goes when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="mesh-transformer-")
    atexit.register(folder.cleanup)
    return pathlib.Path(folder.name)
