"""The model card of a checkpoint, in Markdown: what it was trained on, what it reaches, and what nobody has tested."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils import atomic_path

from .files.config import SELECTS, Settings
from .metrics import METRICS

USE = """\
Research on few-shot anomaly detection. **Not a medical device**: no decision on a patient may rest on it. Input is one
image like those trained on; the score says how abnormal the whole image is, the heat map where."""


def write_card(path: str | Path, settings: Settings, metadata: Mapping[str, Any]) -> Path:
    """Write the card; `InputError` where that is impossible."""
    with atomic_path(path) as temporary:
        temporary.write_text(card(settings, metadata), encoding="utf-8")
    return Path(path)


def card(settings: Settings, metadata: Mapping[str, Any]) -> str:
    """The card's text: of what a checkpoint does not say, that it does not."""
    sections = {
        "Intended use": USE,
        "Trained on": _lines(_training(settings, metadata)),
        "Figures": _lines(_figures(settings, metadata)),
        "Threshold": _lines(_threshold(metadata)),
        "Not tested": _lines(_untested(settings)),
    }
    title = f"# MadCLIP for {settings.obj}: {settings.visionA} on {settings.model_name}, {settings.img_size} px\n\n"
    return title + "\n".join(f"## {name}\n\n{text}\n" for name, text in sections.items())


def _lines(lines: Iterator[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _training(settings: Settings, metadata: Mapping[str, Any]) -> Iterator[str]:
    own: str = {True: "the paper's own images", False: "own images"}.get(
        metadata.get("benchmark", ""), "origin not known"
    )
    yield f"Data set {settings.obj} ({own}), called {settings.prompt_name!r} in the prompts"
    shots = metadata.get("shots")
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in (shots or {}).items())
    yield f"Labelled images: {counts or 'not known'}; nothing else was trained on"
    yield f"CLIP weights: {settings.pretrain}, SHA-256 {settings.weights_sha256 or 'not known'}, frozen"
    moods = f"prompts {settings.text_mood}, loss {settings.loss_type}, decision {settings.dec_type}"
    yield f"Fidelity {settings.fidelity}, layers {' '.join(map(str, settings.features_list))}, {moods}"
    yield f"By MadCLIP {metadata.get('madclip', 'of a version not known')}, {metadata.get('written', 'time not known')}"


def _figures(settings: Settings, metadata: Mapping[str, Any]) -> Iterator[str]:
    figures = metadata.get("figures") or metadata.get("metrics") or {}
    if "n_normal" in figures:
        yield f"Test set of {settings.obj}: {figures['n_normal']} normal and {figures['n_abnormal']} abnormal images"
    for name, (words, _) in METRICS.items():
        if isinstance(value := figures.get(name), float) and not name.endswith("_on_test"):
            low, high = figures.get(f"{name}_ci95") or (None, None)
            yield f"{words}: {value:.4f}" + ("" if low is None else f" (95% interval {low:.4f} to {high:.4f})")
    select = metadata.get("select")
    how = f"{SELECTS[select]} (--select {select})" if select in SELECTS else "in a way that is not known"
    optimistic = ", so the figures are optimistic" if select == "test" else ""
    yield f"Epoch {metadata.get('metrics', {}).get('epoch', 'not known')}, chosen as the {how}{optimistic}"
    if settings.pretrain == "random":
        yield "The weights are random: the figures show only that the program runs"


def _threshold(metadata: Mapping[str, Any]) -> Iterator[str]:
    threshold = metadata.get("threshold")
    if not threshold:
        yield "None: set one on labelled images of your own, `predict.py --calibrate`"
        return
    counts = f"{threshold['figures']['n_normal']} normal and {threshold['figures']['n_abnormal']} abnormal"
    rule = f"{threshold['rule']} on {counts} {threshold['from']}"
    yield f"Abnormal is a score of at least {threshold['value']:.4f}: {rule}"
    if "pixel_value" in threshold:
        yield f"Of a pixel: {threshold['pixel_value']:.4f}"


def _untested(settings: Settings) -> Iterator[str]:
    yield "Other scanners, protocols, hospitals and patient groups than those of the data set"
    yield f"Other organs and kinds of images than {settings.obj}, and images without the preparation of that data set"
    yield "Findings that the test set does not show, and how often they are found by their size"
    if not settings.pixel_metrics:
        yield "Where anomalies are: there were no masks, so the heat map is a weak localisation"
