"""Figures for papers and for the report page, as PNG: curves, histograms, the course of a run, a sheet of images.

Equal numbers give equal bytes.
"""

import io
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from utils import atomic_path, blame, read_text

from ..evaluation import Evaluation, Masks
from ..metrics import Metrics
from .images import alpha_blend, draw_outline, read_picture

# The colours of base.html.
INK, MUTED, GRID, ACCENT = "#16191d", "#5c636b", "#cfd5da", "#0a5fb4"
STYLE: dict[Any, Any] = {
    "font.size": 8.0, "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": MUTED, "xtick.color": MUTED,
    "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": GRID, "lines.linewidth": 1.5, "legend.frameon": False,
    "axes.prop_cycle": cycler(linestyle=["-", "--"]) * cycler(color=[ACCENT, INK]),
}  # fmt: skip
SIZE = (3.75, 2.8125)  # inches
DPI = 288
BINS = 40
TILE, GAP, HEAD = 240, 6, 44  # pixels on the sheet: a picture's longer side, the gap between pictures, the space above
LETTERS = 25  # letters of a file's name that fit above a picture
RUN_FIGURES = {  # title, y label, and the curves: key in the history -> name
    "auc": ("AUROC over the run", "AUROC",
            {"auc": "image", "pauc": "pixel", "valid_auc": "image, valid", "valid_pauc": "pixel, valid"}),
    "losses": ("Losses over the run", "loss", {"total": "total", "det": "detection", "seg": "segmentation"}),
    "similarity": ("Similarity of the two text features", "cosine", {"similarity": "normal and abnormal prompt"}),
}  # fmt: skip


def read_history(ckpt_path: str | Path) -> list[dict[str, Any]]:
    """The epochs of a run, from metrics.jsonl in the checkpoint's folder; empty without it, `InputError` if damaged."""
    path = Path(ckpt_path).with_name("metrics.jsonl")
    if not path.is_file():
        return []
    with blame(path, "resume its run, or copy the checkpoint elsewhere"):
        return [json.loads(line) for line in read_text(path).splitlines()]


@dataclass(frozen=True)
class Plot:
    """A figure with one pair of axes; it is drawn only when its file is requested."""

    title: str
    x: str  # label of the axis
    y: str
    curves: Sequence[tuple[np.ndarray, str]]  # (2, points), name
    mark: tuple[float, str] | None = None  # a vertical line: its position and label
    filled: bool = False

    def figure(self) -> Figure:
        """The figure, without its title."""
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot(xlabel=self.x, ylabel=self.y)
        for points, name in self.curves:
            (line,) = axes.plot(*points, label=name)
            if self.filled:
                axes.fill_between(*points, color=line.get_color(), alpha=0.25)
        if self.mark:
            axes.axvline(self.mark[0], color=MUTED, linestyle=":", label=self.mark[1])
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=self.x == "epoch"))
        axes.margins(x=0.02)
        figure.legend(loc="outside upper left", ncols=3)
        return figure

    def png(self, transparent: bool = False) -> bytes:
        """The figure as the bytes of a PNG file."""
        buffer = io.BytesIO()
        with mpl.rc_context(STYLE):
            self.figure().savefig(buffer, format="png", dpi=DPI, transparent=transparent, metadata={"Software": None})
        return buffer.getvalue()


def plots(
    evaluation: Evaluation, metrics: Metrics, metadata: Mapping[str, Any], history: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Plot]:
    """All figures except the sheet.

    Args:
        evaluation: the scores.
        metrics: the result of `measure(..., full=True)`; its curves are drawn.
        metadata: of the checkpoint; its epoch and threshold (see `threshold_of`) are marked.
        history: the run's epochs, see `read_history`.

    Returns:
        `histogram`, `roc`, `pr`, and those of RUN_FIGURES with a value in at least two epochs of the history.
    """
    scores, labels, (threshold, _) = evaluation.image_scores, evaluation.labels, threshold_of(metrics, metadata)
    edges = np.histogram_bin_edges(np.append(scores, threshold), BINS)
    classes = [(_stairs(scores[labels == label], edges), name) for label, name in ((1, "abnormal"), (0, "normal"))]
    drawn, values = metrics.curves, metrics.values
    roc = [(drawn[key], f"{name} ({values[value]:.3f})") for key, name, value in
           (("image_roc", "image", "auc"), ("roc", "pixel", "pauc")) if key in drawn]  # fmt: skip
    pr = [(drawn[key], f"{name} (AP {values[value]:.3f})") for key, name, value in
          (("image_pr", "image", "ap"), ("pr", "pixel", "pixel_ap")) if key in drawn]  # fmt: skip
    mark = (threshold, f"threshold {threshold:.{digits(scores)}f}")
    figures = {
        "histogram": Plot("Image scores by class", "image score", "% of the class", classes, mark, filled=True),
        "roc": Plot("ROC curves", "false positive rate", "true positive rate", roc),
        "pr": Plot("Precision and recall", "recall", "precision", pr),
    }
    epoch = (metadata.get("metrics") or {}).get("epoch")
    for figure, (title, label, names) in RUN_FIGURES.items():
        curves = []
        for key, name in names.items():
            points = np.array([(row["epoch"], row[key]) for row in history if row.get(key) is not None], np.float64).T
            if points.size > 2 and points[1].any():  # the segmentation loss is 0 without masks
                curves.append((points, name))
        if curves:
            figures[figure] = Plot(title, "epoch", label, curves, (epoch, f"epoch {epoch}") if epoch else None)
    return figures


