"""Figures: a sheet of test images beside their masks and heat maps, on one colour scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from dataset import Sample, load_image, load_mask
from utils import atomic_path

TILE = 200  # pixels a side
CAPTION = 30
MARGIN = 8
SCALE_HEIGHT = 40
# Anchors of the `inferno` colour map (matplotlib, CC0): bright is abnormal.
INFERNO = np.array([
    (0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51), (249, 140, 10),
    (249, 201, 50), (252, 255, 164),
])  # fmt: skip


def colours(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] of any shape (...) -> RGB (..., 3) uint8."""
    places = np.linspace(0, 1, len(INFERNO))
    return np.stack([np.interp(values, places, channel) for channel in INFERNO.T], axis=-1).round().astype(np.uint8)


def outline(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask (S, S) bool that touch a pixel outside it."""
    inner = mask.copy()
    for axis in (0, 1):
        for shift in (-1, 1):
            inner &= np.roll(mask, shift, axis)
    return mask & ~inner


class Sheet:
    """Collects a handful of images while an evaluation runs (`evaluate(..., on_batch=sheet)`), then draws them.

    Args:
        samples: what will be evaluated; `count` of them are shown, evenly spaced over each class.
        img_size: pixels a side of the maps.
        count: rows of the sheet, two thirds of them abnormal.
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

    def save(self, path: Path) -> Path:
        """Draw image, mask outline and heat map side by side, a row an image; without maps the images alone.

        `InputError` naming --figures where `path` cannot be written.
        """
        rows = [row for row in self.rows.values() if row is not None]
        maps = [heat for _, _, heat in rows if heat is not None]
        columns = 3 if maps else 1
        low, high = (min(m.min() for m in maps), max(m.max() for m in maps)) if maps else (0.0, 1.0)
        per_line = 1 if maps else 3
        lines = -(-len(rows) // per_line)
        width = per_line * columns * (TILE + MARGIN) + MARGIN
        height = lines * (TILE + CAPTION + MARGIN) + (SCALE_HEIGHT if maps else 0) + MARGIN
        canvas = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(canvas)
        for index, (sample, score, heat) in enumerate(rows):
            line, place = divmod(index, per_line)
            x, y = MARGIN + place * (TILE + MARGIN), MARGIN + line * (TILE + CAPTION + MARGIN)
            label = "abnormal" if sample.label else "normal"
            draw.text((x, y), f"{Path(sample.name).name}\n{label}, score {score:.4f}", fill="black")
            for column, picture in enumerate(self._pictures(sample, heat, low, high)):
                tile = Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.BILINEAR)
                canvas.paste(tile, (x + column * (TILE + MARGIN), y + CAPTION))
        if maps:
            self._draw_scale(canvas, draw, low, high)
        with atomic_path(path, "--figures") as temporary:
            canvas.save(temporary, "PNG")
        return path

    def _pictures(self, sample: Sample, heat: np.ndarray | None, low: float, high: float) -> list[np.ndarray]:
        image = (load_image(sample.path, self.img_size).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        if heat is None:
            return [image]
        marked = image.copy()
        marked[outline(load_mask(sample, self.img_size).numpy())] = (0, 255, 0)
        glow = colours((heat - low) / max(high - low, 1e-12))
        return [image, marked, (0.45 * image + 0.55 * glow).astype(np.uint8)]

    @staticmethod
    def _draw_scale(canvas: Image.Image, draw: ImageDraw.ImageDraw, low: float, high: float) -> None:
        width, y = canvas.width - 2 * MARGIN, canvas.height - SCALE_HEIGHT
        bar = np.tile(colours(np.linspace(0, 1, width)), (12, 1, 1))
        canvas.paste(Image.fromarray(bar), (MARGIN, y))
        draw.text((MARGIN, y + 16), f"{low:.4f}", fill="black")
        draw.text((canvas.width // 2, y + 16), "anomaly score of a pixel, one scale for all", fill="black", anchor="ma")
        draw.text((canvas.width - MARGIN, y + 16), f"{high:.4f}", fill="black", anchor="ra")


def _spread(names: Sequence[str], count: int) -> list[str]:
    """`count` names, evenly spaced."""
    return [names[i] for i in np.unique(np.linspace(0, len(names) - 1, count).round().astype(int))] if names else []
