"""`utils.download` and `python -m CLIP.download` against a server in a thread that misbehaves on request."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from CLIP import download as command
from utils import InputError, Unreachable, download

ROOT = Path(__file__).parents[2]
CONTENT = random.Random(336).randbytes(1_500_000)
SUM = hashlib.sha256(CONTENT).hexdigest()
HALF = len(CONTENT) // 2


class Server(ThreadingHTTPServer):
    """Serves CONTENT; the attributes say how badly, `requests` what was asked for."""

    daemon_threads = True
    ranges = True  # honours Range
    wrong_piece = False  # answers a Range with another one
    drops = 0  # this many answers stop half way
    statuses: tuple[int, ...] = ()  # given before the real answer
    page = False  # answers with a log-in page
    location = ""  # where a redirect leads

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str | None] = []

    def address(self, sha256: str = SUM) -> str:
        """Where CONTENT lies, under the sum that it should have."""
        return f"http://127.0.0.1:{self.server_port}/models/{sha256}/weights.pt"


class Handler(BaseHTTPRequestHandler):
    """One answer, as the server's attributes say."""

    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append(wanted)
        if server.statuses:
            status, *rest = server.statuses
            server.statuses = tuple(rest)
            return self.send_error(status)
        if server.location:
            return self.answer(302, b"", {"Location": server.location})
        if server.page:
            return self.answer(200, b"<html>log in first</html>", {"Content-Type": "text/html; charset=utf-8"})
        if wanted and server.wrong_piece:
            return self.answer(206, CONTENT[:10], {"Content-Range": f"bytes 0-9/{len(CONTENT)}"})
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
        if start >= len(CONTENT):
            return self.send_error(416)
        headers = {"Content-Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"} if start else {}
        return self.answer(206 if start else 200, CONTENT[start:], headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.server.drops:
            self.server.drops -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda _: None)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "weights.pt"


@pytest.fixture
def part(out: Path) -> Path:
    """The beginning, from an earlier call."""
    out.parent.mkdir()
    path = out.with_name("weights.pt.part")
    path.write_bytes(CONTENT[:1000])
    return path


def whole(out: Path) -> bool:
    return out.read_bytes() == CONTENT and [file.name for file in out.parent.iterdir()] == [out.name]


def refused(server: Server, out: Path, *words: str, url: str = "", kind: type[InputError] = InputError) -> None:
    with pytest.raises(kind) as caught:
        download(url or server.address(), out, SUM)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text
    assert not out.exists()


def test_fetches_then_finds_it_there(server: Server, out: Path) -> None:
    assert download(server.address(), out, SUM[:8])
    assert whole(out)
    assert not download(server.address(), out, SUM)
    assert not download(server.address(), out)
    assert server.requests == [None]


