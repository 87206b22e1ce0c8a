"""The model card of a checkpoint, in Markdown: what it was trained on, what it reaches, and what nobody has tested.

The text is card.md.jinja: `s` are the settings, `m` the metadata, `f` the test set's figures, `t` the threshold. What a
checkpoint does not say, is said to be not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from .files.config import SELECTS, Settings
from .metrics import METRICS

ORIGINS = {True: "the paper's own images", False: "own images"}


def card(settings: Settings, metadata: Mapping[str, Any]) -> str:
    """The card's text."""
    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    page = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    metrics = [(name, words) for name, (words, _) in METRICS.items() if not name.endswith("_on_test")]
    figures = metadata.get("figures") or metadata.get("metrics") or {}
    return page.render(s=settings, m=metadata, f=figures, t=metadata.get("threshold"), metrics=metrics,
                       origins=ORIGINS, selects=SELECTS)  # fmt: skip
