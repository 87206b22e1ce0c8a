"""train.py and test.py as a user starts them, on the phantom and the small model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import test as test_script
import train
from dataset import phantom
from tests.helpers.commands import words
from tests.helpers.weights import save_torchscript

ROOT = Path(__file__).parents[2]
SMALL = ["--model_name", "ViT-tiny-14-56", "--pretrain", "random", "--img_size", "42", "--device", "cpu"]
CHOICES = {
    "text_mood": ["fix", "learnable_all", "learnable_abnormal"],
    "visionA": ["MFCFC", "MCNNFC", "MViTFC"],
    "loss_type": ["sigmoid", "softmax"],
    "dec_type": ["mean", "max", "both"],
    "contrast_mood": ["yes", "no"],
    "fidelity": ["released", "corrected"],
}


@pytest.fixture(scope="module")
def data_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    phantom.write(path, ["Brain", "Chest"], valid=4, test=4, seed=0, size=64)
    return path


def run(script: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    """Start a script with W&B off."""
    environment = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words(script, *arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=check)


def call(monkeypatch, capsys, module, *arguments: object) -> str:
    """Run a script's main in this process, for what needs many runs."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(sys, "argv", words(f"{module.__name__}.py", *arguments))
    module.main()
    return capsys.readouterr().out


def figures(output: str) -> list[str]:
    """The AUC and pAUC of six decimals on a line that begins with `selected` or with AUC."""
    line = next(line for line in output.splitlines() if line.startswith(("selected", "AUC")))
    return re.findall(r"\d\.\d{6}", line)


@pytest.mark.parametrize("obj", ["Brain", "Chest"])
def test_train_then_test(data_path, tmp_path, obj):
    paths = ["--obj", obj, "--data_path", data_path, "--save_path", tmp_path, "--device", "cpu"]
    command = [*SMALL, *paths, "--shot", 2, "--epoch", 2, "--out_json", tmp_path / "train.json"]
    one = run("train.py", *command).stdout
    assert f"{obj} AUC : 0." in one.splitlines()[-1] or f"{obj} AUC : 1." in one.splitlines()[-1]
    assert (f"{obj} pAUC : " in one) == (obj == "Brain")
    assert "RANDOM, nothing is pre-trained" in one
    assert "--select test" in one
    assert "last epoch" in one
    assert len(re.findall(r"^epoch \d/2  det .* seg .* total .*AUC .*cos\(text\)", one, re.MULTILINE)) == 2
    for name in ("valid_Ungood_00000.png", "valid_good_00001.png"):
        assert name in one

    # The same command, the same numbers; a new process, the same figures from the checkpoint.
    again = run("train.py", *command).stdout
    without_seconds = [re.sub(r"  [\d.]+ s$", "", line) for line in one.splitlines() if line.startswith("epoch")]
    assert without_seconds == [
        re.sub(r"  [\d.]+ s$", "", line) for line in again.splitlines() if line.startswith("epoch")
    ]
    tested = run("test.py", *paths, "--out_json", tmp_path / "test.json", "--figures", tmp_path / "figures").stdout
    assert figures(tested) == figures(one)
    assert tested.splitlines()[-1] == one.splitlines()[-1]
    assert (tmp_path / "figures" / f"{obj}.png").stat().st_size > 1000

    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("train", "test"))
    assert second["auc"] == first["auc"]
    assert second["pauc"] == first["pauc"]
    assert (second["obj"], second["n_normal"], second["n_abnormal"], second["select"]) == (obj, 4, 4, "test")
    assert len(second["per_image"]) == 8
    assert set(second["per_image"][0]) == {"file", "label", "score"}
    stored = torch.load(tmp_path / f"{obj}.pth", weights_only=True)
    assert stored["about"]["shots"]["abnormal"] == ["valid_Ungood_00000.png", "valid_Ungood_00001.png"]
    assert stored["about"]["pretrain"] == "random"
    assert stored["settings"]["weights_sha256"]


@pytest.mark.parametrize(
    ("flag", "choice"), [(flag, choice) for flag, choices in CHOICES.items() for choice in choices]
)
@pytest.mark.parametrize("obj", ["Brain", "Chest"])
def test_every_choice(data_path, tmp_path, monkeypatch, capsys, flag, choice, obj):
    paths = ["--obj", obj, "--data_path", data_path, "--save_path", tmp_path, "--device", "cpu"]
    shared = [*SMALL, *paths, "--shot", 1, "--epoch", 1]
    trained = call(monkeypatch, capsys, train, *shared, f"--{flag}", choice)
    assert figures(call(monkeypatch, capsys, test_script, *paths)) == figures(trained)


@pytest.mark.parametrize(
    ("kind", "fidelity"), [("MViTFC", "corrected"), ("MFCFC", "corrected"), ("MViTFC", "released")]
)
def test_cache_modes_give_the_same_numbers(data_path, tmp_path, monkeypatch, capsys, kind, fidelity):
    losses = {}
    for cache in ("ram", "disk", "off"):
        output = call(
            monkeypatch, capsys, train, *SMALL, "--obj", "Brain", "--data_path", data_path, "--save_path", tmp_path,
            "--shot", 1, "--epoch", 3, "--visionA", kind, "--fidelity", fidelity, "--cache", cache, "--cache_dir",
            tmp_path / "cache", "--cache_dtype", "float32", "--out_json", tmp_path / f"{cache}.json",
        )  # fmt: skip
        losses[cache] = re.findall(r"total (\d+\.\d+)", output)
        assert len(losses[cache]) == 3
    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in losses}
    for name in ("disk", "off"):
        assert [float(x) for x in losses[name]] == pytest.approx([float(x) for x in losses["ram"]], rel=1e-5)
        assert results[name]["auc"] == pytest.approx(results["ram"]["auc"], rel=1e-5)
        assert results[name]["pauc"] == pytest.approx(results["ram"]["pauc"], rel=1e-5)


