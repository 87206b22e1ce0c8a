"""Metrics of an `Evaluation` and its masks: image metrics, exact pixel metrics, confidence intervals.

Pixel metrics take two passes over the maps. Abnormal pixels are few: the first pass collects and sorts their scores,
which form the grid. The second pass sorts each batch of maps and counts the pixels below and at each grid point. The
order of normal pixels between two neighbouring grid points does not matter, so these counts give the whole ROC and
precision-recall curves exactly, ties included. Memory does not grow with the number of normal pixels.

With more than `GRID` abnormal pixels, the grid consists of `GRID` evenly spaced order statistics of their scores, both
ends included, and pixels strictly between two grid points count as evenly mixed. This changes the AUROC by less than
1 / (2 GRID) < 1e-6 for any scores, and by some 1e-9 in practice; AP, F1-max and AUPRO by less than 1e-6 in practice.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from scipy import ndimage
from scipy.optimize import brentq
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve
from torch import Tensor

from utils import InputError

from .evaluation import Evaluation, Masks

GRID = 2**19  # maximum number of grid points: 20 MB of counts
BATCH_PIXELS = 2**22  # pixels of the maps that are computed at a time: 72 images of 240 x 240
CURVE_POINTS = 300  # finer than a figure can show
AUPRO_LIMIT = 0.3  # false positive rate up to which MVTec's AUPRO integrates
COARSE = 511  # maximum number of points of the bootstrap's grid: 1,023 bins at, between and outside them
BOOTSTRAP_DRAWS = 1000  # draws of a bootstrap
CONFIDENCE_LEVEL = 0.95  # of all intervals
Z_95 = 1.959964  # standard errors on either side at this level

Value = float | int | list[float] | None  # None: not measurable
Source = Callable[[slice], Tensor]  # images of a slice -> (B, S, S)


# The metrics, in this order: key -> (label for readers, key below `test/` in W&B or "" if it is not logged).
METRICS = {
    "auc": ("image AUROC", "AUC"),
    "pauc": ("pixel AUROC", "pAUC"),
    "auc_ci95": ("image AUROC, 95% interval", ""),
    "pauc_ci95": ("pixel AUROC, 95% interval", ""),
    "ap": ("image average precision", "AP"),
    "f1_max": ("image F1-max", "F1-max"),
    "f1_max_threshold_on_test": ("image threshold of the F1-max on the test set", ""),
    "pixel_ap": ("pixel average precision", "pixel_AP"),
    "pixel_f1_max": ("pixel F1-max", "pixel_F1-max"),
    "pixel_f1_max_threshold_on_test": ("pixel threshold of the F1-max on the test set", ""),
    "aupro": ("AUPRO up to 30% false positives", "AUPRO"),
    "dice": ("Dice at the calibrated pixel threshold", "Dice"),
}
# Labels for readers of the values that `measure_without` and `patient_metrics` add.
MORE_LABELS = {
    "auc_without_shot_patients": "image AUROC without the shots' patients",
    "pauc_without_shot_patients": "pixel AUROC without the shots' patients",
    "n_normal_without_shot_patients": "normal images without the shots' patients",
    "n_abnormal_without_shot_patients": "abnormal images without the shots' patients",
    "auc_patients": "AUROC over patients, each with the highest score of the images",
    "auc_patients_ci95": "AUROC over patients, 95% interval",
    "n_normal_patients": "normal patients",
    "n_abnormal_patients": "abnormal patients",
}


@dataclass(frozen=True)
class Metrics:
    """The result of `measure`.

    Attributes:
        values: by the keys of METRICS, in their order, then those of `measure_without`, `patient_metrics` and
            `kind_metrics`; intervals are [low, high].
        curves: (2, points) each: `roc` (false, true positive rate) and `pr` (recall, precision) of the pixels,
            `image_roc` and `image_pr` of the images; empty unless measured in full.
        pauc_draws: the pixel AUROC in each draw of the bootstrap; for the same images and seed, all evaluations draw
            the same images (see engine.compare).
    """

    values: dict[str, Value]
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    pauc_draws: list[float] = field(default_factory=list)

    @property
    def auc(self) -> float:
        """Image AUROC."""
        return cast("float", self.values["auc"])

    @property
    def pauc(self) -> float | None:
        """Pixel AUROC; None without masks."""
        return cast("float | None", self.values.get("pauc"))

    @property
    def selection_score(self) -> float:
        """AUC + pAUC, as published; AUC alone on image-only data sets."""
        return self.auc + (self.pauc or 0.0)

    def table(self) -> str:
        """AUC and pAUC as in `line`, and a line for each other value, except thresholds chosen on the test set."""
        labels = {name: label for name, (label, _) in METRICS.items()} | MORE_LABELS
        for kind in (name.removeprefix("n_of_") for name in self.values if name.startswith("n_of_")):
            words = f"image AUROC of {kind}"
            labels |= {
                f"auc_of_{kind}": words,
                f"auc_of_{kind}_ci95": f"{words}, 95% interval",
                f"n_of_{kind}": f"{kind} images",
            }
        hidden = {"auc", "pauc"} | ({"pauc_without_shot_patients"} if self.pauc is None else set())
        rows = [
            f"  {labels.get(name, name.replace('_', ' '))}: {readable_value(value)}"
            for name, value in self.values.items()
            if name not in hidden and not name.endswith("_on_test")
        ]
        return "\n".join([self.line(), *rows])

    def line(self) -> str:
        """AUC and, with masks, pAUC; six decimals, so that two runs can be compared."""
        return f"AUC {self.auc:.6f}" + ("" if self.pauc is None else f"  pAUC {self.pauc:.6f}")


def readable_value(value: Value) -> str:
    """A value as text: 0.1234, an interval, a count, or `not measurable` for None."""
    if value is None:
        return "not measurable"
    if isinstance(value, list):
        return " to ".join(f"{bound:.4f}" for bound in value)
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def measure(
    evaluation: Evaluation,
    masks: Masks | None = None,
    full: bool = False,
    pixel_threshold: float | None = None,
    without: set[str] | None = None,
) -> Metrics:
    """Measure an evaluation.

    Args:
        evaluation: scores of M images.
        masks: their masks; None on image-only data sets. The maps of detection heads are never measured.
        full: also measure AUPRO, Dice, intervals over images, metrics over patients and by kind, and curves.
        pixel_threshold: for Dice: abnormal is score >= threshold; without it, there is no Dice.
        without: patients of the shots, for the metrics without their images; None (unknown) skips these metrics.

    Raises:
        InputError: all images, or all pixels, are of one class.
    """
    labels, scores = evaluation.labels, evaluation.image_scores
    values: dict[str, Value] = {**image_metrics(labels, scores)}
    curves, draws = {}, np.empty(0)
    if full:
        values["auc_ci95"] = auroc_interval(labels, scores)
        curves = image_curves(labels, scores)
    if masks is not None and evaluation.head == "seg":
        pixels = evaluation.maps, masks.get, len(labels), maps_at_a_time(evaluation)
        counts = count_pixels(*pixels, regions=full)
        values |= {"pauc": counts.auroc(), "pixel_ap": counts.average_precision()}
        values["pixel_f1_max"], values["pixel_f1_max_threshold_on_test"] = counts.f1_max()
        if full:
            values["aupro"] = counts.aupro()
            draws, dice = per_image_metrics(*pixels, counts, pixel_threshold)
            values |= {"pauc_ci95": interval_of(draws), **dice}
            curves |= {"roc": counts.roc(), "pr": counts.pr()}
    values = {key: values[key] for key in METRICS if key in values}
    if without is not None:
        values |= measure_without(evaluation, masks, without)
    extra = patient_metrics(evaluation) | kind_metrics(evaluation) if full else {}
    return Metrics(values | extra, curves, draws.tolist())


def maps_at_a_time(evaluation: Evaluation) -> int:
    """The number of maps to compute at a time, so that memory does not grow with their size."""
    return max(1, BATCH_PIXELS // evaluation.img_size**2)


def measure_without(evaluation: Evaluation, masks: Masks | None, patients: set[str]) -> dict[str, Value]:
    """AUC and pAUC without the images of the given patients, those of the shots. Not in the paper.

    Returns:
        `auc_without_shot_patients` and `pauc_without_shot_patients`, None if a class is empty (pAUC also without
        masks); `n_normal_...` and `n_abnormal_...`, the images that remain. Images without a known patient remain, but
        the result is empty if no patient is known.
    """
    if all(sample.patient is None for sample in evaluation.samples):
        return {}
    keep = [i for i, sample in enumerate(evaluation.samples) if sample.patient not in patients]
    labels = evaluation.labels[keep]
    n_abnormal = int(labels.sum())
    result: dict[str, Value] = {
        "auc_without_shot_patients": None,
        "pauc_without_shot_patients": None,
        "n_normal_without_shot_patients": len(keep) - n_abnormal,
        "n_abnormal_without_shot_patients": n_abnormal,
    }
    if 0 < n_abnormal < len(keep):
        result["auc_without_shot_patients"] = image_metrics(labels, evaluation.image_scores[keep])["auc"]
    if masks is not None and evaluation.head == "seg" and keep:
        maps, truth = evaluation.select(keep).maps, masks.select(keep).get
        counts = count_pixels(maps, truth, len(keep), maps_at_a_time(evaluation))
        if counts.normal.any() and counts.abnormal.any():
            result["pauc_without_shot_patients"] = counts.auroc()
    return result


# --- images ---


def image_metrics(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """`auc`, `ap`, `f1_max` and `f1_max_threshold_on_test` (abnormal is score >= threshold), by scikit-learn.

    Args:
        labels: (M,), 1 = abnormal.
        scores: (M,), higher is more abnormal.

    Raises:
        InputError: all images are of one class.
    """
    _check_classes((labels == 0).sum(), (labels == 1).sum(), "image", "image AUC")
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    best = int(f1[:-1].argmax())
    return {
        "auc": float(roc_auc_score(labels, scores)),
        "ap": float(average_precision_score(labels, scores)),
        "f1_max": float(f1[best]),
        "f1_max_threshold_on_test": float(thresholds[best]),
    }


def image_curves(labels: np.ndarray, scores: np.ndarray, points: int = CURVE_POINTS) -> dict[str, np.ndarray]:
    """`image_roc` and `image_pr` for labels, scores (M,): (2, at most `points`) each, like those of `PixelCounts`."""
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    precision, recall, _ = (values[::-1] for values in precision_recall_curve(labels, scores))
    return {"image_roc": _thinned(fpr, tpr, points), "image_pr": _thinned(recall[1:], precision[1:], points)}


def placements(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DeLong's placement values for labels, scores (M,), whose mean is the AUROC; a tie counts half.

    Returns:
        For each abnormal image, the fraction of normal ones below it; for each normal one, of abnormal ones above it.

    Raises:
        InputError: all images are of one class.
    """
    _check_classes((labels == 0).sum(), (labels == 1).sum(), "image", "image AUC")
    normal, abnormal = np.sort(scores[labels == 0]), np.sort(scores[labels == 1])
    below, above = (
        (np.searchsorted(other, own) + np.searchsorted(other, own, "right")) / (2 * len(other))
        for own, other in ((scores[labels == 1], normal), (scores[labels == 0], abnormal))
    )
    return below, 1 - above


