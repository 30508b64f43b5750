"""The network of local TPU VMs: each in a namespace of its own, or all at the loopback address."""

from __future__ import annotations

import itertools
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile

LOOPBACK = "127.0.0.1"


class Place:
    """Where a VM is that shares the network of this machine.

    Attributes:
        address: Its IP address.
        command: What to put before a command that is to run there.
    """

    def __init__(self, address: str = LOOPBACK, command: tuple[str, ...] = ()) -> None:
        self.address, self.command = address, command

    def cut(self) -> None:
        """Take its cable away."""

    def remove(self) -> None:
        """Take it away."""


class Network:
    """The network of this machine, which all VMs share."""

    gateway = LOOPBACK

    def place(self, name: str) -> Place:
        return Place()

    def close(self) -> None:
        """Take it away."""


class Namespaces(Network):
    """A network of its own on a bridge, and a namespace with a host name for each VM."""

    def __init__(self) -> None:
        number = os.getpid() % 60_000
        self._bridge = f"mt{number}"
        self._prefix = f"10.{100 + number // 250 % 100}.{number % 250}"
        self.gateway = f"{self._prefix}.1"
        self._numbers = itertools.count(2)
        self._folder = tempfile.TemporaryDirectory()
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "address", "add", f"{self.gateway}/24", "dev", self._bridge)
        _run("ip", "link", "set", self._bridge, "up")

    @staticmethod
    def refused() -> str:
        """Say why this machine cannot have one, or nothing."""
        if sys.platform != "linux":
            return "network namespaces are Linux's"
        try:
            _run("ip", "netns", "add", "mt-probe")
            _run("ip", "netns", "exec", "mt-probe", "unshare", "--uts", "--mount", "true")
            _run("ip", "netns", "delete", "mt-probe")
        except (OSError, subprocess.CalledProcessError) as error:
            return f"network namespaces cannot be made here: {error}"
        return ""

    def place(self, name: str) -> Place:
        return _Namespace(self._bridge, self._prefix, next(self._numbers), name, self._folder.name)

    def close(self) -> None:
        _run("ip", "link", "delete", self._bridge)
        self._folder.cleanup()


class _Namespace(Place):
    def __init__(self, bridge: str, prefix: str, number: int, host: str, folder: str) -> None:
        self._name, self._cable = f"{bridge}n{number}", f"{bridge}c{number}"
        address = f"{prefix}.{number}"
        hosts = pathlib.Path(folder) / self._name
        hosts.write_text(f"127.0.0.1 localhost\n{address} {host}\n")
        inside = ("ip", "-n", self._name)
        _run("ip", "netns", "add", self._name)
        _run("ip", "link", "add", self._cable, "type", "veth",
             "peer", "name", "eth0", "netns", self._name)  # fmt: skip
        _run("ip", "link", "set", self._cable, "master", bridge, "up")
        _run(*inside, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run(*inside, "link", "set", device, "up")
        _run(*inside, "route", "add", "default", "via", f"{prefix}.1")
        named = (
            f"hostname {shlex.quote(host)} && mount --bind {shlex.quote(str(hosts))} /etc/hosts "
            '&& exec "$@"'
        )
        enter = ("ip", "netns", "exec", self._name, "unshare", "--uts", "--mount")
        super().__init__(address, (*enter, "sh", "-c", named, "sh"))

    def cut(self) -> None:
        _run("ip", "link", "delete", self._cable)

    def remove(self) -> None:
        _run("ip", "netns", "delete", self._name)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)
