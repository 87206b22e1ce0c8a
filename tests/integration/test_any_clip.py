"""A tower of one's own, and another image tower, DINOv2, through the real commands."""

import importlib.util
import json

import torch

from CLIP.clip import create_model
from CLIP.config import ModelConfig
from tests.helpers.commands import fine, refused
from tests.helpers.data import SMALL
from tests.helpers.weights import save_hugging_face


def test_an_exported_checkpoint_is_tested_with_ones_own_tower(command, phantoms, tmp_path):
    """The published format names no model: a JSON file with weights beside it and a folder do."""
    tiny, found = ModelConfig.load("ViT-tiny-14-56"), []
    values = {key: value for key, value in tiny.to_dict().items() if key not in ("name", "hub", "urls")}
    (tmp_path / "Own.json").write_text(json.dumps({**values, "weights": {"openai": "own.pt"}}))
    save_hugging_face(tiny, tmp_path / "hf")
    torch.save(create_model(str(tmp_path / "hf"), "openai", 56).state_dict(), tmp_path / "own.pt")
    shared = ["--obj", "Brain", "--data_path", phantoms, "--device", "cpu", "--img_size", 42, "--cache", "off"]
    own = ["--model_name", tmp_path / "Own.json"]
    fine(command("train.py", *shared, *own, "--save_path", tmp_path, "--epoch", 1, "--shot", 2))
    ckpt, out, result = tmp_path / "Brain.pth", tmp_path / "out.pth", tmp_path / "result.json"
    fine(command("engine.checkpoint", "export", ckpt, out, "--weights", tmp_path / "own.pt"))
    for path, model in ((ckpt, tmp_path / "Own.json"), (out, tmp_path / "Own.json"), (out, tmp_path / "hf")):
        fine(command("test.py", *shared, "--ckpt", path, "--model_name", model, "--out_json", result))
        found.append(json.loads(result.read_text())["auc"])
    assert found[0] == found[1] == found[2]


def test_dinov2_is_trained_tested_and_predicts(command, phantoms, tmp_path):
    import transformers  # noqa: PLC0415 - takes a second

    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    for name in ("dino", "other"):
        transformers.Dinov2Model(config).save_pretrained(tmp_path / name)
    tower = ["--image_tower", tmp_path / "dino"]
    shared = ["--obj", "Brain", "--data_path", phantoms, "--save_path", tmp_path, "--device", "cpu"]
    run = ["--epoch", 1, "--shot", 2, "--features_list", 1, 2, "--out_json", tmp_path / "train.json"]
    fine(command("train.py", *SMALL, *shared, *tower, *run))
    fine(command("test.py", *shared, *tower, "--cache", "off", "--out_json", tmp_path / "test.json"))
    trained, tested = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("train", "test"))
    assert (tested["auc"], tested["pauc"]) == (trained["auc"], trained["pauc"])
    assert str(tmp_path / "dino") not in (tmp_path / "train.json").read_text()
    ckpt = tmp_path / "Brain.pth"
    images = ["--out", tmp_path / "predictions", phantoms / "Brain_AD/test/Ungood/img"]
    fine(command("predict.py", "--ckpt", ckpt, *tower, "--device", "cpu", *images))
    if importlib.util.find_spec("onnxscript") and importlib.util.find_spec("onnxruntime"):
        check = ["--out", tmp_path / "x.onnx", *tower, "--check", phantoms / "Brain_AD/test/good"]
        fine(command("engine.export", ckpt, *check))  # no score and no pixel differs by more than 1e-4
        assert "on dino, " in (tmp_path / "x.md").read_text()
    refused(command("test.py", *shared), "--image_tower dino")
    refused(command("test.py", *shared, "--image_tower", tmp_path / "other"), "was trained on")
    refused(command("engine.checkpoint", "export", ckpt, tmp_path / "out.pth"), "image tower")
