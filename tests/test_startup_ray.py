"""Local TPU VMs run the real start-up script and join a real Ray cluster that asks for a token."""

from __future__ import annotations

import json
import os
import pathlib
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fake_tpu_vms
import pytest
from tpu_slices import V3_16, fake

from mesh_transformer.pod import startup, tpu_api
from mesh_transformer.pod.tpu_vm import TpuVm

pytest.importorskip("ray", reason="needs Ray; run EXTRAS=test,pods ./test")
pytestmark = [pytest.mark.pods, pytest.mark.slow]

SECONDS = 120
"""What no wait of these tests takes, on however slow a machine."""

# Connects to a cluster; for each number that it reads, waits until so many hosts are in it, and
# writes who they are and which file of the library they have.
WATCH = """
import json, os, sys, time
answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr  # Ray prints what happens to nodes
import ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)

@ray.remote(num_cpus=1)
def library():
    import mesh_transformer
    return mesh_transformer.__file__

for line in sys.stdin:
    while True:
        nodes = [n["Labels"] for n in ray.nodes() if n["Alive"] and "mesh-slice" in n["Labels"]]
        if len(nodes) == int(line):
            break
        time.sleep(0.1)
    ids = sorted((labels["mesh-worker"], labels["ray.io/node-id"]) for labels in nodes)
    files = [library.options(label_selector={"ray.io/node-id": node}).remote() for _, node in ids]
    print(json.dumps([nodes, ray.get(files)]), file=answers, flush=True)
"""


class Cluster:
    """The head of a Ray cluster, which only those who have its token may join."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="ray")  # short, since paths of Unix sockets are
        self.token = secrets.token_hex(32)
        path = pathlib.Path(self.folder) / "token"
        path.write_text(self.token)
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._environment = variables | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(path),
            "RAY_TMPDIR": self.folder,
        }
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        port = self.address.partition(":")[2]
        flags = ["--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=0"]
        quiet = ["--include-dashboard=false", "--disable-usage-stats", "--block"]
        self.head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *flags, *quiet],
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @contextmanager
    def watched(self) -> Iterator[subprocess.Popen[str]]:
        with subprocess.Popen(
            [sys.executable, "-c", WATCH, self.address],
            cwd=self.folder,  # not in the checkout, which Ray would tell local hosts to import from
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as watch:
            yield watch
            watch.communicate(timeout=SECONDS)

    def close(self) -> None:
        fake_tpu_vms.kill_session(self.head)
        shutil.rmtree(self.folder, ignore_errors=True)


def hosts(watch: subprocess.Popen[str], number: int) -> tuple[list[dict[str, str]], list[str]]:
    """Wait for a number of hosts; return their labels and their files of the library."""
    assert watch.stdin and watch.stdout
    print(number, file=watch.stdin, flush=True)
    labels, files = json.loads(watch.stdout.readline())
    return labels, files


@contextmanager
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def cloud(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with fake.serve(fake_tpu_vms.Vms(tmp_path / "vms")) as server:
        monkeypatch.setenv(tpu_api.ENDPOINT, server.endpoint)
        yield server


def begin(ray: Cluster, files: startup.FileServer) -> TpuVm:
    """Make the slice ready and let it have the token."""
    told = startup.Startup(
        slice_name="a",
        head=ray.address,
        wheel=files.wheel,
        wheel_url=files.url("wheel"),
        token_url=files.url("token"),
        num_cpus=1,
    )
    vm = TpuVm("a", "local", V3_16, spot=True, startup_script=told.script())
    files.admit(vm.ensure().addresses)
    return vm


def test_hosts_join_with_their_labels_until_they_are_preempted(
    cloud: Any, tmp_path: pathlib.Path
) -> None:
    wheel = startup.build_wheel(tmp_path)
    with (
        cluster() as ray,
        startup.FileServer(wheel, ray.token, host="127.0.0.1") as files,
    ):
        vm = begin(ray, files)
        with ray.watched() as watch:
            labels, paths = hosts(watch, 2)
            assert sorted((item["mesh-slice"], item["mesh-worker"]) for item in labels) == [
                ("a", "0"),
                ("a", "1"),
            ]
            vms = cloud.vms["a"]
            for path, host in zip(paths, vms, strict=True):
                assert pathlib.Path(path).is_relative_to(host.home)
                assert_token_is_kept(ray.token, host)
            assert ray.token not in cloud.nodes["a"].metadata["startup-script"]
            cloud.preempt("a")
            assert not [pid for host in vms for pid in fake_tpu_vms.session(host.process.pid)]
            assert hosts(watch, 0) == ([], [])
            assert str(vm.state()) == "PREEMPTED"

            assert vm.ensure().ready  # on empty disks
            assert len(hosts(watch, 2)[0]) == 2


def assert_token_is_kept(token: str, host: Any) -> None:
    """Check that only a file of the host's own has the token."""
    path = host.home / ".mesh-transformer" / "token"
    assert path.read_text() == token and path.stat().st_mode & 0o777 == 0o600
    assert token not in host.log
    for pid in fake_tpu_vms.session(host.process.pid):
        assert token.encode() not in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
        assert token.encode() not in pathlib.Path(f"/proc/{pid}/environ").read_bytes()


def test_hosts_come_to_a_driver_that_started_again_elsewhere(
    cloud: Any, tmp_path: pathlib.Path
) -> None:
    wheel = startup.build_wheel(tmp_path)
    with cluster() as first, startup.FileServer(wheel, first.token, host="127.0.0.1") as files:
        begin(first, files)
        with first.watched() as watch:
            hosts(watch, 2)
        running = [host.process.pid for host in cloud.vms["a"]]
    with cluster() as second, startup.FileServer(wheel, second.token, host="127.0.0.1") as files:
        begin(second, files)
        with second.watched() as watch:
            assert len(hosts(watch, 2)[0]) == 2
    assert [host.process.pid for host in cloud.vms["a"]] == running
    assert cloud.methods("Create") == ["CreateNode"]
