"""The report page: one HTML file with the numbers, a gallery of the images and the figures, and nothing from a network.

A heat map is kept as HEAT x HEAT bytes between its own lowest and highest value, and the browser colours it: so all
maps share one scale, which is known only after the last image, and no whole map is kept.
"""

from __future__ import annotations

import base64
import bisect
import json
import math
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import precision_recall_curve, roc_curve
from torch import Tensor

from dataset import Sample, load_image, load_mask
from utils import InputError, atomic_path

from .detector import Settings
from .evaluate import Evaluation
from .plots import Drawing, Series, encode, histogram, plot
from .report import INFERNO, OUTLINE, Sheet, outline

THUMB = 192  # pixels a side
HEAT = 48
KEPT = 1000  # images with the highest, and as many with the lowest scores of each class: bounds memory and page
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
    "test": "the best of the run on {obj}'s test set itself (--select test, the published protocol), so its numbers "
    "there are optimistic",
    "valid": "the best of the run on images of valid/ that are no shots (--select valid)",
    "last": "the last of the run (--select last)",
}


# Figures of a run: title, y label, and for each curve its key in the history, name, colour, dashed.
RUN_CURVES = {
    "auc": ("AUROC over the run", "AUROC", [
        ("auc", "image", "accent", False), ("pauc", "pixel", "ink", False),
        ("valid_auc", "image, valid", "accent", True), ("valid_pauc", "pixel, valid", "ink", True),
    ]),
    "losses": ("Losses over the run", "loss", [
        ("total", "total", "accent", False), ("det", "detection", "ink", False), ("seg", "segmentation", "ink", True),
    ]),
    "similarity": ("Similarity of the two text features", "cosine", [
        ("similarity", "normal and abnormal prompt", "accent", False),
    ]),
}  # fmt: skip


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

    Memory: some 12 kB an image, for at most 4 * KEPT images.

    Args:
        samples: what will be evaluated.
        settings: of the checkpoint.
    """

    def __init__(self, samples: Sequence[Sample], settings: Settings) -> None:
        self.settings = settings
        self.sheet = Sheet(samples, settings.img_size)
        self.cards: tuple[list[Card], list[Card]] = ([], [])  # normal, abnormal; in ascending order of score
        self.scale: tuple[float, float] | None = None  # lowest and highest pixel of all maps

    def __call__(self, batch: Sequence[Sample], scores: Tensor, maps: Tensor | None) -> None:
        """Keep small pictures of a batch."""
        self.sheet(batch, scores, maps)
        heats: Iterable[tuple[str | None, float, float]] = [(None, 0.0, 0.0)] * len(batch)
        if maps is not None:
            low, high = self.scale or (np.inf, -np.inf)
            self.scale = min(low, float(maps.min())), max(high, float(maps.max()))
            heats = map(_heat, F.adaptive_avg_pool2d(maps.float(), HEAT).cpu().numpy())
        with ThreadPoolExecutor() as pool:
            pictures = pool.map(_pictures, batch)
            for sample, score, picture, heat in zip(batch, scores.tolist(), pictures, heats, strict=True):
                cards = self.cards[sample.label]
                bisect.insort(cards, Card(sample.name, sample.label, score, *picture, *heat), key=lambda c: c.score)
                if len(cards) > 2 * KEPT:
                    del cards[KEPT]  # the middle: neither among the highest nor among the lowest

    def save(
        self,
        folder: str | Path,
        found: Evaluation,
        about: dict[str, Any],
        history: Sequence[dict[str, Any]] | None = None,
    ) -> Path:
        """Write index.html and figures/*.svg, *.png.

        Args:
            folder: made if need be.
            found: of `evaluate(..., full=True)`.
            about: how the checkpoint was made, as stored in it; `metrics.epoch` and `select` stand at the head.
            history: the run's epochs, see `read_history`.

        Returns:
            The page's path.
        """
        folder = Path(folder)
        drawings = figures(found, history or [], about.get("metrics", {}).get("epoch"))
        for name, (title, drawing) in drawings.items():
            drawing.save(folder / "figures" / name, title)
        self.sheet.draw().save(folder / "figures" / "images", "Images, mask outlines and heat maps", scale=2)
        page = folder / "index.html"
        with atomic_path(page) as temporary:
            temporary.write_text(self.html(found, about, drawings), encoding="utf-8")
        return page

    def html(self, found: Evaluation, about: dict[str, Any], drawings: dict[str, tuple[str, Drawing]]) -> str:
        """The page."""
        cards = [card for cards in self.cards for card in cards]
        digits = _digits(found.scores)
        settings = self.settings.to_dict()
        flags = {name: value for name, value in about.get("options", {}).items() if name not in settings}
        data = {
            "threshold": found.more["threshold"],
            "digits": digits,
            "range": [float(found.scores.min()), float(found.scores.max())],
            "scale": self.scale,
            "colours": INFERNO.tolist(),
            "heat": HEAT,
            "cards": [astuple(card) for card in cards],
        }
        bare = {name: _figure(title, drawing) for name, (title, drawing) in drawings.items()}
        colours = ", ".join(f"rgb{tuple(anchor)}" for anchor in INFERNO.tolist())
        parts = {
            "obj": escape(self.settings.obj),
            "lead": _lead(self.settings, found, about),
            "numbers": _numbers(found),
            "threshold": f"{found.more['threshold']:.{digits}f}",
            "confusion": _confusion(found),
            "scores": bare.pop("scores"),
            "figures": "\n".join(bare.values()),
            "kept": _kept(len(cards), len(found.files)),
            "maps": "maps" if self.scale else "plain",
            "gradient": f"linear-gradient(to right, {colours})",
            "low": f"{self.scale[0]:.3f}" if self.scale else "",
            "high": f"{self.scale[1]:.3f}" if self.scale else "",
            "settings": _table({**settings, **about, "options": flags}),
            "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        }
        return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """The epochs of a run from its metrics.jsonl: one JSON object a line, `epoch` counted from 1.

    Raises:
        InputError: a file that cannot be read, a line that is no such object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a run's history ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["epoch"] = int(row["epoch"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}, line {number}: not the JSON of an epoch; is it a run's metrics.jsonl?"
            ) from error
        rows.append(row)
    return rows


def figures(found: Evaluation, history: Sequence[dict[str, Any]], epoch: int | None) -> dict[str, tuple[str, Drawing]]:
    """Name -> (title, drawing): scores, roc, pr, and with a history auc and losses; `epoch` is marked in these."""
    threshold = found.more["threshold"]
    groups = [
        ("normal", found.scores[found.labels == 0], "ink"),
        ("abnormal", found.scores[found.labels == 1], "accent"),
    ]
    drawings = {
        "scores": (
            "Image scores by class",
            histogram(groups, "image score", [(threshold, f"threshold {threshold:.{_digits(found.scores)}f}")]),
        ),
        "roc": ("ROC curves", _roc(found)),
        "pr": ("Precision and recall", _precision_recall(found)),
    }
    marks = [(float(epoch), f"epoch {epoch}")] if epoch else []
    for name, (title, label, keys) in RUN_CURVES.items():
        series = [_history_series(history, *key) for key in keys]
        series = [s for s in series if len(s.x)]
        if series:
            values = [y for s in series for y in s.y]
            limits = (1, max(row["epoch"] for row in history))
            low, high = min(values), max(values)
            room = (low, high + 0.12 * (high - low))  # above the curves, for the mark's words
            drawings[name] = (title, plot(series, "epoch", label, limits, room, marks, x_step=1))
    return drawings


def _history_series(history: Sequence[dict[str, Any]], key: str, name: str, colour: str, dashed: bool) -> Series:
    rows = [(row["epoch"], row[key]) for row in history if isinstance(row.get(key), (int, float))]
    rows = [(epoch, value) for epoch, value in rows if math.isfinite(value)]
    return Series(name, [epoch for epoch, _ in rows], [value for _, value in rows], colour, dashed)


def _roc(found: Evaluation) -> Drawing:
    fpr, tpr, _ = roc_curve(found.labels, found.scores)
    series = [Series("", [0, 1], [0, 1], "grid"), Series(f"image ({found.auc:.3f})", fpr, tpr)]
    if "roc" in found.curves:
        series.insert(1, Series(f"pixel ({found.pauc:.3f})", *found.curves["roc"], "ink"))
    return plot(series, "false positive rate", "true positive rate", (0, 1), (0, 1))


def _precision_recall(found: Evaluation) -> Drawing:
    precision, recall, _ = precision_recall_curve(found.labels, found.scores, drop_intermediate=True)
    series = [Series(f"image (AP {found.more['ap']:.3f})", recall, precision)]
    if "pr" in found.curves:
        series.insert(0, Series(f"pixel (AP {found.more['pixel_ap']:.3f})", *found.curves["pr"], "ink"))
    return plot(series, "recall", "precision", (0, 1), (0, 1))


def _pictures(sample: Sample) -> tuple[str, str | None]:
    """Thumbnail and outline of an image."""
    pixels = (load_image(sample.path, THUMB).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    image = encode(Image.fromarray(pixels), "WEBP", quality=75)
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


def _lead(settings: Settings, found: Evaluation, about: dict[str, Any]) -> str:
    """What was tested, and how the epoch was selected."""
    abnormal = int(found.labels.sum())
    select, epoch = about.get("select", "unknown"), about.get("metrics", {}).get("epoch")
    way = SELECTED.get(select, "{select}").format(obj=settings.obj, select=f"selected: {select}")
    sentences = [
        f"{len(found.labels):,} images: {len(found.labels) - abnormal:,} normal, {abnormal:,} abnormal.",
        f"Epoch {epoch or 'unknown'}: {way}.",
    ]
    if settings.pretrain == "random":
        sentences.append("CLIP's weights are random, not pre-trained: the numbers show only that the program runs.")
    return re.sub(r"--\w+ \w+", r"<code>\g<0></code>", escape(" ".join(sentences)))


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


def _confusion(found: Evaluation) -> str:
    """Counts at the threshold, which lead to the images."""
    says = found.scores >= found.more["threshold"]
    rows = []
    for truth, name in ((1, "abnormal"), (0, "normal")):
        of_class = found.labels == truth
        right = int((of_class & (says == truth)).sum())
        wrong = int(of_class.sum()) - right
        kind, yes, no, share = (
            ("fn", "true positive", "false negative", "sensitivity")
            if truth
            else ("fp", "true negative", "false positive", "specificity")
        )
        rows.append(
            f'<tr><th scope="row">{name}</th><td>{right:,} {yes}</td><td><a href="#show={kind}">{wrong:,} {no}</a></td>'
            f"<td>{share} {right / (right + wrong):.3f}</td></tr>"
        )
    return "\n".join(rows)


def _digits(scores: np.ndarray) -> int:
    """Decimals that tell scores apart: early in training all of them lie near K/2."""
    spread = float(scores.max() - scores.min())
    return min(max(3, 3 - math.floor(math.log10(spread))), 9) if spread else 3


def _kept(shown: int, total: int) -> str:
    """Says it where not every image is in the gallery."""
    if shown == total:
        return ""
    return (
        f"The gallery holds {shown:,} of {total:,} images: the {KEPT:,} highest and the {KEPT:,} lowest scores of each "
        "class. All images count in the numbers and figures."
    )


def _figure(title: str, drawing: Drawing) -> str:
    return f'<figure class="plot"><figcaption>{escape(title)}</figcaption>{drawing.svg(title)}</figure>'


def _table(values: dict[str, Any], prefix: str = "") -> str:
    """Nested values as rows of a definition list."""
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows.append(_table(value, f"{prefix}{name}."))
        elif value is not None:
            words = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            rows.append(f"<div><dt>{escape(prefix + str(name))}</dt><dd>{escape(words)}</dd></div>")
    return "\n".join(rows)
