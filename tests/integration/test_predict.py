"""predict.py and the Python API on real files: phantom PNGs, DICOM files of pydicom, the MNI template of nilearn."""

import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom import data as pydicom_data
from pydicom import dcmread

from dataset.medical_few import MedicalDataset
from engine import InputError, load
from engine.evaluation import Masks
from engine.files.checkpoint import Checkpoint
from tests.helpers.commands import Call, fine, read_json, refused, rows
from tests.helpers.data import small_settings
from tests.helpers.scans import dicom_series, mni

GOOD, UNGOOD = "Brain_AD/test/good/img", "Brain_AD/test/Ungood/img"


@pytest.fixture(scope="module")
def ckpts(trained, tmp_path_factory) -> Path:
    """Checkpoints: Brain.pth with masks, Chest.pth without; Mine.pth is Brain renamed."""
    path = tmp_path_factory.mktemp("ckpts")
    for obj in ("Brain", "Chest"):
        shutil.copy(trained.ckpt / f"{obj}.pth", path)
    changed(path / "Brain.pth", path / "Mine.pth", obj="Mine")
    return path


@pytest.fixture(scope="module")
def image(phantoms) -> Path:
    return sorted((phantoms / GOOD).iterdir())[0]


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """The MNI template with 8 mm voxels, with thick slices and reversed axes, and as a DICOM series."""
    path = tmp_path_factory.mktemp("scans")
    dicom_series(path / "series", mni(path / "mni.nii.gz", (8.0, 8.0, 8.0)), shuffle=1)
    mni(path / "thick.nii.gz", (8.0, 8.0, 32.0), "LSP")
    return path


def changed(source: Path, path: Path, metadata: dict[str, object] | None = None, **settings: object) -> Path:
    """Write a copy of a checkpoint with other settings or metadata."""
    old = Checkpoint.load(source)
    Checkpoint(replace(old.settings, **settings), old.parts, {**old.metadata, **(metadata or {})}).save(path)
    return path


def predicted(command, ckpt: Path, out: Path, *arguments: object, code: int = 0, **how: object):
    done = command("predict.py", "--ckpt", ckpt, *arguments, "--out", out, "--device", "cpu", **how)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def dicom(name: str) -> str:
    path = pydicom_data.get_testdata_file(name, download=False)
    assert path, f"pydicom ships no {name}"
    return path


def raw(out: Path, row: dict[str, str]) -> np.ndarray:
    """The heat map of an image, (S, S) in [0, 4], as there are K = 4 layers."""
    with Image.open(out / row["raw"]) as image:
        return np.asarray(image).astype(np.float32) / 65535 * 4


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.mark.equality
def test_scores_equal_those_of_test_py(command, ckpts, trained, tmp_path):
    done = predicted(command, ckpts / "Brain.pth", tmp_path, trained.data / GOOD, trained.data / UNGOOD)
    assert "not a medical device" in done.stdout
    expected = trained.result("Brain")
    found = {Path(row["file"]).name: row for row in rows(tmp_path)}
    assert len(found) == len(expected["per_image"]) == 14
    threshold = expected["decision"]["value"]
    abnormal = sum(image["score"] >= threshold for image in expected["per_image"])
    assert f"{abnormal} of 14 images abnormal" in done.stdout
    for image in expected["per_image"]:
        row = found[Path(image["file"]).name]
        assert float(row["score"]) == pytest.approx(image["score"], abs=1e-5)
        assert (float(row["threshold"]), row["abnormal"]) == (threshold, str(image["score"] >= threshold))
        heat = raw(tmp_path, row)
        assert heat.shape == (42, 42)
        assert heat.max() == pytest.approx(float(row["score"]), abs=1e-4)  # with masks the score is the maximum
        assert size(tmp_path / row["overlay"]) == (64, 64)
        outlines = read_json(tmp_path / row["contours"])
        assert outlines["pixel_threshold"] == expected["decision"]["pixel_value"]
        assert sum(region["area"] > 0 for region in outlines["regions"]) == int(row["regions"])
    stored = read_json(tmp_path / "predictions.json")
    assert [str(row["score"]) for row in stored["predictions"]] == [row["score"] for row in rows(tmp_path)]


