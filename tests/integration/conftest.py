"""Fixtures: real commands, two synthetic data sets and a training on each, made once for all workers of pytest."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from dataset import phantom
from tests.helpers.commands import Commands
from tests.helpers.data import SMALL

TEST_IMAGES = 7  # per class


@pytest.fixture(scope="session")
def command() -> Iterator[Commands]:
    commands = Commands()
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id) -> Callable[[str, Callable[[Path], None]], Path]:
    """`once(name, make)`: the folder filled by `make`; the first worker that asks for it fills it for all."""
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "once"
    root.mkdir(exist_ok=True)

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def phantoms(once) -> Path:
    """Brain_AD and Chest_AD, read-only: 4 + 4 images to draw shots from and 7 + 7 test images."""

    def draw(folder: Path) -> None:
        phantom.write(folder, ["Brain", "Chest"], valid=4, test=TEST_IMAGES, seed=0, size=64)

    return once("phantoms", draw)


@dataclass(frozen=True)
class Trained:
    """A finished run on each of the phantoms, read-only: 2 shots, 2 epochs."""

    data: Path
    folder: Path

    @property
    def ckpt(self) -> Path:
        """Folder of Brain.pth and Chest.pth."""
        return self.folder / "ckpt"

    def run(self, obj: str) -> Path:
        """Folder of the run."""
        return self.folder / "runs" / obj

    def output(self, obj: str) -> str:
        """Output of train.py."""
        return (self.folder / f"{obj}.out").read_text()

    def result(self, obj: str) -> dict[str, Any]:
        """Results written by --out_json."""
        return json.loads((self.folder / f"{obj}.json").read_text())

    def flags(self, obj: str, folder: Path) -> list[object]:
        """Flags of the same training into another folder."""
        paths = ["--save_path", folder / "ckpt", "--run_dir", folder / "runs", "--out_json", folder / f"{obj}.json"]
        run = ["--shot", 2, "--epoch", 2, "--select", "test", "--exp_name", obj]
        return [*SMALL, *self.test_flags(obj)[:4], *paths, *run]

    def test_flags(self, obj: str) -> list[object]:
        """Flags of test.py for the checkpoint."""
        return ["--obj", obj, "--data_path", self.data, "--save_path", self.ckpt, "--device", "cpu"]


@pytest.fixture(scope="session")
def trained(once, phantoms, command) -> Trained:
    def train(folder: Path) -> None:
        for obj in ("Brain", "Chest"):
            done = command("train.py", *Trained(phantoms, folder).flags(obj, folder))
            assert done.returncode == 0, done.stderr
            (folder / f"{obj}.out").write_text(done.stdout)

    return Trained(phantoms, once("trained", train))
