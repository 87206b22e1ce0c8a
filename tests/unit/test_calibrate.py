"""Thresholds, outlines and gray windows."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
from sklearn.metrics import f1_score

from dataset.readers import apply_window, to_rgb
from engine.calibrate import Rule, choose, figures, rule
from engine.heat import contours, raw
from utils import InputError


def test_the_largest_f1_by_hand():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    scores = (labels + rng.normal(0, 1, 60)).round(1)  # with ties
    threshold = choose(labels, scores, Rule())
    best = max(f1_score(labels, scores >= value) for value in np.unique(scores))
    assert f1_score(labels, scores >= threshold) == pytest.approx(best)
    assert figures(labels, scores, threshold)["f1"] == pytest.approx(best)
    assert threshold not in scores


@pytest.mark.parametrize(("rate", "allowed"), [(0.0, 0), (0.05, 1), (0.1, 2), (0.99, 19)])
def test_a_false_positive_rate(rate, allowed):
    scores = np.arange(40.0)
    labels = np.tile([0, 1], 20)  # normal at 0, 2, ..., 38
    threshold = choose(labels, scores, Rule.parse(f"fpr={rate}"))
    assert (scores[labels == 0] >= threshold).sum() == allowed
    # No lower threshold keeps the rate.
    lower = scores[scores < threshold].max()
    assert (scores[labels == 0] >= lower).mean() > rate or lower not in scores[labels == 0]


def test_the_highest_score_is_normal():
    assert choose(np.array([1, 0]), np.array([1.0, 2.0]), Rule(0.0)) > 2.0


def test_normal_images_alone():
    found = figures(np.zeros(4), np.arange(4.0), 2.5)
    assert found == {"f1": None, "tpr": None, "fpr": 0.25, "n_normal": 4, "n_abnormal": 0}


@pytest.mark.parametrize("text", ["f2", "fpr", "fpr=1", "fpr=-0.1", "fpr=x", "fpr=nan", ""])
def test_rules_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="neither"):
        rule(text)


def test_outlines_of_a_block_with_a_hole_at_the_border():
    heat = np.zeros((10, 10), np.float32)
    heat[2:8, 4:] = 1.0  # touches the right border
    heat[4:6, 6:8] = 0.0
    outer, hole = contours(heat, 0.5, (20, 40))
    assert outer["area"] > 0 > hole["area"]
    assert outer["peak"] == 1.0
    # Half way between pixel centres: 6 by 6 pixels of 2 x 4, corners cut off by the interpolation.
    assert outer["area"] == pytest.approx(36 * 8, rel=0.03)
    points = np.array(outer["points"])
    assert points[:, 0].max() == 20.0
    assert points[:, 0].min() == pytest.approx(8.0)
    assert (points[:, 1].min(), points[:, 1].max()) == pytest.approx((8.0, 32.0))
    assert contours(heat, 2.0, (20, 40)) == []
    (whole,) = contours(np.ones((4, 4), np.float32), 0.5, (8, 8))
    assert whole["area"] == pytest.approx(64, rel=1e-3)


def test_raw_heat_maps():
    picture = raw(np.array([[0.0, 2.0], [4.0, 1.0]], np.float32), 4)
    assert np.asarray(picture).tolist() == [[0, 32768], [65535, 16384]]
    assert np.asarray(picture).dtype == np.uint16


def test_windows():
    values = np.array([-100.0, 0.0, 40.0, 80.0, 500.0])
    assert apply_window(values, 40, 80).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert apply_window(values, 40, 80, "SIGMOID")[2] == 0.5
    assert np.asarray(to_rgb(np.array([[0, 65535]], np.uint16)))[0, :, 0].tolist() == [0, 255]
    with pytest.raises(InputError, match="shape"):
        to_rgb(np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(InputError, match="expected"):
        to_rgb(np.full((2, 2), 3.0))
