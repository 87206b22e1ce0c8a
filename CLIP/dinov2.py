"""DINOv2 as the image tower beside a CLIP's text tower (Oquab et al. 2023; with registers: Darcet et al. 2023).

Here its config and where its weights are; what it computes otherwise than CLIP's tower is named in `ImageTower` and
done in CLIP/model.py. The weights are safetensors in the spelling of Hugging Face's Dinov2Model.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

from utils import InputError, blame, read_json

from .config import CKPT_FOLDER, HUB, OF_CONFIGS, ImageTower, ModelConfig, fetch, file_in

NAME = r"dinov2(-with-registers)?-(small|base|large|giant)"  # as on the hub, below facebook/
HEAD_WIDTH = 64  # of every published size; no tensor tells it
FILES = ("config.json", "model.safetensors")
DINOV2 = ImageTower(patch_bias=True, layer_scale=True, pre_norm=False, norm_eps=1e-6)
PIXELS: dict[str, Any] = {"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}


def load_config(model_name: str, image_tower: str | None = None) -> ModelConfig:
    """The config of --model_name, with another image tower where --image_tower names one."""
    config = ModelConfig.load(model_name)
    return config if image_tower is None else with_tower(config, image_tower)[0]


def with_tower(config: ModelConfig, name: str) -> tuple[ModelConfig, Path]:
    """The model with DINOv2 in place of its image tower, and that one's weights; `InputError` for another's."""
    label, path = find_tower(name)
    own = config.tower.own_image_size or config.image_size
    what = f"--image_tower {path}: no DINOv2 in the form of Hugging Face's Dinov2Model, or damaged"
    with blame(what, "give its folder, model.safetensors and config.json", OF_CONFIGS):
        sizes, tower = _read_header(path)
        beside = path.with_name(FILES[0])
        if path.name == FILES[1] and beside.is_file():
            sizes["heads"] = int(read_json(beside)["num_attention_heads"])
        return replace(config, tower=replace(tower, name=label, own_image_size=own), **sizes, **PIXELS), path


def find_tower(name: str) -> tuple[str, Path]:
    """What --image_tower means: what the tower is called, and its weights.

    `name` is one that `python -m CLIP.download` fetched, a folder, a safetensors file or `hf-hub:owner/name`.
    """
    path = Path(name)
    if name.startswith(HUB):
        for file in FILES:  # the config lies beside the weights then
            path = fetch(name.removeprefix(HUB), (file,))
        return name, path
    if path.is_dir():
        return path.resolve().name, file_in(path, FILES[1:], f"--image_tower {name}: the folder")
    if path.is_file():
        return path.stem, path
    if not re.fullmatch(NAME, name):
        known = "dinov2-small (base, large, giant), a folder, a safetensors file, or hf-hub:owner/name"
        raise InputError(f"--image_tower {name}: not found; give {known}")
    stored = CKPT_FOLDER / f"{name}.safetensors"
    if not stored.is_file():
        raise InputError(f"--image_tower {name}: not there yet; fetch it with `python -m CLIP.download {name}`")
    return name, stored


def _read_header(path: Path) -> tuple[dict[str, Any], ImageTower]:
    """What the shapes of a safetensors file's tensors say; `KeyError` for other tensors than DINOv2's."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(min(length, 10**7)))
    shapes = {name: entry.get("shape") for name, entry in entries.items()}
    (width,) = shapes["encoder.layer.0.layer_scale1.lambda1"]
    patch = shapes["embeddings.patch_embeddings.projection.weight"][-1]
    _, registers, _ = shapes.get("embeddings.register_tokens", (1, 0, width))
    sizes = {
        "image_size": isqrt(shapes["embeddings.position_embeddings"][1] - 1) * patch, "patch_size": patch,
        "width": width, "layers": sum(name.endswith(".norm1.weight") for name in shapes),
        "heads": width // HEAD_WIDTH, "mlp_ratio": 4.0,
    }  # fmt: skip
    swiglu = "encoder.layer.0.mlp.weights_in.weight" in shapes
    return sizes, replace(DINOV2, swiglu=swiglu, registers=registers, antialias=registers > 0)
