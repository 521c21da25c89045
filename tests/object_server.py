"""As much of an S3 server as reading objects asks for, in memory, which fails when it is told to."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urlsplit


@dataclass
class Bucket:
    """`objects` by their key; `requests` are (method, key, range).

    Each entry of `failures` is what becomes of one GET: "refused" (503) or "cut" (the connection ends in the middle).
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    requests: list[tuple[str, str, str]] = field(default_factory=list)

    def put(self, prefix: Path, key: str) -> None:
        """Both files of a dataset."""
        for suffix in (".bin", ".idx"):
            self.objects[f"{key}{suffix}"] = Path(f"{prefix}{suffix}").read_bytes()

    def clear(self) -> None:
        for everything in (self.objects, self.failures, self.requests):
            everything.clear()

    def num_reads(self, key: str) -> int:
        return sum(method == "GET" and name == key for method, name, _ in self.requests)


@contextmanager
def serve_bucket(name: str = "bucket") -> Iterator[Bucket]:
    """``s3://<name>/...`` leads to the objects while the context lasts, in this process and those it starts."""
    bucket = Bucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket, "root": f"/{name}/"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "anybody",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        with mock.patch.dict("os.environ", environment):
            yield bucket
    finally:
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # the next server has another port
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    bucket: Bucket
    root: str
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        """Nobody wants to read it."""

    def _answer(self, *, with_body: bool) -> None:
        key = unquote(urlsplit(self.path).path).removeprefix(self.root)
        wanted = self.headers.get("Range", "")
        self.bucket.requests.append((self.command, key, wanted))
        failure = self.bucket.failures.pop(0) if with_body and self.bucket.failures else ""
        content = self.bucket.objects.get(key)
        if content is None or failure == "refused":
            code, name = (404, "NoSuchKey") if content is None else (503, "SlowDown")
            body = f"<Error><Code>{name}</Code><Message>{name}</Message></Error>".encode()
            return self._send(code, body if with_body else b"", {}, len(body) if with_body else 0)
        part, headers = content, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}
        headers["Last-Modified"] = "Sat, 21 Nov 2026 12:00:00 GMT"
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        if found:
            start, stop = int(found[1]), min(int(found[2]) + 1, len(content))
            part = content[start:stop]
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        body = part[: len(part) // 2] if failure == "cut" else part
        self._send(206 if found else 200, body if with_body else b"", headers, len(part))
        self.close_connection = bool(failure)

    def _send(self, code: int, body: bytes, headers: dict[str, str], length: int) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(length), "Content-Type": "application/xml"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
