"""A data set of one's own through the real commands: layouts, JSON files, prompts, unequal shots."""

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from dataset import phantom
from dataset.layout import FOLDER
from tests.helpers.commands import ROOT, Commands
from tests.helpers.data import SMALL
from tests.helpers.net import make_data
from tests.helpers.results import fine

ONE_EPOCH = [*SMALL, "--epoch", 1]


@pytest.fixture(scope="module")
def brain(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("phantom")
    phantom.write(path, ["Brain"], valid=16, test=4, seed=0, size=48)
    return path / "Brain_AD"


@pytest.fixture(scope="module")
def bottle(brain, tmp_path_factory) -> Path:
    """MVTec's layout: train/good, test/good, test/<defect>, ground_truth/<defect>/*_mask.png."""
    root = tmp_path_factory.mktemp("mvtec") / "bottle"
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
    """What a command prints, stdout and stderr."""

    def start(script: str, *arguments: object) -> str:
        done = command(script, *arguments)
        return fine(done) + done.stderr

    return start


def last_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if re.match(r"\w+ p?AUC : ", line)]


def test_mvtecs_layout(bottle, call, tmp_path):
    paths = ["--obj", "bottle", "--data_root", bottle, "--save_path", tmp_path]
    trained = call("train.py", *ONE_EPOCH, *paths, "--shot", 2, "--out_json", tmp_path / "a.json")
    tested = call("test.py", *paths)
    assert last_lines(trained) == last_lines(tested)
    assert len(last_lines(trained)) == 2  # AUC and pAUC

    # What serves as abnormal support is named, and never measured.
    note = next(line for line in trained.splitlines() if "both splits" in line)
    assert note in tested
    valid, test = map(int, re.search(r"their 16 images (\d+) are valid, for shots, and (\d+) test", note).groups())
    stored = torch.load(tmp_path / "bottle.pth", weights_only=True)
    measured = [row["file"] for row in json.loads((tmp_path / "a.json").read_text())["per_image"]]
    assert sum("good" not in name for name in measured) == test == 16 - valid
    assert len(stored["about"]["shots"]["abnormal"]) == 2
    assert not set(stored["about"]["shots"]["abnormal"]) & set(measured)
    assert all(name.startswith(("test/crack/", "test/hole/")) for name in stored["about"]["shots"]["abnormal"])


def test_busi_as_it_is_distributed(call, tmp_path):
    """A folder for each class, and masks beside the images: not one of them is an image, and every one is found."""
    root = tmp_path / "BUSI"
    for split, kind in itertools.product(("valid", "test"), ("good", "Ungood")):
        images = sorted((ROOT / "data/sample/BreastBUSI_AD" / split / kind / "img").iterdir())
        for index, image in enumerate(images[:13]):
            stem = f"{'normal' if kind == 'good' else 'benign'} ({split[0]}{index})"
            folder = root / stem.split(maxsplit=1)[0]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, folder / f"{stem}.png")
            if kind == "good":
                Image.new("L", (240, 240)).save(folder / f"{stem}_mask.png")
            else:
                shutil.copy(image.parents[1] / "anomaly_mask" / image.name, folder / f"{stem}_mask.png")
    checked = call("dataset.check", "--data_root", root)
    trained = call("train.py", *ONE_EPOCH, "--data_root", root, "--save_path", tmp_path, "--shot", 2)
    for output in (checked, trained):
        assert "masks: 25 beside the images" in output
        assert "of their 50 images" in output
    assert len(last_lines(trained)) == 2
    call("dataset.check", "--data_root", root, "--write_list", "images.csv")
    again = call("train.py", *ONE_EPOCH, "--data_root", root, "--save_path", tmp_path, "--shot", 2)
    assert "images.csv" in again
    assert last_lines(again) == last_lines(trained)


@pytest.mark.parametrize("kind", ["dicom", "nifti"])
def test_series_and_volumes_are_trained_slice_by_slice(call, once, tmp_path, kind):
    root = once("scans", lambda folder: make_data(folder / "data")) / "data" / kind
    paths = ["--obj", "knee", "--data_root", root, "--save_path", tmp_path / "ckpt"]
    scans = ["--window", 400, 900, "--cache_dir", tmp_path / "cache", "--cache", "disk"]
    trained = call("train.py", *ONE_EPOCH, *paths, *scans, "--shot", 2)
    assert len(last_lines(trained)) == 1
    assert last_lines(trained) == last_lines(call("test.py", *paths))  # which reads them as the training did


def test_a_file_names_prompts_and_whether_masks_are_used(brain, call, tmp_path):
    """As a user would: the file is put into dataset/."""
    name = f"zz_{os.getpid()}"
    path = FOLDER / f"{name}.json"
    try:
        path.write_text(json.dumps({"prompt_name": "knee joint", "pixel_metrics": False}))
        paths = ["--obj", name, "--data_root", brain, "--save_path", tmp_path, "--shot", 2]
        assert len(last_lines(call("train.py", *ONE_EPOCH, *paths))) == 1
    finally:
        path.unlink()
    assert torch.load(tmp_path / f"{name}.pth", weights_only=True)["settings"]["prompt_name"] == "knee joint"


def test_prompts_of_ones_own_are_in_the_checkpoint(brain, call, tmp_path):
    states = {"normal": ["healthy {}", "{} of a volunteer"], "abnormal": ["{} with oedema", "ill {}", "{} with drusen"]}
    (tmp_path / "prompts.json").write_text(json.dumps(states))
    paths = ["--obj", "Brain", "--data_root", brain, "--save_path", tmp_path]
    command = [*ONE_EPOCH, *paths, "--shot", 2]
    plain = call("train.py", *command)
    own = call("train.py", *command, "--prompts", tmp_path / "prompts.json", "--prompt_name", "retinal OCT")
    assert re.findall(r"cos\(text\) \S+", plain) != re.findall(r"cos\(text\) \S+", own)
    (tmp_path / "prompts.json").unlink()
    assert last_lines(call("test.py", *paths)) == last_lines(own)
    settings = torch.load(tmp_path / "Brain.pth", weights_only=True)["settings"]
    assert (settings["states"], settings["prompt_name"]) == (states, "retinal OCT")


def test_normal_shots_alone(bottle, call, tmp_path):
    paths = ["--obj", "bottle", "--data_root", bottle, "--save_path", tmp_path]
    few = [*ONE_EPOCH, *paths, "--shot", 4, "--shot_abnormal", 0, "--epoch", 3, "--loss_type", "softmax"]
    output = call("train.py", *few)
    totals = [float(value) for value in re.findall(r"total (\S+)", output)]
    assert totals[0] > totals[1] > totals[2] > 0
    assert torch.load(tmp_path / "bottle.pth", weights_only=True)["about"]["shots"]["abnormal"] == []
    assert last_lines(output) == last_lines(call("test.py", *paths))
