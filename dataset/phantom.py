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
# The mask: every pixel whose colour is at least this part lesion. Below it, the lesion is not painted at all.
FAINT = 0.2

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
Painter = Callable[[int, Rng, "Rng | None"], "tuple[Array, Array]"]  # (size, anatomy, lesions or None) -> image, mask


# --- shared drawing helpers; coordinates run from -1 to 1, x to the right and y down, whatever the size ---


def plane(size: int) -> tuple[Array, Array]:
    """Pixel-centre coordinates x and y, two (size, size) arrays in (-1, 1)."""
    axis = (np.arange(size) + 0.5) * 2 / size - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return x, y


def rotate(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    """Return the coordinates seen from a frame turned by `angle` radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


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


def alpha_blend(image: Array, cover: Array, value: float | Array) -> Array:
    """Mix `value` into the image, in the part that `cover` in [0, 1] says."""
    return image + cover * (value - image)


def add_lesion(image: Array, mask: Array, cover: Array, value: float | Array) -> tuple[Array, Array]:
    """`alpha_blend` a lesion: nothing where `cover` (size, size) < FAINT; everything else joins the mask."""
    seen = cover >= FAINT
    cover = np.where(seen, cover, 0.0)
    return alpha_blend(image, cover if image.ndim == 2 else cover[..., None], value), mask | seen


def spot_in(rng: Rng, cover: Array) -> tuple[float, float]:
    """Choose a random point (x, y) well inside the region that `cover` fills."""
    rows, columns = np.nonzero(cover >= 0.9 * cover.max())
    pick = rng.integers(len(rows))
    return (columns[pick] + 0.5) * 2 / len(cover) - 1, (rows[pick] + 0.5) * 2 / len(cover) - 1


# --- the modalities; each returns the image, (size, size) or (size, size, 3) in [0, 1], and its lesion mask ---


def brain(size: int, rng: Rng, lesion_rng: Rng | None) -> tuple[Array, Array]:
    """Draw an axial MRI slice; the lesion is an irregular tumour, bright or ring-shaped, some with oedema."""
    x, y = plane(size)
    u, v = rotate(x - rng.uniform(-0.05, 0.05), y - rng.uniform(-0.05, 0.05), rng.uniform(-0.2, 0.2))
    r = ellipse(u, v, 0, 0, rng.uniform(0.68, 0.78), rng.uniform(0.82, 0.92)) + 0.012 * smooth(rng, size, 6)
    image = 0.02 + alpha_blend(inside(r - 1) * 0.36, inside(r - 0.95), 0.06)  # scalp, then the dark bone
    tissue = inside(r - 0.88)
    white = inside(r + 0.14 * np.abs(smooth(rng, size, 16)) - rng.uniform(0.76, 0.8), 0.05)
    matter = alpha_blend(np.full_like(r, 0.36), white, 0.46)
    folds = np.exp(-((smooth(rng, size, 18) / 0.16) ** 2)) * np.clip((r - 0.5) / 0.25, 0, 1)
    cleft = inside(np.abs(u + 0.015 * smooth(rng, size, 8)) - 0.012) * inside(0.3 - np.abs(v))
    matter = alpha_blend(alpha_blend(matter, 0.8 * folds, 0.18), cleft, 0.15)
    width, length = rng.uniform(0.04, 0.08), rng.uniform(0.13, 0.22)
    for side in (-1, 1):
        matter = alpha_blend(matter, inside(ellipse(u, v, side * 0.2, 0.08, 0.1, 0.17, -side * 0.3) - 1, 0.2), 0.4)
        for cy, out, lean in ((-0.14, 0.04, 0.3), (0.18, 0.14, -0.5)):  # front and back horn of a ventricle
            horn = ellipse(u, v, side * (width + out), cy, width, length, side * lean)
            matter = alpha_blend(matter, inside(horn - 1, 0.12), 0.1)
    image = alpha_blend(image, tissue, matter * (1 + 0.03 * smooth(rng, size, 3)))
    mask = np.zeros(r.shape, bool)
    if lesion_rng is not None:
        contrast = lesion_rng.uniform(*CONTRAST)
        distance = blob(lesion_rng, x, y, *spot_in(lesion_rng, inside(r - 0.66)), lesion_rng.uniform(0.15, 0.34))
        texture = 0.06 * smooth(lesion_rng, size, 20)
        if lesion_rng.random() < 0.5:
            oedema = inside(distance - lesion_rng.uniform(0.2, 0.5) + 0.12 * smooth(lesion_rng, size, 12), 0.25)
            image, mask = add_lesion(image, mask, oedema * tissue, 0.45 + 0.5 * contrast + texture)
        hollow = lesion_rng.random() < 0.2
        core = 0.4 - 0.7 * contrast if hollow else 0.47 + contrast
        image, mask = add_lesion(image, mask, inside(distance, 0.12) * tissue, core + texture)
        if hollow:
            rim = np.abs(distance + 0.15 + 0.08 * smooth(lesion_rng, size, 10)) - lesion_rng.uniform(0.1, 0.2)
            image, mask = add_lesion(image, mask, inside(rim, 0.12) * tissue, 0.47 + contrast + texture)
    return image + 0.025 * rng.standard_normal(r.shape), mask


def liver(size: int, rng: Rng, lesion_rng: Rng | None) -> tuple[Array, Array]:
    """Draw an axial CT slice of the upper abdomen; the lesions are one to four dark nodules in the liver."""
    x, y = plane(size)
    u, v = rotate(x - rng.uniform(-0.03, 0.03), y - rng.uniform(-0.03, 0.03), rng.uniform(-0.08, 0.08))
    r = ellipse(u, v, 0, 0, rng.uniform(0.88, 0.95), rng.uniform(0.7, 0.78), power=2.3)
    wall = r - rng.uniform(0.86, 0.92)
    image = alpha_blend(0.02 + inside(r - 1) * 0.2, inside(wall), 0.45)  # skin and fat, then muscle
    cavity = inside(wall + 0.07)
    image = alpha_blend(image, cavity, 0.22 + 0.04 * smooth(rng, size, 10))
    beads = np.cos(np.arctan2(v, u) * rng.integers(8, 12) + rng.uniform(0, 6.3)) + 0.3 * smooth(rng, size, 4)
    image = alpha_blend(image, inside(np.abs(wall + 0.035) - 0.025) * inside(0.5 - beads, 0.15), 0.85)  # ribs
    stomach = inside(blob(rng, u, v, 0.38, -0.28, 0.24, 0.15), 0.05) * cavity
    image = alpha_blend(
        alpha_blend(image, stomach, 0.42), stomach * inside(v + rng.uniform(0.3, 0.4)), 0.03
    )  # its air lies above
    image = alpha_blend(image, inside(blob(rng, u, v, 0.62, 0.18, 0.17, 0.2), 0.08) * cavity, 0.58)  # spleen
    for side in (-1, 1):
        kidney = ellipse(u, v, side * 0.36, 0.38, 0.1, 0.13, side * 0.4)
        image = alpha_blend(alpha_blend(image, inside(kidney - 1, 0.1), 0.66), inside(kidney - 0.45, 0.2), 0.4)
    right, left = blob(rng, u, v, -0.4, -0.05, rng.uniform(0.42, 0.48), 0.2), blob(rng, u, v, -0.05, -0.32, 0.25, 0.2)
    lobe = inside(np.minimum(right, left), 0.04) * inside(wall + 0.09)
    image = alpha_blend(image, lobe, rng.uniform(0.56, 0.62) + 0.015 * smooth(rng, size, 30))
    vessels = [*branch(rng, (-0.15, 0.02), 3.3, 0.3, 0.035), *branch(rng, (-0.2, -0.15), 4.0, 0.28, 0.03)]
    image = alpha_blend(image, 0.8 * strokes(size, vessels, 0.008) * lobe, 0.74)
    spine: list[Line] = [([(0, 0.42), (0, 0.62)], 0.05), ([(-0.18, 0.5), (0, 0.46), (0.18, 0.5)], 0.05)]
    image = alpha_blend(image, strokes(size, spine, 0.008), 0.9)
    # Vertebra with its core and canal, then the two large vessels before it.
    for cx, cy, rx, ry, value in (
        *((0, 0.34, 0.13, 0.11, 0.95), (0, 0.34, 0.1, 0.08, 0.75), (0, 0.48, 0.06, 0.045, 0.4)),
        *((0.1, 0.16, 0.055, 0.055, 0.74), (-0.12, 0.16, 0.05, 0.05, 0.74)),
    ):
        image = alpha_blend(image, inside(ellipse(u, v, cx, cy, rx, ry) - 1, 0.1), value)
    mask = np.zeros(r.shape, bool)
    if lesion_rng is not None:
        contrast = lesion_rng.uniform(*CONTRAST)
        for _ in range(lesion_rng.integers(1, 5)):
            distance = blob(
                lesion_rng,
                x,
                y,
                *spot_in(lesion_rng, lobe),
                lesion_rng.uniform(0.07, 0.2),
                lesion_rng.choice([0.05, 0.35]),
            )
            tone = 0.58 - contrast * lesion_rng.uniform(0.85, 1.1) + 0.03 * smooth(lesion_rng, size, 24)
            image, mask = add_lesion(image, mask, inside(distance, 0.15) * lobe, tone)
    return image + 0.035 * rng.standard_normal(r.shape), mask


# Brightness of the retina's layers: 0 is its inner surface, 1 the pigment epithelium, beyond lies the choroid.
LAYER_DEPTHS = (
    -0.02, 0, 0.09, 0.13, 0.3, 0.34, 0.43, 0.46, 0.5, 0.54, 0.8, 0.83, 0.85, 0.88, 0.91, 0.94, 1, 1.04, 1.3, 1.7,
)  # fmt: skip
LAYER_GREYS = (
    0.05, 0.7, 0.62, 0.45, 0.5, 0.28, 0.3, 0.55, 0.5, 0.25, 0.24, 0.4, 0.28, 0.75, 0.6, 0.95, 0.9, 0.5, 0.4, 0.1,
)  # fmt: skip


def retina(size: int, rng: Rng, lesion_rng: Rng | None, kinds: Sequence[str]) -> tuple[Array, Array]:
    """Draw an OCT B-scan of the macula; the lesions are one or two of `kinds`: "pockets", "detachment", "drusen"."""
    x, y = plane(size)
    column = x[0]
    base = rng.uniform(0.16, 0.28) + rng.uniform(-0.1, 0.1) * column + rng.uniform(-0.05, 0.1) * column**2
    thick = rng.uniform(0.52, 0.6) + 0.015 * smooth(rng, size, 5)[0]
    fovea = (column - rng.uniform(-0.25, 0.25)) / rng.uniform(0.16, 0.24)
    thick = thick * (1 - rng.uniform(0.35, 0.5) * np.exp(-(fovea**2)))
    depth = (y - base) / thick + 1
    choroid = inside(1.05 - depth, 0.03)
    image = np.interp(depth, LAYER_DEPTHS, LAYER_GREYS)
    image *= 1 + 0.35 * choroid * np.clip(smooth(rng, size, 22), -1, 1) + 0.06 * smooth(rng, size, 6)
    mask = np.zeros(x.shape, bool)
    if lesion_rng is not None:
        contrast = lesion_rng.uniform(*CONTRAST)
        dark = max(0.3 - 0.55 * contrast, 0.02)
        chosen = lesion_rng.choice(kinds, lesion_rng.integers(1, 3), replace=False)
        room = inside(np.abs(depth - 0.5) - 0.36, 0.04)
        for _ in range(lesion_rng.integers(2, 6) * ("pockets" in chosen)):
            spot = spot_in(lesion_rng, room * (np.abs(x) < 0.8))
            cover = inside(blob(lesion_rng, x, y, *spot, lesion_rng.uniform(0.08, 0.18), 0.2), 0.12) * room
            image, mask = add_lesion(image, mask, cover, dark)
        mounds = [(lesion_rng.uniform(0.3, 0.7), lesion_rng.uniform(0.2, 0.36), dark)] * ("detachment" in chosen)
        for _ in range(lesion_rng.integers(3, 7) * ("drusen" in chosen)):
            half = lesion_rng.uniform(0.14, 0.3)
            mounds.append((half, half * lesion_rng.uniform(0.6, 0.9), 0.3 + contrast))
        for half, height, value in mounds:
            bump = height * np.clip(1 - ((column - lesion_rng.uniform(-0.7, 0.7)) / half) ** 2, 0, None) ** 0.8
            roof = base - 0.03 - np.minimum(bump, 0.6 * thick)
            cap = np.exp(-(((y - roof - 0.02) / 0.02) ** 2))
            cover = inside(np.maximum(roof - y, y - base), 0.015) * (bump > 0.01)
            image, mask = add_lesion(image, mask, cover, alpha_blend(np.full_like(y, value), cap, 0.95))
    speckle = rng.gamma(6.0, 1 / 6.0, x.shape)
    return image * (0.4 + 0.6 * speckle) + 0.02 * rng.random(x.shape), mask


def chest(size: int, rng: Rng, lesion_rng: Rng | None) -> tuple[Array, Array]:
    """Draw a frontal chest film; the lesions are fluffy opacities in the lungs or fluid at a lung's base."""
    x, y = plane(size)
    u, v = rotate(x - rng.uniform(-0.04, 0.04), y - rng.uniform(-0.04, 0.04), rng.uniform(-0.05, 0.05))
    shoulder = 0.24 + 0.72 * np.clip((v + rng.uniform(0.86, 0.95)) / 0.3, 0, 1) ** 0.5
    image = 0.03 + inside(np.abs(u) - shoulder, 0.03) * (rng.uniform(0.53, 0.57) + 0.1 * v)
    lung = np.zeros_like(u)
    wide, tall = rng.uniform(0.33, 0.36), rng.uniform(0.76, 0.82)
    for side in (-1, 1):
        field = ellipse((u - side * 0.44) / (1 + 0.25 * v), v, 0, 0.02, wide, tall, power=2.4)
        floor = 0.72 - 0.04 * side - 0.14 * np.cos((u - side * 0.4) * 3)
        lung = np.maximum(lung, inside(field - 1, 0.05) * inside(v - floor, 0.03))
    heart = ellipse(u, v, rng.uniform(0.1, 0.16), 0.32, rng.uniform(0.3, 0.38), rng.uniform(0.24, 0.3), 0.6)
    middle = np.maximum(inside(heart - 1, 0.12), inside(np.abs(u) - 0.13 - 0.03 * np.cos(6 * v), 0.06))
    lung = lung * (1 - middle)
    image = alpha_blend(image, lung, rng.uniform(0.14, 0.18))
    image += 0.08 * middle * inside(v - 0.6, 0.3) + 0.04 * inside(np.abs(u) - 0.06, 0.02)
    twigs: list[Line] = []
    ribs: list[Line] = []
    collar: list[Line] = []
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
    mask = np.zeros(u.shape, bool)
    if lesion_rng is not None:
        value = image + 0.05 + 0.8 * lesion_rng.uniform(*CONTRAST)  # added, so that ribs and vessels show through
        if lesion_rng.random() < 0.2:
            level = lesion_rng.uniform(-0.2, 0.2) - 0.5 * np.clip(np.abs(u) - 0.35, 0, None) ** 1.5
            image, mask = add_lesion(
                image, mask, inside(level - v, 0.05) * lung * (u * lesion_rng.choice([-1, 1]) > 0), value
            )
        for _ in range(0 if mask.any() else lesion_rng.integers(2, 6)):
            distance = blob(lesion_rng, x, y, *spot_in(lesion_rng, lung), lesion_rng.uniform(0.18, 0.42))
            fluff = inside(distance + 0.25 * smooth(lesion_rng, size, 14), 0.35)
            image, mask = add_lesion(image, mask, 0.9 * fluff * lung, value + 0.05 * smooth(lesion_rng, size, 24))
    return image + 0.02 * rng.standard_normal(u.shape), mask


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


def histology(size: int, rng: Rng, lesion_rng: Rng | None) -> tuple[Array, Array]:
    """Draw a stained tissue tile in colour; the lesion is a nest of crowded, large, dark nuclei."""
    x, y = plane(size)
    u, _ = rotate(x, y, rng.uniform(0, math.pi))
    fibre = np.sin(rng.uniform(14, 22) * u + 3.0 * smooth(rng, size, 5)) + 0.8 * smooth(rng, size, 40)
    gap = inside(0.75 - smooth(rng, size, 7), 0.12)
    pink, purple = np.array([[0.88, 0.66, 0.78], [0.42, 0.26, 0.55]]) + rng.uniform(-0.03, 0.03, (2, 3))
    image = pink + 0.05 * fibre[..., None] * np.array([0.5, 1.0, 0.6])
    image = alpha_blend(image, gap[..., None], np.array([0.95, 0.92, 0.94]))
    cells = nuclei(rng, size, int(rng.integers(90, 200)), (0.025, 0.04)) * (1 - gap)
    image = alpha_blend(image, 0.85 * cells[..., None], purple)
    mask = np.zeros(x.shape, bool)
    if lesion_rng is not None:
        contrast = lesion_rng.uniform(*CONTRAST)
        cx, cy = lesion_rng.uniform(-0.5, 0.5, 2)
        nest = blob(lesion_rng, x, y, cx, cy, lesion_rng.uniform(0.2, 0.75))
        cover = inside(nest + 0.15 * smooth(lesion_rng, size, 12), 0.08)
        tumour = np.array([0.76, 0.54, 0.75]) - 0.15 * contrast + 0.04 * smooth(lesion_rng, size, 40)[..., None]
        crowd = nuclei(lesion_rng, size, int(lesion_rng.integers(300, 500)), (0.04, 0.065))
        tumour = alpha_blend(tumour, crowd[..., None], purple - 0.3 * contrast)
        image, mask = add_lesion(image, mask, (0.5 + contrast) * cover, tumour)
    return image + 0.02 * rng.standard_normal(image.shape), mask


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
    image, mask = PAINTERS[obj](size, anatomy, lesions if abnormal else None)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8), mask


