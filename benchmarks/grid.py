"""An ablation in one grid against a run of train.py for each of its cells.

    python -m benchmarks.grid                                                          the small model, all 20 cells
    python -m benchmarks.grid --model ViT-L-14-336 --img_size 240 --cells 3            the first 3, and a projection

Both compute the same cells from the same data and random weights. The grid is one process that loads the towers once
and passes each image once for each kind of fidelity; a separate run starts, loads and passes by itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import reproduce
from benchmarks.common import print_table, write_json
from dataset import phantom
from engine.study.grid import Grid, parse
from utils import Parser, run_cli


def plan(options: argparse.Namespace, data: str, out: str) -> Grid:
    """The cells and how they are run."""
    flags = ["--model_name", options.model, "--pretrain", "random", "--img_size", str(options.img_size), "--data_path",
             data, "--cache_dir", f"{out}/cache", "--epoch", str(options.epochs)]  # fmt: skip
    grid = ["--table", "ablation", "--obj", "Brain", "--seeds", "111", "--shots", str(options.shot), "--out", out]
    return Grid(parse([*grid, *flags]))


def child(options: argparse.Namespace, data: str, out: str) -> list[float]:
    """Seconds of each cell of the grid, in this process."""
    grid = plan(options, data, out)
    stamps = [time.perf_counter()]
    for cell in grid.cells[: options.cells]:
        if error := reproduce.run_cell(grid, cell):
            raise SystemExit(f"{cell.name}: {error}")
        stamps.append(time.perf_counter())
    return [after - before for before, after in pairwise(stamps)]


def seconds(command: list[str]) -> tuple[float, str]:
    """How long a command takes, and what it prints."""
    start = time.perf_counter()
    output = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True).stdout
    return time.perf_counter() - start, output


def main() -> None:
    """Command line."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="ViT-tiny-14-56")
    parser.add_argument("--img_size", type=int, default=56)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--shot", type=int, default=1)
    parser.add_argument("--test", type=int, default=24, help="test images")
    parser.add_argument("--cells", type=int, help="compute only so many of the cells (default: all)")
    parser.add_argument("--json", default="benchmarks/results/grid.json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options, *options.child)))
        return
    with tempfile.TemporaryDirectory() as folder:
        phantom.write(Path(folder), ["Brain"], valid=options.shot, test=options.test // 2, seed=0, size=240)
        together, output = seconds(["-m", "benchmarks.grid", *sys.argv[1:], "--child", folder, f"{folder}/grid"])
        first, *others = json.loads(output.splitlines()[-1])
        grid = plan(options, folder, f"{folder}/single")
        cells = grid.cells
        single = [seconds(["train.py", *grid.arguments(cell), "--cache", "ram"])[0] for cell in cells[: options.cells]]
    cell = median(others)
    row = {
        "model": options.model, "epochs": options.epochs, "cells": len(single), "grid s": together,
        "separate s": sum(single), "separate / grid": sum(single) / together, "first cell s": first,
        "another cell s": cell, "a separate run s": median(single),
    }  # fmt: skip
    if len(single) < len(cells):  # the one cell of another fidelity passes all images again
        row["all cells"] = len(cells)
        row["grid s, projected"] = together + (len(cells) - len(single)) * cell + (first - cell)
        row["separate s, projected"] = len(cells) * median(single)
    print_table([row], list(row))
    write_json(options.json, [row])


if __name__ == "__main__":
    run_cli(main)
