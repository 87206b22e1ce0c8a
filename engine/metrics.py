"""Streaming pixel metrics (AUROC, average precision, F1-max, AUPRO), image metrics and bootstrap intervals.

How a histogram comes within 1e-6 of the exact AUROC. The bits of a float32 sort like its value. They are cut into pages
of 4,096 neighbouring values, and each page into 1 to 4,096 cells, in proportion to its share of the pixels. So a narrow
peak (early in training every score lies near K/2), scores saturated at 0 or K and a wide spread all get cells of about
1/2**18 of the mass, or down to single float32 values. A tie counts half, which is exact for true ties. The shares are
learnt as the scores come in: when a batch falls into cells that are too coarse, all cells are laid out anew before it
is counted. A cell remembers its lowest score, so one that holds a single value (ties) moves exactly; the others, small
as they were, keep the resolution that they had. A fixed grid of 2**22 linear bins, for comparison, is as good on wide
scores, off by 4e-7 on normal(2, 0.003) and by 5e-3 on saturated ones.

Counts are integers: threads and the order within a batch do not matter. How the pixels are cut into batches and merged
can move cells, and the AUROC by about 1e-8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor

from utils import InputError

PAGE_BITS = 12  # a page is 2**12 neighbouring float32 values: 2,048 pages from a power of two to the next
CELLS = 2**18  # shared out by mass; rounding up, and one cell for every page, make it at most 800,000 for [0, 4]: 10 MB
CHUNK = 2**15  # pixels at a time: stays in the level-2 cache, and torch runs so few without waking other threads
EMPTY = 2**31 - 1  # the lowest key of a cell that holds nothing: no number has it
POINTS = 512  # quantiles that stand for an image's pixels of one class in the bootstrap
MOST_POINTS = 2**20  # of a class, over all images: 4 MB; above, every image has half as many
BOOTSTRAP_BINS = 1024
BOOTSTRAP_IMAGES = 256  # at a time

Array = np.ndarray | Tensor


def _tensor(values: Array, dtype: np.dtype | type) -> Tensor:
    """`values` on the CPU, contiguous, in the given numpy type; without a copy where that is possible."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if dtype is np.float32 else values).numpy()  # numpy has no bfloat16
    return torch.from_numpy(np.require(values, dtype, ("C", "W")))


def _check_finite(scores: np.ndarray, names: Sequence[str] | None, first: int = 0) -> None:
    """Raise an InputError that names the first image of `scores` (B, ...) with a score that is NaN or infinite."""
    if scores.size == 0 or np.isfinite([scores.min(), scores.max()]).all():
        return
    rows = scores.reshape(len(scores), -1)
    row = int(np.argmin(np.isfinite(rows).all(1)))
    bad = rows[row][~np.isfinite(rows[row])][0]
    name = names[row] if names is not None else f"image {first + row} (counted from 0)"
    value = "NaN" if np.isnan(bad) else str(bad)
    raise InputError(f"score of {name} is {value}: diverged (lower --learning_rate), or a damaged image")


def _check_classes(normal: float, abnormal: float, what: str, metric: str) -> None:
    """Raise an InputError that names the class of which there is none."""
    total = int(normal + abnormal)
    for count, name in ((abnormal, "abnormal"), (normal, "normal")):
        if count == 0:
            raise InputError(f"no {name} {what}s among the {total:,} {what}s: {metric} is undefined")


def _auroc(normal: np.ndarray, abnormal: np.ndarray) -> np.ndarray:
    """AUROC from masses (..., bins) in ascending order of score; a tie counts half; NaN where a class is empty."""
    below = np.cumsum(normal, -1, dtype=np.float64) - 0.5 * normal
    with np.errstate(invalid="ignore"):
        return (below * abnormal).sum(-1) / (normal.sum(-1, dtype=np.float64) * abnormal.sum(-1, dtype=np.float64))


