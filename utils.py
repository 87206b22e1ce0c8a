"""What every part shares: clear errors, seeding, the 16 views, atomic files. It imports nothing of the project."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import json
import math
import os
import random
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

In = TypeVar("In")
Out = TypeVar("Out")

# The published augmentation: 16 views of every few-shot image, in this order.
ROTATIONS = (-math.pi / 8, -math.pi / 16, math.pi / 16, math.pi / 8)
TRANSLATIONS = ((0.1, 0.1), (-0.1, 0.1), (-0.1, -0.1), (0.1, -0.1))  # in affine-grid units: half an image is 1
ZOOMS = (1.1, 1.15, 1.2, 1.3)
JITTER_VIEW = 13
VIEWS = 16


class InputError(Exception):
    """Something the user can put right: one line that names the file or flag and says what to do."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and leave with its exit code.

    An `InputError` becomes one line on stderr and code 2, and so does a file that the system refuses (permissions, a
    name that is too long). A reader of stdout that leaves, such as `head`, ends it quietly. Ctrl-C is code 130.
    """
    tune_allocator()
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what the terminal's encoding lacks
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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def _refuse(words: object) -> int:
    print(f"error: {' '.join(str(words).split())}", file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, without the usage: `--help` shows that."""

    def error(self, message: str) -> NoReturn:
        """Leave with code 2."""
        self.exit(_refuse(message))


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer from `least` to `most`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is not at least {least}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{value} is not at most {most}")
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
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def atomic_path(path: str | Path, flag: str = "") -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` when the block succeeds, remove it when not.

    Raises:
        InputError: naming `flag` and `path`, which is a folder, a device or a pipe, or cannot be written.
    """
    with temporary_path(path, flag) as temporary:
        yield temporary
        temporary.replace(path)


@contextlib.contextmanager
def temporary_path(path: str | Path, flag: str = "") -> Iterator[Path]:
    """The temporary name alone, its folder made; errors are those of `atomic_path`."""
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
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = f"{path.parent} is a file" if isinstance(error, FileExistsError) else error.strerror or error
        full = " (disk full?)" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        intact = "; the older file there is intact" if os.path.exists(path) else ""  # noqa: PTH110 - never raises
        raise InputError(f"{name}: cannot be written: {reason}{full}{intact}") from error


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


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Hold the lock of a file that is made for it; say `waiting` where another process holds it, and wait."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prefetch(function: Callable[[In], Out], inputs: Iterable[In], workers: int = 1, ahead: int = 2) -> Iterator[Out]:
    """Yield `function(x)` in order, computed by threads a few inputs ahead: decoding runs beside the network."""
    with ThreadPoolExecutor(max_workers=max(workers, 1)) as pool:
        waiting: deque = deque()
        for item in inputs:
            waiting.append(pool.submit(function, item))
            if len(waiting) > max(workers, ahead):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def augment_view(images: Tensor, view: int, jitter: tuple[float, float] | None = None) -> Tensor:
    """One of the 16 views of the published augmentation.

    Args:
        images: (B, channels, S, S) in [0, 1]; masks go through the same views and become soft.
        view: 0 identity, 1-4 rotations, 5-8 translations, 9-12 zooms, 13 colour jitter, 14 horizontal and 15
            vertical flip.
        jitter: two draws in [0, 1) for brightness and contrast; None (for masks) leaves view 13 as it is.

    Returns:
        (B, channels, S, S) in [0, 1].
    """
    if view == 0:
        return images
    if view <= 4:
        cos, sin = math.cos(ROTATIONS[view - 1]), math.sin(ROTATIONS[view - 1])
        return _affine(images, [[cos, -sin, 0.0], [sin, cos, 0.0]])
    if view <= 8:
        x, y = TRANSLATIONS[view - 5]
        return _affine(images, [[1.0, 0.0, x], [0.0, 1.0, y]])
    if view <= 12:
        return _zoom(images, ZOOMS[view - 9])
    if view == JITTER_VIEW:
        return images if jitter is None else _jitter(images, *jitter)
    return images.flip(-1 if view == 14 else -2)


def augment(images: Tensor, jitter: tuple[float, float] | None = None) -> Tensor:
    """All 16 views, view by view (every image of view 0, then of view 1, ...): (B, ...) -> (16 B, ...)."""
    return torch.cat([augment_view(images, view, jitter) for view in range(VIEWS)])


def _affine(images: Tensor, matrix: list[list[float]]) -> Tensor:
    theta = torch.tensor([matrix], dtype=images.dtype, device=images.device).expand(len(images), -1, -1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _zoom(images: Tensor, factor: float) -> Tensor:
    size = images.shape[-1]
    kept = int(size / factor)
    first, last = (size - kept) // 2, (size + kept) // 2
    crop = images[..., first:last, first:last]
    return F.interpolate(crop, size=(size, size), mode="bilinear", align_corners=False)


def _jitter(images: Tensor, brightness: float, contrast: float) -> Tensor:
    bright = images * (0.8 + 0.4 * brightness)
    # The published mean is over channels and rows, which leaves one mean a column.
    mean = bright.mean(dim=(-3, -2), keepdim=True)
    return ((bright - mean) * (0.8 + 0.4 * contrast) + mean).clamp(0, 1)
