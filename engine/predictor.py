"""Prediction on one's own images: a checkpoint -> scores, decisions and heat maps.

    from engine import load
    model = load("ckpt/Brain.pth")
    for prediction in model.predict(["a.png", "b.dcm"]):
        print(prediction.score, prediction.abnormal, prediction.heat.shape)

Research use, not a medical device.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from CLIP.clip import create_model
from CLIP.model import CLIP
from dataset.layout import config_path, read_config
from dataset.medical_few import MedicalDataset, Sample
from dataset.readers import AS_STORED, Frame, ReadOptions, load_image, pillow_to_rgb, read, to_rgb, to_tensor
from loss import anomaly_map, image_score
from utils import InputError, prefetch, warn

from .detector import Detector
from .evaluation import Evaluation, Masks
from .files.checkpoint import Checkpoint, find_trained_weights
from .files.config import MODEL_FLAGS, Settings, check_against, pick_autocast, pick_device
from .scans import OpenImage

ImageLike = str | Path | Image.Image | np.ndarray | Frame
PIXEL_KEYS = ("pixel_value", "heat_range")  # of a threshold: what needs masks
WEAK = "weak localisation from the detection heads, not measured"


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image of W x H pixels."""

    score: float  # in [0, K], K layers; higher is more abnormal
    abnormal: bool | None  # score >= threshold; None where there is no threshold
    heat: np.ndarray  # (S, S) float32 in [0, K], S = img_size; see `Predictor.weak`
    size: tuple[int, int]  # W, H


