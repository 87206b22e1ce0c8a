"""The published checkpoint format, through the real commands: written by export, read by test.py."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import ROOT
from tests.helpers.data import SMALL
from tests.integration.test_scripts import figures, printed, refusal

MOODS = ("learnable_all", "learnable_abnormal", "fix")


@dataclass(frozen=True)
class Published:
    """A checkpoint of ours in `folder`, the same in the published format beside it, and what was printed."""

    mood: str
    folder: Path
    data: Path

    @property
    def figures(self) -> list[str]:
        return figures((self.folder / "out").read_text())

    def test_flags(self, ckpt: Path) -> list[object]:
        """What test.py needs for a file in the published format, but for the layers."""
        paths = ["--obj", "Brain", "--data_path", self.data, "--device", "cpu", "--ckpt", ckpt]
        return [*paths, "--pretrain", "random", "--img_size", 42]


def make(command, phantoms, folder: Path, *flags: object) -> None:
    """Train, export, and keep what was printed."""
    paths = ["--obj", "Brain", "--data_path", phantoms, "--save_path", folder, "--device", "cpu"]
    trained = printed(command, "train.py", *SMALL, *paths, "--shot", 1, "--epoch", 1, "--batch_size", 4, *flags)
    (folder / "out").write_text(trained)
    exported = printed(command, "engine.checkpoint", "export", folder / "Brain.pth", folder / "published.pth")
    (folder / "export").write_text(exported)


@pytest.fixture(params=MOODS)
def published(request, command, once, phantoms) -> Published:
    mood = request.param
    flags = ["--features_list", 2, 4, "--text_mood", mood]
    return Published(mood, once(f"published-{mood}", lambda folder: make(command, phantoms, folder, *flags)), phantoms)


def test_published_names_and_the_same_figures(command, published, golden_json):
    stored = torch.load(published.folder / "published.pth", weights_only=True)
    shapes = golden_json("e2e")["checkpoint_keys_and_shapes"]
    parts = {"normal_det_adapters", "abnormal_det_adapters"}
    makers = {"learnable_all": {"prompt_maker_normal", "prompt_maker_abnormal"},
              "learnable_abnormal": {"prompt_maker_abnormal"}, "fix": {"text_features_fix"}}  # fmt: skip
    parts |= makers[published.mood]
    assert set(stored) == parts
    for part in parts - {"text_features_fix"}:
        assert {key: list(tensor.shape) for key, tensor in stored[part].items()} == shapes[part]
    if published.mood == "fix":
        assert stored["text_features_fix"].shape == (96, 2)

    flags = published.test_flags(published.folder / "published.pth")
    # The file does not say how many shots it was trained on, so --shot is accepted; whose they are is not known.
    output = printed(command, "test.py", *flags, "--features_list", 2, 4, "--shot", 16)
    assert f"inferred: ViT-tiny-14-56, MFCFC, 2 layers, {published.mood}" in output
    assert figures(output) == published.figures
    assert "differ" not in output
    assert "without the shots' patients: not known" in output
    assert "2 layers: name them with --features_list" in refusal(command, "test.py", *flags)


def test_layers_in_another_order(command, once, phantoms):
    """Adapter 0 reads layer 4 and adapter 1 layer 2, as the published program has it for `--features_list 4 2`."""
    flags = ["--features_list", 4, 2, "--text_mood", "fix"]
    folder = once("published-order", lambda folder: make(command, phantoms, folder, *flags))
    published = Published("fix", folder, phantoms)
    given = published.test_flags(folder / "published.pth")
    output = printed(command, "test.py", *given, "--features_list", 4, 2)
    assert figures(output) == published.figures
    assert "assumed: layers 4 2" in output
    assert figures(printed(command, "test.py", *given, "--features_list", 2, 4)) != published.figures


@pytest.mark.parametrize("form", ["file", "folder"])
@pytest.mark.parametrize("published", ["fix"], indirect=True)
def test_a_tower_of_ones_own_is_named(command, published, tmp_path, form):
    """A JSON file, or a folder with config.json, whose sizes CLIP/model_configs does not have as well."""
    source = ROOT / "CLIP/model_configs/ViT-tiny-14-56.json"
    (tmp_path / "mine").mkdir()
    model = tmp_path / "mine/mine.json" if form == "file" else tmp_path / "mine"
    shutil.copy(source, tmp_path / "mine" / ("mine.json" if form == "file" else "open_clip_config.json"))
    flags = [*published.test_flags(published.folder / "published.pth"), "--features_list", 2, 4]
    output = printed(command, "test.py", *flags, "--model_name", model)
    assert "inferred: mine, MFCFC" in output
    wrong = refusal(command, "test.py", *flags, "--model_name", "ViT-B-16")
    assert "published.pth" in wrong and "--model_name ViT-B-16" in wrong


def test_another_text_encoder_is_named(command, published):
    flags = [*published.test_flags(published.folder / "published.pth"), "--features_list", 2, 4]
    output = printed(command, "test.py", *flags, "--seed", 5)
    assert ("its text encoder differs" in output) == (published.mood != "fix")
    assert ("its text features differ" in output) == (published.mood == "fix")


def test_a_spoiled_text_encoder_is_named(command, published, tmp_path):
    """NaN, another shape, a layer that CLIP does not have; and a file with neither prompts nor text features."""
    stored = torch.load(published.folder / "published.pth", weights_only=True)
    flags = [*published.test_flags(tmp_path / "odd.pth"), "--features_list", 2, 4]
    if published.mood == "fix":
        del stored["text_features_fix"]
        torch.save(stored, tmp_path / "odd.pth")
        assert "neither prompt makers nor text_features_fix" in refusal(command, "test.py", *flags)
        return
    maker, name = stored["prompt_maker_abnormal"], "text_encoder.ln_final.weight"
    odd = {"text_encoder.transformer.resblocks.9.ln_1.weight": torch.ones(128)}
    for change in ({name: maker[name] * float("nan")}, {name: torch.ones(3)}, odd):
        torch.save({**stored, "prompt_maker_abnormal": {**maker, **change}}, tmp_path / "odd.pth")
        output = printed(command, "test.py", *flags)
        assert "its text encoder differs by up to inf from the CLIP weights" in output
        assert figures(output) == published.figures


def test_the_other_released_name_is_read(command, trained, tmp_path):
    shutil.copy(trained.ckpt / "Brain.pth", tmp_path / "Brain.tar.pth")
    flags = [*trained.test_flags("Brain"), "--save_path", tmp_path]
    assert figures(printed(command, "test.py", *flags)) == figures(trained.output("Brain"))


def test_show(command, published, tmp_path):
    path = published.folder / "Brain.pth"
    output = printed(command, "engine.checkpoint", "show", path)
    assert f'"text_mood": "{published.mood}"' in output
    assert "valid_Ungood_00000.png" in output
    assert "normal_det_adapters: 6 tensors" in output
    stored = torch.load(path, weights_only=True)
    torch.save({**stored, "normal_det_adapters": {"x": torch.zeros(2, 3)}, "more": {"y": 1}}, tmp_path / "odd.pth")
    output = printed(command, "engine.checkpoint", "show", tmp_path / "odd.pth")
    assert "normal_det_adapters: 1 tensors, 6 numbers" in output
    assert "more: 0 tensors, 0 numbers" in output


def test_export_keeps_the_checkpoint_and_names_what_is_lost(command, published, tmp_path):
    path = tmp_path / "Brain.pth"
    shutil.copy(published.folder / "Brain.pth", path)
    before = path.read_bytes()
    assert "is the checkpoint itself" in refusal(command, "engine.checkpoint", "export", path, path)
    assert path.read_bytes() == before
    said = (published.folder / "export").read_text()
    assert "other numbers" not in said
    assert "batch_size" not in said  # MFCFC's do not depend on it
    assert "--model_name ViT-tiny-14-56 --pretrain random --img_size 42 --features_list 2 4" in said
    assert ("--text_mood" in said) == (published.mood != "learnable_all")
    stored = torch.load(path, weights_only=True)
    stored["settings"]["fidelity"] = "corrected"
    torch.save(stored, path)
    assert "--fidelity corrected" in printed(command, "engine.checkpoint", "export", path, tmp_path / "out.pth")


def test_export_of_mvitfc_names_the_batch_size_of_its_numbers(command, phantoms, tmp_path):
    """Attention runs across the images of a batch, and the published test program scores single batches."""
    make(command, phantoms, tmp_path, "--visionA", "MViTFC", "--text_mood", "fix")
    assert "--batch_size 8" in (tmp_path / "export").read_text()
    published = Published("fix", tmp_path, phantoms)
    flags = published.test_flags(tmp_path / "published.pth")
    assert figures(printed(command, "test.py", *flags, "--batch_size", 8)) == published.figures
    assert figures(printed(command, "test.py", *flags, "--batch_size", 3)) != published.figures
