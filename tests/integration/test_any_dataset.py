"""A data set of one's own through the real commands: layouts, JSON files, prompts, unequal shots."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom.data
import pytest
import torch
from PIL import Image

from dataset import MedicalDataset, phantom, read
from dataset.layout import FOLDER
from tests.helpers.commands import Commands
from tests.helpers.data import SMALL

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
    """What a command prints, stdout and stderr; `code` is the exit code to expect."""

    def start(script: str, *arguments: object, code: int = 0) -> str:
        done = command(script, *arguments)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

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
    assert stored["settings"]["prompt_name"] == "bottle"
    assert stored["settings"]["states"] is None
    measured = [row["file"] for row in json.loads((tmp_path / "a.json").read_text())["per_image"]]
    assert sum("good" not in name for name in measured) == test
    assert valid + test == 16
    assert len(stored["about"]["shots"]["abnormal"]) == 2
    assert not set(stored["about"]["shots"]["abnormal"]) & set(measured)
    assert all(name.startswith(("test/crack/", "test/hole/")) for name in stored["about"]["shots"]["abnormal"])
    assert "ground_truth/{folder}/{stem}" in call("dataset.check", "--data_root", bottle)


def test_bare_folders(brain, call, tmp_path):
    root, names = tmp_path / "knee", ("normal", "abnormal")
    for name, source in zip(names, ("good", "Ungood"), strict=True):
        shutil.copytree(brain / "valid" / source / "img", root / name)
    paths = ["--obj", "knee", "--data_root", root, "--save_path", tmp_path]
    output = call("train.py", *ONE_EPOCH, *paths, "--shot", 2)
    assert len(last_lines(output)) == 1  # images only
    assert f"{names[0]}, {names[1]} serve both splits: of their 32 images" in output
    assert last_lines(output) == last_lines(call("test.py", *paths))
    # The split depends on nothing but the names.
    first, second = (call("dataset.check", "--data_root", root, "--num_workers", n).splitlines()[1:6] for n in (1, 2))
    assert first == second


def test_bmads_tree_under_the_papers_name(brain, call, tmp_path):
    root = tmp_path / "data" / "Retina_RESC_AD"
    for split, kind in itertools.product(("valid", "test"), ("good", "Ungood")):
        shutil.copytree(brain / split / kind / "img", root / "RESC" / split / kind / "img")
        if kind == "Ungood":
            shutil.copytree(brain / split / kind / "anomaly_mask", root / "RESC" / split / kind / "label")
    paths = ["--obj", "Retina_RESC", "--data_path", tmp_path / "data", "--save_path", tmp_path / "ckpt"]
    trained = call("train.py", *ONE_EPOCH, *paths, "--shot", 2)
    assert len(last_lines(trained)) == 2  # AUC and pAUC
    assert "treated as data of your own" in trained  # by its counts
    assert last_lines(trained) == last_lines(call("test.py", *paths))
    assert torch.load(tmp_path / "ckpt/Retina_RESC.pth", weights_only=True)["settings"]["prompt_name"] == "retinal OCT"


def test_busi_as_it_is_distributed(brain, call, tmp_path):
    """A folder for each class, and masks beside the images: not one of them is an image, and every one is found."""
    root = tmp_path / "BUSI"
    for kind, source in (("normal", "good"), ("benign", "Ungood"), ("malignant", "Ungood")):
        (root / kind).mkdir(parents=True)
        for index, image in enumerate(sorted((brain / "valid" / source / "img").iterdir()), 1):
            mask = brain / "valid/Ungood/anomaly_mask" / image.name
            shifted = np.roll(np.asarray(Image.open(image)), 3 * (kind == "malignant"), axis=1)
            Image.fromarray(shifted).save(root / kind / f"{kind} ({index}).png")
            if kind == "normal":
                Image.new("L", (48, 48)).save(root / kind / f"{kind} ({index})_mask.png")
            else:
                shutil.copy(mask, root / kind / f"{kind} ({index})_mask.png")
                shutil.copy(mask, root / kind / f"{kind} ({index})_mask_1.png")
    checked = call("dataset.check", "--data_root", root)
    trained = call("train.py", *ONE_EPOCH, "--data_root", root, "--save_path", tmp_path, "--shot", 2)
    for output in (checked, trained):
        assert "masks: 32 by {here}/{stem}_mask" in output
        assert "of their 48 images" in output
    assert len(last_lines(trained)) == 2
    call("dataset.check", "--data_root", root, "--write_list", "images.csv")
    again = call("train.py", *ONE_EPOCH, "--data_root", root, "--save_path", tmp_path, "--shot", 2)
    assert "images.csv" in again
    assert last_lines(again) == last_lines(trained)


def test_dicom_files_in_folders_of_patients(brain, call, tmp_path):
    """12-bit DICOM files with masks as PNG; the JSON file lies in the data set's own folder and names the window."""
    root, template = tmp_path / "knee", pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    for split, kind in itertools.product(("valid", "test"), ("good", "Ungood")):
        for index, source in enumerate(sorted((brain / split / kind / "img").iterdir())):
            patient = f"P{index // 2:03d}{split[0]}"
            values = np.asarray(Image.open(source)).astype(np.uint16) * 16
            template.Rows, template.Columns = values.shape
            template.PixelRepresentation, template.RescaleIntercept, template.PixelData = 0, -1024, values.tobytes()
            path = root / split / kind / "img" / patient / f"{index}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            template.save_as(path)
            if kind == "Ungood":
                mask = root / split / kind / "anomaly_mask" / patient / f"{index}.png"
                mask.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(brain / split / kind / "anomaly_mask" / source.name, mask)
    (root / "knee.json").write_text(json.dumps({"prompt_name": "knee", "window": [1016, 4080]}))
    checked = call("dataset.check", "--data_root", root)
    assert "patients: 10 recognised in 40 names: P000t, P000v" in checked
    assert "warning" not in checked
    paths = ["--obj", "knee", "--data_root", root, "--save_path", tmp_path / "ckpt"]
    trained = call("train.py", *ONE_EPOCH, *paths, "--shot", 2, "--shot_abnormal", 0)
    assert last_lines(trained) == last_lines(call("test.py", *paths))
    # The same pictures as PNG files give the same numbers.
    samples = MedicalDataset.open("knee", "", root).samples("test")
    pictures = [np.asarray(Image.open(path)) for path in sorted((brain / "test/good/img").iterdir())]
    for sample, picture in zip(samples, pictures, strict=False):
        assert np.abs(np.asarray(read(sample).image)[..., 0].astype(int) - picture).max() <= 1


