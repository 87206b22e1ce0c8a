"""Bad input through the real commands: exit code 2, one line that names the file or flag, nothing written is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from CLIP.clip import random_state
from CLIP.config import ModelConfig
from tests.helpers.attacks import refused
from tests.helpers.commands import ROOT
from tests.helpers.data import SMALL

OWN_WEIGHTS = ["--pretrain", "openai", "--weights"]
MICRO = ModelConfig("micro", 4, False, 8, 4, 8, 1, 1, 5, 16, 8, 1, 1, {})
UNGOOD = "Brain_AD/valid/Ungood/img"
FIRST = "valid_Ungood_00000.png"


@pytest.fixture(scope="session")
def checkpoint(trained) -> Path:
    """The checkpoint of a real run."""
    return trained.ckpt / "Brain.pth"


@pytest.fixture
def folder(phantoms, checkpoint, tmp_path) -> Path:
    """A copy of the data under data/ and of the checkpoint, to be spoiled."""
    shutil.copytree(phantoms / "Brain_AD", tmp_path / "data" / "Brain_AD")
    (tmp_path / "ckpt").mkdir()
    shutil.copy(checkpoint, tmp_path / "ckpt" / "Brain.pth")
    return tmp_path


def flags(folder: Path, script: str = "train.py") -> list[object]:
    """The flags that would do."""
    shared = ["--obj", "Brain", "--data_path", folder / "data", "--save_path", folder / "ckpt", "--device", "cpu"]
    return [*shared, *SMALL, "--shot", 2, "--epoch", 2] if script == "train.py" else shared


def test_without_warm_imports(folder):
    """A fresh start of each script, as everything below relies on `Commands`."""
    for script in ("train.py", "test.py"):
        arguments = [sys.executable, script, *map(str, flags(folder, script)), "--data_path", "nowhere"]
        result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
        line = refused(result, "--data_path nowhere", "Brain_AD", "docs/data.md", "python -m dataset.phantom")
        assert result.stderr == line + "\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--obj", "Knee"], ["Knee_AD", "--obj Knee is none of Brain, Chest"]),
        (["--no_such_flag", 1], ["--no_such_flag"]),
        (["--shot", 9], ["--shot 9", "4 abnormal images"]),
        (["--shot", 4, "--select", "valid"], ["--select valid", "0 normal and 0 abnormal"]),
        (["--iterate", 5], ["--iterate 5", "my2-shot.txt"]),
        (["--features_list", 0, 99], ["--features_list 0 99", "layers 1 to 4"]),
        (["--img_size", 10], ["--img_size 10"]),
        (["--pretrain", "laion400m"], ["--pretrain laion400m"]),
        ([*OWN_WEIGHTS, "nowhere.pt"], ["nowhere.pt", "python -m CLIP.download"]),
        ([*OWN_WEIGHTS, "/dev/zero"], ["/dev/zero"]),
        (["--device", "cuda:7"], ["--device cuda:7"]),
        (["--save_path", "/proc/x"], ["--save_path /proc/x"]),
        (["--out_json", "README.md/x"], ["--out_json README.md/x"]),
        (["--cache_dir", "x" * 300], ["xxx"]),
        (["--prompts", "/dev/zero"], ["--prompts /dev/zero"]),
    ],
)
def test_flags_of_training(command, folder, checkpoint, arguments, words):
    refused(command("train.py", *flags(folder), *arguments), *words)
    assert (folder / "ckpt" / "Brain.pth").read_bytes() == checkpoint.read_bytes()


def test_a_bad_flag_is_one_line(command):
    """Without argparse's usage, which --help shows."""
    scripts = ("train.py", "test.py", "predict.py", "reproduce.py", "dataset.check", "dataset.phantom", "CLIP.download")
    for script in (*scripts, "engine.checkpoint"):
        result = command(script, "--no_such_flag")
        refused(result)
        assert "usage" not in result.stdout + result.stderr


def shot_list(text: str) -> Callable[[Path], None]:
    def write(data: Path) -> None:
        path = data / "Brain_AD/fewshot_seed/my2-shot.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    return write


