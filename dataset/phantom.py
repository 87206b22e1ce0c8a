"""Draw a made-up data set in the MVFA layout, so that everything runs before real data are at hand.

    python -m dataset.phantom --out data --obj Brain Chest --valid 20 --test 30

The pictures are drawn with a few formulas and a random generator. They look like their modality at a glance and say
NOTHING about medicine: results on them show that the code works, not that a method does.

Every painter draws the healthy anatomy from one generator and the lesions from another, and a lesion changes pixels
only inside its mask. So an abnormal image equals its healthy twin everywhere outside the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from utils import InputError, Parser, run_cli

# How far a lesion lies from the tissue around it, as a part of the full grey range; drawn anew for every image.
# This is the difficulty: (0.1, 0.2) is hard to see, (0.4, 0.6) is glaring.
CONTRAST = (0.3, 0.5)
FAINT = 0.2  # the part of a pixel's colour that is lesion, below which none is painted; the mask is every pixel above
SPLITS = ("valid", "test")
LABELS = ("good", "Ungood")
SEGMENTED = ("Brain", "Liver", "Retina_RESC")  # the sets that have masks
SHOTS = (1, 2, 4, 8, 16)
MAX_IMAGES = 100_000  # of a class: the names have five digits
MARKER = "PHANTOM.txt"
NOTICE = "synthetic: drawn by dataset/phantom.py, it says nothing about medicine"

Array = np.ndarray
Rng = np.random.Generator
Line = tuple[list[tuple[float, float]], float]  # points, width


# --- shared drawing helpers; coordinates run from -1 to 1, x to the right and y down, whatever the size ---


class Canvas:
    """A picture (S, S) or (S, S, 3), about 0 to 1, and the mask (S, S) of the lesions on it."""

    def __init__(self, image: Array) -> None:
        self.image, self.mask = image, np.zeros(image.shape[:2], bool)

    def paint(self, cover: Array, value: float | Array) -> None:
        """Mix `value` in, in the part that `cover` (S, S) in [0, 1] says."""
        self.image = mix(self.image, cover if self.image.ndim == 2 else cover[..., None], value)

    def lesion(self, cover: Array, value: float | Array) -> None:
        """`paint` where `cover` is at least FAINT; all of that joins the mask."""
        seen = cover >= FAINT
        self.paint(np.where(seen, cover, 0.0), value)
        self.mask = self.mask | seen


Painter = Callable[[int, Rng, "Rng | None"], Canvas]  # size, anatomy, lesions or None


def plane(size: int) -> tuple[Array, Array]:
    """Pixel-centre coordinates x and y, two (size, size) arrays in (-1, 1)."""
    axis = (np.arange(size) + 0.5) * 2 / size - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return x, y


def rotate(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    """The coordinates seen from a frame turned by `angle` radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def shifted(rng: Rng, x: Array, y: Array, shift: float, turn: float) -> tuple[Array, Array]:
    """The coordinates of a body that lies a little beside and turned."""
    return rotate(x - rng.uniform(-shift, shift), y - rng.uniform(-shift, shift), rng.uniform(-turn, turn))


def ellipse(
    x: Array, y: Array, cx: float, cy: float, rx: float, ry: float, angle: float = 0.0, power: float = 2.0
) -> Array:
    """Distance to an ellipse's centre in units of its radius, 1 on its border; `power` above 2 makes it squarer."""
    u, v = rotate(x - cx, y - cy, angle)
    return (np.abs(u / rx) ** power + np.abs(v / ry) ** power) ** (1 / power)


def inside(distance: Array, soft: float = 0.02) -> Array:
    """Coverage in [0, 1]: 1 where distance < -soft, 0 where distance > soft, smooth between."""
    t = np.clip(0.5 - distance / (2 * soft), 0, 1)
    return t * t * (3 - 2 * t)


def mix(image: Array, cover: Array, value: float | Array) -> Array:
    """The image with `value` in the part that `cover` in [0, 1] says."""
    return image + cover * (value - image)


def smooth(rng: Rng, size: int, cells: int) -> Array:
    """Smooth noise (size, size) around 0 with spread about 0.7 and `cells` independent values along a side."""
    grid = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)


