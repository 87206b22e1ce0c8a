"""The commands of README.md and docs/ as they stand there, in their order, in one empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np

from tests.helpers.docs import ROOT, doc_commands

PREDICT_PAGE = ROOT / "docs" / "predict.md"
# A training of one epoch is the same command as one of sixty; the run that goes on is extended by one.
SHORTENED = {r"python train\.py (?!--resume)": "--epoch 1", r"python train\.py --resume": "--epoch 2"}


def typed(text: str, folder: Path) -> list[str]:
    """The words of a command behind `python`, its place holders filled in."""
    if "my_knee" in text and not (folder / "my_knee").exists():
        (folder / "my_knee").symlink_to(folder / "data" / "Brain_AD")  # the made-up data set under another name
    if "runs/NAME" in text:
        text = text.replace("runs/NAME", next(path for path in (folder / "runs").iterdir()).as_posix())
    more = " ".join(value for pattern, value in SHORTENED.items() if re.match(pattern, text))
    return f"{text} {more}".removeprefix("python ").removeprefix("-m ").split()


def test_commands_as_they_stand(command, tmp_path):
    shown = [line.text for line in doc_commands() if not line.mark and line.text.startswith("python ")]
    assert len(set(shown)) >= 12
    for text in dict.fromkeys(shown):
        done = command(*typed(text, tmp_path), cwd=tmp_path)  # another folder than the project's
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    for made in ("ckpt/Brain.pth", "out.pth", "demo/report/Brain/index.html", "demo/pictures/Brain.png"):
        assert (tmp_path / made).stat().st_size > 1000
    assert len((tmp_path / "demo" / "predictions" / "predictions.csv").read_text().splitlines()) == 31

    # What predict.md shows for Python.
    page = PREDICT_PAGE.read_text(encoding="utf-8")
    lines = page[page.index("    from engine import InputError, load") :].splitlines()
    (tmp_path / "snippet.py").write_text("\n".join(line[4:] for line in lines))
    image = next((tmp_path / "data" / "Brain_AD" / "test" / "Ungood" / "img").iterdir())
    (tmp_path / "scan.png").write_bytes(image.read_bytes())
    (tmp_path / "damaged.png").write_bytes(image.read_bytes()[:50])
    nibabel.Nifti1Image(np.arange(4000, dtype=np.int16).reshape(20, 20, 10), np.eye(4)).to_filename(
        tmp_path / "head.nii.gz"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "snippet.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    printed = done.stdout.splitlines()[-17:]  # after what is said of the weights
    assert [line.split()[0] for line in printed[3:13]] == [str(number) for number in range(10)]
    assert printed[13] == printed[14]
    assert "damaged.png" in printed[16]
