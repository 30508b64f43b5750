"""A local HTTP server that speaks as much of the S3 and GCS APIs as storage uses."""

from __future__ import annotations

import base64
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager

GOOGLE_OBJECT = r"/(?:upload/|download/)?storage/v1/b/bucket/o(?:/(.+))?"


class FakeBuckets(http.server.ThreadingHTTPServer):
    """One bucket named "bucket", shared by both APIs.

    Attributes:
        objects: Contents by key.
        refuses: Whether every request is answered with 403.
        n_reads: How often a content, or a range of one, was asked for.
        uploads: Parts of uploads that are not complete, by the upload's id.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.refuses = False
        self.n_reads = 0
        self.uploads: dict[str, list[bytes]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve() -> Iterator[FakeBuckets]:
    server = FakeBuckets()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer's body waits 40 ms for the header's receipt
    server: FakeBuckets

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""

    def answer_request(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(url.path)
        if self.server.refuses:
            self._answer(403, b"")
        elif google := re.fullmatch(GOOGLE_OBJECT, path):
            self._google(google[1])
        elif s3 := re.fullmatch(r"/bucket(?:/(.*))?", path):
            self._s3(s3[1] or "")
        else:
            self._answer(404, b"")

    def _google(self, key: str | None) -> None:
        objects = self.server.objects
        upload = self.query.get("uploadType")
        if upload == "multipart":
            boundary = self.headers["Content-Type"].partition("boundary=")[2].strip("\"'").encode()
            _, meta, content, _ = self.body.split(b"--" + boundary)
            key = json.loads(meta.partition(b"\r\n\r\n")[2])["name"]
            objects[key] = content.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
            self._json(self._resource(key))
        elif upload == "resumable" and self.command == "POST":
            key = json.loads(self.body)["name"]
            self.server.uploads[key] = []
            there = f"{self.server.url}{self.path}&name={urllib.parse.quote(key, '')}"
            self._answer(200, b"", {"Location": there})
        elif upload == "resumable" and self.command == "DELETE":
            del self.server.uploads[self.query["name"]]
            self._answer(499, b"")
        elif upload == "resumable":
            self.server.uploads[self.query["name"]].append(self.body)
            if self.headers["Content-Range"].endswith("/*"):
                sent = sum(map(len, self.server.uploads[self.query["name"]]))
                self._answer(308, b"", {"Range": f"bytes=0-{sent - 1}"})
            else:
                objects[self.query["name"]] = b"".join(self.server.uploads.pop(self.query["name"]))
                self._json(self._resource(self.query["name"]))
        elif key is None:
            found = [k for k in sorted(objects) if k.startswith(self.query.get("prefix", ""))]
            self._json({"items": [self._resource(k) for k in found]})
        elif key not in objects:
            self._answer(404, b"")
        elif self.command == "DELETE":
            del objects[key]
            self._answer(204, b"")
        elif self.query.get("alt") == "media":
            self._range(objects[key])
        else:
            self._json(self._resource(key))

    def _resource(self, key: str) -> dict[str, str]:
        import google_crc32c  # comes with the extra [gcs], whose client is what asks for this

        checksum = google_crc32c.value(self.server.objects[key]).to_bytes(4, "big")
        media = f"{self.server.url}/download/storage/v1/b/bucket/o/{urllib.parse.quote(key, '')}"
        return {
            "name": key,
            "bucket": "bucket",
            "size": str(len(self.server.objects[key])),
            "generation": "1",
            "crc32c": base64.b64encode(checksum).decode(),
            "mediaLink": media + "?alt=media",
        }

    def _s3(self, key: str) -> None:
        objects = self.server.objects
        if self.command == "POST" and "uploads" in self.query:
            self.server.uploads[key] = []
            self._answer(200, b"<R><UploadId>1</UploadId></R>")
        elif self.command == "PUT" and "uploadId" in self.query:
            self.server.uploads[key].append(self.body)
            self._answer(200, b"", {"ETag": '"1"'})
        elif self.command == "POST":
            objects[key] = b"".join(self.server.uploads.pop(key))
            self._answer(200, b"<R><ETag>1</ETag></R>")
        elif self.command == "DELETE":
            (self.server.uploads if "uploadId" in self.query else objects).pop(key, None)
            self._answer(204, b"")
        elif self.command == "PUT":
            objects[key] = self.body
            self._answer(200, b"", {"ETag": '"1"'})
        elif not key:
            found = [k for k in sorted(objects) if k.startswith(self.query.get("prefix", ""))]
            items = "".join(
                f"<Contents><Key>{k}</Key><Size>{len(objects[k])}</Size></Contents>" for k in found
            )
            self._answer(200, f"<ListBucketResult>{items}</ListBucketResult>".encode())
        elif key not in objects:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self._range(objects[key])

    def _range(self, content: bytes) -> None:
        self.server.n_reads += 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            self._answer(200, content)
            return
        start = int(asked[1])
        stop = min(int(asked[2]) + 1 if asked[2] else len(content), len(content))
        if start >= len(content):
            self._answer(416, b"<Error><Code>InvalidRange</Code></Error>")
            return
        where = f"bytes {start}-{stop - 1}/{len(content)}"
        self._answer(206, content[start:stop], {"Content-Range": where})

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


for _verb in ("GET", "HEAD", "PUT", "POST", "DELETE"):
    setattr(_Handler, f"do_{_verb}", _Handler.answer_request)
