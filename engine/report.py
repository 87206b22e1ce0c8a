"""Figures: a sheet of test images beside their masks and heat maps, curves of an evaluation and of a run."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.metrics import precision_recall_curve, roc_curve
from torch import Tensor

from dataset import Sample, load_image, load_mask
from utils import InputError, read_text

from .evaluate import Evaluation
from .plots import Drawing, Picture, Series, Text, histogram, plot

OnBatch = Callable[[Sequence[Sample], Tensor, Tensor | None], None]

TILE = 120  # CSS pixels a side
GAP = 6
SIDE = 62  # what the rows are called, at the left
CAPTION = 34
LETTERS = 20  # of a file's name that fit above a tile
OUTLINE = (0, 229, 200)
# Anchors of the `inferno` colour map (matplotlib, CC0): bright is abnormal.
INFERNO = np.array([
    (0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51), (249, 140, 10),
    (249, 201, 50), (252, 255, 164),
])  # fmt: skip


def colours(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] of any shape (...) -> RGB (..., 3) uint8."""
    places = np.linspace(0, 1, len(INFERNO))
    return np.stack([np.interp(values, places, channel) for channel in INFERNO.T], axis=-1).round().astype(np.uint8)


def outline(mask: np.ndarray, width: int = 1) -> np.ndarray:
    """The pixels of a mask (S, S) bool that are within `width` of a pixel outside it."""
    inner = mask
    for _ in range(width):
        shifted = [np.roll(inner, shift, axis) for axis in (0, 1) for shift in (-1, 1)]
        inner = np.logical_and.reduce([inner, *shifted])
    return mask & ~inner


