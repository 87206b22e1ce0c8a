"""python -m dataset.check as a user starts it, on data sets with one fault each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
from PIL import Image

from dataset import MedicalDataset, equal_images, layout, load_mask, phantom
from dataset import check as check_script
from dataset.medical_few import Sample
from utils import InputError, run_cli

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fine(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    phantom.write(path, ["Brain"], valid=3, test=3, seed=0, size=40)
    return path


@pytest.fixture
def brain(fine, tmp_path) -> Path:
    """A copy to spoil: the folder Brain_AD."""
    return shutil.copytree(fine / "Brain_AD", tmp_path / "Brain_AD")


@pytest.fixture
def check(monkeypatch, capsys):
    """Runs the check; exit code and everything that was printed."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["check", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            run_cli(check_script.main)
        return left.value.code, "".join(capsys.readouterr())

    return run


def gray(values: np.ndarray, path: Path, **options: object) -> Path:
    Image.fromarray(values).save(path, **options)
    return path


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)


def test_a_fine_data_set(fine, check):
    code, output = check("--data_path", fine, "--obj", "Brain")
    assert code == 0, output
    assert "error" not in output
    assert "warning" not in output
    assert "\nfine\n" in output
    assert "test   abnormal  3       3      40 x 40         L" in output


def test_torch_is_not_imported_to_look_at_files():
    code = "import sys, dataset.check, dataset.phantom; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --obj NAME"),
        (["--data_root", "/"], "give --obj NAME"),
        (["--obj", "Knee"], "Knee_AD not found"),
        (["--obj", "../Brain"], "file names"),
        (["--data_root", "nowhere"], "nowhere not found"),
    ],
)
def test_bad_arguments_are_code_2(tmp_path, check, arguments, words):
    code, output = check("--data_path", tmp_path, *arguments)
    assert (code, len(output.splitlines())) == (2, 1)
    assert words in output


ABNORMAL, MASKS = "valid/Ungood/img", "valid/Ungood/anomaly_mask"
FIRST = "valid_Ungood_00000.png"


def spoil(brain: Path, fault: str) -> None:
    """Put one fault into a data set."""
    image, mask = brain / ABNORMAL / FIRST, brain / MASKS / FIRST
    match fault:
        case "cut":
            image.write_bytes(image.read_bytes()[:-200])
        case "no mask":
            mask.unlink()
        case "mask of no shot":
            mask.with_name("valid_Ungood_00002.png").unlink()
        case "mask size":
            gray(noise(30, 40) // 255 * 255 + 255, mask)
        case "mask range":
            gray(np.eye(40, dtype=np.uint8), mask)
        case "two masks":
            gray(np.eye(40, dtype=np.uint8) * 255, mask.with_suffix(".bmp"))
        case "full mask":
            gray(np.full((40, 40), 255, np.uint8), mask)
        case "empty mask":
            gray(np.zeros((40, 40), np.uint8), mask)
        case "leak":
            gray(np.array(Image.open(image)), brain / "test/Ungood/img/test_Ungood_00000.png", compress_level=1)
        case "two labels":
            shutil.copy(image, brain / "valid/good/img/valid_good_00000.png")
        case "duplicate":
            shutil.copy(image, image.with_name("valid_Ungood_00001.png"))
        case "no test":
            shutil.rmtree(brain / "test")
        case "list missing" | "surplus":
            more = {"list missing": "no.png", "surplus": "valid_Ungood_00001.png valid_Ungood_00002.png"}[fault]
            text = f"a-0: {FIRST} {more}\nn-0: valid_good_00000.png valid_good_00001.png\n"
            (brain / "fewshot_seed/my2-shot.txt").write_text(text)
        case "pipe":
            image.unlink()
            os.mkfifo(image)
        case "constant":
            gray(np.full((40, 40), 77, np.uint8), image)
        case "patient":
            for split in ("valid", "test"):
                first = next((brain / split / "good/img").iterdir())
                first.rename(first.with_name(f"00124_{'8' if split == 'valid' else '9'}.png"))
            shutil.rmtree(brain / "fewshot_seed")
        case "ignored":
            (brain / ABNORMAL / "scan.xml").write_bytes(b"x")
        case "no picture":
            shutil.copy(pydicom.data.get_testdata_file("rtplan.dcm"), brain / "test/good/img/plan.dcm")


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("cut", 1, "cut short"),
        ("no mask", 1, "abnormal images without a mask: 1"),
        ("mask of no shot", 0, "no shots, and left out of the calibration: 1"),
        ("mask size", 1, "40 x 30, its image 40 x 40"),
        ("mask range", 1, "largest value is 1 of 255"),
        ("two masks", 1, "2 masks fit 1 images"),
        ("full mask", 0, "100% of the image is abnormal (a constant mask)"),
        ("empty mask", 0, "empty mask: 1"),
        ("leak", 1, f"{ABNORMAL}/{FIRST} = test/Ungood/img/test_Ungood_00000.png"),
        ("two labels", 1, "among the normal and the abnormal: 1"),
        ("duplicate", 0, "the same picture twice in a class: 1"),
        ("no test", 1, "no known layout"),
        ("list missing", 1, "names no.png"),
        ("surplus", 0, "names 3 images where 2 shots are meant; all of them are used"),
        ("pipe", 1, "a pipe, a socket or a device"),
        ("constant", 0, "nearly constant: 98% of the pixels lie between 77 and 77"),
        ("patient", 1, "in valid and in test: 1\n    00124"),
        ("ignored", 0, "1 x .xml"),
        ("no picture", 0, "DICOM objects without a picture, left out: 1"),
    ],
)
def test_one_fault(brain, check, fault, code, words):
    spoil(brain, fault)
    found, output = check("--data_path", brain.parent, "--obj", "Brain")
    assert found == code, output
    assert words in output
    assert ("\nerror: " in output) == bool(code)
    lines = [line for line in output.splitlines() if line.startswith(("error: ", "warning: "))]
    assert len(lines) == 1 + (fault == "mask size"), output  # it is full, too


