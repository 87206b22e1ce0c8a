"""One epoch at the paper's sizes, part by part, beside what its operations and bytes would take at full speed.

    python -m benchmarks.epoch --obj Brain --shot 16     512 views, 640 + 3,075 test images with masks, ViT-L-14-336
    python -m benchmarks.epoch --obj Chest --shot 16     17,194 test images, no masks

Tokens are random, so that no tower pass is needed; parts repeat until --seconds are spent and are scaled to the epoch.
The floor of a part is its multiply-adds over the matrix-product rate, and its bytes over the copy rate, both measured in
the same run; the parts of the evaluation beside scoring have the floor of one pass over their memory. Without a GPU the
same counts give PREDICTIONS for an RTX 4090 and an H100 from their data sheets' rates.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.backbone import matmul_peak
from benchmarks.common import peak_memory, print_table, write_json
from CLIP.clip import create_model
from dataset.medical_few import Sample
from engine.config import Settings, pick_autocast, pick_device
from engine.detector import Detector
from engine.evaluation import Evaluation, Masks
from engine.metrics import measure
from engine.training import TrainingState
from loss import training_loss
from utils import VIEWS, Parser, run_cli

TEST = {"Brain": (640, 3075), "Liver": (833, 660), "Retina_RESC": (1041, 764), "Retina_OCT2017": (242, 726),
        "Chest": (1000, 16194), "Histopathology": (1028, 1008)}  # fmt: skip
WITH_MASKS = ("Brain", "Liver", "Retina_RESC")
LESION = 0.02  # of an abnormal image's pixels, as in Brain
# Dense products (TFLOP/s: bfloat16 with float32 sums) and memory (TB/s) of the data sheets.
DATA_SHEETS = {"RTX 4090": (165e12, 1.01e12), "H100 SXM": (989e12, 3.35e12)}


@dataclass
class Part:
    """A part of an epoch: how often it runs, what it does once, and the operations and bytes of that."""

    name: str
    times: float
    run: Callable[[], object]
    flop: float = 0.0
    bytes: float = 0.0


def wait(device: torch.device) -> None:
    """Let the GPU finish."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(part: Part, device: torch.device, budget: float) -> float:
    """Seconds of one run of a part: the mean over as many as fit into the budget, after one that warms up."""
    part.run()
    wait(device)
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < budget:
        part.run()
        count += 1
    wait(device)
    return (time.perf_counter() - start) / count


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(Part("copy", 1, lambda: target.copy_(source)), device, 1.0)


def make_masks(images: int, abnormal: int, size: int, device: torch.device) -> Masks:
    """A square lesion in each abnormal image, at a place of its own."""
    side = round(size * LESION**0.5)
    masks = torch.zeros(abnormal, size, size, dtype=torch.bool)
    places = torch.randint(0, size - side, (abnormal, 2), generator=torch.Generator().manual_seed(0))
    for mask, (row, column) in zip(masks, places.tolist(), strict=True):
        mask[row : row + side, column : column + side] = True
    packed = Masks.pack(masks)
    rows = torch.cat([torch.full((images - abnormal,), -1), torch.arange(abnormal)])
    return Masks(rows, packed.bits.to(device), size)


