"""Prompts: learnable contexts (CoOp) and the choice between them and fixed sentences."""

from .CoOp import PromptLearner
from .promptChooser import TEXT_MOODS, PromptChooser, read_prompts, states_fault, text_similarity

__all__ = ["TEXT_MOODS", "PromptChooser", "PromptLearner", "read_prompts", "states_fault", "text_similarity"]
