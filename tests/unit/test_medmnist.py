"""The MedMNIST converter, on archives of MedMNIST's form that are made here."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import MedicalDataset, medmnist
from tests.helpers.data import read_shot_list
from utils import InputError

COUNTS = {"train": 24, "val": 8, "test": 12}


def write_npz(path: Path, classes: int = 2, channels: int = 0, findings: int = 1, size: int = 28) -> dict:
    """An archive as MedMNIST's: labels go round, and an image shows its number in its first pixel."""
    rng, arrays = np.random.default_rng(0), {}
    for split, count in COUNTS.items():
        shape = (count, size, size, channels) if channels else (count, size, size)
        images = rng.integers(0, 256, shape, dtype=np.uint8)
        images[:, 0, 0] = np.arange(count).reshape(-1, *[1] * (len(shape) - 3))
        labels = np.arange(count)[:, None] % classes
        if findings > 1:
            labels = (rng.random((count, findings)) < 0.05).astype(int)
            labels[::2] = 0
            labels[1::2, 3] = 1
        arrays |= {f"{split}_images": images, f"{split}_labels": labels.astype(np.uint8)}
    np.savez(path, **arrays)
    return arrays


def convert(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["medmnist", *map(str, arguments)])
    medmnist.main()


@pytest.mark.parametrize(("name", "normal"), [("breastmnist", 1), ("pneumoniamnist", 0)])
def test_a_binary_set(tmp_path, monkeypatch, name, normal):
    arrays = write_npz(tmp_path / "set.npz")
    convert(monkeypatch, name, "--npz", tmp_path / "set.npz", "--out", tmp_path / "data")
    dataset = MedicalDataset.open(name, tmp_path / "data")
    assert not dataset.pixel_metrics
    test, valid = dataset.samples("test"), dataset.samples("valid")
    assert (len(test), len(valid)) == (12, 32)  # valid/ holds train and val
    for sample in (*test, *valid):
        split, number = sample.path.stem[:-6], int(sample.path.stem[-6:])
        assert sample.label == (arrays[f"{split}_labels"][number, 0] != normal)
        assert (np.array(Image.open(sample.path)) == arrays[f"{split}_images"][number]).all()
    config = json.loads((dataset.root / f"{name}.json").read_text())
    assert dataset.prompt_name == config["prompt_name"]
    assert config == {"prompt_name": medmnist.SOURCES[name].prompt_name, "pixel_metrics": False}
    licence = (dataset.root / "LICENSE.txt").read_text()
    assert "CC BY 4.0" in licence
    assert "MedMNIST v2" in licence
    assert medmnist.SOURCES[name].citation in licence
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [f"{name}_AD"]  # nothing half-made is left


def test_shot_lists_are_seeded_and_nested(tmp_path, monkeypatch):
    write_npz(tmp_path / "set.npz")
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert(monkeypatch, "breastmnist", "--npz", tmp_path / "set.npz", "--out", tmp_path / folder, "--seed", seed)
    lists = {
        folder: [
            (tmp_path / folder / f"breastmnist_AD/fewshot_seed/my{count}-shot.txt").read_text()
            for count in (2, 4, 8, 16)
        ]
        for folder in "abc"
    }
    assert lists["a"] == lists["b"] != lists["c"]
    folder = tmp_path / "a/breastmnist_AD"
    abnormal, normal = read_shot_list(folder / "fewshot_seed/my16-shot.txt", 0)
    assert len(abnormal) == len(normal) == 16
    assert all((folder / "valid/Ungood/img" / name).is_file() for name in abnormal)
    assert all((folder / "valid/good/img" / name).is_file() for name in normal)
    assert read_shot_list(folder / "fewshot_seed/my4-shot.txt", 0) == (abnormal[:4], normal[:4])
    shots = MedicalDataset.open("breastmnist", tmp_path / "a").shots(4, 4, 0, 9)
    assert [sample.path.name for sample in shots.abnormal] == abnormal[:4]


