"""What everything shares: errors and exit codes, seeds, atomic files, hashes and downloads.

Nothing here imports torch before it is needed, so that `--help` and a mistyped flag are answered at once.
"""

import argparse
import contextlib
import ctypes
import errno
import hashlib
import importlib
import json
import os
import random
import re
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a function
    """The 16 views of dataset/views.py, under the names that they have in the published utils.py."""
    if name in ("augment", "augment_view"):
        return getattr(importlib.import_module("dataset.views"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class InputError(Exception):
    """Something the user can put right: one line that names the file or flag and says what to do."""


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and leave with its exit code.

    An `InputError` becomes one line on stderr and code 2, and so does a file that the system refuses (permissions, a
    name that is too long), and too little memory; with --debug, or MADCLIP_DEBUG=1, their traceback comes first. A
    reader of stdout that leaves, such as `head`, ends it quietly. Ctrl-C is code 130.
    """
    if "--debug" in sys.argv:  # before any flag is read, as reading them may refuse one
        sys.argv.remove("--debug")
        os.environ["MADCLIP_DEBUG"] = "1"
    tune_allocator()
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what the terminal's encoding lacks
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
        sys.stdout.flush()
    except InputError as error:
        code = _refuse(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
        code = 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None:
            raise
        code = _refuse(f"{error.filename}: {error.strerror}")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        code = _refuse(f"out of memory ({one_line(error)}); try a smaller --batch_size, or --cache disk for tokens")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def run_script(module: str, parse: Callable[[], argparse.Namespace]) -> NoReturn:
    """Read a script's flags, then import its module, which is slow, and call its `main`."""

    def main() -> int | None:
        options = parse()
        code: int | None = importlib.import_module(module).main(options)
        return code

    run_cli(main)


def _refuse(message: object) -> int:
    show_traceback(sys.exc_info()[1])
    print(f"error: {printable(' '.join(str(message).split()))}", file=sys.stderr, flush=True)
    return 2


def show_traceback(refusal: BaseException | None, file: TextIO | None = None) -> None:
    """With --debug, or MADCLIP_DEBUG=1, print where in the program a refusal was raised; None: no exception was."""
    if refusal is not None and os.environ.get("MADCLIP_DEBUG"):
        traceback.print_exception(refusal, file=file)


def _is_out_of_memory(error: Exception) -> bool:
    """Python's own error, CUDA's, or that of torch's allocator on a CPU: by their words, as torch is not imported."""
    words = ("CUDA out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def warn(message: str) -> None:
    """Print a warning on stderr, in one line."""
    print(f"warning: {printable(message)}", file=sys.stderr, flush=True)


def redact(text: str, secret: str = "") -> str:
    """The text without user and password of its addresses, and without `secret`."""
    text = re.sub(r"(?<=//)\S*@", "***@", text)  # to the last @: passwords may hold / and @
    return text.replace(secret, "***") if secret else text


def one_line(words: object, secret: str = "") -> str:
    """A text, or an exception's type and message, in at most 200 characters of one line: it may quote a damaged file.

    Passwords in addresses, `secret` and places in memory are left out.
    """
    text = re.sub(r" ?<[\w.]+ object at 0x[0-9a-f]+>", "", str(words))
    if isinstance(words, BaseException):
        text = f"{type(words).__name__}: {text}" if text else type(words).__name__
    shown = "".join(letter if letter.isprintable() else " " for letter in redact(text[:1000], secret))
    return " ".join(shown.split())[:200]


# What a parser raises over a damaged file from outside. A fault of the program, such as a TypeError, is not here.
EXPECTED = (OSError, ValueError, EOFError, LookupError, OverflowError, RecursionError)


@contextlib.contextmanager
def blame(what: object, hint: str = "", errors: tuple[type[BaseException], ...] = EXPECTED) -> Iterator[None]:
    """Turn an expected error over what comes from outside into one line: the boundary where faults are checked.

    Args:
        what: the file or flag that is to blame; the line begins with it.
        hint: what to do; the line ends with it.
        errors: which errors are expected; any other one is a fault of the program, and keeps its traceback.

    Raises:
        InputError: in place of an expected error; one raised inside passes unchanged.
    """
    try:
        yield
    except InputError:
        raise
    except errors as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise InputError(f"{what}: {reason}" + (f"; {hint}" if hint else "")) from error


def read_json(path: str | Path, hint: str = "") -> Any:  # noqa: ANN401 - whatever JSON holds
    """The contents of a JSON file from outside.

    Raises:
        InputError: naming the file, where it cannot be read or holds no JSON.
    """
    with blame(path, hint):
        return json.loads(read_text(path))


def printable(text: str) -> str:
    """The text with control characters written as escapes: names of files may hold what a terminal obeys."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def csv_cell(value: object) -> object:
    """A cell that no spreadsheet computes: text that begins as a formula does gets a quote in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def preview(names: Sequence[str], limit: int = 3) -> str:
    """The first few of many, for a message: `a, b, c, and 5 more`."""
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, without the usage: `--help` shows that."""

    def error(self, message: str) -> NoReturn:
        """Leave with code 2."""
        self.exit(_refuse(message))


def integer(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer from `lowest` to `highest`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is not at least {lowest}")
        if highest is not None and value > highest:
            raise argparse.ArgumentTypeError(f"{value} is not at most {highest}")
        return value

    parse.__name__ = "int"  # what argparse calls it: invalid int value
    return parse


def tune_allocator() -> None:
    """Keep freed memory for the next step, in huge pages, where the system can (Linux with glibc).

    Every large tensor would else be mapped, zeroed page by page and given back: a tenth of the tower's time on a CPU.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch looks when it first allocates
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped by itself
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks; a number would be at most 2 GiB


def set_seed(seed: int) -> None:
    """Seed torch (CPU and CUDA), numpy and random, and ask cuDNN for repeatable kernels."""
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file in hexadecimal; a process reads a file again only where its size or a time has changed.

    `OSError` where the file cannot be read.
    """
    path = Path(path).absolute()
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@cache
def _sha256(path: Path, *_state: int) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            hasher.update(piece)
    return hasher.hexdigest()


class Unreachable(InputError):
    """No answer from the other side: another source may have the file."""


def download(url: str, target: Path, sha256: str = "") -> bool:
    """Fetch `url` to `target`, with a bar on a terminal, and return True; False where `target` is that file already.

    What has arrived lies in `target`.part, from where the next attempt, or the next call, goes on; the final name
    appears only once the SHA-256 (in hexadecimal, or its first digits; "" where none is known) is right.

    Raises:
        Unreachable: no network, a server that refuses or sends a web page.
        InputError: a wrong sum, another file under the name, a full disk, an address that is none.
    """
    import requests  # noqa: PLC0415 - for the few commands that download

    shown, part = redact(url), target.with_name(f"{target.name}.part")
    if target.exists():
        if target.is_file() and (not sha256 or sha256_file(target).startswith(sha256)):
            return False
        raise InputError(f"{target} exists and is not the file of {shown}: move it away, or choose another name")
    transient = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    with blame(part, "make room, or choose another folder", (OSError,)):
        target.parent.mkdir(parents=True, exist_ok=True)
        with blame(shown, "check the address", (requests.RequestException, ValueError)):
            for pause in (0.5, 1, 2, None):  # seconds before the next attempt
                try:
                    _append(url, part)
                    break
                except transient as error:
                    if pause is None:
                        cause: BaseException = error
                        while cause.__context__ is not None:  # the text of requests is a list of wrappers
                            cause = cause.__context__
                        raise Unreachable(f"cannot reach {shown} ({one_line(cause)}): run this again later") from error
                    time.sleep(pause)
        if sha256 and not (found := sha256_file(part)).startswith(sha256):
            part.unlink()
            raise InputError(f"{shown}: wrong SHA-256 ({found}, not {sha256}), file removed: try again")
        part.replace(target)
    return True


def _append(url: str, part: Path) -> None:
    """Bring `part` to its end, or begin it anew where the server does not go on from there."""
    import requests  # noqa: PLC0415
    from tqdm import tqdm  # noqa: PLC0415

    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
        if answer.status_code == requests.codes.range_not_satisfiable and have:
            return  # whole, or its sum will not be right
        if answer.status_code in (429, 500, 502, 503, 504):  # another attempt may help
            raise requests.ConnectionError(f"the server answers {answer.status_code} {answer.reason}")
        if not answer.ok or answer.headers.get("Content-Type", "").lower().startswith("text/html"):
            what = "gives a web page (a log-in?)" if answer.ok else f"answers {answer.status_code} {answer.reason}"
            raise Unreachable(f"{redact(url)}: the server {what}: check the address")
        start = have if answer.headers.get("Content-Range", "").startswith(f"bytes {have}-") else 0
        length = answer.headers.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() else None
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=None)
        with bar, part.open("ab" if start else "wb") as file:
            for piece in answer.iter_content(2**16):
                bar.update(file.write(piece))


@contextlib.contextmanager
def atomic_path(path: str | Path, flag: str = "") -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename what the block leaves there to `path`, remove it where it fails.

    Raises:
        InputError: naming `flag` and `path`, which is a folder, a device or a pipe, or cannot be written.
    """
    path = Path(path)
    name = f"{flag} {path}".lstrip()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # the renaming would replace a device
            raise InputError(f"{name}: a folder, a device or a pipe, where a file is to be written")
        # Not tempfile: its files are private (mode 0600), and would stay so under the final name.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            if temporary.exists():
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = f"{path.parent} is a file" if isinstance(error, FileExistsError) else error.strerror or error
        full = " (disk full?)" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        intact = "; the older file there is intact" if os.path.exists(path) else ""  # noqa: PTH110 - never raises
        raise InputError(f"{name}: cannot be written: {reason}{full}{intact}") from error


def probe_writable(
    path: str | Path | None, flag: str, kind: str = "", read: Callable[[Path], object] | None = None
) -> None:
    """Make sure that `atomic_path` can write a file there before hours are spent on what it will hold; None is fine.

    Raises:
        InputError: it cannot; or a file stands there that `read` refuses, so that it is no `kind` and would be lost.
    """
    if path is None:
        return
    with atomic_path(path, flag) as probe:
        probe.touch()
        probe.unlink()
    if read is not None and Path(path).is_file() and Path(path).stat().st_size:
        try:
            read(Path(path))
        except (InputError, OSError, ValueError, LookupError, RecursionError) as error:
            raise InputError(f"{flag} {path}: a file that is no {kind} is there; give another name") from error


def write_json(path: str | Path, value: Any, flag: str = "") -> None:  # noqa: ANN401 - whatever JSON takes
    """Write `value` as JSON through `atomic_path`."""
    with atomic_path(path, flag) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark; `OSError` also for a pipe or device, which may not end."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "a folder, a pipe or a device, not a file", str(path))
    return path.read_text(encoding="utf-8-sig")


def prefetch(function: Callable[[In], Out], inputs: Iterable[In], workers: int = 1, ahead: int = 2) -> Iterator[Out]:
    """Yield `function(x)` in order, computed by threads a few inputs ahead: decoding runs beside the network."""
    with ThreadPoolExecutor(max_workers=max(workers, 1)) as pool:
        waiting: deque[Future[Out]] = deque()
        for item in inputs:
            waiting.append(pool.submit(function, item))
            if len(waiting) > max(workers, ahead):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def bar_seconds() -> float:
    """Seconds between two updates of a progress bar: one on a terminal, 30 in a file, which keeps every update."""
    return 1.0 if sys.stderr.isatty() else 30.0
