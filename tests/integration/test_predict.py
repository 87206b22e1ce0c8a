"""predict.py and the Python API on real files: phantom PNGs, pydicom's DICOM files, the MNI template of nilearn."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom import data as pydicom_data
from pydicom import dcmread

from dataset import phantom
from engine import load
from engine.files.checkpoint import Checkpoint
from tests.helpers.attacks import CLOSED, PEAK, driver, fine, rows
from tests.helpers.commands import ROOT
from tests.helpers.data import SMALL
from tests.helpers.scans import dicom_series, mni


@pytest.fixture(scope="module")
def home(command, tmp_path_factory) -> Path:
    """Data, and checkpoints trained on them: Brain.pth with masks, Chest.pth without; Mine.pth is Brain renamed."""
    path = tmp_path_factory.mktemp("home")
    phantom.write(path / "data", ["Brain", "Chest"], valid=4, test=6, seed=0, size=64)
    for obj in ("Brain", "Chest"):
        flags = ["--obj", obj, "--data_path", path / "data", "--save_path", path, "--shot", 2, "--epoch", 1]
        done = command("train.py", *SMALL, *flags, "--out_json", path / f"{obj}.json")
        assert done.returncode == 0, done.stderr
    mine = Checkpoint.load(path / "Brain.pth")
    Checkpoint(replace(mine.settings, obj="Mine"), mine.parts, mine.metadata).save(path / "Mine.pth")
    return path


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """The MNI template with 5 mm voxels, with thick slices stored the other way round, and as a DICOM series."""
    path = tmp_path_factory.mktemp("scans")
    dicom_series(path / "series", mni(path / "mni.nii.gz", (5.0, 5.0, 5.0)), shuffle=1)
    mni(path / "thick.nii.gz", (5.0, 5.0, 20.0), "LSP")
    return path


def predicted(command, ckpt: Path, out: Path, *arguments: object, code: int = 0):
    done = command("predict.py", "--ckpt", ckpt, *arguments, "--out", out, "--device", "cpu")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def dicom(name: str) -> str:
    path = pydicom_data.get_testdata_file(name, download=False)
    assert path, f"pydicom ships no {name}"
    return path


def test_the_scores_of_the_test_program(command, home, tmp_path):
    images = home / "data/Brain_AD/test"
    done = command(
        "predict.py", "--ckpt", home / "Brain.pth", images / "good/img", images / "Ungood/img", "--out", tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "not a medical device" in done.stdout
    assert "images a second" in done.stdout
    expected = json.loads((home / "Brain.json").read_text())
    found = {Path(row["file"]).name: row for row in rows(tmp_path)}
    assert len(found) == len(expected["per_image"]) == 12
    threshold = expected["decision"]["value"]
    for image in expected["per_image"]:
        row = found[Path(image["file"]).name]
        assert float(row["score"]) == pytest.approx(image["score"], abs=1e-5)
        assert float(row["threshold"]) == threshold
        assert row["abnormal"] == str(image["score"] >= threshold)

        heat = np.asarray(Image.open(tmp_path / row["raw"])).astype(np.float64) / 65535 * 4  # K = 4 layers
        assert heat.shape == (42, 42)
        assert heat.max() == pytest.approx(float(row["score"]), abs=1e-4)  # with masks an image scores as its peak
        with Image.open(tmp_path / row["overlay"]) as overlay:
            assert overlay.size == (64, 64)
        outlines = json.loads((tmp_path / row["contours"]).read_text())
        assert outlines["pixel_threshold"] == expected["decision"]["pixel_value"]
        assert sum(region["area"] > 0 for region in outlines["regions"]) == int(row["regions"])
    stored = json.loads((tmp_path / "predictions.json").read_text())
    assert [str(row["score"]) for row in stored["predictions"]] == [row["score"] for row in rows(tmp_path)]


def test_a_checkpoint_without_masks_draws_a_weak_localisation(command, home, tmp_path):
    image = home / "data/Chest_AD/test/good/img/test_good_00000.png"
    done = predicted(command, home / "Chest.pth", tmp_path, image)
    assert "heat maps: weak localisation only" in done.stdout
    (row,) = rows(tmp_path)
    heat = np.asarray(Image.open(tmp_path / row["raw"])).astype(np.float64) / 65535 * 4
    assert heat.std() > 0
    assert heat.max() != pytest.approx(float(row["score"]), abs=1e-6)  # the detection heads' own score
    assert "weak localisation" in json.loads((tmp_path / "predictions.json").read_text())["heat"]
    model = load(home / "Chest.pth", "cpu")
    assert model.weak
    assert model.predict(image)[0].score == pytest.approx(float(row["score"]), abs=1e-6)


def test_thresholds_given_missing_and_set_again(command, home, tmp_path):
    image = home / "data/Brain_AD/test/good/img/test_good_00000.png"
    bare = Checkpoint.load(home / "Mine.pth")
    Checkpoint(bare.settings, bare.parts, {**bare.metadata, "threshold": None}).save(tmp_path / "bare.pth")
    done = predicted(command, tmp_path / "bare.pth", tmp_path / "a", image)
    assert "decisions: none" in done.stdout
    assert rows(tmp_path / "a")[0]["abnormal"] == ""
    predicted(command, tmp_path / "bare.pth", tmp_path / "b", image, "--threshold", 0.1)
    assert rows(tmp_path / "b")[0]["abnormal"] == "True"

    # Labelled images in a layout that no JSON file describes: normal/ and abnormal/ alone, without masks.
    for kind, name in (("good", "normal"), ("Ungood", "abnormal")):
        shutil.copytree(home / "data/Brain_AD/test" / kind / "img", tmp_path / "labelled" / name)
    flags = ["--ckpt", tmp_path / "bare.pth", "--calibrate", tmp_path / "labelled"]
    done = command("predict.py", *flags, "--threshold_at", "tpr=1", "--save_ckpt", tmp_path / "new.pth")
    assert done.returncode == 0, done.stderr
    assert "a sensitivity of at least 1 on 6 normal and 6 abnormal images of labelled" in done.stdout
    scores = {image["file"]: image["score"] for image in json.loads((home / "Brain.json").read_text())["per_image"]}
    abnormal = sorted(score for file, score in scores.items() if "Ungood" in file)
    normal = [score for file, score in scores.items() if "Ungood" not in file]
    below = max([score for score in normal if score < abnormal[0]], default=abnormal[0])
    stored = Checkpoint.load(tmp_path / "new.pth").metadata["threshold"]
    assert stored["value"] == pytest.approx((abnormal[0] + below) / 2, abs=1e-5)
    assert "pixel_value" not in stored
    predicted(command, tmp_path / "new.pth", tmp_path / "c", image)
    assert float(rows(tmp_path / "c")[0]["threshold"]) == stored["value"]

    # With masks the pixels' threshold is set too, and images may be predicted by it in the same run.
    data = home / "data/Brain_AD"
    done = predicted(
        command, home / "Brain.pth", tmp_path / "d", "--calibrate", data, "--threshold_at", "fpr=0.5", image
    )
    assert "have the names of shots" in done.stderr
    again = json.loads((tmp_path / "d/predictions.json").read_text())
    assert again["calibration"]["figures"]["n_abnormal"] == 10
    trained = Checkpoint.load(home / "Brain.pth").metadata["threshold"]
    assert again["calibration"]["pixel_value"] != trained["pixel_value"]
    outlines = json.loads((tmp_path / "d" / rows(tmp_path / "d")[0]["contours"]).read_text())
    assert outlines["pixel_threshold"] == again["calibration"]["pixel_value"]


def test_dicom_files_objects_without_a_picture_and_damaged_ones(command, home, tmp_path):
    good = ["CT_small.dcm", "MR_small.dcm", "examples_palette.dcm", "SC_rgb_rle_2frame.dcm"]
    none = ["rtplan.dcm", "rtdose.dcm", "test-SR.dcm"]
    done = predicted(command, home / "Mine.pth", tmp_path / "a", *map(dicom, (*good, *none)))
    for name in none:
        assert any(name in line and "no image" in line for line in done.stderr.splitlines())
    assert "no image in 3 files" in done.stdout
    assert len(json.loads((tmp_path / "a/predictions.json").read_text())["no_image"]) == 3
    found = {(Path(row["file"]).name, row["frame"]): row for row in rows(tmp_path / "a")}
    assert set(found) == {(name, "") for name in good[:3]} | {(good[3], "0"), (good[3], "1")}
    assert all((tmp_path / "a" / row["overlay"]).is_file() for row in found.values())
    header, row = dcmread(dicom("CT_small.dcm")), found["CT_small.dcm", ""]
    assert row["PatientID"] == header.PatientID
    assert row["StudyInstanceUID"] == header.StudyInstanceUID
    assert row["SeriesInstanceUID"] == header.SeriesInstanceUID
    assert row["InstanceNumber"] == str(header.InstanceNumber)
    assert float(row["slice_position"]) == pytest.approx(header.ImagePositionPatient[2], abs=1e-3)
    assert (row["plane"], row["orientation"]) == ("axial", "left R, right L, top A, bottom P")
    assert "shown from" in row["notes"]
    assert "the whole range" in done.stderr

    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    bad = [dicom("MR_truncated.dcm"), tmp_path / "broken.png", tmp_path / "missing.png"]
    done = predicted(command, home / "Mine.pth", tmp_path / "b", dicom(good[0]), *bad, code=2)
    for path in bad:
        assert f"{Path(path).name}: " in done.stderr
    assert "3 of 4 files or images could not be read" in done.stderr.splitlines()[-1]
    only = command("predict.py", "--ckpt", home / "Mine.pth", dicom("rtplan.dcm"), "--out", tmp_path / "c")
    assert (only.returncode, "no image in any of 1 files" in only.stdout) == (0, True)


def test_windows(command, home, scans, tmp_path):
    image = dicom("CT_small.dcm")
    scores = {}
    for words, said in (
        (["full"], "the whole range of this picture"), (["auto"], "the robust range of this picture"), ([40, 400], "")
    ):  # fmt: skip
        out = tmp_path / str(words[0])
        done = predicted(command, home / "Mine.pth", out, "--window", *words, image)  # the image follows the window
        assert said in done.stderr
        scores[words[0]] = rows(out)[0]["score"]
    assert len(set(scores.values())) == 3
    done = predicted(command, home / "Mine.pth", tmp_path / "s", scans / "series", "--window", "auto")
    files = len(list((scans / "series").iterdir()))
    assert f"the robust range of its series ({files} files)" in done.stderr
    assert len({row["notes"].split(";")[0] for row in rows(tmp_path / "s")}) == 1  # one range for all slices

    ramp = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "twelve.tif")
    done = predicted(command, home / "Mine.pth", tmp_path / "t", tmp_path / "twelve.tif")
    said = "twelve.tif: a 12-bit picture in a 16-bit file (range used: 6%, the largest value is 4095 of 65535)"
    assert said in done.stderr
    done = predicted(command, home / "Mine.pth", tmp_path / "u", tmp_path / "twelve.tif", "--window", "full")
    assert "shown from 0 to 4095" in done.stderr
    assert rows(tmp_path / "t")[0]["score"] != rows(tmp_path / "u")[0]["score"]
    Image.new("L", (64, 64), 7).save(tmp_path / "flat.png")
    done = predicted(command, home / "Mine.pth", tmp_path / "v", tmp_path / "flat.png")
    assert "warning: " in done.stderr
    assert "nearly constant" in rows(tmp_path / "v")[0]["notes"]


def test_what_training_saw_decides(command, home, tmp_path):
    image = dicom("CT_small.dcm")
    done = predicted(command, home / "Brain.pth", tmp_path / "a", image)
    assert "warning: the checkpoint was trained on Brain's prepared PNG files, and these are DICOM" in done.stderr
    mine = Checkpoint.load(home / "Mine.pth")
    reading = {"window": [40.0, 400.0], "plane": "coronal", "formats": ["dicom"]}
    Checkpoint(replace(mine.settings, reading=reading), mine.parts, mine.metadata).save(tmp_path / "ct.pth")
    done = predicted(command, tmp_path / "ct.pth", tmp_path / "b", image)
    assert "warning" not in done.stderr
    predicted(command, home / "Mine.pth", tmp_path / "c", image, "--window", 40, 400)
    assert rows(tmp_path / "b")[0]["score"] == rows(tmp_path / "c")[0]["score"]
    done = predicted(command, tmp_path / "ct.pth", tmp_path / "d", image, "--window", "full")
    assert "--window full, but the checkpoint was trained with --window 40 400" in done.stderr
    done = predicted(command, tmp_path / "ct.pth", tmp_path / "e", "docs/demo-brain.png")
    assert "trained on DICOM files, not on picture" in done.stderr
    model = load(tmp_path / "ct.pth", "cpu")
    assert str(model.predict(image)[0].score) == rows(tmp_path / "b")[0]["score"]


@pytest.mark.parametrize(("plane", "axis"), [("axial", 2), ("coronal", 1), ("sagittal", 0)])
@pytest.mark.parametrize("name", ["mni.nii.gz", "thick.nii.gz"])
def test_a_volume_in_every_plane(command, home, scans, tmp_path, plane, axis, name):
    done = predicted(command, home / "Mine.pth", tmp_path, scans / name, "--plane", plane)
    source = nibabel.load(scans / name)
    canonical = nibabel.as_closest_canonical(source)
    table = rows(tmp_path)
    assert len(table) == canonical.shape[axis]
    assert {row["plane"] for row in table} == {plane}
    height, width = {0: (2, 1), 1: (2, 0), 2: (1, 0)}[axis]
    stretched = 4 if name == "thick.nii.gz" and axis != 2 else 1
    assert {(int(row["width"]), int(row["height"])) for row in table} == {
        (canonical.shape[width], canonical.shape[height] * stretched)
    }
    assert ("resampled to square ones" in done.stderr) == (stretched == 4)
    letters = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}[plane]
    assert {row["orientation"] for row in table} == {"left {}, right {}, top {}, bottom {}".format(*letters)}
    zoom = source.header.get_zooms()[(0, 2, 1)[axis] if name == "thick.nii.gz" else axis]
    np.testing.assert_allclose(np.diff([float(row["slice_position"]) for row in table]), zoom)

    (volume,) = {row["heat_volume"] for row in table}
    heat = nibabel.load(tmp_path / volume)
    assert heat.shape == source.shape
    np.testing.assert_allclose(heat.affine, source.affine)
    assert heat.header.get_zooms() == source.header.get_zooms()
    assert b"research use" in heat.header["descrip"].tobytes()
    values = nibabel.as_closest_canonical(heat).get_fdata()
    for row in table:
        raw = np.asarray(Image.open(tmp_path / row["raw"])).astype(np.float32) / 65535 * 4
        slice_ = values.take(int(row["frame"]), axis=axis)[::-1, ::-1].T
        expected = Image.fromarray(raw).resize(slice_.shape[::-1], Image.Resampling.BILINEAR)
        np.testing.assert_allclose(slice_, np.asarray(expected), atol=3e-4)


def test_a_series_and_its_heat_series(command, home, scans, tmp_path):
    predicted(command, home / "Mine.pth", tmp_path / "a", scans / "series", "--window", "full")
    predicted(command, home / "Mine.pth", tmp_path / "b", scans / "mni.nii.gz", "--window", "full")
    table = rows(tmp_path / "a")
    assert [int(row["InstanceNumber"]) for row in table] == list(range(1, len(table) + 1))
    assert len({row["SeriesInstanceUID"] for row in table}) == 1
    scores = [[float(row["score"]) for row in rows(tmp_path / out)] for out in "ab"]
    np.testing.assert_allclose(*scores, atol=1e-3)  # the same volume, whatever the format
    np.testing.assert_allclose(*[[float(row["slice_position"]) for row in rows(tmp_path / out)] for out in "ab"])
    volume = nibabel.as_closest_canonical(nibabel.load(tmp_path / "b" / rows(tmp_path / "b")[0]["heat_volume"]))
    for place, row in enumerate(table):
        path = tmp_path / "a" / row["heat_volume"]
        heat, source = dcmread(path), dcmread(row["file"])
        assert (heat.PatientID, heat.StudyInstanceUID) == (source.PatientID, source.StudyInstanceUID)
        assert heat.SeriesInstanceUID != source.SeriesInstanceUID
        assert heat.ImagePositionPatient == source.ImagePositionPatient
        assert heat.ImageType == ["DERIVED", "SECONDARY"]
        assert "research use" in heat.SeriesDescription
        values = heat.pixel_array * float(heat.RescaleSlope) / 1000
        np.testing.assert_allclose(values, volume.get_fdata()[::-1, ::-1, place].T, atol=2e-3)
    if shutil.which("dcmdump"):  # Debian's dcmtk
        said = subprocess.run(["dcmdump", path], capture_output=True, text=True, check=True)
        assert "SecondaryCaptureImageStorage" in said.stdout
        assert not said.stderr
        picture = subprocess.run(["dcm2pnm", "+Wi", "1", path, tmp_path / "x.pnm"], capture_output=True, check=False)
        assert picture.returncode == 0, picture.stderr
        with Image.open(tmp_path / "x.pnm") as shown:
            assert shown.size == (heat.Columns, heat.Rows)


def test_groups(command, home, scans, tmp_path):
    for patient in ("P1", "P2"):
        folder = tmp_path / "in" / patient
        folder.mkdir(parents=True)
        for i in range(3):
            name = home / f"data/Brain_AD/test/Ungood/img/test_Ungood_0000{i + 3 * (patient == 'P2')}.png"
            shutil.copy(name, folder / f"{patient}_slice{i}.png")
    inputs = [tmp_path / "in", scans / "series"]
    counts = {"series": [1] * 6, "patient": [3], "folder": [3, 3]}
    for by, others in counts.items():
        out = tmp_path / by
        done = predicted(command, home / "Mine.pth", out, *inputs, "--group_by", by, "--kth", 2)
        assert "calibrated for single images" in done.stdout
        with (out / "groups.csv").open(newline="") as file:
            groups = list(csv.DictReader(file))
        stored = json.loads((out / "predictions.json").read_text())
        assert [group["group"] for group in stored["groups"]] == [group["group"] for group in groups]
        table = rows(out)
        slices = sum(bool(row["SeriesInstanceUID"]) for row in table)
        # PatientID of the series is P1 as well: it joins the files that name this patient.
        assert sorted(int(group["images"]) for group in groups) == sorted([*others, slices + 3 * (by == "patient")])
        members = [row for row in table if "P2_" in row["file"]]
        if by != "series":
            (group,) = (group for group in groups if "P2" in group["group"])
            scores = sorted((float(row["score"]) for row in members), reverse=True)
            assert float(group["largest"]) == scores[0]
            assert float(group["mean"]) == pytest.approx(np.mean(scores))
            assert float(group["percentile_95"]) == pytest.approx(np.percentile(scores, 95))
            assert (float(group["kth_largest"]), group["k"]) == (scores[1], "2")
            assert float(next(r for r in members if r["file"] == group["deciding_file"])["score"]) == scores[0]
            assert group["abnormal"] == str(scores[0] >= float(group["threshold"]))


def test_anonymous_results_name_no_one(command, home, scans, tmp_path):
    shutil.copy(home / "data/Brain_AD/test/good/img/test_good_00000.png", tmp_path / "Doe_Jane.png")
    inputs = [tmp_path / "Doe_Jane.png", tmp_path / "Doe_Jane.png", scans / "series", scans / "mni.nii.gz"]
    flags = ["--anonymous", "--group_by", "patient", "--report", tmp_path / "out/page"]
    done = predicted(command, home / "Mine.pth", tmp_path / "out", *inputs, *flags)
    # Whole names: three letters stand somewhere in many pixels.
    names = ["Doe_Jane", "Doe^Jane", "mni.nii", str(scans), str(tmp_path / "Doe")]
    header = dcmread(next((scans / "series").iterdir()))
    names += [header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID, header.SOPInstanceUID]
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(path.suffix == ".dcm" for path in written)
    for path in written:
        content = path.read_bytes().decode("latin1") + str(path.relative_to(tmp_path))
        assert not [name for name in names if name in content], path
    assert not [name for name in names if name in done.stdout + done.stderr]
    table = rows(tmp_path / "out")
    assert len({row["PatientID"] for row in table if row["PatientID"]}) == 1
    assert len({row["overlay"] for row in table}) == len(table)


def test_report_page(command, home, scans, tmp_path):
    image = home / "data/Brain_AD/test/good/img/test_good_00000.png"
    flags = ["--report", tmp_path / "page", "--no-pictures"]
    done = predicted(command, home / "Mine.pth", tmp_path / "out", scans / "series", image, *flags)
    page = (tmp_path / "page/index.html").read_text()
    assert f"report: {tmp_path / 'page/index.html'}" in done.stdout
    table = rows(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["predictions.csv", "predictions.json"]
    assert page.count("IM0000.dcm") >= 1
    assert f"{len(table)} images" in page
    assert "Research use, not a medical device" in page


def test_names_that_collide(command, home, tmp_path):
    image = Image.new("L", (40, 30), 90)
    for place in ("a/x.png", "b/x.png", "c/a/x.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / place)
    inputs = [tmp_path / "a/x.png", tmp_path / "b/x.png", tmp_path / "c", tmp_path]
    done = command("predict.py", "--ckpt", home / "Brain.pth", *inputs, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    names = [row["overlay"] for row in rows(tmp_path / "out")]
    assert len(set(names)) == len(names) == 6
    again = command("predict.py", "--ckpt", home / "Brain.pth", *inputs, "--out", tmp_path / "out")
    assert again.returncode == 0  # results of the first run are no input of the second
    assert len(rows(tmp_path / "out")) == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.png"], ["nowhere.png", "No such file"]),
        (["tests/golden"], ["tests/golden", "no image"]),
        (["docs/demo-brain.png", "--window", 10, 0], ["--window"]),
        (["docs/demo-brain.png", "--window", 10, "nan"], ["--window 10 nan"]),
        ([""], ["IMAGE_OR_FOLDER", "is empty"]),
        (["docs/demo-brain.png", "--threshold", "nan"], ["--threshold nan"]),
        (["docs/demo-brain.png", "--ckpt", "README.md"], ["README.md", "not a checkpoint"]),
        (["docs/demo-brain.png", "--out", "README.md"], ["--out README.md"]),
    ],
)
def test_refused(command, home, tmp_path, arguments, words):
    done = command("predict.py", "--ckpt", home / "Brain.pth", "--out", tmp_path, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr.splitlines()[-1] for word in words), done.stderr


def test_pipes_strange_files_and_several_pictures(command, home, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "notes.txt").write_text("x")
    pictures = [Image.new("L", (8, 8), shade) for shade in (10, 200)]
    pictures[0].save(tmp_path / "moving.png", save_all=True, append_images=pictures[1:])
    Image.new("1", (20000, 20000)).save(tmp_path / "huge.png")
    nearly = dicom("JPEGLSNearLossless_16.dcm")
    words = {
        tmp_path / "pipe.png": "a pipe, a socket or a device",
        tmp_path / "notes.txt": "not one of the formats",
        tmp_path / "moving.png": "holds 2 pictures",
        tmp_path / "huge.png": "more than 89,478,485 pixels",
        nearly: "no decoder for JPEG-LS",
    }
    ours = home / "data/Brain_AD/test/good/img/test_good_00000.png"
    done = command("predict.py", "--ckpt", home / "Brain.pth", *words, ours, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for path, reason in words.items():
        (line,) = [line for line in done.stderr.splitlines() if f"skipped: {path}" in line]
        assert reason in line
    assert len(rows(tmp_path / "out")) == 1


def test_a_missing_package_is_named_before_anything_is_done(home, tmp_path):
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/nibabel.py").write_text("raise ImportError('not here')")
    (tmp_path / "v.nii.gz").write_bytes(b"x")
    command = [sys.executable, "predict.py", "--ckpt", home / "Brain.pth", tmp_path / "v.nii.gz"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "out"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path / "stub")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().endswith("NIfTI needs nibabel: pip install nibabel")
    assert not (tmp_path / "out").exists()


def test_results_are_replaced_whole_or_not_at_all(command, home, tmp_path):
    whole = home / "data/Brain_AD/test/good/img/test_good_00000.png"
    out = tmp_path / "out"
    predicted(command, home / "Brain.pth", out, whole)
    before = [(out / f"predictions.{kind}").read_bytes() for kind in ("csv", "json")]
    with Image.open(whole) as image:
        image.resize((1500, 1500)).save(tmp_path / "large.png")  # its overlay is too large for the disk
    inputs = ["--batch_size", 1, whole, whole, tmp_path / "large.png"]
    done = command("predict.py", "--ckpt", home / "Brain.pth", *inputs, "--out", out, file_bytes=200_000)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "--out" in done.stderr.splitlines()[-1]
    assert before == [(out / f"predictions.{kind}").read_bytes() for kind in ("csv", "json")]
    with (out / "predictions.partial.csv").open(newline="") as file:  # what was predicted is not lost
        assert [row["file"] for row in csv.DictReader(file)] == [str(whole)] * 2
    predicted(command, home / "Brain.pth", out, *inputs)
    assert len(rows(out)) == len(json.loads((out / "predictions.json").read_text())["predictions"]) == 3
    assert not (out / "predictions.partial.csv").exists()


# Kills the process right before the n-th renaming onto predictions.csv or predictions.json.
KILLED = """
seen = 0
def hook(event, args):
    global seen
    if event == "os.rename" and str(args[1]).endswith(("predictions.csv", "predictions.json")):
        seen += 1
        if seen == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


