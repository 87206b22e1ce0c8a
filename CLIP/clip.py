"""The factory of models: `create_model(name, pretrained, img_size)` returns a frozen CLIP, ready to use."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from utils import InputError, blame, preview

from .config import ModelConfig
from .model import CLIP, resize_positional_embedding
from .weights import Weights, find_weights, read_weights, round_to_half


def uses_quick_gelu(config: ModelConfig, pretrained: str, img_size: int, fidelity: str) -> bool:
    """Whether the towers use QuickGELU: the `activation` row of the fidelity table (docs/method.md)."""
    if not config.quick_gelu or pretrained.startswith("laion"):  # LAION's models were trained with plain GELU
        return False
    return fidelity == "corrected" or img_size == (config.tower.own_image_size or config.image_size)


def random_state(config: ModelConfig, seed: int, vision: bool = True) -> dict[str, Tensor]:
    """Seeded random weights with OpenAI's names and initial scales (Radford et al. 2021, as in the released code).

    Each tensor has its own generator, seeded by `seed` and its name: `vision` does not change the text tower.
    """
    with torch.device("meta"):
        shapes = CLIP(config, config.image_size, quick_gelu=False, vision=vision).state_dict()
    state = {}
    for name, shape in ((name.removeprefix("text."), value.shape) for name, value in shapes.items()):
        if ".ln_" in f".{name}" or name.endswith("bias"):
            state[name] = torch.full(shape, float(name.endswith("weight")))
            continue
        digest = hashlib.sha256(f"random 2, seed {seed}, {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        state[name] = torch.empty(shape).normal_(0, _random_std(name, config), generator=generator)
    return {**state, "logit_scale": torch.tensor(2.6592)}  # ln(1 / 0.07)


def _random_std(name: str, config: ModelConfig) -> float:
    vision = name.startswith("visual.")
    width, layers = (config.width, config.layers) if vision else (config.text_width, config.text_layers)
    stds = {
        "out_proj": (2 * layers * width) ** -0.5, "c_proj": (2 * layers * width) ** -0.5, "c_fc": (2 * width) ** -0.5,
        "conv1": (3 * config.patch_size**2) ** -0.5, "token_embedding": 0.02,
        **({} if vision else {"positional_embedding": 0.01}),
    }  # fmt: skip
    return float(next((std for part, std in stds.items() if part in name), width**-0.5))


def load_state(model: CLIP, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict with OpenAI's names into `model`, resizing the positional embedding to its image size.

    Tensors that are missing, have another shape or are not finite raise `InputError`, which names `source`.
    """
    config, name = model.config, "visual.positional_embedding"
    own = {key: state[short].float() for key in model.state_dict() if (short := key.removeprefix("text.")) in state}
    with blame(f"{source} does not fit {config.name}", "pass its own file with --weights", (RuntimeError,)):
        if wrong := [key for key, value in own.items() if not value.isfinite().all()]:
            raise InputError(f"{source}: {preview(wrong)}: NaN or infinite numbers: fetch it again")
        if name in own:
            if (rows := len(own[name])) != (positions := config.grid(config.image_size) ** 2 + 1):
                of_ours = f"{config.name} at {config.image_size} pixels has {positions}"
                raise InputError(f"{source}: {rows} positions in the image tower, but {of_ours}")
            own[name] = resize_positional_embedding(own[name], config.grid(model.img_size), config.tower.antialias)
        model.load_state_dict(own, assign=True)
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

    `model_name`, `pretrained`, `weights` and `seed` are those of `find_weights`; its result can be passed as
    `model_name` instead of all four. `img_size` is in pixels a side, None for the model's own; `fidelity`, `released`
    or `corrected`, is explained in docs/method.md; if `vision` is False, only the text tower is read and built. Raises
    `InputError` for an unknown model, a weight file that is missing or does not fit, or images smaller than a patch.
    """
    source = model_name if isinstance(model_name, Weights) else find_weights(model_name, pretrained, weights, seed)
    config, released = source.config, fidelity == "released"
    img_size = config.image_size if img_size is None else img_size
    config.grid(img_size)  # raises if it is smaller than a patch
    quick_gelu = uses_quick_gelu(config, source.pretrain, img_size, fidelity)
    with torch.device("meta"):
        model = CLIP(config, img_size, quick_gelu, normalize_pixels=not released, vision=vision)
    own = vision and source.tower is None  # whether the image tower is in the model's own file
    state = random_state(config, source.seed, own) if source.path is None else read_weights(source.path, own)
    state = round_to_half(state) if released else state
    if vision and source.tower is not None:
        state |= read_weights(source.tower)
    load_state(model, state, str(source.path or source.source))
    model.info = source
    return model.to(device)
