"""Bad input through the real commands: exit code 2, one line that names the file or flag, and no file is lost."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import fine, refused
from tests.helpers.data import SMALL
from tests.unit.test_weights import Payload

UNGOOD = "Brain_AD/valid/Ungood/img"
FIRST = "valid_Ungood_00000.png"


@pytest.fixture(scope="session")
def checkpoint(trained) -> Path:
    """The checkpoint of a real run."""
    return trained.ckpt / "Brain.pth"


@pytest.fixture
def folder(phantoms, checkpoint, tmp_path) -> Path:
    """A copy of the data (under data/) and of the checkpoint that a test may damage."""
    shutil.copytree(phantoms / "Brain_AD", tmp_path / "data" / "Brain_AD")
    (tmp_path / "ckpt").mkdir()
    shutil.copy(checkpoint, tmp_path / "ckpt" / "Brain.pth")
    return tmp_path


def flags(folder: Path, script: str = "train.py") -> list[object]:
    """Flags of a command that would succeed."""
    shared = ["--obj", "Brain", "--data_path", folder / "data", "--save_path", folder / "ckpt", "--device", "cpu"]
    return [*shared, *SMALL, "--shot", 2, "--epoch", 2] if script == "train.py" else shared


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--obj", "Knee"], ["Knee_AD", "--obj Knee"]),
        (["--shot", 9], ["--shot 9", "4 abnormal images"]),
        (["--shot", 4, "--select", "valid"], ["--select valid"]),
        (["--features_list", 0, 99], ["--features_list 0 99"]),
        (["--pretrain", "openai", "--weights", "nowhere.pt"], ["nowhere.pt"]),
        (["--device", "cuda:7"], ["--device cuda:7"]),
        (["--save_path", "/proc/x"], ["--save_path /proc/x"]),
        (["--prompts", "/dev/zero"], ["--prompts /dev/zero"]),
    ],
)
def test_bad_training_flags_are_refused(command, folder, checkpoint, arguments, words):
    refused(command("train.py", *flags(folder), *arguments), *words)
    assert (folder / "ckpt" / "Brain.pth").read_bytes() == checkpoint.read_bytes()


def test_unknown_flag_prints_one_line(command):
    """An unknown flag prints one error line, without the usage of argparse."""
    scripts = ("train.py", "test.py", "predict.py", "reproduce.py", "dataset.check", "dataset.phantom", "CLIP.download")
    for script in (*scripts, "engine.checkpoint"):
        result = command(script, "--no_such_flag")
        refused(result)
        assert "usage" not in result.stdout + result.stderr


def shot_list(text: str) -> Callable[[Path], None]:
    def write(data: Path) -> None:
        (data / "Brain_AD/fewshot_seed/my2-shot.txt").write_text(text)

    return write


def cut_short(name: str) -> Callable[[Path], object]:
    return lambda data: (data / name).write_bytes((data / name).read_bytes()[:60])


SPOILED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing data": (shutil.rmtree, ["--data_path", "Brain_AD"]),
    "missing class": (lambda data: shutil.rmtree(data / UNGOOD), ["Brain_AD/valid/Ungood"]),
    "name with a line break": (lambda data: (data / "Brain_AD/test/good/img/a\nb.png").write_text("x"), ["a b.png"]),
    "list names a missing file": (shot_list(f"a-0: nobody.png\nn-0: {FIRST}\n"), ["my2-shot.txt", "nobody.png"]),
    "truncated PNG": (cut_short(f"{UNGOOD}/{FIRST}"), [FIRST]),
    "truncated mask of a test image": (
        cut_short("Brain_AD/test/Ungood/anomaly_mask/test_Ungood_00002.png"), ["test_Ungood_00002.png"],
    ),
    "pipe": (lambda data: os.mkfifo(data / UNGOOD / "x.png"), ["x.png"]),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILED)
def test_bad_data_is_refused(command, folder, checkpoint, what):
    spoil, words = SPOILED[what]
    spoil(folder / "data")
    result = command("train.py", *flags(folder))
    refused(result, *words)
    assert "epoch 1" not in result.stdout
    assert (folder / "ckpt" / "Brain.pth").read_bytes() == checkpoint.read_bytes()


def test_bad_checkpoints_are_refused(command, folder, checkpoint):
    """Checkpoints with contradicting settings, code, other weights or damage are refused, and so are other files."""
    path, arguments = folder / "ckpt" / "Brain.pth", flags(folder, "test.py")
    good = torch.load(checkpoint, weights_only=True)

    def check(change: dict, *words: str) -> None:
        torch.save({**good, **change}, path)
        refused(command("test.py", *arguments), "Brain.pth", *words)

    check({"settings": {**good["settings"], "visionA": "MCNNFC"}})
    check({"about": Payload(folder / "ran")})
    refused(command("engine.checkpoint", "show", path), "Brain.pth")
    assert not (folder / "ran").exists()
    check({"settings": {**good["settings"], "weights_sha256": "f" * 64}}, "f" * 64, "--weights")
    allowed = command("test.py", *arguments, "--allow_other_weights")
    fine(allowed)
    assert any("warning" in line and "f" * 64 in line for line in allowed.stderr.splitlines())
    path.write_bytes(checkpoint.read_bytes()[:-1000])
    refused(command("test.py", *arguments), "Brain.pth")
    refused(command("test.py", *arguments, "--ckpt", "README.md"), "README.md")
    refused(command("predict.py", "--ckpt", folder, folder, "--out", folder / "out"), str(folder))


def test_nan_loss_stops_the_training(command, folder, checkpoint):
    """Training stops and names epoch, step and flag; an existing checkpoint is kept."""
    refused(command("train.py", *flags(folder), "--learning_rate", "1e38"), "epoch 1", "step 2", "--learning_rate")
    assert (folder / "ckpt" / "Brain.pth").read_bytes() == checkpoint.read_bytes()


def test_disk_full_while_tokens_are_written(command, folder):
    """A full disk is reported with --cache_dir; here a limit on the file size makes the same calls fail."""
    tokens = 4612  # bytes of the tokens of one image and layer with their CRC; all files written before are smaller
    arguments = [*flags(folder), "--cache", "disk", "--cache_dir", folder / "cache"]
    refused(command("train.py", *arguments, file_bytes=tokens - 1), "--cache_dir")
    assert not list((folder / "cache").rglob("*.tokens"))
    fine(command("train.py", *arguments))


def test_results_only_replace_files_of_the_same_kind(command, folder, checkpoint):
    """Outputs do not replace folders, pipes, devices, or files of another kind, such as checkpoints and images."""
    os.mkfifo(folder / "pipe")
    (folder / "null").symlink_to("/dev/null")
    kept = folder / "kept.pth"
    shutil.copy(checkpoint, kept)
    image = folder / "data/Brain_AD/test/good/img/test_good_00000.png"
    before = image.read_bytes()
    for name in ("pipe", "null", "data", "kept.pth"):
        for flag in ("--out_json", "--save_scores"):
            refused(command("test.py", *flags(folder, "test.py"), flag, folder / name), f"{flag} {folder / name}")
    for flag in ("--figures", "--report"):
        result = command("test.py", *flags(folder, "test.py"), flag, kept)
        assert "tokens" not in refused(result, flag) + result.stdout  # refused before anything is computed
    refused(command("train.py", *flags(folder), "--out_json", kept), "--out_json")
    refused(command("engine.checkpoint", "export", checkpoint, image), image.name)
    calibrate = ["--calibrate", folder / "data/Brain_AD", "--save_ckpt", image]
    refused(command("predict.py", "--ckpt", checkpoint, "--device", "cpu", *calibrate), "--save_ckpt")
    assert (folder / "pipe").is_fifo()
    assert (folder / "null").is_symlink()
    assert (kept.read_bytes(), image.read_bytes()) == (checkpoint.read_bytes(), before)


def test_password_in_a_url_is_not_printed(command, folder):
    env = {"WANDB_BASE_URL": "http://ann:s3cr@et@127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    done = command("train.py", *flags(folder), env={**env, "HOME": str(folder)})
    refused(done, "WANDB_BASE_URL")
    assert not any(part in done.stdout + done.stderr for part in ("s3cr", "et@127"))
