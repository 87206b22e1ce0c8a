"""`python -m CLIP.download` against a server in a thread that misbehaves on request.

The usual courses are run as a user runs them; rarer ones inside this process, as starting a command takes seconds.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from CLIP import download
from utils import run_cli

ROOT = Path(__file__).parents[2]
CONTENT = random.Random(336).randbytes(1_500_000)
ENVIRONMENT = os.environ | {"no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1"}
Fetch = Callable[..., subprocess.CompletedProcess[str]]
SUM = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT; the attributes say how badly, `requests` what was asked for."""

    daemon_threads = True
    ranges = True  # honours Range
    drops = 0  # this many answers stop half way
    statuses: tuple[int, ...] = ()  # answers given before the real one; the last one stays for good if `stuck`
    stuck = False
    no_length = False
    wrong_piece = False  # answers a Range with another one
    page = ""  # answers every request with this content type, and a page
    length = ""  # what Content-Length says instead
    location = ""  # where a redirect leads
    stalls = 0  # this many answers fall silent half way

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str | None] = []

    def handle_error(self, *_: object) -> None:
        """A client that leaves early is what some tests want."""

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
            server.statuses = server.statuses if server.stuck else tuple(rest)
            self.send_error(status)
            return
        if server.location:
            self.send_response(302)
            self.send_header("Location", server.location)
            self.end_headers()
            return
        if server.page:
            self.send_response(200)
            self.send_header("Content-Type", server.page)
            self.end_headers()
            self.wfile.write(b"<html>log in first</html>")
            return
        if wanted and server.wrong_piece:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes 0-9/{len(CONTENT)}")
            self.end_headers()
            self.wfile.write(CONTENT[:10])
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        body = CONTENT[start:]
        self.send_response(206 if wanted and server.ranges else 200)
        if wanted and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        if not server.no_length:
            self.send_header("Content-Length", server.length or str(len(body)))
        self.end_headers()
        if server.drops:
            server.drops -= 1
            body = body[: len(body) // 2]
        if server.stalls:
            server.stalls -= 1
            self.wfile.write(body[: len(body) // 2])
            time.sleep(2)
            return
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in the project's root, past any proxy."""
    return subprocess.run(
        [sys.executable, "-m", "CLIP.download", *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def fetch(url: str, out: Path) -> subprocess.CompletedProcess[str]:
    return run("ViT-L-14-336", "--url", url, "--out", out)


@pytest.fixture
def fetch_here(monkeypatch: pytest.MonkeyPatch) -> Fetch:
    """Do the same in this process, with short pauses."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.01)

    def fetch_here(url: str, out: Path, model: str = "ViT-L-14-336") -> subprocess.CompletedProcess[str]:
        arguments = [model, "--url", url, "--out", str(out)]
        stdout, stderr = io.StringIO(), io.StringIO()
        with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as ended:
            run_cli(lambda: download.main(arguments))
        return subprocess.CompletedProcess(arguments, ended.value.code, stdout.getvalue(), stderr.getvalue())

    return fetch_here


def succeeds(result: subprocess.CompletedProcess[str], out: Path) -> None:
    assert result.returncode == 0, result.stderr
    assert out.read_bytes() == CONTENT
    assert result.stdout.startswith(f"{out}: ")
    assert result.stderr == ""  # no bar where there is no terminal
    assert [file.name for file in out.parent.iterdir()] == [out.name]


def position(wanted: str | None) -> int:
    """Where a Range begins."""
    return int(wanted.removeprefix("bytes=").removesuffix("-"))


def fails(result: subprocess.CompletedProcess[str], out: Path, *words: str) -> None:
    """One clear line, code 2, and nothing under the final name."""
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
    assert not out.exists()


def test_fetches_then_finds_it_there(server: Server, tmp_path: Path, fetch_here: Fetch) -> None:
    out = tmp_path / "new" / "weights.pt"
    result = fetch(server.address(), out)
    succeeds(result, out)
    assert "fetched" in result.stdout
    result = fetch_here(server.address(), out)
    succeeds(result, out)
    assert "already there" in result.stdout
    assert server.requests == [None]


def test_resumes_when_the_connection_drops(server: Server, tmp_path: Path) -> None:
    server.drops = 2
    succeeds(fetch(server.address(), tmp_path / "weights.pt"), tmp_path / "weights.pt")
    half = len(CONTENT) // 2
    first, second, third = server.requests
    assert first is None
    assert half - download.CHUNK_BYTES < position(second) <= half  # at most the piece being read is asked for again
    left = len(CONTENT) - position(second)
    assert position(second) + left // 2 - download.CHUNK_BYTES < position(third) <= position(second) + left // 2


def test_a_dropping_server_is_given_up_and_resumed_by_the_next_run(
    server: Server, tmp_path: Path, fetch_here: Fetch
) -> None:
    out, part = tmp_path / "weights.pt", tmp_path / "weights.pt.part"
    server.drops = 4
    fails(fetch_here(server.address(), out), out, "after 4 attempts", "connection closed", "run this again", str(part))
    assert part.read_bytes() == CONTENT[: part.stat().st_size]
    assert part.stat().st_size > len(CONTENT) * 0.9 - 2 * download.CHUNK_BYTES
    have = part.stat().st_size
    server.requests.clear()
    succeeds(fetch_here(server.address(), out), out)
    assert server.requests == [f"bytes={have}-"]


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.ranges, server.drops = False, 1
    (tmp_path / "weights.pt.part").write_bytes(CONTENT[:1000])
    succeeds(fetch(server.address(), tmp_path / "weights.pt"), tmp_path / "weights.pt")
    assert server.requests == ["bytes=1000-", "bytes=1000-"]


def test_a_whole_part_needs_no_byte_more(server: Server, tmp_path: Path, fetch_here: Fetch) -> None:
    (tmp_path / "weights.pt.part").write_bytes(CONTENT)
    succeeds(fetch_here(server.address(), tmp_path / "weights.pt"), tmp_path / "weights.pt")


def test_wrong_sum(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "weights.pt"
    fails(fetch(server.address("0" * 64), out), out, "wrong SHA-256", SUM, "removed", "try again")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", [b"not the beginning of it", CONTENT + b"more"])
def test_a_part_of_something_else(server: Server, tmp_path: Path, part: bytes, fetch_here: Fetch) -> None:
    out = tmp_path / "weights.pt"
    (tmp_path / "weights.pt.part").write_bytes(part)
    fails(fetch_here(server.address(), out), out, "wrong SHA-256", "removed", "try again")
    assert not list(tmp_path.iterdir())
    succeeds(fetch_here(server.address(), out), out)


def test_another_piece_than_asked_for_is_not_appended(server: Server, tmp_path: Path, fetch_here: Fetch) -> None:
    server.wrong_piece = True
    (tmp_path / "weights.pt.part").write_bytes(CONTENT[:1000])
    succeeds(fetch_here(server.address(), tmp_path / "weights.pt"), tmp_path / "weights.pt")
    assert server.requests == ["bytes=1000-", None]


def test_a_server_that_falls_silent(
    server: Server, tmp_path: Path, fetch_here: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    server.stalls = 1
    succeeds(fetch_here(server.address(), tmp_path / "weights.pt"), tmp_path / "weights.pt")
    first, second = server.requests
    assert first is None
    assert len(CONTENT) // 2 - download.CHUNK_BYTES < position(second) <= len(CONTENT) // 2


def test_an_answer_without_length_that_drops_is_noticed(server: Server, tmp_path: Path, fetch_here: Fetch) -> None:
    server.no_length, server.drops = True, 1
    fails(fetch_here(server.address(), tmp_path / "weights.pt"), tmp_path / "weights.pt", "wrong SHA-256")


def test_an_address_without_a_sum_must_give_the_published_file(
    server: Server, tmp_path: Path, fetch_here: Fetch
) -> None:
    url = f"http://127.0.0.1:{server.server_port}/mirror/weights.pt"
    published = "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"
    fails(fetch_here(url, tmp_path / "weights.pt"), tmp_path / "weights.pt", f"not {published}")


def test_another_file_under_the_name_is_kept(server: Server, tmp_path: Path, fetch_here: Fetch) -> None:
    out = tmp_path / "weights.pt"
    out.write_text("mine")
    result = fetch_here(server.address(), out)
    assert result.returncode == 2
    assert "move it away" in result.stderr
    assert out.read_text() == "mine"
    assert fetch_here(server.address(), tmp_path).returncode == 2  # a folder
    assert not server.requests


def test_not_found(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "weights.pt"
    server.statuses = (404,)
    fails(fetch(server.address(), out), out, "404 Not Found", server.address())
    assert len(server.requests) == 1  # no second attempt


def test_busy_servers(server: Server, tmp_path: Path, fetch_here: Fetch) -> None:
    out = tmp_path / "weights.pt"
    server.statuses = (503, 429)
    succeeds(fetch_here(server.address(), out), out)
    out.unlink()
    server.statuses, server.stuck = (500,), True
    fails(fetch_here(server.address(), out), out, "500 Internal Server Error", "4 attempts", "nothing arrived")


def test_nobody_answers(server: Server, tmp_path: Path, fetch_here: Fetch) -> None:
    server.server_close()
    fails(
        fetch_here(server.address(), tmp_path / "weights.pt"), tmp_path / "weights.pt", "refused", "check the network"
    )


def test_full_disk(server: Server, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; what fits stays for the next run."""
    out = tmp_path / "weights.pt"
    command = f"ulimit -f 256; exec {sys.executable} -m CLIP.download ViT-L-14-336 --url {server.address()} --out {out}"
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    fails(result, out, "File too large", "make room")
    part = (tmp_path / "weights.pt.part").read_bytes()
    assert part == CONTENT[: len(part)] != b""


def test_a_folder_that_cannot_be(server: Server, tmp_path: Path, fetch_here: Fetch) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "weights.pt"
    result = fetch_here(server.address(), out)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "choose another --out" in result.stderr


def test_what_the_command_line_refuses(server: Server, tmp_path: Path, fetch_here: Fetch) -> None:
    out = tmp_path / "weights.pt"
    result = fetch_here(server.address(), out, "ViT-tiny-14-56")
    fails(result, out, "no address of published weights is known for ViT-tiny-14-56", "--weights FILE")
    fails(fetch_here(server.address(), out, "ViT-X"), out, "ViT-X: unknown", "ViT-L-14-336")
    mirror = f"http://127.0.0.1:{server.server_port}/weights.pt"
    fails(fetch_here(mirror, out, "ViT-H-14"), out, "put the file's SHA-256 into it")
    fails(fetch_here("file:///etc/hostname", out), out, "https:// or http://")
    assert not server.requests


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
def test_a_page_never_replaces_a_good_part(server: Server, tmp_path: Path, fetch_here: Fetch, kind: str) -> None:
    """A portal answers 200 with a page, whatever it calls it; afterwards the download goes on."""
    out, part = tmp_path / "weights.pt", tmp_path / "weights.pt.part"
    part.write_bytes(CONTENT[:1000])
    server.page = kind
    fails(fetch_here(server.address(), out), out, "kept in" if "html" in kind else f"{part} is kept")
    assert part.read_bytes() == CONTENT[:1000]
    assert [file.name for file in tmp_path.iterdir()] == [part.name]
    server.page = ""
    server.requests.clear()
    succeeds(fetch_here(server.address(), out), out)
    assert server.requests == ["bytes=1000-"]


def test_a_wrong_piece_and_a_wrong_whole_keep_the_part(server: Server, tmp_path: Path, fetch_here: Fetch) -> None:
    out, part = tmp_path / "weights.pt", tmp_path / "weights.pt.part"
    part.write_bytes(CONTENT[:1000])
    server.wrong_piece = True
    url = f"http://127.0.0.1:{server.server_port}/models/{'0' * 64}/weights.pt"
    fails(fetch_here(url, out), out, "wrong SHA-256", f"{part} is kept")
    assert part.read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("length", ["abc", "9" * 5000, "-5", "1, 2"])
def test_a_content_length_that_is_none(server: Server, tmp_path: Path, fetch_here: Fetch, length: str) -> None:
    out = tmp_path / "weights.pt"
    server.length = length
    result = fetch_here(server.address(), out)
    if result.returncode == 0:
        succeeds(result, out)
    else:
        fails(result, out)


@pytest.mark.parametrize("location", ["http://[::1", "file:///etc/hostname", "http://127.0.0.1:1/\u00e4", "http://"])
def test_a_redirect_to_nowhere(server: Server, tmp_path: Path, fetch_here: Fetch, location: str) -> None:
    server.location = location.encode().decode("latin-1")
    fails(fetch_here(server.address(), tmp_path / "weights.pt"), tmp_path / "weights.pt", server.address())


@pytest.mark.parametrize("host", ["\u00e4.invalid", "[::1", "a" * 300, "127.0.0.1:99999", "\udcff", ""])
def test_addresses_that_are_none(tmp_path: Path, fetch_here: Fetch, host: str) -> None:
    fails(fetch_here(f"http://{host}/{SUM}/w.pt", tmp_path / "weights.pt"), tmp_path / "weights.pt")


def test_a_redirect_in_circles(server: Server, tmp_path: Path, fetch_here: Fetch) -> None:
    server.location = server.address()
    fails(fetch_here(server.address(), tmp_path / "weights.pt"), tmp_path / "weights.pt", "redirects")


def test_a_pipe_as_part_is_refused_and_not_read(server: Server, tmp_path: Path, fetch_here: Fetch) -> None:
    out = tmp_path / "weights.pt"
    os.mkfifo(tmp_path / "weights.pt.part")
    fails(fetch_here(server.address(), out), out, "weights.pt.part is a folder, a device or a pipe")
    assert not server.requests
    (tmp_path / "weights.pt.part").unlink()
    os.mkfifo(out)
    result = fetch_here(server.address(), out)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)


def test_a_password_in_an_address_is_not_printed(server: Server, tmp_path: Path, fetch_here: Fetch) -> None:
    url = server.address().replace("http://", "http://me:secret@")
    out = tmp_path / "weights.pt"
    fetched, again = fetch_here(url, out), fetch_here(url, out)
    assert (fetched.returncode, again.returncode) == (0, 0)
    server.statuses = (404,)
    missing = fetch_here(url, tmp_path / "other.pt")
    wrong = fetch_here(url.replace(SUM, "0" * 64), tmp_path / "other.pt")
    scheme = fetch_here("ftp://me:secret@host/x", tmp_path / "other.pt")
    for result in (fetched, again, missing, wrong, scheme):
        assert "secret" not in result.stdout + result.stderr
    assert "***@127.0.0.1" in missing.stderr
    assert "***@127.0.0.1" in fetched.stdout


def test_a_netrc_that_is_a_pipe_is_not_read(server: Server, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    os.mkfifo(tmp_path / "home" / ".netrc")
    out = tmp_path / "out" / "weights.pt"
    result = subprocess.run(
        [sys.executable, "-m", "CLIP.download", "ViT-L-14-336", "--url", server.address(), "--out", out],
        cwd=ROOT, env=ENVIRONMENT | {"HOME": str(tmp_path / "home")}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    succeeds(result, out)


def test_a_proxy_of_the_environment_is_used(
    server: Server, tmp_path: Path, fetch_here: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    succeeds(fetch_here(f"http://nowhere.invalid/{SUM}/weights.pt", tmp_path / "weights.pt"), tmp_path / "weights.pt")
    assert server.requests == [None]
