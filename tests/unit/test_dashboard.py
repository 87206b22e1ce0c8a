"""The dashboard without W&B: when pictures are due, what is kept for them, and that no failure stops training."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import Sample
from engine import dashboard
from engine.dashboard import WORST, Dashboard, Gallery, scalars
from engine.evaluate import Evaluation
from engine.tracking import Tracker
from loss import LossParts

ROOT = Path(__file__).parents[2]
SETTINGS = SimpleNamespace(img_size=8, obj="Brain", to_dict=dict)
MORE = {"ap": 0.5, "f1_max": 0.6, "threshold": 0.5, "pixel_ap": 0.3, "pixel_f1_max": 0.4, "pixel_threshold": 0.5}
LOSS = LossParts(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0))


@dataclass
class Report:
    """What train.py gives."""

    epoch: int
    test: Evaluation | None
    valid: Evaluation | None = None
    similarity: float = 0.5
    seconds: float = 2.0
    loss: LossParts = LOSS


class Run:
    """Stands in for a wandb run; `log` fails for keys that begin with `broken`."""

    id = "run"

    def __init__(self, broken: str = "nothing") -> None:
        self.broken, self.rows, self.summary, self.defined = broken, [], {}, {}

    def log(self, values: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        """Keep the row, or fail."""
        if any(key.startswith(self.broken) for key in values):
            raise OSError("disk full\nsecond line")
        self.rows.append((step, values, commit))

    def define_metric(self, name: str, **how: object) -> None:
        """Keep the definition."""
        self.defined[name] = how


def tracker(run: Run) -> Tracker:
    made = Tracker()
    made._run = run
    return made


@pytest.fixture
def samples(tmp_path) -> list[Sample]:
    made = []
    for i in range(30):
        path = tmp_path / f"{i}.png"
        Image.new("L", (8, 8), i).save(path)
        made.append(Sample(path, i % 2, path if i % 2 else None, f"test/{i}.png"))
    return made


def evaluation(samples: list[Sample], scores: np.ndarray, **more: float) -> Evaluation:
    labels = np.array([sample.label for sample in samples])
    return Evaluation(0.7, 0.8, [sample.name for sample in samples], labels, scores, {**MORE, **more})


def collect(gallery: Any, samples: list[Sample], scores: np.ndarray) -> None:
    maps = torch.from_numpy(scores).float()[:, None, None].expand(-1, 8, 8)
    for i in range(0, len(samples), 7):
        gallery(samples[i : i + 7], torch.from_numpy(scores[i : i + 7]), maps[i : i + 7])


def test_gallery_keeps_the_worst_of_each_class_and_no_more(samples):
    scores = np.random.default_rng(0).random(len(samples))
    gallery = Gallery(samples, 8)
    collect(gallery, samples, scores)
    labels = np.array([sample.label for sample in samples])
    for label, sign in ((0, -1), (1, 1)):
        kept = [row for _, _, row in sorted(gallery.worst[label], reverse=True)]
        expected = np.flatnonzero(labels == label)[np.argsort(sign * scores[labels == label])][:WORST]
        assert [sample.name for sample, _, _ in kept] == [samples[i].name for i in expected]
        for _, score, heat in kept:
            assert heat.shape == (8, 8)
            assert heat.base is None, "a view would keep the whole batch's maps"
            assert heat[0, 0] == pytest.approx(score)
    shown = gallery.pictures(evaluation(samples, scores))
    assert [len(shown[f"pictures/{name}"]) for name in ("test", "false_positives", "false_negatives")] == [6, 4, 4]
    assert "abnormal, score 0." in shown["pictures/false_negatives"][0]._caption
    assert float(shown["pictures/false_negatives"][0]._caption.split("score ")[1][:6]) < 0.5


def test_no_errors_no_pictures_of_errors(samples):
    scores = np.array([0.4 + 0.2 * sample.label for sample in samples])
    gallery = Gallery(samples, 8)
    collect(gallery, samples, scores)
    assert set(gallery.pictures(evaluation(samples, scores))) == {"pictures/test"}


@pytest.mark.parametrize(
    ("every", "evaluated", "shown"),
    [(3, range(8), [2, 5, 7]), (10, range(8), [7]), (0, range(8), []), (3, [1, 3, 5, 7], [3, 7]), (1, [0, 1], [0, 1])],
)
def test_when_pictures_are_due(samples, every, evaluated, shown):
    board = Dashboard(tracker(Run()), samples, SETTINGS, 32, every)
    last = max(evaluated)
    assert [epoch for epoch in evaluated if board.collector(epoch, epoch == last)] == shown


def test_off_computes_and_imports_nothing():
    code = (
        "import sys; from engine.dashboard import Dashboard; from engine.tracking import Tracker;"
        "board = Dashboard(Tracker(), [], None, 1); assert board.collector(9, True) is None;"
        "from tests.unit.test_dashboard import Report; report = Report(9, None);"
        "board.epoch(report, True); board.finish(None, 0, 'nowhere.pth'); print('wandb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize("broken", ["pictures/", "curves/", "scores/"])
def test_a_failure_in_a_picture_costs_one_line_and_the_numbers_go_on(samples, capsys, broken):
    run = Run(broken)
    board = Dashboard(tracker(run), samples, SETTINGS, 32, every=1)
    scores = np.linspace(0, 1, len(samples))
    for epoch in range(3):
        collector = board.collector(epoch, epoch == 2)
        if collector:
            collect(collector, samples, scores)
        board.epoch(Report(epoch, evaluation(samples, scores)), True)
    board.finish(evaluation(samples, scores), 2)
    assert [step for step, values, _ in run.rows if "test/AUC" in values] == [0, 1, 2]
    (line,) = capsys.readouterr().err.splitlines()
    assert "no pictures from here on (OSError: disk full second line)" in line


def test_a_failure_while_collecting_does_not_reach_the_evaluation(samples, capsys):
    board = Dashboard(tracker(Run()), samples, SETTINGS, 32, every=1)
    collector = board.collector(0, False)
    collector(samples[:2], torch.zeros(2), torch.zeros(0, 8, 8))  # maps are missing
    collector(samples[:2], torch.zeros(2), torch.zeros(0, 8, 8))
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert board.collector(1, False) is None


def test_summary_is_the_best_epochs_and_leaves_nothing_of_an_earlier_one(samples):
    run = Run()
    board = Dashboard(tracker(run), samples, SETTINGS, 32, every=0)
    scores = np.linspace(0, 1, len(samples))
    board.epoch(Report(0, evaluation(samples, scores, aupro=0.9)), True)
    board.epoch(Report(1, evaluation(samples, scores)), True)
    board.epoch(Report(2, evaluation(samples, scores, aupro=0.8)), False)
    assert (run.summary["epoch"], run.summary["test/AUPRO"], run.summary["AUCbest"]) == (1, None, 0.7)
    assert run.defined["test/AUPRO"] == {"step_metric": "epoch", "summary": "none"}
    assert [commit for _, _, commit in run.rows] == [True, True, True]


def test_best_survives_a_resumption(samples):
    board = Dashboard(tracker(Run()), samples, SETTINGS, 32)
    scores = np.linspace(0, 1, len(samples))
    board.epoch(Report(0, evaluation(samples, scores)), True)
    run = Run()
    Dashboard(tracker(run), samples, SETTINGS, 32, best=board.best).epoch(Report(1, evaluation(samples, scores)), False)
    assert run.rows[0][1]["AUC+pAUCbest"] == pytest.approx(1.5)


def test_the_full_evaluation_completes_the_summary(samples):
    run, scores = Run(), np.linspace(0, 1, len(samples))
    board = Dashboard(tracker(run), samples, SETTINGS, 32, every=0)
    board.epoch(Report(0, evaluation(samples, scores)), True)
    assert "test/AUPRO" not in run.summary
    board.finish(evaluation(samples, scores, aupro=0.25), 0)
    assert run.summary["test/AUPRO"] == 0.25
    assert not [name for name in run.summary if "threshold" in name]


def test_table_is_bounded_and_says_so(samples, monkeypatch, capsys):
    monkeypatch.setattr(dashboard, "ROWS", 5)
    scores = np.linspace(0, 1, len(samples))
    run = Run()
    board = Dashboard(tracker(run), samples, SETTINGS, 32)
    board.finish(evaluation(samples, scores), 0)
    table = run.rows[0][1]["scores/table"]
    assert [row[1] for row in table.data] == ["test/1.png", "test/28.png", "test/3.png", "test/26.png", "test/5.png"]
    assert table.data[0][0].image.size == (96, 96)
    assert "holds the 5 most wrong of 30 images" in capsys.readouterr().err


def test_epochs_without_evaluation_have_no_test_keys():
    logged = scalars(Report(0, None), 32, {}, False)
    assert not [name for name in logged if "AUC" in name]
    assert logged["time/images_per_second"] == 16
