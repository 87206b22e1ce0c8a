"""Prediction on one's own images: a checkpoint -> scores, decisions and heat maps.

    from engine import InputError, load
    model = load("ckpt/Brain.pth")                          # once
    result = model.predict("scan.png")                      # as often as wanted, from any thread
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
from dataset.readers.grey import Frame, Picture, ReadOptions, to_rgb
from dataset.readers.images import frames, load_image, pillow_to_rgb, read, to_tensor
from loss import anomaly_map, image_score, patch_difference
from utils import InputError, prefetch, warn

from .calibration import calibrate
from .detector import Detector
from .distributed import pick_autocast, pick_device
from .evaluation import Evaluation, Masks
from .files.checkpoint import Checkpoint, find_trained_weights
from .files.config import MODEL_FLAGS, check_against

Out = TypeVar("Out")
ImageLike = str | Path | Frame | Image.Image | np.ndarray
Size = tuple[int, int]  # width and height of an image as its file has it


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image of W x H pixels, or of a file with D of them: a volume, frames, pages.

    Attributes:
        score: in [0, K], K layers; higher is more abnormal; of a volume the highest of its slices.
        decision: abnormal, as score >= threshold; None where there is no threshold.
        heat: (S, S) float32 in [0, K], S = img_size; of a volume (D, S, S). See `Predictor.weak`.
        size: W, H.
        slices: of a volume the prediction of each slice, in the file's order, which is their number from 0.
    """

    score: float
    decision: bool | None
    heat: np.ndarray
    size: Size
    slices: tuple[Prediction, ...] = ()

    @property
    def map(self) -> np.ndarray:
        """The heat stretched over the image: (H, W) float32 in [0, K]; of a volume (D, H, W)."""
        if self.slices:
            return np.stack([part.map for part in self.slices])
        return np.asarray(Image.fromarray(self.heat).resize(self.size, Image.Resampling.BILINEAR))


class Network(nn.Module):
    """Pixels (B, 3, S, S) in [0, 1] -> the scores of images (B,) and their heat maps (B, S, S), float32 in [0, K].

    Tower and adapters may be of half precision; patch scores are summed up in float32.
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
        """Scores and heat maps."""
        patches = self.patches(pixels)
        maps = anomaly_map(patches, self.settings.img_size)
        return maps.flatten(1).amax(1) if self.head == "seg" else image_score(patches, self.settings.dec_type), maps


class Predictor:
    """A checkpoint ready for images; make it with `load`. Threads may share one: the network takes a batch at a time.

    Attributes:
        settings: what shaped the checkpoint.
        network: pixels -> scores and heat maps.
        checkpoint: the file's content.
        reading: how it reads files with more than 8 bits or more than one slice: as training did.
        weak: heat maps are a weak localisation: training had no masks, so they come from the detection heads.
        layers: K; scores and heat lie in [0, K].
        calibration: where the thresholds come from, as checkpoints keep it; empty where there are none.
        threshold: abnormal is score >= threshold; None where the checkpoint has none.
        pixel_threshold: the same of a pixel of a heat map.
        heat_range: (low, high), the heat that most pixels lie in: one colour scale for all pictures.
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
        low, high = calibration.get("heat_range") or (0.0, float(self.layers))
        self.heat_range: tuple[float, float] = (low, high)

    def predict(
        self, images: ImageLike | Iterable[ImageLike], batch_size: int = 16
    ) -> Prediction | list[Prediction | InputError]:
        """Predict an image, or several.

        Args:
            images: paths (every format of `dataset.readers`; of a volume all slices along `reading.plane`), Pillow
                images, arrays (H, W) or (H, W, 3) of uint8, uint16 or floats in [0, 1], frames of
                `dataset.readers.frames`; one, or an iterable of them, an array (B, H, W, 3) too. A generator is read a
                batch at a time.
            batch_size: pictures through the network at a time.

        Returns:
            Of one image its prediction. Of several a list in their order, which in the place of an image that cannot
            be read holds the `InputError` that says why: the others are predicted all the same.

        Raises:
            InputError: the one image cannot be read.
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
        """Predict images as they come; they are read beside the network.

        Args:
            images: as `predict` takes several.
            batch_size: pictures through the network at a time.
            workers: threads that decode them.
            side: pixels of the longer side, at most, to which a picture that is given back is reduced.

        Yields:
            For each picture, in order, the place of its image in `images`, and the picture with its prediction, or the
            fault where it cannot be read.
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

        pictures = ((place, part) for place, image in enumerate(images) for part in parts_of(image, self.reading))
        reader = prefetch(opened, pictures, workers, min(batch_size, 16))
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
        """What the network, or its `patches`, gives for images (B, 3, S, S) in [0, 1], on the device."""
        with self._lock, torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
            return function(images.to(self._device))

    def calibrate(self, dataset: MedicalDataset, rule: str, batch_size: int = 16, workers: int = 2) -> None:
        """Set the thresholds of images and pixels again, on all labelled images of a data set.

        Without masks, or with a checkpoint that was trained without, that of pixels stays what it was.

        Args:
            dataset: its images of both splits are used, but for abnormal ones whose mask is missing.
            rule: `f1`, `fpr=RATE` or `tpr=RATE`.
            batch_size: images through the network at a time.
            workers: threads that decode them.

        Raises:
            InputError: an image that cannot be read, or images that cannot tell: a class is missing.
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
            result["from"] += " (that of pixels as before, as there are no masks)"
        self._set(result)


def whole(parts: Iterable[tuple[Picture, Prediction] | InputError]) -> Prediction | InputError:
    """The prediction of a file from those of the pictures in it, or its first fault."""
    slices = []
    for part in parts:
        if isinstance(part, InputError):
            return part
        slices.append(part[1])
    if len(slices) == 1:
        return slices[0]
    highest = max(slices, key=lambda part: part.score)
    return replace(highest, heat=np.stack([part.heat for part in slices]), slices=tuple(slices))


def parts_of(image: ImageLike, reading: ReadOptions) -> Sequence[ImageLike | InputError]:
    """The pictures in a file, or the fault where it cannot be opened; anything else is one picture."""
    if not isinstance(image, str | Path):
        return [image]
    try:
        return frames(Path(image), reading)
    except InputError as error:
        return [error]


def open_picture(image: ImageLike | InputError, reading: ReadOptions) -> Picture:
    """A picture as 8-bit RGB with square pixels; `InputError` where it is none."""
    if isinstance(image, Frame):
        return read(image)
    if isinstance(image, np.ndarray):
        image = to_rgb(image)
    if isinstance(image, Image.Image):
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
    name, facts = options.obj or Path(options.ckpt).name.split(".")[0], None
    if config_path(name).is_file():
        config = {"prompt_name": name, "pixel_metrics": False, **read_config(config_path(name))}
        facts = {"obj": name, **{key: config[key] for key in ("prompt_name", "pixel_metrics")}}
    checkpoint = Checkpoint.load(options.ckpt, options, None if facts is None else lambda: facts)
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
    model = Predictor(checkpoint, detector, clip, pick_autocast(options.precision, device))
    model.threshold = model.threshold if options.threshold is None else options.threshold
    return model
