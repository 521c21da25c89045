"""The part of the Hugging Face hub that a download asks for, served from a folder on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from huggingface_hub import constants

_COMMIT = "a" * 40
# Small, so that something of a small file has arrived when its connection breaks.
_CHUNK_BYTES = 1000


@dataclass
class Hub:
    """`requests` lists (method, file, first byte) of what was asked; `breaks` names files cut off once, halfway."""

    files: dict[str, bytes]
    breaks: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, int]] = field(default_factory=list)

    def downloaded(self) -> set[str]:
        return {name for method, name, _ in self.requests if method == "GET"}


@contextmanager
def serve_hub(repository: Path) -> Iterator[Hub]:
    """Every repository's name leads to the files of `repository`, while the context lasts."""
    files = {str(f.relative_to(repository)): f.read_bytes() for f in sorted(repository.rglob("*")) if f.is_file()}
    hub = Hub(files)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    settings: dict[str, Any] = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "DOWNLOAD_CHUNK_SIZE": _CHUNK_BYTES,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
        "HF_HUB_OFFLINE": False,
    }
    try:
        with mock.patch.multiple(constants, **settings):
            yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: tests look at `Hub.requests`."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if "/resolve/" in self.path:
            self._file(self.path.split("/resolve/")[1].split("/", 1)[1])
        elif "/tree/" in self.path:
            listing = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.hub.files.items()
            ]
            self._send(200, json.dumps(listing).encode())
        elif "/revision/" in self.path:
            siblings = [{"rfilename": name} for name in self.hub.files]
            self._send(200, json.dumps({"id": "somebody/tiny", "sha": _COMMIT, "siblings": siblings}).encode())
        else:
            self._send(404, b"")

    def _file(self, name: str) -> None:
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.hub.requests.append((self.command, name, first))
        content = self.hub.files[name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": _COMMIT, "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        breaks = self.command == "GET" and name in self.hub.breaks
        self.hub.breaks -= {name} if breaks else set()
        self._send(206 if first else 200, content[first:], headers, breaks=breaks)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, breaks: bool = False) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if breaks else body)
        if breaks:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
