"""The decision threshold of a checkpoint, from labelled images that are not the test set.

They are what is left of valid/ beside the shots where that holds both classes, else the shots' own augmented views,
which the adapters have seen: a threshold from these is optimistic, and what was used is said.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset import Sample, load_mask

from .detector import Detector
from .features import FeatureStore, Item
from .metrics import ScoreHistogram
from .training import TrainingSet

MOST = 100  # images of a class: enough for a threshold, and each passes the tower once
HEAT_QUANTILES = (0.02, 0.9995)  # of the pixels: the range of colours in pictures


@dataclass(frozen=True)
class Rule:
    """The largest F1, or the largest sensitivity at a false positive rate of at most `fpr`."""

    fpr: float | None = None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """From `f1` or `fpr=0.05`; ValueError for anything else."""
        if text == "f1":
            return cls()
        name, _, value = text.partition("=")
        if name != "fpr" or not 0 <= float(value) < 1:
            raise ValueError(text)
        return cls(float(value))

    def __str__(self) -> str:
        return "the largest F1" if self.fpr is None else f"a false positive rate of at most {self.fpr:g}"


def rule(text: str) -> str:
    """An argparse type: what `Rule.parse` takes."""
    try:
        Rule.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither f1 nor fpr=RATE, RATE from 0 to below 1") from error
    return text


def leftover(samples: Sequence[Sample]) -> list[Sample]:
    """At most `MOST` images of each class, evenly spaced; none unless there are some of both."""
    kept = []
    for label in (0, 1):
        of_class = [sample for sample in samples if sample.label == label]
        if not of_class:
            return []
        kept += [of_class[i] for i in np.unique(np.linspace(0, len(of_class) - 1, min(MOST, len(of_class))).round())
                 .astype(int)]  # fmt: skip
    return kept


def calibrate(
    detector: Detector, store: FeatureStore, left: Sequence[Sample], views: TrainingSet, how: Rule, select: str
) -> dict[str, Any] | None:
    """A threshold for images and, with masks, one for pixels.

    Args:
        detector: with the tensors of the selected epoch.
        store: prepared features of `left` and of the views.
        left: what `leftover` gave; the training views are used where it is empty.
        views: of the shots.
        how: the rule.
        select: how the epoch was chosen.

    Returns:
        `value` (abnormal is score >= value), `pixel_value` and `heat_range` with masks, `rule`, `from` and `figures`
        (f1, tpr, fpr, n_normal, n_abnormal there), plain values for a checkpoint. None where the images cannot tell.
    """
    if left:
        items = [Item(sample) for sample in left]
        labels = np.array([sample.label for sample in left])
        source = "images of valid/ that are no shots" + (", which chose the epoch too" if select == "valid" else "")

        def masks(part: slice) -> Tensor:
            return torch.stack([load_mask(sample, detector.settings.img_size) for sample in left[part]])
    else:
        items, labels = views.items, views.labels.numpy()
        source = "the shots' augmented views, which were trained on: optimistic"

        def masks(part: slice) -> Tensor:
            return views.masks[part]

    if not (labels == 0).any() or (how.fpr is None and not (labels == 1).any()):
        return None
    scores, pixels = _score(detector, store, items, masks)
    value = choose(labels, scores, how)
    found = {"value": value, "rule": str(how), "from": source, "figures": figures(labels, scores, value)}
    if pixels:
        found["heat_range"] = [pixels.quantile(share) for share in HEAT_QUANTILES]
        if (labels == 1).any():
            found["pixel_value"] = pixel_threshold(pixels, how)
    return found


def describe_threshold(threshold: dict[str, Any] | None) -> str:
    """What `calibrate` gave, in a line."""
    if threshold is None:
        return "threshold:  none, as no abnormal image is left to set one by; --threshold_at fpr=0.05 needs none"
    found = threshold["figures"]
    rates = [f"{words} {found[name]:.3f}" for name, words in (("tpr", "sensitivity"), ("fpr", "false positive rate"))
             if found[name] is not None]  # fmt: skip
    return (
        f"threshold:  {threshold['value']:.4f} for {threshold['rule']} on {found['n_normal']} + {found['n_abnormal']} "
        f"{threshold['from']}; there {', '.join(rates)}"
    )


def _score(
    detector: Detector, store: FeatureStore, items: Sequence[Item], masks: Callable[[slice], Tensor]
) -> tuple[np.ndarray, ScoreHistogram | None]:
    """Scores of the images (images,), and all pixels counted where the checkpoint has maps."""
    with torch.no_grad():
        text = detector.prompts()
    settings = detector.settings
    pixels = ScoreHistogram(0.0, len(settings.features_list)) if settings.pixel_metrics else None
    scores = []
    for start in range(0, len(items), settings.eval_batch):
        part = slice(start, start + settings.eval_batch)
        image_scores, maps = detector.score(store.get(items[part]), text)
        if pixels:
            pixels.update(maps, masks(part), [item.sample.name for item in items[part]])
        scores.append(image_scores.double().cpu().numpy())
    return np.concatenate(scores), pixels


def choose(labels: np.ndarray, scores: np.ndarray, how: Rule) -> float:
    """The threshold by the rule, half way down to the next score against rounding: labels, scores (B,)."""
    values = np.unique(scores)[::-1]  # candidates, highest first
    if how.fpr is None:
        at = [figures(labels, scores, value)["f1"] for value in values]
        best = int(np.argmax(at))
    else:
        rates = np.array([(scores[labels == 0] >= value).mean() for value in values])
        best = int((rates <= how.fpr).sum()) - 1
    if best < 0:  # even the highest score is a normal image's
        return float(np.nextafter(values[0], np.inf))
    lower = values[best + 1] if best + 1 < len(values) else values[best]
    return float((values[best] + lower) / 2)


def figures(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float | int | None]:
    """What a threshold does to labels and scores (B,): F1, true and false positive rate; None for a missing class."""
    found, abnormal = scores >= threshold, labels == 1
    true, false = int((found & abnormal).sum()), int((found & ~abnormal).sum())
    n_abnormal, n_normal = int(abnormal.sum()), int((~abnormal).sum())
    return {
        "f1": 2 * true / (true + false + n_abnormal) if n_abnormal else None,
        "tpr": true / n_abnormal if n_abnormal else None,
        "fpr": false / n_normal if n_normal else None,
        "n_normal": n_normal,
        "n_abnormal": n_abnormal,
    }


def pixel_threshold(pixels: ScoreHistogram, how: Rule) -> float:
    """The same rule over pixels."""
    if how.fpr is None:
        return pixels.f1_max()[1]
    rates, _, thresholds = pixels.roc_curve(10_000)
    return float(thresholds[rates <= how.fpr][-1].clip(max=pixels.high))