@pytest.mark.parametrize("select", ["last", "valid"])
def test_selection_protocols(data_path, tmp_path, monkeypatch, capsys, select):
    output = call(
        monkeypatch, capsys, train, *SMALL, "--obj", "Brain", "--data_path", data_path, "--save_path", tmp_path,
        "--shot", 1, "--epoch", 3, "--select", select, "--eval_every", 2,
    )  # fmt: skip
    assert f"--select {select}" in output
    epochs = [line for line in output.splitlines() if line.startswith("epoch")]
    assert ["AUC" in line for line in epochs] == [False, True, True]
    assert all(("valid AUC" in line) == (select == "valid") for line in epochs[1:])
    stored = torch.load(tmp_path / "Brain.pth", weights_only=True)["about"]
    assert stored["select"] == select
    if select == "last":
        assert stored["metrics"]["epoch"] == 3


def test_no_save_model(data_path, tmp_path, monkeypatch, capsys):
    arguments = [*SMALL, "--obj", "Brain", "--data_path", data_path, "--save_path", tmp_path, "--shot", 1, "--epoch", 1]
    call(monkeypatch, capsys, train, *arguments, "--no-save_model")
    assert not (tmp_path / "Brain.pth").exists()
    call(monkeypatch, capsys, train, *arguments, "--save_model")
    assert (tmp_path / "Brain.pth").exists()


def test_published_flags_and_defaults():
    options = vars(train.parse([]))
    published = {
        "exp_name": None, "model_name": "ViT-L-14-336", "pretrain": "openai", "obj": "Liver", "data_path": "./data/",
        "batch_size": 16, "save_model": True, "save_path": "./ckpt/", "img_size": 240, "epoch": 60,
        "learning_rate": 0.001, "features_list": None, "seed": 111, "shot": 16, "iterate": 0,
        "text_mood": "learnable_all", "contrast_mood": "yes", "dec_type": "mean", "loss_type": "sigmoid",
        "visionA": "MFCFC",
    }  # fmt: skip
    assert {name: options[name] for name in published} == published
    assert test_script.parse([]).obj == "Brain"


def test_weights_from_an_archive(data_path, tmp_path, tiny_clip, monkeypatch, capsys):
    save_torchscript(tiny_clip(False), tmp_path / "archive.pt")  # its positional embedding is for 42 pixels
    message = run(
        "train.py", "--model_name", "ViT-tiny-14-56", "--obj", "Brain", "--data_path", data_path,
        "--save_path", tmp_path, "--weights", tmp_path / "archive.pt", "--shot", 1, check=False,
    )  # fmt: skip
    assert message.returncode == 2
    assert "archive.pt" in message.stderr
    assert "Traceback" not in message.stderr


def test_other_weights_than_the_checkpoints_are_refused(data_path, tmp_path, monkeypatch, capsys):
    paths = ["--obj", "Brain", "--data_path", data_path, "--save_path", tmp_path, "--device", "cpu"]
    call(monkeypatch, capsys, train, *SMALL, *paths, "--shot", 1, "--epoch", 1)
    path = tmp_path / "Brain.pth"
    stored = torch.load(path, weights_only=True)
    stored["settings"]["weights_sha256"] = "f" * 64
    torch.save(stored, path)
    result = run("test.py", *paths, check=False)
    assert result.returncode == 2
    assert "f" * 64 in result.stderr


def test_a_flag_that_contradicts_the_checkpoint(data_path, tmp_path, monkeypatch, capsys):
    paths = ["--obj", "Brain", "--data_path", data_path, "--save_path", tmp_path, "--device", "cpu"]
    call(monkeypatch, capsys, train, *SMALL, *paths, "--shot", 1, "--epoch", 1)
    call(monkeypatch, capsys, test_script, *paths, "--visionA", "MFCFC", "--features_list", 1, 2, 3, 4)
    for flag, value in (("--visionA", "MCNNFC"), ("--features_list", "1"), ("--img_size", "56")):
        result = run("test.py", *paths, flag, value, check=False)
        assert result.returncode == 2
        assert f"{flag} " in result.stderr
        assert "contradicts" in result.stderr


def test_bfloat16_on_a_cpu(tmp_path, monkeypatch, capsys):
    phantom.write(tmp_path, ["Brain"], valid=4, test=30, seed=0, size=112)
    paths = ["--obj", "Brain", "--data_path", tmp_path, "--save_path", tmp_path, "--device", "cpu"]
    # A model that learns: where normal and abnormal scores lie among each other, single swapped pairs exceed the bound.
    small = [*SMALL[:4], "--img_size", 112, "--shot", 2, "--epoch", 8, "--select", "last", "--fidelity", "corrected"]
    call(monkeypatch, capsys, train, *small, *paths)
    found = {}
    for precision in ("fp32", "bf16"):
        output = call(monkeypatch, capsys, test_script, *paths, "--precision", precision)
        found[precision] = [float(figure) for figure in figures(output)]
    assert found["bf16"] == pytest.approx(found["fp32"], abs=0.002)
    assert found["bf16"] != found["fp32"]
