"""python -m dataset.check as a user starts it, on valid data, and on data sets with one fault each."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
from PIL import Image

from dataset import check as check_script
from dataset import phantom
from dataset.medical_few import MedicalDataset
from tests.unit.test_layout import volume
from utils import InputError, run_cli


@pytest.fixture(scope="module")
def fine(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    phantom.write(path, ["Brain"], valid=3, test=3, seed=0, size=40)
    return path


@pytest.fixture
def brain(fine, tmp_path) -> Path:
    """A copy of the folder Brain_AD that a test may damage."""
    return shutil.copytree(fine / "Brain_AD", tmp_path / "Brain_AD")


@pytest.fixture
def check(monkeypatch, capsys):
    """Runs the check; returns its exit code, and its stdout and stderr in one."""

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


def test_valid_data_set(fine, check):
    code, output = check("--data_path", fine, "--obj", "Brain")
    assert code == 0, output
    assert "error" not in output
    assert "warning" not in output
    assert "\nfine\n" in output
    assert "test   abnormal  3       3      40 x 40         L" in output


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
        case "mask size":
            gray(noise(30, 40) // 255 * 255 + 255, mask)
        case "mask range":
            gray(np.eye(40, dtype=np.uint8), mask)
        case "leak":
            gray(np.array(Image.open(image)), brain / "test/Ungood/img/test_Ungood_00000.png", compress_level=1)
        case "duplicate":
            shutil.copy(image, image.with_name("valid_Ungood_00001.png"))
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
        ("no mask", 1, "abnormal images without a mask (masks are sought beside"),
        ("mask size", 1, "40 x 30, its image 40 x 40"),
        ("mask range", 1, "largest value is 1 of 255"),
        ("leak", 1, f"{ABNORMAL}/{FIRST} = test/Ungood/img/test_Ungood_00000.png"),
        ("duplicate", 0, "the same picture twice in a class: 1"),
        ("patient", 1, "in valid and in test: 1\n    00124"),
        ("ignored", 0, "scan.xml"),
        ("no picture", 0, "\n1 DICOM objects without a picture: left out"),
    ],
)
def test_one_fault(brain, check, fault, code, words):
    spoil(brain, fault)
    found, output = check("--data_path", brain.parent, "--obj", "Brain")
    assert found == code, output
    assert words in output
    assert ("\nerror: " in output) == bool(code)
    lines = [line for line in output.splitlines() if line.startswith(("error: ", "warning: "))]
    assert len(lines) == (fault != "no picture") + (fault == "mask size"), output  # this mask is also full


@pytest.mark.parametrize("flag", ["--patient=(", "--window=x", "--list=no.csv"])
def test_bad_flags_and_bad_data_have_different_exit_codes(tmp_path, monkeypatch, check, flag):
    """Exit code 2 for a bad flag, 1 for bad data, even if the folder's name looks like a flag (--x)."""
    monkeypatch.chdir(tmp_path)
    gray(noise(9, 9), (tmp_path / "--x").mkdir() or tmp_path / "--x/a.png")
    assert check("--data_root=--x", "--obj", "x")[0] == 1
    code, output = check("--data_root=--x", "--obj", "x", flag)
    assert code == 2
    assert output.startswith(f"error: {flag.partition('=')[0]}")


def test_likely_masks_among_the_images_are_reported(tmp_path, check):
    for kind in ("normal", "abnormal", "abnormal/lesion areas"):
        (tmp_path / kind).mkdir()
        for number in range(9):
            values = np.random.default_rng(len(kind) + number).integers(0, 255, (20, 20), dtype=np.uint8)
            gray(values // 128 * 255 if "areas" in kind else values, tmp_path / kind / f"{number}{kind[-1]}.png")
    assert "are they masks?: 9\n" in check("--data_root", tmp_path, "--obj", "knee")[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSON"),
        ("[]", "not a JSON object"),
        ('{"prompt": "x"}', "unknown 'prompt'"),
        ('{"pixel_metrics": "yes"}', "pixel_metrics"),
        ('{"mask_above": 255}', "mask_above"),
        ('{"patient": "("}', "patient"),
        ('{"window": [40, 0]}', "window"),
        ('{"test": {"normal": "a"}}', "unknown 'test'"),
        ('{"mask_labels": [-1]}', "mask_labels"),
    ],
)
def test_bad_json_descriptions_are_refused(fine, tmp_path, monkeypatch, text, words):
    monkeypatch.setattr("dataset.layout.FOLDER", tmp_path)
    (tmp_path / "knee.json").write_text(text)
    with pytest.raises(InputError, match=r"knee\.json") as error:
        MedicalDataset.open("knee", "data", fine / "Brain_AD")
    assert words in str(error.value)


def test_skipped_slices_are_not_reported_as_leaks(tmp_path, check):
    """Blank slices, which are equal in all volumes, are left out and not reported as duplicates or leaks."""
    for kind in ("normal", "abnormal"):
        for number in range(9):
            volume(tmp_path / kind / f"sub-{number}{kind[0]}.nii.gz", empty=(0, 5))
    code, output = check("--data_root", tmp_path, "--obj", "knee")
    assert code == 0, output
    assert "the same picture" not in output
    assert "36 slices that show nothing: left out" in output
