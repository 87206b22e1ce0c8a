"""Servers, addresses and caches that lie, through `python -m CLIP.download`: what has arrived is never lost."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tests.helpers.attacks import fine, refused

CONTENT = bytes(range(256)) * 400
SHA = hashlib.sha256(CONTENT).hexdigest()
DIRECT = {"no_proxy": "*", "NO_PROXY": "*"}


class Liar(BaseHTTPRequestHandler):
    """Answers every request alike."""

    status: ClassVar[int] = 200
    headers_sent: ClassVar[dict[str, str]] = {}
    body: ClassVar[bytes] = CONTENT

    def do_GET(self) -> None:
        self.send_response(self.status)
        for name, value in self.headers_sent.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def address() -> Iterator[str]:
    """A server that tells the truth, until a test makes it lie."""
    Liar.status, Liar.headers_sent, Liar.body = 200, {"Content-Length": str(len(CONTENT))}, CONTENT
    with ThreadingHTTPServer(("127.0.0.1", 0), Liar) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/{SHA}/model.pt"
        finally:
            server.shutdown()


def fetch(command, address: str, out: Path):
    """Start the command, past any proxy."""
    return command("CLIP.download", "ViT-B-16", "--url", address, "--out", out, env=DIRECT)


@pytest.mark.parametrize("what", ["a page", "a page called a file", "another piece", "no piece"])
def test_a_good_part_outlives_a_portal(command, address, tmp_path, what):
    """A log-in page answered with 200, a wrong Content-Range: the part stays, and the next try ends the download."""
    out, part = tmp_path / "model.pt", tmp_path / "model.pt.part"
    part.write_bytes(CONTENT[:5000])
    page = b"<html>log in</html>"
    Liar.body = page
    Liar.headers_sent = {"Content-Type": "text/html" if what == "a page" else "application/octet-stream"}
    if what == "another piece":
        Liar.status, Liar.headers_sent = 206, {"Content-Range": f"bytes 9-27/{len(CONTENT)}"}
    if what == "no piece":
        Liar.status = 206
    result = fetch(command, address, out)
    refused(result)
    assert part.read_bytes() == CONTENT[:5000]
    assert not out.exists()
    Liar.status, Liar.headers_sent, Liar.body = 200, {"Content-Length": str(len(CONTENT))}, CONTENT
    fine(fetch(command, address, out))
    assert out.read_bytes() == CONTENT


@pytest.mark.parametrize("length", ["abc", "9" * 5000, "-5", ""])
def test_a_content_length_that_is_no_number_is_survived(command, address, tmp_path, length):
    """The SHA-256 says whether the file is whole."""
    Liar.headers_sent = {"Content-Length": length} if length else {}
    result = fetch(command, address, tmp_path / "model.pt")
    assert "Traceback" not in result.stderr
    assert result.returncode in (0, 2)
    if result.returncode == 0:
        assert (tmp_path / "model.pt").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "location", ["http://[::1", "http://\udcff", "file:///etc/passwd", "http://xn--\u00e9:99999/", "/"]
)
def test_a_redirect_to_nowhere_is_refused(command, address, tmp_path, location):
    """In one line, and nothing of this machine is read."""
    Liar.status, Liar.body = 302, b""
    Liar.headers_sent = {
        "Location": location.encode("utf-8", "surrogateescape").decode("latin-1"),
        "Content-Length": "0",
    }
    refused(fetch(command, address, tmp_path / "model.pt"))
    assert not list(tmp_path.glob("model.pt"))


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://b\u00fccher\u2028.invalid", "https://", "http://a b", "http://x:99999"]
)
def test_an_address_that_is_none_is_refused(command, tmp_path, url):
    """Non-ASCII names, broken brackets, impossible ports."""
    refused(command("CLIP.download", "ViT-B-16", "--url", f"{url}/{SHA}/x.pt", "--out", tmp_path / "x.pt", env=DIRECT))


@pytest.mark.parametrize("name", ["model.pt.part", "model.pt.part.new", "model.pt"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(command, address, tmp_path, name):
    """The part, the piece beside it, the file itself."""
    os.mkfifo(tmp_path / name)
    refused(fetch(command, address, tmp_path / "model.pt"), "model.pt")
