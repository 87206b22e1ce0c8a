"""The report page: one HTML file with numbers, figures and a gallery of the images, and nothing from a network.

`write_page` shows a test set, `write_prediction_page` images without labels; both fill page.html. A heat map is kept as
HEAT x HEAT bytes between its own lowest and highest value, and the browser colours all of them on one scale.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from utils import atomic_path, prefetch

from ..evaluation import Evaluation, Masks
from ..files.config import PAPER, Settings, shareable
from .figures import History, digits, plots, threshold_of
from .images import OUTLINE, encode, fit_mask, outline, palette, read_picture, shrink

if TYPE_CHECKING:
    from ..metrics import Metrics

THUMB = 192  # pixels of a thumbnail's longer side
QUALITIES = (75, 30, 15)  # of WebP: the first that takes no more than THUMB_CHARS; only noise comes to the last
THUMB_CHARS = 19_000  # base64
HEAT = 48
MAX_CARDS = 2000  # images: bounds memory, and the page to 50 MB
BATCH = 32  # maps at a time
WORKERS = 4  # threads that draw thumbnails
TEMPLATE = Path(__file__).with_name("page.html")
NOTE = "Research use, not a medical device."
MEANING = "A score says how abnormal an image looks to the model; it is no probability"
WEAK = "weak localisation from the detection heads, not measured"
SELECTED = {
    "test": "the best of the run on {obj}'s test set (--select test{paper})",
    "valid": "the best of the run on images of valid/ that are no shots (--select valid)",
    "last": "the last of the run (--select last)",
}
# Of a run's machine: not for whoever a page is given to.
PRIVATE = ("host", "device", "device_name", "threads", "command", "wandb_id", "settings")
# A local path and its last part, wherever it stands in a value.
LOCAL_PATH = re.compile(r"(?<![\w:/\\.])(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[^\s/\\]+[/\\])*([^\s/\\]*)")


@dataclass(frozen=True)
class Card:
    """What the gallery shows of an image; pictures are base64. The fields' order is known to page.html."""

    name: str
    label: int | None  # None: not known, a prediction
    score: float
    group: str | None  # the volume or series that it is a slice of
    image: str | None  # WebP; None where the file is not there
    width: int  # of the picture, in any unit
    height: int
    outline: str | None  # PNG, transparent but for the mask's edge
    heat: str | None  # (HEAT, HEAT) bytes: 0 stands for `low`, 255 for `high`
    low: float
    high: float


def write_page(
    folder: str | Path,
    evaluation: Evaluation,
    masks: Masks | None,
    metrics: Metrics,
    settings: Settings,
    metadata: Mapping[str, Any],
    history: History = (),
    obj: str | None = None,
) -> Path:
    """Write index.html about a test set.

    Args:
        folder: made if need be.
        evaluation: the scores; where a picture's file is missing the gallery has a placeholder.
        masks: of its images, None without.
        metrics: of `measure(..., full=True)`, and of `measure_without`.
        settings: of the checkpoint.
        metadata: of the checkpoint: `select`, `metrics.epoch` and `threshold` are used, and what there is is listed,
            without paths and what it says of a machine.
        history: the run's epochs, see `read_history`.
        obj: the data set that was tested, where it is not the one trained on.

    Returns:
        The page's path.

    Raises:
        InputError: it cannot be written.
    """
    obj = obj or settings.obj
    figures = {
        name: f'<figure class="plot"><figcaption>{escape(plot.title)}</figcaption>{plot.svg(name)}</figure>'
        for name, plot in plots(evaluation, metrics, metadata, history).items()
    }
    threshold, origin = threshold_of(metrics, metadata)
    scores, shown = evaluation.image_scores, _kept(evaluation.image_scores, evaluation.labels)
    heat_range = (metadata.get("threshold") or {}).get("heat_range") or _map_range(evaluation)
    data = {
        "labelled": True,
        "threshold": threshold,
        "scores": [scores[evaluation.labels == label].tolist() for label in (0, 1)],
        "cards": [astuple(card) for card in _cards(evaluation, masks, shown)],
        "sort": "worst",
    }
    known, options = settings.to_dict(), shareable(metadata.get("options") or {})
    values = {**known, **metadata, "options": {k: v for k, v in options.items() if k not in known}}
    parts = {
        "kind": "MadCLIP test report",
        "title": escape(obj),
        "lead": _lead(evaluation, settings, metadata, obj),
        "numbers": _numbers(metrics, metadata),
        "origin": escape(origin),
        "decisions": _confusion(scores, evaluation.labels, threshold),
        "histogram": figures.pop("histogram"),
        "figures": f'<div class="figures">{"".join(figures.values())}</div>',
        "note": escape(_gallery_note(len(shown), len(scores), evaluation)),
        "scale_words": "pixel score, one scale for all" if evaluation.head == "seg" else WEAK,
        "settings": _rows({name: value for name, value in values.items() if name not in PRIVATE}),
    }
    return _write(folder, parts, data, heat_range, scores, maps=True)


