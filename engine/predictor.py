"""Prediction on your own images: checkpoint -> scores, decisions and heat maps.

    from engine import InputError, load
    model = load("ckpt/Brain.pth")                          # once
    result = model.predict("scan.png")                      # any number of times, from any thread
    print(result.score, result.decision, result.map.shape)

Research use, not a medical device.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from CLIP.clip import create_model
from CLIP.model import CLIP
from dataset.layout import SPLITS, config_path, read_config
from dataset.medical_few import MedicalDataset
from dataset.readers.grey import DAMAGE, Frame, Picture, ReadOptions, Size, to_rgb
from dataset.readers.images import frames, load_image, pillow_to_rgb, read, to_tensor
from loss import anomaly_map, image_score, patch_difference
from utils import InputError, blame, prefetch, warn

from .calibration import calibrate
from .detector import Detector
from .distributed import pick_autocast, pick_device
from .evaluation import Evaluation, Masks
from .files.checkpoint import Checkpoint, find_trained_weights
from .files.config import MODEL_FLAGS, check_against

Out = TypeVar("Out")
ImageLike = str | Path | Frame | Image.Image | np.ndarray


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image of W x H pixels, or for a file with D images ("volume": slices, frames or pages).

    Attributes:
        score: in [0, K], K layers; higher is more abnormal. For a volume, the highest score of its slices.
        decision: True (abnormal) if score >= threshold; None if there is no threshold.
        heat: (S, S) float32 in [0, K], S = img_size; (D, S, S) for a volume. See `Predictor.weak`.
        size: (W, H).
        slices: for a volume, the prediction for each slice, in the order of the file, numbered from 0.
    """

    score: float
    decision: bool | None
    heat: np.ndarray
    size: Size
    slices: tuple[Prediction, ...] = ()

    @property
    def map(self) -> np.ndarray:
        """The heat resampled to the image's size: (H, W) float32 in [0, K]; (D, H, W) for a volume."""
        if self.slices:
            return np.stack([part.map for part in self.slices])
        return np.asarray(Image.fromarray(self.heat).resize(self.size, Image.Resampling.BILINEAR))