@pytest.fixture
def copied(brain, monkeypatch) -> Path:
    """The same as if it were the paper's Brain."""
    (brain / "PHANTOM.txt").unlink()
    for split in ("valid", "test"):
        first = next((brain / split / "good/img").iterdir())
        shutil.copy(first, first.with_name(f"00124_{'8' if split == 'valid' else '9'}.png"))
    monkeypatch.setitem(layout.PUBLISHED_COUNTS, "Brain", {"valid": ((4, 3),), "test": ((9, 9), (4, 3))})
    return brain


def test_what_the_papers_files_are_known_for_is_no_error(copied, monkeypatch, check):
    shutil.copy(copied / "valid/good/img/valid_good_00000.png", copied / "test/good/img/test_good_00000.png")
    gray(noise(30, 40) // 255 * 255 + 255, copied / MASKS / FIRST)
    code, output = check("--data_path", copied.parent, "--obj", "Brain")
    assert code == 0, output
    assert "\npublished: the same picture in valid and in test: 1\n" in output
    assert "\npublished: patients in valid and in test: 1\n    00124\n" in output
    assert "warning: masks of another size than their image: resized, as the published loader does: 1" in output
    assert "counts as published: valid 4 + 3; test 4 + 3" in output
    samples = MedicalDataset.open("Brain", copied.parent).samples("valid")
    assert load_mask(next(sample for sample in samples if sample.label), 20).shape == (20, 20)
    monkeypatch.setitem(layout.PUBLISHED_COUNTS, "Brain", {"valid": ((39, 44),)})
    for name in ("Brain", "knee"):
        code, output = check("--data_root", copied, "--obj", name)
        assert code == 1
        assert ("counts: other than published" in output) == (name == "Brain")
        assert "error: the same picture in valid and in test: 1" in output
        assert "error: patients in valid and in test: 1" in output


@pytest.mark.parametrize(("above", "code"), [(0, 0), (127, 1)])
def test_the_grey_above_which_a_mask_is_abnormal(brain, check, above, code):
    spoil(brain, "mask range")
    found, output = check("--data_path", brain.parent, "--obj", "Brain", "--mask_above", above)
    assert found == code
    assert ("a mask's grey above 0 is abnormal" in output) == (above == 0)


def test_a_rule_for_patients_and_none(tmp_path, check):
    for kind in ("normal", "abnormal"):
        (tmp_path / kind).mkdir()
        for index in range(12):
            gray(noise(40, 40) // (index + 1 + 12 * (kind == "normal")), tmp_path / kind / f"day{index}_slice.png")
    flags = ["--obj", "knee", "--data_root", tmp_path]
    assert "warning: patients: none recognised in the names (such as normal/day" in check(*flags)[1]
    assert "patients: 12 recognised" in check(*flags, "--patient", r"day(\d+)")[1]
    code, output = check(*flags, "--patient", "(")
    assert (code, len(output.splitlines())) == (2, 1)
    assert "--patient" in output


def test_escape_sequences_in_names_do_not_reach_the_terminal(brain, check):
    (brain / MASKS / FIRST).unlink()
    (brain / ABNORMAL / FIRST).rename(brain / ABNORMAL / "a\x1b[31m.png")
    _, output = check("--data_path", brain.parent, "--obj", "Brain")
    assert "\x1b[31m" not in output
    assert r"a\x1b[31m.png" in output


def test_a_file_in_the_data_sets_own_folder(fine, tmp_path, check):
    root = tmp_path / "knee"
    shutil.copytree(fine / "Brain_AD", root)
    (root / "knee.json").write_text(json.dumps({"prompt_name": "left knee", "mask_above": 25}))
    code, output = check("--data_root", root)
    assert code == 0
    assert 'prompts say "left knee"; images and pixels are measured, a mask\'s grey above 25 is abnormal' in output


def test_a_folder_of_no_known_layout_is_listed(fine, tmp_path, check):
    root = tmp_path / "knee"
    for split in ("valid", "test"):
        shutil.copytree(fine / "Brain_AD" / split / "good/img", root / split / "sane")
    code, output = check("--data_root", root)
    assert code == 1
    assert "    test/sane: 3 pictures\n    valid/sane: 3 pictures\n" in output
    assert "--write_list" in output


def test_every_missing_mask_is_named(brain, check):
    masks = sorted((brain / MASKS).iterdir()) + sorted((brain / "test/Ungood/anomaly_mask").iterdir())
    for mask in masks[1:]:
        mask.unlink()
    _, output = check("--data_path", brain.parent, "--obj", "Brain")
    assert all(f"img/{mask.name}\n" in output for mask in masks[1:])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSON"),
        ("[]", "not an object"),
        ('{"prompt": "x"}', "unknown 'prompt'"),
        ('{"prompt_name": ""}', "prompt_name"),
        ('{"pixel_metrics": "yes"}', "pixel_metrics"),
        ('{"valid_share": 1}', "valid_share"),
        ('{"mask_above": 255}', "mask_above"),
        ('{"patient": "("}', "not a regular expression"),
        ('{"window": [40, 0]}', "window"),
        ('{"plane": "oblique"}', "plane"),
        ('{"masks": "masks/{name}"}', "masks"),
        ('{"masks": "../{stem}"}', "masks"),
        ('{"valid": {"normal": "a"}}', "valid"),
        ('{"test": {"normal": "a", "abnormal": ["../b"]}}', "test"),
        ('{"mask_labels": [-1]}', "mask_labels"),
        ('{"unmarked": "left"}', "unmarked"),
    ],
)
def test_files_that_are_refused(fine, tmp_path, monkeypatch, text, words):
    monkeypatch.setattr("dataset.layout.FOLDER", tmp_path)
    (tmp_path / "knee.json").write_text(text)
    with pytest.raises(InputError, match=r"knee\.json") as error:
        MedicalDataset.open("knee", "data", fine / "Brain_AD")
    assert words in str(error.value)


def test_leaks_are_found_by_content(tmp_path):
    paths = [gray(noise(9, 9) // (i + 1), tmp_path / f"{i}.png") for i in range(3)]
    shutil.copy(paths[0], tmp_path / "copy.png")
    samples = [Sample(path, 0, None, path.name) for path in (*paths, tmp_path / "copy.png")]
    assert [(a.name, b.name) for a, b in equal_images(samples[:2], samples[2:])] == [("0.png", "copy.png")]
    assert equal_images(samples[:2], samples[2:3]) == []
