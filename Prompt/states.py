"""The texts of the prompts: state phrases, templates, and the sentences made of them. Nothing here imports torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils import EXPECTED, blame, read_text

TEXT_MOODS = ("fix", "learnable_all", "learnable_abnormal")

# {} is the object's name. The leading blank of ' disease {}' is in the published list.
STATES = {
    "normal": (
        "{}", "flawless {}", "perfect {}", "unblemished {}", "{} without flaw", "{} without defect",
        "{} without damage",
    ),
    "abnormal": (
        "damaged {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage", " disease {}", "abnormal {}",
    ),
}  # fmt: skip
MAX_PHRASES = 100  # per kind: the text tower encodes each in 35 templates, or, if learnable, in every step
MAX_CHARACTERS = 500  # per phrase: far more than fit into 77 tokens, and still fast to read
TEMPLATES = tuple((Path(__file__).parent / "templates.txt").read_text().splitlines())


def read_prompts(path: str) -> dict[str, list[str]]:
    """State phrases from a JSON file {"normal": [...], "abnormal": [...]}, with {} for the object's name in each.

    Raises `InputError` for an unreadable file, another form, or a phrase that is too long or has not exactly one {}.
    """
    with blame(f"--prompts {path}", "docs/data.md shows the form", (*EXPECTED, AttributeError, TypeError)):
        states: dict[str, list[str]] = json.loads(read_text(path))
        if states.keys() != STATES.keys():
            raise ValueError(f"expected the keys {' and '.join(STATES)}")
        for kind, phrases in states.items():
            if not isinstance(phrases, list) or not 1 <= len(phrases) <= MAX_PHRASES:
                raise ValueError(f"{kind} must be a list of 1 to {MAX_PHRASES} phrases")
            for phrase in phrases:
                if phrase.count("{}") != 1 or set("{}") & set(phrase.replace("{}", "")) or len(phrase) > MAX_CHARACTERS:
                    words = f"{{}} once, for the object's name, and at most {MAX_CHARACTERS} characters"
                    raise ValueError(f"{kind} phrase {phrase!r:.80} needs {words}")
    return states


def state_phrases(kind: str, name: str, states: Mapping[str, Sequence[str]] = STATES) -> list[str]:
    """The states of `normal` or `abnormal` (7 each by default) with the object's name filled in."""
    return [state.format(name) for state in states[kind]]


def fixed_sentences(kind: str, name: str, states: Mapping[str, Sequence[str]] = STATES) -> list[str]:
    """Every state in every template: by default 7 x 35 = 245 sentences, state by state."""
    return [template.format(phrase) for phrase in state_phrases(kind, name, states) for template in TEMPLATES]
