"""One epoch at the paper's sizes, part by part, beside what its operations and bytes would take at full speed.

    python -m benchmarks.epoch --obj Brain --shot 16     512 views, 640 + 3,075 test images with masks, ViT-L-14-336
    python -m benchmarks.epoch --obj Chest --shot 16     17,194 test images, no masks

Tokens are random; each part runs three times, and its best time is scaled to a whole epoch. The floor of a part is the
larger of two times: operations over matrix-product rate, and bytes over copy rate. Both rates are measured in the same
run; without a GPU, the rates in data sheets give PREDICTIONS for an RTX 4090 and an H100 as well.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.common import (
    best,
    copy_rate,
    learner,
    matmul_rate,
    peak_memory,
    print_table,
    tower_operations,
    write_json,
)
from dataset.readers.images import Sample
from dataset.views import VIEWS
from engine.distributed import pick_autocast, pick_device
from engine.evaluation import Evaluation, Masks
from engine.features import chunk_size
from engine.metrics import measure
from utils import Parser, run_cli

TEST = {"Brain": (640, 3075), "Chest": (1000, 16194)}  # normal and abnormal test images
LESION = 0.02  # fraction of an abnormal image's pixels, as in Brain
TOWER = "the tower, all test images once"  # not part of an epoch
# From the data sheets (H100: SXM): dense bfloat16 products with float32 sums, and bytes of memory, a second.
PREDICTED = {"RTX 4090 s, PREDICTED": (165e12, 1.01e12), "H100 s, PREDICTED": (989e12, 3.35e12)}


@dataclass
class Part:
    """A part of an epoch: how often it runs, a function that runs it once, and the operations and bytes of one run."""

    name: str
    times: float
    run: Callable[[], object]
    flop: float = 0.0
    bytes: float = 0.0


class Epoch:
    """The parts of an epoch, on random tokens of the real sizes."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.device, self.autocast, self.chunk = device, pick_autocast("auto", device), chunk_size(device)
        self.clip, self.state = learner(options, device, self.autocast)
        self.detector, config = self.state.detector, self.clip.config
        self.settings = self.detector.settings
        self.views = 2 * VIEWS * options.shot
        self.normal, self.abnormal = TEST[options.obj]
        self.layers, self.patches = len(self.settings.features_list), config.grid(options.img_size) ** 2
        self.width, self.embed_dim, self.size = config.width, config.embed_dim, options.img_size
        dtype = self.autocast or torch.float32
        self.tokens = torch.randn(64, self.layers, self.patches, self.width, device=device).to(dtype)
        with torch.no_grad():
            self.text = self.detector.prompts()

    @property
    def images(self) -> int:
        """The number of test images."""
        return self.normal + self.abnormal

    def gather(self, count: int) -> list[Tensor]:
        """Tokens of a batch, as `TokenStore.get` gathers them: K tensors (B, N, C)."""
        rows = torch.randint(0, len(self.tokens), (count,), device=self.device)
        return [layer.contiguous() for layer in self.tokens[rows].unbind(1)]

    def score(self) -> Tensor:
        """Patch scores of a batch of the evaluation."""
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return self.detector.patch_scores(self.gather(self.chunk), self.text)

    def text_operations(self) -> float:
        """Operations of the prompts' pass: forward, and the gradient of its input; the frozen weights need none."""
        encode = self.detector.prompts.encode
        positions = len(encode.rows[0]) if encode.causal else len(encode.eot) * encode.length
        width = encode.text.positional_embedding.shape[1]
        return 2 * 24.0 * width**2 * positions * (len(encode.text.transformer.blocks) - 1)

    def evaluation(self) -> tuple[Evaluation, Masks | None]:
        """Random scores of all test images, and masks: a square lesion in each abnormal one."""
        names = [f"{i}.png" for i in range(self.images)]
        samples = [Sample(Path(name), int(i >= self.normal), (), name) for i, name in enumerate(names)]
        scores = 0.1 * torch.randn(self.images, self.layers, self.patches, device=self.device)
        evaluation = Evaluation(samples, scores, self.detector.scoring_head, self.size, "mean")
        if not self.settings.pixel_metrics:
            return evaluation, None
        mask, side = torch.zeros(1, self.size, self.size, dtype=torch.bool), round(self.size * LESION**0.5)
        mask[:, self.size // 3 :, self.size // 3 :][:, :side, :side] = True
        bits = Masks.pack(mask).bits.repeat(self.abnormal, 1)
        rows = torch.cat([torch.full((self.normal,), -1), torch.arange(self.abnormal)])
        return evaluation, Masks(rows, bits.to(self.device), self.size)

    def parts(self, batch: int = 16) -> list[Part]:
        """The parts of an epoch; those with two blanks before the name are included in the part above."""
        masked, scored = self.settings.pixel_metrics, self.chunk
        labels = (torch.rand(batch, device=self.device) > 0.5).float()
        masks = torch.rand(batch, self.size, self.size, device=self.device) > 0.95 if masked else None
        evaluation, packed = self.evaluation()
        store = SimpleNamespace(get=self.gather, with_room=lambda action: action())
        # Operations and bytes per image: trunks of both branches, one head of both, the map of a layer, all tokens.
        trunks = 4.0 * self.width**2 * self.patches * self.layers
        head = 4.0 * self.width * self.embed_dim * self.patches * self.layers
        pixels, tokens = 4.0 * self.size**2, float(self.tokens[0].nbytes)
        steps, batches = self.views / batch, self.images / scored
        return [
            Part("step: text, adapters, losses, Adam", steps,
                 lambda: self.state.step(store, batch, labels, masks, None),
                 batch * 3 * (trunks + (1 + masked) * head) + self.text_operations(), batch * 2 * tokens),
            Part("  text, forward and backward", steps, lambda: self.detector.prompts().sum().backward(),
                 self.text_operations()),
            Part("scoring", batches, self.score, scored * (trunks + head), scored * 2 * tokens),
            Part("image scores", 1, lambda: replace(evaluation).image_scores, 0.0,
                 self.images * self.layers * pixels * masked),
            Part("maps, masks, metrics", 1, lambda: measure(evaluation, packed), 0.0,
                 self.images * (self.layers + 2) * pixels * masked),
        ]  # fmt: skip

    def tower(self) -> Part:
        """The image tower, which runs once for each image."""
        images = torch.rand(self.chunk, 3, self.size, self.size, device=self.device)
        operations = self.chunk * tower_operations(self.clip.config, self.size, max(self.settings.features_list))

        def run() -> None:
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                self.clip.image_tokens(images, self.settings.features_list)

        return Part(TOWER, self.images / self.chunk, run, operations)


def time_epoch(epoch: Epoch) -> tuple[list[dict[str, object]], dict[str, float]]:
    """Time all parts; returns the rows of the table, and figures such as rates, ratios to the floors, and memory."""
    device = epoch.device
    flops, copies = matmul_rate(device, epoch.autocast or torch.float32), copy_rate(device)
    rates = {"floor s": (flops, copies)} | ({} if device.type == "cuda" else PREDICTED)
    rows: list[dict[str, object]] = []
    whole = dict.fromkeys(("s", *rates), 0.0)
    for part in (*epoch.parts(), epoch.tower()):
        row = {"s": best(part.run) * part.times}
        row |= {name: max(part.flop / flop, part.bytes / copy) * part.times for name, (flop, copy) in rates.items()}
        rows.append({"part": part.name, "times": round(part.times, 1), **row})
        if not part.name.startswith("  ") and part.name != TOWER:
            whole = {name: whole[name] + row[name] for name in whole}
    rows.append({"part": "epoch", **whole})
    taken = {row["part"]: row for row in rows}
    beside = taken["image scores"]["s"] + taken["maps, masks, metrics"]["s"]
    return rows, {
        "TFLOP/s of products": flops / 1e12,
        "GB/s copied": copies / 1e9,
        "tower / products": taken[TOWER]["floor s"] / taken[TOWER]["s"],
        "epoch / floor": whole["s"] / whole["floor s"],
        "beside scoring s": beside,
        "beside scoring / evaluation": beside / (beside + taken["scoring"]["s"]),
        "peak MiB": peak_memory(),
        **({"GPU MiB": torch.cuda.max_memory_allocated() / 2**20} if device.type == "cuda" else {}),
    }


def main() -> None:
    """Run the command line."""
    parser = Parser(prog="python -m benchmarks.epoch", description=__doc__.split("\n\n")[0])
    parser.add_argument("--obj", default="Brain", choices=tuple(TEST))
    parser.add_argument("--shot", type=int, default=16)
    parser.add_argument("--model", default="ViT-L-14-336")
    parser.add_argument("--img_size", type=int, default=240)
    parser.add_argument("--fidelity", default="released", choices=("released", "corrected"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", default=None, help="(default: benchmarks/results/epoch-<obj>.json)")
    options = parser.parse_args()
    rows, figures = time_epoch(Epoch(options, pick_device(options.device)))
    print_table(rows, list(rows[0]))
    print_table([figures], list(figures))
    write_json(options.json or f"benchmarks/results/epoch-{options.obj}.json", [*rows, figures])


if __name__ == "__main__":
    run_cli(main)