def test_a_kill_between_the_files_leaves_no_pair_of_two_runs(command, home, tmp_path):
    images = home / "data/Brain_AD/test"
    for at in (1, 2):
        out = tmp_path / f"out{at}"
        predicted(command, home / "Brain.pth", out, images / "good/img")
        old = (out / "predictions.csv").read_bytes()
        flags = ["--ckpt", home / "Brain.pth", images / "Ungood/img", "--out", out]
        killed = command(driver(tmp_path, KILLED.format(at=at)), "predict.py", *flags)
        assert killed.returncode == -signal.SIGKILL
        is_old = (out / "predictions.csv").read_bytes() == old
        assert is_old == (at == 1)
        if (out / "predictions.json").exists():
            listed = json.loads((out / "predictions.json").read_text())["predictions"]
            assert [row["file"] for row in listed] == [row["file"] for row in rows(out)]


def test_masks_of_a_labelled_folder_are_no_input(command, home, tmp_path):
    test = home / "data/Brain_AD/test"
    done = predicted(command, home / "Brain.pth", tmp_path / "out", test)
    assert "files lie in folders of masks (anomaly_mask, label, labels, mask, masks, ground_truth)" in done.stderr
    assert len(rows(tmp_path / "out")) == len(list(test.glob("*/img/*.png")))
    # A folder of masks that is named itself is what its user wants to predict.
    predicted(command, home / "Brain.pth", tmp_path / "named", test / "Ungood/anomaly_mask")
    assert len(rows(tmp_path / "named")) == len(list(test.glob("Ungood/anomaly_mask/*.png")))


