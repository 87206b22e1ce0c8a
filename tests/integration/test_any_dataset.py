"""Custom data sets through the real commands: layouts, scans, prompts, unequal numbers of shots."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dataset import phantom
from tests.helpers.commands import Commands, fine
from tests.helpers.data import SMALL
from tests.helpers.net import make_data

ONE_EPOCH = [*SMALL, "--epoch", 1]


@pytest.fixture(scope="module")
def bottle(tmp_path_factory) -> Path:
    """A data set in MVTec's layout: train/good, test/good, test/<defect>, ground_truth/<defect>/*_mask.png."""
    folder = tmp_path_factory.mktemp("mvtec")
    phantom.write(folder, ["Brain"], valid=16, test=4, seed=0, size=48)
    brain, root = folder / "Brain_AD", folder / "bottle"
    shutil.copytree(brain / "valid/good/img", root / "train/good")
    shutil.copytree(brain / "test/good/img", root / "test/good")
    for index, image in enumerate(sorted((brain / "valid/Ungood/img").iterdir())):
        defect = ("crack", "hole")[index % 2]
        for folder in ("test", "ground_truth"):
            (root / folder / defect).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, root / "test" / defect / f"{index:03d}.png")
        mask = brain / "valid/Ungood/anomaly_mask" / image.name
        shutil.copy(mask, root / "ground_truth" / defect / f"{index:03d}_mask.png")
    return root


@pytest.fixture
def call(command: Commands) -> Callable[..., str]:
    """Runs a command that must succeed; returns its stdout and stderr."""

    def start(script: str, *arguments: object) -> str:
        done = command(script, *arguments)
        return fine(done) + done.stderr

    return start


def last_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if re.match(r"\w+ p?AUC : ", line)]


def test_mvtec_layout(bottle, call, tmp_path):
    paths = ["--obj", "bottle", "--data_root", bottle, "--save_path", tmp_path]
    trained = call("train.py", *ONE_EPOCH, *paths, "--shot", 2, "--out_json", tmp_path / "a.json")
    tested = call("test.py", *paths)
    assert last_lines(trained) == last_lines(tested)
    assert len(last_lines(trained)) == 2  # AUC and pAUC

    # Abnormal images that serve as shots are reported, and excluded from the test.
    note = next(line for line in trained.splitlines() if "both splits" in line)
    assert note in tested
    valid, test = map(int, re.search(r"(\d+) of their 16 .* in valid, for shots, and (\d+) in test", note).groups())
    stored = torch.load(tmp_path / "bottle.pth", weights_only=True)
    measured = [row["file"] for row in json.loads((tmp_path / "a.json").read_text())["per_image"]]
    assert sum("good" not in name for name in measured) == test == 16 - valid
    assert len(stored["about"]["shots"]["abnormal"]) == 2
    assert not set(stored["about"]["shots"]["abnormal"]) & set(measured)
    assert all(name.startswith(("test/crack/", "test/hole/")) for name in stored["about"]["shots"]["abnormal"])


@pytest.mark.parametrize("kind", ["dicom", "nifti"])
def test_dicom_series_and_nifti_volumes_train_slice_by_slice(call, once, tmp_path, kind):
    root = once("scans", lambda folder: make_data(folder / "data")) / "data" / kind
    paths = ["--obj", "knee", "--data_root", root, "--save_path", tmp_path / "ckpt"]
    scans = ["--window", 400, 900, "--cache_dir", tmp_path / "cache", "--cache", "disk"]
    trained = call("train.py", *ONE_EPOCH, *paths, *scans, "--shot", 2)
    assert len(last_lines(trained)) == 1
    tested = call("test.py", *paths)  # reads the scans as the training did
    assert last_lines(trained) == last_lines(tested) and "training read" not in tested
    assert "warning: training read" in call("test.py", *paths, "--window", "full")


def test_normal_shots_only_and_custom_prompts(bottle, call, tmp_path):
    """Without abnormal shots the loss falls, and test.py takes the prompts from the checkpoint."""
    states = {"normal": ["healthy {}", "{} of a volunteer"], "abnormal": ["{} with oedema", "ill {}", "{} with drusen"]}
    (tmp_path / "prompts.json").write_text(json.dumps(states))
    paths = ["--obj", "bottle", "--data_root", bottle, "--save_path", tmp_path]
    few = ["--shot", 4, "--shot_abnormal", 0, "--epoch", 3, "--loss_type", "softmax"]
    own = ["--prompts", tmp_path / "prompts.json", "--prompt_name", "glass"]
    output = call("train.py", *SMALL, *paths, *few, *own)
    totals = [float(value) for value in re.findall(r"total (\S+)", output)]
    assert totals[0] > totals[1] > totals[2] > 0
    (tmp_path / "prompts.json").unlink()
    assert last_lines(output) == last_lines(call("test.py", *paths))
    stored = torch.load(tmp_path / "bottle.pth", weights_only=True)
    assert (stored["settings"]["states"], stored["settings"]["prompt_name"]) == (states, "glass")
    assert stored["about"]["shots"]["abnormal"] == []