class Network(nn.Module):
    """Pixels (B, 3, S, S) in [0, 1] -> image scores (B,) and heat maps (B, S, S), float32 in [0, K].

    Tower and adapters may be in half precision; everything after the patch scores is in float32.
    """

    text: Tensor  # (D, 2)

    def __init__(self, clip: CLIP, detector: Detector) -> None:
        super().__init__()
        self.visual, self.adapters = clip.visual, detector.adapters
        self.settings, self.head = detector.settings, detector.scoring_head
        self.register_buffer("text", detector.prompts().detach())

    def patches(self, pixels: Tensor) -> Tensor:
        """The patch scores (B, K, N), as in an `Evaluation`."""
        assert self.visual is not None
        tokens = self.visual.forward_intermediates(pixels.to(self.text.dtype), sorted(self.settings.features_list))
        first = 0 if self.adapters.reads_class_token else 1
        (scores,) = self.adapters([layer[:, first:].contiguous() for layer in tokens], self.text, (self.head,))
        return patch_difference(scores.float())

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Image scores and heat maps."""
        patches = self.patches(pixels)
        maps = anomaly_map(patches, self.settings.img_size)
        return maps.flatten(1).amax(1) if self.head == "seg" else image_score(patches, self.settings.dec_type), maps


class Predictor:
    """A checkpoint ready for prediction, made by `load`. Threads may share it: the network runs one batch at a time.

    Attributes:
        settings: the settings of the checkpoint.
        network: pixels -> scores and heat maps.
        checkpoint: the content of the file.
        reading: how files with more than 8 bits or more than one slice are read: as in training.
        weak: whether heat maps are only a weak localisation: without masks in training, the detection heads make them.
        layers: K; scores and heat lie in [0, K].
        calibration: thresholds and their source, as stored in checkpoints; empty if there are none.
        threshold: abnormal is score >= threshold; None if the checkpoint has none.
        pixel_threshold: the same for the pixels of heat maps.
        heat_range: (low, high), the range of most pixels' heat: the colour scale of all pictures.
    """

    def __init__(self, checkpoint: Checkpoint, detector: Detector, clip: CLIP, autocast: torch.dtype | None) -> None:
        self.checkpoint, self.settings, self.network = checkpoint, checkpoint.settings, Network(clip, detector)
        self.reading, self.weak = self.settings.read_options, not self.settings.pixel_metrics
        self.layers = len(self.settings.features_list)
        self._device, self._autocast, self._lock = clip.device, autocast, Lock()
        self._set(checkpoint.metadata.get("threshold") or {})

    def _set(self, calibration: dict[str, Any]) -> None:
        self.calibration = calibration
        self.threshold: float | None = calibration.get("value")
        self.pixel_threshold: float | None = calibration.get("pixel_value")
        self.heat_range: Sequence[float] = calibration.get("heat_range") or (0.0, float(self.layers))

    def predict(
        self, images: ImageLike | Iterable[ImageLike], batch_size: int = 16
    ) -> Prediction | list[Prediction | InputError]:
        """Predict one image, or several.

        Args:
            images: one image, an iterable of images, or an array (B, H, W, 3). An image is a path (any format of
                `dataset.readers`; for a volume, all slices along `reading.plane`), a Pillow image, an array (H, W) or
                (H, W, 3) of uint8, uint16 or floats in [0, 1], or a frame of `dataset.readers.images.frames`. A
                generator is read a batch at a time.
            batch_size: images per pass through the network.

        Returns:
            For one image, its prediction. For several, a list in their order; if an image cannot be read, its place
            holds the `InputError` that says why, and the others are predicted all the same.

        Raises:
            InputError: a single image was given and cannot be read.
        """
        is_one = isinstance(images, ImageLike) and getattr(images, "ndim", 0) < 4
        stream = self.stream(cast("Iterable[ImageLike]", [images] if is_one else images), batch_size)
        results = [whole([item for _, item in parts]) for _, parts in groupby(stream, key=itemgetter(0))]
        if not is_one:
            return results
        if isinstance(results[0], InputError):
            raise results[0]
        return results[0]

    def stream(
        self, images: Iterable[ImageLike], batch_size: int = 16, workers: int = 2, side: int = 1
    ) -> Iterator[tuple[int, tuple[Picture, Prediction] | InputError]]:
        """Predict a stream of images; threads read the next ones while the network runs.

        Args:
            images: an iterable of images, as for `predict`.
            batch_size: images per pass through the network.
            workers: threads that decode images.
            side: maximum length of the longer side of the yielded pictures, in pixels; larger ones are reduced.

        Yields:
            For each picture, in order: the index of its image in `images`, and the picture with its prediction or, if
            it cannot be read, the error.
        """

        def opened(numbered: tuple[int, ImageLike | InputError]) -> tuple[int, tuple[Picture, Tensor] | InputError]:
            place, image = numbered
            try:
                picture = open_picture(image, self.reading)
            except InputError as error:
                return place, error
            tensor = to_tensor(picture.image, self.settings.img_size)
            picture.image.thumbnail((side, side), Image.Resampling.BICUBIC)
            return place, (picture, tensor)

        def pictures() -> Iterator[tuple[int, ImageLike | InputError]]:
            for place, image in enumerate(images):
                try:
                    parts = frames(Path(image), self.reading) if isinstance(image, str | Path) else [image]
                    yield from ((place, part) for part in parts)
                except InputError as error:  # noqa: PERF203 - a fault of one file
                    yield place, error

        reader = prefetch(opened, pictures(), workers, min(batch_size, 16))
        while batch := list(islice(reader, batch_size)):
            good = [item for _, item in batch if not isinstance(item, InputError)]
            if good:
                scores, maps = self.compute(self.network, torch.stack([tensor for _, tensor in good]))
                results = zip(scores.double().tolist(), maps.cpu().numpy(), strict=True)
            for place, item in batch:
                if isinstance(item, InputError):
                    yield place, item
                    continue
                score, heat = next(results)
                decision = None if self.threshold is None else score >= self.threshold
                yield place, (item[0], Prediction(score, decision, heat, item[0].stored))

    @torch.no_grad()
    def compute(self, function: Callable[[Tensor], Out], images: Tensor) -> Out:
        """Apply the network, or its `patches`, to images (B, 3, S, S) in [0, 1]; the result is on the device."""
        with self._lock, torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
            return function(images.to(self._device))

    def calibrate(self, dataset: MedicalDataset, rule: str, batch_size: int = 16, workers: int = 2) -> None:
        """Recalibrate the thresholds for images and pixels on all labelled images of a data set.

        Without masks, or if the checkpoint was trained without masks, the pixel threshold stays as it was.

        Args:
            dataset: images of both splits are used; abnormal ones without a mask are left out if masks are used.
            rule: `f1`, `fpr=RATE` or `tpr=RATE`.
            batch_size: images per pass through the network.
            workers: threads that decode images.

        Raises:
            InputError: an image cannot be read, or a class that the rule needs has no image.
        """
        settings = replace(self.settings, mask_above=dataset.layout.mask_above)
        pixels, size = settings.pixel_metrics and dataset.pixel_metrics, settings.img_size
        every = dict.fromkeys(sample for split in SPLITS for sample in dataset.samples(split))
        samples = [sample for sample in every if sample.masks or not (pixels and sample.label)]
        if len(samples) < len(every):
            warn(f"{dataset.root}: {len(every) - len(samples)} abnormal images without a mask are left out")
        shots = {name for names in (self.checkpoint.metadata.get("shots") or {}).values() for name in names}
        if trained_on := [s.name for s in samples if {s.name, s.path.name} & shots]:
            warn(f"{dataset.root}: {len(trained_on)} images have the names of shots, such as {trained_on[0]}: "
                 f"thresholds from images that were trained on are optimistic")  # fmt: skip
        images, scores = prefetch(lambda sample: load_image(sample, size), samples, workers, ahead=batch_size), []
        while batch := list(islice(images, batch_size)):
            scores.append(self.compute(self.network.patches, torch.stack(batch)).cpu())
        evaluation = Evaluation(samples, torch.cat(scores), self.network.head, size, settings.dec_type)
        masks = Masks.of(samples, settings, workers)
        result = calibrate(evaluation, masks, rule, f"images of {dataset.obj}")
        if result is None:
            raise InputError(f"--calibrate {dataset.root}: both normal and abnormal images are needed for {rule}")
        if "pixel_value" in self.calibration and "pixel_value" not in result:
            result["pixel_value"] = self.calibration["pixel_value"]
            result["from"] += " (pixel threshold unchanged, as there are no masks)"
        self._set(result)


def whole(parts: Iterable[tuple[Picture, Prediction] | InputError]) -> Prediction | InputError:
    """The prediction for a file from those for its pictures; or the first error among them."""
    slices = []
    for part in parts:
        if isinstance(part, InputError):
            return part
        slices.append(part[1])
    if len(slices) == 1:
        return slices[0]
    highest = max(slices, key=lambda part: part.score)
    return replace(highest, heat=np.stack([part.heat for part in slices]), slices=tuple(slices))


def open_picture(image: ImageLike | InputError, reading: ReadOptions) -> Picture:
    """A picture as 8-bit RGB with square pixels; `InputError` if it cannot be read; a given `InputError` is raised."""
    if isinstance(image, Frame):
        return read(image)
    if isinstance(image, np.ndarray):
        image = to_rgb(image)
    if isinstance(image, Image.Image):
        with blame("image: damaged, or cut short", errors=DAMAGE):  # Pillow decodes what it has opened only now
            image.load()
        rgb, notes = pillow_to_rgb(image, Frame(Path("image"), options=reading))
        return Picture(rgb.copy(), "", image.mode, image.size, notes=notes)
    raise image if isinstance(image, InputError) else InputError(f"{type(image).__name__}: no path, picture or array")


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
        ckpt: a checkpoint of this project, or one in the published format.
        device: auto, cpu, cuda or cuda:N.
        weights: file with CLIP weights instead of the one under CLIP/ckpt.
        precision: auto, fp32, bf16 or fp16.
        threshold: image threshold, instead of the checkpoint's.
        allow_other_weights: only print a warning if these are not the CLIP weights of the training.
        obj: for a published file, the data set that it was trained on (default: the file's name).
        assumed: for a published file, settings that its tensors do not reveal: img_size, features_list, pretrain, ...

    Raises:
        InputError: a file is missing, damaged, or does not fit, or a value contradicts the checkpoint.
        TypeError: a name in `assumed` is unknown.
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
    """Read the checkpoint of --ckpt and check it against the model flags; no CLIP weights are read yet."""
    name, facts = options.obj or Path(options.ckpt).name.split(".")[0], None
    if config_path(name).is_file():
        config = {"prompt_name": name, "pixel_metrics": False, **read_config(config_path(name))}
        facts = {"obj": name, **{key: config[key] for key in ("prompt_name", "pixel_metrics")}}
    checkpoint = Checkpoint.load(options.ckpt, options, None if facts is None else lambda: facts)
    check_against(checkpoint.settings, {}, options)
    return checkpoint


def build(checkpoint: Checkpoint, options: argparse.Namespace) -> Predictor:
    """Build the predictor of a checkpoint; `options` as in `load`."""
    settings, device = checkpoint.settings, pick_device(options.device)
    weights = find_trained_weights(checkpoint, options)
    clip = create_model(weights, img_size=settings.img_size, fidelity=settings.fidelity, device=device)
    detector = Detector(clip, settings).to(device)
    checkpoint.restore(detector, clip, options.ckpt)
    model = Predictor(checkpoint, detector, clip, pick_autocast(options.precision, device))
    model.threshold = model.threshold if options.threshold is None else options.threshold
    return model
