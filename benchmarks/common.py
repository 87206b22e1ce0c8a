"""What the benchmarks share: the machine in words, peak memory, a printed table, results as JSON."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import utils


def machine() -> dict[str, str | int]:
    """Describe the machine and the software that figures were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def peak_memory() -> float:
    """Peak resident memory of this process so far, in MiB. It never falls: compare within a fresh process."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def print_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Print `rows` as an aligned table; a column that a row lacks stays empty."""
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
