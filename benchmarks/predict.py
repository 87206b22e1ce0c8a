"""predict.py against the frozen tower alone: images a second with all its files, and whether memory stays flat.

python -m benchmarks.predict                                     ViT-L-14-336 at 240 px, 48 images, in turns
python -m benchmarks.predict --model ViT-tiny-14-56 --img_size 56 --images 2000 --turns 1      memory over many images

The images are phantom MR slices of 512 pixels as PNG; predict.py reads them, writes overlay, heat map and contours of
each, and its tables. Neither start-up nor loading is counted. The tower alone has the same images, decoded before. The
share of CPU time says on a busy machine what the share of time says on an idle one without a GPU.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import peak_memory, print_table, write_json
from CLIP.clip import create_model
from CLIP.weights import find_weights
from dataset import phantom
from dataset.readers import load_image
from engine.detector import Detector
from engine.files.checkpoint import Checkpoint
from engine.files.config import Settings
from engine.predictor import Predictor, build, reading_of
from engine.report.predictions import Results
from engine.scans import list_entries
from predict import parse, predict
from utils import Parser, run_cli


def write_checkpoint(path: Path, model: str, img_size: int) -> None:
    """An untrained checkpoint whose pixel threshold cuts its heat maps in half, so that there are contours to draw."""
    weights = find_weights(model, "random")
    layers = tuple(weights.config.default_features())
    settings = Settings(
        obj="Brain", model_name=model, pretrain="random", fidelity="released", img_size=img_size, features_list=layers,
        visionA="MFCFC", text_mood="learnable_all", contrast_mood="yes", dec_type="mean", loss_type="sigmoid",
        prompt_name="Brain", pixel_metrics=True, weights_sha256=weights.sha256, eval_batch=32,
    )  # fmt: skip
    middle = len(layers) / 2
    threshold = {
        "value": middle, "pixel_value": middle, "heat_range": [middle - 0.1, middle + 0.1], "rule": "the largest F1",
        "from": "nothing", "figures": {"f1": 1.0, "tpr": 1.0, "fpr": 0.0, "n_normal": 1, "n_abnormal": 1},
    }  # fmt: skip
    detector = Detector(create_model(weights, img_size=img_size, vision=False), settings)
    Checkpoint(settings, detector.parts(), {"select": "last", "threshold": threshold}).save(path)


def tower_seconds(model: Predictor, paths: list[Path], batch: int) -> tuple[float, float]:
    """Seconds, and CPU seconds of all threads, of the tower alone on decoded images."""
    size, layers = model.settings.img_size, model.settings.features_list
    images = torch.stack([load_image(path, size) for path in paths[: 4 * batch]])
    batches = [images[torch.arange(start, start + batch) % len(images)] for start in range(0, len(paths), batch)]
    batches[-1] = batches[-1][: len(paths) - batch * (len(batches) - 1)]
    start, start_cpu = time.perf_counter(), time.process_time()
    for part in batches:
        tokens = model.clip.image_tokens(part.to(model.clip.device), layers)
    tokens[0].sum().item()  # waits for a GPU
    return time.perf_counter() - start, time.process_time() - start_cpu


def main() -> None:
    """Command line."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="ViT-L-14-336")
    parser.add_argument("--img_size", type=int, default=240)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--turns", type=int, default=2, help="of tower and predict.py, one after the other")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", default="benchmarks/results/predict.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        phantom.write(home, ["Brain"], valid=2, test=12, seed=0, size=512)
        sources = sorted((home / "Brain_AD/test").glob("*/img/*.png"))
        (home / "images").mkdir()
        for i in range(given.images):
            (home / f"images/{i:05d}.png").symlink_to(sources[i % len(sources)])
        write_checkpoint(home / "c.pth", given.model, given.img_size)
        words = ["--ckpt", home / "c.pth", home / "images", "--out", home / "out", "--batch_size", given.batch]
        options = parse([*map(str, words), "--device", given.device])
        model = build(Checkpoint.load(home / "c.pth"), options)
        rows = []
        for turn in range(1, given.turns + 1):
            counts = sorted({max(given.images // 4, given.batch), given.images}) if turn == 1 else [given.images]
            for many in counts:
                listing = list_entries(options.images, reading_of(model.settings), False)
                listing.entries = listing.entries[:many]
                tower, tower_cpu = tower_seconds(model, [entry.frame.path for entry in listing.entries], given.batch)
                start, start_cpu = time.perf_counter(), time.process_time()
                predict(model, Results(options, "", listing.entries), listing, options)
                seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
                rows.append({
                    "model": given.model, "turn": turn, "images": many, "tower images/s": many / tower,
                    "predict.py images/s": many / seconds, "share": tower / seconds,
                    "share of CPU time": tower_cpu / cpu, "peak MiB": peak_memory(),
                })  # fmt: skip
        print_table(rows, list(rows[0]))
    write_json(given.json, rows)


if __name__ == "__main__":
    run_cli(main)
