"""Shared by the benchmarks: machine description, peak memory, rates, operation counts, tables, results as JSON."""

import argparse
import datetime
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

import utils
from CLIP.clip import create_model
from CLIP.config import ModelConfig
from CLIP.model import CLIP
from engine.detector import Detector
from engine.files.config import Settings
from engine.training import TrainingState

WITH_MASKS = ("Brain", "Liver", "Retina_RESC")


def machine() -> dict[str, str | int]:
    """Describe the machine and the software that figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return {
        "cpu": next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def peak_memory() -> float:
    """Peak resident memory of this process so far, in MiB. It never falls: compare within a fresh process."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def best(function: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest of several runs, after a warm-up run; waits for a GPU to finish."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of a square matrix product, the best of several runs."""
    size = 8192 if device.type == "cuda" else 3072
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / best(lambda: torch.mm(a, b, out=out), 8)


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best(lambda: target.copy_(source), 8)


def tower_operations(config: ModelConfig, img_size: int, layers: int) -> float:
    """Operations of one image in `layers` blocks of the tower: products with weights, and attention."""
    patches, width = config.grid(img_size) ** 2, config.width
    block = 12 * width**2 * (patches + 1) + 2 * width * (patches + 1) ** 2
    return 2.0 * (layers * block + patches * 3 * config.patch_size**2 * width)


def learner(
    options: argparse.Namespace, device: torch.device, autocast: torch.dtype | None
) -> tuple[CLIP, TrainingState]:
    """The towers with random weights, and a detector before its first step: the same on every call.

    `options` has `model`, `img_size`, `fidelity` and `obj`; only the data sets in `WITH_MASKS` have masks.
    """
    clip = create_model(options.model, "random", options.img_size, fidelity=options.fidelity, device=device)
    settings = Settings(
        options.obj, clip.config.name, "random", options.fidelity, options.img_size,
        tuple(clip.config.default_features()), "MFCFC", "learnable_all", "yes", "mean", "sigmoid", options.obj,
        options.obj in WITH_MASKS, "", 32,
    )  # fmt: skip
    return clip, TrainingState(Detector(clip, settings).to(device), autocast, 0.001, 0)


def print_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Print `rows` as an aligned table; columns missing in a row stay empty."""
    cells = [list(columns)] + [[_text(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(row[k]) for row in cells) for k in range(len(columns))]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if value and abs(value) < 1e-3 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_json(path: str | Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write {"machine": ..., "rows": ...} to `path` atomically, making its folder."""
    utils.write_json(path, {"machine": machine(), "rows": list(rows)})
    print(f"wrote {path}")
