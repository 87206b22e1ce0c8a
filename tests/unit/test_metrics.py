"""engine/metrics.py against scikit-learn, MVTec's AUPRO and values of the published evaluation."""

import json
import tracemalloc
from collections.abc import Callable
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from engine import metrics
from engine.metrics import (
    METRICS,
    Metrics,
    PixelCounts,
    auroc_interval,
    count_pixels,
    image_metrics,
    measure,
    measure_without,
    patient_metrics,
    per_image_metrics,
    placements,
)
from tests.helpers.evaluations import noisy_evaluation
from utils import InputError

LAYERS = 4


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(values / 2)


# Distributions of scores in [0, 4], as functions of standard normal draws that are shifted for abnormal pixels.
SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "wide": lambda z: LAYERS * sigmoid(1.5 * z - 2),
    "saturated": lambda z: LAYERS * sigmoid(20 * z),
    "saturated layers": lambda z: sum(sigmoid(12 * (z + 0.3 * k)) for k in range(LAYERS)),
    "narrow among wide": lambda z: np.where(np.arange(len(z)) % 10 == 0, LAYERS * sigmoid(z), 2 + 0.003 * z),
    "heavy ties": lambda z: np.round(20 * sigmoid(z)) / 5,
    "all equal": lambda z: np.full_like(z, 1.7),
}