def auroc_interval(labels: np.ndarray, scores: np.ndarray) -> list[float]:
    """95% interval [low, high] of the image AUROC for labels, scores (M,); at an AUROC of 0 or 1 it still has a width.

    It covers two intervals. DeLong's (1988), on the logit scale, is undefined at 0 and 1 and too short near them;
    Newcombe's (2006, method 5) is too short if the classes vary unequally. See docs/method.md for the
    coverage.
    """
    below, above = placements(labels, scores)
    auc, pairs, images = float(below.mean()), len(below) * len(above), (len(below) + len(above)) / 2 - 1

    def distance(value: float) -> float:  # 0 at the ends of Newcombe's interval
        spread = 1 + images * ((1 - value) / (2 - value) + value / (1 + value))
        return (auc - value) ** 2 - Z_95**2 * value * (1 - value) * spread / pairs

    margin = 1e-9
    low = brentq(distance, margin, auc - margin) if auc > 2 * margin and distance(margin) > 0 else 0.0
    high = brentq(distance, auc + margin, 1 - margin) if auc < 1 - 2 * margin and distance(1 - margin) > 0 else 1.0
    if 0 < auc < 1 and min(len(below), len(above)) > 1:
        error = (below.var(ddof=1) / len(below) + above.var(ddof=1) / len(above)) ** 0.5 / (auc * (1 - auc))
        centre = np.log(auc / (1 - auc))
        ends = 1 / (1 + np.exp(-(centre + np.array([-Z_95, Z_95]) * error)))
        low, high = min(low, ends[0]), max(high, ends[1])
    return [float(low), float(high)]


