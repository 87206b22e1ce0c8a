"""One factory: `create_model(name, pretrained, img_size)` gives a frozen CLIP ready to use."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from utils import InputError

from .model import CLIP, ModelConfig, WeightsInfo, resize_positional_embedding
from .openai import check_state, read_weights, round_to_half, sha256_file

CKPT_FOLDER = Path(__file__).parent / "ckpt"
PRETRAINS = ("openai", "laion400m", "random")
FIDELITIES = ("released", "corrected")


def weights_path(config: ModelConfig, pretrained: str, weights: str | Path | None = None) -> Path:
    """The weight file that the options name; `InputError` where a model has no such published weights."""
    if weights is not None:
        return Path(weights)
    if pretrained not in config.weights:
        raise InputError(
            f"--pretrain {pretrained}: no such weights are known for {config.name}; "
            f"choose --pretrain {' or '.join([*config.weights, 'random'])}, or give a file with --weights FILE"
        )
    return CKPT_FOLDER / config.weights[pretrained]


def uses_quick_gelu(config: ModelConfig, pretrained: str, img_size: int, fidelity: str) -> bool:
    """Whether the towers run QuickGELU: the `activation` row of the fidelity table (README)."""
    if not config.quick_gelu or pretrained == "laion400m":  # LAION's models were trained with plain GELU
        return False
    return fidelity == "corrected" or img_size == config.image_size


def random_state(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Seeded random weights under OpenAI's names and scales (Radford et al. 2021, initialisation of the release)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        template = CLIP(config, config.image_size, quick_gelu=False)

    def draw(name: str, shape: torch.Size) -> Tensor:
        vision = name.startswith("visual.")
        width, layers = (config.width, config.layers) if vision else (config.text_width, config.text_layers)
        if name == "logit_scale":
            return torch.tensor(2.6592)  # ln(1 / 0.07)
        if ".ln_" in f".{name}":
            return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        if name.endswith("bias"):
            return torch.zeros(shape)
        std = width**-0.5
        if "out_proj" in name or "c_proj" in name:
            std *= (2 * layers) ** -0.5
        elif "c_fc" in name:
            std = (2 * width) ** -0.5
        elif "conv1" in name:
            std = (3 * config.patch_size**2) ** -0.5
        elif not vision and "embedding" in name:
            std = 0.02 if "token" in name else 0.01
        return torch.empty(shape).normal_(0, std, generator=generator)

    return {openai_name(name): draw(openai_name(name), tensor.shape) for name, tensor in template.state_dict().items()}


def openai_name(name: str) -> str:
    """The name of one of our parameters in OpenAI's files, which keep the text tower at the top level."""
    return name.removeprefix("text.")


def load_state(model: CLIP, state: dict[str, Tensor], source: str) -> None:
    """Put a state dict with OpenAI's names into `model`, resizing the positional embedding to its image size."""
    own = {openai_name(name): name for name in model.state_dict()}
    with torch.device("meta"):
        native = CLIP(model.config, model.config.image_size, model.quick_gelu).state_dict()
    check_state(state, {short: native[name].shape for short, name in own.items()}, f"{source} ({model.config.name})")
    state = {name: state[short].float() for short, name in own.items()}
    key = "visual.positional_embedding"
    state[key] = resize_positional_embedding(state[key], model.config.grid(model.img_size))
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)


def create_model(
    model_name: str = "ViT-L-14-336",
    pretrained: str = "openai",
    img_size: int | None = None,
    *,
    weights: str | Path | None = None,
    fidelity: str = "released",
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> CLIP:
    """Build a frozen CLIP.

    Args:
        model_name: a file of model_configs/ without its ending.
        pretrained: `openai`, `laion400m` or `random` (seeded, nothing pre-trained).
        img_size: pixels a side; None is the weights' own size.
        weights: a weight file instead of the one under CLIP/ckpt.
        fidelity: `released` or `corrected`, see the README's table.
        seed: of random weights.
        device: where the model goes.

    Raises:
        InputError: unknown model, missing or unfitting weight file, image smaller than a patch.
    """
    config = ModelConfig.load(model_name)
    img_size = config.image_size if img_size is None else img_size
    quick_gelu = uses_quick_gelu(config, pretrained, img_size, fidelity)
    with torch.device("meta"):
        model = CLIP(config, img_size, quick_gelu, normalize_pixels=fidelity == "corrected")
    if pretrained == "random":
        if weights is not None:
            raise InputError(f"--pretrain random contradicts --weights {weights}: give one of them")
        source = f"random, seed {seed}"
        words = f"{source}, {model_name}"
        info = WeightsInfo(pretrained, source, hashlib.sha256(words.encode()).hexdigest())
        state = random_state(config, seed)
    else:
        path = weights_path(config, pretrained, weights)
        source, state = str(path), read_weights(path)
        info = WeightsInfo(pretrained, path.name, sha256_file(path))
    if fidelity == "released":
        state = round_to_half(state)
    load_state(model, state, source)
    model.info = info
    model.half_rounded = fidelity == "released"
    return model.to(device)