def test_without_masks_scores_equal_test_py_and_heat_maps_are_weak(command, ckpts, trained, tmp_path):
    done = predicted(command, ckpts / "Chest.pth", tmp_path, trained.data / "Chest_AD/test")
    expected = {Path(image["file"]).name: image["score"] for image in trained.result("Chest")["per_image"]}
    assert {Path(row["file"]).name: float(row["score"]) for row in rows(tmp_path)} == pytest.approx(expected, abs=1e-5)
    assert "weak localisation" in done.stdout and "weak" in read_json(tmp_path / "predictions.json")["heat"]
    assert {row["regions"] for row in rows(tmp_path)} == {"0"}


# --- thresholds ---


def test_threshold_missing_given_and_calibrated(command, ckpts, trained, image, tmp_path):
    bare = changed(ckpts / "Mine.pth", tmp_path / "bare.pth", {"threshold": None})
    predicted(command, bare, tmp_path / "a", image)
    assert rows(tmp_path / "a")[0]["abnormal"] == ""
    predicted(command, bare, tmp_path / "b", image, "--threshold", 0.1)
    assert rows(tmp_path / "b")[0]["abnormal"] == "True"

    # Labelled images without a JSON description and without masks: only normal/ and abnormal/.
    for kind, name in ((GOOD, "normal"), (UNGOOD, "abnormal")):
        shutil.copytree(trained.data / kind, tmp_path / "labelled" / name)
    flags = ["--ckpt", bare, "--calibrate", tmp_path / "labelled"]
    fine(command("predict.py", *flags, "--threshold_at", "tpr=1", "--save_ckpt", tmp_path / "new.pth"))
    scores = {image["file"]: image["score"] for image in trained.result("Brain")["per_image"]}
    lowest = min(score for file, score in scores.items() if "Ungood" in file)
    below = max([score for score in scores.values() if score < lowest], default=lowest)
    stored = Checkpoint.load(tmp_path / "new.pth").metadata["threshold"]
    assert stored["value"] == pytest.approx((lowest + below) / 2, abs=1e-5)
    assert "pixel_value" not in stored
    predicted(command, tmp_path / "new.pth", tmp_path / "c", image)
    assert float(rows(tmp_path / "c")[0]["threshold"]) == stored["value"]


def test_calibration_uses_mask_above_of_its_data_set(ckpts, trained, tmp_path):
    root = Path(shutil.copytree(trained.data / "Brain_AD", tmp_path / "Brain_AD"))
    for path in root.rglob("anomaly_mask/*.png"):
        Image.open(path).point(lambda grey: grey * 100 // 255).save(path)  # nothing is above 127, the checkpoint's
    dataset = MedicalDataset.open("Brain", tmp_path, root, mask_above=50)
    model = load(ckpts / "Brain.pth", "cpu")
    model.calibrate(dataset, "f1")
    samples = [sample for split in ("valid", "test") for sample in dataset.samples(split)]
    results = list(model.predict([sample.path for sample in samples]))
    truth = Masks.of(samples, small_settings(mask_above=50)).get(slice(None)).numpy()
    called = np.stack([result.heat for result in results]) >= model.pixel_threshold
    f1 = 2 * (called & truth).sum() / (called.sum() + truth.sum())
    others = [np.stack([r.heat for r in results]) >= value for value in np.linspace(0, 4, 200)]
    assert f1 >= max(2 * (other & truth).sum() / (other.sum() + truth.sum()) for other in others) - 1e-6


# --- reading ---


def test_dicom_images_objects_without_an_image_and_damaged_files(command, ckpts, tmp_path):
    good, none = ["CT_small.dcm", "examples_palette.dcm", "SC_rgb_rle_2frame.dcm"], ["rtplan.dcm", "rtdose.dcm"]
    predicted(command, ckpts / "Mine.pth", tmp_path / "a", *map(dicom, (*good, *none)))
    assert len(read_json(tmp_path / "a/predictions.json")["no_image"]) == 2
    found = {(Path(row["file"]).name, row["frame"]): row for row in rows(tmp_path / "a")}
    assert set(found) == {(name, "") for name in good[:2]} | {(good[2], "0"), (good[2], "1")}
    header, row = dcmread(dicom("CT_small.dcm")), found["CT_small.dcm", ""]
    for name in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "InstanceNumber"):
        assert row[name] == str(header[name].value)
    assert float(row["slice_position"]) == pytest.approx(header.ImagePositionPatient[2], abs=1e-3)
    assert (row["plane"], row["orientation"]) == ("axial", "left R, right L, top A, bottom P")

    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    header = dcmread(dicom(good[2]))
    header.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.81"  # claims near-lossless JPEG-LS, which is wrong
    header.save_as(tmp_path / "many.dcm")
    bad = [dicom("MR_truncated.dcm"), *(tmp_path / name for name in ("broken.png", "missing.png", "many.dcm"))]
    done = predicted(command, ckpts / "Mine.pth", tmp_path / "b", dicom(good[0]), *bad, code=1)
    for path in bad:
        assert sum(Path(path).name in line for line in done.stderr.splitlines()) == 1
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").glob("predictions.*")}
    flags = ["--ckpt", ckpts / "Mine.pth", "--out", tmp_path / "b"]
    for name in ("rtplan.dcm", "JPEGLSNearLossless_16.dcm"):  # has no image; has no decoder
        refused(command("predict.py", *flags, dicom(name)), "image")
    assert before == {name: (tmp_path / "b" / name).read_bytes() for name in before}  # not replaced by an empty table
    assert not (tmp_path / "b/predictions.partial.jsonl").exists()
    done = command("predict.py", "--debug", *flags, dicom(good[0]), bad[1])
    assert (done.returncode, done.stderr.count("Traceback (most recent call last)") > 0) == (1, True)