class _AdaptiveHistogram:
    """Mass per class on float32 cells that follow the data; `totals` (cells, 2): column 0 normal, column 1 abnormal."""

    def __init__(self, low: float, high: float, dtype: torch.dtype, cells: int) -> None:
        if not low < high:
            raise ValueError(f"empty score range [{low}, {high}]")
        self.low, self.high, self.cells, self.images, self.pixels = float(low), float(high), cells, 0, 0
        first, last = (self._keys(torch.tensor([low, high], dtype=torch.float32)) >> PAGE_BITS).tolist()
        self._first_page, pages = first, last - first + 1
        self._page_mass = torch.zeros(pages, dtype=torch.int64)  # pixels, from samples: it only places the cells
        self._lay_out(np.zeros(pages, dtype=np.int64), dtype)

    def merge(self, other: _AdaptiveHistogram) -> None:
        """Add what `other` (the same class and score range) has counted, for example in another process."""
        if (type(self), self.low, self.high) != (type(other), other.low, other.high):
            raise ValueError("only histograms of the same kind and score range can be merged")
        self._grow(other.images, other.pixels)
        self._page_mass += other._page_mass
        self._adapt()
        self._put_all(*other._filled())

    def __iadd__(self, other: _AdaptiveHistogram) -> _AdaptiveHistogram:
        self.merge(other)
        return self

    def _add(self, scores: Array, labels: Array, names: Sequence[str] | None, weights: Tensor | None = None) -> None:
        scores, labels = _tensor(scores, np.float32), _tensor(labels, np.bool_)
        if scores.shape != labels.shape:
            raise ValueError(f"scores {tuple(scores.shape)} and labels {tuple(labels.shape)} differ in shape")
        _check_finite(scores.numpy(), names, self.images)
        self._grow(len(scores), scores.numel())
        scores, labels = scores.view(-1), labels.view(-1)
        step = -(-len(scores) // CHUNK) | 1  # a sample shows where the mass is; odd, so as not to follow the columns
        self._look(self._keys(scores[::step]), step)
        ones = torch.ones(min(CHUNK, len(scores)), dtype=self.totals.dtype)
        for part in _parts(len(scores)):
            keys = self._keys(scores[part])
            self._put(keys, labels[part], ones[: len(keys)] if weights is None else weights.view(-1)[part])

    def _grow(self, images: int, pixels: int) -> None:
        self.images, self.pixels = self.images + images, self.pixels + pixels
        if self.totals.dtype == torch.int32 and self.pixels >= 2**31:  # int32 as long as it holds them: half the cache
            self.totals = self.totals.long()

    def _keys(self, scores: Tensor) -> Tensor:
        """Int32 keys that sort like the float32 scores, which are clipped to [low, high]."""
        keys = scores.clamp(self.low, self.high).add_(0.0).view(torch.int32)  # adding 0 turns -0.0 into 0.0
        return keys if self.low >= 0 else keys ^ ((keys >> 31) & 0x7FFFFFFF)

    def _look(self, keys: Tensor, step: int) -> None:
        """Note from every `step`-th pixel where the mass is; lay the cells out anew if theirs are twice too heavy."""
        pages = (keys >> PAGE_BITS) - self._first_page
        self._page_mass.index_add_(0, pages, torch.ones_like(pages, dtype=torch.int64), alpha=step)
        bits = self._bits[pages.numpy()]
        mass = self._page_mass.index_select(0, pages).numpy() / 2.0**bits
        if mass[bits < PAGE_BITS].sum() * self.cells > 4 * len(keys) * self._page_mass.numpy().sum():
            self._adapt()

    def _adapt(self) -> None:
        """Share the cells out, half by a page's mass and half by its surroundings', and move what has been counted.

        A cell that is wider than one float32 value then has a share of at most s = 2 / cells of the pixels (if they lie
        evenly within a page), so at most 2s of the larger class, which bounds the AUROC's error by s; it is far smaller
        as the errors of cells cancel. The surroundings serve thin tails, of which a sample misses many pages.
        """
        keys, totals = self._filled()
        mass = self._page_mass.numpy().astype(np.float64)
        mass += ndimage.uniform_filter1d(mass, 65, mode="constant")
        bits = np.ceil(np.log2(np.maximum(mass * (self.cells / max(mass.sum(), 1)), 1))).astype(np.int64)
        self._lay_out(bits.clip(max=PAGE_BITS), self.totals.dtype)
        self._put_all(keys, totals)

    def _lay_out(self, bits: np.ndarray, dtype: torch.dtype) -> None:
        """Empty cells, 2**bits[p] for page p; `_table` packs each page's first cell and its shift into one int32."""
        ends = np.cumsum(1 << bits)
        self._bits = bits
        self._table = torch.from_numpy((((ends - (1 << bits)) << 4) | (PAGE_BITS - bits)).astype(np.int32))
        self.totals = torch.zeros(int(ends[-1]), 2, dtype=dtype)
        self._lowest = torch.full((int(ends[-1]),), EMPTY, dtype=torch.int32)  # lowest key seen in each cell

    def _put(self, keys: Tensor, columns: Tensor, masses: Tensor) -> None:
        """Add `masses` at `keys` (at most CHUNK) to the given columns."""
        packed = self._table.index_select(0, (keys >> PAGE_BITS).sub_(self._first_page))
        inside = (keys & (2**PAGE_BITS - 1)).bitwise_right_shift_(packed & 15)
        cells = inside.add_(packed.bitwise_right_shift_(4)).long()
        self._lowest.scatter_reduce_(0, cells, keys, "amin")
        self.totals.view(-1).scatter_add_(0, cells.mul_(2).add_(columns), masses)

    def _put_all(self, keys: np.ndarray, totals: np.ndarray) -> None:
        keys, totals = torch.from_numpy(keys), torch.from_numpy(totals)
        for column in (0, 1):
            for part in _parts(len(keys)):
                masses = totals[part, column].to(self.totals.dtype)
                self._put(keys[part], torch.full_like(keys[part], column), masses)

    def _filled(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest key (cells,) and masses (cells, 2) of the cells that hold something, in ascending order."""
        keys = self._lowest.numpy()
        keep = np.flatnonzero(keys != EMPTY)
        totals = self.totals.numpy()[keep]
        return keys[keep], totals.astype(np.int64) if totals.dtype == np.int32 else totals

    def _cells(self) -> tuple[np.ndarray, np.ndarray]:
        """Masses (cells, 2) and lowest scores (cells,), ascending."""
        keys, totals = self._filled()
        keys = keys if self.low >= 0 else keys ^ ((keys >> 31) & 0x7FFFFFFF)  # the map in _keys is its own inverse
        return totals, keys.view(np.float32).astype(np.float64)

    def _checked(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """See `_cells`; InputError when a class is missing."""
        totals, scores = self._cells()
        for column, name in ((1, "abnormal"), (0, "normal")):
            if not totals[:, column].any():
                raise InputError(f"no {name} pixels among the {self.pixels:,} pixels: {metric} is undefined")
        return totals, scores


def _parts(length: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, length, CHUNK))


class ScoreHistogram(_AdaptiveHistogram):
    """Pixel metrics of any number of pixels in constant memory, for scores in a known range.

    Args:
        low, high: the score range; for anomaly maps summed over K layers [0, K]. Scores outside are clipped.
        cells: how many cells follow the mass. 2**18 keeps the AUROC within 1e-6 of the exact one, with room to spare.

    Counts are exact, beyond 2**31 pixels too. Histograms of several processes or GPUs are added with `merge` or `+=`.
    """

    def __init__(self, low: float, high: float, cells: int = CELLS) -> None:
        super().__init__(low, high, torch.int32, cells)

    def update(self, scores: Array, labels: Array, names: Sequence[str] | None = None) -> None:
        """Count float32 `scores` (B, ...) with bool `labels` of the same shape (True = abnormal).

        `names` (B) are for the InputError raised when a score is NaN or infinite.
        """
        self._add(scores, labels, names, None)

    def auroc(self) -> float:
        """Area under the ROC curve; InputError when a class is missing, as for all that follows."""
        counts, _ = self._checked("pixel AUC")
        return float(_auroc(counts[:, 0], counts[:, 1]))

    def average_precision(self) -> float:
        """Average precision by scikit-learn's step rule; within 1e-4, as a whole cell counts as one tie."""
        true, false, _ = self._descending("pixel average precision")
        return float((np.diff(true, prepend=0.0) * true / (true + false)).sum() / true[-1])

    def f1_max(self) -> tuple[float, float]:
        """Return the largest F1 over all thresholds, and its threshold t: abnormal is score >= t."""
        true, false, edges = self._descending("pixel F1")
        f1 = 2 * true / (true + false + true[-1])
        best = int(f1.argmax())
        return float(f1[best]), float(edges[best])

    def roc_curve(self, points: int = 1000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return false positive rate, true positive rate, threshold; from (0, 0, inf) up, at most `points` of each."""
        true, false, edges = self._descending("the pixel ROC curve")
        fpr, tpr = np.append(0.0, false / false[-1]), np.append(0.0, true / true[-1])
        keep = _thin(fpr + tpr, points)
        return fpr[keep], tpr[keep], np.append(np.inf, edges)[keep]

    def pr_curve(self, points: int = 1000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return precision, recall, threshold in ascending order of recall, at most `points` of each."""
        true, false, edges = self._descending("the pixel precision-recall curve")
        precision, recall = true / (true + false), true / true[-1]
        keep = _thin(recall + np.append(0.0, np.abs(np.diff(precision)).cumsum()), points)
        return precision[keep], recall[keep], edges[keep]

    def quantile(self, share: float) -> float:
        """The score below which a share (0 to 1) of all pixels lies, to within a cell."""
        counts, scores = self._cells()
        below = counts.sum(1).cumsum()
        return float(scores[min(int(np.searchsorted(below, share * below[-1])), len(scores) - 1)])

    def _descending(self, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return true positives, false positives and threshold (the cell's lowest score), highest score first."""
        counts, edges = self._checked(metric)
        above = counts[::-1].cumsum(0).astype(np.float64)
        return above[:, 1], above[:, 0], edges[::-1]


def _thin(position: np.ndarray, points: int) -> np.ndarray:
    """Pick at most `points` indices, evenly spaced along the ascending `position`, both ends included."""
    targets = np.linspace(position[0], position[-1], points)
    return np.unique(np.append(0, np.searchsorted(position, targets).clip(max=len(position) - 1)))[-points:]


class PerRegionOverlap(_AdaptiveHistogram):
    """AUPRO (Bergmann et al. 2021) in constant memory: area under mean region overlap against false positive rate.

    The mean over R regions of |region and score >= t| / |region| is a weighted count of the abnormal pixels, each
    weighing 1 / (R * its region's size). So the curve is a ROC curve with weights, and the same histogram holds it, in
    float64: within 1e-5 of the exact area. Regions are 8-connected, as in MVTec's evaluation. Every threshold counts,
    not a list of some hundred.
    """

    def __init__(self, low: float, high: float, cells: int = CELLS) -> None:
        super().__init__(low, high, torch.float64, cells)

    def update(self, scores: Array, labels: Array, names: Sequence[str] | None = None) -> None:
        """Add maps (B, H, W) or (B, 1, H, W) with bool masks of the same shape."""
        masks = _tensor(labels, np.bool_).numpy()
        across = np.zeros((3, 3, 3), dtype=bool)
        across[1] = True  # the 8 neighbours within an image, none in the next image
        regions, _ = ndimage.label(masks.reshape(-1, *masks.shape[-2:]), structure=across)
        sizes = np.bincount(regions.ravel())
        sizes[0] = 1  # normal pixels count one each
        self._add(scores, masks, names, torch.from_numpy((1.0 / sizes)[regions]))

    def value(self, limit: float = 0.3) -> float:
        """Return the area up to a false positive rate of `limit`, over `limit`; InputError when a class is missing."""
        totals, _ = self._checked("AUPRO")
        above = np.concatenate([np.zeros((1, 2)), totals[::-1].cumsum(0)])
        rate, overlap = (above / above[-1]).T
        inside = rate < limit
        rate, overlap = np.append(rate[inside], limit), np.append(overlap[inside], np.interp(limit, rate, overlap))
        return float((np.diff(rate) * (overlap[1:] + overlap[:-1])).sum() / (2 * limit))


def image_metrics(labels: Array, scores: Array, names: Sequence[str] | None = None) -> dict[str, float]:
    """Image-level `auroc`, `ap`, `f1_max` and its `threshold` (abnormal is score >= threshold) by scikit-learn.

    Args:
        labels: (B,) 0 normal, 1 abnormal.
        scores: (B,) higher is more abnormal.
        names: (B,) for the InputError raised when a score is NaN; a missing class raises one too.
    """
    labels, scores = _image_arrays(labels, scores, names, "image AUC")
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    best = int(f1[:-1].argmax())
    return {
        "auroc": float(roc_auc_score(labels, scores)),
        "ap": float(average_precision_score(labels, scores)),
        "f1_max": float(f1[best]),
        "threshold": float(thresholds[best]),
    }


def bootstrap_auroc(
    labels: Array, scores: Array, samples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the image AUROC; labels and scores (B,), images drawn with replacement.

    Draws that hold one class only are drawn again. The same seed gives the same interval.
    """
    labels, scores = _image_arrays(labels, scores, None, "image AUC")
    order = np.argsort(scores, kind="stable")
    _, starts = np.unique(scores[order], return_index=True)
    labels = labels[order]

    def auroc(weights: np.ndarray) -> np.ndarray:
        weights = weights.astype(np.float64)
        normal, abnormal = (np.add.reduceat(weights * keep, starts, axis=1) for keep in (~labels, labels))
        return _auroc(normal, abnormal)

    return _bootstrap(auroc, len(labels), samples, seed, level)


class PixelBootstrap:
    """Bootstrap interval of the pixel AUROC, drawing images, since the pixels of an image are not independent.

    Each image leaves at most 512 quantiles of each class. Quantiles need no grid chosen in advance, follow any
    concentration of the scores and keep ties; up to 512 pixels are kept as they are. Beyond 2,048 images each has half
    as many, and so on: 8 MB hold them, and an image's part in the draws is 1 KB. In the end the pooled quantiles are
    put into 1,024 bins of equal mass, and a draw is a product of image weights with that table. The AUROC of the table,
    `auroc()`, is within 1e-3 of the exact one (usually 1e-5).
    """

    def __init__(self, most_points: int = MOST_POINTS) -> None:
        self.points, self.most_points = POINTS, most_points  # of an image, of all images
        self._points: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])  # by class, one float32 array an image
        self._sizes: tuple[list[int], list[int]] = ([], [])

    def update(self, scores: Array, labels: Array, names: Sequence[str] | None = None) -> None:
        """Add maps (B, ...) with bool labels of the same shape; InputError naming the image when a score is NaN."""
        scores, labels = _tensor(scores, np.float32).numpy(), _tensor(labels, np.bool_).numpy()
        _check_finite(scores, names, len(self._sizes[0]))
        for image, mask in zip(scores, labels, strict=True):
            for column, values in enumerate((image[~mask], image[mask])):
                values.sort()
                self._points[column].append(_thinned(values, self.points))
                self._sizes[column].append(len(values))
        self._limit(self.points)

    def merge(self, other: PixelBootstrap) -> None:
        """Append the images of `other`."""
        self._limit(other.points)
        for mine, theirs in zip(self._points, other._points, strict=True):
            mine.extend(_thinned(values, self.points) for values in theirs)
        for mine, theirs in zip(self._sizes, other._sizes, strict=True):
            mine.extend(theirs)
        self._limit(self.points)

    def _limit(self, points: int) -> None:
        """Keep at most `points` of each image, and fewer where all together would be too many."""
        while points > 2 and points * len(self._sizes[0]) > self.most_points:
            points //= 2
        if points < self.points:
            self.points = points
            for column in self._points:
                column[:] = [_thinned(values, points) for values in column]

    def interval(self, samples: int = 1000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
        """Percentile interval over `samples` draws of the images; the same seed and images give the same interval."""
        edges = self._edges()

        def auroc(weights: np.ndarray) -> np.ndarray:
            totals = np.zeros((2, len(weights), len(edges) + 1))
            for part, table in self._tables(edges):
                drawn = weights[:, part].astype(np.float64)
                for column in (0, 1):
                    totals[column] += drawn @ table[column]
            return _auroc(*totals)

        return _bootstrap(auroc, len(self._sizes[0]), samples, seed, level, block=samples)

    def auroc(self) -> float:
        """Return the pixel AUROC of all images, from the quantiles."""
        return float(_auroc(*sum(table.sum(1) for _, table in self._tables(self._edges()))))

    def _edges(self) -> np.ndarray:
        """Borders of common bins, of equal mass in each class; `InputError` when a class is missing."""
        _check_classes(*(sum(sizes) for sizes in self._sizes), "pixel", "pixel AUC")
        places = np.linspace(0, 1, BOOTSTRAP_BINS // 2)
        return np.unique([np.quantile(np.concatenate(points), places, method="nearest") for points in self._points])

    def _tables(self, edges: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Pixels by class, image and bin, (2, some images, bins), a few images at a time: the whole would be large."""
        bins = len(edges) + 1
        for start in range(0, len(self._sizes[0]), BOOTSTRAP_IMAGES):
            part = slice(start, start + BOOTSTRAP_IMAGES)
            table = []
            for points, sizes in zip(self._points, self._sizes, strict=True):
                kept = np.array([len(p) for p in points[part]])
                image = np.repeat(np.arange(len(kept)), kept)
                weight = np.repeat(np.array(sizes[part]) / np.maximum(kept, 1), kept)
                cell = image * bins + np.searchsorted(edges, np.concatenate(points[part]), side="right")
                table.append(np.bincount(cell, weight, minlength=len(kept) * bins).reshape(-1, bins))
            yield part, np.stack(table)


def _thinned(values: np.ndarray, most: int) -> np.ndarray:
    """At most `most` evenly spaced quantiles of ascending values."""
    if len(values) <= most:
        return values
    places = (np.arange(most) + 0.5) * (len(values) / most) - 0.5
    return np.interp(places, np.arange(len(values)), values).astype(np.float32)


def _bootstrap(
    auroc: Callable[[np.ndarray], np.ndarray], images: int, samples: int, seed: int, level: float, block: int = 50
) -> tuple[float, float]:
    """Percentile interval of `auroc` over draws with replacement.

    `auroc` takes weights (block, images) uint8, how often each image was drawn; it gives (block,), NaN for undefined.
    """
    rng, values = np.random.default_rng(seed), np.empty(0)
    while len(values) < samples:
        weights = np.empty((block, images), dtype=np.uint8)
        for draw in weights:
            draw[:] = np.bincount(rng.integers(0, images, images), minlength=images)
        found = auroc(weights)
        values = np.append(values, found[~np.isnan(found)])
    low, high = np.quantile(values[:samples], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _image_arrays(
    labels: Array, scores: Array, names: Sequence[str] | None, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """Labels (B,) bool and scores (B,) float64, checked."""
    labels = _tensor(labels, np.bool_).numpy()
    scores = np.asarray(scores.detach().cpu() if isinstance(scores, Tensor) else scores, dtype=np.float64)
    if labels.shape != scores.shape or labels.ndim != 1:
        raise ValueError(f"labels {labels.shape} and scores {scores.shape} must be one value an image")
    _check_finite(scores, names)
    _check_classes((~labels).sum(), labels.sum(), "image", metric)
    return labels, scores
