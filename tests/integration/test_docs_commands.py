"""The commands of README.md and docs/ as they stand there, in their order, in one empty folder."""

from __future__ import annotations

import re
from pathlib import Path

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
    lines = PREDICT_PAGE.read_text(encoding="utf-8").splitlines()
    first = lines.index("    from engine import load")
    snippet = "\n".join(line[4:] for line in lines[first : first + 4])
    image = next((tmp_path / "data" / "Brain_AD" / "test" / "Ungood" / "img").iterdir())
    (tmp_path / "a.png").write_bytes(image.read_bytes())
    before = "import numpy as np; from PIL import Image\npicture = Image.open('a.png'); array = np.asarray(picture)\n"
    after = "\n    print(f'{result.score:.3f} {result.abnormal} {result.heat.shape}')"
    (tmp_path / "snippet.py").write_text(before + snippet + after)
    done = command(str(tmp_path / "snippet.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3