def draw(shape: str, pixels: int, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.random(pixels) < share
    scores = SHAPES[shape](rng.standard_normal(pixels) + labels)
    return np.clip(scores, 0, LAYERS).astype(np.float32), labels


def sources(maps: np.ndarray, masks: np.ndarray) -> tuple[Callable[[slice], torch.Tensor], ...]:
    """The arguments `maps` and `masks` of `count_pixels`, from arrays with one row per image."""
    return lambda part: torch.from_numpy(maps[part]), lambda part: torch.from_numpy(masks[part])


def count(scores: np.ndarray, labels: np.ndarray, batch: int = 3, images: int = 10, **options: object) -> PixelCounts:
    """Count pixels (pixels,) as those of `images` images."""
    maps, masks = scores.reshape(images, -1), labels.reshape(images, -1)
    return count_pixels(*sources(maps, masks), images, batch, **options)


def exact(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """AUROC, AP and F1-max by scikit-learn."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-300)).max()
    return roc_auc_score(labels, scores), average_precision_score(labels, scores), f1


def test_golden(golden, golden_json) -> None:
    arrays, figures = golden("metrics"), golden_json("metrics")
    maps, masks = arrays["layer_maps"].sum(1), arrays["masks"].astype(bool)
    auroc = count_pixels(*sources(maps, masks), 8, 3).auroc()
    assert auroc == pytest.approx(figures["segmentation"]["pixel_auc"], abs=1e-9)
    auc = image_metrics(arrays["labels"], maps.reshape(8, -1).max(1))["auc"]
    assert auc == pytest.approx(figures["segmentation"]["image_auc"], abs=1e-12)
    auc = image_metrics(arrays["labels"], arrays["det_scores"])["auc"]
    assert auc == pytest.approx(figures["detection_only"]["image_auc"], abs=1e-12)


# --- pixels ---


@pytest.mark.parametrize("shape", SHAPES)
def test_pixel_metrics_are_exact(shape: str) -> None:
    scores, labels = draw(shape, 100_000, 0.003)
    counts = count(scores, labels)
    assert (int(counts.normal.sum()), int(counts.abnormal.sum())) == ((~labels).sum(), labels.sum())
    f1, threshold = counts.f1_max()
    assert (counts.auroc(), counts.average_precision(), f1) == pytest.approx(exact(scores, labels), abs=1e-12)
    called = scores >= threshold  # the threshold gives the reported F1
    assert f1 == pytest.approx(2 * (called & labels).sum() / (called.sum() + labels.sum()), abs=1e-12)


pixel_sets = st.lists(
    st.tuples(st.sampled_from([0.0, -0.0, 1e-30, 0.1, 0.10000001, 0.5, 3.9999998, 4.0]), st.booleans()), max_size=30
)


@settings(max_examples=200, deadline=None)
@given(pixel_sets, st.floats(0, 4, width=32), st.floats(0, 4, width=32), st.integers(1, 40))
def test_small_sets_with_ties_are_exact(pixels: list[tuple[float, bool]], a: float, b: float, batch: int) -> None:
    scores = np.array([score for score, _ in pixels] + [a, b], dtype=np.float32)
    labels = np.array([label for _, label in pixels] + [False, True])
    counts = count(scores, labels, batch, images=len(scores))
    f1, threshold = counts.f1_max()
    assert (counts.auroc(), counts.average_precision(), f1) == pytest.approx(exact(scores, labels), abs=1e-12)
    called = scores >= threshold
    assert f1 == pytest.approx(2 * (called & labels).sum() / (called.sum() + labels.sum()), abs=1e-12)
    at = {float(g): k for k, g in enumerate(counts.grid)}
    assert list(at) == sorted({float(score) for score in scores[labels]})
    for point, k in at.items():
        assert counts.normal[2 * k + 1] == (scores[~labels] == point).sum()
        assert counts.abnormal[2 * k + 1] == (scores[labels] == point).sum()
        assert counts.normal[: 2 * k + 1].sum() == (scores[~labels] < point).sum()


@pytest.mark.parametrize(("label", "missing"), [(False, "abnormal"), (True, "normal")])
def test_missing_class_is_reported(label: bool, missing: str) -> None:
    masks = np.full((2, 5, 5), label)
    counts = count_pixels(*sources(np.zeros((2, 5, 5), np.float32), masks), 2, 1, regions=True)
    for call in (counts.auroc, counts.average_precision, counts.f1_max, counts.aupro, counts.roc, counts.pr):
        with pytest.raises(InputError, match=f"no {missing} pixels among the 50 pixels"):
            call()
    for call in (image_metrics, auroc_interval):
        with pytest.raises(InputError, match=f"no {missing} images among the 3 images"):
            call(np.full(3, int(label)), np.arange(3.0))


# --- AUPRO ---


def mvtec_aupro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """AUPRO as in MVTec's code: both curves change at each pixel (ties together), trapezoids up to the limit."""
    fp_changes, pro_changes, regions = np.zeros(masks.shape), np.zeros(masks.shape), 0
    fp_changes[~masks] = 1
    for k, mask in enumerate(masks):
        labelled, found = ndimage.label(mask, structure=np.ones((3, 3), int))
        regions += found
        for region in range(1, found + 1):
            pro_changes[k][labelled == region] = 1 / (labelled == region).sum()
    order = np.argsort(maps.ravel())[::-1]
    ordered = maps.ravel()[order]
    keep = np.append(np.diff(ordered) != 0, True)
    x = np.append(0, (np.cumsum(fp_changes.ravel()[order]) / (~masks).sum())[keep])
    y = np.append(0, (np.cumsum(pro_changes.ravel()[order]) / regions)[keep])
    area = 0.0
    for x0, x1, y0, y1 in zip(x[:-1], x[1:], y[:-1], y[1:], strict=True):
        if x1 <= limit:
            area += (x1 - x0) * (y0 + y1) / 2
        elif x0 < limit:
            at = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            area += (limit - x0) * (y0 + at) / 2
    return area / limit


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=40, max_size=40))
def test_aupro_of_small_images_with_ties(pixels: list[tuple[int, bool]]) -> None:
    """Equals MVTec's AUPRO, also for limits on a point of the curve, one-pixel regions and images of one class."""
    maps = np.array([score for score, _ in pixels], np.float32).reshape(2, 4, 5)
    masks = np.array([label for _, label in pixels]).reshape(2, 4, 5)
    masks[0, 0, :2] = True, False
    counts = count_pixels(*sources(maps, masks), 2, 1, regions=True)
    for limit in (0.3, 0.5, 2 / (~masks).sum()):
        assert counts.aupro(limit) == pytest.approx(mvtec_aupro(maps, masks, limit), abs=1e-12)