def test_its_own_pictures_are_no_input(command, home, scans, tmp_path):
    shutil.copytree(scans / "series", tmp_path / "in/series")
    shutil.copy(scans / "mni.nii.gz", tmp_path / "in")
    shutil.copy(home / "data/Brain_AD/test/good/img/test_good_00000.png", tmp_path / "in")
    predicted(command, home / "Mine.pth", tmp_path / "in", tmp_path / "in")
    first = rows(tmp_path / "in")
    for inputs in ([tmp_path / "in"], sorted((tmp_path / "in").iterdir())):  # the folder; as the shell writes in/*
        done = predicted(command, home / "Mine.pth", tmp_path / "in", *inputs)
        assert "results of an earlier run, and left out" in done.stderr
        assert sorted(row["file"] for row in rows(tmp_path / "in")) == sorted(row["file"] for row in first)
    # Pictures of one's own that lie in the folder of the results are predicted.
    (tmp_path / "in/results").mkdir()
    shutil.copy(home / "data/Brain_AD/test/good/img/test_good_00001.png", tmp_path / "in/results")
    predicted(command, home / "Mine.pth", tmp_path / "in/results", tmp_path / "in")
    assert len(rows(tmp_path / "in/results")) == len(first) + 1


def test_names_and_folders_that_cannot_be_used_as_they_are(command, home, tmp_path):
    image = home / "data/Brain_AD/test/good/img/test_good_00000.png"
    (tmp_path / "in/closed").mkdir(parents=True)
    names = ["病" * 83 + ".png", "\x1b[31mred.png", os.fsdecode(b"\xff.png")]
    for name in names:
        shutil.copy(image, tmp_path / "in" / name)
    flags = ["--ckpt", home / "Brain.pth", tmp_path / "in", "--out", tmp_path / "out"]
    done = command(driver(tmp_path, CLOSED), "predict.py", *flags)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "\x1b[31m" not in done.stderr + (tmp_path / "out/predictions.csv").read_text()
    assert f"skipped: {tmp_path / 'in/closed'}: cannot be read: Permission denied" in done.stderr
    table = rows(tmp_path / "out")
    assert len(table) == 3
    assert all((tmp_path / "out" / row[kind]).is_file() for row in table for kind in ("overlay", "raw", "contours"))