def blob(rng: Rng, x: Array, y: Array, cx: float, cy: float, radius: float, rough: float = 0.3) -> Array:
    """Distance (as `ellipse`, less 1) to a stretched, irregular round border of about `radius`."""
    stretch = rng.uniform(1.0, 1.4)
    u, v = rotate(x - cx, y - cy, rng.uniform(0, math.pi))
    u, v = u / stretch, v * stretch
    angle = np.arctan2(v, u)
    border = sum(rough / k * rng.uniform(-1, 1) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in range(2, 7))
    return np.hypot(u, v) / (radius * (1 + border)) - 1


def shrink(canvas: Image.Image, size: int, blur: float) -> Array:
    """Blur a canvas of twice the size (radius in plane units) and average it down to (size, size) in [0, 1]."""
    canvas = canvas.filter(ImageFilter.GaussianBlur(blur * size))
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float64) / 255


def strokes(size: int, lines: Sequence[Line], blur: float) -> Array:
    """Coverage (size, size) in [0, 1] of polylines, each (points, width), blurred; widths and blur in plane units."""
    canvas = Image.new("L", (2 * size, 2 * size))
    pen = ImageDraw.Draw(canvas)
    for points, width in lines:
        pen.line([((px + 1) * size, (py + 1) * size) for px, py in points], 255, max(1, round(width * size)), "curve")
    return shrink(canvas, size, blur)


def branch(rng: Rng, start: tuple[float, float], angle: float, length: float, width: float) -> Iterator[Line]:
    """Polylines of a vessel that leaves `start` towards `angle`, bends and forks into thinner ones."""
    points = [start]
    for _ in range(4):
        angle += rng.normal(0, 0.2)
        px, py = points[-1]
        points.append((px + math.cos(angle) * length / 4, py + math.sin(angle) * length / 4))
    yield points, width
    if width > 0.012:
        for side in (-1, 1):
            yield from branch(rng, points[-1], angle + side * rng.uniform(0.3, 0.8), length * 0.7, width * 0.6)


def spot_in(rng: Rng, cover: Array) -> tuple[float, float]:
    """Choose a random point (x, y) well inside the region that `cover` fills."""
    rows, columns = np.nonzero(cover >= 0.9 * cover.max())
    pick = rng.integers(len(rows))
    return (columns[pick] + 0.5) * 2 / len(cover) - 1, (rows[pick] + 0.5) * 2 / len(cover) - 1


# --- the modalities: a canvas in [0, 1], `ill` draws the lesions ---


def brain(size: int, rng: Rng, ill: Rng | None) -> Canvas:
    """An axial MRI slice; the lesion is an irregular tumour, bright or ring-shaped, some with oedema."""
    x, y = plane(size)
    u, v = shifted(rng, x, y, 0.05, 0.2)
    r = ellipse(u, v, 0, 0, rng.uniform(0.68, 0.78), rng.uniform(0.82, 0.92)) + 0.012 * smooth(rng, size, 6)
    canvas = Canvas(0.02 + mix(inside(r - 1) * 0.36, inside(r - 0.95), 0.06))  # scalp, then the dark bone
    tissue = inside(r - 0.88)
    white = inside(r + 0.14 * np.abs(smooth(rng, size, 16)) - rng.uniform(0.76, 0.8), 0.05)
    matter = Canvas(mix(np.full_like(r, 0.36), white, 0.46))
    folds = np.exp(-((smooth(rng, size, 18) / 0.16) ** 2)) * np.clip((r - 0.5) / 0.25, 0, 1)
    cleft = inside(np.abs(u + 0.015 * smooth(rng, size, 8)) - 0.012) * inside(0.3 - np.abs(v))
    matter.paint(0.8 * folds, 0.18)
    matter.paint(cleft, 0.15)
    width, length = rng.uniform(0.04, 0.08), rng.uniform(0.13, 0.22)
    for side in (-1, 1):
        matter.paint(inside(ellipse(u, v, side * 0.2, 0.08, 0.1, 0.17, -side * 0.3) - 1, 0.2), 0.4)
        for cy, out, lean in ((-0.14, 0.04, 0.3), (0.18, 0.14, -0.5)):  # front and back horn of a ventricle
            horn = ellipse(u, v, side * (width + out), cy, width, length, side * lean)
            matter.paint(inside(horn - 1, 0.12), 0.1)
    canvas.paint(tissue, matter.image * (1 + 0.03 * smooth(rng, size, 3)))
    if ill:
        contrast = ill.uniform(*CONTRAST)
        distance = blob(ill, x, y, *spot_in(ill, inside(r - 0.66)), ill.uniform(0.15, 0.34))
        texture = 0.06 * smooth(ill, size, 20)
        if ill.random() < 0.5:
            oedema = inside(distance - ill.uniform(0.2, 0.5) + 0.12 * smooth(ill, size, 12), 0.25)
            canvas.lesion(oedema * tissue, 0.45 + 0.5 * contrast + texture)
        hollow = ill.random() < 0.2
        core = 0.4 - 0.7 * contrast if hollow else 0.47 + contrast
        canvas.lesion(inside(distance, 0.12) * tissue, core + texture)
        if hollow:
            rim = np.abs(distance + 0.15 + 0.08 * smooth(ill, size, 10)) - ill.uniform(0.1, 0.2)
            canvas.lesion(inside(rim, 0.12) * tissue, 0.47 + contrast + texture)
    canvas.image = canvas.image + 0.025 * rng.standard_normal(r.shape)
    return canvas


