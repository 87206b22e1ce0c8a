"""Features -> scores -> metrics: the one evaluation loop of train.py, test.py and whatever comes later."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dataset import Sample, load_mask
from utils import prefetch

from . import distributed
from .detector import Detector, Settings
from .features import FeatureStore, Item
from .metrics import PerRegionOverlap, PixelBootstrap, ScoreHistogram, bootstrap_auroc, image_metrics

CURVE_POINTS = 300  # finer than a figure can show


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; pixel metrics are None where the checkpoint or the images know no masks."""

    auc: float  # image-level AUROC
    pauc: float | None  # pixel-level AUROC
    files: list[str]
    labels: np.ndarray  # (images,), 1 = abnormal
    scores: np.ndarray  # (images,) in [0, K]
    more: dict[str, float | list[float]] = field(default_factory=dict)  # AP, F1-max; AUPRO, intervals where asked for
    # Of the pixels, where asked for: "roc", false and true positive rate, and "pr", recall and precision; (2, points).
    curves: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def selection_score(self) -> float:
        """AUC + pAUC, as published; AUC alone on image-only data sets."""
        return self.auc + (self.pauc or 0.0)

    def line(self) -> str:
        """AUC and, with masks, pAUC; six decimals, so that two runs can be compared."""
        return f"AUC {self.auc:.6f}" + ("" if self.pauc is None else f"  pAUC {self.pauc:.6f}")

    def per_image(self) -> list[dict[str, object]]:
        """File, label and score of every image, for JSON."""
        rows = zip(self.files, self.labels.tolist(), self.scores.tolist(), strict=True)
        return [{"file": file, "label": label, "score": score} for file, label, score in rows]


def evaluate(
    detector: Detector,
    store: FeatureStore,
    samples: Sequence[Sample],
    *,
    text_features: Tensor | None = None,
    full: bool = False,
    aupro: bool = False,
    on_batch: Callable[[Sequence[Sample], Tensor, Tensor | None], None] | None = None,
) -> Evaluation:
    """Score `samples` and measure.

    Args:
        detector: adapters and prompts; its settings say how images are scored and in batches of how many.
        store: prepared features of the samples.
        samples: images with labels, and masks where the data set has them.
        text_features: (D, 2) where the caller has them already.
        full: also AUPRO, bootstrap confidence intervals and the pixels' curves.
        aupro: also AUPRO, which costs more than all other metrics together.
        on_batch: sees (samples, image scores (B,), maps (B, S, S) or None) of each batch, for figures.

    Raises:
        InputError: one class only, a score that is NaN (names the image), an unreadable mask.
    """
    settings = detector.settings
    if text_features is None:
        with torch.no_grad():
            text_features = detector.prompts()
    masks_too = any(sample.mask for sample in samples)
    pixels = PixelMetrics.of(settings, aupro=full or aupro, intervals=full) if masks_too else None
    batches = [samples[i : i + settings.eval_batch] for i in range(0, len(samples), settings.eval_batch)]
    # Processes share the batches out. On CPUs rank 0 counts all maps in the order of the batches, so that the figures
    # are those of one process to the last bit. Between GPUs each counts its own and the histograms are added up, which
    # moves a pixel AUC by about 1e-8; maps travel only where someone looks at them.
    travel = distributed.from_main(store.backbone.clip.device.type == "cpu" or on_batch is not None)

    def load_masks(index: int) -> Tensor | None:
        batch = batches[index]
        return torch.stack([load_mask(sample, settings.img_size) for sample in batch]) if pixels else None

    def count(index: int, maps: Tensor | None, masks: Tensor | None) -> None:
        if pixels:
            pixels.update(maps, masks, [sample.name for sample in batches[index]])

    scores: list[np.ndarray] = []
    mine = distributed.share(range(len(batches)))
    loaded = zip(mine, prefetch(load_masks, mine, store.workers), strict=True)
    for _ in range(0, len(batches), distributed.world()):
        found = []
        for index, masks in itertools.islice(loaded, 1):  # none in the last round, perhaps
            image_scores, maps = detector.score(store.get([Item(sample) for sample in batches[index]]), text_features)
            if travel:
                found = [(index, image_scores.cpu(), maps if maps is None else maps.cpu(), masks)]
            else:
                count(index, maps, masks)
                found = [(index, image_scores.cpu(), None, None)]
        for index, image_scores, maps, masks in itertools.chain(*distributed.gather(found)):
            if travel:
                count(index, maps, masks)
            if on_batch is not None:
                on_batch(batches[index], image_scores, maps)
            scores.append(image_scores.double().numpy())
    if pixels and not travel:
        for other in distributed.gather(pixels)[1:]:
            pixels.merge(other)
    found = _measure(samples, np.concatenate(scores), pixels, full) if distributed.is_main() else None
    return distributed.from_main(found)


