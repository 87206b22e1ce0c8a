"""engine/metrics.py against scikit-learn, torchmetrics, an exact AUPRO and the figures of the published evaluation."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torchmetrics.classification import BinaryAUROC

from engine.metrics import PerRegionOverlap, PixelBootstrap, ScoreHistogram, bootstrap_auroc, image_metrics
from utils import InputError

GOLDEN = Path(__file__).parents[1] / "golden"
LAYERS = 4


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(values / 2)


# What the scores of [0, 4] may look like, from standard normal draws that are shifted for abnormal pixels.
SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "wide": lambda z: LAYERS * sigmoid(1.5 * z - 2),
    "early in training": lambda z: 2 + 0.003 * z,
    "saturated": lambda z: LAYERS * sigmoid(20 * z),
    "saturated layers": lambda z: sum(sigmoid(12 * (z + 0.3 * k)) for k in range(LAYERS)),
    "narrow among wide": lambda z: np.where(np.arange(len(z)) % 10 == 0, LAYERS * sigmoid(z), 2 + 0.003 * z),
    "near zero": lambda z: np.exp(-30 - 10 * np.abs(z + 3)),
    "narrow near K": lambda z: LAYERS - 1e-5 * np.exp(z),
    "heavy ties": lambda z: np.round(20 * sigmoid(z)) / 5,
    "all equal": lambda z: np.full_like(z, 1.7),
}


def draw(shape: str, pixels: int, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.random(pixels) < share
    scores = SHAPES[shape](rng.standard_normal(pixels) + labels)
    return np.clip(scores, 0, LAYERS).astype(np.float32), labels


def histogram(scores: np.ndarray, labels: np.ndarray, batch: int) -> ScoreHistogram:
    result = ScoreHistogram(0, LAYERS)
    for start in range(0, len(scores), batch):
        result.update(scores[start : start + batch], labels[start : start + batch])
    return result


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, np.ndarray], dict]:
    with np.load(GOLDEN / "metrics.npz") as file:
        return dict(file), json.loads((GOLDEN / "metrics.json").read_text())


def test_golden_segmentation(golden: tuple[dict[str, np.ndarray], dict]) -> None:
    arrays, figures = golden
    maps, masks = arrays["layer_maps"].sum(1), arrays["masks"]
    result = ScoreHistogram(0, arrays["layer_maps"].shape[1])
    for start in range(0, 8, 3):
        result.update(maps[start : start + 3], masks[start : start + 3])
    assert result.auroc() == pytest.approx(figures["segmentation"]["pixel_auc"], abs=1e-9)
    metrics = image_metrics(arrays["labels"], maps.reshape(8, -1).max(1))
    assert metrics["auroc"] == pytest.approx(figures["segmentation"]["image_auc"], abs=1e-12)


def test_golden_detection_only(golden: tuple[dict[str, np.ndarray], dict]) -> None:
    arrays, figures = golden
    metrics = image_metrics(torch.from_numpy(arrays["labels"]), torch.from_numpy(arrays["det_scores"]))
    assert metrics["auroc"] == pytest.approx(figures["detection_only"]["image_auc"], abs=1e-12)


@pytest.mark.parametrize("order", ["mixed", "normal first", "ascending"])
@pytest.mark.parametrize("share", [0.03, 0.001])
@pytest.mark.parametrize("shape", SHAPES)
def test_pixel_metrics_agree_with_sklearn(shape: str, share: float, order: str) -> None:
    scores, labels = draw(shape, 200_000, share)
    if order != "mixed":
        places = np.argsort(labels if order == "normal first" else scores, kind="stable")
        scores, labels = scores[places], labels[places]
    result = histogram(scores, labels, 20_000)
    assert result.auroc() == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert result.average_precision() == pytest.approx(average_precision_score(labels, scores), abs=1e-4)
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1, threshold = result.f1_max()
    best = (2 * precision * recall / np.maximum(precision + recall, 1e-300)).max()
    assert f1 == pytest.approx(best, abs=1e-3 if share < 0.01 else 1e-4)
    called = scores >= threshold  # the threshold gives the F1 that is reported with it
    assert f1 == pytest.approx(2 * (called & labels).sum() / (called.sum() + labels.sum()), abs=1e-12)


@pytest.mark.parametrize("shape", ["wide", "early in training"])
def test_pixel_auroc_agrees_with_torchmetrics(shape: str) -> None:
    scores, labels = draw(shape, 100_000, 0.03)
    other = BinaryAUROC()(torch.from_numpy(scores).double() / LAYERS, torch.from_numpy(labels).long())
    assert histogram(scores, labels, 10_000).auroc() == pytest.approx(float(other), abs=1e-5)  # it adds in float32


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([-1.0, -0.5, -0.0, 0.0, 1e-30, 0.1, 0.1000001, 1.0]), st.booleans())))
def test_auroc_of_small_sets_with_ties_is_exact(pixels: list[tuple[float, bool]]) -> None:
    scores = np.array([score for score, _ in pixels] + [0.0, 0.1], dtype=np.float32)
    labels = np.array([label for _, label in pixels] + [False, True])
    result = ScoreHistogram(-1, 1)
    result.update(scores[: len(pixels)], labels[: len(pixels)])
    result.update(scores[len(pixels) :], labels[len(pixels) :])
    assert result.auroc() == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("shape", ["wide", "early in training", "saturated", "heavy ties"])
def test_merge_equals_one_pass_and_batches_do_not_matter(shape: str) -> None:
    scores, labels = draw(shape, 200_000, 0.01)
    labels[:120_000] &= scores[:120_000] > 1  # the two processes see different distributions
    whole = histogram(scores, labels, 25_000)
    first, second = (
        histogram(scores[:120_000], labels[:120_000], 50_000),
        histogram(scores[120_000:], labels[120_000:], 900),
    )
    second = pickle.loads(pickle.dumps(second))  # as it comes from another process
    first += second
    assert first.totals.sum(0).tolist() == whole.totals.sum(0).tolist() == [(~labels).sum(), labels.sum()]
    exact = roc_auc_score(labels, scores)
    assert first.auroc() == pytest.approx(exact, abs=1e-6)
    assert whole.auroc() == pytest.approx(exact, abs=1e-6)
    if shape == "heavy ties":
        assert first.auroc() == whole.auroc()


def test_counts_beyond_int32() -> None:
    scores, labels = draw("wide", 50_000, 0.03)
    expected = histogram(scores, labels, 50_000)
    large, other = (
        histogram(scores[:20_000], labels[:20_000], 20_000),
        histogram(scores[20_000:], labels[20_000:], 9_000),
    )
    large.pixels += 2**31  # as if it had seen that many
    large += other
    assert (large.totals.dtype, expected.totals.dtype) == (torch.int64, torch.int32)
    assert large.auroc() == pytest.approx(expected.auroc(), abs=1e-6)
    large.totals *= 2**40
    assert large.auroc() == pytest.approx(expected.auroc(), abs=1e-6)
    large.update(scores, labels)
    other += large
    assert other.totals.sum() == 50_000 * 2**40 + 50_000 + 30_000


def test_same_input_gives_the_same_bits_and_memory_stays_constant() -> None:
    scores, labels = draw("wide", 400_000, 0.03)
    first, second = histogram(scores, labels, 40_000), histogram(scores, labels, 40_000)
    assert first.auroc() == second.auroc()
    assert torch.equal(first.totals, second.totals)
    size = len(pickle.dumps(first))
    for _ in range(3):
        first.update(scores, labels)
    assert len(pickle.dumps(first)) < 1.5 * size < 40e6


def test_shapes_types_clipping_and_read_only_arrays() -> None:
    scores, labels = draw("wide", 2 * 60 * 50, 0.1)
    expected = histogram(scores, labels, len(scores)).auroc()
    scores, labels = scores.reshape(2, 1, 60, 50), labels.reshape(2, 1, 60, 50)
    result = ScoreHistogram(0, LAYERS)
    result.update(torch.from_numpy(scores).requires_grad_(), torch.from_numpy(labels.astype(np.uint8)))
    assert result.auroc() == expected
    frozen = scores.copy()
    frozen.flags.writeable = False
    result = ScoreHistogram(0, LAYERS)
    result.update(frozen.swapaxes(2, 3), labels.swapaxes(2, 3))
    assert result.auroc() == expected
    result = ScoreHistogram(0, 1)
    result.update(np.array([-0.1, -0.0, 1.0, 1.1]), np.array([False, True, False, True]))
    assert result.auroc() == 0.5  # clipped: one tie at each end
    with pytest.raises(ValueError, match="differ in shape"):
        result.update(np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match="same kind and score range"):
        result.merge(ScoreHistogram(0, 2))
    with pytest.raises(ValueError, match="empty score range"):
        ScoreHistogram(1, 1)


@pytest.mark.parametrize("make", [lambda: ScoreHistogram(0, 4), lambda: PerRegionOverlap(0, 4), PixelBootstrap])
def test_nan_names_the_first_image(make: Callable[[], ScoreHistogram]) -> None:
    maps = np.ones((3, 8, 8), dtype=np.float32)
    maps[1, 2, 3] = maps[2, 0, 0] = np.nan
    masks = np.zeros((3, 8, 8), dtype=bool)
    with pytest.raises(InputError, match=r"score of b\.png is NaN: "):
        make().update(maps, masks, ["a.png", "b.png", "c.png"])
    target = make()
    target.update(maps[:1], masks[:1])
    with pytest.raises(InputError, match=r"score of image 2 \(counted from 0\) is inf"):
        target.update(np.where(np.isnan(maps), np.inf, maps), masks)


def test_a_missing_class_is_named() -> None:
    for label, missing in ((0, "abnormal"), (1, "normal")):
        masks = np.full((2, 5, 5), bool(label))
        scores = np.zeros((2, 5, 5), dtype=np.float32)
        pixels, regions, bootstrap = ScoreHistogram(0, 1), PerRegionOverlap(0, 1), PixelBootstrap()
        for target in (pixels, regions, bootstrap):
            target.update(scores, masks)
        message = f"no {missing} pixels among the 50 pixels: "
        for call in (pixels.auroc, bootstrap.auroc, bootstrap.interval):
            with pytest.raises(InputError, match=message + "pixel AUC is undefined"):
                call()
        with pytest.raises(InputError, match=message + "pixel average precision"):
            pixels.average_precision()
        with pytest.raises(InputError, match=message + "pixel F1"):
            pixels.f1_max()
        with pytest.raises(InputError, match=message + "AUPRO is undefined"):
            regions.value()
        with pytest.raises(InputError, match=f"no {missing} images among the 3 images: image AUC is undefined"):
            image_metrics([label] * 3, [0.1, 0.2, 0.3])
        with pytest.raises(InputError, match=f"no {missing} images"):
            bootstrap_auroc([label] * 3, [0.1, 0.2, 0.3])
    with pytest.raises(InputError, match="no abnormal pixels among the 0 pixels"):
        ScoreHistogram(0, 1).auroc()


def test_curves_are_thinned_and_keep_their_area() -> None:
    scores, labels = draw("wide", 100_000, 0.03)
    result = histogram(scores, labels, 10_000)
    fpr, tpr, threshold = result.roc_curve(500)
    assert len(fpr) <= 500
    assert (fpr[0], tpr[0], threshold[0], fpr[-1], tpr[-1]) == (0, 0, np.inf, 1, 1)
    assert (np.diff(fpr) >= 0).all() and (np.diff(tpr) >= 0).all() and (np.diff(threshold) < 0).all()
    assert (np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2).sum() == pytest.approx(result.auroc(), abs=1e-4)
    at = len(threshold) // 2
    assert tpr[at] == pytest.approx((scores[labels] >= threshold[at]).mean(), abs=1e-12)
    precision, recall, threshold = result.pr_curve(500)
    assert len(precision) <= 500
    assert recall[-1] == 1
    assert (np.diff(recall, prepend=0) * precision).sum() == pytest.approx(result.average_precision(), abs=5e-3)
    at = len(threshold) // 2
    assert precision[at] == pytest.approx(labels[scores >= threshold[at]].mean(), abs=1e-12)


# --- AUPRO ---


def exact_aupro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """By definition: at every distinct score the mean overlap of the regions and the false positive rate."""
    regions = []
    for image, mask in zip(maps, masks, strict=True):
        found, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [image[found == k] for k in range(1, count + 1)]
    thresholds = np.unique(maps)[::-1]
    at_least = lambda values: 1 - np.searchsorted(np.sort(values), thresholds) / len(values)  # noqa: E731
    rate = np.append(0, at_least(maps[~masks]))
    overlap = np.append(0, np.mean([at_least(region) for region in regions], 0))
    inside = rate < limit
    x, y = np.append(rate[inside], limit), np.append(overlap[inside], np.interp(limit, rate, overlap))
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum() / limit)


def blobs(shape: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.standard_normal((6, 64, 64)), (0, 2, 2))
    masks = smooth > 0.25
    masks[0] = False
    masks[1] = np.eye(64, dtype=bool)  # one region only where diagonal neighbours count
    noise = rng.standard_normal(masks.shape) + masks
    return np.clip(SHAPES[shape](noise.ravel()), 0, LAYERS).astype(np.float32).reshape(masks.shape), masks


@pytest.mark.parametrize("shape", SHAPES)
def test_aupro_agrees_with_the_definition(shape: str) -> None:
    maps, masks = blobs(shape)
    whole, first, second = (PerRegionOverlap(0, LAYERS) for _ in range(3))
    whole.update(maps, masks)
    assert whole.value() == pytest.approx(exact_aupro(maps, masks), abs=1e-5)
    assert whole.value(0.05) == pytest.approx(exact_aupro(maps, masks, 0.05), abs=5e-5)
    assert whole.value(1.0) == pytest.approx(exact_aupro(maps, masks, 1.0), abs=1e-5)
    for image in range(4):
        first.update(maps[image : image + 1, None], masks[image : image + 1, None])  # (B, 1, H, W)
    second.update(torch.from_numpy(maps[4:]), torch.from_numpy(masks[4:]))
    first.merge(second)
    assert first.value() == pytest.approx(whole.value(), abs=1e-5)


def test_aupro_regions_are_8_connected_and_end_at_the_image() -> None:
    masks = np.zeros((2, 4, 4), dtype=bool)
    masks[0, 0, 0] = masks[0, 1, 1] = True  # diagonal: one region
    masks[1, 1, 1] = True  # the same place in the next image: another one
    result = PerRegionOverlap(0, 1)
    result.update(masks.astype(np.float32), masks)
    assert result.totals[:, 1].sum() == pytest.approx(2)
    assert result.value() == pytest.approx(1)


# --- image level and bootstrap ---


def test_image_metrics_agree_with_sklearn() -> None:
    scores, labels = draw("heavy ties", 300, 0.3)
    metrics = image_metrics(labels.astype(int), scores)
    assert metrics["auroc"] == roc_auc_score(labels, scores)
    assert metrics["ap"] == average_precision_score(labels, scores)
    f1 = [2 * (labels & (scores >= t)).sum() / ((scores >= t).sum() + labels.sum()) for t in np.unique(scores)]
    assert metrics["f1_max"] == pytest.approx(max(f1), abs=1e-12)
    assert metrics["threshold"] == pytest.approx(np.unique(scores)[int(np.argmax(f1))], abs=1e-12)
    with pytest.raises(InputError, match=r"score of x/b\.png is NaN"):
        image_metrics([0, 1, 1], [0.1, np.nan, np.nan], ["a", "x/b.png", "c"])
    with pytest.raises(ValueError, match="one value an image"):
        image_metrics([0, 1], [0.1])


def test_bootstrap_auroc_agrees_with_a_loop_over_sklearn() -> None:
    scores, labels = draw("heavy ties", 60, 0.2, seed=1)
    rng = np.random.default_rng(5)
    values = []
    while len(values) < 600:
        drawn = rng.integers(0, 60, 60)
        if 0 < labels[drawn].sum() < 60:
            values.append(roc_auc_score(labels[drawn], scores[drawn]))
    low, high = bootstrap_auroc(labels, scores, samples=4000)
    assert (low, high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.04)
    assert low < roc_auc_score(labels, scores) < high
    assert (low, high) == bootstrap_auroc(labels, scores, samples=4000)
    assert (low, high) != bootstrap_auroc(labels, scores, samples=4000, seed=1)
    narrow = bootstrap_auroc(labels, scores, samples=4000, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_auroc_redraws_what_holds_one_class() -> None:
    low, high = bootstrap_auroc([0, 0, 0, 0, 0, 0, 1], [0.0, 1, 2, 3, 4, 5, 3.5], samples=500)
    assert 0 <= low < 4 / 6 < high <= 1


def test_bootstrap_auroc_covers() -> None:
    """The 90% interval of normal(0) against normal(1) covers the true AUROC, Phi(1 / sqrt 2), nearly as often."""
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(60):
        labels = np.arange(80) % 2
        low, high = bootstrap_auroc(labels, rng.standard_normal(80) + labels, samples=300, seed=seed, level=0.9)
        hits += low < 0.76025 < high
    assert 45 <= hits <= 60  # 54 expected, 2.3 standard deviation


def image_set(shape: str, images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps with an offset of each image's own, so that pixels of an image are not independent."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((images, 40, 40), dtype=bool)
    masks[::2, 5:15, 5:20] = True
    noise = rng.standard_normal(masks.shape) + 0.7 * rng.standard_normal((images, 1, 1)) + masks
    return np.clip(SHAPES[shape](noise.ravel()), 0, LAYERS).astype(np.float32).reshape(masks.shape), masks


@pytest.mark.parametrize("shape", SHAPES)
def test_pixel_bootstrap_table_is_close_to_the_exact_auroc(shape: str) -> None:
    maps, masks = image_set(shape, 20, 0)
    whole, first, second = PixelBootstrap(), PixelBootstrap(), PixelBootstrap()
    whole.update(maps, masks)
    assert whole.auroc() == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-3)
    first.update(maps[:7], masks[:7])
    second.update(torch.from_numpy(maps[7:]), torch.from_numpy(masks[7:]))
    first.merge(second)
    assert first.auroc() == whole.auroc()
    assert first.interval(100) == whole.interval(100)


def test_pixel_bootstrap_keeps_a_bounded_number_of_points_for_any_number_of_images() -> None:
    maps, masks = image_set("early in training", 400, 0)
    free, bounded, part = PixelBootstrap(), PixelBootstrap(most_points=2**13), PixelBootstrap()
    free.update(maps, masks)
    for start in range(0, 200, 20):
        bounded.update(maps[start : start + 20], masks[start : start + 20])
    part.update(maps[200:], masks[200:])
    bounded.merge(part)
    for column in bounded._points:
        assert len(column) == 400
        assert sum(map(len, column)) <= 2**13
    # 16 to 32 points of each image's 1,600 pixels: the images together still show the distribution.
    assert bounded.auroc() == pytest.approx(free.auroc(), abs=2e-3)
    assert bounded.interval(300) == pytest.approx(free.interval(300), abs=4e-3)


def test_pixel_bootstrap_agrees_with_a_loop_over_sklearn_and_is_wider_than_pixels_suggest() -> None:
    maps, masks = image_set("early in training", 20, 1)
    rng = np.random.default_rng(5)
    values = []
    for _ in range(150):
        drawn = rng.integers(0, 20, 20)
        values.append(roc_auc_score(masks[drawn].ravel(), maps[drawn].ravel()))
    bootstrap = PixelBootstrap()
    bootstrap.update(maps, masks)
    low, high = bootstrap.interval(1000)
    assert (low, high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.03)
    assert low < roc_auc_score(masks.ravel(), maps.ravel()) < high
    assert high - low > 0.03  # 32,000 independent pixels would give 0.02


def test_pixel_bootstrap_covers() -> None:
    """The AUROC of a large sample of the same population lies in the 90% interval nearly as often as it should."""
    truth = PixelBootstrap()
    truth.update(*image_set("early in training", 1000, 99))
    hits = 0
    for seed in range(30):
        bootstrap = PixelBootstrap()
        bootstrap.update(*image_set("early in training", 40, seed))
        low, high = bootstrap.interval(200, seed=seed, level=0.9)
        hits += low < truth.auroc() < high
    assert 21 <= hits <= 30  # 27 expected, 1.6 standard deviation
