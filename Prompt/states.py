"""What the prompts say: state phrases, templates, and the sentences that they make. Nothing here imports torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils import InputError, read_text

TEXT_MOODS = ("fix", "learnable_all", "learnable_abnormal")

# {} is the object's name. ' disease {}' has its leading blank in the published list.
STATES = {
    "normal": (
        "{}", "flawless {}", "perfect {}", "unblemished {}", "{} without flaw", "{} without defect",
        "{} without damage",
    ),
    "abnormal": (
        "damaged {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage", " disease {}", "abnormal {}",
    ),
}  # fmt: skip
MAX_PHRASES = 100  # of a kind: in 35 templates each they pass the text tower, and learnable ones in every step
MAX_CHARACTERS = 500  # characters of a phrase: far more than fit into 77 tokens, and soon read
TEMPLATES = tuple((Path(__file__).parent / "templates.txt").read_text().splitlines())


def read_prompts(path: str) -> dict[str, list[str]]:
    """State phrases from a JSON file {"normal": [...], "abnormal": [...]}, {} in each for the object's name.

    `InputError` for an unreadable file, another form, or a phrase without exactly one {}.
    """
    try:
        states = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--prompts {path}: cannot be read as JSON ({error})") from error
    if fault := states_fault(states):
        raise InputError(f"--prompts {path}: {fault}")
    return dict(states)


def states_fault(states: object) -> str | None:
    """What is wrong with state phrases that a file holds; None for nothing."""
    if not isinstance(states, dict) or set(states) != set(STATES):
        return 'expected {"normal": [phrases], "abnormal": [phrases]}'
    for kind, phrases in states.items():
        if not isinstance(phrases, list) or not phrases:
            return f"{kind} must be a list of at least one phrase"
        if len(phrases) > MAX_PHRASES:
            return f"{kind} has {len(phrases)} phrases, more than {MAX_PHRASES}"
        for phrase in phrases:
            if not isinstance(phrase, str) or phrase.count("{}") != 1 or set("{}") & set(phrase.replace("{}", "")):
                return f"{kind} phrase {phrase!r:.80} needs {{}} once, for the object's name"
            if len(phrase) > MAX_CHARACTERS:
                return f"{kind} phrase {phrase!r:.80}... is longer than {MAX_CHARACTERS} characters"
    return None


def state_phrases(kind: str, name: str, states: Mapping[str, Sequence[str]] = STATES) -> list[str]:
    """The states of `normal` or `abnormal` (7 each by default) with the object's name filled in."""
    return [state.format(name) for state in states[kind]]


def fixed_sentences(kind: str, name: str, states: Mapping[str, Sequence[str]] = STATES) -> list[str]:
    """Every state in every template: by default 7 x 35 = 245 sentences, state by state."""
    return [template.format(phrase) for phrase in state_phrases(kind, name, states) for template in TEMPLATES]
