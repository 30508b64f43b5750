"""The hosts of TPU slices that a run creates, as places for host processes.

    with SlicePod(["my-tpu"], "europe-west4-a", config, spot=True) as pod:
        pod.nodes(seconds)  # creates, adopts or replaces the slices, and waits until all hosts join

The driver is the head of a Ray cluster of its own. It serves the slices' hosts this very library
and, until all have joined, Ray's token; their start-up script does the rest (`pod.startup`). So a
slice that was preempted is replaced by asking for nodes again, and a driver that starts again asks
for the same names and gets the slices that it had.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Self

from mesh_transformer import buckets, rules, storage
from mesh_transformer.config import Config
from mesh_transformer.errors import UserError
from mesh_transformer.pod.machines import Machine, Node, RayCluster
from mesh_transformer.pod.startup import BUILD, FileServer, Startup, build_wheel
from mesh_transformer.pod.tpu_api import LOCAL, NoCapacity, connect
from mesh_transformer.pod.tpu_vm import Slice, TpuVm, list_vms
from mesh_transformer.session import SessionLost

_SECONDS_BETWEEN_LOOKS = 10.0  # at the state of slices whose hosts are waited for
_SECONDS_OF_PREDECESSOR = 30.0
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 120.0  # seconds, before capacity is asked for again

_logger = logging.getLogger(__name__)


class SlicePod:
    """Hosts of TPU slices, in a `with` block that ends with a list of the slices there are.

    Args:
        names: Of the slices, in their order in the mesh; each is so many replicas more.
        zone: Where they are.
        config: The run, whose keys `tpu_...` say what the slices are.
        spot: Whether they may be preempted.
        delete_on_exit: Whether to delete them at the end of the block, however it ends.
        also_read: Path or URL that the hosts read besides `model_dir`.

    Attributes:
        n_devices: That JAX will see on all of them, where the configuration tells.

    Raises:
        UserError: The slices and the run do not fit together.
    """

    def __init__(
        self,
        names: Sequence[str],
        zone: str,
        config: Config,
        *,
        spot: bool = False,
        delete_on_exit: bool = False,
        also_read: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._zone, self._config, self._delete = zone, config.pod, delete_on_exit
        self._clock, self._sleep = clock, sleep
        _check_names(names, config)
        if also_read and zone != LOCAL and not storage.is_remote(also_read):
            raise UserError(
                f"--tune-model-path {also_read} is a folder of this machine, which TPU VMs do not "
                "see; copy it to a bucket"
            )
        kind = config.pod.tpu_type
        self.n_devices: int | None = None
        if kind is not None:
            self.n_devices = len(names) * rules.devices_of(kind)
        self._api = connect(zone, config.pod.tpu_project, clock=clock, sleep=sleep)
        self._vms = [TpuVm(name, zone, config.pod, spot=spot, api=self._api) for name in names]
        schemes = {path.partition("://")[0] for path in (config.checkpoint.root, also_read or "")}
        self._extras = ("tpu", "pods", *(e for s, e in buckets.EXTRAS.items() if s in schemes))
        self._absent: set[str] = set()  # slices that are ready but whose hosts do not come
        self._left = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Ask whether the slices can be had, and wait for hosts to join from now on.

        Raises:
            UserError: They cannot be had; nothing was created.
        """
        for vm in self._vms:
            vm.check()
            self._await_predecessor(vm)
        secret = self._config.tpu_token_secret
        here = self._config.tpu_driver_address or self._api.own_address()
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            token = self._api.secret(secret) if secret else None
            self._ray = stack.enter_context(RayCluster(here=here, token=token))
            # Read in any case, which refuses an environment that has turned tokens off.
            served = "" if self._ray.token == token else self._ray.token
            self._files = stack.enter_context(FileServer(build_wheel(folder), served, host=here))
            for vm in self._vms:
                startup = self._startup(vm.name)
                vm.startup_script, self._build = startup.script(), startup.build
            self._left = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as last:
            last.callback(self._tell_what_there_is)
            if self._delete:
                last.callback(self._delete_all)
            self._left.close()

    def nodes(self, seconds: int) -> Sequence[Node]:
        """Create or adopt the slices, wait until all of their hosts have joined, and give places.

        Args:
            seconds: How long to wait for hosts of slices that are ready: `pod_start_seconds`.

        Raises:
            SessionLost: A slice cannot be had now, or its hosts do not come. Later it is worth
                another try, for which hosts that did not come are replaced.
            UserError: A slice cannot be had at all.
        """
        try:
            slices = [self._ensured(vm) for vm in self._vms]
            self._files.admit(address for found in slices for address in found.addresses)
            nodes = [machine.places(1)[0] for machine in self._joined(slices, seconds)]
        except OSError as error:
            raise SessionLost(f"TPU slices cannot be had now: {error}") from error
        finally:
            self._files.admit(())  # whoever has these addresses later is somebody else
        without = [node.address for node in nodes if not node.resources.get("TPU")]
        if without and self._zone != LOCAL:
            raise UserError(
                f"Ray finds no TPU on {', '.join(without)}; tpu_runtime "
                f"{self._config.tpu_runtime!r} may not suit tpu_type {self._config.tpu_type!r}"
            )
        return nodes

    def _await_predecessor(self, vm: TpuVm) -> None:
        """Let the driver that had a slice before be gone; its Ray may take a while to end.

        Raises:
            UserError: It is not: two would take the hosts from each other.
        """
        found = vm.state()
        head = Startup.head_in(found.script) if found else ""
        end = self._clock() + _SECONDS_OF_PREDECESSOR
        while _answers(head):
            if self._clock() > end:
                raise UserError(
                    f"--tpu {vm.name} belongs to a driver that is running, whose Ray answers at "
                    f"{head}: end that one, or choose another name"
                )
            self._sleep(1.0)

    def _startup(self, name: str) -> Startup:
        return Startup(
            slice_name=name,
            head=self._ray.address,
            wheel=self._files.wheel,
            wheel_url=self._files.url("wheel"),
            token_url="" if self._config.tpu_token_secret else self._files.url("token"),
            token_secret=self._config.tpu_token_secret or "",
            extras=self._extras,
        )

    def _ensured(self, vm: TpuVm) -> Slice:
        """Wait for a slice, and ask for it again and again for `tpu_wait_minutes` if refused."""
        end, pause = self._clock() + 60 * self._config.tpu_wait_minutes, _FIRST_PAUSE
        while True:
            try:
                if vm.name in self._absent:
                    _logger.warning("TPU %s: its hosts did not join; replacing it", vm.name)
                    self._absent.discard(vm.name)
                    return vm.replace()
                return vm.ensure()
            except NoCapacity as error:
                if self._clock() + pause > end:
                    raise
                _logger.warning("%s; asking again in %.0f s", error, pause)
            self._sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _joined(self, slices: Sequence[Slice], seconds: int) -> list[Machine]:
        """Wait until every host is there once, and give them in order.

        A host that left is listed beside its successor for some seconds, until Ray knows.
        """
        wanted = [(found.name, i) for found in slices for i in range(len(found.addresses))]
        end, looked, told = self._clock() + seconds, self._clock(), -1
        while True:
            machines = [m for m in self._ray.machines() if m.labels.get(BUILD) == self._build]
            there = [(machine.slice_name, machine.worker) for machine in machines]
            if sorted(there) == sorted(wanted):
                return [machines[there.index(place)] for place in wanted]
            missing = [place for place in wanted if place not in there]
            if told != (told := len(wanted) - len(missing)):
                _logger.info("%d of %d host(s) have joined", told, len(wanted))
            now = self._clock()
            if now > end:
                self._absent |= {name for name, _ in missing}
                raise SessionLost(_not_joined(missing, seconds))
            if now - looked > _SECONDS_BETWEEN_LOOKS:
                looked = now
                self._check_states()
            self._sleep(0.5)

    def _check_states(self) -> None:
        for vm in self._vms:
            found = vm.state()
            if found is None or not found.ready:
                raise SessionLost(f"TPU {vm.name} is {found or 'gone'} before all its hosts joined")

    def _delete_all(self) -> None:
        """Delete the slices, each whatever becomes of the others; what fails is listed after."""
        for vm in self._vms:
            try:
                vm.delete()
                _logger.info("TPU %s is deleted", vm.name)
            except (OSError, UserError) as error:
                _logger.warning("TPU %s is not deleted: %s", vm.name, error)

    def _tell_what_there_is(self) -> None:
        """List the slices that cost money, those of other runs too."""
        try:
            there = list_vms(self._zone, api=self._api)
        except (OSError, UserError) as error:
            names = ", ".join(vm.name for vm in self._vms)
            _logger.warning("whether TPUs are left (this run's: %s) is not known: %s", names, error)
            return
        for found in there:
            kind, force = ("queued-resources", " --force") if found.queued else ("tpu-vm", "")
            _logger.warning(
                "TPU %s (%s) is there still: %s. To delete it: gcloud compute tpus %s delete %s "
                "--zone %s%s",
                *(found.name, found.tpu_type, found, kind, found.name, self._zone, force),
            )
        if not there:
            _logger.info("no TPU that was created by this library is left in %s", self._zone)


