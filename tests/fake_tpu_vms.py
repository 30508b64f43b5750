"""TPU VMs that are local processes: each runs its start-up script and has its metadata server.

A VM has a home folder, a worker number and a session of processes, all of which die at once when
the VM is preempted or deleted. Its Python comes with the packages of the tests' own environment, as
an image would, so that installing the library into an environment of its own downloads nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Mapping

from fake_network import Network, Place

# Environments that it makes know the image's packages, pip among them, which makes this quick.
PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
    "{real}" -m venv --without-pip "$3" &&
        echo "{packages}" >"$3/lib/{name}/site-packages/image.pth"
else
    exec "{real}" "$@"
fi
"""


class _Metadata(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: str, attributes: dict[str, str]) -> None:
        super().__init__((address, 0), _MetadataHandler)
        self.attributes = attributes


class _MetadataHandler(http.server.BaseHTTPRequestHandler):
    server: _Metadata

    def do_GET(self) -> None:
        name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
        known = self.headers["Metadata-Flavor"] == "Google" and name in self.server.attributes
        content = self.server.attributes[name].encode() if known else b"not found"
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@dataclasses.dataclass
class Vm:
    """One host.

    Attributes:
        temporary: Its /tmp, with a short name since paths of Unix sockets are short.
        process: Runs the start-up script; leads a session, which holds all that the script starts.
        place: In the network.
    """

    home: pathlib.Path
    temporary: str
    process: subprocess.Popen[bytes]
    metadata: _Metadata
    place: Place

    @property
    def log(self) -> str:
        path = self.home / ".mesh-transformer" / "startup.log"
        return path.read_text() if path.exists() else ""

    def kill(self) -> None:
        """End every process of this VM, without notice, not even to whom it is connected with."""
        self.place.cut()
        kill_session(self.process)
        shutil.rmtree(self.temporary)
        self.metadata.shutdown()
        self.metadata.server_close()
        self.place.remove()


def kill_session(leader: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and all that it has started."""
    while members := list(session(leader.pid)):
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            leader.wait(0.05)
    leader.wait()


def session(leader: int) -> Iterator[int]:
    """Yield the live processes of a session, whatever their groups and parents are."""
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                yield int(stat.parent.name)


class Vms:
    """The hosts of every slice.

    Args:
        folder: Holds the image and each VM's home.
        variables: Further environment of every VM.
        network: Where they are. Left out: all at this machine's own loopback address.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        variables: Mapping[str, str] | None = None,
        network: Network | None = None,
    ) -> None:
        self._folder, self._variables = folder, dict(variables or {})
        self.network = network or Network()
        self._hosts: dict[str, list[Vm]] = {}
        self._image = folder / "image"
        self._make_image()

    def _make_image(self) -> None:
        packages, programs = self._image / "packages", self._image / "bin"
        packages.mkdir(parents=True)
        programs.mkdir()
        for item in pathlib.Path(sysconfig.get_path("purelib")).iterdir():
            if "mesh_transformer" not in item.name and item.suffix != ".pth":
                (packages / item.name).symlink_to(item)
        python = programs / f"python{sys.version_info.major}.{sys.version_info.minor}"
        python.write_text(PYTHON.format(real=sys.executable, packages=packages, name=python.name))
        python.chmod(0o755)

    def __getitem__(self, name: str) -> list[Vm]:
        return self._hosts[name]

    def boot(self, name: str, metadata: Mapping[str, str], n_hosts: int) -> None:
        """Start the hosts of a slice on empty disks."""
        self._hosts[name] = [self._boot(name, index, metadata) for index in range(n_hosts)]

    def _boot(self, name: str, index: int, metadata: Mapping[str, str]) -> Vm:
        home = self._folder / f"{name}-{index}"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        place = self.network.place(f"{name}-{index}")
        server = _Metadata(
            self.network.gateway, dict(metadata) | {"agent-worker-number": str(index)}
        )
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        temporary = tempfile.mkdtemp(prefix="vm")
        script = home / "startup-script"
        script.write_text(metadata["startup-script"])
        script.chmod(0o755)
        process = subprocess.Popen(
            [*place.command, str(script)],
            cwd=home,
            env={
                "PATH": f"{self._image / 'bin'}:/usr/sbin:/usr/bin:/bin",
                "HOME": str(home),
                "TMPDIR": temporary,
                "TPU_WORKER_ID": str(index),
                "GCE_METADATA_HOST": f"{self.network.gateway}:{server.server_port}",
                **self._variables,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return Vm(home, temporary, process, server, place)

    def set_metadata(self, name: str, metadata: Mapping[str, str]) -> None:
        for index, host in enumerate(self._hosts.get(name, [])):
            host.metadata.attributes = dict(metadata) | {"agent-worker-number": str(index)}

    def kill(self, name: str) -> None:
        """End the hosts of a slice, if there are any."""
        for host in self._hosts.pop(name, []):
            host.kill()

    def close(self) -> None:
        for name in list(self._hosts):
            self.kill(name)
