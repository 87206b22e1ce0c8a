"""Figures for papers and for the report page, through matplotlib: curves, histograms, the run, a sheet of images.

A user's style counts: matplotlib's own style file, `matplotlibrc` (in the working folder, at MATPLOTLIBRC, ...),
wherever it departs from matplotlib's defaults. On the page the colours of this module follow the reader's light or dark
screen. The same numbers give the same bytes.
"""

from __future__ import annotations

import base64
import io
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from utils import atomic_path, printable

from ..evaluation import Evaluation, Masks
from .images import COLOUR_MAP, alpha_blend, draw_outline, read_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..metrics import Metrics

COLOURS = {"ink": "#16191d", "muted": "#5c636b", "grid": "#dfe3e7", "accent": "#0a5fb4"}  # base.html has them, and dark
# Families for names of files that DejaVu Sans, which comes with matplotlib, has no letters for.
FALLBACKS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans",
             "Microsoft YaHei", "Malgun Gothic", "Noto Sans", "Arial Unicode MS")  # fmt: skip
SIZE = (3.75, 2.8125)  # inches: 360 x 270 CSS pixels
DPI = 288  # of PNG files
SHEET_DPI = 192
BINS = 40
TILE = 240  # pixels of a picture's longer side, in the sheet
LETTERS = 20  # of a file's name that fit above a tile
RUN_FIGURES: dict[str, tuple[str, str, list[tuple[str, str, str, str]]]] = {
    # title, y label, and for each curve its key in the history, name, colour, line style
    "auc": ("AUROC over the run", "AUROC", [
        ("auc", "image", "C0", "-"), ("pauc", "pixel", "C1", "-"),
        ("valid_auc", "image, valid", "C0", "--"), ("valid_pauc", "pixel, valid", "C1", "--"),
    ]),
    "losses": ("Losses over the run", "loss", [
        ("total", "total", "C0", "-"), ("det", "detection", "C1", "-"), ("seg", "segmentation", "C1", "--"),
    ]),
    "similarity": ("Similarity of the two text features", "cosine", [
        ("similarity", "normal and abnormal prompt", "C0", "-"),
    ]),
}  # fmt: skip
History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Plot:
    """A titled figure of one pair of axes, which is drawn when it is written."""

    title: str
    draw: Callable[[Axes], None]

    def svg(self, name: str) -> str:
        """An <svg> element for the page, whose CSS colours it; `name` sets its references apart from other figures'."""
        with _style(name, page=True):
            text = _bytes(self._figure(), "svg").decode()
        text = re.sub(r"<(style|metadata)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
        text = text.replace("xlink:href", "href")
        # Names that nothing refers to are in other figures of the page too.
        targets = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
        text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in targets else "", text)
        for word, colour in COLOURS.items():
            text = text.replace(colour, f"var(--{word})")
        label = f'xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(self.title)}" '
        return re.sub(r'^<svg .*?(viewBox="[^"]*").*?>', rf"<svg {label}\1>", text, count=1, flags=re.DOTALL)

    def save(self, folder: Path, name: str) -> None:
        """Write NAME.svg and NAME.png."""
        with _style(name):
            _save(self._figure(), folder, name)

    def _figure(self) -> Figure:
        from matplotlib.figure import Figure  # noqa: PLC0415

        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        self.draw(axes)
        handles, names = axes.get_legend_handles_labels()
        if names:
            figure.legend(handles, names, loc="outside upper left", ncols=3 if len(names) == 3 else 2)
        return figure


def draw(plot: Plot) -> str:
    """A figure as the address of itself, for the page: a PNG without a background."""
    with _style("page", page=True):
        return "data:image/png;base64," + base64.b64encode(_bytes(plot._figure(), "png", 192)).decode()


def plots(
    evaluation: Evaluation, metrics: Metrics, metadata: Mapping[str, Any], history: History = ()
) -> dict[str, Plot]:
    """The figures but for the sheet.

    Args:
        evaluation: the scores.
        metrics: of `measure(..., full=True)`, whose curves are drawn.
        metadata: of the checkpoint: its threshold and its epoch are marked.
        history: the run's epochs, see `read_history`.

    Returns:
        `histogram`, `roc`, `pr`, and of a history with two epochs or more what RUN_FIGURES names.
    """
    threshold, _ = threshold_of(metrics, metadata)
    decimals = digits(evaluation.image_scores)
    word = "threshold" if metadata.get("threshold") else "F1-max threshold on the test set"
    mark = f"{word} {threshold:.{decimals}f}"
    figures = {
        "histogram": Plot("Image scores by class", lambda axes: _histogram(axes, evaluation, threshold, mark)),
        "roc": Plot("ROC curves", lambda axes: _roc(axes, metrics)),
        "pr": Plot("Precision and recall", lambda axes: _precision_recall(axes, metrics)),
    }
    epoch = (metadata.get("metrics") or {}).get("epoch")
    for name, (title, label, styles) in RUN_FIGURES.items():
        curves: dict[bytes, tuple[np.ndarray, str, str, str]] = {}
        for key, curve, colour, line in styles:
            points = _history_points(history, key)
            if points.shape[1] > 1 and points[1].any():  # the segmentation loss is 0 without masks
                curves[points.tobytes()] = points, curve, colour, line  # of equal curves the last is drawn
        if curves:
            figures[name] = Plot(title, partial(_run, curves=list(curves.values()), label=label, epoch=epoch))
    return figures


