"""A loopback file server that cuts, refuses and lies, and the fixtures of the tests that download from it."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mdltool.backbones import download


@dataclass
class Server:
    """Files by path, and how it serves them.

    cuts: bytes after which the next answers end. ranges: honoured. moved: path -> where it sends those who ask for
    it. connections: how many were opened.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    ranges: bool = True
    lengths: bool = True
    etag: str = '"x"'
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    connections: int = 0
    url: str = ""

    def answer(self, request: http.server.BaseHTTPRequestHandler, body: bool) -> None:
        if body:
            self.asked.append((request.path, request.headers.get("Range")))
        status = self.statuses.pop(0) if self.statuses and body else 0
        if request.path in self.moved:
            request.send_response(302)
            request.send_header("Location", self.moved[request.path])
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        content = self.files.get(request.path)
        if status or content is None:
            request.send_error(status or 404)
            return
        start, total = 0, len(content)
        end = total
        span = re.match(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
        current = request.headers.get("If-Range") in (None, self.etag)
        if span and self.ranges and current:
            start = int(span[1])
            end = min(int(span[2]) + 1, total) if span[2] else total
            if start >= total:
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{total}")
                request.send_header("Content-Length", "0")
                request.end_headers()
                return
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{end - 1}/{total}")
        else:
            request.send_response(200)
        if self.lengths:
            request.send_header("Content-Length", str(end - start))
        request.send_header("ETag", self.etag)
        request.send_header("X-Repo-Commit", "0" * 40)
        request.end_headers()
        if body:
            cut = self.cuts.pop(0) if self.cuts else total
            request.wfile.write(content[start : min(start + cut, end)])
            if start + cut < end or not self.lengths:
                request.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # which keeps connections open

        def setup(self) -> None:
            made.connections += 1
            super().setup()

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # a client that ends with an open connection
                super().handle()

        def do_GET(self) -> None:
            made.answer(self, True)

        def do_HEAD(self) -> None:
            made.answer(self, False)

        def log_message(self, *words: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        made.url = f"http://127.0.0.1:{listening.server_address[1]}"
        yield made
        listening.shutdown()
        thread.join()


@pytest.fixture
def own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE", 0.001)
    monkeypatch.setenv("MDLTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MDLTOOL_WORK", str(tmp_path / "work"))
    for name in ("MDLTOOL_MIRROR", "HF_ENDPOINT", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
