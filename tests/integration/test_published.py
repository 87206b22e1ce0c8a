"""The published checkpoint format, through the real commands: written by export, read by test.py."""

from __future__ import annotations

import sys

import pytest
import torch

import test as test_script
import train
from engine import checkpoint as checkpoint_script
from tests.integration.test_scripts import SMALL, call, data_path, figures, run  # noqa: F401 (a fixture)
from utils import InputError


def export(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["checkpoint", *map(str, arguments)])
    checkpoint_script.main()
    return capsys.readouterr().out


@pytest.fixture(params=["learnable_all", "learnable_abnormal", "fix"])
def trained(request, data_path, tmp_path, monkeypatch, capsys):  # noqa: F811
    """A checkpoint of ours, its selected figures, and the same in the published format."""
    paths = ["--obj", "Brain", "--data_path", data_path, "--save_path", tmp_path, "--device", "cpu"]
    flags = ["--shot", 1, "--epoch", 1, "--features_list", 2, 4, "--text_mood", request.param, "--batch_size", 4]
    output = call(monkeypatch, capsys, train, *SMALL, *paths, *flags)
    export(monkeypatch, capsys, "export", tmp_path / "Brain.pth", tmp_path / "published.pth")
    return request.param, paths, figures(output)


def test_published_names_and_the_same_figures(trained, tmp_path, monkeypatch, capsys, golden_json):
    mood, paths, expected = trained
    stored = torch.load(tmp_path / "published.pth", weights_only=True)
    shapes = golden_json("e2e")["checkpoint_keys_and_shapes"]
    parts = {"normal_det_adapters", "abnormal_det_adapters"}
    parts |= {"learnable_all": {"prompt_maker_normal", "prompt_maker_abnormal"},
              "learnable_abnormal": {"prompt_maker_abnormal"}, "fix": {"text_features_fix"}}[mood]  # fmt: skip
    assert set(stored) == parts
    for part in parts - {"text_features_fix"}:
        assert {key: list(tensor.shape) for key, tensor in stored[part].items()} == shapes[part]
    if mood == "fix":
        assert stored["text_features_fix"].shape == (96, 2)

    flags = ["--ckpt", tmp_path / "published.pth", "--pretrain", "random", "--img_size", 42, "--features_list", 2, 4]
    output = call(monkeypatch, capsys, test_script, *paths, *flags)
    assert f"inferred: ViT-tiny-14-56, MFCFC, 2 layers, {mood}" in output
    assert figures(output) == expected
    assert "differ" not in output
    with pytest.raises(InputError, match="2 layers: name them with --features_list"):
        call(monkeypatch, capsys, test_script, *paths, *flags[:-3])


def test_another_text_encoder_is_said(trained, tmp_path, monkeypatch, capsys):
    mood, paths, _ = trained
    flags = ["--ckpt", tmp_path / "published.pth", "--pretrain", "random", "--img_size", 42, "--features_list", 2, 4]
    output = call(monkeypatch, capsys, test_script, *paths, *flags, "--seed", 5)
    assert ("its text encoder differs" in output) == (mood != "fix")
    assert ("its text features differ" in output) == (mood == "fix")


def test_a_spoiled_text_encoder_is_said(trained, tmp_path, monkeypatch, capsys):
    """NaN, another shape, a layer that CLIP does not have; and a file with neither prompts nor text features."""
    mood, paths, expected = trained
    stored = torch.load(tmp_path / "published.pth", weights_only=True)
    flags = ["--ckpt", tmp_path / "odd.pth", "--pretrain", "random", "--img_size", 42, "--features_list", 2, 4]
    if mood == "fix":
        del stored["text_features_fix"]
        torch.save(stored, tmp_path / "odd.pth")
        with pytest.raises(InputError, match="neither prompt makers nor text_features_fix"):
            call(monkeypatch, capsys, test_script, *paths, *flags)
        return
    maker, name = stored["prompt_maker_abnormal"], "text_encoder.ln_final.weight"
    odd = {"text_encoder.transformer.resblocks.9.ln_1.weight": torch.ones(128)}
    for change in ({name: maker[name] * float("nan")}, {name: torch.ones(3)}, odd):
        torch.save({**stored, "prompt_maker_abnormal": {**maker, **change}}, tmp_path / "odd.pth")
        output = call(monkeypatch, capsys, test_script, *paths, *flags)
        assert "its text encoder differs by up to inf from the CLIP weights" in output
        assert figures(output) == expected


