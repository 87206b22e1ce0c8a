"""What W&B has of real offline runs, as its own command prints it; and the sweep's command lines, started."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from dataset import phantom
from tests.helpers.data import SMALL
from tests.helpers.wandb_runs import config as config_of
from tests.helpers.wandb_runs import history as history_of
from tests.helpers.wandb_runs import of_type, records
from tests.helpers.wandb_runs import summary as summary_of

ROOT = Path(__file__).parents[2]
Rows = list[dict[str, Any]]
PUBLISHED = {"epoch", "sim_texts", "loss", "AUC", "pAUC", "AUC+pAUC", "AUCbest", "pAUCbest", "AUC+pAUCbest"}
EPOCHS = 5


def start(folder: Path, *command: object) -> subprocess.CompletedProcess:
    """Run a command offline, with its run files below `folder`/wandb and a home of its own."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    private = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(word) for word in command], cwd=ROOT, env={**keep, **private}, capture_output=True, text=True, check=True
    )


def train(folder: Path, data: Path, *flags: object) -> tuple[Path, Rows, str]:
    """A real training run: the folder of its W&B files, its records, and what it printed."""
    paths = ["--data_path", data, "--save_path", folder / "ckpt", "--run_dir", folder / "runs"]
    done = start(folder, sys.executable, "train.py", *SMALL, *paths, "--shot", 1, *flags)
    assert "W&B: warning" not in done.stderr
    (path,) = folder.glob("wandb/offline-run-*")
    return path, records(folder), done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    phantom.write(path, ["Brain", "Chest"], valid=4, test=4, seed=0, size=64)
    return path


@pytest.fixture(scope="module")
def brain(data, tmp_path_factory) -> tuple[Path, Rows, str]:
    folder = tmp_path_factory.mktemp("brain")
    flags = ["--obj", "Brain", "--epoch", EPOCHS, "--select", "valid", "--log_images_every", 2, "--log_model"]
    return train(folder, data, *flags, "--seed", 6, "--learning_rate", 0.01)


def test_panels(brain):
    _, rows, _ = brain
    history = history_of(rows)
    assert [row["epoch"] for row in history] == [row["_step"] for row in history] == list(range(EPOCHS))
    metrics = {"AUC", "pAUC", "AP", "F1-max", "pixel_AP", "pixel_F1-max"}
    expected = PUBLISHED | {f"{part}/{name}" for part in ("test", "valid") for name in metrics}
    expected |= {"train/det", "train/seg", "train/total", "train/sim_texts"}
    expected |= {"time/epoch", "time/images_per_second", "sys/memory_GiB"}
    for row in history:
        assert expected <= set(row)
        assert 0.05 < row["sys/memory_GiB"] < 50
        # 16 views of 1 + 1 shots, 8 test images, 6 left of valid/
        assert row["time/images_per_second"] * row["time/epoch"] == pytest.approx(16 * 2 + 8 + 6)
    assert [row["epoch"] for row in history if "pictures/test._type" in row] == [1, 3, 4]


def test_epoch_is_the_axis_and_the_summary_is_the_selected_epochs(brain):
    _, rows, output = brain
    defined = {metric.get("name"): metric for metric in of_type(rows, "metric")}
    for name in ("test/AUC", "train/det", "loss", "sys/memory_GiB"):
        assert defined[name]["step_metric"] == "epoch"
        assert defined[name]["summary"] == {"none": True}
    selected = int(re.search(r"^selected: .*\[epoch (\d+) of", output, re.MULTILINE)[1]) - 1
    history, summary = history_of(rows), summary_of(rows)
    assert summary["epoch"] == selected
    row = history[selected]
    for name in row:
        if name in PUBLISHED or name.split("/")[0] in ("train", "test", "valid", "time", "sys"):
            assert summary[name] == pytest.approx(row[name]), name
    assert 0 <= summary["test/AUPRO"] <= 1  # of the full evaluation


def test_pictures_curves_histograms_and_table(brain):
    folder, rows, _ = brain
    last = history_of(rows)[-1]
    named = last["pictures/test.filenames"]
    assert len(named) == len(last["pictures/test.captions"]) == 6
    for name in named:
        with Image.open(folder / "files" / name) as picture:
            assert picture.size == (84, 42)  # the image, and its heat map beside it
    for pair in last["pictures/test.all_masks"]:
        assert set(pair) == {"truth", "prediction"}
    for name in ("ROC", "PR"):
        table = json.loads((folder / "files" / last[f"curves/{name}_table.path"]).read_text())
        x, y = (np.array([row[i] for row in table["data"]]) for i in (1, 2))
        assert (np.diff(x) >= 0).all()
        assert 0 <= y.min() <= y.max() <= 1
        if name == "ROC":
            assert np.trapezoid(y, x) == pytest.approx(last["test/AUC"])
    assert sum(last["scores/normal.values"]) == sum(last["scores/abnormal.values"]) == 4
    assert last["scores/normal.bins"] == last["scores/abnormal.bins"]
    table = json.loads((folder / "files" / last["scores/table.path"]).read_text())
    assert table["columns"] == ["image", "file", "label", "score", "decision", "margin"]
    assert len({row[1] for row in table["data"]}) == len(table["data"]) == 8
    margins = [row[5] for row in table["data"]]
    assert margins == sorted(margins)
    assert all((row[2] == row[4]) == (row[5] >= 0) for row in table["data"] if row[5])