def _check_names(names: Sequence[str], config: Config) -> None:
    """Refuse slices that together are not the devices of the run.

    Raises:
        UserError: They are not, or one is named twice.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"--tpu names {', '.join(twice)} more than once; each is one slice")
    kind, wanted = config.pod.tpu_type, config.mesh.tpu_size
    if kind is None or wanted is None:
        return
    there = len(names) * rules.devices_of(kind)
    if there != wanted:
        raise UserError(
            f"tpu_size is {wanted}, but --tpu names {len(names)} slice(s) of {kind}, {there} "
            f"devices in all: name {wanted / rules.devices_of(kind):g} slice(s), or change "
            "tpu_type or tpu_size"
        )


def _answers(address: str) -> bool:
    """Whether anything listens at host:port."""
    host, _, port = address.rpartition(":")
    if not host:
        return False
    try:
        socket.create_connection((host, int(port)), timeout=2.0).close()
    except OSError:
        return False
    return True


def _not_joined(missing: Sequence[tuple[str, int]], seconds: int) -> str:
    hosts = ", ".join(f"host {worker} of TPU {name}" for name, worker in missing)
    return (
        f"{hosts} did not join within {seconds} s (pod_start_seconds) after the slice was ready; "
        "what it does is in ~/.mesh-transformer/startup.log there. It must reach this machine by "
        "the network, and the internet or a mirror for packages"
    )
