"""Fetch OpenAI's weights: `python -m CLIP.download ViT-L-14-336`. Resumes, and checks the SHA-256."""

from __future__ import annotations

import argparse
import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from utils import InputError, Parser, run_cli

from .openai import sha256_file

# OpenAI's address carries the file's SHA-256 as its last folder.
URLS = {
    "ViT-L-14-336": "https://openaipublic.azureedge.net/clip/models/"
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt"
}
CKPT_FOLDER = Path(__file__).parent / "ckpt"
ATTEMPTS = 4
FIRST_PAUSE = 0.5  # seconds before the second attempt, doubled before each further one
TIMEOUT = 30  # seconds without a byte
PIECE = 2**18


class _Dropped(Exception):
    """The connection ended before the file did."""


def download(url: str, target: Path, sha256: str) -> bool:
    """Fetch `url` to `target` and return True, or False where `target` is that file already.

    What has arrived lies in `target`.part, from where the next call goes on; the final name appears only once the
    SHA-256 is right. Raises an InputError for a wrong sum, a refusing server, no network and a full disk.
    """
    if target.exists():
        if target.is_file() and sha256_file(target) == sha256:
            return False
        raise InputError(
            f"{target} exists and is not the file of {url} (SHA-256): move it away or choose another --out"
        )
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part)
        found = sha256_file(part)
        if found != sha256:
            part.unlink()
            raise InputError(f"{url} gave a file with the wrong SHA-256 ({found}, not {sha256}), removed: try again")
        part.replace(target)
    except OSError as error:  # of files only: those of the network end in _fetch
        raise InputError(
            f"cannot write {part}: {error.strerror or error}; make room or choose another --out"
        ) from error
    return True


def _fetch(url: str, part: Path) -> None:
    """Bring `part` to its end, in a few attempts that each go on where the one before stopped."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
        try:
            return _fetch_once(url, part)
        except _Dropped as error:
            reason = error
    held = f"{part.stat().st_size / 2**20:.1f} MiB are kept in {part}" if part.exists() else "nothing arrived"
    raise InputError(
        f"cannot fetch {url} after {ATTEMPTS} attempts ({reason}); {held}: check the network and run this again, "
        "or copy the file there by other means"
    )


def _fetch_once(url: str, part: Path) -> None:
    """Append what `part` lacks; `_Dropped` where another attempt may help."""
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing lies beyond `have`: the file is whole, or its sum will not be right
            return
        if error.code == 429 or error.code >= 500:
            raise _Dropped(f"the server answers {error.code} {error.reason}") from error
        raise InputError(f"the server answers {error.code} {error.reason} for {url}: check the address") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Dropped(str(getattr(error, "reason", error)) or type(error).__name__) from error
    with response:
        resumes = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status == 206 and not resumes:
            part.unlink(missing_ok=True)
            raise _Dropped("the server sent another piece than was asked for")
        _copy(response, part, have if resumes else 0)


def _copy(response: http.client.HTTPResponse, part: Path, have: int) -> None:
    """Write the answer to `part` from byte `have` on, under a progress bar (none where stderr is no terminal)."""
    length = response.headers.get("Content-Length")
    total = have + int(length) if length else None
    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None)
    with bar, part.open("ab" if have else "wb") as file:
        while (total is None or have < total) and (piece := _read(response)):
            file.write(piece)
            have += len(piece)
            bar.update(len(piece))
    if total is not None and have < total:
        raise _Dropped(f"the connection closed at {have} of {total} bytes")


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(PIECE)  # what has come, so that a connection that ends loses nothing
    except (OSError, http.client.HTTPException) as error:
        raise _Dropped(str(error) or type(error).__name__) from error


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m CLIP.download", description="Fetch OpenAI's CLIP weights.")
    parser.add_argument("model", help="ViT-L-14-336, the model whose weights OpenAI published")
    parser.add_argument("--out", type=Path, help="where the file goes (CLIP/ckpt/<the name in the address>)")
    parser.add_argument("--url", help="another address of the file; a SHA-256 in its path is the one that must match")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 once the file is in place."""
    args = _parse(argv)
    if args.model not in URLS:
        raise InputError(
            f"OpenAI published no weights of {args.model}, only of {', '.join(URLS)}. For ViT-B-16-plus-240 get the "
            "LAION-400M weights from open_clip and pass them with --weights FILE"
        )
    official = URLS[args.model]
    url = args.url or official
    if not url.startswith(("https://", "http://")):
        raise InputError(f"--url {url}: the address must start with https:// or http://")
    sha256 = _sum_in(url) or _sum_in(official)
    target = args.out or CKPT_FOLDER / official.rpartition("/")[2]
    fetched = download(url, target, sha256)
    print(f"{target}: {'fetched' if fetched else 'already there'}, SHA-256 is right")
    return 0


def _sum_in(url: str) -> str:
    """Find the folder of 64 hexadecimal digits in an address; empty where there is none."""
    found = re.search(r"/([0-9a-f]{64})(?=/)", url)
    return found[1] if found else ""


if __name__ == "__main__":
    run_cli(main)
