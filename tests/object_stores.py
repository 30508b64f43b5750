"""Servers with the APIs of S3 (moto) and of Google Cloud Storage (gcp-storage-emulator).

Each runs in a process of its own, behind a gateway in this one: it notes every request, and can
refuse them all, as a store does whose user has no rights. To what Google's emulator answers it adds
one header, see `_Handler._generation`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import http.server
import importlib.util
import json
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

LIMIT = 60.0
"""Seconds that a server is given to start: many times what one takes on a slow machine."""

PACKAGES = {"gs": ("google.cloud.storage", "gcsfs"), "s3": ("boto3",)}
SERVERS = {"gs": "gcp_storage_emulator", "s3": "moto"}


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a server is started and reset; `{port}` stands for its port.

    Attributes:
        health: What it answers once it is up.
        reset: A request after which it holds nothing.
        make: A request that makes the bucket named "bucket", with its body.
        refusal: The body of the answer that a request without rights gets.
    """

    command: tuple[str, ...]
    health: str
    reset: tuple[str, str]
    make: tuple[str, str, bytes]
    refusal: bytes


KINDS = {
    "gs": Kind(
        ("gcp_storage_emulator", "start", "--host=127.0.0.1", "--port={port}", "--in-memory"),
        "/",
        ("GET", "/wipe"),
        ("POST", "/storage/v1/b", b'{"name": "bucket"}'),
        b'{"error": {"code": 403, "message": "no permission to access this"}}',
    ),
    "s3": Kind(
        ("moto.server", "--host=127.0.0.1", "--port={port}"),
        "/moto-api/",
        ("POST", "/moto-api/reset"),
        ("PUT", "/bucket", b""),
        b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>",
    ),
}


def missing(scheme: str) -> list[str]:
    """Name the extras that a test of a scheme needs and that are not installed."""
    parts = [
        (SERVERS[scheme], "buckets"),
        *((it, {"gs": "gcs"}.get(scheme, scheme)) for it in PACKAGES[scheme]),
    ]
    return sorted({extra for package, extra in parts if not _installed(package)})


def environment(gateways: Mapping[str, Gateway]) -> dict[str, str]:
    """Return the variables by which clients find these servers, and have something to log in with.

    Google's client and gcsfs know the first, TensorStore the next two, gcsfs the fourth.
    """
    found: dict[str, str] = {}
    if "gs" in gateways:
        found |= {
            "STORAGE_EMULATOR_HOST": gateways["gs"].url,
            "TENSORSTORE_GCS_HTTP_URL": gateways["gs"].url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which the emulator has no API for
        }
    if "s3" in gateways:
        found |= {
            "AWS_ENDPOINT_URL": gateways["s3"].url,
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }
    return found


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of what the package is in
        return False


class Request(NamedTuple):
    """What a client asked for, and how much it was answered.

    Attributes:
        range: Of its header: "bytes=0-99"; "" if it has none.
        sent: Bytes of its body.
        received: Bytes of the answer's body.
    """

    method: str
    path: str
    range: str
    sent: int
    received: int


class Gateway(http.server.ThreadingHTTPServer):
    """Stands before a server, whose clients take it for theirs.

    Attributes:
        requests: What was asked for since the last `reset`.
        refuses: Whether every request is answered with 403.
    """

    daemon_threads = True

    def __init__(self, kind: Kind, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.kind, self.port = kind, port
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[Request] = []
        self.refuses = False
        # The emulator of Google's answers one at a time, and lets few others wait.
        self.few = threading.Semaphore(4)

    def fetched(self) -> list[Request]:
        """Return the requests for contents of files; clients also ask for other things unasked."""
        return [
            request
            for request in self.requests
            if request.method == "GET"
            and ("alt=media" in request.path or re.match("/bucket/[^?]", request.path))
        ]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that do not wait for the end of an answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def reset(self) -> None:
        """Leave an empty bucket named "bucket" and nothing else."""
        self.refuses = False
        for method, path, *body in (self.kind.reset, self.kind.make):
            status, _ = asked(self.port, method, path, *body)
            assert status in (200, 201), (method, path, status)
        self.requests.clear()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer's body waits 40 ms for the header's receipt
    server: Gateway

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""

    def pass_on(self) -> None:
        body = self._body()
        if self.server.refuses:
            self._answer(403, [], b"" if self.command == "HEAD" else self.server.kind.refusal)
            return
        with self.server.few, contextlib.closing(_connection(self.server.port)) as upstream:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "content-length", "expect"):
                    upstream.putheader(name, value)
            if body or self.command in ("POST", "PUT"):
                upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body)
            answer = upstream.getresponse()
            content, headers = answer.read(), answer.getheaders()
            if answer.status in (200, 206) and "alt=media" in self.path:
                headers.append(("x-goog-generation", self._generation()))
        asked_for = self.headers.get("Range") or ""
        self.server.requests.append(
            Request(self.command, self.path, asked_for, len(body), len(content))
        )
        self._answer(answer.status, headers, content)

    def _generation(self) -> str:
        """Ask which version of an object its content is of.

        Google's store says so beside the content, and TensorStore builds on it; the emulator knows
        it, but says so in the object's description alone.
        """
        path = self.path.removeprefix("/download").partition("?")[0]
        status, about = asked(self.server.port, "GET", path)
        return str(json.loads(about)["generation"]) if status == 200 else "0"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        del self.headers["Transfer-Encoding"]
        parts = []
        while n := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(n))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        ours = {"connection", "transfer-encoding"}
        ours |= set() if self.command == "HEAD" else {"content-length"}
        for name, value in headers:
            if name.lower() not in ours:
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


for _verb in ("GET", "HEAD", "PUT", "POST", "DELETE", "PATCH"):
    setattr(_Handler, f"do_{_verb}", _Handler.pass_on)


def _connection(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)


def asked(port: int, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """Send one request to a server on this machine; return its status and body."""
    with contextlib.closing(_connection(port)) as connection:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        answer = connection.getresponse()
        return answer.status, answer.read()


@contextlib.contextmanager
def serve(scheme: str, folder: pathlib.Path) -> Iterator[Gateway]:
    """Start the server of a scheme and its gateway; stop both at the end.

    Args:
        folder: Where it writes its log.
    """
    kind = KINDS[scheme]
    with _started(kind, folder / f"{scheme}.log") as port:
        gateway = Gateway(kind, port)
        thread = threading.Thread(target=gateway.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield gateway
        finally:
            gateway.shutdown()
            thread.join()
            gateway.server_close()


@contextlib.contextmanager
def _started(kind: Kind, log: pathlib.Path) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *(part.format(port=port) for part in kind.command)]
    with log.open("wb") as told:
        process = subprocess.Popen(command, cwd=log.parent, stdout=told, stderr=told)
    try:
        _wait_until_up(process, port, kind.health, log)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_up(
    process: subprocess.Popen[bytes], port: int, health: str, log: pathlib.Path
) -> None:
    late = time.monotonic() + LIMIT
    while process.poll() is None and time.monotonic() < late:
        try:
            if asked(port, "GET", health)[0] == 200:
                return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"{process.args!r} did not start; it wrote\n{log.read_text()}")
