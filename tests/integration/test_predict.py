"""predict.py and the Python API on real files: phantom PNGs, pydicom's DICOM files, the MNI template of nilearn."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import phantom
from engine import load
from tests.helpers.commands import ROOT

pydicom_data = pytest.importorskip("pydicom.data")
SMALL = ["--model_name", "ViT-tiny-14-56", "--pretrain", "random", "--img_size", 56, "--device", "cpu"]


@pytest.fixture(scope="module")
def home(command, tmp_path_factory) -> Path:
    """Data, and checkpoints trained on them: Brain with masks, Chest without, Brain4.pth with no image left over."""
    path = tmp_path_factory.mktemp("home")
    phantom.write(path / "data", ["Brain", "Chest"], valid=4, test=6, seed=0, size=64)
    for obj, shot in (("Brain", 4), ("Brain", 2), ("Chest", 2)):
        flags = ["--obj", obj, "--data_path", path / "data", "--save_path", path, "--shot", shot, "--epoch", 2]
        done = command("train.py", *SMALL, *flags, "--cache_dtype", "float32", "--out_json", path / f"{obj}{shot}.json")
        assert done.returncode == 0, done.stderr
        shutil.copy(path / f"{obj}.pth", path / f"{obj}{shot}.pth")
    return path


def dicom(name: str) -> str:
    path = pydicom_data.get_testdata_file(name, download=False)
    assert path, f"pydicom ships no {name}"
    return path


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_scores_of_the_test_program(command, home, tmp_path):
    images = home / "data/Brain_AD/test"
    done = command(
        "predict.py", "--ckpt", home / "Brain2.pth", images / "good/img", images / "Ungood/img", "--out", tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "not a medical device" in done.stdout
    assert "images a second" in done.stdout
    expected = json.loads((home / "Brain2.json").read_text())
    found = {Path(row["file"]).name: row for row in rows(tmp_path)}
    assert len(found) == len(expected["per_image"]) == 12
    threshold = expected["decision"]["value"]
    for image in expected["per_image"]:
        row = found[Path(image["file"]).name]
        assert float(row["score"]) == pytest.approx(image["score"], abs=1e-5)
        assert float(row["threshold"]) == threshold
        assert row["abnormal"] == str(image["score"] >= threshold)

        heat = np.asarray(Image.open(tmp_path / row["raw"])).astype(np.float64) / 65535 * 4  # K = 4 layers
        assert heat.shape == (56, 56)
        assert heat.max() == pytest.approx(float(row["score"]), abs=1e-4)  # with masks an image scores as its peak
        with Image.open(tmp_path / row["overlay"]) as overlay:
            assert overlay.size == (64, 64)
        outlines = json.loads((tmp_path / row["contours"]).read_text())
        assert outlines["pixel_threshold"] == expected["decision"]["pixel_value"]
        assert sum(region["area"] > 0 for region in outlines["regions"]) == int(row["regions"])
    stored = json.loads((tmp_path / "predictions.json").read_text())
    assert [str(row["score"]) for row in stored["predictions"]] == [row["score"] for row in rows(tmp_path)]


def test_thresholds_of_a_training(home):
    two, four, chest = (
        json.loads((home / f"{name}.json").read_text())["decision"] for name in ("Brain2", "Brain4", "Chest2")
    )
    assert "no shots" in two["from"]
    assert two["figures"]["n_abnormal"] == two["figures"]["n_normal"] == 2
    assert "augmented views" in four["from"]  # nothing is left of valid/
    assert four["figures"]["n_abnormal"] == 64
    assert "pixel_value" in two
    assert "pixel_value" not in chest


def test_a_checkpoint_without_masks_or_threshold(command, home, tmp_path):
    image = home / "data/Chest_AD/test/good/img/test_good_00000.png"
    done = command("predict.py", "--ckpt", home / "Chest2.pth", image, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "heat maps: none" in done.stdout
    assert [path.name for path in sorted((tmp_path / "a").iterdir())] == ["predictions.csv", "predictions.json"]
    flags = ["--obj", "Brain", "--data_path", home / "data", "--save_path", tmp_path, "--shot_abnormal", 0, "--shot", 4]
    trained = command("train.py", *SMALL, *flags, "--epoch", 1, "--threshold_at", "fpr=0.25")
    assert trained.returncode == 0, trained.stderr
    assert "a false positive rate of at most 0.25" in trained.stdout
    trained = command("train.py", *SMALL, *flags, "--epoch", 1)
    assert "threshold:  none" in trained.stdout
    done = command("predict.py", "--ckpt", tmp_path / "Brain.pth", image, "--out", tmp_path / "b")
    assert "decisions: none" in done.stdout
    assert rows(tmp_path / "b")[0]["abnormal"] == ""
    done = command("predict.py", "--ckpt", tmp_path / "Brain.pth", image, "--out", tmp_path / "c", "--threshold", 0.1)
    assert rows(tmp_path / "c")[0]["abnormal"] == "True"


def test_dicom_files_and_damaged_ones(command, home, tmp_path):
    good = ["CT_small.dcm", "MR_small.dcm", "examples_palette.dcm", "SC_rgb_rle_2frame.dcm", "rtdose.dcm"]
    bad = ["rtplan.dcm", "MR_truncated.dcm"]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    paths = [*map(dicom, good), *map(dicom, bad), tmp_path / "broken.png", tmp_path / "missing.png"]
    done = command("predict.py", "--ckpt", home / "Brain2.pth", *paths, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for name in (*bad, "broken.png", "missing.png"):
        assert f"{name}: " in done.stderr
    assert "could not be read" in done.stderr.splitlines()[-1]
    frames = {(Path(row["file"]).name, row["frame"]) for row in rows(tmp_path / "out")}
    assert {("CT_small.dcm", ""), ("SC_rgb_rle_2frame.dcm", "0"), ("SC_rgb_rle_2frame.dcm", "1")} <= frames
    assert sum(name == "rtdose.dcm" for name, _ in frames) == 15
    assert all((tmp_path / "out" / row["overlay"]).is_file() for row in rows(tmp_path / "out"))

    scores = [rows(tmp_path / "out")[0]["score"]]
    done = command(
        "predict.py", "--ckpt", home / "Brain2.pth", paths[0], "--window", 40, 80, "--out", tmp_path / "window"
    )
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "window")[0]["score"] != scores[0]


def test_slices_of_the_mni_template(command, home, tmp_path):
    template = pytest.importorskip("nilearn.datasets").load_mni152_template(resolution=10)
    template.to_filename(tmp_path / "mni.nii.gz")
    for plane, axis in (("axial", 2), ("sagittal", 0)):
        done = command("predict.py", "--ckpt", home / "Brain2.pth", tmp_path / "mni.nii.gz", "--plane", plane,
                       "--out", tmp_path / plane)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert len(rows(tmp_path / plane)) == template.shape[axis]
    first = rows(tmp_path / "axial")[0]
    assert (int(first["width"]), int(first["height"])) == template.shape[:2]


def test_names_that_collide(command, home, tmp_path):
    image = Image.new("L", (40, 30), 90)
    for place in ("a/x.png", "b/x.png", "c/a/x.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / place)
    inputs = [tmp_path / "a/x.png", tmp_path / "b/x.png", tmp_path / "c", tmp_path]
    done = command("predict.py", "--ckpt", home / "Brain2.pth", *inputs, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    names = [row["overlay"] for row in rows(tmp_path / "out")]
    assert len(set(names)) == len(names) == 6
    again = command("predict.py", "--ckpt", home / "Brain2.pth", *inputs, "--out", tmp_path / "out")
    assert again.returncode == 0  # results of the first run are no input of the second
    assert len(rows(tmp_path / "out")) == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.png"], ["nowhere.png", "not found"]),
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
    done = command("predict.py", "--ckpt", home / "Brain2.pth", "--out", tmp_path, *arguments)
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
        tmp_path / "pipe.png": "a pipe or a device",
        tmp_path / "notes.txt": "not one of the formats",
        tmp_path / "moving.png": "holds 2 pictures",
        tmp_path / "huge.png": "more than 89,478,485 pixels",
        nearly: "no decoder for JPEG-LS",
    }
    ours = home / "data/Brain_AD/test/good/img/test_good_00000.png"
    done = command("predict.py", "--ckpt", home / "Brain2.pth", *words, ours, "--out", tmp_path / "out")
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
    command = [sys.executable, "predict.py", "--ckpt", home / "Brain2.pth", tmp_path / "v.nii.gz"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "out"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path / "stub")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().endswith("NIfTI needs nibabel: pip install nibabel")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_keeps_what_is_written(command, home, tmp_path):
    whole = home / "data/Brain_AD/test/good/img/test_good_00000.png"
    with Image.open(whole) as image:
        image.resize((1500, 1500)).save(tmp_path / "large.png")  # its overlay is too large
    inputs = ["--batch_size", 1, whole, tmp_path / "large.png"]
    done = command("predict.py", "--ckpt", home / "Brain2.pth", *inputs, "--out", tmp_path / "out", file_bytes=200_000)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "--out" in done.stderr.splitlines()[-1]
    assert [row["file"] for row in rows(tmp_path / "out")] == [str(whole)]


def test_memory_does_not_grow_with_the_images(command, home, tmp_path):
    script = tmp_path / "peak.py"
    script.write_text(
        "import resource, runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n    runpy.run_path('predict.py', run_name='__main__')\n"
        "finally:\n    print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    Image.linear_gradient("L").resize((512, 512)).save(tmp_path / "image.png")
    peaks = []
    for many in (10, 80):
        folder = tmp_path / str(many)
        folder.mkdir()
        for i in range(many):
            (folder / f"{i}.png").symlink_to(tmp_path / "image.png")
        flags = ["--ckpt", home / "Brain2.pth", "--batch_size", 8, folder, "--out", tmp_path / "out"]
        done = command(str(script), "predict.py", *flags)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split("peak ")[1]))
    assert peaks[1] - peaks[0] < 25_000  # kB; the pixels of 70 images more take 54 MB


def test_published_format(command, home, tmp_path):
    published = tmp_path / "Brain.pth"
    assert command("engine.checkpoint", "export", home / "Brain2.pth", published).returncode == 0
    image = home / "data/Brain_AD/test/good/img/test_good_00000.png"
    model = load(published, "cpu", pretrain="random", img_size=56)
    ours = load(home / "Brain2.pth", "cpu")
    assert model.threshold is None
    assert model.predict(image)[0].abnormal is None
    assert model.predict(image)[0].score == pytest.approx(ours.predict(image)[0].score, abs=1e-6)


def test_python_api(home):
    model = load(home / "Brain2.pth", "cpu")
    path = home / "data/Brain_AD/test/Ungood/img/test_Ungood_00000.png"
    with Image.open(path) as opened:
        image = opened.convert("L")
    by_path, by_image, by_array, by_float = model.predict([path, image, np.asarray(image), np.asarray(image) / 255.0])
    assert by_path.score == by_image.score == by_array.score == by_float.score
    assert by_path.abnormal == (by_path.score >= model.threshold)
    assert by_path.heat.shape == (56, 56)
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
        load(home / "Brain2.pth", no_such_flag=1)
    assert (ROOT / "predict.py").is_file()
