"""The W&B dashboard of a real offline run, read back by wandb's own command; and the sweep's command lines, started."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from tests.helpers import wandb_runs
from tests.helpers.commands import ROOT, Commands
from tests.helpers.data import SMALL

PUBLISHED = {"epoch", "sim_texts", "loss", "AUC", "pAUC", "AUC+pAUC", "AUCbest", "pAUCbest", "AUC+pAUCbest"}
EPOCHS = 5


@dataclass(frozen=True)
class Tracked:
    """A training run with W&B offline."""

    folder: Path  # from which it was started
    records: list[dict[str, Any]]
    output: str

    @property
    def history(self) -> list[dict[str, Any]]:
        return wandb_runs.history(self.records)

    @property
    def files(self) -> Path:
        """W&B's files of the run."""
        (folder,) = self.folder.rglob("offline-run-*")
        return folder / "files"


def start(command: Commands, folder: Path, script: str, *flags: object) -> str:
    """A command in a folder and with a home of its own, W&B offline."""
    folder.mkdir(exist_ok=True)
    own = {name: "" for name in os.environ if name.startswith("WANDB")}
    env = {**own, "WANDB_MODE": "offline", "HOME": str(folder / "home")}
    done = command(script, *flags, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "warning" in line and "has not left its start" not in line]
    assert not warnings
    return done.stdout


def train(command: Commands, folder: Path, phantoms: Path, *flags: object) -> Tracked:
    output = start(command, folder, "train.py", *SMALL, "--data_path", phantoms, "--shot", 1, *flags)
    return Tracked(folder, wandb_runs.records(folder), output)


@pytest.fixture(scope="module")
def brain(command, phantoms, once) -> Tracked:
    # The second or the fourth epoch is selected: the fifth is measured, as the last one, but never chosen.
    flags = ["--obj", "Brain", "--epoch", EPOCHS, "--select", "valid", "--eval_every", 2]
    flags += ["--log_images_every", 2, "--log_model"]

    def make(folder: Path) -> None:
        (folder / "output").write_text(train(command, folder / "run", phantoms, *flags).output)

    folder = once("tracked", make)
    return Tracked(folder / "run", wandb_runs.records(folder), (folder / "output").read_text())


def test_panels(brain):
    history = brain.history
    assert [row["epoch"] for row in history] == [row["_step"] for row in history] == list(range(EPOCHS))
    metrics = {"AUC", "pAUC", "AP", "F1-max", "pixel_AP", "pixel_F1-max"}
    expected = PUBLISHED | {f"{part}/{name}" for part in ("test", "valid") for name in metrics}
    expected |= {"train/det", "train/seg", "train/total", "train/sim_texts"}
    expected |= {"time/epoch", "time/images_per_second"}
    lines = [json.loads(line) for line in next(brain.folder.rglob("metrics.jsonl")).read_text().splitlines()]
    for row in history[0::2][:2]:
        assert not [name for name in row if "test/" in name or "valid/" in name]
    for row, line in ((history[i], lines[i]) for i in (1, 3, 4)):
        assert expected <= set(row)
        # 16 views of 1 + 1 shots, 14 test images, 6 left of valid/
        assert row["time/images_per_second"] * row["time/epoch"] == pytest.approx(16 * 2 + 14 + 6)
        names = {"AUC": "auc", "pAUC": "pauc", "loss": "total", "valid/AUC": "valid_auc", "sim_texts": "similarity"}
        assert {name: row[name] for name in names} == {name: line[key] for name, key in names.items()}
    assert [row["epoch"] for row in history if "pictures/test._type" in row] == [1, 3, 4]


def test_epoch_is_the_axis_and_the_summary_is_the_selected_epochs(brain):
    defined = wandb_runs.of_type(brain.records, "metric")
    scalars = [metric for metric in defined if metric.get("glob_name", "").split("/")[0] in ("test", "train", "time")]
    assert len(scalars) == 3
    assert all((m["step_metric"], m["summary"]) == ("epoch", {"none": True}) for m in scalars)
    selected = int(re.search(r"^selected: .*\[epoch (\d+) of", brain.output, re.MULTILINE)[1]) - 1
    history, summary = brain.history, wandb_runs.summary(brain.records)
    assert selected in (1, 3)
    assert summary["epoch"] == selected
    row = history[selected]
    for name in row:
        if name in PUBLISHED or name.split("/")[0] in ("train", "test", "valid", "time"):
            assert summary[name] == pytest.approx(row[name]), name
    # Of the selected epoch alone there are those that are dear.
    assert 0 <= summary["test/AUPRO"] <= 1 and 0 <= summary["test/Dice"] <= 1
    assert not [row for row in history if "test/AUPRO" in row]


