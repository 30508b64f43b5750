"""A pod: the session protocol over one Ray actor per host, all of them in one JAX program.

    with Pod(n_local=2) as pod, Cluster(config, pod.nodes(1800)) as session:
        session.train(tokens_ABT1)

Ray carries token ids and scalars; arrays stay on the devices. Every host gets the whole batch, and
its devices take what the mesh gives them: which host holds which sequences is nobody's guess.
Every wait has a deadline. Whatever happens to one host ends them all, as the devices of one program
cannot go on without each other: `SessionLost` says which host it was, and a new `Cluster` goes on
from the last checkpoint.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.tpu import get_tpu_coordinator_env_vars

from mesh_transformer import __version__, storage
from mesh_transformer.config import Config
from mesh_transformer.errors import InUse, UserError
from mesh_transformer.pod.host import Devices, Host, HostInfo, appears
from mesh_transformer.pod.machines import Node
from mesh_transformer.session import (
    Evaluation,
    Generation,
    Metrics,
    Position,
    Restored,
    Sampling,
    SessionLost,
)

# In which a host that died is noticed, after those that wait for it have failed.
_SECONDS_TO_BLAME = 8.0
# Calls that write to storage, which may fail for a while; whatever that says, it is tried again.
_MAY_PASS = ("save", "close")
# In which a file that one machine has written shows on the others; NFS may look once a minute.
_SECONDS_TO_BE_SEEN = 60.0

# Where libtpu writes by itself. Ray is started with another folder, or it would show all of that.
_LOGS = {"TPU_LOG_DIR": "/tmp/tpu_logs"}

_logger = logging.getLogger(__name__)


_Shape = tuple[tuple[int, ...], bool]
"""What a step is compiled for: the shape of its tokens, and whether it has a mask."""


class _Deadline(NamedTuple):
    """How long an answer may take, and the configuration key that says so."""

    key: str
    seconds: int


class Cluster:
    """A session on all hosts of a pod; the devices of all of them make one mesh."""

    def __init__(self, config: Config, nodes: Sequence[Node]) -> None:
        """Start a host on each node, in this order, and let them join.

        Raises:
            SessionLost: A host did not come up, or was lost.
            UserError: The configuration does not fit the devices, versions differ, or `model_dir`
                is a folder that the hosts do not share.
        """
        pod = config.pod
        self._starting = _Deadline("pod_start_seconds", pod.pod_start_seconds)
        self._stepping = _Deadline("pod_step_seconds", pod.pod_step_seconds)
        self._compiled: set[_Shape] = set()
        self._answered = time.monotonic()  # when all hosts were known to live
        self._hosts: list[Any] = []
        self._names = [node.address for node in nodes]
        self._steps: collections.deque[_Step] = collections.deque()
        with contextlib.ExitStack() as undone:
            undone.callback(self.kill)
            self._hosts = [_actor(node) for node in nodes]
            infos: list[HostInfo] = self._all("info")
            self._names = [info.name for info in infos]
            _check_versions(infos)
            self._check_shared(config.checkpoint.root)
            joined: list[Devices] = self._wait(
                "join",
                [
                    host.join.remote(
                        config.to_flat(),
                        coordinator=infos[0].address,
                        n_hosts=len(nodes),
                        index=index,
                        seconds=pod.pod_start_seconds,
                        heartbeat_seconds=pod.pod_heartbeat_seconds,
                        environment=_LOGS | _between_slices(nodes, index),
                    )
                    for index, host in enumerate(self._hosts)
                ],
                self._starting,
            )
            undone.pop_all()
        self.devices = joined[0]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.kill()

    @property
    def n_alive(self) -> int:
        """Hosts that are alive: all of them, until one is found to be lost, which ends them all."""
        return len(self._hosts)

    def train(self, tokens_ABT1: np.ndarray, mask_ABT: np.ndarray | None = None) -> Metrics:
        """Send the tokens of one optimizer step; the metrics are waited for when looked at.

        Raises:
            SessionLost: A host was lost or took too long over this or an earlier step.
        """
        shape = tokens_ABT1.shape, mask_ABT is not None
        if self._steps and shape not in {self._steps[-1].shape, *self._compiled}:
            self.settle(self._steps[-1])  # or its metrics would wait until this one is compiled
        tokens, mask = ray.put(tokens_ABT1), None if mask_ABT is None else ray.put(mask_ABT)
        refs = [host.train.remote(tokens, mask) for host in self._hosts]
        step = _Step(self, shape)
        if self._steps:
            self._steps[-1].refs = refs
        else:
            step.begun = refs
        self._steps.append(step)
        return step

    def evaluate(self, tokens_BT1: np.ndarray, mask_BT: np.ndarray | None = None) -> Evaluation:
        """Score the given tokens with the current weights; any number of sequences."""
        evaluation: Evaluation = self._all("evaluate", ray.put(tokens_BT1), mask_BT)[0]
        return evaluation

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int
    ) -> Generation:
        """Continue each prompt by up to `max_new_tokens` tokens."""
        generation: Generation = self._all("generate", prompts, sampling, max_new_tokens)[0]
        return generation

    def save(self, step: int, position: Position) -> None:
        """Begin to write a checkpoint; it counts once it is complete on disk."""
        self._all("save", step, dict(position))

    def restore(self, step: int | None = None) -> Restored | None:
        """Load the newest (or the given) complete checkpoint; None if there is none yet."""
        restored: Restored | None = self._all("restore", step)[0]
        return restored

    def latest(self) -> int | None:
        """Give the step of the newest complete checkpoint; None if there is none."""
        latest: int | None = self._all("latest")[0]
        return latest

    def tune_from(self, path: str, *, fresh_opt: bool) -> None:
        """Take the weights of another run, to train on from step 0."""
        self._all("tune_from", path, fresh_opt)

    def clear(self) -> None:
        """Give up every checkpoint, so that training can start over."""
        self._all("clear")

    def close(self) -> None:
        """Wait for a save under way, and let the hosts part in peace."""
        self._all("close")

    def kill(self) -> None:
        """End all hosts at once, whatever they are doing."""
        end(self._hosts)
        self._hosts = []

    def settle(self, step: _Step) -> None:
        """Fetch the metrics of steps, in order, up to the given one."""
        while self._steps:
            first = self._steps[0]
            if not first.refs:
                first.refs = [host.settle.remote() for host in self._hosts]
            deadline = self._stepping if first.shape in self._compiled else self._starting
            if first.begun:
                self._wait("train", first.begun, deadline)
            first.numbers = self._wait("train", first.refs, deadline)[0]
            self._compiled.add(first.shape)
            self._steps.popleft()
            if first is step:
                return

    def _check_shared(self, root: str) -> None:
        """Refuse a local folder that is not the same for all hosts, each of which writes its part.

        A path does not tell, so the first host writes a file and the others look for it.

        Raises:
            UserError: Some do not see it, or it cannot be written.
        """
        if storage.is_remote(root):
            return
        marker = storage.join(root, f".do_all_hosts_see_this.{uuid.uuid4().hex}")
        first = self._hosts[0]
        self._wait("mark", [first.mark.remote(marker)], self._starting)
        seen = self._all("sees", marker, _SECONDS_TO_BE_SEEN)
        blind = [name for name, sees in zip(self._names, seen, strict=True) if not sees]
        alone = not blind and not appears(marker, _SECONDS_TO_BE_SEEN)
        self._wait("unmark", [first.unmark.remote(marker)], self._starting)
        if blind:
            raise UserError(
                f"model_dir {root} is not one folder for all hosts: what {self._names[0]} writes "
                f"there is not seen by {', '.join(blind)}, so that no checkpoint would be whole; "
                "set it to the whole path of a folder that all machines share, or to a gs:// URL"
            )
        if alone:
            raise UserError(
                f"model_dir {root} is another folder here than on {self._names[0]}, where "
                "checkpoints would go and may be lost with the machine; set it to a folder that "
                "all machines share, or to a gs:// URL"
            )

    def _all(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every host, and wait for all of them."""
        if self._steps:
            self.settle(self._steps[-1])
        refs = [getattr(host, method).remote(*args) for host in self._hosts]
        return self._wait(method, refs, self._starting)

    def _wait(self, method: str, refs: Sequence[Any], deadline: _Deadline) -> list[Any]:
        """Return what every host answers; the first that fails ends the wait.

        Raises:
            SessionLost: A host is gone, raised what may pass, or has not answered in time.
            UserError: What a host raised is the user's to mend.
        """
        end, pending = time.monotonic() + deadline.seconds, list(refs)
        while pending:
            ready, pending = ray.wait(pending, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                late = ", ".join(self._names[refs.index(ref)] for ref in pending)
                raise SessionLost(
                    f"no answer to {method} after {deadline.seconds} s from {late}: it hangs, or "
                    f"{deadline.key} must be raised"
                )
            if _error(ready[0]):
                raise self._failure(method, refs)
        answers = [ray.get(ref) for ref in refs]
        self._answered = time.monotonic()
        return answers

    def _failure(self, method: str, refs: Sequence[Any]) -> Exception:
        """Return what to raise once an answer is an error: of several, the one that tells most.

        A host that is gone makes those that wait for it fail too, perhaps before anyone notices,
        and it may have answered this call. So all are asked whether they live: if one does not,
        what the others raise is no fault of the user's, whatever it says. Nor is it while a host
        of the attempt before, which is about to end, holds the devices or the folder.
        """
        asked = [*refs, *(host.info.remote() for host in self._hosts)]
        names = [*self._names[: len(refs)], *self._names]
        ready, _ = ray.wait(asked, num_returns=len(asked), timeout=_SECONDS_TO_BLAME)
        errors = [(names[asked.index(ref)], error) for ref in ready if (error := _error(ref))]
        lost = {
            name: f"{name} was lost during {method}: {_told(error)}"
            for name, error in errors
            if not isinstance(error, ray.exceptions.RayTaskError)
        }
        causes = [getattr(error, "cause", None) for _, error in errors]
        if not lost and method not in _MAY_PASS and not any(isinstance(c, InUse) for c in causes):
            for cause in causes:
                if isinstance(cause, UserError):
                    return cause
        raised = [f"{method} failed on {name}:\n{error}" for name, error in errors]
        silence = f"noticed {time.monotonic() - self._answered:.1f} s after all hosts had answered"
        return SessionLost("\n".join([*(lost.values() or raised[:1]), silence]))


def end(hosts: Sequence[Any]) -> None:
    """Kill actors, and wait until Ray has taken note of it.

    A handle that is given up before then may overtake the order to kill, and Ray would let the host
    end by itself: one that waits for lost ones as it parts would hold its devices and the folder
    for half a minute more.
    """
    for host in hosts:
        ray.kill(host, no_restart=True)
    deadline = time.monotonic() + _SECONDS_TO_BLAME
    for host in hosts:
        while time.monotonic() < deadline and _answers(host, deadline):
            time.sleep(0.01)


def _answers(host: Any, deadline: float) -> bool:
    """Whether a host that is not known to be gone gives an answer in time."""
    asked = [host.info.remote()]
    ready, _ = ray.wait(asked, timeout=max(0.0, deadline - time.monotonic()))
    return bool(ready) and not _error(asked[0])


def _told(error: ray.exceptions.RayError) -> str:
    """Say why a host is gone: all there is if it never came up, since that is a traceback."""
    text = str(error).strip()
    never_up = isinstance(error, ray.exceptions.ActorDiedError) and error.actor_init_failed
    return text if never_up else text.splitlines()[0]


class _Step(Mapping[str, float]):
    """The metrics of a step; asking for one waits for it."""

    def __init__(self, cluster: Cluster, shape: _Shape) -> None:
        self._cluster = cluster
        self.shape = shape
        self.begun: list[Any] = []  # answers that say nothing yet, but may fail
        self.refs: list[Any] = []  # answers that hold this step's metrics
        self.numbers: dict[str, float] | None = None

    def _settled(self) -> dict[str, float]:
        if self.numbers is None:
            self._cluster.settle(self)
            assert self.numbers is not None
        return self.numbers

    def __getitem__(self, name: str) -> float:
        return self._settled()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settled())

    def __len__(self) -> int:
        return len(self._settled())


