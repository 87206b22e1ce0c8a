"""The frozen image tower: images a second, and its share of what a matrix product reaches on this machine.

python -m benchmarks.backbone                          ViT-L-14-336 at 240 px, batches of 8 and 16
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.common import print_table, write_json
from CLIP.clip import create_model
from CLIP.model import CLIP
from utils import Parser, run_cli


def best(function: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of some runs, after one that warms up."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def matmul_peak(device: str, size: int = 4096) -> float:
    """GFLOP/s of a square float32 matrix product, the best of several."""
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    out = torch.empty_like(a)
    return 2 * size**3 / best(lambda: torch.mm(a, b, out=out), 8) / 1e9


def gflop(clip: CLIP, layers: int) -> float:
    """10**9 operations of one image through `layers` blocks: products of weights, and attention."""
    config = clip.config
    tokens = config.grid(clip.img_size) ** 2 + 1
    weights = 12 * config.width**2 * layers
    patches = 3 * config.patch_size**2 * config.width
    return 2 * (tokens * weights + (tokens - 1) * patches + 2 * tokens**2 * config.width * layers) / 1e9


def main() -> None:
    """Command line."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="ViT-L-14-336")
    parser.add_argument("--img_size", type=int, default=240)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default="benchmarks/results/backbone.json")
    options = parser.parse_args()
    clip = create_model(options.model, "random", options.img_size, device=options.device)
    layers = clip.config.default_features()
    contenders = {"ours": lambda images: clip.image_tokens(images, layers), **open_clip_tower(clip, layers)}
    rows = []
    for batch in options.batch:
        images = torch.rand(batch, 3, options.img_size, options.img_size, device=options.device)
        for name, tower in contenders.items():
            peak = matmul_peak(options.device)
            seconds = best(lambda tower=tower, images=images: tower(images), 2)
            rate = gflop(clip, max(layers)) * batch / seconds
            rows.append({
                "tower": name, "batch": batch, "images/s": batch / seconds, "GFLOP/s": rate, "matmul GFLOP/s": peak,
                "share": rate / peak,
            })  # fmt: skip
            print_table(rows, list(rows[0]))
    write_json(options.json, rows)


def open_clip_tower(clip: CLIP, layers: list[int]) -> dict[str, Callable[[torch.Tensor], object]]:
    """open_clip's tower with the same weights, where it is installed (make test installs it)."""
    try:
        import open_clip  # noqa: PLC0415 - a development dependency
    except ImportError:
        return {}
    config = clip.config
    tower = open_clip.transformer.VisionTransformer(
        clip.img_size, config.patch_size, config.width, config.layers, config.heads, 4.0, output_dim=config.embed_dim
    )
    tower.load_state_dict(clip.visual.state_dict())
    tower.eval().requires_grad_(False).to(clip.device)

    def run(images: torch.Tensor) -> object:
        with torch.no_grad():
            return tower.forward_intermediates(
                images, indices=[layer - 1 for layer in layers], intermediates_only=True, output_fmt="NLC"
            )

    return {"open_clip": run}


if __name__ == "__main__":
    run_cli(main)
