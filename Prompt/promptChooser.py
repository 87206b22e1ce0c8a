"""Text features of the two classes: fixed sentences, learnable contexts, or one of each (--text_mood).

MadCLIP section 2: each class has its own prompts, whose mean embedding is the class's text feature.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from CLIP.model import CLIP
from CLIP.tokenizer import tokenize
from utils import InputError

from .CoOp import CONTEXTS, PromptLearner
from .prompt_pass import PromptPass
from .states import STATES, TEMPLATES, fixed_sentences, state_phrases

LEARNABLE = {"fix": (), "learnable_abnormal": ("abnormal",), "learnable_all": ("abnormal", "normal")}  # drawn in order


def fixed_feature(clip: CLIP, kind: str, name: str, states: Mapping[str, Sequence[str]] = STATES) -> Tensor:
    """The text feature of the fixed sentences: (D,), of norm 1; each sentence is normalised before the mean."""
    ids = tokenize(fixed_sentences(kind, name, states)).to(clip.device)
    return F.normalize(F.normalize(clip.encode_text(ids), dim=-1).mean(dim=0), dim=0)


def check_length(name: str, states: Mapping[str, Sequence[str]]) -> None:
    """Raise `InputError` for the first phrase that is too long for 77 tokens in a template or with contexts."""
    longest = max(TEMPLATES, key=len)
    phrases = [phrase for kind in states for phrase in state_phrases(kind, name, states)]
    try:
        tokenize([text for phrase in phrases for text in (longest.format(phrase), f"{'X ' * CONTEXTS}{phrase}.")])
    except RuntimeError as error:
        raise InputError(f"--prompt_name or --prompts: {error}") from error


class PromptChooser(nn.Module):
    """The text features (D, 2) of a data set, as columns [normal, abnormal].

    `clip` provides the frozen text tower; it is not a submodule, so it is neither trained nor saved. `name` is what the
    prompts call the object (`retinal OCT`), `text_mood` is one of `TEXT_MOODS`, `states` are phrases that replace the
    published ones, see `read_prompts`. `causal` applies CLIP's causal mask to learnable prompts (`corrected` fidelity).
    `generator` draws the contexts. Raises `InputError` if a name or phrase is too long for CLIP's 77 tokens.
    """

    def __init__(
        self,
        clip: CLIP,
        name: str,
        text_mood: str,
        causal: bool = False,
        states: Mapping[str, Sequence[str]] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        learnable, states = LEARNABLE[text_mood], states or STATES
        check_length(name, states)
        self._clip = [clip]  # in a list: hidden from nn.Module
        learners = [PromptLearner(clip.text, kind, state_phrases(kind, name, states), generator) for kind in learnable]
        self.prompt_learners = nn.ModuleDict(dict(zip(learnable, learners, strict=True)))
        # The fixed columns are encoded once, here, in float32, even if a later step runs under autocast.
        self.fixed = {kind: fixed_feature(clip, kind, name, states) for kind in STATES if kind not in learnable}
        if learners:
            parts = [(*learner(), learner.context_positions) for learner in learners]
            embeddings, eot, contexts = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            self.encode = PromptPass(clip.text, embeddings, contexts, eot, causal)

    def prompt_embeddings(self) -> dict[str, Tensor]:
        """Text embeddings of the learnable prompts, kind -> (3 S, D) for S states, not normalised; one pass for all."""
        if not self.prompt_learners:
            return {}
        parts = [learner()[0] for learner in self.prompt_learners.values()]  # (3 S, 77, W) per kind
        encoded = self.encode(torch.cat(parts))
        return dict(zip(self.prompt_learners, encoded.split([len(part) for part in parts]), strict=True))

    def forward(self) -> Tensor:
        """The text features (D, 2), each column of norm 1; differentiable with respect to the contexts only."""
        columns = dict(self.fixed)
        for kind, embeddings in self.prompt_embeddings().items():
            columns[kind] = F.normalize(embeddings.mean(dim=0), dim=0)
        return torch.stack([columns["normal"], columns["abnormal"]], dim=1)


def text_similarity(text_features: Tensor) -> float:
    """Cosine of the normal and the abnormal text feature: (D, 2) -> [-1, 1]."""
    normal, abnormal = text_features.detach().double().unbind(-1)
    return float(F.cosine_similarity(normal, abnormal, dim=0))
