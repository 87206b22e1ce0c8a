"""DINOv2 as image tower with a CLIP's text tower (Oquab et al. 2023; with registers: Darcet et al. 2023).

This module reads its config and finds its weights. `ImageTower` lists its differences from CLIP's tower, and
CLIP/model.py implements them. The weights are safetensors with the names of Hugging Face's Dinov2Model.
"""

from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from utils import InputError, blame, read_json

from .config import CKPT_FOLDER, CONFIG_ERRORS, HUB, ImageTower, ModelConfig, find

FILES = ("config.json", "model.safetensors")


def load_config(model_name: str, image_tower: str | None = None) -> ModelConfig:
    """The config of --model_name, with another image tower if --image_tower names one."""
    return with_tower(ModelConfig.load(model_name), image_tower)[0]


def with_tower(config: ModelConfig, name: str | None) -> tuple[ModelConfig, Path | None]:
    """The config with another image tower, and its file (None: no `name`); raises `InputError` if it is not DINOv2."""
    if name is None:
        return config, None
    path, label = find_tower(name)
    what = f"--image_tower {path}: damaged, or not a DINOv2 in the form of Hugging Face's Dinov2Model"
    with blame(what, errors=(*CONFIG_ERRORS, SafetensorError)), safe_open(path, framework="np") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - no mapping
        (width,) = shapes["encoder.layer.0.layer_scale1.lambda1"]
        patch = shapes["embeddings.patch_embeddings.projection.weight"][-1]
        image_size = isqrt(shapes["embeddings.position_embeddings"][1] - 1) * patch
        beside = path.with_name(FILES[0])
        heads = read_json(beside)["num_attention_heads"] if beside.is_file() else width // 64  # as all published have
    registers = shapes.get("embeddings.register_tokens", (1, 0))[1]
    tower = ImageTower(
        label, config.tower.own_image_size or config.image_size, patch_bias=True, layer_scale=True, pre_norm=False,
        norm_eps=1e-6, swiglu="encoder.layer.0.mlp.weights_in.weight" in shapes, registers=registers,
        antialias=registers > 0,
    )  # fmt: skip
    layers = sum(key.endswith(".norm1.weight") for key in shapes)
    pixels: dict[str, Any] = {"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}
    sizes = {"image_size": image_size, "patch_size": patch, "width": width, "layers": layers, "heads": heads}
    return replace(config, tower=tower, mlp_ratio=4.0, **sizes, **pixels), path


def find_tower(name: str) -> tuple[Path, str]:
    """The file of weights for --image_tower, and the name of the tower; raises `InputError` if there is none.

    `name` is a tower that `python -m CLIP.download` fetched, a folder, a safetensors file or `hf-hub:owner/name`.
    """
    if name.startswith(HUB):
        find(name, FILES, "")  # fetch the config, too: the hub's cache puts it beside the weights
    stored = str(CKPT_FOLDER / f"{name}.safetensors")
    if found := find(name, FILES[1:], "--image_tower") or find(stored, (), ""):
        return found
    raise InputError(
        f"--image_tower {name}: not found; `python -m CLIP.download dinov2-small` (or base, large, giant) fetches "
        "one; or give a folder, a safetensors file, or hf-hub:owner/name"
    )
