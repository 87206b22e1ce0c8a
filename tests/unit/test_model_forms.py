"""Any CLIP: OpenAI's, open_clip's and Hugging Face's files are one model; towers of other families are named."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch

from CLIP import weights as weights_module
from CLIP.adapter_shared import ADAPTERS
from CLIP.clip import create_model
from CLIP.config import ADAPTER_KINDS, ModelConfig, list_models
from CLIP.tokenizer import tokenize
from CLIP.weights import find_weights, read_weights
from tests.conftest import tiny_state
from tests.helpers.weights import (
    hugging_face_config,
    hugging_face_names,
    open_clip_config,
    open_clip_model,
    save_hugging_face,
    save_torchscript,
)
from utils import InputError

TINY = ModelConfig.load("ViT-tiny-14-56")
SIZE = 42
ROOT = Path(__file__).parents[2]


def write_open_clip(folder: Path) -> str:
    """A training checkpoint of open_clip's, written by open_clip."""
    model = open_clip_model(TINY, dict(tiny_state()), TINY.image_size, TINY.quick_gelu)
    named = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": named}, folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(TINY)))
    return str(folder)


def write_hugging_face(folder: Path) -> str:
    save_hugging_face(tiny_state(), TINY, folder)
    return str(folder)


def write_half(folder: Path) -> str:
    """Half precision and a prefix, as fine-tuned models are often left."""
    named = {f"model.{key}": value.half() for key, value in hugging_face_names(_weights()).items()}
    torch.save({"state_dict": named}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(hugging_face_config(TINY)))
    return str(folder)


def _weights() -> dict[str, torch.Tensor]:
    integers = ("input_resolution", "context_length", "vocab_size")
    return {key: value for key, value in tiny_state().items() if key not in integers}


FORMS = [write_open_clip, write_hugging_face, write_half]


@pytest.fixture(scope="module")
def openai_model(tmp_path_factory):
    """The model from a TorchScript archive as OpenAI publishes it."""
    path = tmp_path_factory.mktemp("openai") / "tiny.pt"
    save_torchscript(tiny_state(), path)
    return create_model("ViT-tiny-14-56", "openai", SIZE, weights=path)


@pytest.mark.parametrize("write", FORMS)
def test_every_form_is_the_same_model(tmp_path, openai_model, write):
    name = write(tmp_path)
    clip = create_model(name, "openai", SIZE)
    torch.manual_seed(0)
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


PIXELS = {"pixel_mean": (), "pixel_std": ()}


@pytest.mark.parametrize("write", [write_open_clip, write_hugging_face])
def test_pixels_are_normalised_as_the_model_was_trained(tmp_path, write):
    name = write(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]})
    )
    clip = create_model(name, "openai", SIZE, fidelity="corrected")
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.5, 0.4, 0.3], [0.1, 0.2, 0.3]))
    plain = create_model(name, "openai", SIZE)
    images = torch.rand(1, 3, SIZE, SIZE)
    torch.testing.assert_close(clip.visual.embed(images), plain.visual.embed((images - mean) / std))


def test_a_file_in_any_form_fits_a_named_model(tmp_path, openai_model):
    """--weights FILE or FOLDER with --model_name of model_configs/."""
    write_hugging_face(tmp_path)
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        clip = create_model("ViT-tiny-14-56", "openai", SIZE, weights=weights)
        assert all(torch.equal(a, b) for a, b in zip(clip.parameters(), openai_model.parameters(), strict=True))
        assert clip.info.source == "model.safetensors"
        assert clip.info.sha256 != openai_model.info.sha256


def test_a_folder_whose_config_says_other_heads_is_refused(tmp_path):
    write_hugging_face(tmp_path)
    values = hugging_face_config(replace(TINY, heads=4))
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"heads 4, but ViT-tiny-14-56 has 2.*--model_name"):
        find_weights("ViT-tiny-14-56", "openai", tmp_path)