def test_images_are_read_as_in_training_by_default(command, ckpts, image, tmp_path):
    scan = dicom("CT_small.dcm")
    done = predicted(command, ckpts / "Brain.pth", tmp_path / "a", scan)
    assert "trained on picture files, not on DICOM" in done.stderr
    reading = {"window": [40.0, 400.0], "plane": "coronal", "formats": ["dicom"]}
    ct = changed(ckpts / "Mine.pth", tmp_path / "ct.pth", reading=reading)
    assert "warning" not in predicted(command, ct, tmp_path / "b", scan).stderr
    changed(ct, tmp_path / "Brain.pth", obj="Brain")  # custom data may have the name of a benchmark
    assert "warning" not in predicted(command, tmp_path / "Brain.pth", tmp_path / "b", scan).stderr
    predicted(command, ckpts / "Mine.pth", tmp_path / "c", scan, "--window", 40, 400)
    assert rows(tmp_path / "b")[0]["score"] == rows(tmp_path / "c")[0]["score"]
    other = predicted(command, ct, tmp_path / "d", "--window", "full", scan)  # an image may follow --window
    assert "warning: --window full, but training read images with (40.0, 400.0)" in other.stderr
    assert rows(tmp_path / "d")[0]["score"] != rows(tmp_path / "c")[0]["score"]
    assert "trained on DICOM files, not on picture" in predicted(command, ct, tmp_path / "e", image).stderr
    assert str(load(ct, "cpu").predict(scan).score) == rows(tmp_path / "b")[0]["score"]


def test_a_volume_of_thick_slices(command, ckpts, scans, tmp_path):
    """Coronal slices of a file with other axes; other planes are tested in tests/unit/test_scans.py."""
    done = predicted(command, ckpts / "Mine.pth", tmp_path, scans / "thick.nii.gz", "--plane", "coronal")
    wide, deep, high = nibabel.as_closest_canonical(nibabel.load(scans / "thick.nii.gz")).shape
    table = rows(tmp_path)
    assert f" of 1 series, {sum(row['abnormal'] == 'True' for row in table)} of {deep} images" in done.stdout
    assert {(row["plane"], int(row["width"]), int(row["height"])) for row in table} == {("coronal", wide, high)}
    assert {row["orientation"] for row in table} == {"left R, right L, top S, bottom I"}
    np.testing.assert_allclose(np.diff([float(row["slice_position"]) for row in table]), 8)
    outlines = [read_json(tmp_path / row["contours"]) for row in table]
    assert {(outline["width"], outline["height"]) for outline in outlines} == {(wide, high)}
    points = np.array([point for outline in outlines for region in outline["regions"] for point in region["points"]])
    assert points.min() >= 0
    assert (points.max(axis=0) <= (wide, high)).all()  # pixels of the file, not the square pixels that are shown
    picture = size(tmp_path / table[0]["overlay"])
    assert picture[1] / picture[0] == pytest.approx(4 * high / wide, rel=0.02)


# --- results ---