# --- images and bootstrap ---


def test_image_metrics_agree_with_sklearn() -> None:
    scores, labels = draw("heavy ties", 300, 0.3)
    result = image_metrics(labels.astype(int), scores)
    f1 = [2 * (labels & (scores >= t)).sum() / ((scores >= t).sum() + labels.sum()) for t in np.unique(scores)]
    assert result == {
        "auc": roc_auc_score(labels, scores),
        "ap": average_precision_score(labels, scores),
        "f1_max": pytest.approx(max(f1), abs=1e-12),
        "f1_max_threshold_on_test": np.unique(scores)[int(np.argmax(f1))],
    }


def test_auc_interval_has_width_at_0_and_1() -> None:
    labels = np.arange(24) % 2
    low, high = auroc_interval(labels, labels.astype(float))
    assert 0.7 < low < 0.9
    assert high == 1.0
    assert auroc_interval(labels, 1.0 - labels) == pytest.approx([0.0, 1 - low], abs=1e-6)
    for scores in (np.zeros(24), np.arange(24.0)):  # DeLong's variance: zero, not zero
        low, high = auroc_interval(labels, scores)
        assert 0.2 < low < 0.5 < high < 0.8
    low, high = auroc_interval(np.array([0, 0, 0, 0, 0, 0, 1]), np.array([0.0, 1, 2, 3, 4, 5, 3.5]))  # one abnormal
    assert 0 <= low < 0.2 < 4 / 6 < 0.9 < high <= 1