def test_a_json_file_and_weights(tmp_path, openai_model):
    """As ../shared/real: a config beside the project, weights given by --weights or by the config, relative to it."""
    values = {key: value for key, value in TINY.to_dict().items() if key not in ("name", "hub", "urls")}
    torch.save(_weights(), tmp_path / "own.pt")
    (tmp_path / "Own.json").write_text(json.dumps({**values, "weights": {"openai": "own.pt"}}))
    for weights in (None, tmp_path / "own.pt"):
        clip = create_model(str(tmp_path / "Own.json"), "openai", SIZE, weights=weights)
        assert clip.config.name == "Own"
        assert all(torch.equal(a, b) for a, b in zip(clip.parameters(), openai_model.parameters(), strict=True))
    kept = ModelConfig.from_dict(json.loads(json.dumps(clip.config.to_dict())))  # as a checkpoint keeps it
    assert kept == clip.config
    again = create_model(kept, "openai", SIZE, weights=tmp_path / "own.pt")
    assert again.info == clip.info


@pytest.mark.parametrize("name", list_models())
def test_named_models_come_back_from_their_dict(name):
    config = ModelConfig.load(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    theirs = open_clip.get_model_config(name)
    if theirs is not None:
        assert config.embed_dim == theirs["embed_dim"]
        vision, text = theirs["vision_cfg"], theirs["text_cfg"]
        assert (config.width, config.layers, config.patch_size) == (
            vision["width"], vision["layers"], vision["patch_size"],
        )  # fmt: skip
        assert config.heads == config.width // vision.get("head_width", 64)
        assert (config.text_width, config.text_layers, config.text_heads) == (
            text["width"], text["layers"], text["heads"],
        )  # fmt: skip
    for pretrain, url in config.urls.items():
        tag = {"openai": "openai", "laion400m": "laion400m_e32"}[pretrain]
        assert open_clip.get_pretrained_url(name, tag) == url
        assert open_clip.pretrained.get_pretrained_cfg(name, tag).get("quick_gelu", False) is (
            config.quick_gelu and pretrain == "openai"
        )
        assert re.search(r"/[0-9a-f]{64}/|-[0-9a-f]{8}\.pt$", url)


# What is refused


CONFIGS = [
    ({"text_cfg": {"hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base"}}, "a BERT text tower"),
    ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, "a ResNet image tower"),
    ({"vision_cfg": {"timm_model_name": "convnext_base"}}, "a timm image tower .convnext_base"),
    ({"init_logit_bias": -10}, "a SigLIP model"),
    ({"multimodal_cfg": {"layers": 1}}, "a CoCa model"),
    ({"vision_cfg": {"attentional_pool": True}}, "attentional_pool"),
    ({"vision_cfg": {"width": None}}, "width"),
]


@pytest.mark.parametrize(("change", "words"), CONFIGS)
def test_configs_of_open_clip_that_are_refused(tmp_path, change, words):
    values = open_clip_config(TINY)
    for key, value in change.items():
        values["model_cfg"][key] = {**values["model_cfg"].get(key, {}), **value} if isinstance(value, dict) else value
    refused(tmp_path, "open_clip_config.json", values, words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "siglip"}, "a SigLIP model"),
        ({"model_type": "clip", "text_config": {"model_type": "bert"}}, "bert is another family"),
        ({"model_type": "clip", "vision_config": {"hidden_act": "relu"}}, "hidden_act relu"),
        ({"model_type": "clip", "text_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps"),
        ({"model_type": "clip", "text_config": {"vocab_size": 30000}}, "30000 words.*not supported"),
        ({"model_type": "clip", "text_config": {"hidden_size": "x"}}, "hidden_size"),
        ({"model_type": "clip", "vision_config": {"num_attention_heads": 7}}, "heads"),
        ({"model_type": "clip", "vision_config": {"num_hidden_layers": 10**9}}, "layers is 1000000000"),
        ({"embed_dim": 4}, "config.json"),
        ([1], "config.json"),
    ],
)
def test_configs_of_hugging_face_that_are_refused(tmp_path, values, words):
    refused(tmp_path, "config.json", values, words)


