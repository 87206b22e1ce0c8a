"""Bad input through the real commands: exit code 2, one line that names the file or flag, nothing written is lost."""

from __future__ import annotations

import json
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
from utils import run_cli

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
        (["--obj", "Liver"], ["Liver_AD"]),
        (["--obj", "Knee"], ["Knee_AD", "--obj Knee is none of Brain, Chest"]),
        (["--no_such_flag", 1], ["unrecognized arguments: --no_such_flag"]),
        (["--shot", 0], ["--shot", "at least 1"]),
        (["--shot", 9], ["--shot 9", "valid", "4 abnormal images"]),
        (["--shot", 4, "--select", "valid"], ["--select valid", "0 normal and 0 abnormal"]),
        (["--iterate", 5], ["--iterate 5", "my2-shot.txt"]),
        (["--features_list", 0, 99], ["--features_list 0 99", "layers 1 to 4"]),
        (["--features_list", 2, 2], ["--features_list 2 2", "once"]),
        (["--img_size", 10], ["--img_size 10", "smaller than a patch"]),
        (["--img_size", 0], ["--img_size", "at least 1"]),
        (["--learning_rate", -1], ["--learning_rate", "above 0"]),
        (["--learning_rate", "nan"], ["--learning_rate", "above 0"]),
        (["--pretrain", "laion400m"], ["--pretrain laion400m"]),
        ([*OWN_WEIGHTS, "nowhere.pt"], ["nowhere.pt", "python -m CLIP.download"]),
        ([*OWN_WEIGHTS, "/dev/zero"], ["/dev/zero"]),
        (["--device", "cuda:7"], ["--device cuda:7"]),
        (["--device", "gpu"], ["--device gpu"]),
        (["--save_path", "/proc/x"], ["--save_path /proc/x"]),
        (["--save_path", "README.md"], ["--save_path README.md"]),
        (["--out_json", "README.md/x"], ["--out_json README.md/x", "README.md is a file"]),
        (["--out_json", "tests"], ["--out_json tests", "a folder, a device or a pipe"]),
        (["--out_json", "x" * 300], ["--out_json xxx", "too long"]),
        (["--data_path", "x" * 300], ["xxx", "too long"]),
        (["--data_root", ""], ["--data_root", "is empty"]),
        (["--cache_dir", "x" * 300], ["xxx", "too long"]),
        (["--prompts", "/dev/zero"], ["--prompts /dev/zero", "device"]),
        (["--seed", 2**64], ["--seed", "at most 18446744073709551615"]),
        (["--seed", -(2**63) - 1], ["--seed", "at least -9223372036854775808"]),
        (["--batch_size", 65537], ["--batch_size", "at most 65536"]),
        (["--img_size", 4097], ["--img_size", "at most 4096"]),
        (["--num_workers", 0], ["--num_workers", "at least 1"]),
        (["--num_workers", 257], ["--num_workers", "at most 256"]),
        (["--num_workers", "two"], ["--num_workers", "invalid int value: 'two'"]),
        *(
            (["--device", name], [f"--device {name}", "use auto, cpu, cuda or cuda:N"])
            for name in ("meta", "cpu:5", "mps")
        ),
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_without_cuda(command, folder):
    for script in ("train.py", "test.py"):
        refused(command(script, *flags(folder, script), "--device", "cuda"), "--device cuda", "0 CUDA devices")


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