class Predictor:
    """A checkpoint ready for images; make it with `load`.

    Attributes:
        settings: what shaped the checkpoint.
        clip: the frozen towers.
        checkpoint: the file's content.
        reading: how it reads files with more than 8 bits or more than one slice: as training did.
        calibration: where the thresholds come from, as checkpoints keep it; empty where there are none.
        threshold: abnormal is score >= threshold; None where the checkpoint has none.
        pixel_threshold: the same of a pixel of a heat map.
        heat_range: (low, high), the heat that most pixels lie in: one colour scale for all pictures.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        detector: Detector,
        clip: CLIP,
        autocast: torch.dtype | None,
        threshold: float | None = None,
    ) -> None:
        self.checkpoint, self.settings, self.detector = checkpoint, checkpoint.settings, detector
        self.reading = reading_of(self.settings)
        self.clip, self._autocast = clip, autocast
        self._text = detector.prompts().detach()
        self._set(checkpoint.metadata.get("threshold") or {}, threshold)

    @property
    def weak(self) -> bool:
        """Whether heat maps are a weak localisation: training had no masks, so they come from the detection heads."""
        return self.detector.scoring_head == "det"

    @property
    def layers(self) -> int:
        """K: scores and heat lie in [0, K]."""
        return len(self.settings.features_list)

    def _set(self, calibration: dict[str, Any], threshold: float | None) -> None:
        self.calibration = calibration
        self.threshold: float | None = calibration.get("value") if threshold is None else threshold
        self.pixel_threshold: float | None = calibration.get("pixel_value")
        low, high = calibration.get("heat_range") or (0.0, float(self.layers))
        self.heat_range: tuple[float, float] = (low, high)

    def predict(self, images: ImageLike | Iterable[ImageLike], batch_size: int = 16) -> list[Prediction]:
        """Predict one or more images.

        Args:
            images: paths (every format of `dataset.readers`, one picture each), Pillow images, arrays (H, W) or
                (H, W, 3) of uint8, uint16 or floats in [0, 1], frames of `dataset.readers.frames`; one, or an iterable
                of them, an array (B, H, W, 3) too. A generator is read a batch at a time.
            batch_size: images through the network at a time.

        Returns:
            A prediction for each image, in their order.

        Raises:
            InputError: an image that cannot be read.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is not at least 1")
        remaining: Iterator[ImageLike]
        if isinstance(images, str | Path | Image.Image | Frame) or (isinstance(images, np.ndarray) and images.ndim < 4):
            remaining = iter([images])
        else:
            remaining = iter(images)
        predictions: list[Prediction] = []
        while batch := list(islice(remaining, batch_size)):
            pictures = [open_image(image, self.reading) for image in batch]
            tensors = torch.stack([to_tensor(picture, self.settings.img_size) for picture in pictures])
            predictions += self.predict_tensors(tensors, [picture.size for picture in pictures])
        return predictions

    def predict_images(self, batch: Sequence[OpenImage]) -> list[Prediction]:
        """Predict a batch of images that are decoded."""
        return self.predict_tensors(torch.stack([image.tensor for image in batch]), [image.size for image in batch])

    def predict_tensors(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Predict a batch (B, 3, S, S) in [0, 1] of images that had the given sizes (W, H)."""
        patches = self.patch_scores(images)
        maps = anomaly_map(patches, self.settings.img_size)  # (B, S, S)
        scores = image_score(patches, self.settings.dec_type) if self.weak else maps.flatten(1).amax(dim=1)
        return [
            Prediction(score, None if self.threshold is None else score >= self.threshold, heat, size)
            for score, heat, size in zip(scores.double().tolist(), maps.cpu().numpy(), sizes, strict=True)
        ]

    @torch.no_grad()
    def patch_scores(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] -> patch scores (B, K, N) float32, as in an `Evaluation`, on the device."""
        device = self.clip.device
        if device.type == "cuda":
            images = images.pin_memory()
        first = 0 if self.detector.adapters.reads_class_token else 1
        with torch.autocast(device.type, dtype=self._autocast, enabled=self._autocast is not None):
            tokens = self.clip.image_tokens(
                images.to(device, non_blocking=True), tuple(sorted(self.settings.features_list))
            )
            tokens = [layer if layer.dtype == self._autocast else layer.float() for layer in tokens]
            return self.detector.patch_scores([layer[:, first:].contiguous() for layer in tokens], self._text)

    def evaluate(self, samples: Sequence[Sample], batch_size: int = 16, workers: int = 2) -> Evaluation:
        """Score the images of a data set; `InputError` for one that cannot be read."""
        size = self.settings.img_size
        images = prefetch(lambda sample: load_image(sample, size), samples, workers, ahead=batch_size)
        scores = []
        while batch := list(islice(images, batch_size)):
            scores.append(self.patch_scores(torch.stack(batch)).cpu())
        head = self.detector.scoring_head
        return Evaluation(list(samples), torch.cat(scores), head, size, self.settings.dec_type)

    def calibrate(self, dataset: MedicalDataset, rule: str, batch_size: int = 16, workers: int = 2) -> None:
        """Set the thresholds of images and pixels again, on all labelled images of a data set.

        Without masks, or with a checkpoint that was trained without, those of pixels stay what they were.

        Args:
            dataset: its images of both splits are used, but for abnormal ones whose mask is missing.
            rule: `f1`, `fpr=RATE` or `tpr=RATE`.
            batch_size: images through the network at a time.
            workers: threads that decode images.

        Raises:
            InputError: an image that cannot be read, or images that cannot tell: a class is missing.
        """
        from .calibration import Rule, calibrate  # noqa: PLC0415 - scikit-learn

        pixels = self.settings.pixel_metrics and dataset.pixel_metrics
        every = {(s.path, s.index): s for split in ("valid", "test") for s in dataset.samples(split)}.values()
        samples = [sample for sample in every if sample.mask or not (pixels and sample.label)]
        if len(samples) < len(every):
            warn(f"{dataset.root}: {len(every) - len(samples)} abnormal images without a mask are left out")
        shots = {name for names in (self.checkpoint.metadata.get("shots") or {}).values() for name in names}
        if trained_on := [s.name for s in samples if {s.name, s.path.name} & shots]:
            warn(f"{dataset.root}: {len(trained_on)} images have the names of shots, such as {trained_on[0]}: "
                 f"thresholds from images that were trained on are optimistic")  # fmt: skip
        evaluation = self.evaluate(samples, batch_size, workers)
        masks = Masks.of(samples, self.settings, workers)
        result = calibrate(evaluation, masks, Rule.parse(rule), f"images of {dataset.obj}")
        if result is None:
            raise InputError(f"--calibrate {dataset.root}: both normal and abnormal images are needed for {rule}")
        kept = {key: self.calibration[key] for key in PIXEL_KEYS if key in self.calibration and key not in result}
        if kept:
            result["from"] += " (that of pixels as before, as there are no masks)"
        self._set({**result, **kept}, None)

    def save(self, path: str | Path) -> None:
        """Write a copy of the checkpoint with the thresholds as they are now; `InputError` where that is impossible."""
        metadata = {**self.checkpoint.metadata, "threshold": self.calibration or None}
        Checkpoint(self.settings, self.checkpoint.parts, metadata).save(path)


def reading_of(settings: Settings) -> ReadOptions:
    """How training read files with more than 8 bits or more than one slice; the defaults where it does not say."""
    reading = settings.reading or {}
    window = reading.get("window")
    return ReadOptions(
        tuple(window) if isinstance(window, list | tuple) else window, reading.get("plane") or AS_STORED.plane,
        deep=bool(reading.get("deep")),
    )  # fmt: skip


def open_image(image: ImageLike, reading: ReadOptions = AS_STORED) -> Image.Image:
    """An image as 8-bit RGB at its own size; `InputError` where it is none."""
    if isinstance(image, str | Path):
        image = Frame(Path(image), None, reading)
    if isinstance(image, Frame):
        return read(image).image
    if isinstance(image, Image.Image):
        return pillow_to_rgb(image, reading.window)
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
    if unknown := sorted(assumed.keys() - MODEL_FLAGS.keys()):
        raise TypeError(f"load() got an unexpected argument {unknown[0]!r}")
    flags = dict.fromkeys(MODEL_FLAGS) | assumed
    options = argparse.Namespace(
        ckpt=str(ckpt), device=device, weights=weights, precision=precision, threshold=threshold, obj=obj,
        allow_other_weights=allow_other_weights, batch_size=16, **flags,
    )  # fmt: skip
    return build(read_checkpoint(options), options)


def read_checkpoint(options: argparse.Namespace) -> Checkpoint:
    """The checkpoint of --ckpt, checked against the flags that shape one; no weights are read yet."""
    name = options.obj or Path(options.ckpt).name.split(".")[0]
    dataset = None
    if config_path(name).is_file():
        config = read_config(config_path(name))
        dataset = SimpleNamespace(
            obj=name, prompt_name=config.get("prompt_name", name), pixel_metrics=config.get("pixel_metrics", False)
        )
    try:
        checkpoint = Checkpoint.load(options.ckpt, options, dataset)
    except InputError as error:
        if dataset is None and "not a checkpoint of this project" in str(error):
            raise InputError(f"{error}; if it is a published one, name its data set with --obj") from error
        raise
    check_against(checkpoint.settings, {}, options)
    return checkpoint


def build(checkpoint: Checkpoint, options: argparse.Namespace) -> Predictor:
    """Towers and detector of a checkpoint; `options` as `load` has them."""
    settings, device = checkpoint.settings, pick_device(options.device)
    options = argparse.Namespace(**{"seed": 111, **vars(options)})
    weights = find_trained_weights(checkpoint, options)
    clip = create_model(weights, img_size=settings.img_size, fidelity=settings.fidelity, device=device)
    detector = Detector(clip, settings).to(device)
    checkpoint.restore(detector, clip, options.ckpt)
    return Predictor(checkpoint, detector, clip, pick_autocast(options.precision, device), options.threshold)