def patient_metrics(evaluation: Evaluation) -> dict[str, Value]:
    """AUROC over patients, each with the highest score of the images, and abnormal if one image is.

    Returns:
        `auc_patients`, its interval `auc_patients_ci95`, `n_normal_patients` and `n_abnormal_patients`. Empty if an
        image has no known patient, no patient has two images, or all patients are of one class.
    """
    patients = [sample.patient for sample in evaluation.samples]
    names, index = np.unique([patient or "" for patient in patients], return_inverse=True)
    labels, scores = np.zeros(len(names), dtype=np.int64), np.full(len(names), -np.inf)
    np.maximum.at(labels, index, evaluation.labels)
    np.maximum.at(scores, index, evaluation.image_scores)
    if not all(patients) or len(names) == len(patients) or len(set(labels.tolist())) < 2:
        return {}
    return {
        "auc_patients": image_metrics(labels, scores)["auc"],
        "auc_patients_ci95": auroc_interval(labels, scores),
        "n_normal_patients": int((labels == 0).sum()),
        "n_abnormal_patients": int(labels.sum()),
    }


def kind_metrics(evaluation: Evaluation) -> dict[str, Value]:
    """AUROC of each kind of abnormal image against all normal ones, if at least two kinds are named.

    Returns:
        `auc_of_KIND`, `auc_of_KIND_ci95` and `n_of_KIND` for each kind.
    """
    kinds, result = np.array([sample.kind for sample in evaluation.samples]), dict[str, Value]()
    names = sorted(set(kinds.tolist()) - {""})
    for kind in names if len(names) > 1 else []:
        kept = (evaluation.labels == 0) | (kinds == kind)
        labels, scores = evaluation.labels[kept], evaluation.image_scores[kept]
        result[f"auc_of_{kind}"] = image_metrics(labels, scores)["auc"]
        result[f"auc_of_{kind}_ci95"] = auroc_interval(labels, scores)
        result[f"n_of_{kind}"] = int(labels.sum())
    return result


