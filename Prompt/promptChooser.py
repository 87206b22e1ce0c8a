"""Text features of the two classes: fixed sentences, learnable contexts, or one of each (--text_mood)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from CLIP.model import CLIP, PromptPass
from CLIP.tokenizer import tokenize
from utils import InputError, read_text

from .CoOp import CONTEXTS, PromptLearner

TEXT_MOODS = ("fix", "learnable_all", "learnable_abnormal")

# {} is the object's name. ' disease {}' has its leading blank in the published list.
NORMAL_STATES = (
    "{}",
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damage",
)
ABNORMAL_STATES = (
    "damaged {}",
    "broken {}",
    "{} with flaw",
    "{} with defect",
    "{} with damage",
    " disease {}",
    "abnormal {}",
)
LONGEST = 500  # characters of a phrase: far more than fit into 77 tokens, and soon read
STATES = {"normal": NORMAL_STATES, "abnormal": ABNORMAL_STATES}
TEMPLATES = tuple((Path(__file__).parent / "templates.txt").read_text().splitlines())


def read_prompts(path: str) -> dict[str, list[str]]:
    """State phrases from a JSON file {"normal": [...], "abnormal": [...]}, {} in each for the object's name.

    Raises:
        InputError: unreadable file, another form, or a phrase without exactly one {}.
    """
    try:
        states = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--prompts {path}: cannot be read as JSON ({error})") from error
    if fault := states_fault(states):
        raise InputError(f"--prompts {path}: {fault}")
    return states


def states_fault(states: object) -> str | None:
    """What is wrong with state phrases that a file holds; None for nothing."""
    if not isinstance(states, dict) or set(states) != set(STATES):
        return 'expected {"normal": [phrases], "abnormal": [phrases]}'
    for kind, phrases in states.items():
        if not isinstance(phrases, list) or not phrases:
            return f"{kind} must be a list of at least one phrase"
        for phrase in phrases:
            if not isinstance(phrase, str) or phrase.count("{}") != 1 or set("{}") & set(phrase.replace("{}", "")):
                return f"{kind} phrase {phrase!r:.80} needs {{}} once, for the object's name"
            if len(phrase) > LONGEST:
                return f"{kind} phrase {phrase!r:.80}... is longer than {LONGEST} characters"
    return None


def state_phrases(kind: str, name: str, states: Mapping[str, Sequence[str]] = STATES) -> list[str]:
    """The states of `normal` or `abnormal` (7 each by default) with the object's name filled in."""
    return [state.format(name) for state in states[kind]]


def fixed_sentences(kind: str, name: str, states: Mapping[str, Sequence[str]] = STATES) -> list[str]:
    """Every state in every template: by default 7 x 35 = 245 sentences, state by state."""
    return [template.format(phrase) for phrase in state_phrases(kind, name, states) for template in TEMPLATES]


def fixed_feature(clip: CLIP, kind: str, name: str, states: Mapping[str, Sequence[str]] = STATES) -> Tensor:
    """The ensemble of the fixed sentences: (D,), of norm 1; each sentence is normalised before the mean."""
    ids = tokenize(fixed_sentences(kind, name, states)).to(clip.device)
    return F.normalize(F.normalize(clip.encode_text(ids), dim=-1).mean(dim=0), dim=0)


def check_length(name: str, states: Mapping[str, Sequence[str]]) -> None:
    """`InputError` for the first sentence that does not fit into CLIP's 77 tokens, with templates or contexts."""
    longest = max(TEMPLATES, key=len)
    phrases = [phrase for kind in states for phrase in state_phrases(kind, name, states)]
    try:
        tokenize([text for phrase in phrases for text in (longest.format(phrase), f"{'X ' * CONTEXTS}{phrase}.")])
    except RuntimeError as error:
        raise InputError(f"--prompt_name or --prompts: {error}") from error


class PromptChooser(nn.Module):
    """The text features (D, 2) of a data set, as columns [normal, abnormal].

    Args:
        clip: gives the frozen text tower; it is not registered, so it is neither trained nor saved.
        name: what the prompts call the object, for example `retinal OCT`.
        text_mood: one of `TEXT_MOODS`.
        causal: pass learnable prompts under CLIP's causal mask (`corrected` fidelity).
        states: state phrases to use instead of the published ones, see `read_prompts`.

    Raises:
        InputError: a name or phrase that is too long for CLIP's 77 tokens.
    """

    def __init__(
        self,
        clip: CLIP,
        name: str,
        text_mood: str,
        causal: bool = False,
        states: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        learnable = {"fix": (), "learnable_abnormal": ("abnormal",), "learnable_all": ("abnormal", "normal")}[text_mood]
        states = states or STATES
        check_length(name, states)
        self._clip = [clip]  # in a list: hidden from nn.Module
        self.causal = causal
        # Contexts are drawn abnormal first, as published.
        self.makers = nn.ModuleDict(
            {kind: PromptLearner(clip.text, kind, state_phrases(kind, name, states)) for kind in learnable}
        )
        self.encode = self._prompt_pass() if self.makers else None
        # The columns that do not learn, encoded once, here: in float32 whatever autocast a later step runs under.
        self.fixed = {kind: fixed_feature(clip, kind, name, states) for kind in STATES if kind not in learnable}

    def _prompt_pass(self) -> PromptPass:
        parts = [(*maker(), maker.context_positions) for maker in self.makers.values()]
        embeddings, eot, contexts = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return PromptPass(self._clip[0].text, embeddings, contexts, eot, self.causal)

    def prompt_embeddings(self) -> dict[str, Tensor]:
        """Text embeddings of the single learnable prompts, kind -> (21, D), not normalised: one pass for both kinds."""
        if self.encode is None:
            return {}
        parts = [maker()[0] for maker in self.makers.values()]  # (21, 77, W) a kind
        encoded = self.encode(torch.cat(parts))
        return dict(zip(self.makers, encoded.split([len(part) for part in parts]), strict=True))

    def forward(self) -> Tensor:
        """(D, 2), each column of norm 1; differentiable in the contexts alone."""
        columns = dict(self.fixed)
        for kind, embeddings in self.prompt_embeddings().items():
            columns[kind] = F.normalize(embeddings.mean(dim=0), dim=0)
        return torch.stack([columns["normal"], columns["abnormal"]], dim=1)


def text_similarity(text_features: Tensor) -> float:
    """Cosine of the normal and the abnormal text feature: (D, 2) -> [-1, 1]."""
    normal, abnormal = text_features.detach().double().unbind(-1)
    return float(F.cosine_similarity(normal, abnormal, dim=0))
