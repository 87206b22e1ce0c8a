"""Pixel AUROC: the two passes against scikit-learn: time and error.

    python -m benchmarks.auc --pixels 1e6 1e7 5e7

Times are of the contender alone, without generating the pixels (ours requests them twice).
"""

import time

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.common import print_table, write_json
from engine.metrics import count_pixels
from utils import Parser, run_cli

SIDE = 240
BATCH = 72  # maps at a time, as in engine.metrics for this size


class Pixels:
    """Score maps (B, 240, 240) float32 in [0, 4] and bool labels, 3% abnormal, generated anew for each request.

    `wide`: scores as after training; `narrow`: as early in training, when all scores lie close to 2.
    """

    def __init__(self, pixels: int, spread: str) -> None:
        self.images, self.spread = -(-pixels // SIDE**2), spread
        self.making = 0.0  # seconds

    def batch(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and labels of the batch that begins with image `start`."""
        began = time.perf_counter()
        # By numpy, in one thread: torch's other threads would keep spinning while the contender is timed.
        generator = np.random.default_rng(start)
        shape = min(BATCH, self.images - start), SIDE, SIDE
        labels = generator.random(shape, dtype=np.float32) < 0.03
        scores = generator.standard_normal(shape, dtype=np.float32) + 1.5 * labels.astype(np.float32)
        scores = 4 / (1 + np.exp(2 - 1.5 * scores)) if self.spread == "wide" else 2 + 0.003 * scores
        self.making += time.perf_counter() - began
        return torch.from_numpy(scores), torch.from_numpy(labels)


def ours(source: Pixels) -> float:
    """engine.metrics.count_pixels."""
    maps, masks = (lambda part: source.batch(part.start)[0]), (lambda part: source.batch(part.start)[1])
    return count_pixels(maps, masks, source.images, BATCH).auroc()


def scikit_learn(source: Pixels) -> float:
    """sklearn.metrics.roc_auc_score: sorts everything."""
    scores, labels = zip(*(source.batch(start) for start in range(0, source.images, BATCH)), strict=True)
    return float(roc_auc_score(torch.cat(labels).flatten().numpy(), torch.cat(scores).flatten().numpy()))


def main() -> None:
    """Measure both at every size and spread, print the table, write the JSON."""
    parser = Parser(prog="python -m benchmarks.auc", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pixels", type=float, nargs="+", default=[1e6, 1e7, 5e7], help="how many pixels")
    parser.add_argument("--json", default="benchmarks/results/auc.json")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for pixels, spread in ((pixels, spread) for pixels in map(int, options.pixels) for spread in ("wide", "narrow")):
        found = []
        for contender in (scikit_learn, ours):
            contender(Pixels(10_000, spread))  # first-call costs
            source, start = Pixels(pixels, spread), time.perf_counter()
            value = contender(source)
            found.append((time.perf_counter() - start - source.making, value))
        (slow, exact), (seconds, value) = found
        row = {"scikit-learn s": slow, "ours s": seconds, "faster": slow / seconds, "error": abs(value - exact)}
        rows.append({"pixels": pixels, "spread": spread, **row})
        print_table(rows, list(rows[0]))
    write_json(options.json, rows)


if __name__ == "__main__":
    run_cli(main)