def draw(obj: str, split: str, label: str, index: int, seed: int, size: int) -> tuple[Array, Array]:
    """Draw one picture, which depends on nothing but these arguments.

    Returns:
        The uint8 image, (size, size) or for Histopathology (size, size, 3), and the bool mask (size, size): the pixels
        that a lesion has changed, all False for label "good".
    """
    key = (seed, list(PAINTERS).index(obj), SPLITS.index(split), LABELS.index(label), index)
    return paint(key, obj, size, abnormal=label == "Ungood")


def check(out: Path, objs: Sequence[str], valid: int, test: int, seed: int, size: int) -> None:
    """Raise InputError for arguments that cannot be obeyed; nothing has been written by then."""
    unknown = [obj for obj in objs if obj not in PAINTERS]
    if unknown:
        raise InputError(f"--obj {unknown[0]}: unknown, choose from {', '.join(PAINTERS)}")
    if size > 4096:
        raise InputError(f"--size {size}: must be at most 4096")
    for flag, value in (("--valid", valid), ("--test", test)):
        if value > MAX_IMAGES:
            raise InputError(f"{flag} {value}: must be at most {MAX_IMAGES}")
    for flag, value, least in (("--valid", valid, 0), ("--test", test, 0), ("--seed", seed, 0), ("--size", size, 32)):
        if value < least:
            raise InputError(f"{flag} {value}: must be at least {least}")
    for obj in objs:
        folder = out / f"{obj}_AD"
        if folder.exists() and not (folder / MARKER).is_file():
            raise InputError(f"{folder} exists and is not a phantom; choose another --out")


