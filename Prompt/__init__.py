"""Prompts: learnable contexts (CoOp) and the choice between them and fixed sentences. Importing it imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .states import TEXT_MOODS, read_prompts, states_fault

if TYPE_CHECKING:
    from .CoOp import PromptLearner
    from .prompt_pass import PromptPass
    from .promptChooser import PromptChooser, text_similarity

__all__ = [
    "TEXT_MOODS",
    "PromptChooser",
    "PromptLearner",
    "PromptPass",
    "read_prompts",
    "states_fault",
    "text_similarity",
]

_MODULES = {
    "PromptChooser": "promptChooser",
    "PromptLearner": "CoOp",
    "PromptPass": "prompt_pass",
    "text_similarity": "promptChooser",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever a module holds
    """Import what needs torch when it is asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
