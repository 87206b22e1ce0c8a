"""The made-up data set: its layout, its masks, that it repeats, and that it destroys nothing."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.medical_few import MedicalDataset
from dataset.phantom import KINDS, draw, write
from dataset.writer import FOLDERS
from utils import InputError


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("obj", KINDS)
def test_layout_counts_and_masks(obj: str, tmp_path: Path):
    write(tmp_path, [obj], valid=2, test=3, seed=0, size=48)
    folder = tmp_path / f"{obj}_AD"
    expected = {"PHANTOM.txt", "fewshot_seed/my1-shot.txt", "fewshot_seed/my2-shot.txt"}
    for split, count in (("valid", 2), ("test", 3)):
        for label in FOLDERS:
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
    dataset = MedicalDataset.open(obj, tmp_path)
    assert [sample.label for sample in dataset.samples("test")] == [0, 0, 0, 1, 1, 1]
    shots = dataset.shots(2, 2, 0, 0)
    assert shots.source.endswith("my2-shot.txt")
    assert [sample.path.name for sample in shots.abnormal] == ["valid_Ungood_00000.png", "valid_Ungood_00001.png"]
    assert not dataset.is_benchmark


@pytest.mark.parametrize("obj", KINDS)
@pytest.mark.parametrize("size", [32, 96])
def test_a_lesion_changes_its_mask_and_nothing_else(obj: str, size: int, monkeypatch):
    pictures = [draw(obj, "test", "Ungood", index, 3, size) for index in range(12)]
    monkeypatch.setitem(KINDS, obj, KINDS[obj]._replace(lesions=(0, 1)))
    for index, (ill, mask) in enumerate(pictures):
        healthy, none = draw(obj, "test", "Ungood", index, 3, size)  # its twin without lesions
        assert not none.any()
        assert (mask.dtype, mask.shape) == (bool, (size, size))
        assert 0 < mask.mean() < 0.75
        change = np.abs(ill.astype(int) - healthy.astype(int)).reshape(size, size, -1).max(axis=-1)
        assert change[~mask].max() == 0
        assert change[mask].mean() > 12, "of 255: the lesion is visible"


def test_a_real_folder_is_refused_and_untouched(tmp_path: Path):
    real = tmp_path / "Liver_AD" / "test" / "good" / "img" / "scan.png"
    real.parent.mkdir(parents=True)
    real.write_bytes(b"a patient")
    with pytest.raises(InputError, match="Liver_AD exists and is not a phantom"):
        write(tmp_path, ["Brain", "Liver"], valid=1, test=1, seed=0, size=32)
    assert files(tmp_path) == {"Liver_AD/test/good/img/scan.png": b"a patient"}, "Brain was not begun either"
    (tmp_path / "data").write_text("a file")
    with pytest.raises(InputError, match="--out"):
        write(tmp_path / "data", ["Brain"], valid=1, test=1, seed=0, size=32)
