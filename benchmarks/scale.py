"""Memory and time of an evaluation against the size of the test set: 500, 2,000 and 8,000 images.

    python -m benchmarks.scale

First the metrics alone, at the paper's sizes (maps of 240 x 240 from 4 layers of 17 x 17 patches, masks on 5 in 6
images): what `measure` takes above the evaluation and the masks that it is given, for an epoch and in full. Then
test.py on small made-up images. Memory is the largest anonymous memory of the process, sampled; pages of the
memory-mapped store are the file cache's, which the system takes back when it needs them, and are shown beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import peak_memory, print_table, write_json
from utils import Parser, run_cli

SIDE, LAYERS, PATCHES = 240, 4, 17
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


def measure_metrics(images: int) -> dict[str, float]:
    """Seconds, and MiB above the inputs, of the metrics of made-up patch scores, in this process: a fresh one."""
    import torch  # noqa: PLC0415

    from dataset.medical_few import Sample  # noqa: PLC0415
    from engine.evaluation import Evaluation, Masks  # noqa: PLC0415
    from engine.metrics import measure  # noqa: PLC0415

    def make(count: int) -> tuple[Evaluation, Masks]:
        abnormal = torch.arange(count) % 6 > 0
        generator = torch.Generator().manual_seed(0)
        scores = torch.randn(count, LAYERS, PATCHES, PATCHES, generator=generator) - 2
        scores[abnormal, :, 4:9, 5:10] += 1.5
        mask = np.zeros((SIDE, SIDE), dtype=bool)
        mask[60:130, 75:145] = True
        bits = torch.from_numpy(np.packbits(mask)).expand(int(abnormal.sum()), -1).contiguous()
        rows = torch.where(abnormal, abnormal.cumsum(0) - 1, -1)
        samples = [Sample(Path(f"{i}.png"), int(label), None, f"{i}.png") for i, label in enumerate(abnormal)]
        return Evaluation(samples, scores.flatten(2), "seg", SIDE, "mean"), Masks(rows, bits, SIDE)

    small, its_masks = make(12)
    measure(small, its_masks, full=True, pixel_threshold=1.0)  # imports, first-call costs
    evaluation, masks = make(images)
    result = {}
    for name, options in (("epoch", {}), ("full", {"full": True, "pixel_threshold": 1.0})):
        before, start = peak_memory(), time.perf_counter()
        if name == "epoch":
            _ = evaluation.image_scores
            result["image scores s"] = time.perf_counter() - start
            start = time.perf_counter()
        measure(evaluation, masks, **options)
        result |= {f"{name} s": time.perf_counter() - start, f"{name} MiB": peak_memory() - before}
    return result


def time_commands(counts: list[int]) -> list[dict[str, object]]:
    """The rows of test.py."""
    from dataset import phantom  # noqa: PLC0415

    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = ["--obj", "Brain", "--data_path", folder, "--save_path", folder, "--cache", "disk"]
        for count in counts:
            phantom.write(Path(folder), ["Brain"], valid=2, test=count // 2, seed=0, size=64)
            cache = ["--cache_dir", f"{folder}/{count}"]
            if not rows:
                watch([sys.executable, "train.py", *SMALL, *paths, *cache, "--shot", "1", "--epoch", "1"])
            cold, anonymous, _ = watch([sys.executable, "test.py", *paths, *cache])
            warm, anonymous_warm, mapped = watch([sys.executable, "test.py", *paths, *cache])
            rows.append({
                "what": "test.py", "images": count, "cold s": cold, "warm s": warm,
                "warm s / 1000 images": 1000 * warm / count, "memory MiB": max(anonymous, anonymous_warm),
                "file pages MiB": mapped,
            })  # fmt: skip
            print_table(rows, list(rows[0]))
    return rows


def main() -> None:
    """Command line."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[500, 2000, 8000])
    parser.add_argument("--metrics_only", action="store_true", help="not test.py")
    parser.add_argument("--json", default="benchmarks/results/scale.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure_metrics(options.images[0])))
        return
    rows: list[dict[str, object]] = []
    for count in options.images:
        command = [sys.executable, "-m", "benchmarks.scale", "--child", "--images", str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append({"what": "metrics", "images": count, **json.loads(done.stdout.splitlines()[-1])})
        print_table(rows, list(rows[0]))
    write_json(options.json, rows if options.metrics_only else rows + time_commands(options.images))


if __name__ == "__main__":
    run_cli(main)
