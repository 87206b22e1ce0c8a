"""A checkpoint as one ONNX file, which runs without PyTorch: pixels -> score and heat map (docs/predict.md).

    python -m engine.export ckpt/Brain.pth --out brain.onnx
    python -m engine.export ckpt/Brain.pth --out brain.onnx --check images --precision fp16

Image tower, adapters and text features, as constants, are in it; beside it a model card. Needs onnx and onnxscript;
--check needs onnxruntime. Research use, not a medical device.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dataset.pairing import list_pictures
from dataset.readers.grey import Frame, ReadOptions
from dataset.readers.images import frames, to_tensor
from loss import anomaly_map, image_score, patch_difference
from utils import InputError, Parser, atomic_path, blame, run_cli

from .card import card
from .files.config import MAX_IMG_SIZE, MODEL_FLAGS, add_model_flags, nonempty_path
from .predictor import Predictor, load

OPSET = 18
LARGEST = 2**31  # bytes of an ONNX file
BAR = 1e-4  # by which score and map of float32 may differ from PyTorch's
LICENCE = "weights: that of their publishers (OpenAI's CLIP: MIT; DINOv2: Apache-2.0); data trained on: see there"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Portable(nn.Module):
    """Pixels (B, 3, S, S) float32 in [0, 1] -> scores (B,) and heat maps (B, S, S), float32 in [0, K].

    `dtype` is that of tower and adapters; scores are summed up in float32.
    """

    def __init__(self, model: Predictor, dtype: torch.dtype) -> None:
        super().__init__()
        assert model.clip.visual is not None
        self.visual = copy.deepcopy(model.clip.visual).to(dtype)  # the model stays as it is
        self.adapters = copy.deepcopy(model.detector.adapters).to(dtype)
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
        import onnxscript  # noqa: F401, PLC0415 - optional; it brings onnx
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


def check(model: Predictor, path: str | Path, folder: str | Path) -> float:
    """Score the images in a folder with PyTorch and with ONNX Runtime on the CPU, and print how far they differ.

    Returns:
        The largest difference of a score or of a pixel of a map.

    Raises:
        InputError: onnxruntime is missing, or no image can be read.
    """
    with blame("--check", "pip install onnxruntime", errors=(ImportError,)):
        import onnxruntime  # noqa: PLC0415 - optional
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    scores, maps, decisions = [], [], 0
    for item in model.stream(_pictures(folder, model.reading), batch_size=1, side=MAX_IMG_SIZE):
        if isinstance(item, InputError):
            print(f"skipped: {item}")
            continue
        picture, expected = item
        pixels = to_tensor(picture.image, model.settings.img_size)[None]
        (score,), (heat,) = session.run(None, {"pixels": pixels.numpy()})
        scores.append(abs(float(score) - expected.score))
        maps.append(float(np.abs(heat - expected.heat).max()))
        decisions += model.threshold is not None and (float(score) >= model.threshold) != expected.decision
    if not scores:
        raise InputError(f"--check {folder}: no image in it that can be read")
    print(f"check: {len(scores)} images, largest difference of a score {max(scores):.2g}, of a map {max(maps):.2g}; "
          f"{decisions} decisions differ")  # fmt: skip
    return max(*scores, *maps)


def _pictures(folder: str | Path, reading: ReadOptions) -> Iterator[Frame | InputError]:
    """The pictures in a folder's images, and in the place of a file that cannot be read its fault."""
    for path in list_pictures(Path(folder))[0]:
        try:
            yield from frames(path, reading)
        except InputError as error:  # noqa: PERF203 - a fault of one file
            yield error


def main() -> None:
    """Command line: checkpoint -> file, card, comparison; `InputError` where float32 differs by more than the bar."""
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
    model = load(options.ckpt, "cpu", precision="fp32", **flags)
    export(model, options.out, options.precision)
    page = Path(options.out).with_suffix(".md")
    with atomic_path(page) as temporary:
        temporary.write_text(card(model.settings, model.checkpoint.metadata), encoding="utf-8")
    print(f"{options.out}: opset {OPSET}, {options.precision}, {Path(options.out).stat().st_size / 2**20:.0f} MiB")
    print(f"{page}: the model card")
    if options.check and check(model, options.out, options.check) > BAR and options.precision == "fp32":
        raise InputError(f"--check {options.check}: the file differs by more than {BAR:g} from PyTorch")


if __name__ == "__main__":
    run_cli(main)