def _actor(node: Node) -> Any:
    """Start a host on a node: never restarted, as a host alone is of no use."""
    environment = {} if node.resources else {"JAX_PLATFORMS": "cpu"}
    resources = dict(node.resources)
    return (
        ray.remote(Host)
        .options(
            num_cpus=0,
            num_gpus=resources.pop("GPU", 0),
            resources=resources,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": environment},
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        )
        .remote(node.address)
    )


def _between_slices(nodes: Sequence[Node], index: int) -> dict[str, str]:
    """The variables by which libtpu finds the other slices, for a host of one of several.

    Those of an attempt before must never be used again: its coordinator is gone.
    """
    names = list(dict.fromkeys(node.slice_name for node in nodes))
    if len(names) == 1 or not nodes[index].resources.get("TPU"):
        return {}
    return get_tpu_coordinator_env_vars(
        nodes[0].address, len(names), names.index(nodes[index].slice_name)
    )


def _check_versions(infos: Sequence[HostInfo]) -> None:
    problems = [
        f"{info.name} has mesh_transformer {info.version}"
        for info in infos
        if info.version != __version__
    ]
    if problems:
        raise UserError(
            f"this driver has mesh_transformer {__version__}, but {'; '.join(problems)}: install "
            "the driver's version there"
        )


def _error(ref: Any) -> ray.exceptions.RayError | None:
    """Return the error that an answer is, if it is one."""
    try:
        ray.get(ref)
    except ray.exceptions.RayError as error:
        return error
    return None
