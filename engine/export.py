"""A checkpoint as one ONNX file, which runs without PyTorch: pixels -> score and heat map (docs/predict.md).

    python -m engine.export ckpt/Brain.pth --out brain.onnx
    python -m engine.export ckpt/Brain.pth --out brain.onnx --check images --precision fp16

Image tower, adapters and text features, as constants, are in it; beside it a model card. Needs onnx and onnxscript;
--check needs onnxruntime. Research use, not a medical device.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dataset.readers.grey import Picture
from dataset.readers.images import frames, list_files, to_tensor
from loss import anomaly_map, image_score, patch_difference
from utils import InputError, Parser, atomic_path, blame, run_cli

from .card import write_card
from .files.config import nonempty_path
from .predictor import Predictor, load, open_picture

OPSET = 18
LARGEST = 2**31  # bytes of an ONNX file
BAR = 1e-4  # by which score and map of float32 may differ from PyTorch's
LICENCE = "of the weights: that of their publishers (OpenAI's CLIP: MIT); of the data trained on: see there"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Portable(nn.Module):
    """Pixels (B, 3, S, S) float32 in [0, 1] -> scores (B,) and heat maps (B, S, S), float32 in [0, K].

    `dtype` is that of tower and adapters; scores are summed up in float32.
    """

    def __init__(self, model: Predictor, dtype: torch.dtype) -> None:
        super().__init__()
        assert model.clip.visual is not None
        self.visual, self.adapters = model.clip.visual, model.detector.adapters
        if dtype != torch.float32:  # which leaves the model as it is
            self.visual, self.adapters = copy.deepcopy(self.visual).to(dtype), copy.deepcopy(self.adapters).to(dtype)
        self.settings, self.head, self.dtype = model.settings, model.detector.scoring_head, dtype
        self.register_buffer("text", model.detector.prompts().detach().to(dtype))  # (D, 2)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `Predictor.predict_tensors`."""
        tokens = self.visual.forward_intermediates(pixels.to(self.dtype), sorted(self.settings.features_list))
        first = 0 if self.adapters.reads_class_token else 1
        (scores,) = self.adapters([layer[:, first:] for layer in tokens], self.text, (self.head,))
        patches = patch_difference(scores.float())
        heat = anomaly_map(patches, self.settings.img_size)
        return image_score(patches, self.settings.dec_type) if self.head == "det" else heat.flatten(1).amax(1), heat


def export(model: Predictor, out: str | Path, precision: str = "fp32") -> None:
    """Write the ONNX file of a model on the CPU.

    Raises:
        InputError: a package is missing, MViTFC as published, a file of more than 2 GiB, or it cannot be written.
    """
    if model.detector.adapters.mixes_images:
        raise InputError("MViTFC as published looks across the images of a batch: its scores are no image's own")
    with blame("python -m engine.export", "pip install onnx onnxscript onnxruntime", errors=(ImportError,)):
        import onnx  # noqa: F401, PLC0415 - optional
        import onnxscript  # noqa: F401, PLC0415 - optional
    portable = Portable(model, DTYPES[precision])
    size = sum(tensor.nbytes for tensor in (*portable.parameters(), *portable.buffers()))
    if size > LARGEST:
        raise InputError(f"--out {out}: {size / 2**30:.1f} GiB, and an ONNX file holds 2; try --precision fp16")
    side = model.settings.img_size
    with torch.no_grad():
        program = torch.onnx.export(
            portable, (torch.zeros(2, 3, side, side),), dynamo=True, opset_version=OPSET, external_data=False,
            input_names=["pixels"], output_names=["image_score", "anomaly_map"],
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1)}}, verbose=False,
        )  # fmt: skip
    assert program is not None
    program.model.metadata_props.update(describe(model, precision))
    with atomic_path(out, "--out") as temporary:
        program.save(temporary, external_data=False)


