"""Pixel AUROC: the two passes against scikit-learn, torchmetrics and ADEval: time, memory, error.

    python -m benchmarks.auc --pixels 1e6 1e7 5e7

Each contender runs in a fresh process. The pixels come in batches of maps of 240 x 240, as in an evaluation. Seconds
are those spent in the contender, not in making the pixels; ours asks for them twice. Memory is the peak above the
imports and a small first run, with the scores that a contender must hold: a batch for those that stream, everything for
the others. Processor seconds are the fairer figure on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import machine, peak_memory, print_table, write_json
from utils import Parser, run_cli

LAYERS = 4
SIDE = 240
BATCH = 72  # maps: as engine.metrics takes of this size


class Pixels:
    """Score maps (B, 240, 240) float32 in [0, 4] and bool labels, 3% abnormal, made anew whenever they are asked for.

    `wide`: well-trained; `narrow`: as early in training, when all scores lie close to 2. The number is rounded up to
    whole maps.
    """

    def __init__(self, pixels: int, spread: str) -> None:
        self.images, self.spread = -(-pixels // SIDE**2), spread
        self.pixels = self.images * SIDE**2

    def batch(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and labels of the batch that begins with image `start`."""
        # By numpy, in one thread: torch's other threads would go on waiting busily into the contender's time.
        generator = np.random.default_rng(start)
        shape = min(BATCH, self.images - start), SIDE, SIDE
        labels = generator.random(shape, dtype=np.float32) < 0.03
        scores = generator.standard_normal(shape, dtype=np.float32)
        scores[labels] += 1.5
        scores = LAYERS / (1 + np.exp(2 - 1.5 * scores)) if self.spread == "wide" else 2 + 0.003 * scores
        return torch.from_numpy(scores), torch.from_numpy(labels)

    def starts(self) -> range:
        """The first image of each batch."""
        return range(0, self.images, BATCH)


class Clock:
    """Adds up the seconds, and the processor seconds of all threads, spent inside `with clock:`."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> None:
        self.seconds -= time.perf_counter()
        self.cpu_seconds -= time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter()
        self.cpu_seconds += time.process_time()

    def stopped(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` gives; its time does not count."""
        self.__exit__()
        result = make()
        self.__enter__()
        return result


def streaming(source: Pixels, clock: Clock) -> float:
    """engine.metrics.count_pixels."""
    from engine.metrics import count_pixels  # noqa: PLC0415 - each process imports its own contender only

    with clock:
        counts = count_pixels(
            lambda part: clock.stopped(lambda: source.batch(part.start)[0]),
            lambda part: clock.stopped(lambda: source.batch(part.start)[1]),
            source.images,
            BATCH,
        )
        return counts.auroc()


def scikit_learn(source: Pixels, clock: Clock) -> float:
    """sklearn.metrics.roc_auc_score: sorts everything."""
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415

    scores, labels = _collect(source)
    with clock:
        return float(roc_auc_score(labels.numpy(), scores.numpy()))


def torchmetrics(source: Pixels, clock: Clock) -> float:
    """Call torchmetrics' binary_auroc without thresholds: sorts everything."""
    from torchmetrics.functional.classification import binary_auroc  # noqa: PLC0415

    scores, labels = _collect(source)
    with clock:
        return float(binary_auroc(scores.div_(LAYERS), labels.int()))  # outside [0, 1] it would apply a sigmoid


def adeval(source: Pixels, clock: Clock) -> float:
    """ADEval's EvalAccumulator at its default 1,000 strips, which streams."""
    if not hasattr(np, "trapz"):
        np.trapz = np.trapezoid  # ADEval 1.1 uses the name that numpy 2.4 has dropped
    from adeval import EvalAccumulator  # noqa: PLC0415

    accumulator = EvalAccumulator(0, LAYERS, skip_pixel_aupro=True)
    for start in source.starts():
        scores, labels = source.batch(start)
        with clock:
            accumulator.add_anomap_batch(scores.numpy(), labels.numpy().astype(np.uint8))
    with clock:
        return accumulator._auroc(accumulator._pixel_acc)  # summary() needs image scores too


def _collect(source: Pixels) -> tuple[torch.Tensor, torch.Tensor]:
    scores, labels = torch.empty(source.images, SIDE**2), torch.empty(source.images, SIDE**2, dtype=torch.bool)
    for start in source.starts():
        for all_of_them, some in zip((scores, labels), source.batch(start), strict=True):
            all_of_them[start : start + len(some)] = some.flatten(1)
    return scores.ravel(), labels.ravel()


CONTENDERS: dict[str, Callable[[Pixels, Clock], float]] = {
    "scikit-learn": scikit_learn,
    "streaming (ours)": streaming,
    "torchmetrics": torchmetrics,
    "ADEval, 1000 bins": adeval,
}


def measure(contender: str, pixels: int, spread: str) -> dict[str, float | str]:
    """Run one contender in this process, a fresh one, as peak memory never falls."""
    run = CONTENDERS[contender]
    try:
        run(Pixels(10_000, spread), Clock())  # imports, first-call costs
    except ImportError as error:
        return {"note": f"not installed ({error.name})"}
    source, clock = Pixels(pixels, spread), Clock()
    source.batch(0)  # what making a batch takes is not the contender's
    before = peak_memory()
    value = run(source, clock)
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
            results = {name: measure_apart(name, pixels, spread) for name in CONTENDERS}
            rows += _rows(results, pixels, spread)
            print_table(rows[-len(results) :], list(rows[-len(results)]))
            print()
    write_json(args.json, rows)


def _rows(results: dict[str, dict[str, float | str]], pixels: int, spread: str) -> list[dict[str, object]]:
    """Add the comparison with scikit-learn, the first contender, to what was measured."""
    exact = results["scikit-learn"]
    rows = []
    for name, figures in results.items():
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
