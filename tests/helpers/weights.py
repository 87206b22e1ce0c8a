"""CLIP weight files for tests: any state in OpenAI's, open_clip's and Hugging Face's form."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from CLIP.config import ModelConfig
from CLIP.weights import HALF, NOT_WEIGHTS


def save_torchscript(model_or_state: torch.nn.Module | dict[str, torch.Tensor], path: str | Path) -> None:
    """Write a TorchScript archive with OpenAI's names, precisions and three integers; serves a ViT-L-14-336 too.

    Names of a model of this project lose the `text.` that OpenAI's lack.
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
        # TorchScript is deprecated, and is what OpenAI's file is; the warning's class depends on the release of torch.
        warnings.filterwarnings("ignore", message=".*torch.jit.* is deprecated")
        torch.jit.save(torch.jit.script(root), str(path))


class _Tree(torch.nn.Module):
    """A module tree that only holds parameters."""

    def put(self, key: str, value: torch.nn.Parameter) -> None:
        node, (*folders, name) = self, key.split(".")
        for folder in folders:
            if folder not in node._modules:
                node.add_module(folder, _Tree())
            node = node._modules[folder]
        node.register_parameter(name, value)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image


def save_hugging_face(
    state: dict[str, torch.Tensor], config: ModelConfig, folder: Path, weights: str = "model.safetensors"
) -> None:
    """Write a folder as transformers' CLIPModel.save_pretrained does: config.json and weights under its names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(config)))
    named = hugging_face_names({key: value.float() for key, value in state.items() if key not in NOT_WEIGHTS})
    named |= {f"{tower}_model.embeddings.position_ids": torch.arange(77)[None] for tower in ("text", "vision")}
    if weights.endswith(".safetensors"):
        save_file({key: value.contiguous() for key, value in named.items()}, folder / weights, {"format": "pt"})
    else:
        torch.save(named, folder / weights)


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a CLIPModel of this size."""
    activation = "quick_gelu" if config.quick_gelu else "gelu"
    text = {
        "model_type": "clip_text_model", "hidden_size": config.text_width, "intermediate_size": 4 * config.text_width,
        "num_hidden_layers": config.text_layers, "num_attention_heads": config.text_heads, "hidden_act": activation,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": config.width, "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers, "num_attention_heads": config.heads, "hidden_act": activation,
        "image_size": config.image_size, "patch_size": config.patch_size,
    }  # fmt: skip
    return {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": config.embed_dim,
        "text_config": text, "vision_config": vision, "torch_dtype": "float32",
    }  # fmt: skip


def hugging_face_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict under OpenAI's names, renamed one by one: written apart from the reader that it tests."""
    result: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        tower, name = ("vision", key.removeprefix("visual.")) if key.startswith("visual.") else ("text", key)
        if key == "logit_scale":
            result[key] = value
        elif name in ("proj", "text_projection"):
            result["visual_projection.weight" if tower == "vision" else "text_projection.weight"] = value.T
        elif name.startswith("transformer.resblocks."):
            _, _, number, rest = name.split(".", 3)
            stem, kind = f"{tower}_model.encoder.layers.{number}", rest.rpartition(".")[2]
            if rest.startswith("attn.in_proj"):
                for letter, part in zip("qkv", value.chunk(3), strict=True):
                    result[f"{stem}.self_attn.{letter}_proj.{kind.removeprefix('in_proj_')}"] = part
                continue
            module = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
                      "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}[rest.rpartition(".")[0]]  # fmt: skip
            result[f"{stem}.{module}.{kind}"] = value
        else:
            module = {
                "conv1.weight": "embeddings.patch_embedding.weight", "class_embedding": "embeddings.class_embedding",
                "positional_embedding": "embeddings.position_embedding.weight",
                "token_embedding.weight": "embeddings.token_embedding.weight",
                "ln_pre.weight": "pre_layrnorm.weight", "ln_pre.bias": "pre_layrnorm.bias",
                "ln_post.weight": "post_layernorm.weight", "ln_post.bias": "post_layernorm.bias",
                "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias",
            }[name]  # fmt: skip
            result[f"{tower}_model.{module}"] = value
    return result


def open_clip_model(config: ModelConfig, state: dict[str, torch.Tensor], size: int, quick_gelu: bool) -> Any:
    """open_clip's model with these weights (OpenAI's names), its positional embedding resized to `size` pixels."""
    import open_clip  # noqa: PLC0415 - takes seconds

    model = open_clip.model.CLIP(
        config.embed_dim,
        {
            "image_size": size, "patch_size": config.patch_size, "width": config.width, "layers": config.layers,
            "head_width": config.width // config.heads, "mlp_ratio": config.mlp_ratio,
        },
        {
            "context_length": config.context_length, "vocab_size": config.vocab_size, "width": config.text_width,
            "heads": config.text_heads, "layers": config.text_layers, "mlp_ratio": config.text_mlp_ratio,
        },
        quick_gelu=quick_gelu,
    )  # fmt: skip
    state = {key: value for key, value in state.items() if key not in NOT_WEIGHTS}
    open_clip.model.resize_pos_embed(state, model)
    model.load_state_dict(state)
    return model.eval()


def open_clip_config(config: ModelConfig) -> dict[str, Any]:
    """The open_clip_config.json of a model of this size, as on the hub."""
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
