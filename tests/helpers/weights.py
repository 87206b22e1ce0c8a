"""CLIP weight files for tests: any state in OpenAI's TorchScript form."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from CLIP.openai import stored_as_half


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
            root.put(key, torch.nn.Parameter(value.half() if stored_as_half(key) else value.float(), False))
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
