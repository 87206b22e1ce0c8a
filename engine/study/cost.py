"""What a grid of runs costs, before any of it: images through the tower, disk, and hours by counted operations.

Operations are counted from the shapes and divided by a rate of matrix products, times the share of it that the parts
reached in benchmarks/results. So hours are good to within a factor of two.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from CLIP.config import ModelConfig
from dataset.layout import PUBLISHED_COUNTS
from dataset.views import VIEWS
from utils import InputError

from .grid import Cell, Grid, layers_of

CALIBRATION_IMAGES = 200  # at most, of valid/ beside the shots
PROMPTS = 42  # learnable sentences of both classes
# Of the operations of a whole text tower's pass over them, what is computed: only rows that change (fitted to
# benchmarks/results/train.json).
TEXT_SHARE = {"released": 0.42, "corrected": 0.03}
CPU_SHARES = (0.8, 0.75)  # of the measured rate, by the tower and by the epochs
GPU_SHARES = (0.4, 0.2)  # of a data sheet's rate: an assumption
# Dense bfloat16 products with float32 sums, 10**12 a second, from the data sheets (H100: SXM).
DATA_SHEETS = {"RTX 4090": 165e12, "H100": 989e12}


class Cost(NamedTuple):
    """Of a grid."""

    images: int  # distinct images and views that pass through the tower
    image_bytes: int  # of the kept tokens of one, in float16
    tower: float  # floating-point operations of these passes
    epochs: float  # of training and evaluating
    unknown: Sequence[str] = ()  # data sets whose test images are not counted, since they are not there

    def hours(self, rate: float, shares: tuple[float, float]) -> float:
        """At `rate` operations a second, of which the tower and the epochs reach these shares."""
        return (self.tower / shares[0] + self.epochs / shares[1]) / rate / 3600

    def describe(self, rate: float, device: str) -> str:
        """The lines of a dry run, for the rate that was measured on `device`."""
        size, shares = self.images * self.image_bytes / 1e9, CPU_SHARES if device.startswith("CPU") else GPU_SHARES
        predictions = [f"{name} {readable_hours(self.hours(of, GPU_SHARES))}" for name, of in DATA_SHEETS.items()]
        lines = [
            f"images: at most {self.images:,} through the frozen tower, once each",
            f"store:  {size:,.1f} GB ({self.image_bytes / 1e6:.2f} MB an image) in float16 or bfloat16, as CUDA "
            f"computes; {2 * size:,.1f} GB in float32, as a CPU does",
            f"here:   about {readable_hours(self.hours(rate, shares))}, from {rate / 1e9:,.0f} GFLOP/s of matrix "
            f"products here just now ({device})",
            f"PREDICTIONS from data-sheet rates, not measured: {', '.join(predictions)}",
        ]
        unknown = f"not counted, as they are not there: the test images of {', '.join(self.unknown)}"
        return "\n".join([*lines, *[unknown] * bool(self.unknown)])


def readable_hours(hours: float) -> str:
    """Hours, or below one minutes."""
    return f"{hours:,.0f} hours" if hours >= 10 else f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def grid_cost(grid: Grid, cells: Sequence[Cell]) -> Cost:
    """What some cells of a grid cost; they share images, as they share the store."""
    config, img_size = ModelConfig.load(grid.base.model_name), grid.base.img_size
    tests = {obj: count_tests(grid, obj) for obj in {obj for cell in cells for obj in (cell.obj, *cell.others)}}
    images: dict[tuple[object, ...], int] = {}
    layers, operations = set[int](), 0.0
    for cell in cells:
        options = grid.parse(cell)
        fidelity, shots = options.fidelity, 2 * options.shot
        layers |= set(layers_of(options))
        images |= {(fidelity, obj): tests[obj] or 0 for obj in (cell.obj, *cell.others)}
        images[fidelity, cell.obj, "calibration"] = CALIBRATION_IMAGES
        drawn_by = cell.seed if options.iterate < 0 else None
        images[fidelity, cell.obj, cell.sources, cell.shot, drawn_by] = (VIEWS - 1) * shots
        images[fidelity, cell.obj, cell.sources, cell.shot, "jitter", cell.seed] = shots
        if not cell.baselines:
            read = len(layers_of(options))
            epoch = epoch_operations(config, img_size, read, shots, tests[cell.obj] or 0, options.batch_size, fidelity)
            operations += options.epoch * epoch
    passed = sum(images.values())
    tower, image_bytes = tower_operations(config, img_size, max(layers)), config.grid(img_size) ** 2 * config.width * 2
    unknown = sorted(obj for obj, count in tests.items() if count is None)
    return Cost(passed, len(layers) * image_bytes, passed * tower, operations, unknown)


def count_tests(grid: Grid, obj: str) -> int | None:
    """How many test images a data set has: counted, or where it is not there as published; None: not known."""
    try:
        return len(grid.dataset(obj).samples("test"))
    except InputError:
        return sum(PUBLISHED_COUNTS[obj]["test"][0]) if obj in PUBLISHED_COUNTS else None


def tower_operations(config: ModelConfig, img_size: int, layers: int) -> float:
    """Of one image through `layers` blocks: products of weights, and attention."""
    patches, width = config.grid(img_size) ** 2, config.width
    block = 12 * width**2 * (patches + 1) + 2 * width * (patches + 1) ** 2
    return 2.0 * (layers * block + patches * 3 * config.patch_size**2 * width)


def epoch_operations(
    config: ModelConfig, img_size: int, layers: int, shots: int, test: int, batch: int, fidelity: str
) -> float:
    """Of one epoch with MFCFC adapters at `layers` layers: steps over all views of `shots` images, and the test."""
    patches, views = config.grid(img_size) ** 2, VIEWS * shots
    trunks, head = 2 * config.width**2, 2 * config.width * config.embed_dim  # both branches
    training = 3 * views * (trunks + 2 * head)  # forward, and two products backward; both heads
    tokens, passes = PROMPTS * config.context_length, 3 * -(-views // batch) + 1
    text = TEXT_SHARE[fidelity] * 12 * config.text_width**2 * config.text_layers * tokens * passes
    return 2.0 * ((training + test * (trunks + head)) * patches * layers + text)


def measured_rate(seconds: float = 1.0) -> tuple[float, str]:
    """Operations a second of a matrix product here, the best of some in `seconds`; and on what it was measured."""
    device, size, dtype, name = "cpu", 2048, torch.float32, f"CPU, threads: {torch.get_num_threads()}"
    if torch.cuda.is_available():
        device, size, dtype, name = "cuda", 8192, torch.bfloat16, torch.cuda.get_device_name(0)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times, end = list[float](), time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:  # the first warms up
        start = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times), name
