"""Pixel AUROC: the streaming histogram against scikit-learn, torchmetrics and ADEval: time, memory, error.

    python -m benchmarks.auc --pixels 1e6 1e7 5e7

Each contender runs in a fresh process. The pixels come in batches as in an evaluation, 32 maps of 240 x 240. Seconds
are those spent in the contender, not in making the pixels. Memory is the peak above the imports and a small first run,
with the scores that a contender must hold: a batch for those that stream, everything for the others. Processor seconds
are the fairer figure on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import machine, peak_memory, print_table, write_json
from utils import Parser, run_cli

LAYERS = 4
BATCH = (32, 240, 240)
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def batches(pixels: int, spread: str) -> Batches:
    """Yield score maps (B, 240, 240) float32 in [0, 4] and bool labels, 3% abnormal, the same ones every time.

    `wide`: well-trained; `narrow`: as early in training, when all scores lie close to 2.
    """
    generator = torch.Generator().manual_seed(0)
    shape = torch.Size(BATCH)
    for start in range(0, pixels, shape.numel()):
        labels = torch.rand(shape, generator=generator) < 0.03
        noise = torch.randn(shape, generator=generator) + 1.5 * labels
        scores = LAYERS * torch.sigmoid(1.5 * noise - 2) if spread == "wide" else 2 + 0.003 * noise
        if pixels - start < shape.numel():
            scores, labels = (x.view(1, 1, -1)[..., : pixels - start] for x in (scores, labels))
        yield scores, labels


class Clock:
    """Adds up the seconds, and the processor seconds of all threads, spent inside `with clock:`."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> None:
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start
        self.cpu_seconds += time.process_time() - self._cpu_start


def streaming(source: Batches, pixels: int, clock: Clock) -> float:
    """engine.metrics.ScoreHistogram."""
    from engine.metrics import ScoreHistogram  # noqa: PLC0415 - each process imports its own contender only

    with clock:
        histogram = ScoreHistogram(0, LAYERS)
    for scores, labels in source:
        with clock:
            histogram.update(scores, labels)
    with clock:
        return histogram.auroc()


def scikit_learn(source: Batches, pixels: int, clock: Clock) -> float:
    """sklearn.metrics.roc_auc_score: sorts everything."""
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415

    scores, labels = _collect(source, pixels)
    with clock:
        return float(roc_auc_score(labels.numpy(), scores.numpy()))


def torchmetrics(source: Batches, pixels: int, clock: Clock) -> float:
    """Call torchmetrics' binary_auroc without thresholds: sorts everything."""
    from torchmetrics.functional.classification import binary_auroc  # noqa: PLC0415

    scores, labels = _collect(source, pixels)
    with clock:
        return float(binary_auroc(scores.div_(LAYERS), labels.int()))  # outside [0, 1] it would apply a sigmoid


def adeval(source: Batches, pixels: int, clock: Clock) -> float:
    """ADEval's EvalAccumulator at its default 1,000 strips, which streams."""
    if not hasattr(np, "trapz"):
        np.trapz = np.trapezoid  # ADEval 1.1 uses the name that numpy 2.4 has dropped
    from adeval import EvalAccumulator  # noqa: PLC0415

    accumulator = EvalAccumulator(0, LAYERS, skip_pixel_aupro=True)
    for scores, labels in source:
        with clock:
            accumulator.add_anomap_batch(scores.numpy(), labels.numpy().astype(np.uint8))
    with clock:
        return accumulator._auroc(accumulator._pixel_acc)  # summary() needs image scores too


def _collect(source: Batches, pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores, labels, start = torch.empty(pixels), torch.empty(pixels, dtype=torch.bool), 0
    for some, theirs in source:
        scores[start : start + some.numel()], labels[start : start + some.numel()] = some.ravel(), theirs.ravel()
        start += some.numel()
    return scores, labels


CONTENDERS: dict[str, Callable[[Batches, int, Clock], float]] = {
    "scikit-learn": scikit_learn,
    "streaming (ours)": streaming,
    "torchmetrics": torchmetrics,
    "ADEval, 1000 bins": adeval,
}


def measure(contender: str, pixels: int, spread: str) -> dict[str, float | str]:
    """Run one contender in this process, a fresh one, as peak memory never falls."""
    run = CONTENDERS[contender]
    try:
        run(batches(10_000, spread), 10_000, Clock())  # imports, first-call costs
    except ImportError as error:
        return {"note": f"not installed ({error.name})"}
    for _ in batches(1, spread):  # the generator's own memory is not the contender's
        pass
    before, clock = peak_memory(), Clock()
    value = run(batches(pixels, spread), pixels, clock)
    memory = peak_memory() - before
    return {"auroc": value, "seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds, "memory_mib": memory}


def measure_apart(contender: str, pixels: int, spread: str) -> dict[str, float | str]:
    """`measure` in a fresh process; a note in place of figures where it fails."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.auc",
        "--child",
        contender,
        "--pixels",
        str(pixels),
        "--spread",
        spread,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        return {"note": f"failed ({done.returncode}): {(done.stderr.strip().splitlines() or ['no message'])[-1][:80]}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure every contender at every size and spread, print the table, write the JSON."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=float, nargs="+", default=[1e6, 1e7, 5e7], help="how many pixels")
    parser.add_argument("--spread", nargs="+", choices=["wide", "narrow"], default=["wide", "narrow"])
    parser.add_argument("--json", default="benchmarks/results/auc.json")
    parser.add_argument("--child", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, int(args.pixels[0]), args.spread[0])))
        return
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    rows = []
    for pixels in map(int, args.pixels):
        for spread in args.spread:
            found = {name: measure_apart(name, pixels, spread) for name in CONTENDERS}
            rows += _rows(found, pixels, spread)
            print_table(rows[-len(found) :], list(rows[-len(found)]))
            print()
    write_json(args.json, rows)


def _rows(found: dict[str, dict[str, float | str]], pixels: int, spread: str) -> list[dict[str, object]]:
    """Add the comparison with scikit-learn, the first contender, to what was measured."""
    exact = found["scikit-learn"]
    rows = []
    for name, figures in found.items():
        row = {"pixels": pixels, "spread": spread, "contender": name}
        for key in ("seconds", "cpu_seconds", "memory_mib", "auroc"):
            row[key] = figures.get(key, "")
        both = "auroc" in exact and "auroc" in figures
        row["error"] = abs(figures["auroc"] - exact["auroc"]) if both else ""
        row["times_faster"] = exact["seconds"] / figures["seconds"] if both else ""
        row["note"] = figures.get("note", "")
        rows.append(row)
    return rows


if __name__ == "__main__":
    run_cli(main)
