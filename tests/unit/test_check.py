"""python -m dataset.check as a user starts it, on data sets with one fault each."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
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


def check(*arguments: object) -> tuple[int, str]:
    """Exit code and everything that was printed."""
    command = [sys.executable, "-m", "dataset.check", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def call_check(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    """The same in this process, for what needs many runs."""
    monkeypatch.setattr(sys, "argv", ["check", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        run_cli(check_script.main)
    return left.value.code, "".join(capsys.readouterr())


def gray(values: np.ndarray, path: Path, **options) -> Path:
    Image.fromarray(values).save(path, **options)
    return path


def noise(*shape: int, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def header_only_png(path: Path, side: int) -> Path:
    """A PNG that says it is side x side, with almost nothing in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)))
    return path


def frames(path: Path) -> Path:
    pictures = [Image.fromarray(noise(40, 40) // (i + 1)) for i in range(3)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    return path


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-200])
    return path


def test_a_fine_data_set(fine):
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
def test_bad_arguments_are_code_2(tmp_path, arguments, words):
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
            cut(image)
        case "huge":
            header_only_png(image, 20_000)
        case "frames":
            frames(image)
        case "no mask":
            mask.unlink()
        case "mask size":
            gray(noise(30, 40) // 255 * 255, mask)
        case "mask range":
            gray(np.eye(40, dtype=np.uint8), mask)
        case "16-bit mask":
            gray(np.eye(40, dtype=np.uint16), mask)
        case "two masks":
            gray(np.eye(40, dtype=np.uint8) * 255, mask.with_suffix(".bmp"))
        case "leak":
            gray(np.array(Image.open(image)), brain / "test/Ungood/img/test_Ungood_00000.png", compress_level=1)
        case "two labels":
            shutil.copy(image, brain / "valid/good/img/valid_good_00000.png")
        case "no test":
            shutil.rmtree(brain / "test")
        case "no images":
            shutil.rmtree(brain / "test/good/img")
        case "list missing" | "list dots" | "list short" | "list absolute":
            name = {"list missing": "no.png", "list dots": "../x.png", "list short": FIRST, "list absolute": "/x.png"}
            text = f"a-0: {name[fault]}\nn-0: valid_good_00000.png valid_good_00001.png\n"
            (brain / "fewshot_seed/my2-shot.txt").write_text(text)
        case "alpha mask":
            lesion = np.eye(40, dtype=np.uint8) * 255
            gray(np.dstack([*[np.full_like(lesion, 255)] * 3, lesion]), mask)
        case "full mask":
            gray(np.full((40, 40), 255, np.uint8), mask)
        case "mask of no shot":
            mask.with_name("valid_Ungood_00002.png").unlink()
        case "8 bits in 16":
            gray(noise(40, 40).astype(np.uint16), image)
        case "constant":
            gray(np.full((40, 40), 77, np.uint8), image)
        case "tiff orientation":
            image.unlink()
            gray(noise(40, 40), image.with_suffix(".tif"), tiffinfo={0x0112: 6})
            (brain / "fewshot_seed/my1-shot.txt").unlink()
            (brain / "fewshot_seed/my2-shot.txt").unlink()
        case "pipe":
            image.unlink()
            os.mkfifo(image)
        case "comment" | "surplus":
            more = " valid_Ungood_00002.png" if fault == "surplus" else ""
            text = f"a-0: {FIRST} valid_Ungood_00001.png{more}\nn-0: valid_good_00000.png valid_good_00001.png\n"
            (brain / "fewshot_seed/my2-shot.txt").write_text(("# mine\n" if not more else "") + text)
        case "grey mask":
            gray(noise(40, 40), mask)
        case "empty mask":
            gray(np.zeros((40, 40), np.uint8), mask)
        case "dark":
            gray(noise(40, 40, dtype=np.uint16) // 16, image)
        case "one pixel":
            gray(noise(1, 1), image)
            gray(np.full((1, 1), 255, np.uint8), mask)
        case "duplicate":
            shutil.copy(image, image.with_name("valid_Ungood_00001.png"))
        case "patient":
            for split in ("valid", "test"):
                first = next((brain / split / "good/img").iterdir())
                first.rename(first.with_name(f"00124_{'8' if split == 'valid' else '9'}.png"))
            shutil.rmtree(brain / "fewshot_seed")
        case "ignored":
            (brain / ABNORMAL / "scan.xml").write_bytes(b"x")
        case "orientation":
            exif = Image.Exif()
            exif[0x0112] = 6
            gray(noise(40, 40), image, exif=exif)
        case "same name":
            gray(noise(40, 40), brain / "valid/good/img/valid_good_00000.bmp")


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("cut", 1, "cut short"),
        ("huge", 1, "more than 89,478,485 pixels"),
        ("frames", 1, "holds 3 pictures"),
        ("no mask", 1, "abnormal images without a mask: 1"),
        ("mask size", 1, "40 x 30, its image 40 x 40"),
        ("mask range", 1, "largest value is 1 of 255"),
        ("16-bit mask", 1, "largest value is 1 of 255"),
        ("two masks", 1, "2 masks fit 1 images"),
        ("leak", 1, f"{ABNORMAL}/{FIRST} = test/Ungood/img/test_Ungood_00000.png"),
        ("two labels", 1, "among the normal and the abnormal: 1"),
        ("no test", 1, "no known layout"),
        ("no images", 1, "test/good: no images"),
        ("list missing", 1, "names no.png"),
        ("list dots", 1, "'../x.png' is not a plain file name"),
        ("list absolute", 1, "'/x.png' is not a plain file name"),
        ("list short", 1, "names 1 images where 2 shots are meant"),
        ("pipe", 1, "a pipe, a socket or a device"),
        ("alpha mask", 0, "masks that lie in the alpha channel: 1"),
        ("full mask", 0, "100% of the image is abnormal (a constant mask)"),
        ("mask of no shot", 0, "no shots, and left out of the calibration: 1"),
        ("8 bits in 16", 0, "read as 8 bits, as the published program reads them: 1"),
        ("constant", 0, "nearly constant: 98% of the pixels lie between 77 and 77"),
        ("tiff orientation", 0, "orientation 6"),
        ("comment", 0, "left out, as it is no `a-K"),
        ("surplus", 0, "names 3 images where 2 shots are meant; all of them are used"),
        ("grey mask", 0, "masks with greys"),
        ("empty mask", 0, "empty mask: 1"),
        ("dark", 0, "all but black: 1"),
        ("one pixel", 0, "1 x 1"),
        ("duplicate", 0, "the same picture twice in a class: 1"),
        ("patient", 1, "in valid and in test: 1\n    00124"),
        ("ignored", 0, "1 x .xml"),
        ("orientation", 0, "orientation 6"),
        ("same name", 0, "valid_good_00000.*: 2 images"),
    ],
)
def test_one_fault(brain, monkeypatch, capsys, fault, code, words):
    spoil(brain, fault)
    arguments = ["--data_path", brain.parent, "--obj", "Brain"]
    # Pillow's limit is a warning turned into an error, which pytest would undo in its own process.
    in_process = fault not in ("cut", "huge", "leak", "empty mask")
    found, output = call_check(monkeypatch, capsys, *arguments) if in_process else check(*arguments)
    assert found == code, output
    assert words in output
    assert ("\nerror: " in output) == bool(code)
    lines = [line for line in output.splitlines() if line.startswith(("error: ", "warning: "))]
    assert len(lines) == 1 + (fault == "one pixel"), output  # its mask is full, too