def test_the_other_released_name_is_found(trained, tmp_path, monkeypatch, capsys):
    _, paths, expected = trained
    (tmp_path / "Brain.pth").rename(tmp_path / "Brain.tar.pth")
    assert figures(call(monkeypatch, capsys, test_script, *paths)) == expected


def test_show(trained, tmp_path, monkeypatch, capsys):
    mood, _, _ = trained
    output = export(monkeypatch, capsys, "show", tmp_path / "Brain.pth")
    assert f'"text_mood": "{mood}"' in output
    assert "valid_Ungood_00000.png" in output
    assert "normal_det_adapters: 6 tensors" in output
    stored = torch.load(tmp_path / "Brain.pth", weights_only=True)
    torch.save({**stored, "normal_det_adapters": {"x": torch.zeros(2, 3)}, "more": {"y": 1}}, tmp_path / "odd.pth")
    output = export(monkeypatch, capsys, "show", tmp_path / "odd.pth")
    assert "normal_det_adapters: 1 tensors, 6 numbers" in output
    assert "more: 0 tensors, 0 numbers" in output


def test_export_keeps_the_checkpoint_and_says_what_is_lost(trained, tmp_path, monkeypatch, capsys):
    path = tmp_path / "Brain.pth"
    with pytest.raises(InputError, match="is the checkpoint itself"):
        export(monkeypatch, capsys, "export", path, path)
    assert "gives other numbers" not in export(monkeypatch, capsys, "export", path, tmp_path / "out.pth")
    stored = torch.load(path, weights_only=True)
    stored["settings"]["fidelity"] = "corrected"
    torch.save(stored, path)
    assert "gives other numbers" in export(monkeypatch, capsys, "export", path, tmp_path / "out.pth")


def test_export_without_notes(trained, tmp_path, monkeypatch, capsys):
    """A checkpoint whose notes lack the options; the hash of its weights says the rest."""
    stored = torch.load(tmp_path / "Brain.pth", weights_only=True)
    del stored["about"]["options"]
    torch.save(stored, tmp_path / "Brain.pth")
    with pytest.raises(InputError, match="trained on CLIP weights"):  # random ones, of another seed
        export(monkeypatch, capsys, "export", tmp_path / "Brain.pth", tmp_path / "out.pth")


@pytest.mark.parametrize("features", [1, torch.zeros(5, 2), torch.zeros(2)])
def test_text_features_of_another_shape_are_refused(trained, tmp_path, monkeypatch, capsys, features):
    mood, paths, _ = trained
    if mood != "fix":
        pytest.skip("holds none")
    stored = torch.load(tmp_path / "published.pth", weights_only=True)
    torch.save({**stored, "text_features_fix": features}, tmp_path / "published.pth")
    flags = ["--ckpt", tmp_path / "published.pth", "--pretrain", "random", "--img_size", 42, "--features_list", 2, 4]
    with pytest.raises(InputError, match=r"text_features_fix is no tensor of shape \(96, 2\)"):
        call(monkeypatch, capsys, test_script, *paths, *flags)


def test_code_in_a_checkpoint_is_refused(data_path, tmp_path):  # noqa: F811
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"format": "madclip-1", "about": Payload()}, tmp_path / "bad.pth")
    result = run("test.py", "--obj", "Brain", "--data_path", data_path, "--ckpt", tmp_path / "bad.pth", check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "adapters", [{}, {"x": torch.zeros(2)}, {"0.fc3.0.weight": torch.zeros(2)}, {"0.cnn.0.weight": 1}]
)
def test_parts_that_only_look_published_are_refused(data_path, tmp_path, monkeypatch, capsys, adapters):  # noqa: F811
    torch.save({"normal_det_adapters": adapters, "abnormal_det_adapters": adapters}, tmp_path / "odd.pth")
    arguments = ["--obj", "Brain", "--data_path", data_path, "--ckpt", tmp_path / "odd.pth"]
    with pytest.raises(InputError, match=r"odd\.pth"):
        call(monkeypatch, capsys, test_script, *arguments)
