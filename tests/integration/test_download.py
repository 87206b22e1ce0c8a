"""`utils.download` against a local server that can be told to fail."""

import hashlib
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.hub_server import HubServer, hub_server
from utils import InputError, Unreachable, download

CONTENT = random.Random(336).randbytes(1_500_000)
SUM = hashlib.sha256(CONTENT).hexdigest()
HALF = len(CONTENT) // 2


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda _: None)
    (tmp_path / "served" / SUM).mkdir(parents=True)
    (tmp_path / "served" / SUM / "weights.pt").write_bytes(CONTENT)
    with hub_server({"me/model": tmp_path / "served"}) as running:
        yield running


@pytest.fixture
def url(server: HubServer) -> str:
    """URL of CONTENT, which contains its SHA-256."""
    return f"{server.address}/me/model/resolve/main/{SUM}/weights.pt"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "weights.pt"


def whole(out: Path) -> bool:
    return out.read_bytes() == CONTENT and [file.name for file in out.parent.iterdir()] == [out.name]


def refused(url: str, out: Path, *words: str, kind: type[InputError] = InputError) -> None:
    with pytest.raises(kind) as caught:
        download(url, out, SUM)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text
    assert not out.exists()


def ranges(server: HubServer) -> list[str | None]:
    """The requested ranges."""
    return [wanted for method, _, wanted in server.log if method == "GET"]


def test_fetches_once(server: HubServer, url: str, out: Path) -> None:
    assert download(url, out, SUM[:8])
    assert whole(out)
    assert not download(url, out, SUM)
    assert ranges(server) == [None]


def test_resumes_after_dropped_connections_and_in_the_next_call(server: HubServer, url: str, out: Path) -> None:
    server.drops = 2
    assert download(url, out, SUM)
    assert whole(out)
    first, second, third = ranges(server)
    assert first is None
    for wanted, expected in ((second, HALF), (third, HALF + HALF // 2)):  # at most two chunks are requested again
        assert expected - 2 * 2**16 < int(wanted.removeprefix("bytes=").removesuffix("-")) <= expected
    out.unlink()
    server.drops = 4
    refused(url, out, url, kind=Unreachable)
    kept = out.with_name("weights.pt.part").read_bytes()
    assert len(kept) > len(CONTENT) * 0.7
    server.log.clear()
    assert download(url, out, SUM)
    assert whole(out)
    assert ranges(server) == [f"bytes={len(kept)}-"]


def test_corrupt_file_is_removed_and_the_next_call_succeeds(url: str, out: Path) -> None:
    out.parent.mkdir()
    out.with_name("weights.pt.part").write_bytes(b"not the beginning")
    refused(url, out, "SHA-256")
    assert not list(out.parent.iterdir())
    assert download(url, out, SUM)


def test_server_errors(server: HubServer, url: str, out: Path) -> None:
    """Log-in pages and 404 are errors that keep the partial file; 503 and 429 are retried."""
    out.parent.mkdir()
    part = out.with_name("weights.pt.part")
    part.write_bytes(CONTENT[:1000])
    server.page = True
    refused(url, out, "web page", kind=Unreachable)
    server.page, server.statuses = False, (404,)
    refused(url, out, "404", url, kind=Unreachable)
    assert part.read_bytes() == CONTENT[:1000]
    server.statuses = (503, 429)
    assert download(url, out, SUM)


def test_password_in_a_url_is_not_printed(server: HubServer, url: str, out: Path) -> None:
    server.statuses = (404,)
    secret = url.replace("http://", "http://me:secret@")
    for address in (secret, "ftp://me:secret@host/x"):
        with pytest.raises(InputError) as caught:
            download(address, out, SUM)
        assert "secret" not in str(caught.value)
        assert "***@" in str(caught.value)


def test_full_disk_gives_one_line_and_keeps_the_partial_file(server: HubServer, url: str, out: Path) -> None:
    """A full disk (here a limit on the file size) gives one error line; the partial file is kept."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, hard))
    try:
        refused(url, out, out.name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = out.with_name("weights.pt.part").read_bytes()
    assert CONTENT.startswith(kept) and kept
