"""Shared utilities: errors and exit codes, seeds, atomic file writes, hashes and downloads.

torch is imported only inside the functions that need it, so that `--help` and errors in flags appear at once.
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


def __getattr__(name: str) -> Any:  # noqa: ANN401 - returns a function
    """Provide `augment` and `augment_view` of dataset/views.py here too, as in the published utils.py."""
    if name in ("augment", "augment_view"):
        return getattr(importlib.import_module("dataset.views"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class InputError(Exception):
    """An error that the user can correct: one line that names the file or flag and says what to do."""


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and exit with its exit code.

    An `InputError`, an operating system error about a file (permissions, a name that is too long) or running out of
    memory prints one line on stderr and exits with code 2. --debug or MADCLIP_DEBUG=1 prints the traceback first. If
    the reader of stdout exits early, such as `head`, the program ends silently. Ctrl-C exits with code 130.
    """
    if "--debug" in sys.argv:  # before the flags are parsed, as parsing may fail
        sys.argv.remove("--debug")
        os.environ["MADCLIP_DEBUG"] = "1"
    tune_allocator()
    for stream in (sys.stdout, sys.stderr):  # file names may contain characters that the terminal cannot encode
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
        sys.stdout.flush()
    except InputError as error:
        code = _refuse(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python reports the error at exit
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
    """Parse a script's flags, then import its module, which is slow, and call its `main`."""

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
    """Print the traceback of an error if --debug or MADCLIP_DEBUG=1 is set; None prints nothing."""
    if refusal is not None and os.environ.get("MADCLIP_DEBUG"):
        traceback.print_exception(refusal, file=file)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, CUDA or torch's CPU allocator ran out of memory, judged by the text: torch is not imported."""
    words = ("CUDA out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def warn(message: str) -> None:
    """Print a one-line warning on stderr."""
    print(f"warning: {printable(message)}", file=sys.stderr, flush=True)


def redact(text: str, secret: str = "") -> str:
    """Replace user names and passwords in URLs, and `secret`, by ***."""
    text = re.sub(r"(?<=//)\S*@", "***@", text)  # up to the last @: passwords may contain / and @
    return text.replace(secret, "***") if secret else text


def one_line(words: object, secret: str = "") -> str:
    """Text, or an exception's type and message, as one line of at most 200 characters.

    Damaged files can make messages long. User names and passwords in URLs, `secret` and memory addresses are removed.
    """
    text = re.sub(r" ?<[\w.]+ object at 0x[0-9a-f]+>", "", str(words))
    if isinstance(words, BaseException):
        text = f"{type(words).__name__}: {text}" if text else type(words).__name__
    shown = "".join(letter if letter.isprintable() else " " for letter in redact(text[:1000], secret))
    return " ".join(shown.split())[:200]


# What parsers raise for a damaged input file. Errors that indicate a bug in the program, such as TypeError, are absent.
EXPECTED = (OSError, ValueError, EOFError, LookupError, OverflowError, RecursionError)


@contextlib.contextmanager
def blame(what: object, hint: str = "", errors: tuple[type[BaseException], ...] = EXPECTED) -> Iterator[None]:
    """Turn errors that external input (files, flags, URLs) is expected to cause into an `InputError`.

    Args:
        what: the file or flag at fault; the message begins with it.
        hint: what the user can do; the message ends with it.
        errors: the expected errors; any other error is a bug in the program and keeps its traceback.

    Raises:
        InputError: replaces an expected error; an `InputError` raised inside passes unchanged.
    """
    try:
        yield
    except InputError:
        raise
    except errors as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise InputError(f"{what}: {reason}" + (f"; {hint}" if hint else "")) from error


def read_json(path: str | Path, hint: str = "") -> Any:  # noqa: ANN401 - any JSON value
    """The value in an external JSON file; raises `InputError`, which names it, if it is unreadable or not JSON."""
    with blame(path, hint):
        return json.loads(read_text(path))


def printable(text: str) -> str:
    """The text with control characters escaped: file names may contain terminal control sequences."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def csv_cell(value: object) -> object:
    """A table cell that no spreadsheet evaluates: text that begins like a formula is prefixed with a quote."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def preview(names: Sequence[str], limit: int = 3) -> str:
    """The first few names, for a message: `a, b, c, and 5 more`."""
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")


class Parser(argparse.ArgumentParser):
    """Argument parser that prints errors as one line, without the usage, which `--help` shows."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
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

    parse.__name__ = "int"  # argparse prints it: "invalid int value"
    return parse


def tune_allocator() -> None:
    """Keep freed memory for the next step, in huge pages, if the system supports it (Linux with glibc).

    Otherwise every large tensor is mapped, zeroed page by page and unmapped: a tenth of the tower's time on a CPU.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it at its first allocation
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation gets its own mapping
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks; a positive threshold is limited to 2 GiB


def set_seed(seed: int) -> None:
    """Seed torch (CPU and CUDA), numpy and random, and make cuDNN use deterministic kernels."""
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file in hexadecimal, cached in the process until the file's size or timestamps change.

    Raises `OSError` if the file cannot be read.
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
    """A server cannot be reached or does not serve the file; another source may have it."""


def download(url: str, target: Path, sha256: str = "") -> bool:
    """Download `url` to `target`, with a progress bar on a terminal; returns False if `target` is already that file.

    Data goes to `target`.part, from which the next attempt, or the next call, resumes. The file gets its final name
    only after its SHA-256 is verified: `sha256` is in hexadecimal, or its first digits, or "" if unknown.

    Raises:
        Unreachable: no network, or a server that refuses the request or returns a web page.
        InputError: a wrong SHA-256, a different file at `target`, a full disk or an invalid URL.
    """
    import requests  # noqa: PLC0415 - only few commands download

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
                        while cause.__context__ is not None:  # requests wraps the actual error several times
                            cause = cause.__context__
                        raise Unreachable(f"cannot reach {shown} ({one_line(cause)}): run this again later") from error
                    time.sleep(pause)
        if sha256 and not (found := sha256_file(part)).startswith(sha256):
            part.unlink()
            raise InputError(f"{shown}: wrong SHA-256 ({found}, not {sha256}), file removed: try again")
        part.replace(target)
    return True


def _append(url: str, part: Path) -> None:
    """Download the rest of `part`, or all of it if the server cannot resume there."""
    import requests  # noqa: PLC0415
    from tqdm import tqdm  # noqa: PLC0415

    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
        if answer.status_code == requests.codes.range_not_satisfiable and have:
            return  # complete; if not, the SHA-256 check fails
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
    """Yield a temporary path; the file written there is renamed to `path`, or removed if the block fails.

    Raises:
        InputError: `path` is a folder, a device or a pipe, or cannot be written; the message names `flag` and `path`.
    """
    path = Path(path)
    name = f"{flag} {path}".lstrip()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # renaming would replace a device
            raise InputError(f"{name}: a folder, a device or a pipe, where a file is to be written")
        # Not tempfile: its files are private (mode 0600), and renaming keeps the mode.
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
    """Check that `atomic_path` can write to `path`, before hours are spent on its content; None is accepted.

    Raises:
        InputError: `path` is not writable, or is a file that `read` refuses: it is not a `kind` and would be lost.
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


def write_json(path: str | Path, value: Any, flag: str = "") -> None:  # noqa: ANN401 - any JSON value
    """Write `value` as JSON through `atomic_path`."""
    with atomic_path(path, flag) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file without byte-order mark; raises `OSError` for pipes and devices too: they may block."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "a folder, a pipe or a device, not a file", str(path))
    return path.read_text(encoding="utf-8-sig")


def prefetch(function: Callable[[In], Out], inputs: Iterable[In], workers: int = 1, ahead: int = 2) -> Iterator[Out]:
    """Yield `function(x)` in order; threads compute a few inputs ahead, so that decoding overlaps with the model."""
    with ThreadPoolExecutor(max_workers=max(workers, 1)) as pool:
        waiting: deque[Future[Out]] = deque()
        for item in inputs:
            waiting.append(pool.submit(function, item))
            if len(waiting) > max(workers, ahead):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def bar_seconds() -> float:
    """Seconds between updates of a progress bar: 1 on a terminal, 30 in a log file, which keeps every update."""
    return 1.0 if sys.stderr.isatty() else 30.0
