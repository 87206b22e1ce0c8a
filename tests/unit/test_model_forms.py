"""Forms of CLIP: files of OpenAI, open_clip and Hugging Face give the same model; other families are refused."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from CLIP.clip import create_model
from CLIP.config import ModelConfig, list_models
from CLIP.tokenizer import tokenize
from CLIP.weights import NOT_WEIGHTS, find_weights
from tests.conftest import tiny_state
from tests.helpers.weights import open_clip_config, open_clip_model, save_hugging_face, save_torchscript
from utils import InputError

TINY = ModelConfig.load("ViT-tiny-14-56")
SIZE = 42


def write_open_clip(folder: Path) -> str:
    """Write a training checkpoint and a config in open_clip's form."""
    model = open_clip_model(TINY, dict(tiny_state()), TINY.image_size, TINY.quick_gelu)
    named = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": named}, folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(TINY)))
    return str(folder)


def write_hugging_face(folder: Path) -> str:
    save_hugging_face(TINY, folder)
    return str(folder)


@pytest.fixture(scope="module")
def openai_model(tmp_path_factory):
    """The model from a TorchScript archive in OpenAI's form."""
    path = tmp_path_factory.mktemp("openai") / "tiny.pt"
    save_torchscript(tiny_state(), path)
    return create_model("ViT-tiny-14-56", "openai", SIZE, weights=path)


def test_open_clip_files_give_the_same_model(tmp_path, openai_model):
    clip = create_model(write_open_clip(tmp_path), "openai", SIZE)
    images, ids = torch.rand(2, 3, SIZE, SIZE), tokenize(["a photo of a brain.", "retinal OCT with flaw"])
    pairs = [
        *zip(clip.image_tokens(images, [1, 4]), openai_model.image_tokens(images, [1, 4]), strict=True),
        (clip.encode_text(ids), openai_model.encode_text(ids)),
        (clip.encode_image(images), openai_model.encode_image(images)),
    ]
    for mine, expected in pairs:
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=0)
    oracle = open_clip_model(TINY, dict(tiny_state()), SIZE, clip.quick_gelu)
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_text(ids), oracle.encode_text(ids), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(clip.encode_image(images), oracle.encode_image(images), atol=1e-5, rtol=1e-5)
    assert clip.config.architecture() | PIXELS == TINY.architecture() | PIXELS
    assert clip.info.source in {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize("half", [False, True])
def test_hugging_face_files_equal_transformers(tmp_path, half):
    """Features equal those of transformers, also for half precision and a key prefix, as in many fine-tuned models."""
    theirs = save_hugging_face(TINY, tmp_path)
    if half:
        (tmp_path / "model.safetensors").unlink()
        named = {f"model.{key}": value for key, value in theirs.half().state_dict().items()}
        named["model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # as in older releases
        torch.save({"state_dict": named}, tmp_path / "pytorch_model.bin")
        theirs.float()
    clip = create_model(str(tmp_path), "openai", TINY.image_size, fidelity="corrected")
    images, ids = torch.rand(2, 3, 56, 56), tokenize(["a photo of a brain.", "retinal OCT with flaw"])
    mean, std = (torch.tensor(values)[:, None, None] for values in (clip.config.pixel_mean, clip.config.pixel_std))
    with torch.no_grad():
        seen = theirs.vision_model((images - mean) / std, output_hidden_states=True)
        pairs = [
            *zip(clip.image_tokens(images, [1, 4]), (seen.hidden_states[layer] for layer in (1, 4)), strict=True),
            (clip.encode_image(images), theirs.visual_projection(seen.pooler_output)),
            (clip.encode_text(ids), theirs.text_projection(theirs.text_model(ids.long()).pooler_output)),
        ]
        for mine, expected in pairs:
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
    assert clip.config.architecture() | PIXELS == TINY.architecture() | PIXELS


PIXELS = {"pixel_mean": (), "pixel_std": ()}


@pytest.mark.parametrize("write", [write_open_clip, write_hugging_face])
@pytest.mark.parametrize("nested", [False, True])
def test_pixels_are_normalised_as_the_model_was_trained(tmp_path, write, nested):
    """Mean and std come from the model's files, including the processor_config.json of transformers 5."""
    name, pixels = write(tmp_path), {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}
    file, values = ("processor", {"image_processor": pixels}) if nested else ("preprocessor", pixels)
    (tmp_path / f"{file}_config.json").write_text(json.dumps(values))
    clip = create_model(name, "openai", SIZE, fidelity="corrected")
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.5, 0.4, 0.3], [0.1, 0.2, 0.3]))
    plain = create_model(name, "openai", SIZE)
    images = torch.rand(1, 3, SIZE, SIZE)
    torch.testing.assert_close(clip.visual.embed(images), plain.visual.embed((images - mean) / std))


