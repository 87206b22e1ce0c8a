"""Report pages: one HTML file with metrics, figures and a gallery of the images; nothing is loaded from a network.

A page is a jinja2 template of templates/. All templates extend base.html: style, threshold, and a gallery in which heat
maps and outlines can be switched off and pictures enlarge on a click; for screens (light, dark, phones) and paper.

    card = {"name": ..., "score": ..., **layers(picture, heat, heat_range)}     one for each image
    write(folder, "predictions.html", cards, title=..., ...)                    a page about them

`write_page` writes the page of a test set, with report.html.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from utils import atomic_path, prefetch

from .. import calibration
from ..evaluation import Evaluation, Masks
from ..files.config import Settings, shareable
from ..metrics import METRICS, Metrics
from .figures import Plot, digits, threshold_of
from .images import OUTLINE, data_uri, fit_mask, heat_colours, heat_picture, outline, read_picture

# An image on a page: name, score, label (0 normal, 1 abnormal, None unknown), `layers`, and group: the volume or series
# of a slice, which is shown as a strip in the order of its cards, or None.
Card = dict[str, Any]
SIDE = 480  # pixels of a picture's longer side: shown at 240 and more, enlarged on a click
HEAT = 60  # pixels a side of a heat map, which the browser enlarges
MAX_CARDS = 1000  # maximum number of images on a page: some 25 MB
WORKERS = 4  # threads that draw pictures
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True,
    trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
)  # fmt: skip


def layers(
    picture: Image.Image | None, heat: np.ndarray, heat_range: Sequence[float], mask: np.ndarray | None = None
) -> Card:
    """The pictures of a card, some 25 kB: picture, heat map and outline as data URIs, and the picture's size.

    Args:
        picture: of any size; None if the file is missing.
        heat: (S, S).
        heat_range: range of the colour scale, the same for all cards of a page.
        mask: (S, S) bool.
    """
    size, shown, edge = (SIDE, SIDE), None, None
    if picture is not None:
        small = ImageOps.contain(picture, size, Image.Resampling.BICUBIC) if max(picture.size) > SIDE else picture
        size, shown = small.size, data_uri(small.convert("RGB"), "WEBP", quality=75)
    pooled = F.adaptive_avg_pool2d(torch.from_numpy(heat.astype(np.float32))[None], HEAT)[0].numpy()
    if mask is not None and mask.any():
        drawn = Image.fromarray(outline(fit_mask(mask, size), 2).astype(np.uint8))
        drawn.putpalette([0, 0, 0, *OUTLINE])
        edge = data_uri(drawn, "PNG", transparency=0, bits=1)
    coloured = data_uri(heat_picture(pooled, heat_range), "PNG")
    return {"picture": shown, "width": size[0], "height": size[1], "heat": coloured, "outline": edge}


def write(
    folder: str | Path,
    template: str,
    cards: Sequence[Card],
    *,
    scores: Sequence[np.ndarray],
    threshold: float | None,
    heat_range: Sequence[float],
    **values: Any,  # noqa: ANN401 - what a template shows
) -> Path:
    """Write index.html; returns its path.

    Args:
        folder: created if needed.
        template: a file of templates/.
        cards: in the order shown without JavaScript; cards of one group follow each other.
        scores: of all images, shown or not: one array of the normal and one of the abnormal images, or a single array
            if labels are unknown.
        threshold: abnormal is score >= threshold; if None, there are no decisions until the reader sets one.
        heat_range: range of the colour scale.
        **values: other variables of the template. base.html needs `title`, `origin` (of the threshold, in words),
            `weak` (whether maps are from detection heads), `made` (how it was made: a mapping, which may be nested).

    Raises:
        InputError: the page cannot be written.
    """
    every = np.concatenate([*scores, [] if threshold is None else [threshold]])
    low, high = (float(every.min()), float(every.max())) if len(every) else (0.0, 1.0)
    decimals = digits(np.concatenate(scores))
    data = {
        "labelled": len(scores) == 2, "threshold": threshold, "range": [low, high], "digits": decimals,
        "scores": [of_class.tolist() for of_class in [*scores, np.zeros(0)][:2]],
    }  # fmt: skip
    stops = [f"rgb({r} {g} {b} / {a / 255:.2f})" for r, g, b, a in heat_colours()[::15].tolist()]
    html = TEMPLATES.get_template(template).render(
        **values, data=data, scale=heat_range, gradient=", ".join(stops), outline=f"rgb{OUTLINE}",
        groups=[list(group) for _, group in groupby(cards, key=itemgetter("group"))], shown=len(cards),
        above=[int((of_class >= (np.inf if threshold is None else threshold)).sum()) for of_class in scores],
        has_outline=any(card["outline"] for card in cards),
        number=lambda value: f"{value:.{decimals}f}",
        place=lambda value: round((value - low) / (high - low or 1), 4),
    )  # fmt: skip
    page = Path(folder) / "index.html"
    with atomic_path(page, "--report") as temporary:  # file names may hold bytes that are not UTF-8
        temporary.write_text(html, encoding="utf-8", errors="backslashreplace")
    return page


# --- a test set ---


def write_page(
    folder: str | Path,
    evaluation: Evaluation,
    masks: Masks | None,
    metrics: Metrics,
    settings: Settings,
    metadata: Mapping[str, Any],
    figures: Mapping[str, Plot],
    obj: str | None = None,
    unknown: str = "",
) -> Path:
    """Write index.html about a test set, the worst errors first; returns its path.

    Args:
        folder: created if needed.
        evaluation: the scores; the gallery has placeholders for images whose file is missing.
        masks: of its images; None if there are none.
        metrics: the result of `measure(..., full=True)`.
        settings: of the checkpoint.
        metadata: of the checkpoint; the page lists all of it.
        figures: the result of `plots`.
        obj: the data set that was tested, if it is not the one trained on.
        unknown: why the patients of the shots are unknown; empty if they are known.

    Raises:
        InputError: the page cannot be written.
    """
    obj = obj or settings.obj
    scores, labels = evaluation.image_scores, evaluation.labels
    threshold, origin = threshold_of(metrics, metadata)
    heat_range = (metadata.get("threshold") or {}).get("heat_range") or calibration.heat_range(evaluation)
    worst = np.argsort(np.where(labels == 1, scores - threshold, threshold - scores), kind="stable")[:MAX_CARDS]
    known, options = settings.to_dict(), shareable(metadata.get("options") or {})
    cards = prefetch(lambda i: _card(i, evaluation, masks, heat_range), worst.tolist(), WORKERS)
    return write(
        folder, "report.html", list(cards), scores=[scores[labels == 0], scores[labels == 1]], threshold=threshold,
        heat_range=heat_range, title=obj, origin=origin, weak=evaluation.head != "seg", settings=settings,
        metadata=metadata, values=metrics.values, metrics=METRICS, unknown=unknown,
        plots={name: {"title": plot.title, "picture": data_uri(plot.png(transparent=True), "PNG")}
               for name, plot in figures.items()},
        made={**known, **metadata, "options": {name: v for name, v in options.items() if name not in known}},
    )  # fmt: skip


def _card(i: int, evaluation: Evaluation, masks: Masks | None, heat_range: Sequence[float]) -> Card:
    """The card of image `i` of a test set."""
    sample, heat = evaluation.samples[i], evaluation.maps([i])[0].cpu().numpy()
    mask = None if masks is None else masks.get([i])[0].cpu().numpy()
    card = {"name": sample.name, "score": float(evaluation.image_scores[i]), "label": sample.label, "group": None}
    return card | layers(read_picture(sample, SIDE), heat, heat_range, mask)
