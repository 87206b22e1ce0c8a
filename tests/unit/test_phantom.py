"""The made-up data set: its layout, its masks, that it repeats, and that it destroys nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import phantom
from dataset.medical_few import MedicalDataset
from dataset.phantom import KINDS, LABELS, SPLITS, draw, paint, write
from utils import InputError

ROOT = Path(__file__).resolve().parents[2]
KEY = (3, 0, 1, 1, 7)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(*arguments: str | Path) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "dataset.phantom", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("obj", KINDS)
def test_layout_counts_and_masks(obj: str, tmp_path: Path):
    write(tmp_path, [obj], valid=2, test=3, seed=0, size=48)
    folder = tmp_path / f"{obj}_AD"
    expected = {"PHANTOM.txt", "fewshot_seed/my1-shot.txt", "fewshot_seed/my2-shot.txt"}
    for split, count in (("valid", 2), ("test", 3)):
        for label in LABELS:
            names = [f"{split}_{label}_{i:05d}.png" for i in range(count)]
            expected |= {f"{split}/{label}/img/{name}" for name in names}
            if KINDS[obj].has_masks and label == "Ungood":
                expected |= {f"{split}/{label}/anomaly_mask/{name}" for name in names}
    assert set(files(folder)) == expected
    for path in folder.glob("*/*/img/*.png"):
        with Image.open(path) as image:
            assert image.size == (48, 48)
            assert image.mode == ("RGB" if obj == "Histopathology" else "L")
    for path in folder.glob("*/*/anomaly_mask/*.png"):
        with Image.open(path) as mask:
            assert (mask.mode, mask.size) == ("L", (48, 48))
            assert set(np.unique(np.asarray(mask))) == {0, 255}
    assert "says nothing about medicine" in (folder / "PHANTOM.txt").read_text(encoding="utf-8")


def test_written_files_are_what_draw_returns(tmp_path: Path):
    write(tmp_path, ["Liver"], valid=0, test=2, seed=5, size=40)
    image, mask = draw("Liver", "test", "Ungood", 1, 5, 40)
    folder = tmp_path / "Liver_AD" / "test" / "Ungood"
    assert np.array_equal(np.asarray(Image.open(folder / "img" / "test_Ungood_00001.png")), image)
    assert np.array_equal(np.asarray(Image.open(folder / "anomaly_mask" / "test_Ungood_00001.png")) == 255, mask)


def test_repeats_and_keeps_earlier_images(tmp_path: Path):
    for name, valid in (("once", 2), ("again", 2), ("more", 4)):
        write(tmp_path / name, KINDS, valid=valid, test=1, seed=2, size=32)
    once, again, more = (files(tmp_path / name) for name in ("once", "again", "more"))
    assert once == again
    kept = {name for name in once if not name.endswith("PHANTOM.txt")}
    assert {name: more[name] for name in kept} == {name: once[name] for name in kept}
    assert len(more) > len(once)


@pytest.mark.parametrize("obj", KINDS)
def test_pictures_differ(obj: str):
    base = {"obj": obj, "split": "valid", "label": "good", "index": 0, "seed": 0, "size": 32}
    changes = [{}, {"split": "test"}, {"label": "Ungood"}, {"index": 1}, {"seed": 1}]
    assert len({draw(**{**base, **change})[0].tobytes() for change in changes}) == len(changes)


@pytest.mark.parametrize("obj", KINDS)
@pytest.mark.parametrize("size", [32, 96])
def test_a_lesion_changes_its_mask_and_nothing_else(obj: str, size: int):
    for index in range(12):
        key = (*KEY[:-1], index)
        healthy, none = paint(key, obj, size, abnormal=False)
        ill, mask = paint(key, obj, size, abnormal=True)
        assert not none.any()
        assert mask.dtype == bool
        assert mask.shape == (size, size)
        assert 0 < mask.mean() < 0.75
        change = np.abs(ill.astype(int) - healthy.astype(int)).reshape(size, size, -1).max(axis=-1)
        assert change[~mask].max() == 0
        assert change[mask].mean() > 12, "of 255: the lesion is visible"


def test_good_images_have_no_lesion_and_abnormal_ones_do():
    for obj in KINDS:
        for split in SPLITS:
            assert not draw(obj, split, "good", 0, 0, 32)[1].any()
            assert draw(obj, split, "Ungood", 0, 0, 32)[1].any()


def test_abnormal_images_are_not_twins_of_the_good_ones():
    good, _ = draw("Brain", "test", "good", 0, 0, 32)
    ill, mask = draw("Brain", "test", "Ungood", 0, 0, 32)
    assert (good[~mask] != ill[~mask]).mean() > 0.5


def test_contrast_is_the_difficulty(monkeypatch: pytest.MonkeyPatch):
    def visibility(contrast: tuple[float, float]) -> float:
        monkeypatch.setattr(phantom, "CONTRAST", contrast)
        changes = []
        for index in range(6):
            healthy, ill = (paint((*KEY, index), "Liver", 48, abnormal)[0].astype(int) for abnormal in (False, True))
            changes.append(np.abs(ill - healthy).sum())
        return sum(changes)

    assert visibility((0.1, 0.1)) < 0.5 * visibility((0.5, 0.5))


def test_shot_lists_reference_existing_images(tmp_path: Path):
    write(tmp_path, ["Chest"], valid=9, test=1, seed=0, size=32)
    folder = tmp_path / "Chest_AD"
    assert sorted(path.name for path in (folder / "fewshot_seed").iterdir()) == [
        f"my{shot}-shot.txt" for shot in (1, 2, 4, 8)
    ]
    for shot in (1, 2, 4, 8):
        abnormal, normal = (folder / "fewshot_seed" / f"my{shot}-shot.txt").read_text(encoding="utf-8").splitlines()
        for line, tag, label in ((abnormal, "a-0:", "Ungood"), (normal, "n-0:", "good")):
            first, *names = line.split(" ")
            assert first == tag
            assert len(set(names)) == len(names) == shot
            assert all((folder / "valid" / label / "img" / name).is_file() for name in names)


def test_the_reader_takes_it(tmp_path: Path):
    write(tmp_path, ["Brain"], valid=2, test=3, seed=0, size=32)
    dataset = MedicalDataset.open("Brain", tmp_path)
    samples = dataset.samples("test")
    assert [sample.label for sample in samples] == [0, 0, 0, 1, 1, 1]
    assert all((sample.mask is not None) == (sample.label == 1) for sample in samples)
    shots = dataset.shots(2, 2, 0, 0)
    assert shots.source.endswith("my2-shot.txt")
    assert [sample.path.name for sample in shots.abnormal] == ["valid_Ungood_00000.png", "valid_Ungood_00001.png"]


def test_a_smaller_phantom_leaves_nothing_stale(tmp_path: Path):
    write(tmp_path / "used", ["Brain"], valid=4, test=3, seed=0, size=32)
    own = tmp_path / "used" / "Brain_AD" / "valid" / "good" / "img" / "mine.png"
    own.write_bytes(b"not drawn here")
    write(tmp_path / "used", ["Brain"], valid=1, test=1, seed=0, size=32)
    write(tmp_path / "fresh", ["Brain"], valid=1, test=1, seed=0, size=32)
    used = files(tmp_path / "used")
    assert used.pop("Brain_AD/valid/good/img/mine.png") == b"not drawn here"
    assert used == files(tmp_path / "fresh")


def test_a_real_folder_is_refused_and_untouched(tmp_path: Path):
    real = tmp_path / "Liver_AD" / "test" / "good" / "img" / "scan.png"
    real.parent.mkdir(parents=True)
    real.write_bytes(b"a patient")
    result = command("--out", tmp_path, "--obj", "Brain", "Liver", "--valid", 1, "--test", 1, "--size", 32)
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path / 'Liver_AD'} exists and is not a phantom; choose another --out\n"
    assert files(tmp_path) == {"Liver_AD/test/good/img/scan.png": b"a patient"}, "Brain was not begun either"


def test_the_command_writes_and_says_what_it_is(tmp_path: Path):
    result = command("--out", tmp_path, "--obj", "Chest", "--valid", 1, "--test", 2, "--seed", 4, "--size", 32)
    assert result.returncode == 0
    assert result.stderr == ""
    assert "valid 1 normal, 1 abnormal; test 2 normal, 2 abnormal" in result.stdout
    assert "says nothing about medicine" in result.stdout
    marker = (tmp_path / "Chest_AD" / "PHANTOM.txt").read_text(encoding="utf-8")
    assert "--obj Chest --valid 1 --test 2 --seed 4 --size 32" in marker


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objs": ["Brain", "Knee"]}, "--obj Knee: unknown"),
        ({"valid": -1}, "--valid -1"),
        ({"test": -3}, "--test -3"),
        ({"seed": -1}, "--seed -1"),
        ({"size": 31}, "--size 31"),
    ],
)
def test_wrong_arguments(change: dict[str, object], message: str, tmp_path: Path):
    arguments = {"objs": ["Brain"], "valid": 1, "test": 1, "seed": 0, "size": 32, **change}
    with pytest.raises(InputError, match=message):
        write(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_output_folder(tmp_path: Path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(InputError, match="cannot write"):
        write(tmp_path / "data", ["Brain"], valid=1, test=1, seed=0, size=32)
