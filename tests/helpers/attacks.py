"""What the attack tests share: data, a run and a checkpoint, made once; commands that something happens inside of."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.data import SMALL

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
# For `driver`. A folder `closed` cannot be read: root may read every one, so the system's refusal is played.
CLOSED = """
import errno
def closed(event, args):
    if event in ("os.scandir", "os.listdir") and args and str(args[0]).endswith("/closed"):
        raise PermissionError(errno.EACCES, "Permission denied", str(args[0]))
sys.addaudithook(closed)
"""
# The most memory that it has held, in kB, as its last word on stdout.
PEAK = """
import atexit, resource
atexit.register(lambda: print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
"""


@dataclass(frozen=True)
class Home:
    """The phantoms and the run on Brain that all tests share, 2 shots and 2 epochs; to be copied, not changed."""

    data: Path
    ckpt: Path  # Brain.pth
    run: Path  # the run's folder

    def flags(self, data: Path | None = None) -> list[object]:
        """What train.py and test.py take to find the data."""
        return ["--obj", "Brain", "--data_path", data or self.data, "--device", "cpu"]

    def train(self, folder: Path, data: Path | None = None) -> list[object]:
        """The same training, as a run called `one` in `folder`."""
        paths = ["--save_path", folder / "ckpt", "--run_dir", folder / "runs", "--cache_dir", folder / "store"]
        return [*SMALL, *self.flags(data), *paths, "--shot", 2, "--epoch", 2, "--exp_name", "one", "--select", "test"]

    def test(self, data: Path | None = None) -> list[object]:
        """A test of the checkpoint."""
        return [*self.flags(data), "--ckpt", self.ckpt]

    def resume(self, run: Path) -> list[object]:
        """Going on with a copy of the run; the paths that it writes to are given anew."""
        return ["--resume", run, "--save_path", run.parent / "ckpt", "--out_json", run.parent / "out.json"]

    def copy_data(self, folder: Path) -> Path:
        """A copy of the data, to be spoiled."""
        shutil.copytree(self.data / "Brain_AD", folder / "data/Brain_AD")
        return folder / "data"

    def copy_run(self, folder: Path) -> Path:
        """A copy of the run's folder, to be spoiled."""
        return Path(shutil.copytree(self.run, folder / "runs/one"))


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


def rows(out: Path) -> list[dict[str, str]]:
    """The table of a prediction, predictions.csv in `out`."""
    with (out / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())
