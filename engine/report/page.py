"""The pages: one HTML file with numbers, figures and a gallery of the images, and nothing from a network.

A page is a template of templates/, filled by jinja2. All extend base.html: style, threshold, a gallery whose heat maps
and outlines can be switched off and whose pictures enlarge on a click, for screens (light, dark, phones) and paper.

    card = {"name": ..., "score": ..., **layers(picture, heat, heat_range)}     for each image
    write(folder, "predictions.html", cards, title=..., ...)                    a page about them

`write_page` shows a test set by report.html.
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

# Of an image: name, score, label (0 normal, 1 abnormal, None: not known), group (the volume or series of which it is a
# slice, shown as a strip in the order of the cards; or None), and its `layers`.
Card = dict[str, Any]
SIDE = 480  # pixels of a picture's longer side: shown at 240 and more, enlarged on a click
HEAT = 60  # pixels a side of a heat map, which the browser enlarges
MAX_CARDS = 1000  # images: some 25 MB
WORKERS = 4  # threads that draw pictures
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True,
    trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
)  # fmt: skip


def layers(
    picture: Image.Image | None, heat: np.ndarray, heat_range: Sequence[float], mask: np.ndarray | None = None
) -> Card:
    """What a card shows of an image, some 25 kB: picture, heat map and outline as data URIs, and the picture's size.

    Args:
        picture: of any size; None where the file is not there.
        heat: (S, S).
        heat_range: of the colours, one for all cards of a page.
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
    """Write index.html.

    Args:
        folder: made if need be.
        template: a file of templates/.
        cards: in the order in which they are shown without JavaScript; cards of one group follow each other.
        scores: of all images, shown or not: of the normal and of the abnormal ones, or one array where labels are not
            known.
        threshold: abnormal is score >= threshold; None: no decisions until one is set by hand.
        heat_range: the colours' ends.
        **values: what else base.html and the template use. base.html: `title`, `origin` (the threshold in words),
            `weak` (the maps are from detection heads), `made` (a mapping, which may be nested, of how it was made).

    Returns:
        The page's path.

    Raises:
        InputError: it cannot be written.
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
    with atomic_path(page, "--report") as temporary:  # a file's name may hold bytes that are no UTF-8
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
    """Write index.html about a test set, the worst errors first.

    Args:
        folder: made if need be.
        evaluation: the scores; where a picture's file is missing the gallery has a placeholder.
        masks: of its images, None without.
        metrics: of `measure(..., full=True)`.
        settings: of the checkpoint.
        metadata: of the checkpoint, all of which is listed.
        figures: of `plots`.
        obj: the data set that was tested, where it is not the one trained on.
        unknown: why the patients of the shots are not known, where they are not.

    Returns:
        The page's path.

    Raises:
        InputError: it cannot be written.
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
    """Of image `i` of a test set."""
    sample, heat = evaluation.samples[i], evaluation.maps([i])[0].cpu().numpy()
    mask = None if masks is None else masks.get([i])[0].cpu().numpy()
    card = {"name": sample.name, "score": float(evaluation.image_scores[i]), "label": sample.label, "group": None}
    return card | layers(read_picture(sample, SIDE), heat, heat_range, mask)