def save_figures(
    folder: str | Path,
    obj: str,
    evaluation: Evaluation,
    masks: Masks | None,
    metrics: Metrics,
    metadata: Mapping[str, Any],
    history: History = (),
) -> None:
    """Write a sheet of images as OBJ.svg and .png, and the figures of `plots` as OBJ-NAME.svg and .png.

    Raises:
        InputError: a file that cannot be written.
    """
    with _style(obj):
        _save(_sheet(evaluation, masks), Path(folder), obj, SHEET_DPI)
    for name, plot in plots(evaluation, metrics, metadata, history).items():
        plot.save(Path(folder), f"{obj}-{name}")


def threshold_of(metrics: Metrics, metadata: Mapping[str, Any]) -> tuple[float, str]:
    """The score from which an image counts as abnormal, and where that comes from: the checkpoint, else the images."""
    if stored := metadata.get("threshold"):
        return stored["value"], f"the checkpoint's, set for {stored['rule']} on {stored['from']}"
    value = cast("float", metrics.values["f1_max_threshold_on_test"])
    return value, "the F1-max threshold on this test set: optimistic"


def digits(scores: np.ndarray) -> int:
    """Decimals that tell scores apart: early in training all of them lie near K/2."""
    spread = float(scores.max() - scores.min()) if len(scores) else 0.0
    return min(max(3, 3 - math.floor(math.log10(spread))), 9) if spread else 3


def spread(indices: np.ndarray, count: int) -> list[int]:
    """`count` of the indices, evenly spaced."""
    if not len(indices):
        return []
    return [int(i) for i in indices[np.unique(np.linspace(0, len(indices) - 1, count).round().astype(int))]]


def examples(evaluation: Evaluation, count: int) -> list[int]:
    """A fixed handful of images: two thirds abnormal, evenly spaced over each class."""
    normal, abnormal = (np.flatnonzero(evaluation.labels == label) for label in (0, 1))
    return [*spread(abnormal, count - count // 3), *spread(normal, count // 3)]


# --- style and files ---


@contextmanager
def _style(salt: str, page: bool = False) -> Iterator[None]:
    """Settings of matplotlib: ours below the user's; on a page without a background of their own."""
    import matplotlib  # noqa: PLC0415
    from cycler import cycler  # noqa: PLC0415

    matplotlib.use("agg")
    from matplotlib import font_manager  # noqa: PLC0415

    known = {font.name for font in font_manager.fontManager.ttflist}
    ours: dict[Any, Any] = {
        "font.family": ["DejaVu Sans", *(name for name in FALLBACKS if name in known)],
        "font.size": 8.0, "text.color": COLOURS["ink"], "axes.labelcolor": COLOURS["muted"],
        "axes.edgecolor": COLOURS["muted"], "xtick.color": COLOURS["muted"], "ytick.color": COLOURS["muted"],
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
        "grid.color": COLOURS["grid"], "lines.linewidth": 1.5, "legend.frameon": False,
        "axes.prop_cycle": cycler(color=[COLOURS["accent"], COLOURS["ink"], COLOURS["muted"]]),
        **({"figure.facecolor": "none", "axes.facecolor": "none"} if page else {}),
    }  # fmt: skip
    default, now = matplotlib.rcParamsDefault, matplotlib.rcParams
    kept = {name: value for name, value in ours.items() if now[name] == default[name]}
    # Text stays text, to be searched and edited; nothing differs from one run to the next.
    with matplotlib.rc_context({**kept, "svg.fonttype": "none", "svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # drawn as a box: one line a letter
        yield


def _bytes(figure: Figure, kind: str, dpi: int = 72) -> bytes:
    """The file, without the date and the versions that matplotlib would note in it."""
    buffer, nothing = io.BytesIO(), {"svg": ("Date", "Creator"), "png": ("Software",)}[kind]
    figure.savefig(buffer, format=kind, dpi=dpi, metadata=dict.fromkeys(nothing))
    return buffer.getvalue()


def _save(figure: Figure, folder: Path, name: str, dpi: int = DPI) -> None:
    for kind in ("svg", "png"):
        with atomic_path(folder / f"{name}.{kind}", "--figures") as temporary:
            temporary.write_bytes(_bytes(figure, kind, dpi))


# --- the plots ---


def _histogram(axes: Axes, evaluation: Evaluation, threshold: float, words: str) -> None:
    """Scores of each class on common bins, in percent of the class."""
    edges = np.histogram_bin_edges(np.append(evaluation.image_scores, threshold), BINS)
    for label, name, colour in ((0, "normal", "C1"), (1, "abnormal", "C0")):
        values = evaluation.image_scores[evaluation.labels == label]
        share = 100 * np.histogram(values, edges)[0] / max(len(values), 1)
        axes.stairs(share, edges, fill=True, alpha=0.25, color=colour)
        axes.stairs(share, edges, color=colour, label=name)
    axes.set(xlabel="image score", ylabel="% of the class", xlim=(edges[0], edges[-1]))
    axes.set_ylim(bottom=0)
    _mark(axes, threshold, words)


def _roc(axes: Axes, metrics: Metrics) -> None:
    axes.plot([0, 1], [0, 1], color=COLOURS["grid"], linewidth=1)
    if "roc" in metrics.curves:
        axes.plot(*metrics.curves["roc"], color="C1", label=f"pixel ({metrics.pauc:.3f})")
    if "image_roc" in metrics.curves:
        axes.plot(*metrics.curves["image_roc"], color="C0", label=f"image ({metrics.auc:.3f})")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1.005), ylim=(0, 1.005))


def _precision_recall(axes: Axes, metrics: Metrics) -> None:
    for curve, key, name, colour in (("pr", "pixel_ap", "pixel", "C1"), ("image_pr", "ap", "image", "C0")):
        if curve in metrics.curves:
            axes.plot(*metrics.curves[curve], color=colour, label=f"{name} (AP {metrics.values[key]:.3f})")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.005), ylim=(0, 1.005))