@pytest.fixture
def copied(brain, monkeypatch) -> Path:
    """The same as if it were the paper's Brain."""
    (brain / "PHANTOM.txt").unlink()
    for split in ("valid", "test"):
        first = next((brain / split / "good/img").iterdir())
        shutil.copy(first, first.with_name(f"00124_{'8' if split == 'valid' else '9'}.png"))
    monkeypatch.setitem(layout.PUBLISHED_COUNTS, "Brain", {"valid": ((4, 3),), "test": ((9, 9), (4, 3))})
    return brain


def test_what_the_papers_files_are_known_for_is_no_error(copied, monkeypatch, capsys):
    shutil.copy(copied / "valid/good/img/valid_good_00000.png", copied / "test/good/img/test_good_00000.png")
    code, output = call_check(monkeypatch, capsys, "--data_path", copied.parent, "--obj", "Brain")
    assert code == 0, output
    assert "\npublished: the same picture in valid and in test: 1\n" in output
    assert "\npublished: patients in valid and in test: 1\n    00124\n" in output
    assert "counts as published" in output
    monkeypatch.setitem(layout.PUBLISHED_COUNTS, "Brain", {"valid": ((39, 44),)})
    for name in ("Brain", "knee"):
        code, output = call_check(monkeypatch, capsys, "--data_root", copied, "--obj", name)
        assert code == 1
        assert ("counts: other than published" in output) == (name == "Brain")
        assert "error: the same picture in valid and in test: 1" in output
        assert "error: patients in valid and in test: 1" in output


