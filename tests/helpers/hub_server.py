"""A server that speaks enough of the Hugging Face hub's protocol for huggingface_hub's downloads."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


class HubServer(ThreadingHTTPServer):
    """Serves folders as repositories; the attributes say how badly, `log` what was asked for."""

    daemon_threads = True
    drops = 0  # this many file bodies stop half way
    gated: tuple[str, ...] = ()
    wrong_bytes = False  # bodies of the right length with other content

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.log: list[tuple[str, str, str | None]] = []  # method, file, Range

    @property
    def address(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def _answer(self) -> None:
        server = self.server
        repository, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if not rest:
            return self._refuse(404, "EntryNotFound")
        server.log.append((self.command, name, self.headers.get("Range")))
        if repository in server.gated:
            return self._refuse(403, "GatedRepo")
        if repository not in server.repositories:
            return self._refuse(401, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        path = server.repositories[repository] / name
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        return self._send(path.read_bytes())

    def _send(self, content: bytes) -> None:
        server, wanted = self.server, self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        body = bytes(len(content) - start) if server.wrong_bytes else content[start:]
        if server.drops and len(body) > 100_000:
            server.drops -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = _answer

    def log_message(self, *_: object) -> None:
        """Say nothing."""


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