def _history_points(history: History, key: str) -> np.ndarray:
    """(2, points): epochs and values, where there is one."""
    rows = [(row["epoch"], row[key]) for row in history if isinstance(row.get(key), int | float)]
    finite = [row for row in rows if math.isfinite(row[1])]
    return np.ascontiguousarray(np.array(finite, dtype=np.float64).reshape(-1, 2).T)


def _run(axes: Axes, curves: Sequence[tuple[np.ndarray, str, str, str]], label: str, epoch: float | None) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    for points, name, colour, line in curves:
        axes.plot(*points, color=colour, linestyle=line, label=name)
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if label == "AUROC":
        low, high = axes.get_ylim()
        axes.set_ylim(low, min(high, 1.01))
        axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= 1])
    if isinstance(epoch, int | float):
        _mark(axes, epoch, f"epoch {epoch}")


def _mark(axes: Axes, x: float, words: str) -> None:
    """A vertical line, with words above it, where no curve is."""
    low, high = axes.get_xlim()
    place = "right" if x > low + 0.6 * (high - low) else "left" if x < low + 0.4 * (high - low) else "center"
    colour = axes.xaxis.label.get_color()
    axes.axvline(x, color=colour, linestyle="--", linewidth=1)
    axes.annotate(
        words, (x, 1), xycoords=axes.get_xaxis_transform(), xytext=(0, 2), textcoords="offset points", ha=place,
        va="bottom", color=colour, parse_math=False,
    )  # fmt: skip


# --- the sheet ---


def _sheet(evaluation: Evaluation, masks: Masks | None, count: int = 9) -> Figure:
    """A column an image: the image, the outline of its mask where the data set has masks, its heat map."""
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415
    from matplotlib.colors import Normalize  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    shown = examples(evaluation, count)
    maps = evaluation.maps(shown).float().cpu().numpy()
    heat_range = (float(maps.min()), float(maps.max()))
    rows = ["image", *(["mask"] if masks is not None else []), "heat map"]
    figure = Figure(figsize=(0.8 + 1.35 * len(shown), 0.9 + 1.35 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(shown), squeeze=False)
    for column, (i, heat) in enumerate(zip(shown, maps, strict=True)):
        picture = read_picture(evaluation.samples[i], TILE)
        mask = None if masks is None else masks.get([i])[0].cpu().numpy()
        for axes, row in zip(grid[:, column], rows, strict=True):
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            if column == 0:
                axes.set_ylabel(row)
            if picture is None and row != "heat map":
                axes.text(0.5, 0.5, "no picture", ha="center", va="center", transform=axes.transAxes)
                axes.set(aspect="equal", xlim=(0, 1), ylim=(0, 1))
            elif picture is None:
                axes.imshow(heat, COLOUR_MAP, vmin=heat_range[0], vmax=heat_range[1])
            elif row == "heat map":
                axes.imshow(alpha_blend(picture, heat, heat_range))
            else:
                axes.imshow(draw_outline(picture, mask) if row == "mask" and mask is not None else picture)
        label = "abnormal" if evaluation.labels[i] else "normal"
        title = f"{_short(evaluation.names[i])}\n{label}, {evaluation.image_scores[i]:.4f}"
        grid[0, column].set_title(title, fontsize="small", loc="left", parse_math=False)
    scale = figure.colorbar(
        ScalarMappable(Normalize(*heat_range), COLOUR_MAP),
        ax=grid,
        location="bottom",
        fraction=0.04,
        aspect=80,
        pad=0.02,
    )
    weak = "" if evaluation.head == "seg" else " (weak localisation from the detection heads, not measured)"
    scale.set_label(f"anomaly score of a pixel, one scale for all{weak}")
    return figure


def _short(name: str) -> str:
    """A file's name without its folders and ending, of at most LETTERS letters, composed: no font places accents."""
    stem = printable(unicodedata.normalize("NFC", Path(name).stem))
    return stem if len(stem) <= LETTERS else f"...{stem[3 - LETTERS :]}"
