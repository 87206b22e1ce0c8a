"""Features -> scores -> metrics: the one evaluation loop of train.py, test.py and whatever comes later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dataset import Sample, load_mask
from utils import prefetch

from .detector import Detector, Settings
from .features import FeatureStore, Item
from .metrics import PerRegionOverlap, PixelBootstrap, ScoreHistogram, bootstrap_auroc, image_metrics


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; pixel metrics are None where the checkpoint or the images know no masks."""

    auc: float  # image-level AUROC
    pauc: float | None  # pixel-level AUROC
    files: list[str]
    labels: np.ndarray  # (images,), 1 = abnormal
    scores: np.ndarray  # (images,) in [0, K]
    more: dict[str, float | list[float]] = field(default_factory=dict)  # AP, F1-max; AUPRO, intervals where asked for

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
        full: also AUPRO and bootstrap confidence intervals.
        aupro: also AUPRO, which costs more than all other metrics together.
        on_batch: sees (samples, image scores (B,), maps (B, S, S) or None) of each batch, for figures.

    Raises:
        InputError: one class only, a score that is NaN (names the image), an unreadable mask.
    """
    settings = detector.settings
    if text_features is None:
        with torch.no_grad():
            text_features = detector.prompts()
    masks_too = settings.pixel_metrics and any(sample.mask for sample in samples)
    pixels = ScoreHistogram(0.0, len(settings.features_list)) if masks_too else None
    overlap = PerRegionOverlap(0.0, len(settings.features_list)) if pixels and (full or aupro) else None
    bootstrap = PixelBootstrap() if pixels and full else None
    trackers = [tracker for tracker in (pixels, overlap, bootstrap) if tracker is not None]
    batches = [samples[i : i + settings.eval_batch] for i in range(0, len(samples), settings.eval_batch)]

    def load_masks(batch: Sequence[Sample]) -> Tensor | None:
        return torch.stack([load_mask(sample, settings.img_size) for sample in batch]) if pixels else None

    scores = []
    for batch, masks in zip(batches, prefetch(load_masks, batches, store.workers), strict=True):
        image_scores, maps = detector.score(store.get([Item(sample) for sample in batch]), text_features)
        for tracker in trackers:
            tracker.update(maps, masks, [sample.name for sample in batch])
        if on_batch is not None:
            on_batch(batch, image_scores, maps)
        scores.append(image_scores.double().cpu().numpy())

    files = [sample.name for sample in samples]
    labels = np.array([sample.label for sample in samples])
    image = image_metrics(labels, np.concatenate(scores), files)
    more: dict[str, float | list[float]] = {name: image[name] for name in ("ap", "f1_max", "threshold")}
    if pixels:
        more["pixel_ap"] = pixels.average_precision()
        more["pixel_f1_max"], more["pixel_threshold"] = pixels.f1_max()
    if overlap:
        more["aupro"] = overlap.value()
    if full:
        more["auc_ci95"] = list(bootstrap_auroc(labels, np.concatenate(scores)))
    if bootstrap:
        more["pauc_ci95"] = list(bootstrap.interval())
    return Evaluation(image["auroc"], pixels.auroc() if pixels else None, files, labels, np.concatenate(scores), more)


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