def liver(size: int, rng: Rng, ill: Rng | None) -> Canvas:
    """An axial CT slice of the upper abdomen; the lesions are one to four dark nodules in the liver."""
    x, y = plane(size)
    u, v = shifted(rng, x, y, 0.03, 0.08)
    r = ellipse(u, v, 0, 0, rng.uniform(0.88, 0.95), rng.uniform(0.7, 0.78), power=2.3)
    wall = r - rng.uniform(0.86, 0.92)
    canvas = Canvas(mix(0.02 + inside(r - 1) * 0.2, inside(wall), 0.45))  # skin and fat, then muscle
    cavity = inside(wall + 0.07)
    canvas.paint(cavity, 0.22 + 0.04 * smooth(rng, size, 10))
    beads = np.cos(np.arctan2(v, u) * rng.integers(8, 12) + rng.uniform(0, 6.3)) + 0.3 * smooth(rng, size, 4)
    canvas.paint(inside(np.abs(wall + 0.035) - 0.025) * inside(0.5 - beads, 0.15), 0.85)  # ribs
    stomach = inside(blob(rng, u, v, 0.38, -0.28, 0.24, 0.15), 0.05) * cavity
    canvas.paint(stomach, 0.42)
    canvas.paint(stomach * inside(v + rng.uniform(0.3, 0.4)), 0.03)  # its air lies above
    canvas.paint(inside(blob(rng, u, v, 0.62, 0.18, 0.17, 0.2), 0.08) * cavity, 0.58)  # spleen
    for side in (-1, 1):
        kidney = ellipse(u, v, side * 0.36, 0.38, 0.1, 0.13, side * 0.4)
        canvas.paint(inside(kidney - 1, 0.1), 0.66)
        canvas.paint(inside(kidney - 0.45, 0.2), 0.4)
    right, left = blob(rng, u, v, -0.4, -0.05, rng.uniform(0.42, 0.48), 0.2), blob(rng, u, v, -0.05, -0.32, 0.25, 0.2)
    lobe = inside(np.minimum(right, left), 0.04) * inside(wall + 0.09)
    canvas.paint(lobe, rng.uniform(0.56, 0.62) + 0.015 * smooth(rng, size, 30))
    vessels = [*branch(rng, (-0.15, 0.02), 3.3, 0.3, 0.035), *branch(rng, (-0.2, -0.15), 4.0, 0.28, 0.03)]
    canvas.paint(0.8 * strokes(size, vessels, 0.008) * lobe, 0.74)
    spine: list[Line] = [([(0, 0.42), (0, 0.62)], 0.05), ([(-0.18, 0.5), (0, 0.46), (0.18, 0.5)], 0.05)]
    canvas.paint(strokes(size, spine, 0.008), 0.9)
    # Vertebra with its core and canal, then the two large vessels before it.
    for cx, cy, rx, ry, value in ((0, 0.34, 0.13, 0.11, 0.95), (0, 0.34, 0.1, 0.08, 0.75), (0, 0.48, 0.06, 0.045, 0.4),
                                  (0.1, 0.16, 0.055, 0.055, 0.74), (-0.12, 0.16, 0.05, 0.05, 0.74)):  # fmt: skip
        canvas.paint(inside(ellipse(u, v, cx, cy, rx, ry) - 1, 0.1), value)
    if ill:
        contrast = ill.uniform(*CONTRAST)
        for _ in range(ill.integers(1, 5)):
            spot, radius, rough = spot_in(ill, lobe), ill.uniform(0.07, 0.2), ill.choice([0.05, 0.35])
            distance = blob(ill, x, y, *spot, radius, rough)
            tone = 0.58 - contrast * ill.uniform(0.85, 1.1) + 0.03 * smooth(ill, size, 24)
            canvas.lesion(inside(distance, 0.15) * lobe, tone)
    canvas.image = canvas.image + 0.035 * rng.standard_normal(r.shape)
    return canvas