def test_several_classes_colours_and_findings(tmp_path, monkeypatch):
    write_npz(tmp_path / "oct.npz", classes=4)
    convert(monkeypatch, "octmnist", "--npz", tmp_path / "oct.npz", "--out", tmp_path)
    test = MedicalDataset.open("octmnist", tmp_path).samples("test")
    assert [sample.path.name for sample in test if not sample.label] == [f"test{i:06d}.png" for i in (3, 7, 11)]
    assert not list((tmp_path / "octmnist_AD/fewshot_seed").glob("my16*"))  # 8 normal images
    write_npz(tmp_path / "path.npz", classes=9, channels=3)
    convert(monkeypatch, "pathmnist", "--npz", tmp_path / "path.npz", "--out", tmp_path)
    (normal,) = (sample for sample in MedicalDataset.open("pathmnist", tmp_path).samples("test") if not sample.label)
    with Image.open(normal.path) as image:
        assert image.mode == "RGB"
    arrays = write_npz(tmp_path / "chest.npz", findings=14)
    convert(monkeypatch, "chestmnist", "--npz", tmp_path / "chest.npz", "--out", tmp_path)
    for sample in MedicalDataset.open("chestmnist", tmp_path).samples("test"):
        assert sample.label == arrays["test_labels"][int(sample.path.stem[-6:])].any()


def test_valid_is_drawn_where_it_is_large(tmp_path, monkeypatch):
    write_npz(tmp_path / "set.npz")
    convert(monkeypatch, "breastmnist", "--npz", tmp_path / "set.npz", "--out", tmp_path / "a", "--valid", 5)
    dataset = MedicalDataset.open("breastmnist", tmp_path / "a")
    assert [sum(s.label == label for s in dataset.samples("valid")) for label in (0, 1)] == [5, 5]
    assert len(dataset.samples("test")) == 12
    assert {s.path.name[:3] for s in dataset.samples("valid")} <= {"tra", "val"}


def test_download_through_the_package(tmp_path, monkeypatch):
    asked = []

    class BreastMNIST:
        def __init__(self, **arguments):
            asked.append(arguments)
            write_npz(Path(arguments["root"]) / "breastmnist_64.npz", size=64)

    package = types.SimpleNamespace(INFO={"breastmnist": {"python_class": "BreastMNIST"}}, BreastMNIST=BreastMNIST)
    monkeypatch.setitem(sys.modules, "medmnist", package)
    convert(monkeypatch, "breastmnist", "--size", 64, "--out", tmp_path, "--download_dir", tmp_path / "cache")
    assert asked == [{"split": "val", "download": True, "size": 64, "root": str(tmp_path / "cache")}]
    with Image.open(MedicalDataset.open("breastmnist", tmp_path).samples("test")[0].path) as image:
        assert image.size == (64, 64)
    monkeypatch.setitem(sys.modules, "medmnist", None)
    with pytest.raises(InputError, match="pip install"):
        convert(monkeypatch, "breastmnist", "--out", tmp_path / "other")


def test_what_is_refused(tmp_path, monkeypatch):
    arrays = write_npz(tmp_path / "set.npz")
    text = tmp_path / "text.npz"
    text.write_text("no archive")
    lacking, wide, cut = (tmp_path / f"{name}.npz" for name in ("lacking", "wide", "cut"))
    np.savez(lacking, **{key: value for key, value in arrays.items() if key != "val_labels"})
    write_npz(wide, findings=14)
    cut.write_bytes((tmp_path / "set.npz").read_bytes()[:-4000])
    cases = [
        (["bloodmnist"], "no normal class"),
        (["nodulemnist3d"], "volumes"),
        (["breastmnist", "--npz", tmp_path / "none.npz"], "none.npz"),
        (["breastmnist", "--npz", text], "text.npz"),
        (["breastmnist", "--npz", lacking], "val_labels"),
        (["breastmnist", "--npz", wide], "not those of"),
        (["breastmnist", "--npz", cut], "cut"),
    ]
    for arguments, words in cases:
        with pytest.raises(InputError, match=words):
            convert(monkeypatch, *arguments, "--out", tmp_path / "data")
    assert not list((tmp_path / "data").glob("*"))
    (tmp_path / "data/breastmnist_AD/mine").mkdir(parents=True)
    with pytest.raises(InputError, match="there already"):
        convert(monkeypatch, "breastmnist", "--npz", tmp_path / "set.npz", "--out", tmp_path / "data")
