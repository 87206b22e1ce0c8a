"""The commands of README.md and docs/, run in their order in one empty folder; and the notebook."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import nibabel
import numpy as np
import pytest
from nbclient import NotebookClient

from tests.helpers.docs import ROOT, DocCommand, doc_commands

SAMPLE = ROOT / "data" / "sample" / "BreastBUSI_AD"
PREDICT_PAGE, NOTEBOOK = ROOT / "docs" / "predict.md", ROOT / "docs" / "tour.ipynb"
# Flags that shorten trainings to one epoch, and extend the resumed run by one.
SHORTENED = {
    r"python train\.py (?!--resume)": "--epoch 1",
    r"python train\.py --resume": "--epoch 2",
    r"python reproduce\.py --table baselines": "--epoch 1 --seeds 111",
}


def is_run(line: DocCommand) -> bool:
    """Whether a command is run here: it needs nothing, or it works on the sample with the small random tower."""
    on_the_sample = line.mark == "needs weights" and re.search(r"Breast|runs/NAME", line.text)
    return line.text.startswith(("python ", "cp ")) and (not line.mark or bool(on_the_sample))


def typed(text: str, folder: Path) -> list[str]:
    """Words of a command after `python`, with its placeholders filled in."""
    if "my_knee" in text and not (folder / "my_knee").exists():
        shutil.copytree(SAMPLE, folder / "my_knee")
    if "runs/NAME" in text:
        text = text.replace("NAME", next(path.name for path in (folder / "runs").iterdir()))
    text = re.sub(r"--image_tower dinov2-small( --img_size \d+)?", "--img_size 56", text)
    more = " ".join(value for pattern, value in SHORTENED.items() if re.match(pattern, text))
    return shlex.split(f"{text} {more}".removeprefix("python ").removeprefix("-m "))


def test_installed_project_is_importable_from_any_folder(tmp_path):
    """`pip install -e .` makes the modules importable; it installs into a temporary folder, not the environment."""
    pytest.importorskip("setuptools")
    (tmp_path / "project").mkdir()
    for name in ("CLIP", "Prompt", "dataset", "engine", "loss.py", "utils.py", "README.md", "pyproject.toml",
                 "requirements.txt"):  # fmt: skip
        (tmp_path / "project" / name).symlink_to(ROOT / name)  # keeps build files out of the project
    flags = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", tmp_path / "site"]
    pip = [sys.executable, "-m", "pip", "install", *flags, "-e", tmp_path / "project"]
    subprocess.run(pip, cwd=tmp_path, capture_output=True, check=True)
    names = ("CLIP.clip", "Prompt.CoOp", "dataset.check", "engine.predictor", "loss", "utils")
    find = f"import site\nsite.addsitedir({str(tmp_path / 'site')!r})\nfrom importlib.util import find_spec\n"
    find += f"assert all(map(find_spec, {names}))"
    subprocess.run([sys.executable, "-E", "-c", find], cwd=tmp_path, check=True)


def test_documented_commands_run(command, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sample").symlink_to(SAMPLE.parent)
    shown = dict.fromkeys(line.text for line in doc_commands() if is_run(line))
    assert len(shown) >= 15
    for text in shown:
        if text.startswith("cp "):
            subprocess.run(text.split(), cwd=tmp_path, check=True)
            continue
        done = command(*typed(text, tmp_path), cwd=tmp_path)  # not the project's folder
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    for made in ("ckpt/BreastBUSI.pth", "out.pth", "report/index.html", "page/index.html", "results/baselines.md"):
        assert (tmp_path / made).stat().st_size > 500
    assert len((tmp_path / "predictions" / "predictions.csv").read_text().splitlines()) == 41

    # The Python example of predict.md.
    page = PREDICT_PAGE.read_text(encoding="utf-8")
    lines = page[page.index("    from engine import InputError, load") :].split("\n## ")[0].splitlines()
    (tmp_path / "snippet.py").write_text("\n".join(line[4:] for line in lines))
    image = next((SAMPLE / "test" / "Ungood" / "img").iterdir())
    (tmp_path / "scan.png").write_bytes(image.read_bytes())
    (tmp_path / "damaged.png").write_bytes(image.read_bytes()[:50])
    nibabel.Nifti1Image(np.arange(4000, dtype=np.int16).reshape(20, 20, 10), np.eye(4)).to_filename(
        tmp_path / "head.nii.gz"
    )
    done = command(str(tmp_path / "snippet.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()[-17:]  # after the lines about the weights
    assert [line.split()[0] for line in printed[3:13]] == [str(number) for number in range(10)]
    assert printed[13] == printed[14]
    assert "damaged.png" in printed[16]


def test_tour_notebook_runs(monkeypatch):
    """The notebook runs in its own folder, has outputs, and is small."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(len(cell.source.splitlines()) for cell in code) <= 120
    assert NOTEBOOK.stat().st_size < 1_500_000
    before = [[output.output_type for output in cell.outputs] for cell in code]
    assert all(before[1:]), "a cell without its output"  # the first cell only sets up
    for cell in code:
        cell.source = cell.source.replace("--epoch 12", "--epoch 3")
        cell.outputs = []
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    for cell, kinds in zip(code, before, strict=True):
        assert {output.output_type for output in cell.outputs} >= set(kinds)
