"""What a W&B run shows, without W&B: scalars, pictures, table and summary, and that no failure stops training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.metrics import Metrics, measure
from engine.report import tracking
from engine.report.tracking import (
    WORST,
    Tracker,
    log_epoch,
    log_pictures,
    log_result,
    pictures,
    scalars,
)
from tests.helpers.evaluations import LAYERS, make_world

ROOT = Path(__file__).parents[2]
PUBLISHED = {"epoch", "sim_texts", "loss", "AUC", "pAUC", "AUC+pAUC"}


class Run:
    """Stands in for a wandb run; `log` fails for keys that begin with `broken`."""

    id = "run"

    def __init__(self, broken: str = "nothing") -> None:
        self.broken, self.rows, self.artifacts = broken, [], []
        self.summary: dict[str, Any] = {}
        self.config = {"obj": "Brain", "img_size": 28, "lr": 0.1}

    def log(self, values: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        """Keep the row, or fail."""
        if any(key.startswith(self.broken) for key in values):
            raise OSError("disk full\nsecond line")
        self.rows.append((step, values, commit))

    def log_artifact(self, artifact: Any) -> None:
        """Keep it, or fail."""
        if self.broken == "artifact":
            raise OSError("disk full")
        self.artifacts.append(artifact)


def make_tracker(run: Run) -> Tracker:
    tracker = Tracker()
    tracker._run = run
    return tracker


@pytest.fixture
def world(tmp_path):
    """30 images, half of them abnormal, whose scores overlap."""
    labels = [i % 2 for i in range(30)]
    scores = np.random.default_rng(0).random(30) * 0.9 + 0.05 + 0.3 * np.array(labels)
    return make_world(tmp_path, labels, scores.tolist())


def record_of(epoch: int, test: Metrics | None = None, best: bool = False) -> dict[str, Any]:
    """A line of metrics.jsonl; epochs are counted from 1 there."""
    aucs = {"auc": test.auc, "pauc": test.pauc} if test else {"auc": None, "pauc": None}
    return {"epoch": epoch + 1, "det": 1.0, "seg": 2.0, "total": 3.0, "similarity": 0.5, "best": best, **aucs}


def epoch_of(tracker: Tracker, epoch: int, test: Metrics | None, best: bool = False, last: bool = False) -> None:
    log_epoch(tracker, record_of(epoch, test, best), test, None, seconds=2.0, images=32, last=last)


def test_scalars_have_the_published_names_and_ours(world):
    metrics = measure(*world, aupro=True)
    logged = scalars(record_of(4), 2.0, 32, metrics, metrics)
    assert set(logged) >= PUBLISHED
    assert (logged["epoch"], logged["loss"], logged["train/det"], logged["train/seg"]) == (4, 3.0, 1.0, 2.0)
    assert logged["AUC+pAUC"] == pytest.approx(metrics.auc + metrics.pauc)
    assert logged["test/AUC"] == logged["valid/AUC"] == metrics.auc
    names = {"AUC", "pAUC", "AP", "F1-max", "pixel_AP", "pixel_F1-max", "AUPRO"}
    assert {name.removeprefix("test/") for name in logged if name.startswith("test/")} == names
    assert logged["time/images_per_second"] == 16


def test_image_only_sets_publish_their_auc_as_pauc(tmp_path):
    evaluation, _ = make_world(tmp_path, [0, 1, 0, 1], [0.1, 0.9, 0.5, 0.4], masks=False)
    logged = scalars(record_of(0), 2.0, 4, measure(evaluation), None)
    assert logged["pAUC"] == logged["AUC"] == logged["AUC+pAUC"] == 0.75
    assert "test/pAUC" not in logged


def test_epochs_without_evaluation_have_no_test_keys():
    logged = scalars(record_of(0), 2.0, 32, None, None)
    assert not [name for name in logged if "AUC" in name]


def test_pictures_are_the_examples_and_the_worst_of_each_class(world):
    evaluation, masks = world
    metrics = measure(evaluation, masks)
    at, scores = 0.6, evaluation.image_scores
    metrics.values["f1_max_threshold_on_test"] = at
    shown = pictures(evaluation, masks, metrics)
    assert len(shown["pictures/test"]) == 6
    for label, sign, key in ((0, -1, "pictures/false_positives"), (1, 1, "pictures/false_negatives")):
        wrong = [i for i in range(30) if evaluation.labels[i] == label and (scores[i] >= at) != label]
        expected = sorted(wrong, key=lambda i: sign * scores[i])[:WORST]
        assert expected
        captions = [picture._caption for picture in shown[key]]
        assert len(captions) == len(expected)
        for caption, i in zip(captions, expected, strict=True):
            assert caption.startswith(f"{i:05}.png: {'abnormal' if label else 'normal'}, score {scores[i]:.4f} ")
            assert "F1-max threshold on the test set" in caption
            assert "not measured" not in caption
    picture = shown["pictures/test"][0]
    assert picture.image.size == (2 * 28, 14)  # the image, and its heat map beside it, in the aspect of the file
    assert set(picture._masks) == {"truth", "prediction"}


def test_no_errors_no_pictures_of_errors(tmp_path):
    evaluation, masks = make_world(tmp_path, [0, 1, 0, 1], [0.1, 0.9, 0.2, 0.8])
    assert set(pictures(evaluation, masks, measure(evaluation, masks))) == {"pictures/test"}


def test_a_map_of_an_image_only_set_is_called_weak(tmp_path):
    evaluation, _ = make_world(tmp_path, [0, 1], [0.1, 0.9], masks=False)
    picture = pictures(evaluation, None, measure(evaluation))["pictures/test"][0]
    assert picture._caption.endswith("heat map: weak localisation, not measured")
    assert picture.image.size == (2 * 28, 14)
    assert not picture._masks


@pytest.mark.parametrize(
    ("every", "evaluated", "shown"),
    [(3, range(8), [2, 5, 7]), (10, range(8), [7]), (0, range(8), []), (3, [1, 3, 5, 7], [3, 7]), (1, [0, 1], [0, 1])],
)
def test_when_pictures_are_due(every, evaluated, shown):
    tracker = make_tracker(Run())
    assert [epoch for epoch in evaluated if tracker.pictures_due(epoch, every, epoch == max(evaluated))] == shown
    assert not Tracker().pictures_due(9, 1, True)


def test_off_computes_nothing_and_imports_no_wandb():
    code = (
        "import sys; from pathlib import Path; from engine.report.tracking import *;"
        "off = Tracker(); log_pictures(off, 0, None, None, None); log_result(off, None, None, 0, Path('nowhere.pth'));"
        "log_epoch(off, {}, None, None, 1.0, 1, True); print('wandb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize("broken", ["pictures/", "curves/", "scores/"])
def test_a_failure_in_a_picture_costs_one_line_and_the_numbers_go_on(world, capsys, broken):
    run = Run(broken)
    tracker, metrics = make_tracker(run), measure(*world, full=True)
    for epoch in range(3):
        log_pictures(tracker, epoch, *world, metrics)
        epoch_of(tracker, epoch, metrics, best=True, last=epoch == 2)
    log_result(tracker, world[0], metrics, 2, None)
    assert [step for step, values, _ in run.rows if "test/AUC" in values] == [0, 1, 2]
    (line,) = capsys.readouterr().err.splitlines()
    assert "no pictures from here on (OSError: disk full second line)" in line


def test_summary_is_the_best_epochs_and_leaves_nothing_of_an_earlier_one(world):
    run = Run()
    tracker, metrics = make_tracker(run), measure(*world)
    epoch_of(tracker, 0, metrics, best=True)
    log_result(tracker, world[0], measure(*world, full=True), 0, None)  # a run that ended, and goes on
    epoch_of(tracker, 1, metrics, best=True)
    epoch_of(tracker, 2, Metrics({**metrics.values, "auc": 0.1, "aupro": 0.8}), last=True)
    assert (run.summary["epoch"], run.summary["test/AUPRO"]) == (1, None)
    assert run.summary["AUCbest"] == metrics.auc
    assert run.rows[-1][1]["AUCbest"] == metrics.auc
    assert [commit for _, row, commit in run.rows if "loss" in row] == [
        True,
        True,
        False,
    ]  # the last waits


def test_best_survives_a_resumption(world):
    metrics, run = measure(*world), Run()
    tracker = make_tracker(run)
    for record in (record_of(0, metrics, best=True), record_of(1, Metrics({"auc": 0.2})), record_of(2)):
        tracker.remember_best(record)  # of the history
    epoch_of(tracker, 3, Metrics({**metrics.values, "auc": 0.1}))
    assert run.rows[0][1]["AUC+pAUCbest"] == metrics.selection_score
    assert run.rows[0][1]["AUCbest"] == metrics.auc


def test_with_select_last_the_last_epoch_is_the_summary(world):
    metrics, run = measure(*world), Run()
    tracker = make_tracker(run)
    for epoch in range(2):
        epoch_of(tracker, epoch, metrics, last=epoch == 1)  # none is the best
    assert "AUCbest" not in run.rows[0][1]
    assert run.rows[1][1]["AUC+pAUCbest"] == metrics.selection_score
    assert (run.summary["epoch"], run.summary["AUCbest"]) == (1, metrics.auc)


def test_the_full_evaluation_completes_the_summary(world):
    run = Run()
    tracker, metrics = make_tracker(run), measure(*world)
    tracker._pictures = False
    epoch_of(tracker, 0, metrics, best=True)
    assert run.summary["test/AUPRO"] is None
    log_result(tracker, world[0], measure(*world, full=True), 0, None)
    assert 0 <= run.summary["test/AUPRO"] <= 1
    assert not [name for name in run.summary if "threshold" in name]
    assert not [values for _, values, _ in run.rows if "scores/table" in values]  # without pictures


def test_table_is_bounded_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "ROWS", 5)
    scores = np.linspace(0.02, LAYERS - 0.02, 30)
    evaluation, masks = make_world(tmp_path, [i % 2 for i in range(30)], scores.tolist())
    run = Run()
    tracker, metrics = make_tracker(run), measure(evaluation, masks, full=True)
    metrics.values["f1_max_threshold_on_test"] = float(scores[15])
    tracker.step = 7
    log_result(tracker, evaluation, metrics, 0, None)
    step, values, _ = run.rows[0]
    assert step == 7
    table = values["scores/table"]
    assert [row[1] for row in table.data] == [f"test/{i:05}.png" for i in (1, 28, 3, 26, 5)]
    assert table.data[0][0].image.size == (96, 48)
    assert table.data[0][2:5] == ["abnormal", pytest.approx(scores[1]), "normal"]
    assert "holds the 5 most wrong of 30 images" in capsys.readouterr().err


def test_the_checkpoint_is_an_artifact_that_says_what_shaped_it(world, tmp_path, capsys):
    (tmp_path / "best.pth").write_bytes(b"checkpoint")
    run, metrics = Run(), measure(*world, full=True)
    log_result(make_tracker(run), world[0], metrics, 4, tmp_path / "best.pth")
    (artifact,) = run.artifacts
    assert (artifact.name, artifact.type) == ("Brain-run", "model")
    assert artifact.metadata == {"obj": "Brain", "img_size": 28, "epoch": 4, "auc": metrics.auc, "pauc": metrics.pauc}
    assert capsys.readouterr().err == ""
    bare = make_tracker(run)
    bare._pictures = False
    log_result(bare, world[0], metrics, 4, tmp_path / "best.pth")
    assert "--anonymous" in capsys.readouterr().err  # the checkpoint names its shots
    log_result(make_tracker(Run("artifact")), world[0], metrics, 4, tmp_path / "best.pth")
    assert "the checkpoint was not uploaded (OSError: disk full)" in capsys.readouterr().err