# Depth and brightness of the retina's layers: 0 is its inner surface, 1 the pigment epithelium, then comes the choroid.
LAYERS = np.array([
    (-0.02, 0.05), (0, 0.7), (0.09, 0.62), (0.13, 0.45), (0.3, 0.5), (0.34, 0.28), (0.43, 0.3), (0.46, 0.55),
    (0.5, 0.5), (0.54, 0.25), (0.8, 0.24), (0.83, 0.4), (0.85, 0.28), (0.88, 0.75), (0.91, 0.6), (0.94, 0.95),
    (1, 0.9), (1.04, 0.5), (1.3, 0.4), (1.7, 0.1),
])  # fmt: skip


def retina(size: int, rng: Rng, ill: Rng | None, kinds: Sequence[str]) -> Canvas:
    """An OCT B-scan of the macula; the lesions are one or two of `kinds`: "pockets", "detachment", "drusen"."""
    x, y = plane(size)
    column = x[0]
    base = rng.uniform(0.16, 0.28) + rng.uniform(-0.1, 0.1) * column + rng.uniform(-0.05, 0.1) * column**2
    thick = rng.uniform(0.52, 0.6) + 0.015 * smooth(rng, size, 5)[0]
    fovea = (column - rng.uniform(-0.25, 0.25)) / rng.uniform(0.16, 0.24)
    thick = thick * (1 - rng.uniform(0.35, 0.5) * np.exp(-(fovea**2)))
    depth = (y - base) / thick + 1
    choroid = inside(1.05 - depth, 0.03)
    canvas = Canvas(np.interp(depth, *LAYERS.T))
    canvas.image *= 1 + 0.35 * choroid * np.clip(smooth(rng, size, 22), -1, 1) + 0.06 * smooth(rng, size, 6)
    if ill:
        contrast = ill.uniform(*CONTRAST)
        dark = max(0.3 - 0.55 * contrast, 0.02)
        chosen = ill.choice(kinds, ill.integers(1, 3), replace=False)
        room = inside(np.abs(depth - 0.5) - 0.36, 0.04)
        for _ in range(ill.integers(2, 6) * ("pockets" in chosen)):
            spot = spot_in(ill, room * (np.abs(x) < 0.8))
            canvas.lesion(inside(blob(ill, x, y, *spot, ill.uniform(0.08, 0.18), 0.2), 0.12) * room, dark)
        mounds = [(ill.uniform(0.3, 0.7), ill.uniform(0.2, 0.36), dark)] * ("detachment" in chosen)
        for _ in range(ill.integers(3, 7) * ("drusen" in chosen)):
            half = ill.uniform(0.14, 0.3)
            mounds.append((half, half * ill.uniform(0.6, 0.9), 0.3 + contrast))
        for half, height, value in mounds:
            bump = height * np.clip(1 - ((column - ill.uniform(-0.7, 0.7)) / half) ** 2, 0, None) ** 0.8
            roof = base - 0.03 - np.minimum(bump, 0.6 * thick)
            cap = np.exp(-(((y - roof - 0.02) / 0.02) ** 2))
            cover = inside(np.maximum(roof - y, y - base), 0.015) * (bump > 0.01)
            canvas.lesion(cover, mix(np.full_like(y, value), cap, 0.95))
    speckle = rng.gamma(6.0, 1 / 6.0, x.shape)
    canvas.image = canvas.image * (0.4 + 0.6 * speckle) + 0.02 * rng.random(x.shape)
    return canvas