def test_scores_of_groups(command, ckpts, scans, trained, tmp_path):
    for place, source in enumerate(sorted((trained.data / UNGOOD).iterdir())[:6]):
        path = tmp_path / "in" / f"P{1 + place // 3}" / f"P{1 + place // 3}_slice{place % 3}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, path)
    shutil.copytree(scans / "series", tmp_path / "series")
    for path in (tmp_path / "series").iterdir():
        header = dcmread(path)
        header.SeriesDescription = "T1 axial"
        header.save_as(path)
    inputs = [tmp_path / "in", tmp_path / "series", "--group_by", "patient"]
    done = predicted(command, ckpts / "Mine.pth", tmp_path, *inputs)
    assert re.search(r" of 1 patients, \d+ of 1 series, \d+ of \d+ images abnormal", done.stdout)
    groups, found = rows(tmp_path / "groups.csv"), rows(tmp_path)
    stored = read_json(tmp_path / "predictions.json")["groups"]
    assert [group["group"] for group in stored] == [group["group"] for group in groups]
    # The PatientID of the series is P1, too, so it joins the files named after this patient.
    slices = sum(bool(row["SeriesInstanceUID"]) for row in found)
    (of_series,) = (group for group in groups if group["PatientID"])
    assert (of_series["PatientID"], of_series["description"]) == ("P1", "T1 axial")
    (other,) = (group for group in groups if not group["PatientID"])
    assert (int(of_series["images"]), int(other["images"])) == (slices + 3, 3)
    members = [row for row in found if "P2_" in row["file"]]
    scores = [float(row["score"]) for row in members]
    assert float(other["largest"]) == max(scores)
    assert float(other["mean"]) == pytest.approx(np.mean(scores))
    assert float(other["percentile_95"]) == pytest.approx(np.percentile(scores, 95))
    assert other["deciding_file"] == members[int(np.argmax(scores))]["file"]
    assert other["abnormal"] == str(max(scores) >= float(other["threshold"]))


def test_anonymous_results_contain_no_names(command, ckpts, scans, image, tmp_path):
    shutil.copy(image, tmp_path / "Doe_Jane.png")
    inputs = [tmp_path / "Doe_Jane.png", tmp_path / "Doe_Jane.png", scans / "series", scans / "mni.nii.gz"]
    flags = ["--anonymous", "--group_by", "patient", "--report", tmp_path / "out/page"]
    done = predicted(command, ckpts / "Mine.pth", tmp_path / "out", *inputs, *flags)
    # Only long names: three letters occur by chance in image data.
    names = ["Doe_Jane", "Doe^Jane", "of Jane", "mni.nii", str(scans), str(tmp_path / "Doe")]
    header = dcmread(next((scans / "series").iterdir()))
    names += [header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID, header.SOPInstanceUID]
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(path.suffix == ".dcm" for path in written)
    for path in written:
        content = path.read_bytes().decode("latin1") + str(path.relative_to(tmp_path))
        assert not [name for name in names if name in content], path
    assert not [name for name in names if name in done.stdout + done.stderr]
    found = rows(tmp_path / "out")
    assert {row["PatientID"] for row in found if row["PatientID"]} == {"patient-00001"}  # a hash could be guessed
    assert len({row["overlay"] for row in found}) == len(found)


def test_report_page(command, ckpts, scans, image, tmp_path):
    flags = ["--report", tmp_path / "page", "--no-pictures"]
    predicted(command, ckpts / "Mine.pth", tmp_path / "out", scans / "series", image, *flags)
    page = (tmp_path / "page/index.html").read_text()
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found - {".predict.lock"} == {"predictions.csv", "predictions.json"}
    assert f"<title>series, {image.name}" in page
    count = len(rows(tmp_path / "out")) - 1
    places = [page.find(f"slice {number} of {count}") for number in range(1, count + 1)]
    assert places[0] > -1 and places == sorted(places)
    assert page.count("images abnormal") == 1
    for group in (["--group_by", "folder"], []):
        predicted(command, ckpts / "Mine.pth", tmp_path / "out", image, *group)
    assert not (tmp_path / "out/groups.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tests/golden"], ["tests/golden"]),
        (["docs/demo.jpg", "--window", 10, 0], ["--window"]),
        (["docs/demo.jpg", "--out", "README.md"], ["--out README.md"]),
        (["docs/demo.jpg", "--threshold", 1, "--calibrate", "x"], ["--threshold", "--calibrate"]),
    ],
)
def test_bad_arguments_are_refused(command, ckpts, tmp_path, arguments, words):
    refused(command("predict.py", "--ckpt", ckpts / "Brain.pth", "--out", tmp_path, *arguments), *words)


# --- interrupted, concurrent and repeated runs ---


