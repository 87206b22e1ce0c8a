"""python -m dataset.check as a user starts it, on data sets with one fault each; and images of every kind."""

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
import pytest
from PIL import Image

from dataset import MedicalDataset, leaks, load_image, load_mask, phantom
from dataset import check as check_script
from dataset.medical_few import Sample
from dataset.patients import falls_in_valid, patient
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --obj NAME"),
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
        ("no test", 1, "test not found"),
        ("no images", 1, "test/good/img not found"),
        ("list missing", 1, "names no.png"),
        ("list dots", 1, "'../x.png' is not a plain file name"),
        ("list absolute", 1, "'/x.png' is not a plain file name"),
        ("list short", 1, "names 1 images where 2 shots are meant"),
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


def test_an_unknown_folder_gets_a_file_that_means_the_same(fine, tmp_path, monkeypatch):
    (tmp_path / "knee_joint").symlink_to(fine / "Brain_AD")
    code, output = check("--data_root", tmp_path / "knee_joint")
    assert code == 0
    proposal = json.loads(output[output.index("\n{") : output.rindex("}") + 1])
    assert proposal["prompt_name"] == "knee joint"
    assert proposal["pixel_metrics"]
    without = MedicalDataset.open("knee_joint", tmp_path, tmp_path / "knee_joint")
    monkeypatch.setattr("dataset.layout.FOLDER", tmp_path)
    (tmp_path / "knee_joint.json").write_text(json.dumps(proposal))
    assert MedicalDataset.open("knee_joint", tmp_path, tmp_path / "knee_joint") == without


def test_a_folder_of_no_known_layout_gets_a_file_to_fill_in(fine, tmp_path, monkeypatch, capsys):
    root = tmp_path / "knee"
    for split in ("valid", "test"):
        shutil.copytree(fine / "Brain_AD" / split / "good/img", root / split / "sane")
        shutil.copytree(fine / "Brain_AD" / split / "Ungood/img", root / split / "torn")
    code, output = call_check(monkeypatch, capsys, "--data_root", root)
    assert code == 1
    assert "    test/sane: 3\n    test/torn: 3\n    valid/sane: 3\n" in output
    text = output[output.index("\n{") : output.rindex("}") + 1]
    for folder in ("valid/sane", "valid/torn", "test/sane", "test/torn"):
        text = text.replace("FOLDER", folder, 1)
    monkeypatch.setattr("dataset.layout.FOLDER", tmp_path)
    (tmp_path / "knee.json").write_text(text)
    assert [sample.label for sample in MedicalDataset.open("knee", tmp_path, root).samples("test")] == [0] * 3 + [1] * 3


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
            gray(noise(8, 8), tmp_path / kind / f"knee_2023_{number}.png")
    with pytest.raises(InputError, match=r"none of the 9 normal images is valid; .* dataset/knee\.json"):
        MedicalDataset.open("knee", "data", tmp_path).samples("valid")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "as JSON"),
        ("[]", "not an object"),
        ('{"prompt": "x"}', "unknown 'prompt'"),
        ('{"prompt_name": ""}', "prompt_name"),
        ('{"pixel_metrics": "yes"}', "pixel_metrics"),
        ('{"valid_share": 1}', "valid_share"),
        ('{"masks": "masks/{name}"}', "masks"),
        ('{"masks": "../{stem}"}', "masks"),
        ('{"valid": {"normal": "a"}}', "valid"),
        ('{"test": {"normal": "/a", "abnormal": "b"}}', "without '..'"),
        ('{"test": {"normal": "a", "abnormal": ["../b"]}}', "without '..'"),
    ],
)
def test_files_that_are_refused(fine, tmp_path, monkeypatch, text, words):
    monkeypatch.setattr("dataset.layout.FOLDER", tmp_path)
    (tmp_path / "knee.json").write_text(text)
    with pytest.raises(InputError, match=r"knee\.json") as error:
        MedicalDataset.open("knee", "data", fine / "Brain_AD")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("00124_80.png", "00124"),
        ("CNV-6294785-2.jpeg", "6294785"),
        ("10_340.png", "10"),
        ("test/good/img/3_1.png", "3"),
        ("valid_good_00001.png", None),
        ("1032.png", None),
        ("img_0.png", None),
        ("Normal-ff5b2932-f065-4b79-b2f8-ec2143ffc977.png", None),
    ],
)
def test_the_patient_in_a_name(name, number):
    assert patient(name) == number


def test_the_hash_splits_by_patient_and_near_the_share():
    assert len({falls_in_valid(f"a/00124_{i}.png", 0.3, "00124") for i in range(50)}) == 1
    share = sum(falls_in_valid(f"a/{i}.png", 0.3) for i in range(4000)) / 4000
    assert share == pytest.approx(0.3, abs=0.03)


def test_leaks_are_found_by_content(tmp_path):
    paths = [gray(noise(9, 9) // (i + 1), tmp_path / f"{i}.png") for i in range(3)]
    shutil.copy(paths[0], tmp_path / "copy.png")
    samples = [Sample(path, 0, None, path.name) for path in (*paths, tmp_path / "copy.png")]
    assert [(a.name, b.name) for a, b in leaks(samples[:2], samples[2:])] == [("0.png", "copy.png")]
    assert leaks(samples[:2], samples[2:3]) == []


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_files_with_several_pictures_are_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"x\..*holds 3 pictures"):
        load_image(frames(tmp_path / name), 32)


def test_a_palette_with_transparency_gives_its_colours_without_a_warning(tmp_path, recwarn):
    picture = Image.fromarray(noise(20, 20, 3)).quantize(8)
    picture.save(tmp_path / "clear.png", transparency=bytes([0, 90, 255, 255, 255, 255, 255, 255]))
    picture.save(tmp_path / "full.png")
    assert Image.open(tmp_path / "clear.png").info["transparency"]
    assert load_image(tmp_path / "clear.png", 20).equal(load_image(tmp_path / "full.png", 20))
    assert not [warning for warning in recwarn if "Transparency" in str(warning.message)]


@pytest.mark.parametrize("values", [np.ones((9, 9), np.float32), np.full((9, 9), 70_000, np.int32)])
def test_pixels_of_unknown_range_are_refused(tmp_path, values):
    with pytest.raises(InputError, match=r"x\.tif: 32 bits"):
        load_image(gray(values, tmp_path / "x.tif"), 32)


def test_exif_orientation_is_ignored_for_image_and_mask(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = gray(noise(20, 30), tmp_path / "plain.png"), gray(noise(20, 30), tmp_path / "turned.png", exif=exif)
    assert load_image(plain, 30).equal(load_image(turned, 30))
    mask = gray(noise(20, 30), tmp_path / "mask.png")
    assert load_mask(Sample(turned, 1, mask, "x"), 30).equal(load_mask(Sample(turned, 1, turned, "x"), 30))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp"])
def test_damaged_files_give_one_clear_error(tmp_path, suffix):
    path = gray(noise(40, 40, 3), tmp_path / f"x{suffix}")
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        spoiled = bytearray(data[: rng.integers(0, len(data))] if rng.random() < 0.5 else data)
        for place in rng.integers(0, max(min(len(spoiled), 300), 1), 3):
            spoiled[place : place + 1] = bytes([rng.integers(0, 256)])
        path.write_bytes(spoiled)
        try:
            load_image(path, 8)
        except InputError as error:
            assert path.name in str(error)
            assert "\n" not in str(error)
