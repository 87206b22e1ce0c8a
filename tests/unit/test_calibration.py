"""engine/calibration.py: image and pixel thresholds by each rule, against brute force."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import calibration
from engine.calibration import (
    HEAT_QUANTILES,
    MAX_IMAGES,
    calibrate,
    calibration_samples,
    describe_threshold,
    heat_range,
    select_threshold,
    threshold_metrics,
)
from engine.evaluation import Masks
from engine.metrics import count_pixels
from tests.helpers.evaluations import noisy_evaluation


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1)), max_size=15),
    st.sampled_from(["f1", "fpr=0", "fpr=0.1", "fpr=0.5", "tpr=0", "tpr=0.3", "tpr=0.9", "tpr=1"]),
)
def test_threshold_rules_against_brute_force(images: list[tuple[int, int]], text: str) -> None:
    scores = np.array([score for score, _ in images] + [2.0, 3.0])
    labels = np.array([label for _, label in images] + [1, 0])
    name, _, rate = text.partition("=")
    everything = [threshold_metrics(labels, scores, t) for t in [*np.unique(scores), 9.0]]
    result = threshold_metrics(labels, scores, select_threshold(labels, scores, text))
    if name == "fpr":
        assert result["fpr"] <= float(rate)
        assert result["tpr"] == max(row["tpr"] for row in everything if row["fpr"] <= float(rate))
    elif name == "tpr":
        assert result["tpr"] >= float(rate)
        assert result["fpr"] == min(row["fpr"] for row in everything[:-1] if row["tpr"] >= float(rate))
    else:
        assert result["f1"] == max(row["f1"] for row in everything)


def test_threshold_from_many_images() -> None:
    scores = np.random.default_rng(0).permutation(400_000) / 400_000  # O(n^2) would take hours
    labels = (scores >= 0.75).astype(int)
    assert select_threshold(labels, scores, "f1") == pytest.approx(0.75, abs=2e-6)
    assert select_threshold(labels, scores, "tpr=0.5") == pytest.approx(0.875, abs=2e-6)
    assert select_threshold(labels, scores, "fpr=0.5") == pytest.approx(0.375, abs=2e-6)


# --- samples ---


def sample(name: str, label: int, mask: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(name=name, label=label, mask=mask, patient=None)


def test_calibration_samples_are_evenly_spread_over_both_classes() -> None:
    normal = [sample(f"n{i}", 0) for i in range(1000)]
    abnormal = [sample(f"a{i}", 1) for i in range(7)]
    kept = calibration_samples([*normal, *abnormal])
    assert [s.label for s in kept] == [0] * MAX_IMAGES + [1] * 7
    assert kept[0] is normal[0]
    assert kept[MAX_IMAGES - 1] is normal[-1]
    assert len({s.name for s in kept}) == MAX_IMAGES + 7
    assert calibration_samples(normal) == []
    assert calibration_samples(abnormal) == []


# --- evaluations ---


@pytest.mark.parametrize("text", ["f1", "fpr=0.1", "tpr=0.8"])
def test_calibrate(text: str) -> None:
    evaluation, masks = noisy_evaluation()
    name, _, rate = text.partition("=")
    result = calibrate(evaluation, masks, text, "images that are made up")
    maps, truth = evaluation.maps(slice(None)), masks.get(slice(None))
    value = select_threshold(evaluation.labels, evaluation.image_scores, text)
    words = calibration.RULES[name][0].format(rate)
    assert result == {
        "value": value, "rule": words, "from": "images that are made up",
        "figures": threshold_metrics(evaluation.labels, evaluation.image_scores, value),
        "heat_range": pytest.approx(np.quantile(maps.numpy().astype(float), [0.02, 0.9995]), abs=1e-6),
        "pixel_value": count_pixels(lambda p: maps[p], lambda p: truth[p], 10, 6).threshold(text),
    }  # fmt: skip
    assert {type(result[name]) for name in ("value", "pixel_value")} == {float}
    called = maps.numpy() >= result["pixel_value"]  # float32 against a Python float, as predict.py compares
    fpr, tpr = called[~truth.numpy()].mean(), called[truth.numpy()].mean()
    if name == "fpr":
        assert 0.08 < fpr <= 0.1
    elif name == "tpr":
        assert 0.8 <= tpr < 0.82
    line = describe_threshold(result)
    assert line.startswith(f"threshold:  {value:.4f} for {words} on 5 normal and 5 abnormal images that are made up; ")


def test_calibrate_without_masks() -> None:
    evaluation, masks = noisy_evaluation(head="det")
    for given_masks in (None, masks):  # maps of detection heads give no pixel threshold
        result = calibrate(evaluation, given_masks, "f1", "here")
        assert set(result) == {"value", "rule", "from", "figures", "heat_range"}
    evaluation, masks = noisy_evaluation()
    empty = Masks(torch.full((10,), -1), masks.bits, 20)
    assert "pixel_value" not in calibrate(evaluation, empty, "f1", "here")


def test_calibrate_with_one_class() -> None:
    normal, masks = noisy_evaluation(labels=(0, 0, 0))
    assert calibrate(normal, masks, "f1", "here") is None
    assert calibrate(normal, masks, "tpr=0.9", "here") is None
    result = calibrate(normal, masks, "fpr=0.4", "here")
    assert result["figures"]["fpr"] == pytest.approx(1 / 3)
    assert "pixel_value" not in result
    assert "sensitivity" not in describe_threshold(result)
    abnormal, masks = noisy_evaluation(labels=(1, 1, 1))
    assert calibrate(abnormal, masks, "fpr=0.1", "here") is None
    assert calibrate(abnormal, masks, "tpr=0.6", "here")["figures"]["tpr"] == pytest.approx(2 / 3)
    assert describe_threshold(None).startswith("threshold:  none, ")


def test_heat_range_from_a_subset_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    maps = torch.from_numpy(rng.random((50, 24, 24)).astype(np.float32) ** 2)
    maps[:, :, 5] += 3.0  # a column that steps of 24 or 12 pixels would hit always or never
    fake = SimpleNamespace(img_size=24, samples=[None] * 50, maps=lambda part: maps[part])
    assert heat_range(fake) == pytest.approx(np.quantile(maps.numpy(), HEAT_QUANTILES), abs=1e-6)
    monkeypatch.setattr(calibration, "HEAT_PIXELS", 1200)
    monkeypatch.setattr(calibration, "HEAT_QUANTILES", (0.02, 0.9))
    expected = np.quantile(maps.flatten()[::25].double().numpy(), (0.02, 0.9))  # 24 and 25 have no common divisor
    assert expected == pytest.approx(np.quantile(maps.numpy(), (0.02, 0.9)), abs=0.1)
    for at_a_time in (50, 7, 1):  # the batch size does not matter
        monkeypatch.setattr(calibration, "maps_at_a_time", lambda _, most=at_a_time: most)
        assert heat_range(fake) == expected.tolist()
