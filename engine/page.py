"""The report page: one HTML file with the numbers, the figures and a gallery of the images, and nothing from a network.

A heat map is kept as HEAT x HEAT bytes between its own lowest and highest value, and the browser colours it: so all
maps share one scale, which is known only after the last image, and no whole map is kept.
"""

from __future__ import annotations

import base64
import bisect
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dataset import Sample, load_image, load_mask
from utils import atomic_path, prefetch

from .detector import Settings
from .evaluate import Evaluation
from .plots import Drawing, encode
from .report import INFERNO, OUTLINE, digits, draw_figures, outline, threshold_of

THUMB = 192  # pixels a side
QUALITIES = (75, 30, 15)  # of WebP: the first that takes no more than THUMB_CHARS; only noise comes to the last
THUMB_CHARS = 19_000  # base64
HEAT = 48
KEPT = 2000  # images: bounds memory, and the page to 50 MB
WORKERS = 4  # threads that draw thumbnails
TEMPLATE = Path(__file__).with_name("page.html")
NAMES = {
    "auc": "Image AUROC",
    "pauc": "Pixel AUROC",
    "ap": "Image average precision",
    "f1_max": "Image F1-max",
    "pixel_ap": "Pixel average precision",
    "pixel_f1_max": "Pixel F1-max",
    "pixel_threshold": "Pixel threshold (F1-max)",
    "aupro": "AUPRO (up to 30% false positives)",
}
SELECTED = {
    "test": "the best of the run on {obj}'s test set (--select test, the published protocol)",
    "valid": "the best of the run on images of valid/ that are no shots (--select valid)",
    "last": "the last of the run (--select last)",
}


@dataclass(frozen=True)
class Card:
    """What the gallery shows of an image; pictures are base64."""

    file: str
    label: int
    score: float
    image: str
    outline: str | None  # PNG, transparent but for the mask's edge
    heat: str | None  # (HEAT, HEAT) bytes: 0 stands for `low`, 255 for `high`
    low: float
    high: float


class Report:
    """Collects thumbnails while an evaluation runs (`evaluate(..., full=True, on_batch=report)`), then writes the page.

    Memory: some 12 kB an image, for the KEPT images with the highest and the lowest scores of each class.

    Args:
        settings: of the checkpoint.
        obj: the data set that is tested, where it is not the one trained on.
    """

    def __init__(self, settings: Settings, obj: str = "") -> None:
        self.settings = settings
        self.obj = obj or settings.obj
        self.cards: tuple[list[Card], list[Card]] = ([], [])  # normal, abnormal; in ascending order of score
        self.scale: tuple[float, float] | None = None  # lowest and highest pixel of all maps

    def __call__(self, batch: Sequence[Sample], scores: Tensor, maps: Tensor | None) -> None:
        """Keep small pictures of a batch: scores (B,), maps (B, S, S) or None."""
        heats: Iterable[tuple[str | None, float, float]] = [(None, 0.0, 0.0)] * len(batch)
        if maps is not None:
            low, high = self.scale or (np.inf, -np.inf)
            self.scale = min(low, float(maps.min())), max(high, float(maps.max()))
            heats = map(_heat, F.adaptive_avg_pool2d(maps.float(), HEAT).cpu().numpy())
        pictures = prefetch(_pictures, batch, WORKERS)
        for sample, score, picture, heat in zip(batch, scores.tolist(), pictures, heats, strict=True):
            cards = self.cards[sample.label]
            bisect.insort(cards, Card(sample.name, sample.label, score, *picture, *heat), key=lambda card: card.score)
            if sum(map(len, self.cards)) > KEPT:
                larger = max(self.cards, key=len)
                del larger[len(larger) // 2]  # neither among the highest nor among the lowest

    def save(
        self,
        folder: str | Path,
        found: Evaluation,
        about: dict[str, Any],
        history: Sequence[dict[str, Any]] = (),
    ) -> Path:
        """Write index.html.

        Args:
            folder: made if need be.
            found: of `evaluate(..., full=True)`.
            about: how the checkpoint was made, as stored in it: `select`, `metrics.epoch` and `threshold` are used.
            history: the run's epochs, see `read_history`.

        Returns:
            The page's path; `InputError` where it cannot be written.
        """
        page = Path(folder) / "index.html"
        with atomic_path(page) as temporary:  # a file's name may hold bytes that are no UTF-8
            temporary.write_text(self.html(found, about, history), encoding="utf-8", errors="backslashreplace")
        return page

    def html(self, found: Evaluation, about: dict[str, Any], history: Sequence[dict[str, Any]] = ()) -> str:
        """The page; for the arguments see `save`."""
        cards = [card for cards in self.cards for card in cards]
        figures = {name: _figure(drawing) for name, drawing in draw_figures(found, about, history).items()}
        threshold, origin = threshold_of(found, about)
        decimals = digits(found.scores)
        settings = self.settings.to_dict()
        flags = {name: value for name, value in about.get("options", {}).items() if name not in settings}
        data = {
            "threshold": threshold,
            "digits": decimals,
            "range": [min(float(found.scores.min()), threshold), max(float(found.scores.max()), threshold)],
            "scale": self.scale,
            "colours": INFERNO.tolist(),
            "heat": HEAT,
            "cards": [astuple(card) for card in cards],
        }
        anchors = ", ".join(f"rgb{tuple(anchor)}" for anchor in INFERNO.tolist())
        low, high = self.scale or (0.0, 0.0)
        parts = {
            "obj": escape(self.obj),
            "lead": self._lead(found, about),
            "numbers": _numbers(found),
            "threshold": f"{threshold:.{decimals}f}, {escape(origin)}",
            "confusion": _confusion(found, threshold),
            "histogram": figures.pop("histogram"),
            "figures": "\n".join(figures.values()),
            "kept": _kept(len(cards), len(found.files)),
            "maps": "maps" if self.scale else "plain",
            "gradient": f"linear-gradient(to right, {anchors})",
            "low": f"{low:.3f}",
            "high": f"{high:.3f}",
            "settings": _rows({**settings, **about, "options": flags}),
            "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        }
        return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))

    def _lead(self, found: Evaluation, about: dict[str, Any]) -> str:
        """What was tested, and how the epoch was selected."""
        abnormal, trained_on = int(found.labels.sum()), self.settings.obj
        select, epoch = about.get("select", "unknown"), about.get("metrics", {}).get("epoch", "unknown")
        sentences = [f"{len(found.labels):,} images: {len(found.labels) - abnormal:,} normal, {abnormal:,} abnormal."]
        if trained_on != self.obj:
            sentences.append(f"The model was trained on {trained_on}; curves over epochs come from there.")
        way = SELECTED[select].format(obj=trained_on) if select in SELECTED else f"selected by: {select}"
        optimistic = ", so these numbers are optimistic" if select == "test" and trained_on == self.obj else ""
        sentences.append(f"Epoch {epoch}: {way}{optimistic}.")
        if self.settings.pretrain == "random":
            sentences.append("CLIP's weights are random, not pre-trained: the numbers show only that the program runs.")
        return re.sub(r"--\w+ \w+", r"<code>\g<0></code>", escape(" ".join(sentences)))