def build_parts(options: object, device: torch.device) -> tuple[list[Part], Settings]:
    """The parts of an epoch on random tokens."""
    obj, shot = options.obj, options.shot  # type: ignore[attr-defined]
    normal, abnormal = TEST[obj]
    clip = create_model(options.model, "random", options.img_size, fidelity=options.fidelity, device=device, vision=False)  # type: ignore[attr-defined]
    config = clip.config
    settings = Settings(
        obj, config.name, "random", options.fidelity, options.img_size, tuple(config.default_features()), "MFCFC",  # type: ignore[attr-defined]
        "learnable_all", "yes", "mean", "sigmoid", obj, obj in WITH_MASKS, "", 32,
    )  # fmt: skip
    autocast = pick_autocast("auto", device)
    detector = Detector(clip, settings).to(device)
    state = TrainingState.start(detector, autocast, 0.001, 0)
    layers, patches, width, embed = 4, config.grid(settings.img_size) ** 2, config.width, config.embed_dim
    dtype = autocast or torch.float32
    views, batch, scored = VIEWS * shot * 2, 16, settings.eval_batch
    tokens = torch.randn(64, layers, patches, width, device=device).to(dtype)
    rows = torch.randint(0, 64, (batch,), device=device)
    labels = (torch.rand(batch, device=device) > 0.5).float()
    masks = torch.rand(batch, settings.img_size, settings.img_size, device=device) > 0.95 if settings.pixel_metrics else None
    with torch.no_grad():
        text = detector.prompts()

    def gather(count: int) -> list[Tensor]:
        chosen = tokens[rows.repeat(2)[:count]]
        return [layer.contiguous() for layer in chosen.unbind(1)]

    def score() -> Tensor:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            return detector.patch_scores(gather(scored), text)

    det = torch.randn(layers, batch, patches, 2, device=device, requires_grad=True)
    seg = torch.randn(layers, batch, patches, 2, device=device, requires_grad=True) if settings.pixel_metrics else None

    def losses() -> None:
        training_loss(det, seg, labels, None if masks is None else masks.float(), "sigmoid", "mean").total.backward()

    images = normal + abnormal
    samples = [Sample(Path(f"{i}.png"), int(i >= normal), None, f"{i}.png") for i in range(images)]
    scores = torch.randn(images, layers, patches, device=device) * 0.1
    packed = make_masks(images, abnormal, settings.img_size, device) if settings.pixel_metrics else None
    evaluation = Evaluation(samples, scores, detector.scoring_head, settings.img_size, "mean")

    def fresh() -> Evaluation:
        return Evaluation(samples, scores, detector.scoring_head, settings.img_size, "mean")

    pixels = 4.0 * settings.img_size**2
    trunk, head = 2.0 * 2 * width**2 * patches * layers, 2.0 * 2 * width * embed * patches * layers  # FLOP an image
    heads = 2 if settings.pixel_metrics else 1
    token_bytes = layers * patches * width * dtype.itemsize
    parts = [
        Part("step: text, adapters, losses, Adam", views / batch,
             lambda: state.step(gather(batch), labels, masks, None), batch * 3 * (trunk + heads * head), batch * 2 * token_bytes),
        Part("  of it: text forward and backward", views / batch, lambda: detector.prompts().sum().backward()),
        Part("  of it: losses forward and backward", views / batch, losses, 0.0, batch * layers * pixels * 6),
        Part("  of it: gather tokens", views / batch, lambda: gather(batch), 0.0, batch * 2 * token_bytes),
        Part("scoring", images / scored, score, scored * (trunk + head), scored * 2 * token_bytes),
        Part("image scores", 1, lambda: fresh().image_scores, 0.0, images * layers * pixels * 2 if packed else 0.0),
        Part("maps, masks, metrics", 1, lambda: measure(evaluation, packed), 0.0, images * pixels * 4 if packed else 0.0),
    ]  # fmt: skip
    if packed is not None:
        parts.append(Part("  of it: maps", images / scored, lambda: evaluation.maps(slice(0, scored)), 0.0, scored * layers * pixels * 2))
        parts.append(Part("  of it: masks", images / scored, lambda: packed.get(slice(images - scored, images)), 0.0, scored * pixels / 2))
    return parts, settings


def main() -> None:
    """Command line."""
    parser = Parser(prog="python -m benchmarks.epoch", description=__doc__.split("\n\n")[0])
    parser.add_argument("--obj", default="Brain", choices=tuple(TEST))
    parser.add_argument("--shot", type=int, default=16)
    parser.add_argument("--model", default="ViT-L-14-336")
    parser.add_argument("--img_size", type=int, default=240)
    parser.add_argument("--fidelity", default="released", choices=("released", "corrected"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=5.0, help="spent on a part that is repeated")
    parser.add_argument("--json", default=None, help="(default: benchmarks/results/epoch-<obj>.json)")
    options = parser.parse_args()
    device = pick_device(options.device)
    parts, settings = build_parts(options, device)
    flops, copies = matmul_peak(str(device)) * 1e9, copy_rate(device)
    rows = []
    for part in parts:
        once = seconds_of(part, device, 0.0 if part.times == 1 else options.seconds)
        floor = max(part.flop / flops, part.bytes / copies) * part.times
        predictions = {
            f"{name} s (PREDICTED)": max(part.flop / rate, part.bytes / memory) * part.times
            for name, (rate, memory) in DATA_SHEETS.items()
        }
        row = {"part": part.name, "times": round(part.times, 1), "s": once * part.times, "floor s": floor}
        rows.append(row | ({} if device.type == "cuda" else predictions))
    totals = {name: sum(row[name] for row in rows if not row["part"].startswith("  ")) for name in rows[0] if name.endswith(("s", ")"))
              and name not in ("times",)}  # fmt: skip
    rows.append({"part": "epoch", **totals})
    by_name = {row["part"]: row["s"] for row in rows}
    beside = by_name["image scores"] + by_name["maps, masks, metrics"]
    share = beside / (beside + by_name["scoring"])
    print_table(rows, list(rows[0]))
    print(f"{options.obj}, {settings.model_name}, {device}: {flops / 1e12:.3f} TFLOP/s of products, {copies / 1e9:.1f} GB/s of copies")
    print(f"of the evaluation, {share:.1%} is not scoring; peak memory {peak_memory():,.0f} MiB")
    if device.type == "cuda":
        print(f"GPU memory: {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB")
    write_json(options.json or f"benchmarks/results/epoch-{options.obj}.json", rows)


if __name__ == "__main__":
    run_cli(main)
