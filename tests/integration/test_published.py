"""The published checkpoint format through the real commands: written by export, read by test.py."""

import shutil
from pathlib import Path

import pytest
import torch

from CLIP.config import ModelConfig
from tests.helpers.commands import ROOT, fine, refused
from tests.helpers.data import SMALL
from tests.helpers.weights import save_hugging_face
from tests.integration.test_scripts import figures

MOODS = ("learnable_all", "learnable_abnormal", "fix")


def read(phantoms: Path, ckpt: Path) -> list[object]:
    """Flags of test.py for a file in the published format, without --features_list."""
    paths = ["--obj", "Brain", "--data_path", phantoms, "--device", "cpu", "--ckpt", ckpt]
    return [*paths, "--pretrain", "random", "--img_size", 42]


def printed(folder: Path) -> list[str]:
    """The figures printed by the training."""
    return figures((folder / "out").read_text())


def make(command, phantoms, folder: Path, *flags: object) -> None:
    """Train, export, and save the output of both commands."""
    paths = ["--obj", "Brain", "--data_path", phantoms, "--save_path", folder, "--device", "cpu"]
    trained = fine(command("train.py", *SMALL, *paths, "--shot", 1, "--epoch", 1, "--batch_size", 4, *flags))
    (folder / "out").write_text(trained)
    exported = fine(command("engine.checkpoint", "export", folder / "Brain.pth", folder / "published.pth"))
    (folder / "export").write_text(exported)


@pytest.fixture(params=MOODS)
def published(request, command, once, phantoms) -> Path:
    """Folder with a checkpoint, its export to the published format, and the output of both commands."""
    flags = ["--features_list", 2, 4, "--text_mood", request.param]
    return once(f"published-{request.param}", lambda folder: make(command, phantoms, folder, *flags))


def test_export_has_published_names_and_the_same_figures(command, phantoms, published, golden_json):
    mood = published.name.removeprefix("published-")
    stored = torch.load(published / "published.pth", weights_only=True)
    shapes = golden_json("e2e")["checkpoint_keys_and_shapes"]
    parts = {"normal_det_adapters", "abnormal_det_adapters"}
    makers = {"learnable_all": {"prompt_maker_normal", "prompt_maker_abnormal"},
              "learnable_abnormal": {"prompt_maker_abnormal"}, "fix": {"text_features_fix"}}  # fmt: skip
    parts |= makers[mood]
    assert set(stored) == parts
    for part in parts - {"text_features_fix"}:
        assert {key: list(tensor.shape) for key, tensor in stored[part].items()} == shapes[part]
    if mood == "fix":
        assert stored["text_features_fix"].shape == (96, 2)

    flags = read(phantoms, published / "published.pth")
    # The file does not hold the number of shots, so any --shot is accepted; the patients of the shots are unknown.
    output = fine(command("test.py", *flags, "--features_list", 2, 4, "--shot", 16))
    assert f"inferred: ViT-tiny-14-56, MFCFC, 2 layers, {mood}" in output
    assert figures(output) == printed(published)
    assert "differ" not in output
    assert "without the shots' patients: not known" in output
    assert "2 layers: name them with --features_list" in refused(command("test.py", *flags))


@pytest.mark.parametrize("published", ["fix"], indirect=True)
def test_published_checkpoint_with_a_custom_tower(command, phantoms, published, tmp_path):
    """--model_name may be a JSON file or a folder, even if a model in CLIP/model_configs has the same sizes."""
    shutil.copy(ROOT / "CLIP/model_configs/ViT-tiny-14-56.json", tmp_path / "mine.json")
    save_hugging_face(ModelConfig.load("ViT-tiny-14-56"), tmp_path / "tower")
    flags = [*read(phantoms, published / "published.pth"), "--features_list", 2, 4]
    for model in ("mine.json", "tower"):
        output = fine(command("test.py", *flags, "--model_name", tmp_path / model))
        assert f"inferred: {model.removesuffix('.json')}, MFCFC" in output
        assert figures(output) == printed(published)
    wrong = refused(command("test.py", *flags, "--model_name", "ViT-B-16"))
    assert "published.pth" in wrong and "--model_name ViT-B-16" in wrong


@pytest.mark.parametrize("published", ["fix"], indirect=True)
def test_output_of_show_and_export(command, published, tmp_path):
    path = tmp_path / "Brain.pth"
    shutil.copy(published / "Brain.pth", path)
    output = fine(command("engine.checkpoint", "show", path))
    for words in ('"text_mood": "fix"', "valid_Ungood_00000.png", "normal_det_adapters: 6 tensors"):
        assert words in output
    before = path.read_bytes()
    refused(command("engine.checkpoint", "export", path, path), "checkpoint itself")
    assert path.read_bytes() == before
    said = (published / "export").read_text()
    assert "batch_size" not in said  # the results of MFCFC do not depend on it
    for flag in ("--model_name ViT-tiny-14-56 --pretrain random --img_size 42 --features_list 2 4", "--text_mood"):
        assert flag in said
    stored = torch.load(path, weights_only=True)
    stored["settings"]["fidelity"] = "corrected"
    torch.save(stored, path)
    assert "--fidelity corrected" in fine(command("engine.checkpoint", "export", path, tmp_path / "out.pth"))


def test_export_of_mvitfc_names_its_batch_size(command, phantoms, tmp_path):
    """MViTFC attends across the images of a batch, so figures are only reproduced with the same batch size."""
    make(command, phantoms, tmp_path, "--visionA", "MViTFC", "--text_mood", "fix")
    assert "--batch_size 8" in (tmp_path / "export").read_text()
    flags = read(phantoms, tmp_path / "published.pth")
    assert figures(fine(command("test.py", *flags, "--batch_size", 8))) == printed(tmp_path)
    assert figures(fine(command("test.py", *flags, "--batch_size", 3))) != printed(tmp_path)