def test_volumes_are_trained_slice_by_slice(call, tmp_path):
    rng, root = np.random.default_rng(0), tmp_path / "knee"
    for split, kind, patient in itertools.product(("valid", "test"), ("good", "Ungood"), (1, 2)):
        values, labels = rng.integers(0, 500, (40, 44, 3)).astype(np.int16), np.zeros((40, 44, 3), np.uint8)
        labels[10:20, 10:20, 1:] = 1
        name = f"sub-{split[0]}{patient}{kind[0]}.nii.gz"
        for folder, array in (("img", values + 400 * labels.astype(np.int16)), ("anomaly_mask", labels)):
            (root / split / kind / folder).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array.astype(np.int16), np.eye(4)), root / split / kind / folder / name)
    paths = ["--obj", "knee", "--data_root", root, "--save_path", tmp_path / "ckpt"]
    trained = call("train.py", *ONE_EPOCH, *paths, "--shot", 2, "--cache_dir", tmp_path / "cache", "--cache", "disk")
    assert "10 test images (4 abnormal)" in trained  # 2 x 3 normal slices, and the marked 2 of each abnormal volume
    assert len(last_lines(trained)) == 2
    assert last_lines(trained) == last_lines(call("test.py", *paths))


def test_a_file_names_layout_and_prompts(brain, call, tmp_path):
    """As a user would: the file is put into dataset/."""
    root = tmp_path / "x"
    shutil.copytree(brain / "valid", root / "a")
    shutil.copytree(brain / "test", root / "b")
    for split in ("a", "b"):
        (root / split / "Ungood/anomaly_mask").rename(root / split / "outlines")
    name = f"zz_{os.getpid()}"
    config = {
        "prompt_name": "knee joint",
        "valid": {"normal": "a/good/img", "abnormal": "a/Ungood/img"},
        "test": {"normal": ["b/good/img"], "abnormal": ["b/Ungood/img"]},
        "masks": "{parent}/../outlines/{stem}",
    }
    path = FOLDER / f"{name}.json"
    arguments = [*ONE_EPOCH, "--obj", name, "--data_root", root, "--save_path", tmp_path, "--shot", 2]
    try:
        path.write_text(json.dumps(config))
        assert "masks cannot be" in call("train.py", *arguments, code=2)  # leads out of the folder
        for split in ("a", "b"):
            (root / split / "outlines").rename(root / split / "Ungood/outlines")
        path.write_text(json.dumps({**config, "masks": "{parent}/outlines/{stem}"}))
        assert len(last_lines(call("train.py", *arguments))) == 2
    finally:
        path.unlink()
    assert torch.load(tmp_path / f"{name}.pth", weights_only=True)["settings"]["prompt_name"] == "knee joint"


