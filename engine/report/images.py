"""Pictures in reports: thumbnails, heat maps in colour, overlays, outlines and contours.

Pictures are RGB Pillow images with the aspect ratio of their file. Heat maps (S, S) are those of the image resized to a
square; they are resized back to the image's shape.
"""

import base64
import io
from collections.abc import Sequence
from functools import cache
from typing import Any

import contourpy
import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage

from dataset.readers.images import Sample, read
from utils import InputError

COLOUR_MAP = "inferno"  # abnormal is bright, also in greyscale and for every kind of colour vision
OUTLINE = (0, 229, 200)
HEAT_OPACITY = 0.75  # opacity of the highest heat
CLEAR = 60  # opacities (of 255) rise from -CLEAR and are cut off at 0, so that low heat is fully transparent
Size = tuple[int, int]  # width and height


def read_picture(sample: Sample, longest: int) -> Image.Image | None:
    """A test image, resized so that its longer side has `longest` pixels; None if its file cannot be read.

    The file may be missing: an evaluation loaded with --scores can be viewed without its data set.
    """
    try:
        return ImageOps.contain(read(sample).image, (longest, longest), Image.Resampling.BICUBIC)
    except (InputError, OSError):
        return None


@cache
def heat_colours() -> np.ndarray:
    """Red, green, blue and opacity of heat from low to high, (256, 4) uint8; low heat leaves the anatomy visible."""
    rgba = np.array(colormaps[COLOUR_MAP](np.arange(256), bytes=True))
    rgba[:, 3] = np.linspace(-CLEAR, HEAT_OPACITY * 255, 256).clip(0).round()
    return rgba


def heat_picture(heat: np.ndarray, heat_range: Sequence[float]) -> Image.Image:
    """A heat map (S, S) as a palette image, with `heat_colours` spread over `heat_range`."""
    low, high = heat_range
    steps = (heat.astype(np.float64) - low) / max(high - low, 1e-12) * 255
    picture = Image.fromarray(steps.round().clip(0, 255).astype(np.uint8))
    picture.putpalette(heat_colours().tobytes(), "RGBA")
    return picture


def alpha_blend(image: Image.Image, heat: np.ndarray, heat_range: Sequence[float]) -> Image.Image:
    """The image under its heat map (S, S), coloured over `heat_range`."""
    stretched = Image.fromarray(heat.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    layer = heat_picture(np.asarray(stretched), heat_range).convert("RGBA")
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def outline(mask: np.ndarray, width: int = 1) -> np.ndarray:
    """The outline of a mask (H, W) bool: its pixels within `width` of a pixel outside it, or of the image's border."""
    return mask & ~ndimage.binary_erosion(mask, iterations=width) if mask.any() else mask


def fit_mask(mask: np.ndarray, size: Size) -> np.ndarray:
    """A mask (S, S) bool resized to a picture of `size` (W, H): (H, W) bool."""
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def draw_outline(image: Image.Image, mask: np.ndarray, width: int = 1) -> Image.Image:
    """A copy of the image with the outline of its mask (S, S) bool."""
    pixels = np.array(image)
    pixels[outline(fit_mask(mask, image.size), width)] = OUTLINE
    return Image.fromarray(pixels)


def overlay(
    image: Image.Image, heat: np.ndarray, heat_range: Sequence[float], regions: Sequence[dict[str, Any]], size: Size
) -> Image.Image:
    """The image under its heat map (S, S) and the outlines of `contours`, given in pixels of an image of `size`."""
    picture = alpha_blend(image, heat, heat_range)
    draw, scale = ImageDraw.Draw(picture), np.divide(picture.size, size)
    for region in regions:
        points = [tuple(point) for point in np.array(region["points"]) * scale]
        draw.line([*points, points[0]], fill=OUTLINE, width=max(1, round(max(picture.size) / 300)))
    return picture


def raw(heat: np.ndarray, high: float) -> Image.Image:
    """A heat map (S, S) in [0, high] as 16-bit grey: score = value / 65535 * high."""
    return Image.fromarray((heat / high * 65535).round().clip(0, 65535).astype(np.uint16))


def contours(heat: np.ndarray, level: float, size: Size) -> list[dict[str, Any]]:
    """The regions where a heat map is at least `level`, largest first.

    Args:
        heat: (S, S).
        level: the threshold.
        size: W, H of the image that the map belongs to.

    Returns:
        For each closed polygon: `points`, [[x, y], ...] in the image's pixels, where (0, 0) is the upper left corner of
        the upper left pixel; `area` in pixels, negative for a hole; `peak`, a region's highest heat, None for a hole.
    """
    # Padded twice: with copies of the edge, so that regions reach the border; with low values, to close them there.
    padded = np.pad(np.pad(heat.astype(np.float64), 1, "edge"), 1, constant_values=min(float(heat.min()), level) - 1e6)
    labels, count = ndimage.label(padded >= level, np.ones((3, 3)))
    peaks = ndimage.maximum(padded, labels, range(count + 1))
    regions = []
    for line in map(np.asarray, contourpy.contour_generator(z=padded).lines(level)):
        inside = (line[:-1] - 1.5).clip(0, heat.shape[::-1])  # -2 for padding, +0.5 from centres to corners
        points = inside * np.divide(size, heat.shape[::-1])
        x, y = points.T
        area = float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)
        if area:
            columns, rows = np.stack([np.floor(line[0]), np.ceil(line[0])]).astype(int).T  # one is outside: label 0
            peak = float(peaks[labels[rows, columns].max()]) if area > 0 else None
            regions.append({"area": round(area, 2), "peak": peak, "points": points.round(2).tolist()})
    return sorted(regions, key=lambda region: -abs(region["area"]))


def data_uri(picture: Image.Image | bytes, kind: str, **options: Any) -> str:  # noqa: ANN401 - Pillow's options
    """A picture, or the bytes of its file, as a data URI for an <img>; without any metadata of the original."""
    if isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        picture = buffer.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(picture).decode()}"
