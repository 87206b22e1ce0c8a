"""Figures of an evaluation and of a run: what is in them, which threshold is named, files that a style changes."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from engine.metrics import Metrics, measure
from engine.report.figures import Plot, digits, examples, plots, save_figures, threshold_of
from tests.helpers.evaluations import METADATA, make_evaluation, make_samples, make_world
from utils import InputError

LABELS, SCORES = [0, 0, 0, 1, 1], [0.1, 0.2, 0.7, 0.6, 0.9]
HISTORY = [
    {"epoch": 1, "det": 5.0, "seg": 4.0, "total": 9.0, "similarity": 0.9, "auc": 0.5, "pauc": None},
    {"epoch": 2, "det": 4.0, "seg": 3.0, "total": 7.0, "similarity": 0.1, "auc": None, "pauc": None},
    {"epoch": 3, "det": 3.0, "seg": 2.0, "total": 5.0, "similarity": -1, "auc": 0.8, "pauc": None},
]


@pytest.fixture
def world(tmp_path):
    """An evaluation with masks, and its full metrics."""
    evaluation, masks = make_world(tmp_path / "images", LABELS, SCORES)
    return evaluation, masks, measure(evaluation, masks, full=True)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A working folder without a style file."""
    monkeypatch.chdir(tmp_path)


def words(svg: str) -> set[str]:
    return {element.text for element in ET.fromstring(svg).iter() if element.tag.endswith("text")}


def figures(world, metadata, history=()) -> dict[str, set[str]]:
    evaluation, _, metrics = world
    return {name: words(plot.svg(name)) for name, plot in plots(evaluation, metrics, metadata, history).items()}


def test_figures_of_an_evaluation(world):
    shown = figures(world, {})
    _, _, metrics = world
    assert list(shown) == ["histogram", "roc", "pr"]
    assert {f"image ({metrics.auc:.3f})", f"pixel ({metrics.pauc:.3f})"} <= shown["roc"]
    assert {f"image (AP {metrics.values['ap']:.3f})", f"pixel (AP {metrics.values['pixel_ap']:.3f})"} <= shown["pr"]
    assert {"normal", "abnormal", "image score", "% of the class"} <= shown["histogram"]
    assert [word for word in shown["histogram"] if word.startswith("F1-max threshold on the test set 0.600")]
    assert "threshold 0.4000" in figures(world, METADATA)["histogram"]


def test_without_masks_there_are_no_curves_of_pixels(tmp_path):
    evaluation, _ = make_world(tmp_path / "images", LABELS, SCORES, masks=False)
    shown = figures((evaluation, None, measure(evaluation, full=True)), {})
    assert not [word for name in ("roc", "pr") for word in shown[name] if "pixel" in word]


def test_figures_of_a_run_leave_out_what_was_not_measured(world):
    shown = figures(world, METADATA, HISTORY)
    assert list(shown)[3:] == ["auc", "losses", "similarity"]
    assert "epoch 3" in shown["auc"]
    assert "pixel" not in shown["auc"]
    assert {"total", "detection", "segmentation"} <= shown["losses"]
    losses = figures(world, METADATA, [{**row, "seg": 0.0, "total": row["det"]} for row in HISTORY])["losses"]
    assert "detection" in shown["losses"]
    assert not {"segmentation", "total"} & losses  # one is 0, the other lies under the detection loss


@pytest.mark.parametrize("history", [HISTORY[:1], [{"epoch": 1}, {"epoch": 2}], [{"epoch": 1, "auc": float("nan")}]])
def test_no_figure_of_a_single_point(world, history):
    assert list(figures(world, METADATA, history)) == ["histogram", "roc", "pr"]


def test_no_auroc_above_one_on_the_axis_of_a_level_curve(world):
    shown = figures(world, METADATA, [{**row, "auc": 1.0} for row in HISTORY])["auc"]
    ticks = [float(word) for word in shown if re.fullmatch(r"[\d.]+", word)]
    assert ticks
    assert not [tick for tick in ticks if 1 < tick < 2]


def test_the_threshold_is_the_checkpoints_where_it_has_one(world):
    _, _, metrics = world
    assert threshold_of(metrics, METADATA) == (0.4, "the checkpoint's, set for the largest F1 on images of valid/")
    for metadata in ({}, {"threshold": None}):
        value, origin = threshold_of(metrics, metadata)
        assert value == pytest.approx(0.6)
        assert origin == "the F1-max threshold on this test set: optimistic"