class PixelMetrics:
    """The streaming metrics of the anomaly maps; AUPRO and confidence intervals where they are asked for."""

    def __init__(self, high: float, aupro: bool, intervals: bool) -> None:
        self.histogram = ScoreHistogram(0.0, high)
        self.overlap = PerRegionOverlap(0.0, high) if aupro else None
        self.bootstrap = PixelBootstrap() if intervals else None

    @classmethod
    def of(cls, settings: Settings, aupro: bool, intervals: bool) -> PixelMetrics | None:
        """For scores in [0, K]; None where the data set has no masks."""
        return cls(len(settings.features_list), aupro, intervals) if settings.pixel_metrics else None

    @property
    def parts(self) -> list[ScoreHistogram | PerRegionOverlap | PixelBootstrap]:
        """Those that are kept."""
        return [part for part in (self.histogram, self.overlap, self.bootstrap) if part is not None]

    def update(self, maps: Tensor, masks: Tensor, names: Sequence[str]) -> None:
        """Count maps (B, S, S) with bool masks of the same shape; `InputError` names the image with a NaN."""
        for part in self.parts:
            part.update(maps, masks, names)

    def merge(self, other: PixelMetrics) -> None:
        """Add what another process has counted."""
        for part, theirs in zip(self.parts, other.parts, strict=True):
            part.merge(theirs)

    def values(self) -> dict[str, float | list[float]]:
        """Everything but the AUROC."""
        found: dict[str, float | list[float]] = {"pixel_ap": self.histogram.average_precision()}
        found["pixel_f1_max"], found["pixel_threshold"] = self.histogram.f1_max()
        if self.overlap:
            found["aupro"] = self.overlap.value()
        if self.bootstrap:
            found["pauc_ci95"] = list(self.bootstrap.interval())
        return found

    def curves(self) -> dict[str, np.ndarray]:
        """`Evaluation.curves`."""
        precision, recall, _ = self.histogram.pr_curve(CURVE_POINTS)
        fpr, tpr, _ = self.histogram.roc_curve(CURVE_POINTS)
        return {"roc": np.stack([fpr, tpr]), "pr": np.stack([recall, precision])}


def _measure(samples: Sequence[Sample], scores: np.ndarray, pixels: PixelMetrics | None, full: bool) -> Evaluation:
    """The figures from image scores (images,) and counted pixels."""
    files = [sample.name for sample in samples]
    labels = np.array([sample.label for sample in samples])
    image = image_metrics(labels, scores, files)
    more: dict[str, float | list[float]] = {name: image[name] for name in ("ap", "f1_max", "threshold")}
    if pixels:
        more |= pixels.values()
    if full:
        more["auc_ci95"] = list(bootstrap_auroc(labels, scores))
    pauc = pixels.histogram.auroc() if pixels else None
    curves = pixels.curves() if pixels and full else {}
    return Evaluation(image["auroc"], pauc, files, labels, scores, more, curves)


def result_json(settings: Settings, found: Evaluation, select: str) -> dict[str, object]:
    """What --out_json writes; `select` says how the epoch was chosen."""
    abnormal = int(found.labels.sum())
    return {
        "obj": settings.obj,
        "auc": found.auc,
        "pauc": found.pauc,
        "n_normal": len(found.labels) - abnormal,
        "n_abnormal": abnormal,
        "select": select,
        **found.more,
        "settings": settings.to_dict(),
        "per_image": found.per_image(),
    }


def published_lines(obj: str, found: Evaluation) -> str:
    """The lines with which the published scripts end; image-only data sets have no pixel AUC to print."""
    lines = [] if found.pauc is None else [f"{obj} pAUC : {found.pauc:.4f}"]
    return "\n".join([*lines, f"{obj} AUC : {found.auc:.4f}"])
