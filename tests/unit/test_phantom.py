"""The synthetic data set: lesions lie within their masks, and existing folders are not overwritten."""

from pathlib import Path

import numpy as np
import pytest

from dataset.phantom import STYLES, draw, write
from utils import InputError


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("obj", STYLES)
@pytest.mark.parametrize("size", [32, 96])
def test_lesions_only_change_pixels_in_the_mask(obj: str, size: int, monkeypatch):
    pictures = [draw(obj, "test", "Ungood", index, 3, size) for index in range(12)]
    monkeypatch.setitem(STYLES, obj, STYLES[obj]._replace(lesions=(0, 1)))
    for index, (ill, mask) in enumerate(pictures):
        healthy, none = draw(obj, "test", "Ungood", index, 3, size)  # the same image without lesions
        assert not none.any()
        assert (mask.dtype, mask.shape) == (bool, (size, size))
        assert 0 < mask.mean() < 0.75
        change = np.abs(ill.astype(int) - healthy.astype(int)).reshape(size, size, -1).max(axis=-1)
        assert change[~mask].max() == 0
        assert change[mask].mean() > 12, "of 255: the lesion is visible"


def test_real_data_is_refused_and_not_changed(tmp_path: Path):
    real = tmp_path / "Liver_AD" / "test" / "good" / "img" / "scan.png"
    real.parent.mkdir(parents=True)
    real.write_bytes(b"a patient")
    with pytest.raises(InputError, match="Liver_AD exists and is not a phantom"):
        write(tmp_path, ["Brain", "Liver"], valid=1, test=1, seed=0, size=32)
    assert files(tmp_path) == {"Liver_AD/test/good/img/scan.png": b"a patient"}, "Brain was not begun either"
    (tmp_path / "data").write_text("a file")
    with pytest.raises(InputError, match="--out"):
        write(tmp_path / "data", ["Brain"], valid=1, test=1, seed=0, size=32)
