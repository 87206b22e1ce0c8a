"""CLIP weight files for tests, in the forms of OpenAI, open_clip and Hugging Face, and reference models to compare."""

import warnings
from pathlib import Path
from typing import Any

import torch

from CLIP.config import ModelConfig
from CLIP.weights import HALF, NOT_WEIGHTS


def save_torchscript(model_or_state: torch.nn.Module | dict[str, torch.Tensor], path: str | Path) -> None:
    """Write a TorchScript archive with OpenAI's names, precisions and three integers; works for ViT-L-14-336 too.

    The prefix `text.` of this project's names is removed; OpenAI's names do not have it.
    """
    given = model_or_state.state_dict() if isinstance(model_or_state, torch.nn.Module) else model_or_state
    state = {key.removeprefix("text."): value for key, value in given.items()}
    positions, patch = state["visual.positional_embedding"].shape[0], state["visual.conv1.weight"].shape[-1]
    integers = {
        "input_resolution": round((positions - 1) ** 0.5) * patch,
        "context_length": state["positional_embedding"].shape[0],
        "vocab_size": state["token_embedding.weight"].shape[0],
    }
    root = _Tree()
    for key, value in state.items():
        if key not in integers:
            root.put(key, torch.nn.Parameter(value.half() if HALF.fullmatch(key) else value.float(), False))
    for key, number in integers.items():
        root.register_buffer(key, torch.tensor(number))
    with warnings.catch_warnings():
        # OpenAI's files are TorchScript, which is deprecated; the class of the warning depends on the torch release.
        warnings.filterwarnings("ignore", message=".*torch.jit.* is deprecated")
        torch.jit.save(torch.jit.script(root), str(path))


class _Tree(torch.nn.Module):
    """A tree of modules that only hold parameters."""

    def put(self, key: str, value: torch.nn.Parameter) -> None:
        node, (*folders, name) = self, key.split(".")
        for folder in folders:
            if folder not in node._modules:
                node.add_module(folder, _Tree())
            node = node._modules[folder]
        node.register_parameter(name, value)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image


def save_hugging_face(config: ModelConfig, folder: Path) -> Any:
    """Save a CLIPModel of transformers to `folder` and return it; its weights are random and exact in float16."""
    import transformers  # noqa: PLC0415 - takes seconds

    def tower(width: int, layers: int, heads: int) -> dict[str, Any]:
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        return {**sizes, "intermediate_size": 4 * width, "hidden_act": "quick_gelu" if config.quick_gelu else "gelu"}

    text = tower(config.text_width, config.text_layers, config.text_heads)
    vision = tower(config.width, config.layers, config.heads)
    vision |= {"image_size": config.image_size, "patch_size": config.patch_size}
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.embed_dim)
    )
    for parameter in model.parameters():
        parameter.data = (parameter.data + 0.02 * torch.randn_like(parameter)).half().float()
    model.save_pretrained(folder)
    return model.eval()


def open_clip_model(config: ModelConfig, state: dict[str, torch.Tensor], size: int, quick_gelu: bool) -> Any:
    """open_clip's model with these weights (OpenAI's names); the positional embedding is resized to `size` pixels."""
    import open_clip  # noqa: PLC0415 - takes seconds

    sizes = open_clip_config(config)["model_cfg"]
    vision, text = {**sizes["vision_cfg"], "image_size": size}, sizes["text_cfg"]
    model = open_clip.model.CLIP(config.embed_dim, vision, text, quick_gelu=quick_gelu)
    state = {key: value for key, value in state.items() if key not in NOT_WEIGHTS}
    open_clip.model.resize_pos_embed(state, model)
    model.load_state_dict(state)
    return model.eval()


def open_clip_config(config: ModelConfig) -> dict[str, Any]:
    """Content of the open_clip_config.json of a model of this size, as on the hub."""
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim, "quick_gelu": config.quick_gelu,
            "vision_cfg": {
                "image_size": config.image_size, "layers": config.layers, "width": config.width,
                "head_width": config.width // config.heads, "patch_size": config.patch_size,
            },
            "text_cfg": {
                "context_length": 77, "vocab_size": 49408, "width": config.text_width, "heads": config.text_heads,
                "layers": config.text_layers,
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "interpolation": "bicubic"},
    }  # fmt: skip
