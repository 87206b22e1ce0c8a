"""What a grid of runs costs, before any of it: images through the tower, disk, and hours by counted operations.

Operations are counted from the shapes and divided by a rate of matrix products, times the share of it that the parts
reached in benchmarks/results (tower 0.8 and epochs 0.75 on a CPU). So hours are good to within a factor of two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils import VIEWS

if TYPE_CHECKING:
    from CLIP import ModelConfig

# Test images of the published sets (normal and abnormal together), for a plan without data.
TEST_IMAGES = {
    "Brain": 3715, "Liver": 1493, "Retina_RESC": 1805, "Retina_OCT2017": 968, "Chest": 17194, "Histopathology": 2036
}  # fmt: skip
CALIBRATION_IMAGES = 200  # at most, of valid/ beside the shots
PROMPTS = 42  # learnable sentences of both classes
# Of the operations of a whole text tower's pass over them, what is computed: only rows that change (fitted to
# benchmarks/results/train.json).
TEXT_SHARE = {"released": 0.42, "corrected": 0.03}
TOWER_SHARE, EPOCH_SHARE = 0.8, 0.75  # of the measured rate, on a CPU
GPU_SHARES = (0.4, 0.2)  # of a data sheet's rate: an assumption
# Dense bfloat16 products with float32 sums, 10**12 a second, from the data sheets (H100: SXM).
DATA_SHEETS = {"RTX 4090": 165e12, "H100": 989e12}


@dataclass(frozen=True)
class Cost:
    """Of a grid.

    Attributes:
        images: distinct images and views that pass through the tower.
        image_bytes: of the kept tokens of one, in float16.
        tower: floating-point operations of these passes.
        epochs: floating-point operations of training and evaluating.
    """

    images: int
    image_bytes: int
    tower: float
    epochs: float

    def hours(self, rate: float, shares: tuple[float, float]) -> float:
        """At `rate` operations a second, of which the tower and the epochs reach these shares."""
        return (self.tower / shares[0] + self.epochs / shares[1]) / rate / 3600


def tower_operations(config: ModelConfig, img_size: int, layers: int) -> float:
    """Of one image through `layers` blocks: products of weights, and attention."""
    patches = config.grid(img_size) ** 2
    tokens = patches + 1
    weights = 12 * config.width**2 * layers
    embedding = 3 * config.patch_size**2 * config.width
    return 2.0 * (tokens * weights + patches * embedding + 2 * tokens**2 * config.width * layers)


def epoch_operations(
    config: ModelConfig, img_size: int, layers: int, shots: int, test: int, batch: int, fidelity: str
) -> float:
    """Of one epoch with MFCFC adapters at `layers` layers: steps over all views of `shots` images, and the test."""
    patches = config.grid(img_size) ** 2
    trunks, head = 2 * config.width**2, 2 * config.width * config.embed_dim  # both branches
    views = VIEWS * shots
    training = 3 * views * (trunks + 2 * head)  # forward, and two products backward; both heads
    scoring = test * (trunks + head)
    tokens = PROMPTS * config.context_length
    text = TEXT_SHARE[fidelity] * 12 * config.text_width**2 * config.text_layers * tokens * (3 * -(-views // batch) + 1)
    return 2.0 * ((training + scoring) * patches * layers + text)


def store_cost(config: ModelConfig, img_size: int, layers: tuple[int, ...], images: int) -> Cost:
    """Of passing images through the tower and keeping their tokens."""
    image_bytes = len(layers) * config.grid(img_size) ** 2 * config.width * 2
    return Cost(images, image_bytes, images * tower_operations(config, img_size, max(layers)), 0.0)


def measured_rate() -> tuple[float, str]:
    """Operations a second of a matrix product here, the best of some in about a second; and on what it was measured."""
    import torch  # noqa: PLC0415 - `--help` is to be quick

    if torch.cuda.is_available():
        device, size, dtype, name = "cuda", 8192, torch.bfloat16, torch.cuda.get_device_name(0)
    else:
        device, size, dtype, name = "cpu", 2048, torch.float32, f"CPU, {torch.get_num_threads()} threads"
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * size**3 / fastest(product), name


def fastest(function: Callable[[], None], seconds: float = 1.0) -> float:
    """Seconds of the fastest call within about `seconds`, after one that warms up."""
    function()
    end, best = time.perf_counter() + seconds, float("inf")
    while (start := time.perf_counter()) < end or best == float("inf"):
        function()
        best = min(best, time.perf_counter() - start)
    return best


def describe(cost: Cost, rate: float, device: str) -> list[str]:
    """The lines of a dry run."""
    size = cost.images * cost.image_bytes / 1e9
    shares = (TOWER_SHARE, EPOCH_SHARE) if device.startswith("CPU") else GPU_SHARES
    predictions = ", ".join(f"{name} {in_words(cost.hours(of, GPU_SHARES))}" for name, of in DATA_SHEETS.items())
    return [
        f"images: at most {cost.images:,} through the frozen tower, once each",
        f"store:  {size:,.1f} GB ({cost.image_bytes / 1e6:.2f} MB an image) in float16 or bfloat16, as CUDA computes; "
        f"{2 * size:,.1f} GB in float32, as a CPU does",
        f"here:   about {in_words(cost.hours(rate, shares))}, from {rate / 1e9:,.0f} GFLOP/s of matrix products here "
        f"just now ({device})",
        f"PREDICTIONS from data-sheet rates, not measured: {predictions}",
    ]


def in_words(hours: float) -> str:
    """Hours, or below one minutes."""
    return f"{hours:,.0f} hours" if hours >= 10 else f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