def describe(model: Predictor, precision: str) -> dict[str, str]:
    """What the file says of itself, in ONNX's texts: thresholds and sizes as numbers, settings and origin as JSON."""
    metadata = model.checkpoint.metadata
    shared = {name: metadata[name] for name in ("shots", "metrics", "select", "written", "madclip") if name in metadata}
    values = {
        "note": "research use, not a medical device", "licence": LICENCE, "labels": "normal abnormal",
        "threshold": model.threshold, "pixel_threshold": model.pixel_threshold, "img_size": model.settings.img_size,
        "highest_score": model.layers, "precision": precision, "opset": OPSET,
        "settings": json.dumps(model.settings.to_dict()), "checkpoint": json.dumps(shared),
    }  # fmt: skip
    return {name: "" if value is None else str(value) for name, value in values.items()}


def compare(model: Predictor, path: str | Path, images: list[Path]) -> tuple[float, float, int, int]:
    """Score images with PyTorch and with ONNX Runtime on the CPU.

    Returns:
        The largest difference of a score, that of a pixel of a map, the number of decisions that differ, and of images.

    Raises:
        InputError: onnxruntime is missing, or no image can be read.
    """
    with blame("--check", "pip install onnxruntime", errors=(ImportError,)):
        import onnxruntime  # noqa: PLC0415 - optional
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    scores, maps, decisions, count = 0.0, 0.0, 0, 0
    for pixels in _pixels(model, images):
        expected = model.predict_tensors(pixels, [(1, 1)])[0]
        score, heat = session.run(None, {"pixels": pixels.numpy()})
        scores = max(scores, abs(float(score[0]) - expected.score))
        maps = max(maps, float(np.abs(heat[0] - expected.heat).max()))
        decisions += model.threshold is not None and (float(score[0]) >= model.threshold) != expected.decision
        count += 1
    if not count:
        raise InputError("--check: no image in it that can be read")
    return scores, maps, decisions, count


def _pixels(model: Predictor, images: list[Path]) -> Iterator[Tensor]:
    """The pixels (1, 3, S, S) of every picture that can be read: one a file, or one a slice of a volume."""
    for path in images:
        for picture in _pictures(model, path):
            yield to_tensor(picture.image, model.settings.img_size)[None]


def _pictures(model: Predictor, path: Path) -> list[Picture]:
    try:
        return [open_picture(frame, model.reading) for frame in frames(path, model.reading)]
    except InputError as error:
        print(f"skipped: {error}")
        return []


def main() -> None:
    """Command line."""
    parser = Parser(prog="python -m engine.export", description="Write a checkpoint as an ONNX file.")
    add = parser.add_argument
    add("ckpt", type=nonempty_path, help="checkpoint of train.py, or one in the published format")
    add("--out", required=True, type=nonempty_path, help="the file to write; its model card is written beside it")
    add("--check", type=nonempty_path, metavar="FOLDER", help="score these images with PyTorch and with ONNX Runtime")
    add("--precision", choices=tuple(DTYPES), default="fp32", help="fp16: half of the file")
    add("--weights", type=nonempty_path, help="file with CLIP weights, instead of that in CLIP/ckpt")
    add("--obj", help="of a published checkpoint: the data set that it was trained on")
    run(parser.parse_args())


def run(options: argparse.Namespace) -> None:
    """Checkpoint -> file, card, comparison; `InputError` where float32 differs by more than the bar."""
    model = load(options.ckpt, "cpu", weights=options.weights, precision="fp32", obj=options.obj)
    images = [path for path, _ in list_files([Path(options.check)])] if options.check else []
    export(model, options.out, options.precision)
    card = write_card(Path(options.out).with_suffix(".md"), model.settings, model.checkpoint.metadata)
    print(f"{options.out}: opset {OPSET}, {options.precision}, {Path(options.out).stat().st_size / 2**20:.0f} MiB")
    print(f"{card}: the model card")
    if options.check:
        scores, maps, decisions, count = compare(model, options.out, images)
        print(f"check: {count} images, largest difference of a score {scores:.2g}, of a map {maps:.2g}; "
              f"{decisions} decisions differ")  # fmt: skip
        if options.precision == "fp32" and max(scores, maps) > BAR:
            raise InputError(f"--check {options.check}: the file differs by more than {BAR:g} from PyTorch")


if __name__ == "__main__":
    run_cli(main)