def write_prediction_page(
    folder: str | Path,
    rows: Sequence[Card],
    *,
    title: str,
    threshold: float | None,
    origin: str,
    heat_range: tuple[float, float],
    weak: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write index.html about predictions: highest scores first, volumes as strips, a threshold that can be moved.

    Args:
        folder: made if need be.
        rows: of `make_card`; beyond MAX_CARDS those with the highest scores are shown.
        title: the page's heading, such as the checkpoint's data set.
        threshold: abnormal is score >= threshold; None: no decisions until one is set by hand.
        origin: where the threshold comes from.
        heat_range: of the colours.
        weak: the maps come from the detection heads of a checkpoint that was trained without masks.
        metadata: what to list of the checkpoint, see `write_page`.

    Returns:
        The page's path.

    Raises:
        InputError: it cannot be written.
    """
    scores = np.array([row.score for row in rows], dtype=np.float64)
    cards = [rows[i] for i in sorted(np.argsort(-scores, kind="stable")[:MAX_CARDS])]
    volumes, slices = len({card.group for card in rows} - {None}), sum(card.group is not None for card in rows)
    of_volumes = f", {slices:,} of them slices (volumes or series: {volumes:,})" if volumes else ""
    data = {"labelled": False, "threshold": threshold, "scores": [scores.tolist()],
            "cards": [astuple(card) for card in cards], "sort": "score"}  # fmt: skip
    above = 0 if threshold is None else int((scores >= threshold).sum())
    fewer = len(cards) < len(rows)
    kept = f"The gallery holds the {MAX_CARDS:,} highest scores of {len(rows):,} images." if fewer else ""
    parts = {
        "kind": "MadCLIP predictions",
        "title": escape(title),
        "lead": f"{len(rows):,} images{of_volumes}. {MEANING}. {NOTE}",
        "numbers": "",
        "origin": escape(origin),
        "decisions": f'<tr><td><span data-count="p">{above:,}</span> of {len(rows):,} images abnormal</td></tr>',
        "histogram": "",
        "figures": "",
        "note": escape(kept),
        "scale_words": WEAK if weak else "pixel score, one scale for all",
        "settings": _rows({k: v for k, v in shareable(dict(metadata or {})).items() if k not in PRIVATE}),
    }
    return _write(folder, parts, data, heat_range, scores, maps=any(card.heat for card in cards))


def _write(
    folder: str | Path,
    parts: Mapping[str, str],
    data: Mapping[str, Any],
    heat_range: Sequence[float],
    scores: np.ndarray,
    maps: bool,
) -> Path:
    """Fill the template."""
    threshold, decimals = data["threshold"], digits(scores)
    ends = [*scores.tolist(), *([] if threshold is None else [threshold])] or [0.0]
    shared = {"digits": decimals, "range": [min(ends), max(ends)], "scale": list(heat_range),
              "colours": palette().tolist(), "heat": HEAT}  # fmt: skip
    anchors = ", ".join(f"rgb{tuple(colour)}" for colour in palette()[::15].tolist())
    values = {
        **parts,
        "body": "maps" if maps else "plain",
        "threshold": "none" if threshold is None else f"{threshold:.{decimals}f}",
        "gradient": f"linear-gradient(to right, {anchors})",
        "low": f"{heat_range[0]:.3f}",
        "high": f"{heat_range[1]:.3f}",
        "footer": NOTE,
        "data": json.dumps({**data, **shared}, separators=(",", ":")).replace("<", "\\u003c"),
    }
    html = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], TEMPLATE.read_text(encoding="utf-8"))
    page = Path(folder) / "index.html"
    with atomic_path(page, "--report") as temporary:  # a file's name may hold bytes that are no UTF-8
        temporary.write_text(html, encoding="utf-8", errors="backslashreplace")
    return page


# --- the gallery ---


def _kept(scores: np.ndarray, labels: np.ndarray) -> list[int]:
    """At most MAX_CARDS images: the highest and the lowest scores of each class, as many of each class as there are."""
    order = [np.flatnonzero(labels == label)[np.argsort(scores[labels == label], kind="stable")] for label in (0, 1)]
    half = MAX_CARDS // 2
    room = [max(half, MAX_CARDS - len(other)) for other in reversed(order)]
    parts = []
    for indices, limit in zip(order, room, strict=True):
        lower = min(len(indices), limit) // 2
        upper = min(len(indices), limit) - lower
        parts += [*indices[:lower].tolist(), *indices[len(indices) - upper :].tolist()]
    return parts


def _map_range(evaluation: Evaluation) -> tuple[float, float]:
    """The lowest and highest pixel of all maps."""
    low, high = np.inf, -np.inf
    for start in range(0, len(evaluation.samples), BATCH):
        maps = evaluation.maps(slice(start, start + BATCH))
        low, high = min(low, float(maps.min())), max(high, float(maps.max()))
    return low, high


def _cards(evaluation: Evaluation, masks: Masks | None, shown: Sequence[int]) -> Iterator[Card]:
    def maps_and_masks() -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        for start in range(0, len(shown), BATCH):
            part = shown[start : start + BATCH]
            edges = [None] * len(part) if masks is None else masks.get(part).cpu().numpy()
            yield from zip(part, evaluation.maps(part).cpu().numpy(), edges, strict=True)

    def draw(item: tuple[int, np.ndarray, np.ndarray | None]) -> Card:
        i, heat, mask = item
        name, score, label = evaluation.names[i], float(evaluation.image_scores[i]), int(evaluation.labels[i])
        return make_card(name, score, read_picture(evaluation.samples[i], THUMB), heat, label=label, mask=mask)

    return prefetch(draw, maps_and_masks(), WORKERS)


def make_card(
    name: str,
    score: float,
    picture: Image.Image | None,
    heat: np.ndarray | None,
    *,
    label: int | None = None,
    group: str | None = None,
    mask: np.ndarray | None = None,
) -> Card:
    """What the page shows of an image, some 12 kB whatever the size of its picture.

    Args:
        name: what the page calls it.
        score: of the image.
        picture: of any size, RGB; None: a placeholder.
        heat: its map (S, S); None without.
        label: 0 normal, 1 abnormal; None: not known.
        group: the volume or series that it is a slice of: shown as a strip, in the order of the rows.
        mask: (S, S) bool, whose outline is shown.
    """
    width, height = picture.size if picture else (THUMB, THUMB)
    levels: tuple[str | None, float, float] = (None, 0.0, 0.0)
    if heat is not None:
        small = F.adaptive_avg_pool2d(torch.from_numpy(heat.astype(np.float32))[None], HEAT)[0].numpy()
        low, high = float(small.min()), float(small.max())
        steps = ((small - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)
        levels = base64.b64encode(steps.tobytes()).decode(), low, high
    edge = None
    if mask is not None and mask.any():
        drawn = Image.fromarray(outline(fit_mask(mask, (width, height)), 2).astype(np.uint8))
        drawn.putpalette([0, 0, 0, *OUTLINE])
        edge = encode(drawn, "PNG", transparency=0, bits=1)
    thumbnail = _thumbnail(shrink(picture, THUMB)) if picture else None
    return Card(name, label, score, group, thumbnail, width, height, edge, *levels)


def _thumbnail(picture: Image.Image) -> str:
    for quality in QUALITIES:
        image = encode(picture.convert("RGB"), "WEBP", quality=quality)
        if len(image) <= THUMB_CHARS:
            break
    return image


def _gallery_note(shown: int, total: int, evaluation: Evaluation) -> str:
    notes = []
    if shown < total:
        notes.append(
            f"The gallery holds {shown:,} of {total:,} images: the highest and the lowest scores of each class. "
            "All images count in the numbers and figures."
        )
    if evaluation.head != "seg":
        notes.append(f"The heat maps are a {WEAK}: no number counts them.")
    return " ".join(notes)


# --- words and numbers ---


def _lead(evaluation: Evaluation, settings: Settings, metadata: Mapping[str, Any], obj: str) -> str:
    """What was tested, and how the epoch was selected."""
    total, abnormal, trained_on = len(evaluation.labels), int(evaluation.labels.sum()), settings.obj
    select, epoch = metadata.get("select", "unknown"), (metadata.get("metrics") or {}).get("epoch", "unknown")
    sentences = [f"{total:,} images: {total - abnormal:,} normal, {abnormal:,} abnormal."]
    if trained_on != obj:
        sentences.append(f"The model was trained on {trained_on}; curves over epochs come from there.")
    paper = ", the published protocol" if trained_on in PAPER else ""
    way = SELECTED[select].format(obj=trained_on, paper=paper) if select in SELECTED else f"selected by: {select}"
    optimistic = ", so these numbers are optimistic" if select == "test" and trained_on == obj else ""
    sentences.append(f"Epoch {epoch}: {way}{optimistic}.")
    if settings.pretrain == "random":
        sentences.append("CLIP's weights are random, not pre-trained: the numbers show only that the program runs.")
    return re.sub(r"--\w+ \w+", r"<code>\g<0></code>", escape(" ".join(sentences)))


def _numbers(metrics: Metrics, metadata: Mapping[str, Any]) -> str:
    """Every number with its 95% interval, and without the shots' patients, where there are such; the AUROCs first."""
    from ..metrics import METRICS  # noqa: PLC0415 - scikit-learn

    values: dict[str, Any] = {"auc": metrics.auc, "pauc": metrics.pauc, **metrics.values}
    cells = []
    for name, (words, _) in METRICS.items():
        value = values.get(name)
        if not isinstance(value, int | float):
            continue  # an interval, or not measured
        small = ""
        if interval := values.get(f"{name}_ci95"):
            small += f"<small>95% CI {interval[0]:.3f} to {interval[1]:.3f}</small>"
        if (without := values.get(f"{name}_without_shot_patients")) is not None:
            small += f"<small>{without:.3f} without the patients of the shots</small>"
        main = ' class="main"' if name in ("auc", "pauc") else ""
        label = escape(words[0].upper() + words[1:])
        cells.append(f"<div{main}><dt>{label}</dt><dd>{value:.3f}{small}</dd></div>")
    pixel = (metadata.get("threshold") or {}).get("pixel_value")
    if pixel is not None:
        cells.append(f"<div><dt>Pixel threshold of the checkpoint, as in predict.py</dt><dd>{pixel:.3f}</dd></div>")
    return "\n".join(cells)


def _confusion(scores: np.ndarray, labels: np.ndarray, threshold: float) -> str:
    """Counts at the threshold, which lead to the images; the page's script keeps them up to date."""
    rows = []
    for truth, name, right_kind, wrong_kind, words in (
        (1, "abnormal", "tp", "fn", ("true positive", "false negative", "sensitivity")),
        (0, "normal", "tn", "fp", ("true negative", "false positive", "specificity")),
    ):
        positive = scores[labels == truth] >= threshold
        right, wrong = int((positive == truth).sum()), int((positive != truth).sum())
        rows.append(
            f'<tr><th scope="row">{name}</th>'
            f'<td><span data-count="{right_kind}">{right:,}</span> {words[0]}</td>'
            f'<td><a href="#filter={wrong_kind}"><span data-count="{wrong_kind}">{wrong:,}</span> {words[1]}</a></td>'
            f'<td>{words[2]} <span data-rate="{right_kind}">{right / max(len(positive), 1):.3f}</span></td></tr>'
        )
    return "\n".join(rows)


def _rows(values: Mapping[str, Any], prefix: str = "") -> str:
    """Nested values as rows of a definition list."""
    rows = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows.append(_rows(value, f"{prefix}{name}."))
        elif value is not None:
            words = " ".join(map(_word, value if isinstance(value, list | tuple) else [value]))
            rows.append(f"<div><dt>{escape(prefix + str(name))}</dt><dd>{escape(words)}</dd></div>")
    return "\n".join(row for row in rows if row)


def _word(value: object) -> str:
    """A value as text, of a local path the last part."""
    return f"{value:.6g}" if isinstance(value, float) else LOCAL_PATH.sub(r"\1", str(value))