def chest(size: int, rng: Rng, ill: Rng | None) -> Canvas:
    """A frontal chest film; the lesions are fluffy opacities in the lungs or fluid at a lung's base."""
    x, y = plane(size)
    u, v = shifted(rng, x, y, 0.04, 0.05)
    shoulder = 0.24 + 0.72 * np.clip((v + rng.uniform(0.86, 0.95)) / 0.3, 0, 1) ** 0.5
    body = 0.03 + inside(np.abs(u) - shoulder, 0.03) * (rng.uniform(0.53, 0.57) + 0.1 * v)
    lung = np.zeros_like(u)
    wide, tall = rng.uniform(0.33, 0.36), rng.uniform(0.76, 0.82)
    for side in (-1, 1):
        field = ellipse((u - side * 0.44) / (1 + 0.25 * v), v, 0, 0.02, wide, tall, power=2.4)
        floor = 0.72 - 0.04 * side - 0.14 * np.cos((u - side * 0.4) * 3)
        lung = np.maximum(lung, inside(field - 1, 0.05) * inside(v - floor, 0.03))
    heart = ellipse(u, v, rng.uniform(0.1, 0.16), 0.32, rng.uniform(0.3, 0.38), rng.uniform(0.24, 0.3), 0.6)
    middle = np.maximum(inside(heart - 1, 0.12), inside(np.abs(u) - 0.13 - 0.03 * np.cos(6 * v), 0.06))
    lung = lung * (1 - middle)
    image = mix(body, lung, rng.uniform(0.14, 0.18))
    image += 0.08 * middle * inside(v - 0.6, 0.3) + 0.04 * inside(np.abs(u) - 0.06, 0.02)
    twigs, ribs, collar = list[Line](), list[Line](), list[Line]()
    gap, t = rng.uniform(0.15, 0.18), np.linspace(0, math.pi * 0.62, 12)
    for side in (-1, 1):
        for angle in (-1.0, -0.3, 0.4, 1.1):
            twigs += branch(rng, (side * 0.16, 0.02), math.pi * (side < 0) + side * angle, 0.26, 0.028)
        for step in np.arange(-0.64, 0.86, gap):
            arc = np.stack([side * (0.1 + 0.66 * np.sin(t)), step - 0.22 * np.cos(t * 1.2)], axis=1)
            ribs.append((arc.tolist(), 0.05))
        collar.append(([(side * 0.06, -0.66), (side * 0.35, -0.74), (side * 0.75, -0.82)], 0.06))
    image += 0.16 * lung * strokes(size, twigs, 0.01) + 0.13 * strokes(size, collar, 0.012)
    image += 0.08 * strokes(size, ribs, 0.014) * inside(v - 0.6, 0.2) * (1 - 0.7 * middle)
    image *= 1 + 0.02 * smooth(rng, size, 4)
    canvas = Canvas(image)
    if ill:
        value = image + 0.05 + 0.8 * ill.uniform(*CONTRAST)  # added, so that ribs and vessels show through
        if ill.random() < 0.2:
            level = ill.uniform(-0.2, 0.2) - 0.5 * np.clip(np.abs(u) - 0.35, 0, None) ** 1.5
            canvas.lesion(inside(level - v, 0.05) * lung * (u * ill.choice([-1, 1]) > 0), value)
        for _ in range(0 if canvas.mask.any() else ill.integers(2, 6)):
            distance = blob(ill, x, y, *spot_in(ill, lung), ill.uniform(0.18, 0.42))
            fluff = inside(distance + 0.25 * smooth(ill, size, 14), 0.35)
            canvas.lesion(0.9 * fluff * lung, value + 0.05 * smooth(ill, size, 24))
    canvas.image = canvas.image + 0.02 * rng.standard_normal(u.shape)
    return canvas