@pytest.mark.parametrize(
    ("normal", "abnormal", "spread", "auc"),
    [(5, 5, 1.0, 0.9), (16, 4, 2.0, 0.7), (20, 20, 0.5, 0.99), (80, 20, 2.0, 0.9), (50, 50, 1.0, 0.99)],
)
def test_auc_interval_covers_the_true_auc(normal: int, abnormal: int, spread: float, auc: float) -> None:
    """95% intervals cover the true AUC in at least 92% of 200 draws; abnormal scores are `spread` times as wide."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [normal, abnormal])
    shift = NormalDist().inv_cdf(auc) * np.hypot(1, spread)
    scores = np.where(
        labels, shift + spread * rng.standard_normal((200, len(labels))), rng.standard_normal((200, len(labels)))
    )
    ends = np.array([auroc_interval(labels, row) for row in scores])
    assert ((ends[:, 0] <= auc) & (auc <= ends[:, 1])).mean() >= 0.92


def test_auc_over_patients() -> None:
    def evaluation(patients: list[str | None], labels: list[int], scores: list[float]) -> SimpleNamespace:
        samples = [SimpleNamespace(patient=patient) for patient in patients]
        return SimpleNamespace(samples=samples, labels=np.array(labels), image_scores=np.array(scores))

    found = patient_metrics(evaluation(["a", "b", "a", "c"], [0, 0, 1, 0], [0.1, 0.5, 0.4, 0.2]))
    assert (found["auc_patients"], found["n_normal_patients"], found["n_abnormal_patients"]) == (0.5, 2, 1)
    assert found["auc_patients_ci95"][0] < 0.5 < found["auc_patients_ci95"][1]
    for unknown in (["a", "b", None, "b"], ["a", "b", "c", "d"], ["a", "a", "a", "a"]):
        assert patient_metrics(evaluation(unknown, [0, 0, 1, 0], [0.1, 0.5, 0.4, 0.2])) == {}


def image_set(shape: str, images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps with a random offset per image, so that pixels of an image are not independent; and masks."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((images, 40, 40), dtype=bool)
    masks[::2, 5:15, 5:20] = True
    noise = rng.standard_normal(masks.shape) + 0.7 * rng.standard_normal((images, 1, 1)) + masks
    return np.clip(SHAPES[shape](noise.ravel()), 0, LAYERS).astype(np.float32).reshape(masks.shape), masks


@pytest.mark.parametrize("shape", ["wide", "saturated", "heavy ties"])
def test_pixel_bootstrap_agrees_with_a_loop_over_sklearn(shape: str) -> None:
    maps, masks = image_set(shape, 12, 1)
    rng, values = np.random.default_rng(0), []  # the same draws
    while len(values) < 40:
        drawn = rng.integers(0, 12, 12)
        if masks[drawn].any():
            values.append(roc_auc_score(masks[drawn].ravel(), maps[drawn].ravel()))
    counts = count_pixels(*sources(maps, masks), 12, 5)
    assert len(counts.coarse_grid()) <= metrics.COARSE
    found, _ = per_image_metrics(*sources(maps, masks), 12, 5, counts, draws=40)
    np.testing.assert_allclose(found, values, atol=5e-4)
    np.testing.assert_array_equal(found, per_image_metrics(*sources(maps, masks), 12, 7, counts, draws=40)[0])


# --- evaluations ---


def test_measure() -> None:
    evaluation, masks = noisy_evaluation()
    everything, labels = slice(0, 10), evaluation.labels
    maps, truth = evaluation.maps(everything).numpy().ravel(), masks.get(everything).numpy().ravel()
    auroc, ap, f1 = exact(maps, truth)
    result = measure(evaluation, masks)
    assert result.values == {
        **image_metrics(labels, evaluation.image_scores),
        "pauc": pytest.approx(auroc, abs=1e-12), "pixel_ap": pytest.approx(ap, abs=1e-12),
        "pixel_f1_max": pytest.approx(f1, abs=1e-12),
        "pixel_f1_max_threshold_on_test": result.values["pixel_f1_max_threshold_on_test"],
    }  # fmt: skip
    assert result.curves == {}
    assert (result.auc, result.pauc) == (result.values["auc"], result.values["pauc"])
    assert result.selection_score == result.auc + result.pauc
    assert result.line() == f"AUC {result.auc:.6f}  pAUC {result.pauc:.6f}"
    maps, truth = (pixels.reshape(10, 20, 20) for pixels in (maps, truth))
    assert measure(evaluation, masks, full=True).values["aupro"] == pytest.approx(mvtec_aupro(maps, truth), abs=1e-9)


def test_full_measure() -> None:
    evaluation, masks = noisy_evaluation()
    result = measure(evaluation, masks, full=True, pixel_threshold=1.5)
    assert list(result.values) == list(METRICS)
    assert all(isinstance(value, float) or list(map(type, value)) == [float] * 2 for value in result.values.values())
    for name in ("auc", "pauc"):
        low, high = result.values[f"{name}_ci95"]
        assert low <= result.values[name] <= high
    assert set(result.curves) == {"roc", "pr", "image_roc", "image_pr"}
    assert all(curve.shape[0] == 2 and curve.shape[1] <= metrics.CURVE_POINTS for curve in result.curves.values())
    assert result.curves["image_pr"][0, 0] > 0  # without scikit-learn's end point at recall 0
    assert "threshold" not in result.table().replace("calibrated pixel threshold", "")  # none chosen on the test set
    assert "dice" not in measure(evaluation, masks, full=True).values
    json.dumps(result.values)


@pytest.mark.parametrize("full", [False, True])
def test_maps_of_detection_heads_are_not_measured(full: bool) -> None:
    evaluation, masks = noisy_evaluation(head="det")
    for result in (measure(evaluation, masks, full, pixel_threshold=1.0), measure(evaluation, None, full)):
        assert not {name for name in result.values if "p" in name.split("_")[0] and name not in ("ap",)}
        assert result.pauc is None
        assert result.selection_score == result.auc
        assert result.line() == f"AUC {result.auc:.6f}"
        assert set(result.curves) == ({"image_roc", "image_pr"} if full else set())


def test_metrics_without_the_patients_of_shots() -> None:
    evaluation, masks = noisy_evaluation()
    result = measure_without(evaluation, masks, {"p0", "p2", "p9"})
    keep = [2, 3, 6, 7, 8, 9]  # images with an unknown patient are kept
    rest = measure(evaluation.select(keep), masks.select(keep))
    assert result == {
        "auc_without_shot_patients": rest.auc,
        "pauc_without_shot_patients": rest.pauc,
        "n_normal_without_shot_patients": 3,
        "n_abnormal_without_shot_patients": 3,
    }
    assert measure_without(evaluation, None, set())["pauc_without_shot_patients"] is None
    table = Metrics({"auc": 0.5, "pauc": 0.5} | measure_without(evaluation, masks, {"p1"})).table()
    assert "  pixel AUROC without the shots' patients: " in table
    assert "  abnormal images without the shots' patients: 4" in table and "_" not in table
    assert "pixel" not in Metrics({"auc": 0.5} | measure_without(evaluation, None, set())).table()
    assert measure_without(evaluation, None, set())["auc_without_shot_patients"] == measure(evaluation).auc
    assert measure_without(noisy_evaluation(head="det")[0], masks, set())["pauc_without_shot_patients"] is None
    for i, sample in enumerate(evaluation.samples):
        sample.patient = "shot" if i % 2 else "kept"
    assert measure_without(evaluation, masks, {"shot"})["auc_without_shot_patients"] is None  # no abnormal image stays


@pytest.mark.parametrize("shape", ["wide", "saturated"])
def test_thinned_grid_is_exact_within_1e_6(shape: str) -> None:
    scores, labels = draw(shape, 1_800_000, 0.4)
    assert labels.sum() > 1.2 * metrics.GRID
    counts = count(scores, labels)
    assert len(counts.grid) <= metrics.GRID
    found = counts.auroc(), counts.average_precision(), counts.f1_max()[0]
    assert found == pytest.approx(exact(scores, labels), abs=1e-6)
    assert (counts.grid[0], counts.grid[-1]) == (scores[labels].min(), scores[labels].max())


def test_torch_counts_the_same_as_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch code for GPUs, run on the CPU, counts the same as the NumPy code."""
    maps, masks = image_set("saturated", 10, 0)
    arguments = *sources(maps, masks), 10, 3
    first = count_pixels(*arguments, regions=True)
    expected = per_image_metrics(*arguments, first, 2.0, draws=50)
    monkeypatch.setattr(metrics, "_use_numpy", lambda scores: False)
    second = count_pixels(*arguments, regions=True)
    assert np.array_equal(first.grid, second.grid)
    assert np.array_equal(first.normal, second.normal)
    assert np.array_equal(first.abnormal, second.abnormal)
    assert second.aupro() == pytest.approx(first.aupro(), abs=1e-12)
    draws, dice = per_image_metrics(*arguments, second, 2.0, draws=50)
    np.testing.assert_allclose(draws, expected[0], atol=1e-12)
    assert dice == pytest.approx(expected[1], abs=1e-12)