def cut_jpeg(data: Path) -> None:
    path = data / UNGOOD / FIRST
    Image.open(path).convert("RGB").resize((512, 512)).save(data / UNGOOD / "valid_Ungood_00000.jpg")
    path.unlink()
    jpeg = path.with_suffix(".jpg")
    jpeg.write_bytes(jpeg.read_bytes()[: jpeg.stat().st_size // 2])
    mask = data / "Brain_AD/valid/Ungood/anomaly_mask" / FIRST
    Image.open(mask).resize((512, 512)).save(mask)
    shot_list("a-0: valid_Ungood_00000.jpg valid_Ungood_00001.png\nn-0: valid_good_00000.png valid_good_00001.png\n")(
        data
    )


def replace(make: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda path: (path.unlink(), make(path))


def no_images(data: Path) -> None:
    for path in (data / UNGOOD).iterdir():
        path.rename(path.with_suffix(".txt"))


def mask(change: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda data: change(data / "Brain_AD/valid/Ungood/anomaly_mask" / FIRST)


SPOILED = {
    "missing data": (shutil.rmtree, ["--data_path", "Brain_AD", "docs/data.md", "python -m dataset.phantom"]),
    "missing split": (lambda data: shutil.rmtree(data / "Brain_AD/test"), ["Brain_AD/test"]),
    "missing class": (lambda data: shutil.rmtree(data / UNGOOD), [UNGOOD]),
    "no images": (no_images, [UNGOOD, "no images"]),
    "list with an endless name": (shot_list(f"a-0: {'x' * 300}.png\nn-0: x.png\n"), ["my2-shot.txt", "xxx"]),
    "list that is a pipe": (
        lambda data: (shot_list("")(data), replace(os.mkfifo)(data / "Brain_AD/fewshot_seed/my2-shot.txt")),
        ["my2-shot.txt", "pipe"],
    ),
    "data folder that is a file": (
        lambda data: (shutil.rmtree(data / "Brain_AD"), (data / "Brain_AD").touch()),
        ["--data_path", "Brain_AD not found"],
    ),
    "split that links to itself": (
        lambda data: (shutil.rmtree(data / "Brain_AD/test"), (data / "Brain_AD/test").symlink_to("test")),
        ["Brain_AD/test"],
    ),
    "image that links to nothing": (
        lambda data: replace(lambda path: path.symlink_to("/nowhere"))(
            data / "Brain_AD/test/good/img/test_good_00000.png"
        ),
        ["test_good_00000.png", "a link to a file that is not there"],
    ),
    "name with a line break": (
        lambda data: (data / "Brain_AD/test/good/img/a\nb.png").write_text("x"),
        ["a b.png", "not a readable image"],
    ),
    "list names a missing file": (shot_list(f"a-0: nobody.png\nn-0: {FIRST}\n"), ["my2-shot.txt", "nobody.png"]),
    "list with ..": (shot_list(f"a-0: ../../{FIRST}\nn-0: x.png\n"), ["my2-shot.txt", f"../../{FIRST}"]),
    "list with an absolute path": (shot_list("a-0: /etc/passwd\nn-0: x.png\n"), ["my2-shot.txt", "/etc/passwd"]),
    "list of another form": (shot_list("what is this"), ["my2-shot.txt, line 1"]),
    "list in another encoding": (
        lambda data: (shot_list("")(data), (data / "Brain_AD/fewshot_seed/my2-shot.txt").write_bytes(b"\xff\xfe\x00")),
        ["my2-shot.txt"],
    ),
    "truncated PNG": (cut_short(f"{UNGOOD}/{FIRST}"), [FIRST, "not a readable image"]),
    "truncated JPEG": (cut_jpeg, ["valid_Ungood_00000.jpg", "not a readable image"]),
    "text as an image": (
        lambda data: (data / "Brain_AD/test/good/img/test_good_00000.png").write_text("x"),
        ["test_good_00000.png", "not a readable image"],
    ),
    "mask missing": (mask(Path.unlink), [FIRST, "mask"]),
    "mask of another size": (mask(lambda path: Image.open(path).resize((30, 30)).save(path)), [FIRST, "(30, 30)"]),
    "truncated mask": (mask(lambda path: path.write_bytes(path.read_bytes()[:80])), [FIRST, "anomaly_mask"]),
    "truncated test image": (cut_short("Brain_AD/test/good/img/test_good_00001.png"), ["test_good_00001.png"]),
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

    check(random_state(MICRO, seed=0), "does not fit", "(5,8), expected (17,128)", "ViT-tiny-14-56")
    check({**tiny, "text_projection": tiny["text_projection"] * float("nan")}, "text_projection holds NaN")
    check({"fc.weight": torch.ones(1)}, "no CLIP weights")
    check({**tiny, "x": Payload(folder / "ran")}, "could run code")
    torch.save(tiny, path)
    path.write_bytes(path.read_bytes()[:-1000])
    refused(command("train.py", *arguments), "weights.pt", "fetch it again")
    path.unlink()
    assert sorted(folder.rglob("*")) == before


def test_checkpoints(command, folder, checkpoint):
    """What is no checkpoint, damaged, of another model, with NaN or wanting to run code."""
    path, arguments = folder / "ckpt" / "Brain.pth", flags(folder, "test.py")
    good = torch.load(checkpoint, weights_only=True)

    def check(change: dict, *words: str) -> None:
        torch.save({**good, **change}, path)
        refused(command("test.py", *arguments), *words)

    def settings(**changed: object) -> dict:
        return {"settings": {**good["settings"], **changed}}

    check(settings(visionA="MCNNFC"), "Brain.pth", "do not fit its settings")
    check(settings(features_list=[1, 2]), "Brain.pth", "do not fit its settings")
    check(settings(model_name="RN50", model_config=None), "RN50", "unknown; there are ViT-B-16")
    check(settings(model_config={"name": "x"}), "Brain.pth")
    check(settings(model_config="ViT-tiny-14-56"), "Brain.pth", "model_config is 'ViT-tiny-14-56'")
    check(settings(weights_sha256="f" * 64), "Brain.pth", "f" * 64, "--weights")
    check(settings(img_size=10**6), "Brain.pth", "img_size", "out of range")
    check(settings(states={"normal": ["{}"]}), "Brain.pth", "states: expected")
    check(settings(states={"normal": ["{}"], "abnormal": ["{:>99999999}"]}), "Brain.pth", "needs {} once")
    check({"about": "text"}, "Brain.pth", "not an object but str")
    check({"about": {**good["about"], "threshold": {"value": "high"}}}, "Brain.pth", "threshold")
    adapters = {name: tensor * float("nan") for name, tensor in good["normal_det_adapters"].items()}
    check({"normal_det_adapters": adapters}, "Brain.pth", "NaN")
    check({"about": Payload(folder / "ran")}, "Brain.pth", "could run code")
    refused(command("engine.checkpoint", "show", path), "Brain.pth", "could run code")
    refused(command("engine.checkpoint", "export", path, folder / "out.pth"), "Brain.pth", "could run code")
    assert not (folder / "ran").exists()
    path.write_bytes(checkpoint.read_bytes()[:-1000])
    refused(command("test.py", *arguments), "Brain.pth", "damaged")
    path.unlink()
    refused(command("test.py", *arguments), "Brain.pth", "not found")
    refused(command("test.py", *arguments, "--ckpt", "README.md"), "README.md", "not a checkpoint")
    refused(command("test.py", *arguments, "--ckpt", folder), str(folder), "not a checkpoint")
    refused(command("test.py", *arguments, "--ckpt", checkpoint, "--model_name", "ViT-L-14-336"), "--model_name")


def test_warnings_of_the_data(command, folder):
    """The same picture in valid and in test, among the shots and among the others; an empty mask. Training goes on."""
    brain = folder / "data/Brain_AD"
    names = [(brain / "valid/good/img" / f"valid_good_0000{index}.png") for index in (0, 3)]
    shot_list(f"a-0: {FIRST} valid_Ungood_00001.png\nn-0: {names[0].name} valid_good_00001.png\n")(folder / "data")
    for index, path in enumerate(names):
        shutil.copy(path, brain / f"test/good/img/copy{index}.png")
    Image.new("L", (64, 64)).save(brain / "valid/Ungood/anomaly_mask" / FIRST)
    result = command("train.py", *flags(folder), "--epoch", 1, "--cache", "ram")
    assert result.returncode == 0, result.stderr
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ") and "loss" not in line]
    assert len(warnings) == 4
    (constant,) = [line for line in warnings if f"anomaly_mask/{FIRST}" in line]
    shot, other, empty = [line for line in warnings if line != constant]
    assert "1 test images equal a shot" in shot
    assert "copy0.png is valid/good/img/valid_good_00000.png" in shot
    assert "1 test images equal another image of valid/" in other
    assert "copy1.png is valid/good/img/valid_good_00003.png" in other
    assert "1 abnormal shots have an empty mask" in empty
    assert FIRST in empty


def test_a_loss_that_becomes_nan(command, folder):
    """It stops and names epoch and step, before an image is scored; the checkpoint of the last good epoch stays."""
    path = folder / "ckpt" / "Brain.pth"
    before = path.read_bytes()
    refused(command("train.py", *flags(folder), "--learning_rate", "1e38"), "epoch 1", "step 2", "--learning_rate")
    assert path.read_bytes() == before


def test_a_score_that_is_not_finite(command, folder):
    """Finite losses, and parameters that overflow in the last step of the epoch: the image is named."""
    one_step = ["--batch_size", 64, "--epoch", 1]
    refused(
        command("train.py", *flags(folder), *one_step, "--learning_rate", "1e38"), "test_good_00000.png", "diverged"
    )


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


def test_results_on_a_full_disk(command, folder):
    """The figures are printed by then; what was in the file stays."""
    arguments = [*flags(folder, "test.py"), "--cache", "ram"]
    (folder / "x.json").write_text("{}")
    full = command("test.py", *arguments, "--out_json", folder / "x.json", file_bytes=1500)
    refused(full, "--out_json", "x.json", "disk full?", "intact")
    assert "AUC 0." in full.stdout
    assert (folder / "x.json").read_text() == "{}"
    full = command("test.py", *arguments, "--figures", folder / "figures", file_bytes=20_000)
    refused(full, "--figures", "Brain.png", "disk full?")
    assert not list((folder / "figures").iterdir())


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


def test_odd_file_names_are_fine(command, folder):
    """A line break, bytes that are no UTF-8, letters of all kinds: they are images like others."""
    places = [folder / "data/Brain_AD/valid/Ungood" / name for name in ("img", "anomaly_mask")]
    shutil.rmtree(folder / "data/Brain_AD/fewshot_seed")
    for index, name in enumerate((b"a\nb.png", b"\xff.png", "\U0001f600\u202e.png".encode(), b"{x}.png")):
        for place in places:
            (place / f"valid_Ungood_0000{index}.png").rename(place / os.fsdecode(name))
    arguments = [*flags(folder), "--shot", 4, "--epoch", 1, "--cache", "ram", "--out_json", folder / "x.json"]
    trained = command("train.py", *arguments, env={"PYTHONIOENCODING": "utf-8"})
    assert trained.returncode == 0, trained.stderr
    assert "\\udcff.png" in trained.stdout
    assert command("test.py", *flags(folder, "test.py"), "--figures", folder / "figures").returncode == 0
    assert command("engine.checkpoint", "show", folder / "ckpt/Brain.pth").returncode == 0
    assert json.loads((folder / "x.json").read_text())["n_abnormal"] == 7


def test_data_root_names_the_data_set(command, folder):
    """Its folder does where --obj does not, whatever their order; --obj with the default's name counts too."""
    root = (folder / "data/Brain_AD").rename(folder / "knee")
    small = [*SMALL, "--shot", 2, "--epoch", 1, "--cache", "ram", "--save_path", folder / "ckpt"]
    for words, name in (
        (["--data_root", root], "knee"),
        (["--data_root", root, "--obj", "Liver"], "Liver"),
        (["--obj", "Liver", "--data_root", root], "Liver"),
    ):
        result = command("train.py", *small, *words)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"{name}: 14 test images")
        assert torch.load(folder / f"ckpt/{name}.pth", weights_only=True)["about"]["options"]["obj"] == name
    result = command("test.py", "--data_root", root, "--save_path", folder / "ckpt", "--device", "cpu")
    assert "knee: 14 test images" in result.stdout
    refused(command("train.py", *small, "--data_root", root.rename(folder / "a knee")), "a knee", "give --obj NAME")
    assert "default: the name of --data_root's folder, else Brain" in " ".join(
        command("test.py", "--help").stdout.split()
    )


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


def test_a_reader_that_leaves(checkpoint):
    """`... | head -1` ends without a traceback."""
    shown = f"{sys.executable} -m engine.checkpoint show {checkpoint} | head -c 1"
    result = subprocess.run(shown, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("s", "")


def test_a_file_that_the_system_refuses(capsys):
    """An OSError that names a file is one line; any other is a fault of the program and keeps its traceback."""

    def refuse() -> None:
        raise PermissionError(13, "Permission denied", "data/x.png")

    def fault() -> None:
        raise OSError("no file")

    with pytest.raises(SystemExit) as left:
        run_cli(refuse)
    assert (left.value.code, capsys.readouterr().err) == (2, "error: data/x.png: Permission denied\n")
    with pytest.raises(OSError, match="no file"):
        run_cli(fault)
