"""Fetch a model's weights: `python -m CLIP.download ViT-L-14-336`. Resumes, and checks the SHA-256.

They come from the address that published them or, where that cannot be reached, from the Hugging Face hub.
`python -m CLIP.download hf-hub:owner/name` fetches any CLIP of the hub into its cache.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils import InputError, Parser, atomic_path, bar_seconds, one_line, redact, run_cli, sha256_file

from . import hub
from .config import ModelConfig, list_models
from .weights import CKPT_FOLDER

if TYPE_CHECKING:
    from requests import Session

ATTEMPTS = 4
FIRST_PAUSE = 0.5  # seconds before the second attempt, doubled before each further one
TIMEOUT = 30  # seconds without a byte
CHUNK_BYTES = 2**16
BUSY = (429, 500, 502, 503, 504)  # answers after which another attempt may help


class _Retry(Exception):
    """An attempt failed, with the `InputError` to raise where the next ones fail too."""


def download(url: str, target: Path, sha256: str) -> bool:
    """Fetch `url` to `target` and return True, or False where `target` is that file already.

    What has arrived lies in `target`.part, from where the next call goes on; the final name appears only once the
    SHA-256 (in hexadecimal, or its first digits) is right. Where a server does not go on from there, what it sends
    instead lies in `target`.part.new until it has proved right: a log-in page never replaces a good part.
    `hub.Unreachable` for no network and for a server that refuses or sends a web page; `InputError` for a wrong sum, a
    connection that keeps dropping, a full disk, an address that is none.
    """
    from requests import RequestException  # noqa: PLC0415

    shown, part = redact(url), target.with_name(f"{target.name}.part")
    new = target.with_name(f"{part.name}.new")
    if target.exists():
        if target.is_file() and sha256_file(target).startswith(sha256):
            return False
        raise InputError(f"{target} exists and is not the file of {shown}: move it away or choose another --out")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for file in (part, new):
            if file.exists() and not file.is_file():
                raise InputError(f"{file} is a folder, a device or a pipe: remove it or choose another --out")
        whole = _fetch(url, part, new)
        result = sha256_file(whole)
        if not result.startswith(sha256):
            whole.unlink()
            kept = "" if whole == part else f"; {part} is kept"
            raise InputError(f"{shown}: wrong SHA-256 ({result}, not {sha256}), file removed{kept}: try again")
        whole.replace(target)
        part.unlink(missing_ok=True)
    except (RequestException, ValueError) as error:  # no address, or one that leads to none
        raise InputError(f"{shown}: cannot be fetched ({one_line(error)}): check the address") from error
    except OSError as error:
        raise InputError(f"{part}: {error.strerror or error}; make room or choose another --out") from error
    finally:
        if new.is_file():
            new.unlink()
    return True


def _fetch(url: str, part: Path, new: Path) -> Path:
    """Bring `part`, or `new` beside it, to its end, in attempts that go on where the one before stopped."""
    import requests  # noqa: PLC0415

    with requests.Session() as session:
        session.trust_env = False  # it would read ~/.netrc, which may be a pipe; proxies and certificates as usual
        session.proxies = requests.utils.get_environ_proxies(url)
        session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        for attempt in range(ATTEMPTS):
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1) if attempt else 0)
            try:
                return _attempt(session, url, part, new)
            except _Retry as error:
                (failure,) = error.args
    raise type(failure)(f"{failure} after {ATTEMPTS} attempts; {_kept(part)}: check the network and run this again")


def _attempt(session: Session, url: str, part: Path, new: Path, resume: bool = True) -> Path:
    """Append what `part` lacks, or write `new` where the server does not go on from there; the file that is whole."""
    import requests  # noqa: PLC0415
    from tqdm import tqdm  # noqa: PLC0415

    shown, have = redact(url), part.stat().st_size if resume and part.exists() else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    except (requests.ConnectionError, requests.Timeout) as error:
        cause: BaseException = error
        while cause.__context__ is not None:  # the text of requests is a list of wrappers
            cause = cause.__context__
        raise _Retry(hub.Unreachable(f"cannot reach {shown} ({one_line(cause)})")) from error
    with response:
        status, answer = response.status_code, response.headers
        if status == 416 and have:  # nothing lies beyond `have`: the file is whole, or its sum will not be right
            return part
        if status not in (200, 206):
            refusal = f"the server answers {status} {one_line(response.reason)} for {shown}"
            if status in BUSY:
                raise _Retry(hub.Unreachable(refusal))
            raise hub.Unreachable(f"{refusal}; {_kept(part)}: check the address")
        if answer.get("Content-Type", "").lower().startswith("text/html"):
            raise hub.Unreachable(f"{shown} gives a web page (a log-in?); {_kept(part)}: open it in a browser")
        start = have if status == 206 else 0
        if start and not answer.get("Content-Range", "").startswith(f"bytes {have}-"):
            return _attempt(session, url, part, new, resume=False)
        length = answer.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() and len(length) < 16 else None
        whole = part if start or not part.exists() else new
        pause = bar_seconds()
        bar = tqdm(
            total=total, initial=start, unit="B", unit_scale=True, desc=whole.stem, mininterval=pause, delay=pause
        )
        with bar, whole.open("ab" if start else "wb") as file:
            try:
                for piece in response.iter_content(CHUNK_BYTES):
                    bar.update(file.write(piece))
            except requests.RequestException as error:  # also where fewer bytes came than were announced
                closed = f"the connection closed at {file.tell()} of {total or 'unknown'} bytes"
                raise _Retry(InputError(f"cannot fetch {shown} ({closed})")) from error
    return whole


def _kept(part: Path) -> str:
    return f"{part.stat().st_size / 2**20:.1f} MiB are kept in {part}" if part.exists() else "nothing arrived"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 once the file is in place."""
    parser = Parser(prog="python -m CLIP.download", description="Fetch the weights of a CLIP model.")
    parser.add_argument("model", help=f"{', '.join(list_models())}, or hf-hub:owner/name")
    parser.add_argument("--pretrain", help="which weights of the model (the first that are known)")
    parser.add_argument("--out", type=Path, help="where the file goes (CLIP/ckpt/<the name in the address>)")
    parser.add_argument("--url", help="another address of the file; a SHA-256 in its path is the one that must match")
    args = parser.parse_args(argv)
    if args.url and not args.url.startswith(("https://", "http://")):
        raise InputError(f"--url {redact(args.url)}: the address must start with https:// or http://")
    config = ModelConfig.load(args.model)
    if args.model.startswith(hub.PREFIX):
        return _from_hub(args.model.removeprefix(hub.PREFIX), args.out)
    known = [*{**config.urls, **config.hub}]
    pretrain = args.pretrain or next(iter(known), "published")
    if pretrain not in known:
        others = f", only of {', '.join(known)}" if known else ""
        raise InputError(f"no address of {pretrain} weights is known for {args.model}{others}: pass --weights FILE")
    official = config.urls.get(pretrain, "")
    url = args.url or official
    if not url:
        return _from_hub(config.hub[pretrain], args.out)
    sha256 = _sum_in(url) or _sum_in(official)
    if not sha256:
        raise InputError(f"--url {redact(url)}: put the file's SHA-256 into it (as .../SHA256/name): none is known")
    target = args.out or CKPT_FOLDER / config.weights.get(pretrain, url.rpartition("/")[2])
    try:
        words = f"fetched from {redact(url)}" if download(url, target, sha256) else "already there"
    except hub.Unreachable as error:
        if args.url or pretrain not in config.hub:
            raise
        print(f"{error}. The same model comes from the hub instead.", file=sys.stderr, flush=True)
        return _from_hub(config.hub[pretrain], args.out)
    print(f"{target}: {words}, SHA-256 is right")
    return 0


def _from_hub(repository: str, out: Path | None) -> int:
    """Fetch a model's weights into the cache of huggingface_hub, where `find_weights` looks, and copy them to `out`."""
    path = hub.fetch(repository, hub.WEIGHT_FILES)
    if out is not None:
        with atomic_path(out, "--out") as temporary:
            shutil.copyfile(path, temporary)
    print(f"{out or path}: {path.name} of {repository} from the Hugging Face hub")
    return 0


def _sum_in(url: str) -> str:
    """The SHA-256 in an address: a folder of 64 hexadecimal digits, or its first 8 at the end of the name; else ""."""
    match = re.search(r"/([0-9a-f]{64})/|-([0-9a-f]{8})\.pt$", url)
    return (match[1] or match[2]) if match else ""


if __name__ == "__main__":
    run_cli(main)
