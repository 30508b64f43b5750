"""How a host becomes part of a run: the wheel, the Ray token and the script that a VM starts with.

`startup.sh` says what a host does. It takes three things from the driver: this very library, as a
wheel; the versions of everything that it depends on; and the token that Ray asks of whoever
connects. The first two are no secrets. Whoever has the token can run programs on every host.

Where the token goes. It is in no log, no command line and no metadata of a VM. The metadata of a VM
holds the script, with an address at the driver that nobody can guess. Who may read it: users of the
VM, and members of the project who may look at VMs. So the address by itself gives nothing away: the
token is handed only to the hosts of the slice (`FileServer.admit`), which Google Cloud's network
lets nobody else pretend to be, and only until the driver closes it, when all hosts have joined.
What remains open: in that short time any user of one of these hosts can have it, as root of a host
can always; and it travels in the clear through the project's network, as it does in each of Ray's
own calls. With `tpu_token_secret` the hosts take it from Secret Manager instead, by the permission
of their service account, and the driver hands out nothing.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import http.server
import importlib.metadata
import importlib.resources
import io
import os
import pathlib
import re
import secrets
import shlex
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Self

import mesh_transformer
from mesh_transformer.errors import UserError

DISTRIBUTION = "mesh-transformer"
SLICE, WORKER, BUILD = "mesh-slice", "mesh-worker", "mesh-build"
"""Labels of a Ray node: the slice's name, the host's number in it, and `Startup.build`."""


class Wheel(NamedTuple):
    """A wheel of this library.

    Attributes:
        sha256: Of its content; the same files give the same.
    """

    path: pathlib.Path
    version: str
    sha256: str


def build_wheel(folder: str | os.PathLike[str]) -> Wheel:
    """Build a wheel of the library that is running, from its own files, changed ones too.

    Built here rather than by pip: that would need a checkout and a network, and give other bytes
    each time.

    Raises:
        UserError: What the library depends on cannot be told.
    """
    package = pathlib.Path(mesh_transformer.__file__).parent
    version = mesh_transformer.__version__
    stem = f"{DISTRIBUTION.replace('-', '_')}-{version}"
    contents = {path.relative_to(package.parent).as_posix(): path.read_bytes()
                for path in _files(package)}  # fmt: skip
    contents |= {
        f"{stem}.dist-info/METADATA": _metadata(package, version).encode(),
        f"{stem}.dist-info/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: mesh_transformer\nRoot-Is-Purelib: true\n"
            b"Tag: py3-none-any\n"
        ),
    }
    record = f"{stem}.dist-info/RECORD"
    lines = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in contents.items()]
    contents[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    data = _zipped(contents)
    path = pathlib.Path(folder) / f"{stem}-py3-none-any.whl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return Wheel(path, version, hashlib.sha256(data).hexdigest())


def _files(package: pathlib.Path) -> Iterator[pathlib.Path]:
    for path in sorted(package.rglob("*")):
        parts = path.relative_to(package).parts
        if path.is_file() and not any(p == "__pycache__" or p.startswith(".") for p in parts):
            yield path


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _zipped(contents: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, data in contents.items():
            entry = zipfile.ZipInfo(name)  # of the year 1980: the time is no part of the content
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            file.writestr(entry, data)
    return archive.getvalue()


def _metadata(package: pathlib.Path, version: str) -> str:
    """What the library depends on: by pyproject.toml in a checkout, else as it was installed."""
    try:
        python, requirements, extras = _of_checkout(package.parent / "pyproject.toml")
    except FileNotFoundError:
        python, requirements, extras = _of_installation()
    return "\n".join(
        [
            "Metadata-Version: 2.1",
            f"Name: {DISTRIBUTION}",
            f"Version: {version}",
            f"Requires-Python: {python}",
            *(f"Provides-Extra: {extra}" for extra in extras),
            *(f"Requires-Dist: {requirement}" for requirement in requirements),
            "",
        ]
    )


def _of_checkout(pyproject: pathlib.Path) -> tuple[str, list[str], list[str]]:
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    requirements = list(project["dependencies"])
    extras = project["optional-dependencies"]
    for extra, items in extras.items():
        for item in items:
            name, _, marker = item.partition(";")
            also = f"({marker.strip()}) and " if marker else ""
            requirements.append(f'{name.strip()}; {also}extra == "{extra}"')
    return project["requires-python"], requirements, list(extras)


def _of_installation() -> tuple[str, list[str], list[str]]:
    try:
        installed = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"{DISTRIBUTION} is neither a checkout nor installed, so that what hosts need to run "
            'it is not known; in a checkout: pip install -e ".[pods]" -c constraints.txt'
        ) from error
    extras = installed.metadata.get_all("Provides-Extra") or []
    return installed.metadata["Requires-Python"], installed.requires or [], extras


def pins() -> list[str]:
    """The version of each package here, for hosts to have the same: "jax==0.10.2"."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name and name != DISTRIBUTION:
            found.setdefault(name, f"{name}=={distribution.version}")
    return sorted(found.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Startup:
    """What the hosts of one slice are told.

    Attributes:
        head: host:port of Ray's head, as the hosts reach it.
        wheel_url: Where they get the wheel: http:// (see `FileServer.url`) or gs://.
        token_url: Where they get the token; "" where `token_secret` names a secret.
        token_secret: See `PodConfig.tpu_token_secret`.
        extras: Of the library. Hosts that read gs:// or s3:// need "gcs" or "s3" too.
        num_cpus: Of each host, as Ray counts them. Left out: as many as there are.
    """

    slice_name: str
    head: str
    wheel: Wheel
    wheel_url: str
    token_url: str
    token_secret: str = ""
    extras: tuple[str, ...] = ("tpu", "pods")
    num_cpus: int | None = None
    constraints: tuple[str, ...] = dataclasses.field(
        default_factory=lambda: tuple(pins()), repr=False
    )

    @property
    def build(self) -> str:
        """Names what is installed on a host: the version, and a digest of all that makes it.

        A node of Ray carries it as the label `BUILD`: those that carry another run something else.
        """
        parts = (self.wheel.sha256, *self._python(), *self.extras, *self.constraints)
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return f"{self.wheel.version}-{digest[:12]}"

    def script(self) -> str:
        """The start-up script of the slice's VMs."""
        values = {
            "name": self.slice_name,
            "head": self.head,
            "build": self.build,
            "python": ".".join(self._python()),
            "extras": ",".join(self.extras),
            "wheel": self.wheel.path.name,
            "wheel_sha256": self.wheel.sha256,
            "wheel_url": self.wheel_url,
            "token_url": self.token_url,
            "token_secret": self.token_secret,
            "num_cpus": "" if self.num_cpus is None else str(self.num_cpus),
            "constraints": "\n".join(self.constraints),
        }
        lines = ["#!/usr/bin/env bash", *(f"{k}={shlex.quote(v)}" for k, v in values.items()), ""]
        body = importlib.resources.files("mesh_transformer.pod").joinpath("startup.sh")
        return "\n".join(lines) + body.read_text(encoding="utf-8")

    @staticmethod
    def head_in(script: str) -> str:
        """The address of Ray's head that a script names, or "" if it is none of ours."""
        named = re.search(r"^head=(.*)$", script, re.MULTILINE)
        return shlex.split(named[1])[0] if named else ""

    @staticmethod
    def _python() -> tuple[str, str]:
        return str(sys.version_info.major), str(sys.version_info.minor)


class FileServer(http.server.ThreadingHTTPServer):
    """Hands one slice's hosts the wheel and, for a while, the token; nobody else gets anything.

    Args:
        wheel: Given to whoever knows the address.
        token: Given only to addresses that are admitted; see the top of this module.
        host: Address to listen on: the one by which the hosts reach the driver.
        port: 0 takes any that is free.
    """

    daemon_threads = True

    def __init__(self, wheel: Wheel, token: str, *, host: str, port: int = 0) -> None:
        super().__init__((host, port), _Handler)
        self.wheel = wheel
        self._secret = secrets.token_urlsafe(32)
        self._token, self._wheel = token.encode(), wheel.path.read_bytes()
        self._admitted: frozenset[str] = frozenset()
        self._thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.1}, name="files for hosts"
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def url(self, what: str) -> str:
        """Return the address of "wheel" or "token"."""
        name = {"wheel": self.wheel.path.name, "token": "token"}[what]
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/{self._secret}/{name}"

    def admit(self, addresses: Iterable[str]) -> None:
        """Give the token to these addresses from now on, and to no others; none closes it."""
        self._admitted = frozenset(addresses)

    def answer(self, path: str, address: str) -> tuple[int, bytes]:
        """Return the HTTP status and content for a path that an address asks for."""
        secret, _, name = path.removeprefix("/").partition("/")
        if not hmac.compare_digest(secret.encode(), self._secret.encode()):
            return 404, b""
        if name == self.wheel.path.name:
            return 200, self._wheel
        if name == "token":
            return (200, self._token) if address in self._admitted else (403, b"")
        return 404, b""


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = 30.0
    server: FileServer

    def do_GET(self) -> None:
        status, content = self.server.answer(self.path, self.client_address[0])
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: paths are secret."""
