"""Fetch a model's weights: `python -m CLIP.download ViT-L-14-336`. Resumes, and checks the SHA-256.

They come from the address that published them or, where that cannot be reached, from the Hugging Face hub.
`python -m CLIP.download hf-hub:owner/name` fetches any CLIP of the hub into its cache.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils import InputError, Parser, atomic_path, run_cli, sha256_file

from . import hub
from .config import ModelConfig, list_models
from .weights import CKPT_FOLDER

if TYPE_CHECKING:
    from requests import Response, Session

ATTEMPTS = 4
FIRST_PAUSE = 0.5  # seconds before the second attempt, doubled before each further one
TIMEOUT = 30  # seconds without a byte
PIECE = 2**16
BUSY = (429, 500, 502, 503, 504)  # answers after which another attempt may help


class _Dropped(Exception):
    """The connection ended before the file did."""


def download(url: str, target: Path, sha256: str) -> bool:
    """Fetch `url` to `target` and return True, or False where `target` is that file already.

    What has arrived lies in `target`.part, from where the next call goes on; the final name appears only once the
    SHA-256 is right. Where a server does not go on from there, what it sends instead lies in `target`.part.new until
    it has proved right: a page of a network's log-in never replaces a good part.

    Args:
        url: http or https.
        target: the file to make.
        sha256: in hexadecimal, or its first digits.

    Raises:
        hub.Unreachable: no network, or a server that refuses or sends a web page.
        InputError: a wrong sum, a connection that keeps dropping, a full disk.
    """
    shown = hub.redact(url)
    if target.exists():
        if target.is_file() and sha256_file(target).startswith(sha256):
            return False
        raise InputError(
            f"{target} exists and is not the file of {shown} (SHA-256): move it away or choose another --out"
        )
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for file in (part, _side(part)):
            if file.exists() and not file.is_file():
                raise InputError(f"{file} is a folder, a device or a pipe: remove it or choose another --out")
        whole = _fetch(url, part)
        result = sha256_file(whole)
        if not result.startswith(sha256):
            whole.unlink()
            kept = "" if whole == part else f"; {part} is kept"
            raise InputError(
                f"{shown} gave a file with the wrong SHA-256 ({result}, not {sha256}), removed{kept}: try again"
            )
        whole.replace(target)
        part.unlink(missing_ok=True)
    except OSError as error:  # of files only: those of the network end in _fetch
        raise InputError(
            f"cannot write {part}: {error.strerror or error}; make room or choose another --out"
        ) from error
    finally:
        if _side(part).is_file():
            _side(part).unlink()
    return True


def _side(part: Path) -> Path:
    return part.with_name(f"{part.name}.new")


def _fetch(url: str, part: Path) -> Path:
    """Bring `part`, or the file beside it, to its end, in a few attempts that go on where the one before stopped."""
    import requests  # noqa: PLC0415
    from requests.adapters import HTTPAdapter  # noqa: PLC0415
    from urllib3.util import Retry  # noqa: PLC0415

    retries = Retry(
        total=ATTEMPTS - 1, backoff_factor=FIRST_PAUSE, status_forcelist=BUSY, raise_on_status=False, redirect=20,
        respect_retry_after_header=False,
    )  # fmt: skip
    reason = _Dropped()
    with requests.Session() as session:
        session.trust_env = False  # it would read ~/.netrc, which may be a pipe; proxies and certificates as usual
        session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        for scheme in ("https://", "http://"):
            session.mount(scheme, HTTPAdapter(max_retries=retries))
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
            try:
                return _fetch_once(session, url, part)
            except _Dropped as error:
                reason = error
    raise InputError(
        f"cannot fetch {hub.redact(url)} after {ATTEMPTS} attempts ({reason}); {_kept(part)}: check the network and "
        "run this again, or copy the file there by other means"
    )


def _fetch_once(session: Session, url: str, part: Path) -> Path:
    """Append what `part` lacks, or write the file beside it anew; `_Dropped` where another attempt may help."""
    have = part.stat().st_size if part.exists() else 0
    with _open(session, url, part, have) as response:
        if response.status_code == 416:  # nothing lies beyond `have`: the file is whole, or its sum will not be right
            return part
        goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status_code != 206:
            whole, start = (_side(part) if have else part), 0
        elif goes_on:
            whole, start = part, have
        else:  # another piece than asked for: ask for all
            with _open(session, url, part, 0) as complete:
                _copy(complete, _side(part), 0)
            return _side(part)
        _copy(response, whole, start)
    return whole


def _open(session: Session, url: str, part: Path, have: int) -> Response:
    """The answer of the server, which holds a file from byte `have` on, or is a 416."""
    import requests  # noqa: PLC0415

    shown = hub.redact(url)
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        proxies = requests.utils.get_environ_proxies(url)
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT, proxies=proxies)
    except (requests.ConnectionError, requests.Timeout) as error:
        raise hub.Unreachable(
            f"cannot reach {shown} in {ATTEMPTS} attempts ({_cause(error)}); {_kept(part)}: check the network"
        ) from error
    except (OSError, ValueError) as error:  # an address, its own or one that it leads to, that is none
        raise InputError(f"{shown}: cannot be fetched ({hub.one_line(error)}): check the address") from error
    status = response.status_code
    if status == 416 and have:
        return response
    answer = f"{status} {hub.one_line(response.reason)}"
    if status not in (200, 206):
        response.close()
        tried = f" in {ATTEMPTS} attempts" if status in BUSY else ""
        raise hub.Unreachable(f"the server answers {answer} for {shown}{tried}; {_kept(part)}: check the address")
    if response.headers.get("Content-Type", "").lower().startswith("text/html"):
        response.close()
        raise hub.Unreachable(
            f"{shown} gives a web page, not a file (the log-in of a network?); {_kept(part)}: open it in a browser"
        )
    return response


def _cause(error: BaseException) -> str:
    """The innermost reason of an error of requests, whose own text is a list of wrappers."""
    while isinstance(getattr(error, "reason", None), BaseException) or (
        error.args and isinstance(error.args[0], BaseException)
    ):
        reason = getattr(error, "reason", None)
        error = reason if isinstance(reason, BaseException) else error.args[0]
    return hub.one_line(error)


def _kept(part: Path) -> str:
    if not part.exists():
        return "nothing arrived"
    return f"{part.stat().st_size / 2**20:.1f} MiB are kept in {part}"


def _copy(response: Response, file_name: Path, have: int) -> None:
    """Write the answer to a file from byte `have` on, under a progress bar (none where stderr is no terminal)."""
    import requests  # noqa: PLC0415
    from tqdm import tqdm  # noqa: PLC0415

    length = response.headers.get("Content-Length", "")
    total = have + int(length) if length.isdecimal() and len(length) < 16 else None
    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=file_name.stem, disable=None)
    with bar, file_name.open("ab" if have else "wb") as file:
        try:
            for piece in response.iter_content(PIECE):
                file.write(piece)
                bar.update(len(piece))
        except requests.RequestException as error:  # requests counts, so an answer that ends early is one
            raise _Dropped(f"the connection closed at {file.tell()} of {total or 'unknown'} bytes") from error


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m CLIP.download", description="Fetch the weights of a CLIP model.")
    parser.add_argument("model", help=f"{', '.join(list_models())}, or hf-hub:owner/name")
    parser.add_argument("--pretrain", help="which weights of the model (the first that are known)")
    parser.add_argument("--out", type=Path, help="where the file goes (CLIP/ckpt/<the name in the address>)")
    parser.add_argument("--url", help="another address of the file; a SHA-256 in its path is the one that must match")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 once the file is in place."""
    args = _parse(argv)
    if args.url and not args.url.startswith(("https://", "http://")):
        raise InputError(f"--url {hub.redact(args.url)}: the address must start with https:// or http://")
    config = ModelConfig.load(args.model)
    if args.model.startswith(hub.PREFIX):
        return _from_hub(args.model.removeprefix(hub.PREFIX), args.out)
    known = [*{**config.urls, **config.hub}]
    pretrain = args.pretrain or (known or [""])[0]
    if pretrain not in known:
        raise InputError(
            f"no address of {pretrain or 'published'} weights is known for {args.model}"
            f"{', only of ' + ', '.join(known) if known else ''}: get them elsewhere and pass them with --weights FILE"
        )
    official = config.urls.get(pretrain)
    url = args.url or official
    if url is None:
        return _from_hub(config.hub[pretrain], args.out)
    sha256 = _sum_in(url) or _sum_in(official or "")
    if not sha256:
        raise InputError(f"--url {hub.redact(url)}: put the file's SHA-256 into it (as .../SHA256/name): none is known")
    target = args.out or CKPT_FOLDER / config.weights.get(pretrain, url.rpartition("/")[2])
    try:
        fetched = download(url, target, sha256)
    except hub.Unreachable as error:
        if args.url or pretrain not in config.hub:
            raise
        print(f"{error}. The same model comes from the hub instead.", file=sys.stderr, flush=True)
        return _from_hub(config.hub[pretrain], args.out)
    words = f"fetched from {hub.redact(url)}" if fetched else "already there"
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
    match = re.search(r"/([0-9a-f]{64})(?=/)", url) or re.search(r"-([0-9a-f]{8})\.pt$", url)
    return match[1] if match else ""


if __name__ == "__main__":
    run_cli(main)
