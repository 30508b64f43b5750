"""What the start-up script of a TPU VM does, with stand-ins for the programs that it runs."""

from __future__ import annotations

import http.server
import pathlib
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from mesh_transformer.pod import startup

TOKEN = "not to be seen"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> startup.Wheel:
    return startup.build_wheel(tmp_path_factory.mktemp("wheel"))


# Stands for python3.11, the python of an environment, uv, gcloud, date and sleep, by its name, and
# writes down what it is asked to do. An environment's python fails to install as long as there is
# the file `fail`; a node of Ray that ends lets as many seconds pass as the file `lasts` says.
STUB = r"""#!/bin/bash
log() { echo "$*" >>"{log}"; }
case "${0##*/} $*" in
"sleep "*) log "sleep $1" ;;
"date +%s") cat "{log}.clock" 2>/dev/null || echo 0 ;;
"gcloud "*"--out-file "*) log "gcloud $*"; echo secret >"${@: -1}" ;;
"gcloud "*"storage cp "*) log "gcloud $*"; cp "${4/gs:\/\/bucket/{bucket}}" "$5" ;;
"uv venv "*) log "uv venv $4 $5"; mkdir -p "$6/bin"; cp "$0" "$6/bin/python" ;;
"uv pip "*) log "uv pip ${@: -1}" ;;
*" -m venv "*) log "venv"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
*" -m pip install "*" --target "*) log "pip ${@: -1}"; mkdir -p "$7/bin"; cp "$0" "$7/bin/uv" ;;
*" -m pip install "*) log "pip ${@: -1}"; [[ ! -e "{log}.fail" ]] ;;
*" -m ray.scripts.scripts start "*)
    log "ray ${*:4}"
    log "$RAY_AUTH_MODE $(stat -c %a "$RAY_AUTH_TOKEN_PATH") $(<"$RAY_AUTH_TOKEN_PATH")"
    [[ ! -e "{log}.lasts" ]] || echo $(($(date +%s) + $(<"{log}.lasts"))) >"{log}.clock.new"
    [[ ! -e "{log}.lasts" ]] || mv "{log}.clock.new" "{log}.clock"
    exit 3 ;;
*) log "unexpected: $0 $*"; exit 1 ;;
esac
"""


class Host(http.server.ThreadingHTTPServer):
    """A host with stand-ins for programs, and its metadata server.

    Attributes:
        scripts: What the next looks for the start-up script find: a script, None for the one that
            runs, or an HTTP status. After the last there is none any more, which ends the script.
        number: Answers to "agent-worker-number" likewise; the last one stays.
    """

    daemon_threads = True

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(("127.0.0.1", 0), _Metadata)
        self.home, self.log = folder / "a home", folder / "log"
        self.home.mkdir()
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.scripts: list[str | int | None] = []
        self.number: list[str | int] = ["1"]
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        for name in (f"python{version}", "python3", "gcloud", "date", "sleep"):
            path = self.programs / name
            path.write_text(STUB.replace("{log}", str(self.log)).replace("{bucket}", str(folder)))
            path.chmod(0o755)
        self.folder = self.home / ".mesh-transformer"

    def boot(self, script: str, *rounds: str | int | None, worker: str = "1") -> list[str]:
        """Run the script for some rounds; return what programs were asked to do, and clear that."""
        self.running, self.scripts = script, list(rounds)
        path = self.home / "startup-script"
        path.write_text(script)
        done = subprocess.run(
            ["bash", str(path)],
            env={
                "PATH": f"{self.programs}:/usr/bin:/bin",
                "HOME": str(self.home),
                "GCE_METADATA_HOST": f"127.0.0.1:{self.server_port}",
                "TPU_WORKER_ID": worker,
            },
            capture_output=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), self.said()
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        assert TOKEN not in self.said()
        return lines

    def said(self) -> str:
        return (self.folder / "startup.log").read_text()

    def answer(self, path: str) -> tuple[int, str]:
        if path.endswith("/startup-script"):
            found = self.scripts.pop(0) if self.scripts else 404
            self.running = found if isinstance(found, str) else self.running
            return (found, "no") if isinstance(found, int) else (200, self.running)
        assert path.endswith("/agent-worker-number")
        number = self.number.pop(0) if len(self.number) > 1 else self.number[0]
        return (number, "no") if isinstance(number, int) else (200, number)


class _Metadata(http.server.BaseHTTPRequestHandler):
    server: Host

    def do_GET(self) -> None:
        status, text = self.server.answer(self.path)
        self.send_response(status if self.headers["Metadata-Flavor"] == "Google" else 403)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def host(tmp_path: pathlib.Path) -> Iterator[Host]:
    server = Host(tmp_path)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class Driver(startup.FileServer):
    """A driver as its hosts see it."""

    def startup(self, **changes: object) -> startup.Startup:
        given = {
            "slice_name": "a",
            "head": "10.0.0.2:6379",
            "wheel": self.wheel,
            "wheel_url": self.url("wheel"),
            "token_url": self.url("token"),
            "constraints": ("jax==1",),
        }
        return startup.Startup(**(given | changes))  # type: ignore[arg-type]

    def script(self, **changes: object) -> str:
        return self.startup(**changes).script()

    def joined(self, worker: int = 1, token: str = TOKEN) -> list[str]:
        labels = f"mesh-slice=a,mesh-worker={worker},mesh-build={self.startup().build}"
        where = f"--address=10.0.0.2:6379 --labels={labels} --temp-dir=/tmp/ray"
        return [f"ray {where} --disable-usage-stats --block", f"token 600 {token}"]

    def installed(self, host: Host, extras: str = "tpu,pods") -> list[str]:
        where = host.folder / self.wheel.path.name
        return ["venv", f"pip mesh-transformer[{extras}] @ file://{where}"]


