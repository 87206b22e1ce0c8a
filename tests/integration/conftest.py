"""Fixtures: real commands, made-up data sets, and a trained run on each of two, made once for all workers of pytest."""

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

TEST_IMAGES = 7  # of each class


@pytest.fixture(scope="session")
def command() -> Iterator[Commands]:
    commands = Commands()
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id) -> Callable[[str, Callable[[Path], None]], Path]:
    """`once(name, make)`: the folder that `make` fills, which the first worker to ask makes for all of them."""
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
    """Brain_AD and Chest_AD: 4 + 4 images to choose shots from and 7 + 7 to test on. To be read, not written."""

    def draw(folder: Path) -> None:
        phantom.write(folder, ["Brain", "Chest"], valid=4, test=TEST_IMAGES, seed=0, size=64)

    return once("phantoms", draw)


@dataclass(frozen=True)
class Trained:
    """A finished run on each of the phantoms: 2 shots, 2 epochs. To be read, not written."""

    data: Path
    folder: Path

    @property
    def ckpt(self) -> Path:
        """The folder of Brain.pth and Chest.pth."""
        return self.folder / "ckpt"

    def run(self, obj: str) -> Path:
        """The run's folder."""
        return self.folder / "runs" / obj

    def output(self, obj: str) -> str:
        """What train.py printed."""
        return (self.folder / f"{obj}.out").read_text()

    def result(self, obj: str) -> dict[str, Any]:
        """What --out_json wrote."""
        return json.loads((self.folder / f"{obj}.json").read_text())

    def flags(self, obj: str, folder: Path) -> list[object]:
        """The same training into another folder."""
        paths = ["--save_path", folder / "ckpt", "--run_dir", folder / "runs", "--out_json", folder / f"{obj}.json"]
        run = ["--shot", 2, "--epoch", 2, "--select", "test", "--exp_name", obj]
        return [*SMALL, *self.test_flags(obj)[:4], *paths, *run]

    def test_flags(self, obj: str) -> list[object]:
        """What test.py needs for the checkpoint."""
        return ["--obj", obj, "--data_path", self.data, "--save_path", self.ckpt, "--device", "cpu"]


@pytest.fixture(scope="session")
def trained(once, phantoms, command) -> Trained:
    def train(folder: Path) -> None:
        for obj in ("Brain", "Chest"):
            done = command("train.py", *Trained(phantoms, folder).flags(obj, folder))
            assert done.returncode == 0, done.stderr
            (folder / f"{obj}.out").write_text(done.stdout)

    return Trained(phantoms, once("trained", train))
