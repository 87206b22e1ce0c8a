"""One factory: `create_model(name, pretrained, img_size)` gives a frozen CLIP ready to use."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from .config import ModelConfig
from .model import CLIP, resize_positional_embedding
from .openai import check_state, read_weights, round_to_half
from .weights import Weights, find_weights


def uses_quick_gelu(config: ModelConfig, pretrained: str, img_size: int, fidelity: str) -> bool:
    """Whether the towers run QuickGELU: the `activation` row of the fidelity table (docs/method.md)."""
    if not config.quick_gelu or pretrained.startswith("laion"):  # LAION's models were trained with plain GELU
        return False
    return fidelity == "corrected" or img_size == config.image_size


def random_state(config: ModelConfig, seed: int, vision: bool = True) -> dict[str, Tensor]:
    """Seeded random weights under OpenAI's names and scales (Radford et al. 2021, initialisation of the release).

    Each tensor draws from a generator of its own, seeded by `seed` and its name: without `vision` the text tower's
    are the same.
    """
    with torch.device("meta"):
        template = CLIP(config, config.image_size, quick_gelu=False, vision=vision)

    def draw(name: str, shape: torch.Size) -> Tensor:
        if name == "logit_scale":
            return torch.tensor(2.6592)  # ln(1 / 0.07)
        if ".ln_" in f".{name}":
            return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        if name.endswith("bias"):
            return torch.zeros(shape)
        digest = hashlib.sha256(f"random 2, seed {seed}, {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.empty(shape).normal_(0, _random_std(name, config), generator=generator)

    return {openai_name(name): draw(openai_name(name), tensor.shape) for name, tensor in template.state_dict().items()}


def _random_std(name: str, config: ModelConfig) -> float:
    vision = name.startswith("visual.")
    width, layers = (config.width, config.layers) if vision else (config.text_width, config.text_layers)
    if "out_proj" in name or "c_proj" in name:
        return float((2 * layers * width) ** -0.5)
    if "c_fc" in name:
        return float((2 * width) ** -0.5)
    if "conv1" in name:
        return float((3 * config.patch_size**2) ** -0.5)
    if not vision and "embedding" in name:
        return 0.02 if "token" in name else 0.01
    return float(width**-0.5)


def openai_name(name: str) -> str:
    """The name of one of our parameters in OpenAI's files, which keep the text tower at the top level."""
    return name.removeprefix("text.")


def load_state(model: CLIP, state: dict[str, Tensor], source: str) -> None:
    """Put a state dict with OpenAI's names into `model`, resizing the positional embedding to its image size.

    Raises:
        InputError: naming `source` and the first tensors that are missing, of another shape or not finite.
    """
    own = {openai_name(name): name for name in model.state_dict()}
    vision = model.visual is not None
    with torch.device("meta"):
        native = CLIP(model.config, model.config.image_size, model.quick_gelu, vision=vision).state_dict()
    check_state(state, {short: native[name].shape for short, name in own.items()}, f"{source} ({model.config.name})")
    state = {name: state[short].float() for short, name in own.items()}
    if vision:
        key = "visual.positional_embedding"
        state[key] = resize_positional_embedding(state[key], model.config.grid(model.img_size))
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)


def create_model(
    model_name: str | ModelConfig | Weights = "ViT-L-14-336",
    pretrained: str = "openai",
    img_size: int | None = None,
    *,
    weights: str | Path | None = None,
    fidelity: str = "released",
    seed: int = 0,
    device: str | torch.device = "cpu",
    vision: bool = True,
) -> CLIP:
    """Build a frozen CLIP.

    Args:
        model_name: a name of model_configs/, a JSON file, a folder, `hf-hub:owner/name`, a config;
            or what `find_weights` gave, which says `pretrained`, `weights` and `seed` too.
        pretrained: `openai`, `laion400m`, `laion2b` or `random` (seeded, nothing pre-trained).
        img_size: pixels a side; None is the weights' own size.
        weights: a weight file, or a folder that holds one, instead of the one under CLIP/ckpt.
        fidelity: `released` or `corrected`, see the table in docs/method.md.
        seed: of random weights.
        device: where the model goes.
        vision: False reads and builds the text tower alone.

    Raises:
        InputError: unknown model, missing or unfitting weight file, image smaller than a patch.
    """
    source = model_name if isinstance(model_name, Weights) else find_weights(model_name, pretrained, weights, seed)
    config = source.config
    img_size = config.image_size if img_size is None else img_size
    config.grid(img_size)  # raises where it is smaller than a patch
    quick_gelu = uses_quick_gelu(config, source.pretrain, img_size, fidelity)
    with torch.device("meta"):
        model = CLIP(config, img_size, quick_gelu, normalize_pixels=fidelity == "corrected", vision=vision)
    state = random_state(config, source.seed, vision) if source.path is None else read_weights(source.path, vision)
    if fidelity == "released":
        state = round_to_half(state)
    load_state(model, state, str(source.path or source.source))
    model.info = source.info
    model.half_rounded = fidelity == "released"
    return model.to(device)
