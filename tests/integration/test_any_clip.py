"""DINOv2 as the image tower, through the real commands."""

import json

from tests.helpers.commands import fine, refused
from tests.helpers.data import SMALL


def test_dinov2_trains_tests_predicts_and_exports(command, phantoms, tmp_path):
    import transformers  # noqa: PLC0415 - takes a second

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
    check = ["--out", tmp_path / "x.onnx", *tower, "--check", phantoms / "Brain_AD/test/good"]
    fine(command("engine.export", ckpt, *check))  # fails if a score or a pixel differs by more than 1e-4
    assert "on dino, " in (tmp_path / "x.md").read_text()
    refused(command("test.py", *shared), "--image_tower dino")
    refused(command("test.py", *shared, "--image_tower", tmp_path / "other"), "was trained on")
    refused(command("engine.checkpoint", "export", ckpt, tmp_path / "out.pth"), "image tower")
