"""One small CLIP in OpenAI's, open_clip's and Hugging Face's form gives the same scores through the real commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from CLIP.config import ModelConfig
from dataset import phantom
from tests.conftest import tiny_state
from tests.helpers.commands import Commands
from tests.helpers.weights import open_clip_config, open_clip_model, save_hugging_face, save_torchscript

TINY = ModelConfig.load("ViT-tiny-14-56")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom, and the model in three forms."""
    folder = tmp_path_factory.mktemp("any_clip")
    phantom.write(folder / "data", ["Brain"], valid=4, test=4, seed=0, size=64)
    save_torchscript(tiny_state(), folder / "tiny.pt")
    save_hugging_face(tiny_state(), TINY, folder / "hf")
    (folder / "open_clip").mkdir()
    (folder / "open_clip" / "open_clip_config.json").write_text(json.dumps(open_clip_config(TINY)))
    model = open_clip_model(TINY, dict(tiny_state()), TINY.image_size, TINY.quick_gelu)
    torch.save({"state_dict": model.state_dict()}, folder / "open_clip" / "open_clip_pytorch_model.bin")
    return folder


def metrics(command: Commands, folder: Path, form: str) -> list[float]:
    """Train one epoch with a model in this form, test the checkpoint, return every number of both."""
    model = {
        "openai": ("--model_name", "ViT-tiny-14-56", "--weights", folder / "tiny.pt"),
        "hf": ("--model_name", folder / "hf"),
        "open_clip": ("--model_name", folder / "open_clip"),
    }[form]
    weights = folder / ("tiny.pt" if form == "openai" else form)
    place, data = folder / f"out_{form}", ("--obj", "Brain", "--data_path", folder / "data", "--device", "cpu")
    small = ("--img_size", 42, "--epoch", 1, "--shot", 2, "--cache", "off")
    trained = command("train.py", *data, *model, *small, "--save_path", place, "--out_json", place / "train.json")
    assert trained.returncode == 0, trained.stderr
    ckpt = ("--ckpt", place / "Brain.pth", "--weights", weights)  # the folder's path is not in a checkpoint
    tested = command("test.py", *data, *ckpt, "--cache", "off", "--out_json", place / "test.json")
    assert tested.returncode == 0, tested.stderr
    return [value for name in ("train", "test") for value in numbers(json.loads((place / f"{name}.json").read_text()))]


def numbers(values: object) -> list[float]:
    """Losses and metrics of a result, in the order of their keys."""
    if isinstance(values, dict):
        kept = ("loss", "auc", "pauc", "AUC", "pAUC", "metrics", "best", "history", "value", "ap", "f1_max")
        return [number for key in sorted(values) if key in kept for number in numbers(values[key])]
    if isinstance(values, list):
        return [number for value in values for number in numbers(value)]
    return [float(values)] if isinstance(values, float) else []


def test_three_forms_give_the_same_numbers(command: Commands, folder: Path) -> None:
    expected = metrics(command, folder, "openai")
    assert len(expected) >= 4
    for form in ("hf", "open_clip"):
        assert metrics(command, folder, form) == pytest.approx(expected, abs=1e-6)


def test_another_family_is_one_line(command: Commands, folder: Path) -> None:
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text('{"model_type": "bert"}')
    data = ("--obj", "Brain", "--data_path", folder / "data", "--shot", 2)
    result = command("train.py", *data, "--model_name", folder / "bert")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "bert is another family" in result.stderr