def refused(folder, name, values, words):
    """In one line that names the file."""
    (folder / name).write_text(json.dumps(values))
    with pytest.raises(InputError, match=words) as caught:
        find_weights(str(folder), "openai")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_without_a_config_or_weights(tmp_path):
    with pytest.raises(InputError, match=r"holds none of open_clip_config.json"):
        ModelConfig.load(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json: JSONDecodeError"):
        ModelConfig.load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config(TINY)))
    with pytest.raises(InputError, match=r"holds none of .*model.safetensors"):
        find_weights(str(tmp_path), "openai")


@pytest.mark.parametrize(
    ("key", "words"),
    [("visual.trunk.blocks.0.attn.qkv.weight", "a timm image tower"), ("vision_model.head.probe", "a SigLIP model")],
)
def test_other_families_are_named_by_their_tensors(tmp_path, key, words):
    torch.save({key: torch.ones(1), "logit_scale": torch.ones(())}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=words):
        read_weights(tmp_path / "weights.pt")


def test_a_missing_part_is_named(tmp_path):
    named = hugging_face_names(_weights())
    del named["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    torch.save(named, tmp_path / "lacks.pt")
    with pytest.raises(InputError, match=r"resblocks.1.attn.in_proj_bias lacks its part k"):
        read_weights(tmp_path / "lacks.pt")


# Reading the text tower alone


def test_text_alone_reads_no_image_tensor_of_an_archive(tmp_path):
    """The image tower's bytes are damaged: whoever reads them sees the wrong CRC."""
    path = tmp_path / "tiny.pt"
    save_torchscript(tiny_state(), path)
    content = bytearray(path.read_bytes())
    at = content.index(tiny_state()["visual.proj"].half().numpy().tobytes())
    content[at + 10] ^= 1
    path.write_bytes(content)
    text = read_weights(path, vision=False)
    assert text.keys() == {key for key in _weights() if not key.startswith("visual.")}
    assert torch.equal(text["text_projection"].float(), tiny_state()["text_projection"])
    with pytest.raises(InputError, match="CRC"):
        read_weights(path)


# Where weights are found


def test_find_weights_names_file_and_hash_and_reads_no_tensor(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"no weights at all")
    found = find_weights("ViT-tiny-14-56", "openai", tmp_path / "weights.pt", seed=3)
    assert (found.path, found.source, found.pretrain) == (tmp_path / "weights.pt", "weights.pt", "openai")
    assert found.sha256 == hashlib.sha256(b"no weights at all").hexdigest()
    random = find_weights("ViT-tiny-14-56", "random", seed=3)
    assert (random.path, random.source) == (None, "random, seed 3")
    hashes = {find_weights("ViT-tiny-14-56", "random", seed=3).sha256, random.sha256}
    assert len(hashes) == 1
    assert hashes == {"8cf331fc40d65f331940ecc18168a2e829543974946641c4207c6fd3066a1191"}
    assert find_weights(replace(TINY, heads=4), "random", seed=3).sha256 not in hashes


def test_a_file_that_is_missing_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_module, "CKPT_FOLDER", tmp_path)
    monkeypatch.setattr(weights_module, "fetch", lambda *_, **__: tmp_path / "model.safetensors")
    found = weights_module._locate("ViT-L-14-336", ModelConfig.load("ViT-L-14-336"), "openai", None)
    assert found[1] == "openai/clip-vit-large-patch14-336/model.safetensors"  # the hub's cache stands in
    for place in (tmp_path / "nowhere.pt", tmp_path):
        with pytest.raises(InputError) as caught:
            find_weights("ViT-L-14-336", "openai", place)
        assert str(place) in str(caught.value)
    with pytest.raises(InputError, match=r"CLIP.download ViT-B-32 --pretrain laion2b`"):
        find_weights("ViT-B-32", "laion2b", tmp_path / "nowhere.pt")


def test_a_config_needs_no_torch():
    code = (
        "import sys\n"
        "from CLIP.config import ModelConfig\n"
        "from Prompt.states import TEXT_MOODS, read_prompts\n"
        "assert ModelConfig.load('ViT-L-14-336').layers == 24\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
    assert tuple(ADAPTERS) == ADAPTER_KINDS
