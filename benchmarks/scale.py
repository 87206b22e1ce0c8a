"""Memory and time of an evaluation against the size of the test set: test.py on 500, 2,000 and 8,000 images.

    python -m benchmarks.scale

Memory is the largest anonymous memory of the process, sampled; pages of the memory-mapped store are the file cache's,
which the system takes back when it needs them, and are shown beside it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import print_table, write_json
from dataset import phantom
from utils import Parser, run_cli

SMALL = ["--model_name", "ViT-tiny-14-56", "--pretrain", "random", "--img_size", "56"]


def watch(command: list[str]) -> tuple[float, float, float]:
    """Seconds, and the peaks of anonymous and of file-backed memory in MiB, of a command."""
    start, anonymous, mapped = time.perf_counter(), 0, 0
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, "WANDB_MODE": "disabled"}, **quiet)
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        status = dict(line.split(":", 1) for line in lines)
        anonymous = max(anonymous, int(status.get("RssAnon", "0").split()[0]))
        mapped = max(mapped, int(status.get("RssFile", "0").split()[0]))
        time.sleep(0.02)
    if process.wait():
        raise SystemExit(f"failed: {' '.join(command)}")
    return time.perf_counter() - start, anonymous / 1024, mapped / 1024


def main() -> None:
    """Command line."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[500, 2000, 8000])
    parser.add_argument("--json", default="benchmarks/results/scale.json")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = ["--obj", "Brain", "--data_path", folder, "--save_path", folder, "--cache", "disk"]
        for count in options.images:
            phantom.write(Path(folder), ["Brain"], valid=2, test=count // 2, seed=0, size=64)
            cache = ["--cache_dir", f"{folder}/{count}"]
            if not rows:
                watch([sys.executable, "train.py", *SMALL, *paths, *cache, "--shot", "1", "--epoch", "1"])
            cold, anonymous, _ = watch([sys.executable, "test.py", *paths, *cache])
            warm, anonymous_warm, mapped = watch([sys.executable, "test.py", *paths, *cache])
            rows.append({
                "images": count, "cold s": cold, "warm s": warm, "warm s / 1000 images": 1000 * warm / count,
                "memory MiB": max(anonymous, anonymous_warm), "file pages MiB": mapped,
            })  # fmt: skip
            print_table(rows, list(rows[0]))
    write_json(options.json, rows)


if __name__ == "__main__":
    run_cli(main)