def cut_short(name: str) -> Callable[[Path], None]:
    def cut(data: Path) -> None:
        path = data / name
        path.write_bytes(path.read_bytes()[:-200])

    return cut


def replace(make: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda path: (path.unlink(), make(path))


def mask(change: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda data: change(data / "Brain_AD/valid/Ungood/anomaly_mask" / FIRST)


SPOILED = {
    "missing data": (shutil.rmtree, ["--data_path", "Brain_AD", "docs/data.md", "python -m dataset.phantom"]),
    "missing class": (lambda data: shutil.rmtree(data / UNGOOD), ["Brain_AD/valid/Ungood", "no images"]),
    "list that is a pipe": (
        lambda data: (shot_list("")(data), replace(os.mkfifo)(data / "Brain_AD/fewshot_seed/my2-shot.txt")),
        ["my2-shot.txt", "pipe"],
    ),
    "split that links to itself": (
        lambda data: (shutil.rmtree(data / "Brain_AD/test"), (data / "Brain_AD/test").symlink_to("test")),
        ["Brain_AD", "no known layout"],
    ),
    "name with a line break": (lambda data: (data / "Brain_AD/test/good/img/a\nb.png").write_text("x"), ["a b.png"]),
    "list names a missing file": (shot_list(f"a-0: nobody.png\nn-0: {FIRST}\n"), ["my2-shot.txt", "nobody.png"]),
    "list with ..": (shot_list(f"a-0: ../../{FIRST}\nn-0: x.png\n"), ["my2-shot.txt", f"../../{FIRST}"]),
    "truncated PNG": (cut_short(f"{UNGOOD}/{FIRST}"), [FIRST]),
    "mask missing": (mask(Path.unlink), [FIRST, "mask"]),
    "mask of another size": (mask(lambda path: Image.open(path).resize((30, 30)).save(path)), [FIRST, "(30, 30)"]),
}


@pytest.mark.parametrize("what", SPOILED)
def test_data(command, folder, checkpoint, what):
    spoil, words = SPOILED[what]
    spoil(folder / "data")
    refused(command("train.py", *flags(folder)), *words)
    assert (folder / "ckpt" / "Brain.pth").read_bytes() == checkpoint.read_bytes()


class Payload:
    """Makes a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return open, (str(self.marker), "w")


def test_weights(command, folder):
    """Truncated, of another model, with NaN, no weights, wanting to run code; none is read, the folder is as before."""
    path, tiny = folder / "weights.pt", random_state(ModelConfig.load("ViT-tiny-14-56"), seed=0)
    arguments = [*flags(folder), *OWN_WEIGHTS, path]
    before = sorted(folder.rglob("*"))

    def check(content: object, *words: str) -> None:
        torch.save(content, path)
        refused(command("train.py", *arguments), "weights.pt", *words)
        path.unlink()

    check(random_state(MICRO, seed=0), "ViT-tiny-14-56")
    check({**tiny, "text_projection": tiny["text_projection"] * float("nan")}, "text_projection", "NaN")
    check({"fc.weight": torch.ones(1)})
    check({**tiny, "x": Payload(folder / "ran")})
    assert not (folder / "ran").exists()
    torch.save(tiny, path)
    path.write_bytes(path.read_bytes()[:-1000])
    refused(command("train.py", *arguments), "weights.pt", "fetch it again")
    path.unlink()
    assert sorted(folder.rglob("*")) == before


def test_checkpoints(command, folder, checkpoint):
    """What is no checkpoint, damaged, of other settings, with NaN, or with code in it."""
    path, arguments = folder / "ckpt" / "Brain.pth", flags(folder, "test.py")
    good = torch.load(checkpoint, weights_only=True)

    def check(change: dict, *words: str) -> None:
        torch.save({**good, **change}, path)
        refused(command("test.py", *arguments), *words)

    check({"settings": {**good["settings"], "visionA": "MCNNFC"}}, "Brain.pth", "do not fit its settings")
    check({"settings": {**good["settings"], "weights_sha256": "f" * 64}}, "Brain.pth", "f" * 64, "--weights")
    check({"settings": {"obj": "Brain"}}, "Brain.pth", "damaged")
    adapters = {name: tensor * float("nan") for name, tensor in good["normal_det_adapters"].items()}
    check({"normal_det_adapters": adapters}, "Brain.pth", "NaN")
    check({"about": Payload(folder / "ran")}, "Brain.pth", "could run code")
    refused(command("engine.checkpoint", "show", path), "Brain.pth", "could run code")
    assert not (folder / "ran").exists()
    path.write_bytes(checkpoint.read_bytes()[:-1000])
    refused(command("test.py", *arguments), "Brain.pth", "damaged")
    path.unlink()
    refused(command("test.py", *arguments), "Brain.pth", "not found")
    refused(command("test.py", *arguments, "--ckpt", "README.md"), "README.md", "not a checkpoint")
    refused(command("test.py", *arguments, "--ckpt", folder), str(folder), "not a checkpoint")
    refused(command("predict.py", "--ckpt", folder, folder, "--out", folder / "out"), str(folder))


def test_a_loss_that_becomes_nan(command, folder):
    """It stops and names epoch and step, before an image is scored; the checkpoint of the last good epoch stays."""
    path = folder / "ckpt" / "Brain.pth"
    before = path.read_bytes()
    refused(command("train.py", *flags(folder), "--learning_rate", "1e38"), "epoch 1", "step 2", "--learning_rate")
    assert path.read_bytes() == before


def test_a_full_disk(command, folder, checkpoint):
    """The largest file is limited, which fails in the same calls: checkpoint, feature store."""
    arguments = [*flags(folder), "--cache_dir", folder / "cache"]
    refused(
        command("train.py", *arguments, "--cache", "ram", file_bytes=300_000),
        "last.pth",
        "cannot be written",
        "intact",
    )
    assert (folder / "ckpt" / "Brain.pth").read_bytes() == checkpoint.read_bytes()
    assert [path.name for path in (folder / "ckpt").iterdir()] == ["Brain.pth"]

    tokens = 4612  # bytes of an image's tokens of a layer and their CRC; no file before them is as large
    refused(command("train.py", *arguments, "--cache", "disk", file_bytes=tokens - 1), "--cache_dir", "stays usable")
    assert not list((folder / "cache").rglob("*.tokens"))
    again = command("train.py", *arguments, "--cache", "disk", "--out_json", folder / "disk.json")
    assert again.returncode == 0
    whole = command("train.py", *arguments, "--cache", "ram", "--out_json", folder / "ram.json")
    assert again.stdout.splitlines()[-2:] == whole.stdout.splitlines()[-2:]


def test_only_files_are_replaced(command, folder):
    os.mkfifo(folder / "pipe")
    (folder / "null").symlink_to("/dev/null")
    for name in ("pipe", "null", "data"):
        for script in ("train.py", "test.py"):
            result = command(script, *flags(folder, script), "--out_json", folder / name)
            refused(result, f"--out_json {folder / name}: a folder, a device or a pipe")
        result = command("engine.checkpoint", "export", folder / "ckpt/Brain.pth", folder / name)
        refused(result, f"{folder / name}: a folder, a device or a pipe")
    assert (folder / "pipe").is_fifo()
    assert (folder / "null").is_symlink()


def test_other_weights_only_where_they_are_allowed(command, folder):
    path = folder / "ckpt" / "Brain.pth"
    content = torch.load(path, weights_only=True)
    loaded = content["settings"]["weights_sha256"]
    content["settings"]["weights_sha256"] = "f" * 64
    torch.save(content, path)
    refused(command("test.py", *flags(folder, "test.py")), "f" * 64, loaded, "--weights")
    allowed = command("test.py", *flags(folder, "test.py"), "--allow_other_weights")
    assert allowed.returncode == 0
    warning = next(line for line in allowed.stderr.splitlines() if "warning" in line)
    assert "f" * 64 in warning
    assert loaded in warning