def test_killed_batch_resumes_with_the_same_results(command, ckpts, scans, trained, tmp_path):
    inputs = [trained.data / GOOD, scans / "mni.nii.gz", scans / "series", "--report", tmp_path / "page"]
    predicted(command, ckpts / "Mine.pth", tmp_path / "whole", *inputs)
    page = (tmp_path / "page/index.html").read_text()
    out = tmp_path / "out"
    predicted(command, ckpts / "Mine.pth", out, trained.data / UNGOOD)
    older = (out / "predictions.csv").read_bytes()
    arguments = ["predict.py", "--ckpt", ckpts / "Mine.pth", *inputs, "--out", out, "--device", "cpu"]
    killed = command(*arguments, on=(Call("engine.report.predictions.Results.add", 9), signal.SIGKILL))
    assert killed.returncode == -signal.SIGKILL  # 7 images and the NIfTI volume are done
    assert (out / "predictions.csv").read_bytes() == older
    with (out / "predictions.partial.jsonl").open("a") as file:
        file.write('{"key": "cut sh')
    done = predicted(command, ckpts / "Mine.pth", out, *inputs)
    series = len(list((scans / "series").iterdir()))
    assert f"{series}/{series}" in done.stderr  # only the remaining images are computed
    expected, found = rows(tmp_path / "whole"), rows(out)
    assert len(found) == len(expected)
    for row, other in zip(expected, found, strict=True):
        scores = float(row.pop("score")), float(other.pop("score"))
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
        assert row == other
        assert (out / row["overlay"]).is_file()
        assert (out / (row["heat_volume"] or row["overlay"])).is_file()
    assert (tmp_path / "page/index.html").read_text().count("<img") == page.count("<img")
    assert not (out / "predictions.partial.jsonl").exists()


def test_partial_results_of_changed_files_are_dropped(command, ckpts, image, tmp_path):
    shutil.copy(image, tmp_path / "a.png")
    flags = ["--ckpt", ckpts / "Mine.pth", tmp_path / "a.png", "--device", "cpu", "--out", tmp_path / "out"]
    command("predict.py", *flags, on=(Call("engine.report.predictions.Results.close"), signal.SIGKILL))
    assert len((tmp_path / "out/predictions.partial.jsonl").read_text().splitlines()) == 2
    Image.new("RGB", (30, 20), "white").save(tmp_path / "a.png")
    fine(command("predict.py", *flags))
    assert [row["width"] for row in rows(tmp_path / "out")] == ["30"]


def test_second_process_in_the_same_folder_is_refused(command, ckpts, image, trained, tmp_path):
    flags = ["--ckpt", ckpts / "Brain.pth", "--device", "cpu", "--out", tmp_path]
    first = command.start("predict.py", *flags, trained.data / GOOD, on=(Call("predict.predict"), signal.SIGSTOP))
    first.stopped()
    refused(command("predict.py", *flags, image), f"--out {tmp_path}", "another predict.py")
    first.go()
    fine(first.wait())
    assert len(rows(tmp_path)) == 7
    predicted(command, ckpts / "Brain.pth", tmp_path, image)


# --- folders ---


def test_masks_in_folders_are_skipped(command, ckpts, trained, tmp_path):
    test = trained.data / "Brain_AD/test"
    done = predicted(command, ckpts / "Brain.pth", tmp_path / "out", test)
    assert "7 files are masks" in done.stderr
    assert len(rows(tmp_path / "out")) == len(list(test.glob("*/img/*.png")))
    for name in ("benign (1).png", "benign (1)_mask.png", "benign (1)_mask_1.png", "alone_seg.png"):  # as in BUSI
        (tmp_path / "busi").mkdir(exist_ok=True)
        Image.new("L", (20, 20), 90).save(tmp_path / "busi" / name)
    done = predicted(command, ckpts / "Brain.pth", tmp_path / "beside", tmp_path / "busi")
    assert "2 files are masks" in done.stderr
    assert "alone_seg.png" in done.stderr  # a mask without its image is reported
    assert {Path(row["file"]).name for row in rows(tmp_path / "beside")} == {"benign (1).png"}
    # Masks that the user names explicitly are predicted.
    named = [test / "Ungood/anomaly_mask", tmp_path / "busi/alone_seg.png"]
    predicted(command, ckpts / "Brain.pth", tmp_path / "named", *named)
    assert len(rows(tmp_path / "named")) == 8


