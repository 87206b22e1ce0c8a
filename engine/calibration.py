"""The decision threshold of a checkpoint, from labelled images that are not the test set.

These are the images of valid/ that are not shots, if they show both classes, or else augmented views of the shots. The
latter were trained on, so their threshold is optimistic; the result names its source. Not in the paper.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dataset.readers.images import Sample

from .evaluation import Evaluation, Masks
from .metrics import choose_threshold, count_pixels, maps_at_a_time

MAX_IMAGES = 100  # per class: enough for a threshold, and each image costs one pass through the tower
HEAT_QUANTILES = (0.02, 0.9995)  # quantiles of the pixels' scores: the ends of the colour scale in pictures
HEAT_PIXELS = 2**20  # the quantiles are computed from at most this many pixels, evenly spaced
VALID_SOURCE = "images of valid/ that are not shots"
CHOSEN_SOURCE = f"{VALID_SOURCE}, which chose the epoch too: optimistic"
VIEWS_SOURCE = "augmented views of the shots, which were trained on: optimistic"
# The rules for choosing a threshold: a description of each, and the classes that it needs.
RULES = {
    "f1": ("the largest F1", {0, 1}),
    "fpr": ("a false positive rate of at most {}", {0}),  # with the largest sensitivity
    "tpr": ("a sensitivity of at least {}", {1}),  # the highest threshold
}


def calibration_samples(samples: Sequence[Sample]) -> list[Sample]:
    """At most `MAX_IMAGES` images of each class, evenly spaced; an empty list if a class is missing."""
    kept: list[Sample] = []
    for label in (0, 1):
        members = [sample for sample in samples if sample.label == label]
        if not members:
            return []
        places = np.linspace(0, len(members) - 1, min(MAX_IMAGES, len(members))).round().astype(int)
        kept += [members[i] for i in places]
    return kept


def calibrate(evaluation: Evaluation, masks: Masks | None, rule: str, source: str) -> dict[str, Any] | None:
    """Choose a threshold for images and one for pixels, and the range of the colour scale.

    Args:
        evaluation: scores of labelled images, or of the shots' augmented views (several samples per shot).
        masks: of the same images or views; None on image-only data sets.
        rule: `f1`, `fpr=RATE` or `tpr=RATE`, for images and pixels alike.
        source: which images these are, in words, such as one of *_SOURCE.

    Returns:
        Plain values for a checkpoint: `value` (abnormal is score >= value), `pixel_value` (only if there are masks, and
        pixels of both classes), `heat_range`, `rule`, `from` (the source) and `figures` (see `threshold_metrics`). None
        if the images lack a class that the rule needs.
    """
    labels, scores = evaluation.labels, evaluation.image_scores
    name, _, rate = rule.partition("=")
    words, needed = RULES[name]
    if not needed <= set(labels.tolist()):
        return None
    value = select_threshold(labels, scores, rule)
    result = {
        "value": value,
        "rule": words.format(rate),
        "from": source,
        "figures": threshold_metrics(labels, scores, value),
        "heat_range": heat_range(evaluation),
    }
    if masks is not None and evaluation.head == "seg":
        counts = count_pixels(evaluation.maps, masks.get, len(labels), maps_at_a_time(evaluation))
        if counts.normal.any() and counts.abnormal.any():
            result["pixel_value"] = counts.threshold(rule)
    return result


def describe_threshold(threshold: dict[str, Any] | None) -> str:
    """Describe the result of `calibrate` in one line."""
    if threshold is None:
        return (
            "threshold:  none, as a class that the rule needs has no image; --threshold_at fpr=0.05 needs normal "
            "images only, tpr=0.95 abnormal ones"
        )
    figures, words = threshold["figures"], {"tpr": "sensitivity", "fpr": "false positive rate"}
    rates = [f"{words[name]} {figures[name]:.3f}" for name in words if figures[name] is not None]
    return (
        f"threshold:  {threshold['value']:.4f} for {threshold['rule']} on {figures['n_normal']} normal and "
        f"{figures['n_abnormal']} abnormal {threshold['from']}; there {', '.join(rates)}"
    )


def select_threshold(labels: np.ndarray, scores: np.ndarray, rule: str) -> float:
    """The threshold by the rule for labels, scores (M,), halfway to the next lower score against rounding errors."""
    values, place = np.unique(-scores, return_inverse=True)  # candidates, highest first
    true, false = (np.bincount(place[labels == label], minlength=len(values)).cumsum() for label in (1, 0))
    best = choose_threshold(true, false, false[-1], rule)
    if best < 0:
        return float(np.nextafter(-values[0], np.inf))
    return float((-values[best] - values[min(best + 1, len(values) - 1)]) / 2)


def threshold_metrics(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, Any]:
    """Metrics of the decision score >= threshold, for labels, scores (M,).

    Returns:
        `f1`, `tpr` (sensitivity) and `fpr` (false positive rate), None for a missing class; `n_normal`, `n_abnormal`.
    """
    called, abnormal = scores >= threshold, labels == 1
    true, false = int((called & abnormal).sum()), int((called & ~abnormal).sum())
    n_abnormal, n_normal = int(abnormal.sum()), int((~abnormal).sum())
    return {
        "f1": 2 * true / (true + false + n_abnormal) if n_abnormal else None,
        "tpr": true / n_abnormal if n_abnormal else None,
        "fpr": false / n_normal if n_normal else None,
        "n_normal": n_normal,
        "n_abnormal": n_abnormal,
    }


def heat_range(evaluation: Evaluation) -> list[float]:
    """The range [low, high] of most pixels' scores, from at most HEAT_PIXELS of them, evenly spaced."""
    side, images, batch = evaluation.img_size, len(evaluation.samples), maps_at_a_time(evaluation)
    step = -(-images * side * side // HEAT_PIXELS)
    while math.gcd(step, side) > 1:  # otherwise some columns would never be sampled
        step += 1
    chosen = []
    for start in range(0, images, batch):
        pixels = evaluation.maps(slice(start, start + batch)).flatten()
        chosen.append(pixels[-start * side * side % step :: step].cpu().numpy())
    return [float(value) for value in np.quantile(np.concatenate(chosen).astype(np.float64), HEAT_QUANTILES)]