def test_resumes_when_the_connection_drops(server: Server, out: Path) -> None:
    server.drops = 2
    assert download(server.address(), out, SUM)
    assert whole(out)
    first, second, third = server.requests
    assert first is None
    for wanted, expected in ((second, HALF), (third, HALF + HALF // 2)):  # at most two pieces are asked for again
        assert expected - 2 * 2**16 < int(wanted.removeprefix("bytes=").removesuffix("-")) <= expected


def test_the_next_call_goes_on(server: Server, out: Path) -> None:
    server.drops = 4
    refused(server, out, server.address(), kind=Unreachable)
    kept = out.with_name("weights.pt.part").read_bytes()
    assert len(kept) > len(CONTENT) * 0.7
    assert CONTENT.startswith(kept)
    server.requests.clear()
    assert download(server.address(), out, SUM)
    assert whole(out)
    assert server.requests == [f"bytes={len(kept)}-"]


@pytest.mark.parametrize("how", ["no ranges", "a whole part"])
def test_other_servers_and_parts(server: Server, out: Path, part: Path, how: str) -> None:
    server.ranges = how != "no ranges"
    if how == "a whole part":
        part.write_bytes(CONTENT)
    assert download(server.address(), out, SUM)
    assert whole(out)


@pytest.mark.parametrize("how", ["another piece", "another beginning", "too long"])
def test_what_is_not_right_is_removed_and_the_next_call_succeeds(
    server: Server, out: Path, part: Path, how: str
) -> None:
    server.wrong_piece = how == "another piece"
    if not server.wrong_piece:
        part.write_bytes(b"not the beginning" if how == "another beginning" else CONTENT + b"more")
    refused(server, out, "wrong SHA-256", "try again")
    assert not list(out.parent.iterdir())
    assert download(server.address(), out, SUM)


def test_a_page_never_replaces_a_good_part(server: Server, out: Path, part: Path) -> None:
    server.page = True
    refused(server, out, "web page", kind=Unreachable)
    assert part.read_bytes() == CONTENT[:1000]


def test_servers_that_refuse(server: Server, out: Path) -> None:
    server.statuses = (404,)
    refused(server, out, "404", server.address(), kind=Unreachable)
    assert len(server.requests) == 1  # no second attempt
    server.statuses = (503, 429)
    assert download(server.address(), out, SUM)


def test_another_file_under_the_name_is_kept(server: Server, out: Path) -> None:
    out.parent.mkdir()
    out.write_text("mine")
    with pytest.raises(InputError, match="move it away"):
        download(server.address(), out, SUM)
    assert out.read_text() == "mine"
    with pytest.raises(InputError, match="move it away"):
        download(server.address(), out.parent, SUM)  # a folder
    assert not server.requests


@pytest.mark.parametrize("url", ["http://[::1/x", "https://", "http://x:99999/x", "file:///etc/hostname"])
def test_addresses_that_are_none(server: Server, out: Path, url: str) -> None:
    refused(server, out, "check the address", url=url)
    if url.startswith("http:"):
        server.location = url
        refused(server, out, "check the address")


def test_a_password_in_an_address_is_not_told(server: Server, out: Path) -> None:
    secret = server.address().replace("http://", "http://me:secret@")
    server.statuses = (404,)
    for url in (secret, secret.replace(str(server.server_port), "9"), "ftp://me:secret@host/x"):
        with pytest.raises(InputError) as caught:
            download(url, out, SUM)
        assert "secret" not in str(caught.value)
        assert "***@" in str(caught.value)


def run(arguments: list[str | Path], before: str = "") -> subprocess.CompletedProcess[str]:
    words = " ".join(map(str, [sys.executable, "-m", "CLIP.download", *arguments]))
    environment = os.environ | {"no_proxy": "127.0.0.1"}
    return subprocess.run(
        ["bash", "-c", f"{before} exec {words}"], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def test_the_command(server: Server, out: Path) -> None:
    result = run(["ViT-L-14-336", "--url", server.address(), "--out", out])
    assert result.returncode == 0, result.stderr
    assert whole(out)
    assert (str(out) in result.stdout, result.stderr) == (True, "")  # no bar where there is no terminal


def test_a_full_disk_is_one_line_and_keeps_what_fits(server: Server, out: Path) -> None:
    """A limit on the size of files stands for the disk."""
    result = run(["ViT-L-14-336", "--url", server.address(), "--out", out], before="ulimit -f 256;")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "make room" in result.stderr
    kept = out.with_name("weights.pt.part").read_bytes()
    assert CONTENT.startswith(kept) and kept


@pytest.mark.parametrize(
    ("model", "url", "words"),
    [
        ("ViT-tiny-14-56", "http://127.0.0.1:9/x.pt", "no address of published weights is known"),
        ("ViT-X", "http://127.0.0.1:9/x.pt", "ViT-X: unknown"),
        ("ViT-H-14", "http://127.0.0.1:9/x.pt", "put the file's SHA-256 into it"),
        ("ViT-L-14-336", "http://127.0.0.1:9/x.pt", "cannot reach"),  # the published sum counts
        ("ViT-L-14-336", "file:///etc/hostname", "https:// or http://"),
    ],
)
def test_what_the_command_line_refuses(server: Server, out: Path, model: str, url: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        command.main([model, "--url", url, "--out", str(out)])