def _stairs(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The outline of a histogram, in percent of the values: (2, points)."""
    shares = 100 * np.histogram(values, edges)[0] / max(len(values), 1)
    return np.stack([np.repeat(edges, 2), np.pad(np.repeat(shares, 2), 1)])


def save_figures(folder: str | Path, obj: str, picture: Image.Image, figures: Mapping[str, Plot]) -> None:
    """Write the sheet as OBJ.png, the figures of `plots` as OBJ-NAME.png; `InputError` if a file is not writable."""
    with atomic_path(Path(folder) / f"{obj}.png", "--figures") as temporary:
        picture.save(temporary, "PNG")
    for name, plot in figures.items():
        with atomic_path(Path(folder) / f"{obj}-{name}.png", "--figures") as temporary:
            temporary.write_bytes(plot.png())


def threshold_of(metrics: Metrics, metadata: Mapping[str, Any]) -> tuple[float, str]:
    """The threshold for images and, in words, its source: the checkpoint or, if it has none, this test set."""
    if stored := metadata.get("threshold"):
        return stored["value"], threshold_words(stored)
    value = cast("float", metrics.values["f1_max_threshold_on_test"])
    return (
        value,
        "The checkpoint has no threshold: this one gives the largest F1 on this test set, so it is optimistic.",
    )


def threshold_words(threshold: Mapping[str, Any]) -> str:
    """Sentences that say how a threshold of `calibrate` was chosen, and the rates on those images."""
    figures = threshold["figures"]
    images = f"{figures['n_normal']} normal and {figures['n_abnormal']} abnormal {threshold['from']}"
    rates = [f"{figures[name]:.0%} of the {words}" for name, words in
             (("tpr", "abnormal images were found"), ("fpr", "normal ones were false alarms"))
             if figures[name] is not None]  # fmt: skip
    there = f" There {' and '.join(rates)}." if rates else ""
    return f"Chosen for {threshold['rule']} on {images}.{there}"


def digits(scores: np.ndarray) -> int:
    """The number of decimals needed to distinguish the scores: early in training they all lie near K/2."""
    spread = float(scores.max() - scores.min()) if len(scores) else 0.0
    return min(max(3, 3 - math.floor(math.log10(spread))), 9) if spread else 3


def examples(evaluation: Evaluation, count: int) -> list[int]:
    """Indices of at most `count` images, always the same: two thirds abnormal, evenly spaced over each class."""
    chosen = []
    for label, room in ((1, count - count // 3), (0, count // 3)):
        members = np.flatnonzero(evaluation.labels == label)
        places = np.linspace(0, max(len(members) - 1, 0), min(room, len(members)))
        chosen += members[places.round().astype(int)].tolist()
    return chosen


# --- the sheet ---


def sheet(evaluation: Evaluation, masks: Masks | None, count: int = 9) -> Image.Image:
    """A picture with a column for each image: the image, the outline of its mask (if there are masks), its heat map."""
    shown = examples(evaluation, count)
    maps = evaluation.maps(shown).float().cpu().numpy()
    heat_range = (float(maps.min()), float(maps.max()))
    rows = 2 if masks is None else 3
    canvas = Image.new("RGB", (GAP + len(shown) * (TILE + GAP), HEAD + rows * (TILE + GAP) + HEAD // 2), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.truetype(findfont("DejaVu Sans"), 15)
    for column, (i, heat) in enumerate(zip(shown, maps, strict=True)):
        picture = read_picture(evaluation.samples[i], TILE) or Image.new("RGB", (TILE, TILE), "grey")
        tiles = [picture, alpha_blend(picture, heat, heat_range)]
        if masks is not None:
            tiles.insert(1, draw_outline(picture, masks.get([i])[0].cpu().numpy()))
        left = GAP + column * (TILE + GAP)
        label = "abnormal" if evaluation.labels[i] else "normal"
        name = unicodedata.normalize("NFC", Path(evaluation.names[i]).stem)  # fonts misplace separate accents
        pen.text((left, GAP), f"{name[-LETTERS:]}\n{label}, {evaluation.image_scores[i]:.4f}", INK, font)
        for row, tile in enumerate(tiles):
            canvas.paste(tile, (left, HEAD + row * (TILE + GAP)))
    weak = "" if evaluation.head == "seg" else " (weak localisation from the detection heads, not measured)"
    words = f"Heat map{weak}: clear is unremarkable ({heat_range[0]:.3f}), yellow most abnormal ({heat_range[1]:.3f})"
    pen.text((GAP, canvas.height - HEAD // 2), words, MUTED, font)
    return canvas