def test_digits_tell_narrow_scores_apart():
    assert digits(np.array([0.1, 2.0])) == 3
    assert digits(np.array([2.00001, 2.00003])) == 8
    assert digits(np.array([2.0, 2.0])) == 3


def test_examples_are_spread_over_both_classes(tmp_path):
    samples = make_samples(tmp_path / "images", [0] * 10 + [1] * 20)
    evaluation = make_evaluation(samples, [0.5] * 30)
    assert examples(evaluation, 9) == [10, 14, 18, 21, 25, 29, 0, 4, 9]
    assert examples(evaluation.select([10, 11]), 9) == [0, 1]


def test_the_same_numbers_give_the_same_files(world, tmp_path):
    evaluation, masks, metrics = world
    for folder in ("one", "two"):
        save_figures(folder, "Brain", evaluation, masks, metrics, METADATA, HISTORY)
    names = ("Brain", *(f"Brain-{name}" for name in ("histogram", "roc", "pr", "auc", "losses", "similarity")))
    files = {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert {path.name for path in Path("one").iterdir()} == files
    for name in files:
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes(), name
    with Image.open("one/Brain-roc.png") as picture:
        assert picture.size == (1080, 810)


def test_the_sheet_names_images_and_scores_as_text(tmp_path):
    samples = make_samples(tmp_path / "images", [0, 1])
    named = [type(sample)(sample.path, sample.label, sample.mask, name)  # decomposed letters, markup, mathematics
             for sample, name in zip(samples, ("a/u\u0308ber <b>.png", "$x^2$ \\frac &.png"), strict=True)]  # fmt: skip
    evaluation, masks = make_world(tmp_path / "images", [0, 1], [0.5, 1.5])
    evaluation.samples = named
    metrics = measure(evaluation, masks, full=True)
    save_figures(tmp_path, "Brain", evaluation, masks, metrics, {})
    shown = " ".join(filter(None, words((tmp_path / "Brain.svg").read_text(encoding="utf-8"))))
    assert "über <b>" in shown
    assert "$x^2$ \\frac &" in shown
    for word in ("image", "mask", "heat map", "normal, 0.5000", "abnormal, 1.5000", "one scale for all"):
        assert word in shown
    assert "not measured" not in shown


def test_the_sheet_without_masks_and_without_pictures(tmp_path):
    evaluation, _ = make_world(tmp_path / "images", [0, 1], [0.5, 1.5], masks=False)
    for sample in evaluation.samples:
        sample.path.unlink()
    save_figures(tmp_path, "Chest", evaluation, None, measure(evaluation, full=True), {})
    shown = " ".join(filter(None, words((tmp_path / "Chest.svg").read_text(encoding="utf-8"))))
    assert "no picture" in shown
    assert "weak localisation from the detection heads, not measured" in shown
    assert "mask" not in shown


def test_the_page_colours_the_figures_and_their_names_do_not_collide(world):
    evaluation, _, metrics = world
    svgs = {name: plot.svg(name) for name, plot in plots(evaluation, metrics, METADATA, HISTORY).items()}
    ids = [name for svg in svgs.values() for name in re.findall(r' id="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))
    for svg in svgs.values():
        assert {"var(--ink)", "var(--muted)", "var(--grid)"} <= set(re.findall(r"var\(--\w+\)", svg))
        assert "<style" not in svg
        assert "#ffffff" not in svg  # no background of their own
        assert set(re.findall(r"url\(#([^)]+)\)", svg)) <= set(ids)
        assert ET.fromstring(svg).get("aria-label")


def test_a_matplotlibrc_counts_where_it_departs_from_the_default(world, monkeypatch):
    import matplotlib as mpl  # noqa: PLC0415

    evaluation, _, metrics = world
    monkeypatch.setitem(mpl.rcParams, "grid.color", "#654321")
    shown = plots(evaluation, metrics, {})["roc"].svg("roc")
    assert "#654321" in shown
    assert "var(--muted)" in shown


def test_a_folder_that_cannot_be_written(world, tmp_path):
    (tmp_path / "file").write_text("")
    evaluation, masks, metrics = world
    with pytest.raises(InputError, match=r"^--figures"):
        save_figures(tmp_path / "file" / "folder", "Brain", evaluation, masks, metrics, {})


def test_a_title_is_text():
    svg = Plot('a "<b>" & c', lambda axes: None).svg("x")
    assert ET.fromstring(svg).get("aria-label") == 'a "<b>" & c'


def test_metrics_without_curves_give_empty_axes(world):
    evaluation, _, metrics = world
    assert plots(evaluation, Metrics(metrics.values), {})["roc"].svg("roc")