def nuclei(rng: Rng, size: int, count: int, radius: tuple[float, float]) -> Array:
    """Density (size, size) in [0, 1] of `count` oval nuclei at random places, radii in plane units."""
    canvas = Image.new("L", (2 * size, 2 * size))
    pen = ImageDraw.Draw(canvas)
    circle = np.linspace(0, 2 * math.pi, 14)
    for _ in range(count):
        long, flat = rng.uniform(*radius), rng.uniform(0.55, 1)
        ex, ey = rotate(long * np.cos(circle), long * flat * np.sin(circle), rng.uniform(0, math.pi))
        outline = (np.stack([ex, ey], axis=1) + rng.uniform(-1.02, 1.02, 2) + 1) * size
        pen.polygon(outline.ravel().tolist(), int(rng.integers(150, 256)))
    return shrink(canvas, size, 0.006)


def histology(size: int, rng: Rng, ill: Rng | None) -> Canvas:
    """A stained tissue tile in colour; the lesion is a nest of crowded, large, dark nuclei."""
    x, y = plane(size)
    u, _ = rotate(x, y, rng.uniform(0, math.pi))
    fibre = np.sin(rng.uniform(14, 22) * u + 3.0 * smooth(rng, size, 5)) + 0.8 * smooth(rng, size, 40)
    gap = inside(0.75 - smooth(rng, size, 7), 0.12)
    pink, purple = np.array([[0.88, 0.66, 0.78], [0.42, 0.26, 0.55]]) + rng.uniform(-0.03, 0.03, (2, 3))
    canvas = Canvas(pink + 0.05 * fibre[..., None] * np.array([0.5, 1.0, 0.6]))
    canvas.paint(gap, np.array([0.95, 0.92, 0.94]))
    canvas.paint(0.85 * nuclei(rng, size, int(rng.integers(90, 200)), (0.025, 0.04)) * (1 - gap), purple)
    if ill:
        contrast = ill.uniform(*CONTRAST)
        cx, cy = ill.uniform(-0.5, 0.5, 2)
        nest = blob(ill, x, y, cx, cy, ill.uniform(0.2, 0.75))
        cover = inside(nest + 0.15 * smooth(ill, size, 12), 0.08)
        tumour = np.array([0.76, 0.54, 0.75]) - 0.15 * contrast + 0.04 * smooth(ill, size, 40)[..., None]
        crowd = nuclei(ill, size, int(ill.integers(300, 500)), (0.04, 0.065))
        canvas.lesion((0.5 + contrast) * cover, mix(tumour, crowd[..., None], purple - 0.3 * contrast))
    canvas.image = canvas.image + 0.02 * rng.standard_normal(canvas.image.shape)
    return canvas


PAINTERS: dict[str, Painter] = {
    "Brain": brain,
    "Liver": liver,
    "Retina_RESC": partial(retina, kinds=("pockets", "detachment")),
    "Retina_OCT2017": partial(retina, kinds=("pockets", "detachment", "drusen")),
    "Chest": chest,
    "Histopathology": histology,
}


def paint(key: Sequence[int], obj: str, size: int, abnormal: bool) -> tuple[Array, Array]:
    """Paint what `key` seeds, with (`abnormal`) or without its lesions: uint8 image and bool mask (size, size)."""
    anatomy, lesions = np.random.default_rng([*key, 0]), np.random.default_rng([*key, 1])
    canvas = PAINTERS[obj](size, anatomy, lesions if abnormal else None)
    return np.round(np.clip(canvas.image, 0, 1) * 255).astype(np.uint8), canvas.mask


def draw(obj: str, split: str, label: str, index: int, seed: int, size: int) -> tuple[Array, Array]:
    """One picture, which depends on nothing but these arguments.

    Returns:
        The uint8 image, (size, size) or for Histopathology (size, size, 3), and the bool mask (size, size): the pixels
        that a lesion has changed, all False for label "good".
    """
    key = (seed, list(PAINTERS).index(obj), SPLITS.index(split), LABELS.index(label), index)
    return paint(key, obj, size, abnormal=label == "Ungood")