def test_own_results_are_skipped(command, ckpts, scans, image, tmp_path):
    shutil.copytree(scans / "series", tmp_path / "in/series")
    shutil.copy(scans / "mni.nii.gz", tmp_path / "in")
    shutil.copy(image, tmp_path / "in")
    predicted(command, ckpts / "Mine.pth", tmp_path / "in", tmp_path / "in")
    first = sorted(row["file"] for row in rows(tmp_path / "in"))
    predicted(command, ckpts / "Mine.pth", tmp_path / "in", *sorted((tmp_path / "in").iterdir()))  # as a shell's in/*
    assert sorted(row["file"] for row in rows(tmp_path / "in")) == first


def test_unusual_file_names(command, ckpts, image, tmp_path):
    (tmp_path / "in/a").mkdir(parents=True)
    for name in ["病" * 83 + ".png", "\x1b[31mred.png", os.fsdecode(b"\xff.png"), "a/b.png", "a__b.png", "-x.png"]:
        shutil.copy(image, tmp_path / "in" / name)
    flags = ["--ckpt", ckpts / "Brain.pth", tmp_path / "in", "--out", tmp_path / "out", "--report", tmp_path / "page"]
    done = command("predict.py", *flags)
    fine(done)
    assert "\x1b[31m" not in done.stderr + (tmp_path / "out/predictions.csv").read_text()
    found = rows(tmp_path / "out")
    assert len({row["overlay"] for row in found}) == 6
    assert all((tmp_path / "out" / row[kind]).is_file() for row in found for kind in ("overlay", "raw", "contours"))


# --- from Python ---


def test_python_api(ckpts, image):
    model = load(ckpts / "Brain.pth", "cpu")
    grey = np.asarray(Image.open(image).convert("L"))
    one = model.predict(image)
    for same in (Image.fromarray(grey), grey, grey / 255.0, str(image)):
        assert model.predict(same).score == one.score
    assert one.decision == (one.score >= model.threshold)
    assert (one.heat.shape, one.heat.dtype, one.size) == ((42, 42), np.float32, (64, 64))
    assert one.heat.max() == pytest.approx(one.score)
    wide = model.predict(np.asarray(Image.fromarray(grey).resize((90, 30))))
    assert (wide.size, wide.map.shape) == ((90, 30), (30, 90))
    stacked = np.stack([np.asarray(Image.fromarray(grey).convert("RGB"))] * 3)
    for many in (iter([image] * 3), stacked):  # a generator, such as Path.glob gives; (B, H, W, 3)
        assert [result.score for result in model.predict(many, 2)] == pytest.approx([one.score] * 3, abs=1e-6)


def test_one_bad_image_does_not_lose_a_batch(ckpts, image, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n")
    model = load(ckpts / "Brain.pth", "cpu")
    cut = Image.open(BytesIO(image.read_bytes()[:900]))  # not decoded yet
    for bad in (tmp_path / "bad.png", np.full((4, 4), np.nan), np.zeros((2, 2, 5)), cut):
        good, error, after = model.predict([image, bad, image])
        assert good.score == pytest.approx(after.score, abs=1e-6)
        assert isinstance(error, InputError)
    with pytest.raises(InputError, match=r"bad\.png"):
        model.predict(tmp_path / "bad.png")


def test_volumes_and_multi_frame_files_return_all_slices(command, ckpts, scans, image, tmp_path):
    predicted(command, ckpts / "Mine.pth", tmp_path / "out", scans / "mni.nii.gz", "--no-pictures")
    found = rows(tmp_path / "out")
    model = load(ckpts / "Mine.pth", "cpu")
    before, volume, frames = model.predict([image, scans / "mni.nii.gz", dicom("SC_rgb_rle_2frame.dcm")])
    assert not before.slices
    assert [part.score for part in volume.slices] == pytest.approx([float(row["score"]) for row in found], abs=1e-5)
    assert volume.score == max(part.score for part in volume.slices)
    height, width = int(found[0]["height"]), int(found[0]["width"])
    assert volume.map.shape == (len(found), height, width)
    assert volume.heat.shape == (len(found), 42, 42)
    assert (len(frames.slices), frames.score) == (2, max(part.score for part in frames.slices))


def test_threads_share_a_model(ckpts, trained):
    model = load(ckpts / "Brain.pth", "cpu")
    images = sorted((trained.data / UNGOOD).iterdir())
    expected = [model.predict(image).score for image in images]
    with ThreadPoolExecutor(4) as pool:
        assert [found.score for found in pool.map(model.predict, images * 4)] == expected * 4
