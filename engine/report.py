"""Figures: a sheet of test images beside their masks and heat maps, on one colour scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from dataset import Sample, load_image, load_mask
from utils import atomic_path

from .plots import Drawing, Picture, Text

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
        """A column an image: the image, its mask's outline and its heat map; without maps the images alone."""
        rows = [row for row in self.rows.values() if row is not None]
        maps = [heat for _, _, heat in rows if heat is not None]
        low, high = (float(min(m.min() for m in maps)), float(max(m.max() for m in maps))) if maps else (0.0, 1.0)
        names = ("image", "mask", "heat map") if maps else ("image",)
        width = SIDE + len(rows) * (TILE + GAP)
        height = CAPTION + len(names) * (TILE + GAP) + (GAP + 32 if maps else 0)
        sheet = Drawing(width, height)
        sheet.marks += [
            Text(0, CAPTION + line * (TILE + GAP) + TILE / 2, name, "muted") for line, name in enumerate(names)
        ]
        for column, (sample, score, heat) in enumerate(rows):
            x = SIDE + column * (TILE + GAP)
            label = "abnormal" if sample.label else "normal"
            stem = Path(sample.name).stem
            stem = stem if len(stem) <= LETTERS else f"...{stem[3 - LETTERS :]}"
            sheet.marks += [Text(x, 12, stem, "muted"), Text(x, 27, f"{label}, {score:.4f}")]
            for line, picture in enumerate(self._pictures(sample, heat, low, high)):
                sheet.marks.append(Picture(x, CAPTION + line * (TILE + GAP), TILE, TILE, Image.fromarray(picture)))
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

    def save(self, path: Path) -> Path:
        """Write the drawing as PNG."""
        with atomic_path(path, "--figures") as temporary:
            self.draw().png(scale=2).save(temporary, "PNG")
        return path

    def _pictures(self, sample: Sample, heat: np.ndarray | None, low: float, high: float) -> list[np.ndarray]:
        image = (load_image(sample.path, self.img_size).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        if heat is None:
            return [image]
        marked = image.copy()
        marked[outline(load_mask(sample, self.img_size).numpy())] = OUTLINE
        glow = colours((heat - low) / max(high - low, 1e-12))
        return [image, marked, (0.45 * image + 0.55 * glow).astype(np.uint8)]


def together(*collectors: OnBatch | None) -> OnBatch:
    """One `on_batch` for `evaluate` that calls each of the collectors that are there."""

    def collect(batch: Sequence[Sample], scores: Tensor, maps: Tensor | None) -> None:
        for collector in collectors:
            if collector is not None:
                collector(batch, scores, maps)

    return collect


def _spread(names: Sequence[str], count: int) -> list[str]:
    """`count` names, evenly spaced."""
    return [names[i] for i in np.unique(np.linspace(0, len(names) - 1, count).round().astype(int))] if names else []
