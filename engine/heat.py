"""Heat maps as pictures and as outlines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import contourpy
import numpy as np
from PIL import Image, ImageDraw

from .report import OUTLINE, colours

LONGEST = 1024  # pixels a side of an overlay


def overlay(
    image: Image.Image, heat: np.ndarray, heat_range: tuple[float, float], regions: Sequence[dict[str, Any]]
) -> Image.Image:
    """The image, blended with its heat map (S, S) in inferno colours over `heat_range`, and the regions' outlines."""
    scale = min(1.0, LONGEST / max(image.size))
    size = tuple(max(1, round(side * scale)) for side in image.size)
    low, high = heat_range
    glow = Image.fromarray(colours(((heat - low) / max(high - low, 1e-12)).clip(0, 1))).resize(size)
    picture = Image.blend(image.resize(size), glow, 0.5)
    draw = ImageDraw.Draw(picture)
    for region in regions:
        points = [(x * scale, y * scale) for x, y in region["points"]]
        draw.line([*points, points[0]], fill=OUTLINE, width=max(1, round(max(size) / 300)))
    return picture


def raw(heat: np.ndarray, high: float) -> Image.Image:
    """A heat map (S, S) in [0, high] as 16-bit gray: score = value / 65535 * high."""
    return Image.fromarray((heat / high * 65535).round().clip(0, 65535).astype(np.uint16))


def contours(heat: np.ndarray, level: float, size: tuple[int, int]) -> list[dict[str, Any]]:
    """The regions where a heat map is at least `level`, largest first.

    Args:
        heat: (S, S).
        level: the threshold.
        size: W, H of the image that the map belongs to.

    Returns:
        For each closed polygon `points` [[x, y], ...] in the image's pixels, (0, 0) being the upper left corner of the
        upper left pixel, its `area` in pixels, negative for a hole, and for a region the `peak` of its heat.
    """
    # Padded twice: once so that a region reaches the image's border, once to close it there.
    padded = np.pad(np.pad(heat.astype(np.float64), 1, "edge"), 1, constant_values=min(float(heat.min()), level) - 1e6)
    factors = np.divide(size, heat.shape[::-1])
    found = []
    for line in contourpy.contour_generator(z=padded).lines(level):
        inside = (line[:-1] - 1.5).clip(0, heat.shape[::-1])  # two of padding, half a pixel to the corner
        points = inside * factors
        x, y = points.T
        area = float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)
        if area:
            columns, rows = inside.min(0).astype(int), np.ceil(inside.max(0)).astype(int)
            peak = float(heat[columns[1] : rows[1], columns[0] : rows[0]].max()) if area > 0 else None
            found.append({"area": round(area, 2), "peak": peak, "points": points.round(2).tolist()})
    return sorted(found, key=lambda region: -abs(region["area"]))
