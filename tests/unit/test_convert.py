"""python -m dataset.convert: DICOM and NIfTI data sets become PNGs that mean the same."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import nibabel
import numpy as np
import pydicom.data
import pytest
from PIL import Image

from dataset import MedicalDataset, convert, load_image, load_mask
from utils import run_cli


def call(monkeypatch, capsys, *arguments: object, code: int = 0) -> str:
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        run_cli(convert.main)
    output = "".join(capsys.readouterr())
    assert left.value.code == code, output
    return output


def save(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)


def test_a_data_set_of_volumes_becomes_one_of_pictures(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for split in ("valid", "test"):
        for kind in ("good", "Ungood"):
            for patient in ("sub-01", "sub-02"):
                values = rng.integers(-200, 400, (8, 9, 5)).astype(np.int16)
                save(tmp_path / "scans" / split / kind / patient / "t1.nii.gz", values)
                if kind == "Ungood":
                    labels = (rng.random((8, 9, 5)) > 0.9).astype(np.uint8)
                    labels[..., 2] = 0
                    save(tmp_path / "scans" / split / "label" / kind / patient / "t1.nii.gz", labels)
    output = call(monkeypatch, capsys, tmp_path / "scans", tmp_path / "knee_AD", "--window", 40, 400)
    assert "valid 10 normal, 8 abnormal; test 10 normal, 8 abnormal" in output

    source = MedicalDataset.open("scans", "", tmp_path / "scans", window=(40.0, 400.0))
    written = MedicalDataset.open("knee", tmp_path)
    assert written.pixel_metrics
    for split in ("valid", "test"):
        for before, after in zip(source.samples(split), written.samples(split), strict=True):
            assert (before.label, before.patient) == (after.label, after.patient)
            assert load_image(before, 24).equal(load_image(after, 24))
            assert load_mask(before, 24).equal(load_mask(after, 24))
    assert call(monkeypatch, capsys, tmp_path / "scans", tmp_path / "knee_AD", code=2).count("\n") == 1


def test_masks_of_stretched_dicom_slices_are_stretched_with_them(tmp_path, monkeypatch, capsys):
    template = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm", download=False))
    template.PixelSpacing = [2, 1]
    marked = np.zeros((128, 128), np.uint8)
    marked[10:20, 30:60] = 255
    for split, kind in itertools.product(("valid", "test"), ("good", "Ungood")):
        (tmp_path / "scans" / split / kind / "img").mkdir(parents=True)
        template.save_as(tmp_path / "scans" / split / kind / "img" / f"P{split}{kind}_1.dcm")
        if kind == "Ungood":
            (tmp_path / "scans" / split / kind / "anomaly_mask").mkdir()
            Image.fromarray(marked).save(tmp_path / "scans" / split / kind / "anomaly_mask" / f"P{split}{kind}_1.png")
    call(monkeypatch, capsys, tmp_path / "scans", tmp_path / "knee_AD")
    (sample,) = (sample for sample in MedicalDataset.open("knee", tmp_path).samples("test") if sample.label)
    with Image.open(sample.path) as image, Image.open(sample.mask) as mask:
        assert image.size == mask.size == (128, 256)
        assert np.array_equal(np.asarray(mask), marked.repeat(2, axis=0))


def test_like_brain(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for number in range(12):
        values = rng.integers(0, 900, (20, 24, 4)).astype(np.int16)
        values[..., 3] = 0  # above the head
        labels = np.zeros_like(values)
        labels[5:9, 5:9, 1] = 4
        folder = tmp_path / "brats" / f"BraTS2021_{number:05d}"
        save(folder / f"BraTS2021_{number:05d}_flair.nii.gz", values)
        save(folder / f"BraTS2021_{number:05d}_seg.nii.gz", labels)
    call(monkeypatch, capsys, tmp_path / "brats", tmp_path / "FLAIR_AD", "--like", "Brain")
    dataset = MedicalDataset.open("FLAIR", tmp_path)
    valid, test = dataset.samples("valid"), dataset.samples("test")
    assert len(valid) + len(test) == 36
    assert sum(sample.label for sample in valid + test) == 12
    assert not {sample.patient for sample in valid} & {sample.patient for sample in test}
    picture = np.asarray(Image.open(test[0].path)).astype(int)
    assert picture.shape == (240, 240, 3)
    assert (picture[..., 2] >= picture[..., 0]).mean() > 0.9  # the bluish grey of "bone"
    assert load_mask(test[-1], 240).float().mean() == pytest.approx(16 / (20 * 24), abs=0.01)


def test_like_liver(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for number in range(12):
        values = rng.integers(-1000, 1000, (16, 16, 3)).astype(np.int16)
        labels = np.zeros_like(values)
        labels[4:12, 4:12, 1:] = 1
        labels[5:7, 5:7, 2] = 2
        save(tmp_path / f"lits/volume-{number}.nii", values)
        save(tmp_path / f"lits/segmentation-{number}.nii", labels)
    both = ["--like", "Liver", "--window", "full"]
    assert "give one of the two" in call(monkeypatch, capsys, tmp_path / "lits", tmp_path / "CT_AD", *both, code=2)
    output = call(monkeypatch, capsys, tmp_path / "lits", tmp_path / "CT_AD", "--like", "Liver")
    assert "12" not in output or "valid" in output
    dataset = MedicalDataset.open("CT", tmp_path)
    samples = dataset.samples("valid") + dataset.samples("test")
    assert len(samples) == 24  # slices without liver are left out
    assert sum(sample.label for sample in samples) == 12
    outside = np.asarray(Image.open(samples[0].path).convert("L")).copy()
    outside[4:12, 4:12] = 0
    assert not outside.any()
    lesion = next(sample for sample in samples if sample.label)
    assert load_mask(lesion, 16).sum() == 4
    assert json.loads((tmp_path / "CT_AD/CT.json").read_text())["prompt_name"] == "CT"


def test_the_patients_of_labelled_volumes_are_found_by_ones_own_rule(tmp_path, monkeypatch, capsys):
    for number in range(12):
        for visit in "ab":
            name = tmp_path / f"scans/{visit}of{number}"
            save(Path(f"{name}_flair.nii.gz"), np.arange(48, dtype=np.int16).reshape(4, 4, 3))
            labels = np.full((4, 4, 3), np.nan if visit == "a" else 1, np.float32)
            labels[0] = 0
            save(Path(f"{name}_seg.nii.gz"), labels)
    call(monkeypatch, capsys, tmp_path / "scans", tmp_path / "knee_AD", "--patient", r"of(\d+)_")
    valid, test = (MedicalDataset.open("knee", tmp_path).samples(split) for split in ("valid", "test"))
    assert {sample.patient for sample in (*valid, *test)} == {str(number) for number in range(12)}
    assert not {sample.patient for sample in valid} & {sample.patient for sample in test}
    assert sum(sample.label for sample in (*valid, *test)) == 36  # labels that are no number mark nothing
    assert "--patient" in call(monkeypatch, capsys, tmp_path / "scans", tmp_path / "x", "--patient", "(", code=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nowhere", "out"], "IN nowhere: no folder"), ([".", "out", "--like", "Brain"], "no volumes beside their labels"),
     ([".", "out", "--window", "1"], "--window 1"), ([".", "out"], "no known layout")],
)  # fmt: skip
def test_bad_arguments_are_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    output = call(monkeypatch, capsys, *arguments, "--obj", "knee", code=2)
    assert output.count("\n") == 1
    assert words in output