def _pictures(sample: Sample) -> tuple[str, str | None]:
    """Thumbnail and outline of an image."""
    pixels = (load_image(sample.path, THUMB).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    for quality in QUALITIES:
        image = encode(Image.fromarray(pixels), "WEBP", quality=quality)
        if len(image) <= THUMB_CHARS:
            break
    if sample.mask is None:
        return image, None
    edge = Image.fromarray(outline(load_mask(sample, THUMB).numpy(), 2).astype(np.uint8))
    edge.putpalette([0, 0, 0, *OUTLINE])
    return image, encode(edge, "PNG", transparency=0, bits=1)


def _heat(heat: np.ndarray) -> tuple[str, float, float]:
    """A small map as bytes, and what 0 and 255 stand for."""
    low, high = float(heat.min()), float(heat.max())
    levels = ((heat - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)
    return base64.b64encode(levels.tobytes()).decode(), low, high


def _numbers(found: Evaluation) -> str:
    """Every number with its 95% interval where there is one; the two AUROCs come first."""
    values = {"auc": found.auc, "pauc": found.pauc, **found.more}
    cells = []
    for name, value in values.items():
        if name == "threshold" or not isinstance(value, (int, float)):
            continue  # said elsewhere, an interval, or no pixel metrics
        interval = values.get(f"{name}_ci95")
        between = f"<small>95% CI {interval[0]:.3f} to {interval[1]:.3f}</small>" if interval else ""
        main = ' class="main"' if name in ("auc", "pauc") else ""
        cells.append(f"<div{main}><dt>{escape(NAMES.get(name, name))}</dt><dd>{value:.3f}{between}</dd></div>")
    return "\n".join(cells)


def _confusion(found: Evaluation, threshold: float) -> str:
    """Counts at the threshold, which lead to the images."""
    rows = []
    for truth, name, right_name, wrong_name, kind, rate in (
        (1, "abnormal", "true positive", "false negative", "fn", "sensitivity"),
        (0, "normal", "true negative", "false positive", "fp", "specificity"),
    ):
        says = found.scores[found.labels == truth] >= threshold
        right, wrong = int((says == truth).sum()), int((says != truth).sum())
        rows.append(
            f'<tr><th scope="row">{name}</th><td>{right:,} {right_name}</td>'
            f'<td><a href="#filter={kind}">{wrong:,} {wrong_name}</a></td><td>{rate} {right / len(says):.3f}</td></tr>'
        )
    return "\n".join(rows)


def _kept(shown: int, total: int) -> str:
    """Says it where not every image is in the gallery."""
    if shown == total:
        return ""
    return (
        f"The gallery holds {shown:,} of {total:,} images: the highest and the lowest scores of each class. "
        "All images count in the numbers and figures."
    )


def _figure(drawing: Drawing) -> str:
    return f'<figure class="plot"><figcaption>{escape(drawing.title)}</figcaption>{drawing.svg()}</figure>'


def _rows(values: dict[str, Any], prefix: str = "") -> str:
    """Nested values as rows of a definition list."""
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows.append(_rows(value, f"{prefix}{name}."))
        elif value is not None:
            words = " ".join(map(_word, value if isinstance(value, (list, tuple)) else [value]))
            rows.append(f"<div><dt>{escape(prefix + str(name))}</dt><dd>{escape(words)}</dd></div>")
    return "\n".join(rows)


def _word(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
