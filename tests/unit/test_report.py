"""Figures of an evaluation and of a run, their threshold and history, and the sheet of images."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import Sample
from engine.evaluate import Evaluation
from engine.report import (
    OUTLINE,
    Sheet,
    digits,
    draw_figures,
    find_history,
    outline,
    read_history,
    save_figures,
    threshold_of,
    together,
)
from utils import InputError

LABELS, SCORES = np.array([0, 0, 0, 1, 1]), np.array([0.1, 0.2, 0.7, 0.6, 0.9])
HISTORY = [
    {"epoch": 1, "det": 5.0, "seg": 4.0, "total": 9.0, "similarity": 0.9, "auc": 0.5, "pauc": None, "best": True},
    {"epoch": 2, "det": 4.0, "seg": 3.0, "total": 7.0, "similarity": 0.1, "auc": None, "pauc": None, "best": False},
    {"epoch": 3, "det": 3.0, "seg": 2.0, "total": 5.0, "similarity": -1, "auc": 0.8, "pauc": None, "best": True},
]
ABOUT = {"metrics": {"epoch": 3, "auc": 0.8}, "select": "last"}


def evaluation(pixels: bool = False) -> Evaluation:
    more = {"ap": 0.8, "f1_max": 0.8, "threshold": 0.6, **({"pixel_ap": 0.5} if pixels else {})}
    curves = {name: np.array([[0.0, 0.5, 1.0], [0.0, 0.9, 1.0]]) for name in ("roc", "pr")} if pixels else {}
    return Evaluation(5 / 6, 0.9 if pixels else None, list("abcde"), LABELS, SCORES, more, curves)


def words(svg: str) -> set[str]:
    return {element.text for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}


def test_figures_of_an_evaluation():
    drawings = draw_figures(evaluation(), {})
    assert list(drawings) == ["histogram", "roc", "pr"]
    assert "image (0.833)" in words(drawings["roc"].svg())
    assert "threshold 0.6000" in words(drawings["histogram"].svg())
    with_pixels = draw_figures(evaluation(pixels=True), {})
    assert {"pixel (0.900)", "image (0.833)"} <= words(with_pixels["roc"].svg())
    assert {"pixel (AP 0.500)", "image (AP 0.800)"} <= words(with_pixels["pr"].svg())


def test_figures_of_a_run_leave_out_what_was_not_measured():
    drawings = draw_figures(evaluation(), ABOUT, HISTORY)
    assert list(drawings)[3:] == ["auc", "losses", "similarity"]
    assert {"image", "epoch 3"} <= words(drawings["auc"].svg())
    assert "pixel" not in words(drawings["auc"].svg())
    assert {"total", "detection", "segmentation"} <= words(drawings["losses"].svg())
    image_only = [{**row, "seg": 0.0, "total": row["det"]} for row in HISTORY]
    losses = words(draw_figures(evaluation(), ABOUT, image_only)["losses"].svg())
    assert "detection" in losses
    assert not {"segmentation", "total"} & losses  # one is 0, the other lies under the detection loss


@pytest.mark.parametrize("history", [HISTORY[:1], [{"epoch": 1}, {"epoch": 2}], [{"epoch": 1, "auc": float("nan")}]])
def test_no_figure_of_a_single_point(history):
    assert list(draw_figures(evaluation(), ABOUT, history)) == ["histogram", "roc", "pr"]


def test_no_auroc_above_one_on_the_axis_of_a_level_curve():
    shown = words(draw_figures(evaluation(), ABOUT, [{**row, "auc": 1.0} for row in HISTORY])["auc"].svg())
    assert "0.6" in shown
    assert not shown & {"1.1", "1.2", "1.4"}


def test_the_threshold_is_the_checkpoints_where_it_has_one():
    stored = {"value": 0.4, "rule": "the largest F1", "from": "images of valid/"}
    assert threshold_of(evaluation(), {"threshold": stored}) == (
        0.4, "the checkpoint's, set for the largest F1 on images of valid/",
    )  # fmt: skip
    for about in ({}, {"threshold": None}):
        value, origin = threshold_of(evaluation(), about)
        assert value == 0.6
        assert "chosen on this test set" in origin


def test_digits_tell_narrow_scores_apart():
    assert digits(np.array([0.1, 2.0])) == 3
    assert digits(np.array([2.00001, 2.00003])) == 8
    assert digits(np.array([2.0, 2.0])) == 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [("not json\n", "line 1"), ('{"epoch": 1}\n{"auc": 1}\n', "line 2"), ("[1]\n", "line 1"), (None, "cannot be read")],
)
def test_a_history_that_is_none(tmp_path, text, reason):
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=rf"--history .*metrics\.jsonl.*{reason}"):
        read_history(path)


def test_find_history_takes_only_the_run_of_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    about = {**ABOUT, "run": str(tmp_path)}
    assert find_history(about) == []  # the folder has gone
    path.write_text("".join(json.dumps(row) + "\n" for row in HISTORY))
    assert find_history(about) == HISTORY == read_history(path)
    assert find_history(ABOUT) == []
    assert find_history({**about, "metrics": {"epoch": 3, "auc": 0.81}}) == []  # another run of that name
    path.write_text('{"epoch": 1')
    assert find_history(about) == []


def test_outline_is_the_edge_inside_the_mask():
    mask = np.zeros((7, 7), bool)
    mask[1:6, 1:6] = True
    edge = outline(mask)
    assert edge.sum() == 16
    assert not edge[2:5, 2:5].any()
    assert outline(mask, 2).sum() == 24
    assert not outline(np.zeros((7, 7), bool)).any()


@pytest.fixture
def samples(tmp_path) -> list[Sample]:
    Image.new("RGB", (16, 16), (90, 90, 90)).save(tmp_path / "image.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    path = tmp_path / "image.png"
    return [Sample(path, label, tmp_path / "mask.png" if label else None, f"<{label}&>.png") for label in (0, 1)]


def test_sheet_shows_image_outline_and_heat_map_on_one_scale(samples, tmp_path):
    sheet = Sheet(samples, 16)
    maps = torch.zeros(2, 16, 16)
    maps[1] = 3.0
    together(None, sheet)(samples, torch.tensor([0.5, 1.5]), maps)
    shown = words(sheet.draw().svg())
    assert {"image", "mask", "heat map", "<1&>", "normal, 0.5000", "abnormal, 1.5000", "0.0000", "3.0000"} <= shown
    pictures = sheet._pictures(samples[1], maps[1].numpy(), 0.0, 3.0)
    assert tuple(pictures["mask"][4, 4]) == OUTLINE
    assert pictures["heat map"].mean() > sheet._pictures(samples[0], maps[0].numpy(), 0.0, 3.0)["heat map"].mean()

    save_figures(tmp_path / "out", "Brain", sheet, evaluation(), ABOUT, HISTORY)
    names = ("Brain", *(f"Brain-{name}" for name in ("histogram", "roc", "pr", "auc", "losses", "similarity")))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{n}.{s}" for n in names for s in ("png", "svg")}


def test_sheet_without_maps_or_masks(samples):
    bare = [Sample(sample.path, sample.label, None, sample.name) for sample in samples]
    for maps, rows in ((None, {"image"}), (torch.rand(2, 16, 16), {"image", "heat map"})):
        sheet = Sheet(bare, 16)
        sheet(bare, torch.tensor([0.5, 1.5]), maps)
        assert words(sheet.draw().svg()) & {"image", "mask", "heat map"} == rows
