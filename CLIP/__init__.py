"""The frozen backbone and what is attached to it: `create_model`, the tokenizer, the adapters. It imports no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import ADAPTER_KINDS, ModelConfig, list_models
from .weights import find_weights

if TYPE_CHECKING:
    from .adapter_shared import ADAPTERS, DualBranchAdapters
    from .clip import create_model
    from .model import CLIP
    from .tokenizer import tokenize

__all__ = [
    "ADAPTERS", "ADAPTER_KINDS", "CLIP", "DualBranchAdapters", "ModelConfig", "create_model", "find_weights",
    "list_models", "tokenize",
]  # fmt: skip
_LAZY = {
    "ADAPTERS": "adapter_shared", "CLIP": "model", "DualBranchAdapters": "adapter_shared", "create_model": "clip",
    "tokenize": "tokenizer",
}  # fmt: skip


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever a module holds
    """Import what needs torch when it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