@pytest.fixture
def driver(wheel: startup.Wheel) -> Iterator[Driver]:
    with Driver(wheel, TOKEN, host="127.0.0.1") as server:
        server.admit(["127.0.0.1"])
        yield server


def test_a_host_installs_once_and_joins_again_and_again(host: Host, driver: Driver) -> None:
    did = host.boot(driver.script(), None, None, None)
    join = driver.joined()
    assert did == [*driver.installed(host), *join, "sleep 1", *join, "sleep 2", *join, "sleep 4"]
    assert (host.folder / "constraints.txt").read_text() == "jax==1\n"
    assert (host.folder / driver.wheel.path.name).read_bytes() == driver.wheel.path.read_bytes()
    assert stat.S_IMODE(host.folder.stat().st_mode) == 0o700
    assert "left the cluster (status 3)" in host.said()
    driver.admit([])  # a reboot, after all hosts have joined
    assert host.boot(driver.script(), None) == [*join, "sleep 1"]


def test_pauses_grow_to_a_minute(host: Host, driver: Driver) -> None:
    did = host.boot(driver.script(), *[None] * 8)
    assert [int(line.split()[1]) for line in did if line.startswith("sleep")] == [
        1, 2, 4, 8, 16, 32, 60, 60,
    ]  # fmt: skip


@pytest.mark.parametrize(("seconds", "pauses"), [(59, [1, 2, 4]), (60, [1, 1, 1])])
def test_pauses_are_short_again_after_a_minute_in_the_cluster(
    host: Host, driver: Driver, seconds: int, pauses: list[int]
) -> None:
    pathlib.Path(f"{host.log}.lasts").write_text(str(seconds))
    did = host.boot(driver.script(), None, None, None)
    assert [int(line.split()[1]) for line in did if line.startswith("sleep")] == pauses


def test_a_host_waits_for_the_token(host: Host, driver: Driver) -> None:
    driver.admit([])
    did = host.boot(driver.script(), None, None)
    assert did == [*driver.installed(host), "sleep 1", "sleep 2"]
    assert not (host.folder / "token").exists() and "error: 403" in host.said()


def test_another_build_is_installed_in_place_of_the_last(host: Host, driver: Driver) -> None:
    host.boot(driver.script(), None)
    did = host.boot(driver.script(extras=("tpu", "pods", "gcs")), None)
    assert did[:2] == driver.installed(host, "tpu,pods,gcs")


def test_an_installation_that_failed_is_begun_anew(host: Host, driver: Driver) -> None:
    failing = pathlib.Path(f"{host.log}.fail")
    failing.touch()
    install = driver.installed(host)
    assert host.boot(driver.script(), None, None) == [
        *install, "sleep 1", *install, "sleep 2",
    ]  # fmt: skip
    failing.unlink()
    assert host.boot(driver.script(), None)[:3] == [*install, driver.joined()[0]]


def test_a_wheel_that_the_driver_did_not_build_is_not_installed(host: Host, driver: Driver) -> None:
    did = host.boot(driver.script(wheel=driver.wheel._replace(sha256="0" * 64)), None)
    assert did == ["sleep 1"]
    assert "the wheel is not the one that the driver built" in host.said()


def test_a_python_that_is_not_there_is_fetched(host: Host, driver: Driver) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    other = driver.script().replace(f"\npython={version}\n", "\npython=9.9\n")
    [_, install] = driver.installed(host)
    did = host.boot(other, None)
    assert did[:3] == ["pip uv", "uv venv --python 9.9", f"uv {install}"]
    assert did[3:] == [*driver.joined(), "sleep 1"]


def test_the_library_can_lie_in_a_bucket_and_the_token_in_secret_manager(
    host: Host, driver: Driver
) -> None:
    shutil.copy(driver.wheel.path, host.home.parent / "the.whl")
    driver.admit([])
    changes = {"wheel_url": "gs://bucket/the.whl", "token_url": "", "token_secret": "ray token"}
    did = host.boot(driver.script(**changes), None)
    part = host.folder / f"{driver.wheel.path.name}.part"
    assert did[0] == f"gcloud --quiet storage cp gs://bucket/the.whl {part}"
    part = host.folder / "token.part"
    ask = "gcloud --quiet secrets versions access latest --secret ray token --out-file"
    assert did[3] == f"{ask} {part}"
    assert did[4:] == [*driver.joined(token="secret"), "sleep 1"]


def test_a_host_goes_on_with_the_script_of_a_driver_that_started_again(
    host: Host, driver: Driver
) -> None:
    newer = driver.script(head="10.0.0.9:6379", num_cpus=3)
    did = host.boot(driver.script(), None, newer, None)
    [first, second] = [line for line in did if line.startswith("ray")]
    assert "--address=10.0.0.2:6379" in first and "--num-cpus" not in first
    assert "--address=10.0.0.9:6379" in second and "--num-cpus=3" in second
    assert did.count("venv") == 1 and "going on with a newer script" in host.said()


def test_a_metadata_server_that_fails_changes_nothing(host: Host, driver: Driver) -> None:
    did = host.boot(driver.script(), 503, None)
    assert len([line for line in did if line.startswith("ray")]) == 2


def test_the_number_of_a_host_is_in_its_metadata(host: Host, driver: Driver) -> None:
    host.number = [503, "13"]
    did = host.boot(driver.script(), None, worker="")
    assert did[0] == "sleep 2" and did[3:5] == driver.joined(worker=13)
