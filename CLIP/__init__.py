"""The frozen backbone and what is attached to it: `create_model`, the tokenizer, the adapters. It imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import ADAPTER_KINDS, FIDELITIES, PRETRAINS, ModelConfig, list_models
from .weights import Weights, WeightsInfo, find_weights

if TYPE_CHECKING:
    from .adapter_shared import ADAPTERS, DualBranchAdapters
    from .clip import create_model, uses_quick_gelu
    from .model import CLIP
    from .tokenizer import tokenize

__all__ = [
    "ADAPTERS",
    "ADAPTER_KINDS",
    "CLIP",
    "FIDELITIES",
    "PRETRAINS",
    "DualBranchAdapters",
    "ModelConfig",
    "Weights",
    "WeightsInfo",
    "create_model",
    "find_weights",
    "list_models",
    "tokenize",
    "uses_quick_gelu",
]

_MODULES = {
    "ADAPTERS": "adapter_shared",
    "CLIP": "model",
    "DualBranchAdapters": "adapter_shared",
    "create_model": "clip",
    "tokenize": "tokenizer",
    "uses_quick_gelu": "clip",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever a module holds
    """Import what needs torch when it is asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
