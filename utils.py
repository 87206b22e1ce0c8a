"""What every part shares: clear errors, seeding, the 16 views, atomic files. It imports nothing of the project."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import math
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

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
    """Run a script's `main` and leave with its exit code; an `InputError` becomes one line on stderr and code 2.

    Ctrl-C is code 130.
    """
    tune_allocator()
    try:
        code = main() or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def tune_allocator() -> None:
    """Keep freed memory for the next step, in huge pages, where the system can (Linux with glibc).

    Every large tensor would else be mapped, zeroed page by page and given back: a tenth of the tower's time on a CPU.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch looks when it first allocates
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped by itself
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def set_seed(seed: int) -> None:
    """Seed torch (CPU and CUDA), numpy and random, and ask cuDNN for repeatable kernels."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` when the block succeeds, remove it when not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are private (mode 0600), and would stay so under the final name.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