def test_masks_of_another_size_in_the_papers_data_sets(copied, monkeypatch, capsys):
    gray(noise(30, 40) // 255 * 255, copied / MASKS / FIRST)
    code, output = call_check(monkeypatch, capsys, "--data_path", copied.parent, "--obj", "Brain")
    assert code == 0
    assert "warning: masks of another size than their image: resized, as the published loader does: 1" in output
    samples = MedicalDataset.open("Brain", copied.parent).samples("valid")
    assert load_mask(next(sample for sample in samples if sample.label), 20).shape == (20, 20)


@pytest.mark.parametrize(("above", "code"), [(0, 0), (127, 1)])
def test_the_grey_above_which_a_mask_is_abnormal(brain, monkeypatch, capsys, above, code):
    spoil(brain, "mask range")
    arguments = ["--data_path", brain.parent, "--obj", "Brain", "--mask_above", above]
    found, output = call_check(monkeypatch, capsys, *arguments)
    assert found == code
    assert ("a mask's grey above 0 is abnormal" in output) == (above == 0)


def test_bids_names_are_no_leak_when_a_folder_is_divided(tmp_path, monkeypatch, capsys):
    for kind in ("normal", "abnormal"):
        (tmp_path / kind).mkdir()
        for subject in range(12):
            for index in range(3):
                name = f"sub-{subject:02d}_T1w_slice{index:03d}.png"
                gray(noise(40, 40) // (subject * 6 + index + 1 + 3 * (kind == "normal")), tmp_path / kind / name)
    code, output = call_check(monkeypatch, capsys, "--obj", "knee", "--data_root", tmp_path)
    assert "error: patients" not in output
    assert "patients: 12 recognised in 72 names: sub-00, sub-01, sub-02, and 9 more" in output
    # A rule that takes every slice for a patient divides the subjects, and one that knows them says so.
    _, output = call_check(monkeypatch, capsys, "--obj", "knee", "--data_root", tmp_path, "--patient", r"slice(\d+)")
    assert "patients: 3 recognised" in output
    code, output = call_check(monkeypatch, capsys, "--obj", "knee", "--data_root", tmp_path, "--patient", "(")
    assert (code, len(output.splitlines())) == (2, 1)
    assert "--patient" in output


def test_photographs_of_a_day_are_no_patient(tmp_path, monkeypatch, capsys):
    for kind in ("normal", "abnormal"):
        (tmp_path / kind).mkdir()
        for index in range(40):
            gray(noise(8, 8), tmp_path / kind / f"IMG_20240105_10{index:02d}30.jpg")
    _, output = call_check(monkeypatch, capsys, "--obj", "knee", "--data_root", tmp_path)
    assert "warning: patients: none recognised in the names (such as normal/IMG_20240105_10" in output
    sizes = [len(MedicalDataset.open("knee", "data", tmp_path).samples(split)) for split in ("valid", "test")]
    assert sum(sizes) == 80
    assert min(sizes) > 10


def test_dicom_objects_without_a_picture_are_no_error(brain, monkeypatch, capsys):
    source = Path(pydicom.data.get_testdata_file("rtplan.dcm"))
    shutil.copy(source, brain / "test/good/img/plan.dcm")
    code, output = call_check(monkeypatch, capsys, "--data_path", brain.parent, "--obj", "Brain")
    assert code == 0, output
    assert "warning: DICOM objects without a picture, left out: 1" in output
    assert len(MedicalDataset.open("Brain", brain.parent).samples("test")) == 6


def test_escape_sequences_in_names_do_not_reach_the_terminal(brain, monkeypatch, capsys):
    (brain / MASKS / FIRST).unlink()
    (brain / ABNORMAL / FIRST).rename(brain / ABNORMAL / "a\x1b[31m.png")
    _, output = call_check(monkeypatch, capsys, "--data_path", brain.parent, "--obj", "Brain")
    assert "\x1b[31m" not in output
    assert r"a\x1b[31m.png" in output


def test_a_file_in_the_data_sets_own_folder(fine, tmp_path, monkeypatch, capsys):
    root = tmp_path / "knee"
    shutil.copytree(fine / "Brain_AD", root)
    (root / "knee.json").write_text(json.dumps({"prompt_name": "left knee", "mask_above": 25}))
    code, output = call_check(monkeypatch, capsys, "--data_root", root)
    assert code == 0
    assert 'prompts say "left knee"; images and pixels are measured, a mask\'s grey above 25 is abnormal' in output
    assert "layout recognised" not in output


def test_a_folder_of_no_known_layout_is_listed(fine, tmp_path, monkeypatch, capsys):
    root = tmp_path / "knee"
    for split in ("valid", "test"):
        shutil.copytree(fine / "Brain_AD" / split / "good/img", root / split / "sane")
        shutil.copytree(fine / "Brain_AD" / split / "Ungood/img", root / split / "torn")
    code, output = call_check(monkeypatch, capsys, "--data_root", root)
    assert code == 1
    assert "    test/sane: 3 pictures\n    test/torn: 3 pictures\n    valid/sane: 3 pictures\n" in output
    assert "--write_list" in output


def test_every_missing_mask_is_named(brain, monkeypatch, capsys):
    masks = sorted((brain / MASKS).iterdir()) + sorted((brain / "test/Ungood/anomaly_mask").iterdir())
    for mask in masks[1:]:
        mask.unlink()
    _, output = call_check(monkeypatch, capsys, "--data_path", brain.parent, "--obj", "Brain")
    assert all(f"img/{mask.name}\n" in output for mask in masks[1:])


def test_a_split_that_gets_nothing_of_a_divided_folder_is_explained(tmp_path):
    for kind in ("normal", "abnormal"):
        (tmp_path / kind).mkdir()
        for number in range(9):
            gray(noise(8, 8), tmp_path / kind / f"case_7_{number}.png")
    with pytest.raises(InputError, match=r"none of the 9 normal images is valid; .* dataset/knee\.json"):
        MedicalDataset.open("knee", "data", tmp_path).samples("valid")


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
        ('{"mask_above": true}', "mask_above"),
        ('{"patient": "("}', "not a regular expression"),
        ('{"window": [40, 0]}', "window"),
        ('{"window": "wide"}', "window"),
        ('{"plane": "oblique"}', "plane"),
        ('{"masks": "masks/{name}"}', "masks"),
        ('{"masks": "../{stem}"}', "masks"),
        ('{"valid": {"normal": "a"}}', "valid"),
        ('{"test": {"normal": "/a", "abnormal": "b"}}', "test"),
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