class Sheet:
    """Collects a handful of images while an evaluation runs (`evaluate(..., on_batch=sheet)`), then draws them.

    Args:
        samples: what will be evaluated; `count` of them are shown, evenly spaced over each class.
        img_size: pixels a side of the maps.
        count: columns of the sheet, two thirds of them abnormal.
    """

    def __init__(self, samples: Sequence[Sample], img_size: int, count: int = 9) -> None:
        normal = [sample.name for sample in samples if not sample.label]
        abnormal = [sample.name for sample in samples if sample.label]
        shown = (*_spread(abnormal, count - count // 3), *_spread(normal, count // 3))
        self.img_size = img_size
        self.rows: dict[str, tuple[Sample, float, np.ndarray | None] | None] = dict.fromkeys(shown)

    def __call__(self, batch: Sequence[Sample], scores: Tensor, maps: Tensor | None) -> None:
        """Keep what belongs to the sheet."""
        for i, sample in enumerate(batch):
            if sample.name in self.rows:
                heat = None if maps is None else maps[i].float().cpu().numpy()
                self.rows[sample.name] = (sample, float(scores[i]), heat)

    def draw(self) -> Drawing:
        """A column an image: the image, its mask's outline and its heat map, where there are any."""
        rows = [row for row in self.rows.values() if row is not None]
        maps = [heat for _, _, heat in rows if heat is not None]
        low, high = (float(min(m.min() for m in maps)), float(max(m.max() for m in maps))) if maps else (0.0, 1.0)
        masks = any(sample.mask for sample, _, _ in rows)
        names = ["image", *(["mask"] if masks else []), *(["heat map"] if maps else [])]
        width = SIDE + len(rows) * (TILE + GAP)
        height = CAPTION + len(names) * (TILE + GAP) + (GAP + 32 if maps else 0)
        sheet = Drawing("Images, mask outlines and heat maps", width, height)
        sheet.marks += [
            Text(0, CAPTION + line * (TILE + GAP) + TILE / 2, name, "muted") for line, name in enumerate(names)
        ]
        for column, (sample, score, heat) in enumerate(rows):
            x = SIDE + column * (TILE + GAP)
            label = "abnormal" if sample.label else "normal"
            stem = "".join(letter if letter.isprintable() else "?" for letter in Path(sample.name).stem)
            stem = stem if len(stem) <= LETTERS else f"...{stem[3 - LETTERS :]}"
            sheet.marks += [Text(x, 12, stem, "muted"), Text(x, 27, f"{label}, {score:.4f}")]
            pictures = self._pictures(sample, heat, low, high)
            for line, name in enumerate(names):
                picture = Image.fromarray(pictures[name])
                sheet.marks.append(Picture(x, CAPTION + line * (TILE + GAP), TILE, TILE, picture))
        if maps:
            bar = Image.fromarray(colours(np.linspace(0, 1, 512))[None])
            y = height - 32
            sheet.marks += [
                Picture(SIDE, y, width - SIDE - GAP, 10, bar),
                Text(SIDE, y + 24, f"{low:.4f}", "muted"),
                Text(
                    (SIDE + width - GAP) / 2, y + 24, "anomaly score of a pixel, one scale for all", "muted", "middle"
                ),
                Text(width - GAP, y + 24, f"{high:.4f}", "muted", "end"),
            ]
        return sheet

    def _pictures(self, sample: Sample, heat: np.ndarray | None, low: float, high: float) -> dict[str, np.ndarray]:
        image = (load_image(sample.path, self.img_size).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        pictures = {"image": image, "mask": image.copy()}
        if sample.mask:
            pictures["mask"][outline(load_mask(sample, self.img_size).numpy())] = OUTLINE
        if heat is not None:
            glow = colours((heat - low) / max(high - low, 1e-12))
            pictures["heat map"] = (0.45 * image + 0.55 * glow).astype(np.uint8)
        return pictures


def together(*collectors: OnBatch | None) -> OnBatch:
    """One `on_batch` for `evaluate` that calls each of the collectors that are there."""

    def collect(batch: Sequence[Sample], scores: Tensor, maps: Tensor | None) -> None:
        for collector in collectors:
            if collector is not None:
                collector(batch, scores, maps)

    return collect


# Figures of a run: title, y label, and for each curve its key in the history, name, colour, dashed.
RUN_FIGURES = {
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


def draw_figures(
    found: Evaluation, about: dict[str, Any], history: Sequence[dict[str, Any]] = ()
) -> dict[str, Drawing]:
    """The figures but for the sheet.

    Args:
        found: of `evaluate(..., full=True)`.
        about: how the checkpoint was made, as stored in it: its threshold and its epoch are marked.
        history: the run's epochs, see `read_history`.

    Returns:
        `histogram`, `roc`, `pr`, and of a history with two epochs or more what RUN_FIGURES names.
    """
    threshold, _ = threshold_of(found, about)
    groups = [
        ("normal", found.scores[found.labels == 0], "ink"),
        ("abnormal", found.scores[found.labels == 1], "accent"),
    ]
    mark = (threshold, f"threshold {threshold:.{digits(found.scores)}f}")
    drawings = {
        "histogram": histogram("Image scores by class", groups, "image score", [mark]),
        "roc": _roc(found),
        "pr": _precision_recall(found),
    }
    epoch = about.get("metrics", {}).get("epoch")
    marks = [(float(epoch), f"epoch {epoch}")] if epoch else []
    for name, (title, label, keys) in RUN_FIGURES.items():
        series = [_history_curve(history, *key) for key in keys]
        series = [curve for curve in series if len(curve.x) > 1 and any(curve.y)]  # seg is 0 without masks
        series = [curve for i, curve in enumerate(series) if all(curve.y != other.y for other in series[i + 1 :])]
        if series:
            values = [y for curve in series for y in curve.y]
            low, high = min(values), max(values)
            low = low if high > low else low - 0.5  # a level line: not above it, where no AUROC lies
            room = (low, high + 0.12 * (high - low))  # above the curves, for the mark's words
            limits = (min(row["epoch"] for row in history), max(row["epoch"] for row in history))
            drawings[name] = plot(title, series, "epoch", label, limits, room, marks, x_step=1)
    return drawings


def save_figures(
    folder: str | Path,
    obj: str,
    sheet: Sheet,
    found: Evaluation,
    about: dict[str, Any],
    history: Sequence[dict[str, Any]] = (),
) -> None:
    """Write the sheet as OBJ.svg and .png, and the figures of `draw_figures` as OBJ-NAME.svg and .png."""
    sheet.draw().save(Path(folder), obj, scale=2)
    for name, drawing in draw_figures(found, about, history).items():
        drawing.save(Path(folder), f"{obj}-{name}")


def threshold_of(found: Evaluation, about: dict[str, Any]) -> tuple[float, str]:
    """The score from which an image counts as abnormal, and where that comes from: the checkpoint, else the images."""
    if stored := about.get("threshold"):
        return stored["value"], f"the checkpoint's, set for {stored['rule']} on {stored['from']}"
    return found.more["threshold"], "chosen on this test set, where its F1 is largest: optimistic"


def digits(scores: np.ndarray) -> int:
    """Decimals that tell scores apart: early in training all of them lie near K/2."""
    spread = float(scores.max() - scores.min())
    return min(max(3, 3 - math.floor(math.log10(spread))), 9) if spread else 3


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """The epochs of a run from its metrics.jsonl: one JSON object a line, `epoch` counted from 1.

    Raises:
        InputError: a file that cannot be read, a line that is no such object.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--history {path}: cannot be read ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["epoch"] = int(row["epoch"])
        except (ValueError, KeyError, TypeError) as error:
            reason = "not the JSON of an epoch; is it a run's metrics.jsonl?"
            raise InputError(f"--history {path}, line {number}: {reason}") from error
        rows.append(row)
    return rows


def find_history(about: dict[str, Any]) -> list[dict[str, Any]]:
    """The epochs of the run that wrote a checkpoint, where its folder is there and holds that epoch; else none."""
    epoch = about.get("metrics", {}).get("epoch")
    with contextlib.suppress(InputError):
        history = read_history(Path(str(about.get("run"))) / "metrics.jsonl")
        if any(row["epoch"] == epoch and row.get("auc") == about["metrics"].get("auc") for row in history):
            return history
    return []


def _history_curve(history: Sequence[dict[str, Any]], key: str, name: str, colour: str, dashed: bool) -> Series:
    rows = [(row["epoch"], row[key]) for row in history if isinstance(row.get(key), (int, float))]
    rows = [(epoch, value) for epoch, value in rows if math.isfinite(value)]
    return Series(name, [epoch for epoch, _ in rows], [value for _, value in rows], colour, dashed)


def _roc(found: Evaluation) -> Drawing:
    fpr, tpr, _ = roc_curve(found.labels, found.scores)
    series = [Series("", [0, 1], [0, 1], "grid"), Series(f"image ({found.auc:.3f})", fpr, tpr)]
    if "roc" in found.curves:
        series.insert(1, Series(f"pixel ({found.pauc:.3f})", *found.curves["roc"], "ink"))
    return plot("ROC curves", series, "false positive rate", "true positive rate", (0, 1), (0, 1))


def _precision_recall(found: Evaluation) -> Drawing:
    precision, recall, _ = precision_recall_curve(found.labels, found.scores, drop_intermediate=True)
    series = [Series(f"image (AP {found.more['ap']:.3f})", recall, precision)]
    if "pr" in found.curves:
        series.insert(0, Series(f"pixel (AP {found.more['pixel_ap']:.3f})", *found.curves["pr"], "ink"))
    return plot("Precision and recall", series, "recall", "precision", (0, 1), (0, 1))


def _spread(names: Sequence[str], count: int) -> list[str]:
    """`count` names, evenly spaced."""
    return [names[i] for i in np.unique(np.linspace(0, len(names) - 1, count).round().astype(int))] if names else []
