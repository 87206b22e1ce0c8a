"""DINOv2 as the image tower beside a CLIP's text tower (Oquab et al. 2023; with registers: Darcet et al. 2023).

Here its config and where its weights are; what it computes otherwise than CLIP's tower is named in `ModelConfig` and
done in CLIP/model.py. The weights are safetensors in the spelling of Hugging Face's Dinov2Model.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

from utils import InputError, blame, one_line, read_json

from .config import CKPT_FOLDER, HUB, OF_CONFIGS, ModelConfig, fetch, file_in

NAME = r"dinov2(-with-registers)?-(small|base|large|giant)"  # as on the hub, below facebook/
HEAD_WIDTH = 64  # of every published size; no tensor tells it
FILES = ("config.json", "model.safetensors")
DIFFERENCES: dict[str, Any] = {
    "patch_bias": True, "layer_scale": True, "pre_norm": False, "norm_eps": 1e-6,
    "pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225),
}  # fmt: skip


def load_config(model_name: str, image_tower: str | None = None) -> ModelConfig:
    """The config of --model_name, with another image tower where --image_tower names one."""
    config = ModelConfig.load(model_name)
    return config if image_tower is None else with_tower(config, image_tower)


def with_tower(config: ModelConfig, name: str) -> ModelConfig:
    """The model with DINOv2 in place of its image tower; `InputError` for another architecture."""
    label, path, weights = find_tower(name)
    with blame(f"--image_tower {weights}", "it is no DINOv2 in the form of Hugging Face's Dinov2Model", OF_CONFIGS):
        sizes = _sizes(weights)
    with blame(f"--image_tower {path}", "it is no config of Hugging Face's Dinov2Model", OF_CONFIGS):
        values = read_json(path) if path else {"model_type": "dinov2", "num_attention_heads": sizes["heads"]}
        if values["model_type"] not in ("dinov2", "dinov2_with_registers"):
            raise InputError(f"--image_tower {path}: {one_line(values['model_type'])} is another architecture")
        sizes["heads"] = int(values["num_attention_heads"])
    return replace(
        config, image_tower=label, own_image_size=config.own_image_size or config.image_size, **DIFFERENCES, **sizes
    )


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
    if not re.fullmatch(NAME, name):
        known = "dinov2-small (base, large, giant), a folder, a safetensors file, or hf-hub:owner/name"
        raise InputError(f"--image_tower {name}: not found; give {known}")
    stored = CKPT_FOLDER / f"{name}.safetensors"
    if not stored.is_file():
        raise InputError(f"--image_tower {name}: not there yet; fetch it with `python -m CLIP.download {name}`")
    return name, None, stored


def _sizes(path: Path) -> dict[str, Any]:
    """The sizes that a safetensors file's tensors have."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        shapes = {name: entry.get("shape") for name, entry in json.loads(file.read(min(length, 10**7))).items()}
    width, _, _, patch = shapes["embeddings.patch_embeddings.projection.weight"]
    swiglu, registers = "encoder.layer.0.mlp.weights_in.weight" in shapes, "embeddings.register_tokens" in shapes
    return {
        "image_size": isqrt(shapes["embeddings.position_embeddings"][1] - 1) * patch, "patch_size": patch,
        "width": width, "layers": sum(name.endswith(".norm1.weight") for name in shapes), "heads": width // HEAD_WIDTH,
        "mlp_ratio": 4.0 if swiglu else shapes["encoder.layer.0.mlp.fc1.weight"][0] / width, "swiglu": swiglu,
        "registers": shapes["embeddings.register_tokens"][1] if registers else 0, "antialias": registers,
    }  # fmt: skip