@pytest.mark.parametrize(("side", "counts"), [(512, (10, 120)), (2400, (4, 24))])
def test_memory_does_not_grow_with_the_images(command, home, tmp_path, side, counts):
    Image.linear_gradient("L").resize((side, side)).save(tmp_path / "image.png")
    peaks = []
    for many in counts:
        folder = tmp_path / str(many)
        folder.mkdir()
        for i in range(many):
            (folder / f"{i}.png").symlink_to(tmp_path / "image.png")
        flags = ["--ckpt", home / "Brain.pth", "--batch_size", 4, folder, "--out", tmp_path / "out"]
        peaks.append(int(fine(command(driver(tmp_path, PEAK), "predict.py", *flags)).split("peak ")[1]))
    grown = (counts[1] - counts[0]) * 3 * side * side / 1024  # kB, if the pixels were kept
    assert peaks[1] - peaks[0] < grown / 3


def test_published_format(command, home, tmp_path):
    published = tmp_path / "Brain.pth"
    assert command("engine.checkpoint", "export", home / "Brain.pth", published).returncode == 0
    image = home / "data/Brain_AD/test/good/img/test_good_00000.png"
    model = load(published, "cpu", pretrain="random", img_size=42)
    ours = load(home / "Brain.pth", "cpu")
    assert model.threshold is None
    assert model.predict(image)[0].abnormal is None
    assert model.predict(image)[0].score == pytest.approx(ours.predict(image)[0].score, abs=1e-6)


