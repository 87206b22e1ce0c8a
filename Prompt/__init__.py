"""Prompts: learnable contexts (CoOp) and the choice between them and fixed sentences. Importing it imports no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .states import TEXT_MOODS, read_prompts

if TYPE_CHECKING:
    from .prompt_pass import PromptPass
    from .promptChooser import PromptChooser

__all__ = ["TEXT_MOODS", "PromptChooser", "PromptPass", "read_prompts"]
_LAZY = {"PromptChooser": "promptChooser", "PromptPass": "prompt_pass"}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever a module holds
    """Import what needs torch when it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
