"""A checkpoint to take along: as one ONNX file, which runs without PyTorch (docs/predict.md), and as a model card.

    python -m engine.export ckpt/Brain.pth --out brain.onnx
    python -m engine.export ckpt/Brain.pth --out brain.onnx --check images --precision fp16

The file holds the image tower, the adapters and, as constants, the text features: pixels -> score and heat map. Writing
it needs onnx and onnxscript; --check needs onnxruntime. Research use, not a medical device.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

from dataset.pairing import list_pictures
from dataset.readers.images import MAX_PIXELS, to_tensor
from utils import InputError, Parser, atomic_path, blame, run_cli

from .files.config import MODEL_FLAGS, SELECTS, Settings, add_model_flags, nonempty_path
from .metrics import METRICS
from .predictor import Predictor, load

OPSET = 18
LARGEST = 1536 * 2**20  # maximum bytes of weights in one file; PyTorch would put more into a second file
TOLERANCE = 1e-4  # largest accepted difference of float32 scores and maps from PyTorch's
LICENCE = "weights: see their publishers (OpenAI's CLIP: MIT; DINOv2: Apache-2.0); training data: see its source"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
SHARED = ("shots", "metrics", "select", "written", "madclip")  # entries of the checkpoint's metadata to export


def export(model: Predictor, out: str | Path, precision: str = "fp32") -> None:
    """Write a model on the CPU as an ONNX file; the metadata are strings: numbers, and settings and origin as JSON.

    Raises:
        InputError: a package is missing, adapters are MViTFC as published, the file exceeds 1.5 GiB or is not writable.
    """
    if model.network.adapters.mixes_images:
        raise InputError("MViTFC as published attends across the images of a batch, so no image has a score of its own")
    with blame("python -m engine.export", "pip install onnx onnxscript onnxruntime", errors=(ImportError,)):
        import onnxscript  # noqa: F401, PLC0415 - optional; it installs onnx too
    network, side = copy.deepcopy(model.network).to(DTYPES[precision]).eval(), model.settings.img_size
    size = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    if size > LARGEST:
        raise InputError(f"--out {out}: {size / 2**30:.1f} GiB, and an ONNX file holds 1.5; try --precision fp16")
    with torch.no_grad():
        program = torch.onnx.export(
            network, (torch.zeros(2, 3, side, side),), dynamo=True, opset_version=OPSET, external_data=False,
            input_names=["pixels"], output_names=["image_score", "anomaly_map"],
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1)}}, verbose=False,
        )  # fmt: skip
    assert program is not None
    metadata = model.checkpoint.metadata
    values = {
        "note": "research use, not a medical device", "licence": LICENCE, "labels": "normal abnormal",
        "threshold": model.threshold, "pixel_threshold": model.pixel_threshold, "img_size": side,
        "highest_score": model.layers, "precision": precision, "opset": OPSET,
        "settings": json.dumps(model.settings.to_dict()),
        "checkpoint": json.dumps({name: metadata[name] for name in SHARED if name in metadata}),
    }  # fmt: skip
    program.model.metadata_props.update({name: "" if value is None else str(value) for name, value in values.items()})
    with atomic_path(out, "--out") as temporary:
        program.save(temporary, external_data=False)


def check(model: Predictor, path: Path, folder: str, precision: str) -> None:
    """Score the images in a folder with PyTorch and with ONNX Runtime on the CPU, and print the differences.

    Raises:
        InputError: onnxruntime is missing, no image can be read, or float32 differs by more than TOLERANCE.
    """
    with blame("--check", "pip install onnxruntime", errors=(ImportError,)):
        import onnxruntime  # noqa: PLC0415 - optional
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rows = []
    for _, item in model.stream(list_pictures(Path(folder))[0], batch_size=1, side=MAX_PIXELS):
        if isinstance(item, InputError):
            print(f"skipped: {item}")
            continue
        picture, expected = item
        pixels = to_tensor(picture.image, model.settings.img_size)[None]
        (score,), (heat,) = session.run(None, {"pixels": pixels.numpy()})
        decision = None if model.threshold is None else float(score) >= model.threshold
        rows.append((abs(float(score) - expected.score), float(np.abs(heat - expected.heat).max()),
                     decision != expected.decision))  # fmt: skip
    if not rows:
        raise InputError(f"--check {folder}: no image in it that can be read")
    scores, maps, decisions = zip(*rows, strict=True)
    print(f"check: {len(rows)} images, largest difference of a score {max(scores):.2g}, of a map {max(maps):.2g}; "
          f"{sum(decisions)} decisions differ")  # fmt: skip
    if precision == "fp32" and max(*scores, *maps) > TOLERANCE:
        raise InputError(f"--check {folder}: the file differs by more than {TOLERANCE:g} from PyTorch")


def card(settings: Settings, metadata: Mapping[str, Any]) -> str:
    """The model card in Markdown: training data, results, and what has not been tested.

    The text is in card.md.jinja, where `s` is the settings and `m` the metadata.
    """
    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    page = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    return page.render(s=settings, m=metadata, metrics=METRICS, selects=SELECTS)


def main() -> None:
    """Run the command line: checkpoint -> file, card, comparison."""
    parser = Parser(prog="python -m engine.export", description="Write a checkpoint as an ONNX file.")
    add = parser.add_argument
    add("ckpt", type=nonempty_path, help="checkpoint of train.py, or one in the published format")
    add("--out", required=True, type=nonempty_path, help="the file to write; its model card is written beside it")
    add("--check", type=nonempty_path, metavar="FOLDER", help="score these images with PyTorch and with ONNX Runtime")
    add("--precision", choices=tuple(DTYPES), default="fp32", help="fp16: half of the file")
    add("--weights", type=nonempty_path, help="file with CLIP weights, instead of that in CLIP/ckpt")
    add("--obj", help="data set that a published checkpoint was trained on")
    add_model_flags(parser, from_checkpoint=True)
    options = parser.parse_args()
    flags = {name: getattr(options, name) for name in ("weights", "obj", *MODEL_FLAGS)}
    model, out = load(options.ckpt, "cpu", precision="fp32", **flags), Path(options.out)
    export(model, out, options.precision)
    print(f"{out}: opset {OPSET}, {options.precision}, {out.stat().st_size / 2**20:.0f} MiB")
    page = out.with_suffix(".md")
    with atomic_path(page) as temporary:
        temporary.write_text(card(model.settings, model.checkpoint.metadata), encoding="utf-8")
    print(f"{page}: the model card")
    if options.check:
        check(model, out, options.check, options.precision)


if __name__ == "__main__":
    run_cli(main)
