"""Models that are not in CLIP/model_configs, through the real commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from CLIP.config import ModelConfig
from dataset import phantom
from tests.conftest import tiny_state
from tests.helpers.commands import Commands
from tests.helpers.weights import open_clip_config, save_hugging_face

TINY = ModelConfig.load("ViT-tiny-14-56")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom, the model in two forms, and a small DINOv2."""
    folder = tmp_path_factory.mktemp("any_clip")
    phantom.write(folder / "data", ["Brain"], valid=4, test=4, seed=0, size=64)
    save_hugging_face(tiny_state(), TINY, folder / "hf")
    (folder / "open_clip").mkdir()
    (folder / "open_clip" / "open_clip_config.json").write_text(json.dumps(open_clip_config(TINY)))
    torch.save({"state_dict": tiny_state()}, folder / "open_clip" / "open_clip_pytorch_model.bin")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14
    )
    for name in ("dino", "other"):
        transformers.Dinov2Model(config).save_pretrained(folder / name)
    return folder


def train(command: Commands, folder: Path, name: str, *model: str | Path) -> Path:
    """One epoch; the folder of its checkpoint and result."""
    place = folder / f"out_{name}"
    small = ("--img_size", 42, "--epoch", 1, "--shot", 2, "--cache_dir", place / "cache", "--run_dir", place / "runs")
    data = ("--obj", "Brain", "--data_path", folder / "data", "--device", "cpu")
    result = command("train.py", *data, *model, *small, "--save_path", place, "--out_json", place / "train.json")
    assert result.returncode == 0, result.stderr
    return place


def test(command: Commands, folder: Path, place: Path, *model: str | Path):
    data = ("--obj", "Brain", "--data_path", folder / "data", "--device", "cpu", "--cache", "off")
    return command("test.py", *data, "--ckpt", place / "Brain.pth", *model, "--out_json", place / "test.json")


test.__test__ = False


def same_auc(place: Path) -> float:
    trained, tested = (json.loads((place / f"{name}.json").read_text()) for name in ("train", "test"))
    assert (tested["auc"], tested["pauc"]) == (trained["auc"], trained["pauc"])
    return float(tested["pauc"])


def test_two_forms_give_the_same_numbers(command: Commands, folder: Path) -> None:
    found = []
    for form in ("hf", "open_clip"):
        place = train(command, folder, form, "--model_name", folder / form)
        result = test(command, folder, place, "--weights", folder / form)  # its path is not in a checkpoint
        assert result.returncode == 0, result.stderr
        found.append(same_auc(place))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_dinov2_is_trained_tested_and_predicts(command: Commands, folder: Path) -> None:
    model = ("--model_name", "ViT-tiny-14-56", "--pretrain", "random")
    tower = ("--image_tower", folder / "dino")
    place = train(command, folder, "dino", *model, *tower)
    assert str(folder / "dino") not in (place / "train.json").read_text()
    result = test(command, folder, place, *tower)
    assert result.returncode == 0, result.stderr
    same_auc(place)
    predicted = command(
        "predict.py", "--ckpt", place / "Brain.pth", *tower, folder / "data/Brain_AD/test/Ungood/img",
        "--out", place / "predictions", "--device", "cpu",
    )  # fmt: skip
    assert predicted.returncode == 0, predicted.stderr
    for refused, words in (
        (test(command, folder, place), "--image_tower dino: not found"),
        (test(command, folder, place, "--image_tower", folder / "other"), "was trained on"),
        (command("engine.checkpoint", "export", place / "Brain.pth", place / "out.pth"), "image tower"),
    ):
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1].startswith("error: ")
        assert words in refused.stderr.splitlines()[-1]


def test_another_family_is_one_line(command: Commands, folder: Path) -> None:
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text('{"model_type": "bert"}')
    data = ("--obj", "Brain", "--data_path", folder / "data", "--shot", 2)
    result = command("train.py", *data, "--model_name", folder / "bert")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "bert is another family" in result.stderr