def choose_threshold(true: np.ndarray, false: np.ndarray, n_normal: float, rule: str) -> int:
    """The index of the threshold that a rule chooses, of T in descending order; -1: a threshold above all scores.

    Args:
        true: (T,), the number of abnormal scores at or above each threshold; the last entry counts all of them.
        false: (T,), the same for normal scores.
        n_normal: number of all normal scores.
        rule: `f1` (the largest), `fpr=RATE` (the largest sensitivity at a false positive rate of at most RATE) or
            `tpr=RATE` (the highest threshold with a sensitivity of at least RATE).
    """
    name, _, rate = rule.partition("=")
    if name == "fpr":
        return int((false / max(n_normal, 1) <= float(rate)).sum()) - 1
    if name == "tpr":
        return int((true / true[-1] >= float(rate)).argmax())
    return int((2 * true / (true + false + true[-1])).argmax())


# --- pixels ---


@dataclass(frozen=True)
class PixelCounts:
    """Pixel counts of both classes, from which every pixel metric is computed; abnormal is score >= threshold.

    Attributes:
        grid: (G,) float32, ascending: abnormal pixels' scores.
        normal, abnormal: (2G + 1,) int64, the number of pixels below grid[0], at grid[0], between grid[0] and grid[1],
            at grid[1], and so on to those above grid[-1].
        highest: the highest score of all pixels.
        overlap: (2G + 1,) float64, like `abnormal`, but each pixel counts 1 / |its region|; None if not requested.
        regions: the number of regions.
    """

    grid: np.ndarray
    normal: np.ndarray
    abnormal: np.ndarray
    highest: float
    overlap: np.ndarray | None = None
    regions: int = 0

    def auroc(self) -> float:
        """Area under the ROC curve, a tie counts half; `InputError` if a class is missing, as in all methods below."""
        self._above("pixel AUC")
        return float(_auroc(self.normal, self.abnormal))

    def average_precision(self) -> float:
        """Average precision by scikit-learn's step rule: the mean over the abnormal pixels of the precision at each.

        Abnormal pixels strictly between two points of a thinned grid get the precision of their middle one, with half
        of the normal pixels there above it; tied pixels get the precision with all of them included.
        """
        false, true = self._above("pixel average precision")
        normal, abnormal = self.normal[::-1].astype(np.float64), self.abnormal[::-1].astype(np.float64)
        here = true[:-1] + (abnormal + 1) / 2, false[:-1] + normal / 2
        precision = here[0] / (here[0] + here[1])
        precision[1::2] = true[2::2] / (true[2::2] + false[2::2])  # at a grid point
        return float((precision * abnormal).sum() / true[-1])

    def f1_max(self) -> tuple[float, float]:
        """The largest F1 over all thresholds, and its threshold."""
        false, true = self._above("pixel F1")
        f1 = 2 * true[2::2] / (true[2::2] + false[2::2] + true[-1])
        best = int(f1.argmax())
        return float(f1[best]), float(self.grid[::-1][best])

    def roc(self, points: int = CURVE_POINTS) -> np.ndarray:
        """False and true positive rate (2, at most `points`), from (0, 0) to (1, 1)."""
        false, true = self._above("the pixel ROC curve")
        return _thinned(false / false[-1], true / true[-1], points)

    def pr(self, points: int = CURVE_POINTS) -> np.ndarray:
        """Recall and precision (2, at most `points`), in ascending order of recall, which reaches 1."""
        false, true = (values[2::2] for values in self._above("the pixel precision-recall curve"))
        return _thinned(true / true[-1], true / (true + false), points)

    def aupro(self, limit: float = AUPRO_LIMIT) -> float:
        """Area under the regions' mean overlap, over false positive rates from 0 to `limit`, divided by `limit`.

        By MVTec's definition (Bergmann et al. 2021): every score is a threshold, with trapezoids between thresholds and
        interpolation at `limit`. The mean of |region and score >= t| / |region| over R regions is a weighted count of
        abnormal pixels: each counts 1 / (R |its region|).
        """
        if self.overlap is None:
            raise ValueError("counted without regions")
        false, _ = self._above("AUPRO")
        rate, overlap = false / false[-1], _cumulative(self.overlap) / self.regions
        end = int(np.searchsorted(rate, limit))  # the first point at or beyond `limit`
        share = (limit - rate[end - 1]) / (rate[end] - rate[end - 1])
        last = overlap[end - 1] + share * (overlap[end] - overlap[end - 1])
        return float(np.trapezoid(np.append(overlap[:end], last), np.append(rate[:end], limit)) / limit)

    def threshold(self, rule: str) -> float:
        """The threshold that a rule chooses, see `choose_threshold`."""
        false, true = self._above("a pixel threshold")
        best = choose_threshold(true[2::2], false[2::2], false[-1], rule)
        if best < 0:
            return float(np.nextafter(np.float32(self.highest), np.float32(np.inf)))
        return float(self.grid[::-1][best])

    def coarse_grid(self, points: int = COARSE) -> np.ndarray:
        """At most `points` points of the grid that divide both classes about evenly: ascending, float32."""
        false, true = (values[2::2] for values in self._above("pixel AUC"))
        places = _spread(false / false[-1] + true / true[-1], points)
        coarse: np.ndarray = self.grid[::-1][places][::-1].copy()
        return coarse

    def _above(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Normal and abnormal pixels above each cell border, from the top down: (2G + 2,) float64, starting at 0."""
        _check_classes(int(self.normal.sum()), int(self.abnormal.sum()), "pixel", metric)
        return _cumulative(self.normal), _cumulative(self.abnormal)


def count_pixels(maps: Source, masks: Source, images: int, batch: int, regions: bool = False) -> PixelCounts:
    """Count the pixels of all images in two passes.

    Args:
        maps: returns the float32 anomaly maps (B, S, S) of a slice of the images, on any device; called in each pass.
        masks: returns their masks (B, S, S), bool.
        images: number of images.
        batch: number of images at a time.
        regions: also count regions, for AUPRO; they are 8-connected, as in MVTec's evaluation.
    """
    scores = _sorted(_abnormal_scores(maps, masks, images, batch))
    grid = score_grid(scores)
    ranks = _ranks(scores, grid)
    total, pixels, highest = torch.zeros_like(ranks), 0, scores.new_full((), -torch.inf)
    overlap, n_regions = np.zeros(2 * len(grid) + 1), 0
    for part in _parts(images, batch):
        values = maps(part)
        ordered = _sorted(values.flatten())
        total += _ranks(ordered, grid)
        pixels, highest = pixels + len(ordered), torch.maximum(highest, ordered[-1])
        if regions and _count(mask := masks(part)):
            cells, count = _region_overlap(values, mask, grid)
            overlap, n_regions = overlap + cells, n_regions + count
    abnormal = _cells(ranks, len(scores))
    normal = _cells(total, pixels) - abnormal
    return PixelCounts(grid.cpu().numpy(), normal, abnormal, float(highest), overlap if regions else None, n_regions)


def _abnormal_scores(maps: Source, masks: Source, images: int, batch: int) -> Tensor:
    """The first pass: abnormal scores (A,) float32, unsorted. Batches without abnormal pixels are skipped.

    Memory for all scores is allocated at once: small blocks between those of the maps would fragment the heap.
    """
    sizes = [_count(masks(part)) for part in _parts(images, batch)]
    scores, filled = torch.empty(0), 0
    for part, size in zip(_parts(images, batch), sizes, strict=True):
        if size:
            members = _selected(maps(part), masks(part))
            scores = scores if filled else members.new_empty(sum(sizes))
            scores[filled : filled + size] = members
            filled += size
    return scores if filled else maps(slice(0, 1)).flatten()[:0]  # empty, on the maps' device


def _region_overlap(scores: Tensor, mask: Tensor, grid: Tensor) -> tuple[np.ndarray, int]:
    """`PixelCounts.overlap` and `.regions` of a batch: scores, mask (B, S, S), grid (G,)."""
    within = np.zeros((3, 3, 3), dtype=bool)
    within[1] = True  # 8 neighbours in the same image, none in other images
    labels, count = ndimage.label(mask.cpu().numpy(), structure=within)
    inverse_sizes = 1 / np.bincount(labels.ravel())[labels[labels > 0]]
    members = _selected(scores, mask)
    order = members.argsort()
    below = np.append(0, inverse_sizes[order.cpu().numpy()].cumsum())
    return np.diff(below[_ranks(members[order], grid).cpu().numpy()], prepend=0, append=below[-1]), int(count)


def score_grid(scores: Tensor) -> Tensor:
    """At most GRID distinct values of ascending scores, evenly spaced by rank, both ends included: (A,) -> (G,)."""
    if len(scores) > GRID:
        places = np.linspace(0, len(scores) - 1, GRID).round().astype(np.int64)
        scores = scores[torch.from_numpy(places).to(scores.device)]
    distinct: Tensor = torch.unique_consecutive(scores)
    return distinct


def per_image_metrics(
    maps: Source,
    masks: Source,
    images: int,
    batch: int,
    counts: PixelCounts,
    pixel_threshold: float | None = None,
    draws: int = BOOTSTRAP_DRAWS,
    seed: int = 0,
) -> tuple[np.ndarray, dict[str, float]]:
    """A third pass: the pixel AUROC in bootstrap draws (draws,) and, with a threshold, `dice`. Not in the paper.

    Whole images are drawn, with replacement, since the pixels of an image are not independent. Percentiles of the draws
    are `pauc_ci95`. Each image is counted in at most 1,023 bins of a coarse grid. The counts are added to the sums of
    the draws at once, as often as each draw holds the image, and are not kept.

    `dice` is 2 |P and G| / (|P| + |G|), P: score >= threshold, G: the mask. It is computed for each image and averaged
    over those whose mask has an abnormal pixel. Normal images, and false positives on them, do not count.
    """
    grid = torch.from_numpy(counts.coarse_grid())
    sizes = torch.cat([masks(part).flatten(1).sum(1) for part in _parts(images, batch)]).cpu().numpy()
    image_pixels = int(counts.normal.sum() + counts.abnormal.sum()) // images
    weights = _draw(sizes < image_pixels, sizes > 0, draws, seed)
    normal, abnormal, dices = np.zeros((draws, 2 * len(grid) + 1)), np.zeros((draws, 2 * len(grid) + 1)), []
    for part in _parts(images, batch):
        scores = maps(part).flatten(1)
        mask = masks(part).flatten(1).to(scores.device)
        points = grid.to(scores.device).expand(len(scores), -1).contiguous()
        total = _cells(_torch_ranks(_sorted(scores), points), image_pixels)
        ordered = _sorted(scores.where(mask, torch.inf))  # puts normal pixels above the grid
        marked = _cells(_torch_ranks(ordered, points), sizes[part, None])
        drawn = weights[:, part].astype(np.float64)
        normal += drawn @ (total - marked)
        abnormal += drawn @ marked
        if pixel_threshold is not None:
            predicted = scores >= pixel_threshold
            both, either = (predicted & mask).sum(1), predicted.sum(1) + mask.sum(1)
            dices.append((2 * both.cpu().double() / either.cpu())[sizes[part] > 0])
    return _auroc(normal, abnormal), {"dice": float(torch.cat(dices).mean())} if dices else {}


# --- helpers ---


def _parts(images: int, batch: int) -> Iterator[slice]:
    return (slice(start, min(start + batch, images)) for start in range(0, images, batch))


def _check_classes(normal: int, abnormal: int, what: str, metric: str) -> None:
    """Raise an `InputError` that names the missing class, if one is missing."""
    total = int(normal + abnormal)
    for count, name in ((abnormal, "abnormal"), (normal, "normal")):
        if count == 0:
            raise InputError(f"no {name} {what}s among the {total:,} {what}s: {metric} is undefined")


def _auroc(normal: np.ndarray, abnormal: np.ndarray) -> np.ndarray:
    """AUROC from counts (..., bins) in ascending order of score; a tie counts half."""
    below = np.cumsum(normal, -1, dtype=np.float64) - 0.5 * normal
    pairs = normal.sum(-1, dtype=np.float64) * abnormal.sum(-1, dtype=np.float64)
    return np.asarray((below * abnormal).sum(-1) / pairs)


def _cumulative(cells: np.ndarray) -> np.ndarray:
    """Cumulative sums of cells from the top down, starting at 0: (cells,) -> (cells + 1,) float64."""
    return np.append(0, cells[::-1].cumsum()).astype(np.float64)


def _use_numpy(values: Tensor) -> bool:
    """Whether to use numpy. On a CPU, it is faster than torch: sorting 18 times, masking 15, searching twice."""
    return values.device.type == "cpu"


def _count(mask: Tensor) -> int:
    """The number of True entries."""
    return int(np.count_nonzero(mask.numpy()) if _use_numpy(mask) else mask.sum())


def _sorted(scores: Tensor) -> Tensor:
    """Scores sorted along the last axis."""
    if _use_numpy(scores):
        return torch.from_numpy(np.sort(scores.numpy()))
    return scores.sort().values


def _ranks(ordered: Tensor, grid: Tensor) -> Tensor:
    """How many of the ascending values lie below each grid point, and how many below or at it: (2G,) int64."""
    if not _use_numpy(ordered):
        return _torch_ranks(ordered, grid)
    values, points = ordered.numpy(), grid.numpy()
    below = np.searchsorted(values, points)
    upto = below.copy()
    at = np.flatnonzero(values.take(below, mode="clip") == points)  # most grid points do not occur in the batch
    upto[at] = np.searchsorted(values, points[at], side="right")
    return torch.from_numpy(np.stack([below, upto], axis=1).ravel())


def _torch_ranks(ordered: Tensor, grid: Tensor) -> Tensor:
    """`_ranks` by torch, for one row or many: (..., pixels), (..., G) -> (..., 2G) int64."""
    ranks = [torch.searchsorted(ordered, grid, right=right) for right in (False, True)]
    return torch.stack(ranks, dim=-1).flatten(-2)


def _cells(ranks: Tensor, total: int | np.ndarray) -> np.ndarray:
    """Counts of the cells, (..., 2G + 1), from ranks (..., 2G) and the total number of pixels."""
    return np.diff(ranks.cpu().numpy(), prepend=0, append=total)


def _selected(scores: Tensor, mask: Tensor) -> Tensor:
    """The scores inside the mask, scores[mask], on the device of the scores."""
    if _use_numpy(scores):
        return torch.from_numpy(scores.numpy()[mask.cpu().numpy()])
    return scores[mask.to(scores.device)]


def _spread(position: np.ndarray, points: int) -> np.ndarray:
    """At most `points` indices, evenly spaced along the ascending `position`, both ends included."""
    return np.unique(np.searchsorted(position, np.linspace(position[0], position[-1], points)))


def _thinned(x: np.ndarray, y: np.ndarray, points: int) -> np.ndarray:
    """A curve (2, at most `points`), x ascending, thinned to points that are evenly spaced along its length."""
    length = x - x[0] + np.append(0.0, np.abs(np.diff(y)).cumsum())
    return np.stack([x, y])[:, _spread(length, points)]


def _draw(normal: np.ndarray, abnormal: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """How often each draw holds each image, (draws, M) uint16: with replacement, redrawn until both classes occur.

    `normal` and `abnormal`, (M,) bool: whether an image has pixels of the class.
    """
    rng, images = np.random.default_rng(seed), len(normal)
    result = np.zeros((draws, images), dtype=np.uint16)
    for row in result:
        while not (row[normal].any() and row[abnormal].any()):
            row[:] = np.bincount(rng.integers(0, images, images), minlength=images)
    return result


def interval_of(values: np.ndarray) -> list[float]:
    """The central 95% of bootstrap values, [low, high]."""
    return [float(value) for value in np.quantile(values, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])]
