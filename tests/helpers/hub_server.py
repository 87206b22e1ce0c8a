"""A file server with range requests and the part of the Hugging Face hub's protocol that downloads need."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


class HubServer(ThreadingHTTPServer):
    """Serves folders as repositories. The attributes set how requests fail; `log` lists the requests."""

    daemon_threads = True
    drops = 0  # number of file bodies that end half way
    gated: tuple[str, ...] = ()
    statuses: tuple[int, ...] = ()  # status codes sent before the real answers
    page = False  # whether the answer is a log-in page

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.log: list[tuple[str, str, str | None]] = []  # method, file, Range

    @property
    def address(self) -> str:
        """URL of the server, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def _answer(self) -> None:
        server = self.server
        repository, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if not rest:
            return self._send(404, code="EntryNotFound")
        server.log.append((self.command, name, self.headers.get("Range")))
        if server.statuses:
            status, *rest = server.statuses
            server.statuses = tuple(rest)
            return self._send(status)
        if server.page:
            return self._send(200, b"<html>log in first</html>", kind="text/html; charset=utf-8")
        if repository in server.gated:
            return self._send(403, code="GatedRepo")
        if repository not in server.repositories:
            return self._send(401, code="RepoNotFound")
        if revision not in ("main", COMMIT):
            return self._send(404, code="RevisionNotFound")
        path = server.repositories[repository] / name
        return self._send_file(path.read_bytes()) if path.is_file() else self._send(404, code="EntryNotFound")

    def _send_file(self, content: bytes) -> None:
        server, wanted = self.server, self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if start >= len(content):
            return self._send(416)
        body = content[start:]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        sent = len(body)
        if server.drops and self.command == "GET" and len(body) > 100_000:
            server.drops -= 1
            sent //= 2
        return self._send(206 if wanted else 200, body, sent=sent, headers=headers)

    def _send(
        self, status: int, body: bytes = b"", code: str = "", kind: str = "application/octet-stream",
        sent: int | None = None, headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])

    do_GET = do_HEAD = _answer

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def hub_server(repositories: dict[str, Path]) -> Iterator[HubServer]:
    """A running server."""
    with HubServer(repositories) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