def clear(folder: Path) -> None:
    """Remove an earlier phantom's pictures, masks and shot lists; anything else in the folder stays."""
    for split in SPLITS:
        for label in LABELS:
            for path in (folder / split / label).glob(f"*/{split}_{label}_*.png"):
                path.unlink()
    for path in (folder / "fewshot_seed").glob("my*-shot.txt"):
        path.unlink()


def write_object(folder: Path, obj: str, counts: dict[str, int], seed: int, size: int) -> None:
    """Write one data set into `folder`: marker, pictures, masks and shot lists."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = f"--obj {obj} --valid {counts['valid']} --test {counts['test']} --seed {seed} --size {size}"
    # First, so that a run that was cut off can be repeated.
    (folder / MARKER).write_text(f"{NOTICE}\n{arguments}\n", encoding="utf-8")
    clear(folder)
    names: dict[tuple[str, str], list[str]] = {}
    for split, count in counts.items():
        for label in LABELS:
            names[split, label] = [f"{split}_{label}_{index:05d}.png" for index in range(count)]
            images, masks = folder / split / label / "img", folder / split / label / "anomaly_mask"
            images.mkdir(parents=True, exist_ok=True)
            with_masks = obj in SEGMENTED and label == "Ungood"
            if with_masks:
                masks.mkdir(exist_ok=True)
            bar = tqdm(
                names[split, label], f"{obj} {split} {label}", unit="image", mininterval=1, delay=3, disable=None
            )
            for index, name in enumerate(bar):
                image, mask = draw(obj, split, label, index, seed, size)
                Image.fromarray(image).save(images / name)
                if with_masks:
                    Image.fromarray(mask.astype(np.uint8) * 255).save(masks / name)
    lists = folder / "fewshot_seed"
    lists.mkdir(exist_ok=True)
    for shot in (shot for shot in SHOTS if shot <= counts["valid"]):
        rows = [
            f"{tag}-0: {' '.join(names['valid', label][:shot])}\n" for tag, label in (("a", "Ungood"), ("n", "good"))
        ]
        (lists / f"my{shot}-shot.txt").write_text("".join(rows), encoding="utf-8")


def write(out: str | Path, objs: Sequence[str], valid: int, test: int, seed: int, size: int) -> None:
    """Write the data sets `objs` below `out`, with `valid` and `test` images a class; size in pixels.

    Raises:
        InputError: for a wrong argument, a folder that is there but is no phantom, or one that cannot be written.
    """
    out = Path(out)
    check(out, objs, valid, test, seed, size)
    for obj in dict.fromkeys(objs):
        folder = out / f"{obj}_AD"
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