@pytest.mark.parametrize("mood", ["fix", "learnable_all"])
def test_prompts_of_ones_own_are_in_the_checkpoint(brain, call, tmp_path, mood):
    states = {"normal": ["healthy {}", "{} of a volunteer"], "abnormal": ["{} with oedema", "ill {}", "{} with drusen"]}
    (tmp_path / "prompts.json").write_text(json.dumps(states))
    paths = ["--obj", "Brain", "--data_root", brain, "--save_path", tmp_path]
    command = [*ONE_EPOCH, *paths, "--shot", 2, "--text_mood", mood]
    plain = call("train.py", *command)
    own = call("train.py", *command, "--prompts", tmp_path / "prompts.json", "--prompt_name", "retinal OCT")
    assert re.findall(r"cos\(text\) \S+", plain) != re.findall(r"cos\(text\) \S+", own)
    (tmp_path / "prompts.json").unlink()
    assert last_lines(call("test.py", *paths)) == last_lines(own)
    settings = torch.load(tmp_path / "Brain.pth", weights_only=True)["settings"]
    assert settings["states"] == states
    assert settings["prompt_name"] == "retinal OCT"

    # A checkpoint from before there were such states still loads.
    stored = torch.load(tmp_path / "Brain.pth", weights_only=True)
    call("train.py", *command)
    stored = torch.load(tmp_path / "Brain.pth", weights_only=True)
    del stored["settings"]["states"]
    torch.save(stored, tmp_path / "Brain.pth")
    assert last_lines(call("test.py", *paths)) == last_lines(plain)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_normal_shots_alone(bottle, call, tmp_path, loss):
    paths = ["--obj", "bottle", "--data_root", bottle, "--save_path", tmp_path]
    few = [*ONE_EPOCH, *paths, "--shot", 4, "--shot_abnormal", 0, "--epoch", 3, "--loss_type", loss]
    output = call("train.py", *few)
    assert "abnormal shots: none" in output
    assert "losses: no abnormal shots" in output
    totals = [float(value) for value in re.findall(r"total (\S+)", output)]
    assert totals[0] > totals[1] > totals[2] > 0
    assert torch.load(tmp_path / "bottle.pth", weights_only=True)["about"]["shots"]["abnormal"] == []
    assert last_lines(output) == last_lines(call("test.py", *paths))


def test_no_abnormal_images_but_the_tests(brain, call, tmp_path):
    """The known layout without valid/Ungood takes abnormal shots from the test's folder, which is divided."""
    root = shutil.copytree(brain, tmp_path / "Brain_AD")
    shutil.rmtree(root / "valid/Ungood")
    paths = ["--data_root", root, "--save_path", tmp_path]
    output = call("train.py", *ONE_EPOCH, "--obj", "Brain", *paths, "--shot", 2, "--shot_abnormal", 0)
    assert "test/Ungood/img serve both splits: of their 4 images" in output
    assert last_lines(output) == last_lines(call("test.py", "--obj", "Brain", *paths))


def test_unequal_shots_take_each_classs_own_list(brain, call, tmp_path):
    output = call(
        "train.py", *ONE_EPOCH, "--obj", "Brain", "--data_root", brain, "--save_path", tmp_path, "--shot_normal", 8,
        "--shot_abnormal", 2,
    )  # fmt: skip
    shots = torch.load(tmp_path / "Brain.pth", weights_only=True)["about"]["shots"]
    assert shots["normal"] == [f"valid_good_{i:05d}.png" for i in range(8)]
    assert shots["abnormal"] == [f"valid_Ungood_{i:05d}.png" for i in range(2)]
    assert "my2-shot.txt" in output
    assert "my8-shot.txt" in output
    assert "count 4 times as much" in output


def test_a_shot_in_the_test_set_is_said(brain, call, tmp_path):
    root = shutil.copytree(brain, tmp_path / "leaky")
    shutil.copy(root / "valid/good/img/valid_good_00001.png", root / "test/good/img/test_good_00000.png")
    output = call("train.py", *ONE_EPOCH, "--obj", "Brain", "--data_root", root, "--save_path", tmp_path, "--shot", 2)
    (line,) = [line for line in output.splitlines() if line.startswith("warning:") and "equal a shot" in line]
    assert "1 test images equal a shot" in line
    assert "test/good/img/test_good_00000.png is valid/good/img/valid_good_00001.png" in line