def test_pictures_curves_histograms_and_table(brain):
    last, files = brain.history[-1], brain.files
    names = last["pictures/test.filenames"]
    assert len(names) == len(last["pictures/test.captions"]) == 6
    for name in names:
        with Image.open(files / name) as picture:
            assert picture.size == (84, 42)  # the image, and its heat map beside it
    classes = set()
    for pair in last["pictures/test.all_masks"]:
        assert set(pair) == {"truth", "prediction"}
        for mask in pair.values():
            with Image.open(files / mask["path"]) as picture:
                assert picture.size == (84, 42)
                classes |= set(np.unique(picture).tolist())
    assert classes == {0, 1, 2}
    for name in ("ROC", "PR"):
        table = json.loads((files / last[f"curves/{name}_table.path"]).read_text())
        x, y = (np.array([row[i] for row in table["data"]]) for i in (1, 2))
        assert (np.diff(x) >= 0).all()
        assert 0 <= y.min() <= y.max() <= 1
        if name == "ROC":
            assert np.trapezoid(y, x) == pytest.approx(last["test/AUC"])
    assert sum(last["scores/normal.values"]) == sum(last["scores/abnormal.values"]) == 7
    assert last["scores/normal.bins"] == last["scores/abnormal.bins"]
    table = json.loads((files / last["scores/table.path"]).read_text())
    assert table["columns"] == ["image", "file", "label", "score", "decision", "margin"]
    assert len({row[1] for row in table["data"]}) == len(table["data"]) == 14
    margins = [row[5] for row in table["data"]]
    assert margins == sorted(margins)
    assert all((row[2] == row[4]) == (row[5] >= 0) for row in table["data"] if row[5])


def test_everything_lies_below_the_run_folder(brain):
    artifacts = {artifact["type"]: artifact for artifact in wandb_runs.of_type(brain.records, "artifact")}
    (entry,) = artifacts["model"]["manifest"]["contents"]
    (run,) = (brain.folder / "runs").iterdir()
    staged = Path(entry["local_path"])
    assert staged.is_relative_to(run)
    assert staged.read_bytes() == (brain.folder / "ckpt" / "Brain.pth").read_bytes()
    assert not (brain.folder / "home/.local").exists()
    (started,) = wandb_runs.of_type(brain.records, "run")
    assert started["run_group"] == "Brain-1shot"
    assert set(started["tags"]) == {"Brain", "1shot", "ViT-tiny-14-56", "released"}
    config = wandb_runs.config(brain.records)
    assert config["shots"]["abnormal"] == ["valid_Ungood_00000.png"]
    assert len(config["weights_sha256"]) == 64


def test_image_only_data(command, phantoms, tmp_path):
    run = train(command, tmp_path / "run", phantoms, "--obj", "Chest", "--epoch", 2)
    history = run.history
    assert not [name for name in history[-1] if "pixel" in name or "AUPRO" in name or name == "test/pAUC"]
    assert history[-1]["pAUC"] == history[-1]["AUC"]
    assert "pictures/test.filenames" in history[-1]
    assert "pictures/test.filenames" not in history[0]
    assert not [record for record in run.records if record.get("artifact", {}).get("type") == "model"]


def test_without_pictures_no_file_is_named(command, phantoms, tmp_path):
    run = train(command, tmp_path / "run", phantoms, "--obj", "Brain", "--epoch", 1, "--log_images_every", 0)
    assert run.history[-1]["AUC"] == run.history[-1]["test/AUC"]
    names = [path.stem for path in phantoms.glob("Brain_AD/*/*/img/*")]
    shown = json.dumps(run.records)
    assert names and not [name for name in names if name in shown]
    assert not list(run.files.rglob("*.png")) and not list(run.files.rglob("*.jpg"))


def sweep_cells(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The grid, in W&B's form of an agent's command."""
    names, values = zip(*((name, spec["values"]) for name, spec in config["parameters"].items()), strict=True)
    return [
        {name: {"value": value} for name, value in zip(names, cell, strict=True)} for cell in itertools.product(*values)
    ]


def test_sweep(command, phantoms, tmp_path):
    config = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    cells = sweep_cells(config)
    assert str(len(cells)) in (ROOT / "sweep.yaml").read_text()
    assert set(config["parameters"]) == {
        "text_mood", "contrast_mood", "loss_type", "dec_type", "visionA", "fidelity", "seed",
    }  # fmt: skip
    dry = [*SMALL, "--data_path", phantoms, "--epoch", 1, "--shot", 1]
    for number, cell in enumerate((cells[0], cells[-1])):
        words: dict[str, list[str]] = {
            "${env}": ["/usr/bin/env"],
            "${interpreter}": ["python"],
            "${program}": [config["program"]],
            "${args}": create_sweep_command_args({"args": cell})["args"],
        }
        line = [word for part in create_sweep_command(list(config["command"])) for word in words.get(part, [part])]
        assert line[:3] == ["/usr/bin/env", "python", "train.py"], shlex.join(line)
        start(command, tmp_path / str(number), *line[2:], *dry)
        records = wandb_runs.records(tmp_path / str(number))
        settings = wandb_runs.config(records)
        assert {name: settings[name] for name in cell} == {name: value["value"] for name, value in cell.items()}
        assert wandb_runs.summary(records)[config["metric"]["name"]] > 0