def test_custom_json_config_and_weights(tmp_path, openai_model):
    """A config file outside the project; weights from --weights or from a path in the config, relative to it."""
    values = {key: value for key, value in TINY.to_dict().items() if key not in ("name", "hub", "urls")}
    torch.save({key: value for key, value in tiny_state().items() if key not in NOT_WEIGHTS}, tmp_path / "own.pt")
    (tmp_path / "Own.json").write_text(json.dumps({**values, "weights": {"openai": "own.pt"}}))
    for weights in (None, tmp_path / "own.pt"):
        clip = create_model(str(tmp_path / "Own.json"), "openai", SIZE, weights=weights)
        assert clip.config.name == "Own"
        assert all(torch.equal(a, b) for a, b in zip(clip.parameters(), openai_model.parameters(), strict=True))
    kept = ModelConfig.from_dict(json.loads(json.dumps(clip.config.to_dict())))  # as in a checkpoint
    assert kept == clip.config
    again = create_model(kept, "openai", SIZE, weights=tmp_path / "own.pt")
    assert again.info == clip.info


@pytest.mark.parametrize("name", list_models())
def test_named_models_equal_open_clip_and_survive_serialisation(name):
    import open_clip  # noqa: PLC0415 - takes seconds

    config = ModelConfig.load(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    theirs = open_clip.get_model_config(name)
    if theirs is not None:
        vision, text = theirs["vision_cfg"], theirs["text_cfg"]
        assert (config.embed_dim, config.heads) == (theirs["embed_dim"], config.width // vision.get("head_width", 64))
        assert all(getattr(config, field) == vision[field] for field in ("width", "layers", "patch_size"))
        assert all(getattr(config, f"text_{field}") == text[field] for field in ("width", "layers", "heads"))
    for pretrain, url in config.urls.items():
        tag = {"openai": "openai", "laion400m": "laion400m_e32"}[pretrain]
        assert open_clip.get_pretrained_url(name, tag) == url
        assert open_clip.pretrained.get_pretrained_cfg(name, tag).get("quick_gelu", False) is (
            config.quick_gelu and pretrain == "openai"
        )
        assert re.search(r"/[0-9a-f]{64}/|-[0-9a-f]{8}\.pt$", url)


# Unsupported models.


REFUSED = [
    ({"model_cfg": {"text_cfg": {"hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base"}}}, "BiomedBERT"),
    ({"model_cfg": {"vision_cfg": {"timm_model_name": "convnext_base"}}}, "convnext_base"),
    ({"model_cfg": {"vision_cfg": {"layers": [3, 4, 6, 3]}}}, "layers"),
    ({"model_type": "bert"}, "bert"),
    ({"model_type": "siglip"}, "siglip"),
    ({"model_type": "clip", "text_config": {"vocab_size": 30000}}, "30000"),
    ({"model_type": "clip", "vision_config": {"num_attention_heads": 7}}, "heads"),
    ([1], "config.json"),
]


@pytest.mark.parametrize(("values", "words"), REFUSED)
def test_unsupported_configs_are_refused(tmp_path, values, words):
    """The error is one line with the path; configs of open_clip are complete except for the given change."""
    name = "config.json"
    if "model_cfg" in values:
        name, whole = "open_clip_config.json", open_clip_config(TINY)
        for key, value in values["model_cfg"].items():
            old = whole["model_cfg"].get(key, {})
            whole["model_cfg"][key] = {**old, **value} if isinstance(value, dict) else value
        values = whole
    (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(InputError, match=words) as caught:
        find_weights(str(tmp_path), "openai")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


# Finding weights.


def test_find_weights_names_file_and_hash_and_reads_no_tensor(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"no weights at all")
    found = find_weights("ViT-tiny-14-56", "openai", tmp_path / "weights.pt", seed=3)
    assert (found.path, found.source, found.pretrain) == (tmp_path / "weights.pt", "weights.pt", "openai")
    assert found.sha256 == hashlib.sha256(b"no weights at all").hexdigest()
    random = find_weights("ViT-tiny-14-56", "random", seed=3)
    assert random.sha256 == "8cf331fc40d65f331940ecc18168a2e829543974946641c4207c6fd3066a1191"
    assert find_weights(replace(TINY, heads=4), "random", seed=3).sha256 != random.sha256
