"""Figures of an evaluation and of a run: their curves, marked threshold and files."""

import json
from pathlib import Path

import pytest
from PIL import Image

from engine.metrics import measure
from engine.report.figures import plots, read_history, save_figures, sheet, threshold_of
from tests.helpers.evaluations import METADATA, make_world
from utils import InputError

LABELS, SCORES = [0, 0, 0, 1, 1], [0.1, 0.2, 0.7, 0.6, 0.9]
HISTORY = [
    {"epoch": 1, "det": 5.0, "seg": 0.0, "total": 9.0, "similarity": 0.9, "auc": 0.5, "pauc": None},
    {"epoch": 2, "det": 4.0, "seg": 0.0, "total": 7.0, "similarity": 0.1, "auc": None, "pauc": None},
    {"epoch": 3, "det": 3.0, "seg": 0.0, "total": 5.0, "similarity": -1, "auc": 0.8, "pauc": None},
]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """An evaluation with masks and its full metrics; the working folder is empty, so it has no style file."""
    monkeypatch.chdir(tmp_path)
    evaluation, masks = make_world(tmp_path / "images", LABELS, SCORES)
    return evaluation, masks, measure(evaluation, masks, full=True)


def test_threshold_comes_from_the_checkpoint_if_it_has_one(world):
    evaluation, _, metrics = world
    assert threshold_of(metrics, METADATA)[0] == 0.4
    histogram = plots(evaluation, metrics, METADATA)["histogram"].figure().axes[0]
    assert len(histogram.get_legend_handles_labels()[1]) == 3  # two classes and the threshold
    assert 0.4 in [line.get_xdata()[0] for line in histogram.lines]
    assert threshold_of(metrics, {"threshold": None})[0] == pytest.approx(0.6)
    one_class = {**METADATA["threshold"], "figures": {"tpr": None, "fpr": 0.1, "n_normal": 9, "n_abnormal": 0}}
    assert threshold_of(metrics, {"threshold": one_class})[1].endswith("10% of the normal ones were false alarms.")


def test_figures_are_deterministic(world):
    evaluation, masks, metrics = world
    for folder in ("one", "two"):
        figures = plots(evaluation, metrics, METADATA, HISTORY)
        save_figures(folder, "Brain", sheet(evaluation, masks), figures)
    names = ("Brain", *(f"Brain-{name}" for name in ("histogram", "roc", "pr", "auc", "losses", "similarity")))
    assert {path.stem for path in Path("one").iterdir()} == set(names)
    for name in names:
        assert Path("one", f"{name}.png").read_bytes() == Path("two", f"{name}.png").read_bytes(), name
    with Image.open("one/Brain-roc.png") as picture:
        assert picture.size == (1080, 810)
    Path("file").touch()
    with pytest.raises(InputError, match=r"^--figures"):
        save_figures("file/folder", "Brain", sheet(evaluation, masks), {})


def test_history_is_read_from_the_checkpoint_folder(tmp_path):
    assert read_history(tmp_path / "best.pth") == []
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HISTORY))
    assert read_history(tmp_path / "best.pth") == HISTORY
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "de')  # cut off, as by a killed run
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        read_history(tmp_path / "best.pth")