def write_object(folder: Path, obj: str, counts: dict[str, int], seed: int, size: int) -> None:
    """Write one data set into `folder`, in place of an earlier phantom's pictures, masks and shot lists."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = f"--obj {obj} --valid {counts['valid']} --test {counts['test']} --seed {seed} --size {size}"
    # First, so that a run that was cut off can be repeated.
    (folder / MARKER).write_text(f"{NOTICE}\n{arguments}\n", encoding="utf-8")
    old = [f"{split}/{label}/*/{split}_{label}_*.png" for split in SPLITS for label in LABELS]
    for path in [path for pattern in (*old, "fewshot_seed/my*-shot.txt") for path in folder.glob(pattern)]:
        path.unlink()
    for split, count in counts.items():
        for label in LABELS:
            images, masks = folder / split / label / "img", folder / split / label / "anomaly_mask"
            images.mkdir(parents=True, exist_ok=True)
            with_masks = obj in SEGMENTED and label == "Ungood"
            if with_masks:
                masks.mkdir(exist_ok=True)
            bar = tqdm(range(count), f"{obj} {split} {label}", unit="image", mininterval=1, delay=3, disable=None)
            for index in bar:
                name = f"{split}_{label}_{index:05d}.png"
                image, mask = draw(obj, split, label, index, seed, size)
                Image.fromarray(image).save(images / name)
                if with_masks:
                    Image.fromarray(mask.astype(np.uint8) * 255).save(masks / name)
    lists = folder / "fewshot_seed"
    lists.mkdir(exist_ok=True)
    for shot in (shot for shot in SHOTS if shot <= counts["valid"]):
        words = {label: " ".join(f"valid_{label}_{index:05d}.png" for index in range(shot)) for label in LABELS}
        (lists / f"my{shot}-shot.txt").write_text(f"a-0: {words['Ungood']}\nn-0: {words['good']}\n", encoding="utf-8")


def write(out: str | Path, objs: Sequence[str], valid: int, test: int, seed: int, size: int) -> None:
    """Write the data sets `objs` below `out`, with `valid` and `test` images a class; size in pixels.

    Raises:
        InputError: for a wrong argument, a folder that is there but is no phantom (nothing has been written by then),
            or one that cannot be written.
    """
    folders = {obj: Path(out) / f"{obj}_AD" for obj in objs}
    for obj, folder in folders.items():
        if obj not in PAINTERS:
            raise InputError(f"--obj {obj}: unknown, choose from {', '.join(PAINTERS)}")
        if folder.exists() and not (folder / MARKER).is_file():
            raise InputError(f"{folder} exists and is not a phantom; choose another --out")
    if size > 4096:
        raise InputError(f"--size {size}: must be at most 4096")
    for flag, value in (("--valid", valid), ("--test", test)):
        if value > MAX_IMAGES:
            raise InputError(f"{flag} {value}: must be at most {MAX_IMAGES}")
    for flag, value, least in (("--valid", valid, 0), ("--test", test, 0), ("--seed", seed, 0), ("--size", size, 32)):
        if value < least:
            raise InputError(f"{flag} {value}: must be at least {least}")
    for obj, folder in folders.items():
        try:
            write_object(folder, obj, {"valid": valid, "test": test}, seed, size)
        except OSError as error:
            raise InputError(f"--out {out}: cannot write {error.filename or folder}: {error.strerror}") from error
        print(f"{folder}: valid {valid} good + {valid} Ungood, test {test} good + {test} Ungood, {size} px")
    print(NOTICE)


def main() -> None:
    """Read the command line and write the data sets."""
    parser = Parser(prog="python -m dataset.phantom", description=f"Draw a data set ({NOTICE}).")
    parser.add_argument("--out", default="data", help="folder that will hold <obj>_AD (default: data)")
    parser.add_argument(
        "--obj", nargs="+", default=list(PAINTERS), metavar="OBJ", help=f"of {', '.join(PAINTERS)} (all)"
    )
    parser.add_argument("--valid", type=int, default=20, help="images a class in valid/ (20)")
    parser.add_argument("--test", type=int, default=30, help="images a class in test/ (30)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pictures (0)")
    parser.add_argument("--size", type=int, default=240, help="height and width in pixels (240)")
    args = parser.parse_args()
    write(args.out, args.obj, args.valid, args.test, args.seed, args.size)


if __name__ == "__main__":
    run_cli(main)
