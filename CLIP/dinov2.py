"""DINOv2 as the image tower beside a CLIP's text tower (Oquab et al. 2023; with registers: Darcet et al. 2023).

Here its config and where its weights are; what it computes otherwise than CLIP's tower is named in `ImageTower` and
done in CLIP/model.py. The weights are safetensors in the spelling of Hugging Face's Dinov2Model.
"""

from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from utils import InputError, blame, read_json

from .config import CKPT_FOLDER, HUB, OF_CONFIGS, ImageTower, ModelConfig, find

FILES = ("config.json", "model.safetensors")


def load_config(model_name: str, image_tower: str | None = None) -> ModelConfig:
    """The config of --model_name, with another image tower where --image_tower names one."""
    return with_tower(ModelConfig.load(model_name), image_tower)[0]


def with_tower(config: ModelConfig, name: str | None) -> tuple[ModelConfig, Path | None]:
    """The model with DINOv2 in place of its image tower, and its weights; `InputError` for other weights."""
    if name is None:
        return config, None
    path, label = find_tower(name)
    what = f"--image_tower {path}: no DINOv2 in the form of Hugging Face's Dinov2Model, or damaged"
    with blame(what, errors=(*OF_CONFIGS, SafetensorError)), safe_open(path, framework="np") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - no mapping
        (width,) = shapes["encoder.layer.0.layer_scale1.lambda1"]
        patch = shapes["embeddings.patch_embeddings.projection.weight"][-1]
        image_size = isqrt(shapes["embeddings.position_embeddings"][1] - 1) * patch
        beside = path.with_name(FILES[0])
        heads = read_json(beside)["num_attention_heads"] if beside.is_file() else width // 64  # as all published
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
    """The weights that --image_tower means, and what the tower is called.

    `name` is one that `python -m CLIP.download` fetched, a folder, a safetensors file or `hf-hub:owner/name`.
    """
    if name.startswith(HUB):
        find(name, FILES, "")  # the config: the hub's cache has both in one folder
    stored = str(CKPT_FOLDER / f"{name}.safetensors")
    if found := find(name, FILES[1:], "--image_tower") or find(stored, (), ""):
        return found
    raise InputError(
        f"--image_tower {name}: not found; `python -m CLIP.download dinov2-small` (or base, large, giant) fetches "
        "one; or give a folder, a safetensors file, or hf-hub:owner/name"
    )
