"""Prediction on one's own images: a checkpoint -> scores, decisions and heat maps.

    from engine import load
    model = load("ckpt/Brain.pth")
    for found in model.predict(["a.png", "b.dcm"]):
        print(found.score, found.abnormal, found.heat.shape)

Research use, not a medical device.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset.layout import config_path, read_config
from dataset.medical_few import to_tensor
from dataset.readers import Frame, pillow_to_rgb, to_rgb
from utils import InputError

from .detector import Settings
from .features import Backbone
from .loading import Loaded, load_detector
from .options import MODEL_FLAGS, pick_autocast

ImageLike = str | Path | Image.Image | np.ndarray | Frame


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image of W x H pixels."""

    score: float  # in [0, K], K layers; higher is more abnormal
    abnormal: bool | None  # score >= threshold; None where there is no threshold
    heat: np.ndarray | None  # (S, S) float32 in [0, K], S = img_size; None where training had no masks
    size: tuple[int, int]  # W, H


class Predictor:
    """A checkpoint ready for images; make it with `load`.

    Attributes:
        settings: what shaped the checkpoint.
        threshold: abnormal is score >= threshold; None where the checkpoint has none.
        pixel_threshold: the same of a pixel of a heat map.
        heat_range: (low, high), the heat that most pixels lie in: one colour scale for all pictures.
    """

    def __init__(self, loaded: Loaded, autocast: torch.dtype | None, threshold: float | None = None) -> None:
        self.settings: Settings = loaded.settings
        self.detector = loaded.detector
        self.calibration: dict[str, Any] = loaded.checkpoint.about.get("threshold") or {}
        self.threshold = self.calibration.get("value") if threshold is None else threshold
        self.pixel_threshold: float | None = self.calibration.get("pixel_value")
        self.heat_range = tuple(self.calibration.get("heat_range", (0.0, float(len(self.settings.features_list)))))
        class_token = self.detector.adapters.reads_class_token
        self._backbone = Backbone(loaded.clip, self.settings.features_list, class_token, autocast)
        with torch.no_grad():
            self._text = self.detector.prompts()

    def predict(self, images: ImageLike | Iterable[ImageLike], batch_size: int = 16) -> list[Prediction]:
        """Predict one or more images.

        Args:
            images: paths (every format of `dataset.readers`; of several frames the first), Pillow images, arrays
                (H, W) or (H, W, 3) of uint8, uint16 or floats in [0, 1], frames of `dataset.readers.frames`; one,
                or an iterable of them, an array (B, H, W, 3) too. A generator is read a batch at a time.
            batch_size: images through the network at a time.

        Returns:
            A prediction for each image, in their order.

        Raises:
            InputError: an image that cannot be read.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is not at least 1")
        single = isinstance(images, str) or (isinstance(images, np.ndarray) and images.ndim < 4)
        remaining = iter([images] if single or not isinstance(images, Iterable) else images)
        found: list[Prediction] = []
        while batch := list(islice(remaining, batch_size)):
            pictures = [open_image(image) for image in batch]
            found += self.predict_tensors(
                torch.stack([to_tensor(picture, self.settings.img_size) for picture in pictures]),
                [picture.size for picture in pictures],
            )
        return found

    @torch.no_grad()
    def predict_tensors(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Predict a batch (B, 3, S, S) in [0, 1] of images that had the given sizes (W, H)."""
        scores, maps = self.detector.score([layer.float() for layer in self._backbone.tokens(images)], self._text)
        heats = [None] * len(images) if maps is None else list(maps.cpu().numpy())
        return [
            Prediction(score, None if self.threshold is None else score >= self.threshold, heat, size)
            for score, heat, size in zip(scores.double().tolist(), heats, sizes, strict=True)
        ]


def open_image(image: ImageLike) -> Image.Image:
    """An image as 8-bit RGB at its own size; `InputError` where it is none."""
    if isinstance(image, str | Path):
        image = Frame(Path(image))
    if isinstance(image, Frame):
        return image.read()
    if isinstance(image, Image.Image):
        return pillow_to_rgb(image)
    if isinstance(image, np.ndarray):
        return to_rgb(image)
    raise InputError(f"{type(image).__name__} is no image: give a path, a Pillow image or an array")


def load(
    ckpt: str | Path,
    device: str = "auto",
    *,
    weights: str | None = None,
    precision: str = "auto",
    threshold: float | None = None,
    allow_other_weights: bool = False,
    obj: str | None = None,
    **assumed: Any,  # noqa: ANN401
) -> Predictor:
    """Open a checkpoint for prediction.

    Args:
        ckpt: of this project, or in the published format.
        device: auto, cpu, cuda or cuda:N.
        weights: file with CLIP weights instead of the one under CLIP/ckpt.
        precision: auto, fp32, bf16 or fp16.
        threshold: instead of the checkpoint's.
        allow_other_weights: only warn when these are not the CLIP weights that it was trained on.
        obj: for a published file, the data set that it was trained on (default: the file's name).
        assumed: for a published file, what its tensors do not tell: img_size, features_list, pretrain, ...

    Raises:
        InputError: a missing or damaged file, or one that does not fit.
    """
    flags = dict.fromkeys(MODEL_FLAGS) | {
        "device": device, "weights": weights, "allow_other_weights": allow_other_weights, "prompt_name": None,
        "seed": 111, "batch_size": 16,
    }  # fmt: skip
    if unknown := sorted(assumed.keys() - flags.keys()):
        raise TypeError(f"load() got an unexpected argument {unknown[0]!r}")
    loaded = load_detector(str(ckpt), argparse.Namespace(**{**flags, **assumed}), lambda: _described(ckpt, obj))
    return Predictor(loaded, pick_autocast(precision, loaded.clip.device), threshold)


def _described(ckpt: str | Path, obj: str | None) -> SimpleNamespace:
    """What dataset/<obj>.json says of the data set that a published checkpoint was trained on."""
    name = obj or Path(ckpt).name.split(".")[0]
    if not config_path(name).is_file():
        raise InputError(f"--ckpt {ckpt}: a published file, which does not say its data set; name it with --obj")
    config = read_config(config_path(name))
    return SimpleNamespace(
        obj=name, prompt_name=config.get("prompt_name", name), pixel_metrics=config.get("pixel_metrics", False)
    )