def test_everything_lies_below_the_run_folder(brain):
    folder, rows, _ = brain
    (model,) = (artifact for artifact in of_type(rows, "artifact") if artifact["type"] == "model")
    (entry,) = model["manifest"]["contents"]
    staged = Path(entry["local_path"])
    assert staged.is_relative_to(folder.parents[1])
    assert staged.read_bytes() == (folder.parents[1] / "ckpt" / "Brain.pth").read_bytes()
    assert not (folder.parents[1] / "home/.local").exists()
    (started,) = of_type(rows, "run")
    assert started["run_group"] == "Brain-1shot"
    assert set(started["tags"]) == {"Brain", "1shot", "ViT-tiny-14-56", "released"}
    config = config_of(rows)
    assert config["shots"]["abnormal"] == ["valid_Ungood_00000.png"]
    assert len(config["weights_sha256"]) == 64
    assert str(folder.parents[1]) not in json.dumps(config)  # no local path


def test_without_pictures_no_picture_and_no_name_of_a_file_is_in_the_run(data, tmp_path):
    folder, rows, _ = train(tmp_path, data, "--obj", "Brain", "--epoch", 2, "--log_images_every", 0)
    history = history_of(rows)
    assert len(history) == 2
    assert not [name for row in history for name in row if name.startswith(("pictures/", "curves/", "scores/"))]
    text = json.dumps(rows)
    names = [path.name for path in (data / "Brain_AD").rglob("*.png")]
    assert len(names) > 20
    assert not [name for name in names if name in text]
    assert not [path for path in folder.rglob("*") if path.suffix in (".png", ".jpg", ".webp")]
    for path in filter(Path.is_file, folder.rglob("*")):
        assert not [name for name in names if name.encode() in path.read_bytes()], path


def test_image_only_data(data, tmp_path):
    _, rows, _ = train(tmp_path, data, "--obj", "Chest", "--epoch", 2)
    history = history_of(rows)
    assert not [name for name in history[-1] if "pixel" in name or "AUPRO" in name or name == "test/pAUC"]
    assert history[-1]["pAUC"] == history[-1]["AUC"]
    assert all("weak localisation, not measured" in caption for caption in history[-1]["pictures/test.captions"])
    assert "pictures/test.filenames" not in history[0]
    assert not [artifact for artifact in of_type(rows, "artifact") if artifact["type"] == "model"]


def sweep_cells(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The grid, in W&B's form of an agent's command."""
    names, values = zip(*((name, spec["values"]) for name, spec in config["parameters"].items()), strict=True)
    return [
        {name: {"value": value} for name, value in zip(names, cell, strict=True)} for cell in itertools.product(*values)
    ]


def test_sweep(data, tmp_path):
    config = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    cells = sweep_cells(config)
    assert str(len(cells)) in (ROOT / "sweep.yaml").read_text()
    assert set(config["parameters"]) == {
        "text_mood", "contrast_mood", "loss_type", "dec_type", "visionA", "fidelity", "seed",
    }  # fmt: skip
    paths = ["--data_path", str(data), "--cache_dir", str(tmp_path / "cache"), "--run_dir", str(tmp_path / "runs")]
    dry = [*SMALL, *paths, "--epoch", "1", "--shot", "1"]
    for number, cell in enumerate((cells[0], cells[-1])):
        words: dict[str, list[str]] = {
            "${env}": ["/usr/bin/env"],
            "${interpreter}": [sys.executable],
            "${program}": [config["program"]],
            "${args}": create_sweep_command_args({"args": cell})["args"],
        }
        line = [word for part in create_sweep_command(list(config["command"])) for word in words.get(part, [part])]
        folder = tmp_path / str(number)
        start(folder, *line, *dry)
        rows = records(folder)
        settings = config_of(rows)
        assert {name: settings[name] for name in cell} == {name: value["value"] for name, value in cell.items()}
        assert summary_of(rows)[config["metric"]["name"]] > 0
        assert not (ROOT / "ckpt" / "Brain.pth").exists()
