"""The MedMNIST converter on synthetic archives in MedMNIST's form."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import medmnist
from dataset.medical_few import MedicalDataset
from utils import InputError

COUNTS = {"train": 24, "val": 8, "test": 12}


def write_npz(path: Path) -> dict:
    """Write an archive like MedMNIST's: labels alternate, and the first pixel of an image is its index."""
    rng, arrays = np.random.default_rng(0), {}
    for split, count in COUNTS.items():
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = np.arange(count)
        arrays |= {f"{split}_images": images, f"{split}_labels": np.arange(count, dtype=np.uint8)[:, None] % 2}
    np.savez(path, **arrays)
    return arrays


def convert(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["medmnist", *map(str, arguments)])
    medmnist.main()


@pytest.mark.parametrize(("name", "normal"), [("breastmnist", 1), ("pneumoniamnist", 0)])
def test_binary_data_set(tmp_path, monkeypatch, name, normal):
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
    assert dataset.layout.prompt_name == config["prompt_name"]
    assert config == {"prompt_name": medmnist.SOURCES[name]["prompt_name"], "pixel_metrics": False}
    licence = (dataset.root / "LICENSE.txt").read_text()
    assert "CC BY 4.0" in licence
    assert "MedMNIST v2" in licence
    assert medmnist.SOURCES[name]["citation"] in licence
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [f"{name}_AD"]  # no temporary folder is left


def test_bad_archive_and_existing_folder_are_refused(tmp_path, monkeypatch):
    text = tmp_path / "text.npz"
    text.write_text("no archive")
    with pytest.raises(InputError, match=r"text\.npz"):
        convert(monkeypatch, "breastmnist", "--npz", text, "--out", tmp_path / "data")
    assert not list((tmp_path / "data").glob("*"))
    write_npz(tmp_path / "set.npz")
    (tmp_path / "data/breastmnist_AD/mine").mkdir(parents=True)
    with pytest.raises(InputError, match="there already"):
        convert(monkeypatch, "breastmnist", "--npz", tmp_path / "set.npz", "--out", tmp_path / "data")