def test_python_api(home):
    model = load(home / "Brain.pth", "cpu")
    path = home / "data/Brain_AD/test/Ungood/img/test_Ungood_00000.png"
    with Image.open(path) as opened:
        image = opened.convert("L")
    by_path, by_image, by_array, by_float = model.predict([path, image, np.asarray(image), np.asarray(image) / 255.0])
    assert by_path.score == by_image.score == by_array.score == by_float.score
    assert by_path.abnormal == (by_path.score >= model.threshold)
    assert by_path.heat.shape == (42, 42)
    assert by_path.heat.dtype == np.float32
    assert by_path.heat.max() == pytest.approx(by_path.score)
    assert by_path.size == (64, 64)
    alone = model.predict([path] * 5, batch_size=2)
    assert [found.score for found in alone] == pytest.approx([by_path.score] * 5, abs=1e-6)
    stacked = np.stack([np.asarray(image.convert("RGB"))] * 3)
    for many in (iter([path] * 3), stacked):  # a generator, such as Path.glob gives; (B, H, W, 3)
        assert [found.score for found in model.predict(many, 2)] == pytest.approx([by_path.score] * 3, abs=1e-6)
    assert model.predict([]) == []
    for size in (0, -1):
        with pytest.raises(ValueError, match="batch_size"):
            model.predict(path, size)
    with pytest.raises(TypeError, match="no_such_flag"):
        load(home / "Brain.pth", no_such_flag=1)
    assert (ROOT / "predict.py").is_file()
