"""A small server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SHA = "c" * 40


class FakeHub(ThreadingHTTPServer):
    """Serves ``repos`` (name -> file -> content); ``asked`` are the files fetched, ``cuts`` how
    many to break off, ``sent`` the bytes of files that were sent, ``ranges`` whether it knows
    byte ranges.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.asked: list[tuple[str, str]] = []
        self.statuses: dict[str, tuple[int, str]] = {}
        self.cuts = 0
        self.ranges = True
        self.sent = 0
        self.pause: threading.Event | None = None
        self.paused = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            self._api(match[1], match[2] or "revision", match[3] or "main")
        elif match := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/(?:main|{SHA})/(.+)", path):
            self._file(self.server.repos[match[1]].get(match[2]), match[2])
        else:
            self._reply(404, b"{}")

    def _api(self, repo: str, what: str, revision: str) -> None:
        if repo in self.server.statuses:
            status, code = self.server.statuses[repo]
            return self._reply(status, b"{}", {"X-Error-Code": code})
        if repo not in self.server.repos:
            return self._reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", SHA):
            return self._reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = self.server.repos[repo].items()
        tree = [
            {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
            for n, c in files
        ]
        siblings = [{"rfilename": n, "size": len(c)} for n, c in files]
        info = {"id": repo, "modelId": repo, "sha": SHA, "siblings": siblings, "tags": []}
        return self._reply(200, json.dumps(tree if what == "tree" else info).encode())

    def _file(self, content: bytes | None, name: str) -> None:
        if content is None:
            return self._reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        start, end = 0, len(content)
        bounds = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if bounds and self.server.ranges:
            start, end = int(bounds[1]), min(end, int(bounds[2] or end) + 1)
        partial = end - start < len(content)
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA}
        if partial:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        if self.command == "GET":
            self.server.asked.append((name, self.headers.get("Range", "")))
        if self.command == "GET" and self.server.cuts:
            self.server.cuts -= 1
            self.close_connection = True
            return self._reply(200, content[: len(content) // 2], headers, len(content))
        if self.command == "GET":
            self.server.sent += end - start
        return self._reply(206 if partial else 200, content[start:end], headers)

    def _reply(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, size: int = -1
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if size < 0 else size))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.pause is not None and "ETag" in (headers or {}):
            self.server.paused.set()
            self.server.pause.wait(30)
        with suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)


@contextmanager
def serve() -> Iterator[FakeHub]:
    """One that answers until the end of the block."""
    with FakeHub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
