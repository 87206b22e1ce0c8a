"""What the attack tests share: data, a run and a checkpoint, made once; commands that something happens inside of."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from dataset import phantom
from tests.helpers.commands import Commands
from tests.helpers.data import SMALL

VALID, TEST = 4, 5  # images of each class
UNGOOD = "Brain_AD/valid/Ungood"
# Runs a script of the project, with arguments, after something has been changed inside of it.
DRIVER = """import os, runpy, signal, sys
sys.argv = sys.argv[1:]
{code}
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Home:
    """Brain_AD in data/, ckpt/Brain.pth, and runs/one that made it: 2 shots, 2 epochs. To be copied, not changed."""

    path: Path

    @property
    def ckpt(self) -> Path:
        """The checkpoint."""
        return self.path / "ckpt/Brain.pth"

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.path / "runs/one"

    def flags(self, data: Path | None = None) -> list[object]:
        """What train.py and test.py take to find the data; kept tokens in memory."""
        return ["--obj", "Brain", "--data_path", data or self.path / "data", "--device", "cpu"]

    def train(self, folder: Path, data: Path | None = None) -> list[object]:
        """A run called `one` in `folder`, by default of two epochs."""
        paths = ["--save_path", folder / "ckpt", "--run_dir", folder / "runs", "--cache_dir", folder / "store"]
        return [*SMALL, *self.flags(data), *paths, "--shot", 2, "--epoch", 2, "--exp_name", "one"]

    def test(self, data: Path | None = None) -> list[object]:
        """A test of the checkpoint."""
        return [*self.flags(data), "--ckpt", self.ckpt]

    def copy_data(self, folder: Path) -> Path:
        """A copy of the data, to be spoiled."""
        return Path(shutil.copytree(self.path / "data", folder / "data"))

    def copy_run(self, folder: Path) -> Path:
        """A copy of the run's folder, to be spoiled."""
        return Path(shutil.copytree(self.run, folder / "runs/one"))


def make_home(command: Commands, base: Path) -> Home:
    """The home, made by the first of pytest's workers that asks; `base` is pytest's folder of temporary files."""
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "attacked"
    home, done = Home(root), root / "done"
    with FileLock(f"{root}.lock"):
        if not done.exists():
            shutil.rmtree(root, ignore_errors=True)
            phantom.write(root / "data", ["Brain"], valid=VALID, test=TEST, seed=0, size=64)
            result = command("train.py", *home.train(root))
            assert result.returncode == 0, result.stderr
            done.touch()
    return home


def driver(folder: Path, code: str) -> str:
    """A script that runs another, the first of its arguments, after `code`."""
    path = folder / f"driver{len(list(folder.glob('driver*.py')))}.py"
    path.write_text(DRIVER.format(code=code))
    return str(path)


def refused(result: subprocess.CompletedProcess[str], *words: str) -> str:
    """The one line of a refusal, which holds `words`: exit code 2, no traceback."""
    assert result.returncode == 2, (result.returncode, result.stdout[-500:], result.stderr[-2000:])
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def fine(result: subprocess.CompletedProcess[str]) -> str:
    """The stdout of a command that must have succeeded."""
    assert result.returncode == 0, (result.returncode, result.stderr[-3000:])
    assert "Traceback" not in result.stderr
    return result.stdout


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())