def test_memory_does_not_grow_with_normal_pixels() -> None:
    scores, _ = draw("wide", 8 * 10_000, 0)
    maps, lesion = torch.from_numpy(scores).view(8, 100, 100), torch.zeros(8, 100, 100, dtype=torch.bool)
    lesion[0, 10:60, 10:40] = True

    def peak(batches: int) -> int:
        tracemalloc.start()
        count_pixels(lambda part: maps, lambda part: lesion if part.start == 0 else lesion & False, 8 * batches, 8)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(2)  # one-time allocations
    assert peak(60) < 1.1 * peak(4)


def test_auc_interval_is_that_of_delong_for_many_images() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(4000) % 2
    scores = (rng.standard_normal(4000) * (1 + labels) + labels).round(1)
    below, above = placements(labels, scores)
    pairs = (scores[labels == 1][:, None] > scores[labels == 0]) + 0.5 * (
        scores[labels == 1][:, None] == scores[labels == 0]
    )
    np.testing.assert_allclose(below, pairs.mean(1))
    np.testing.assert_allclose(above, pairs.mean(0))
    auc, error = pairs.mean(), np.sqrt(pairs.mean(1).var() / 2000 + pairs.mean(0).var() / 2000)
    assert auc == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert auroc_interval(labels, scores) == pytest.approx([auc - 1.96 * error, auc + 1.96 * error], abs=1e-3)
