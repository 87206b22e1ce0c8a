"""Draw a made-up data set in the MVFA layout, so that everything runs before real data are at hand.

    python -m dataset.phantom --out data --obj Brain Chest --valid 20 --test 30

The pictures are drawn with a few formulas and a random generator. They differ in what the paper's six data sets differ
in (grey or colour, the shape of the background, bright or dark lesions, masks or none) and say NOTHING about medicine:
results on them show that the code works, not that a method does.

The healthy anatomy is drawn from one generator and the lesions from another, and a lesion changes pixels only inside
its mask. So an abnormal image equals its healthy twin everywhere outside the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils import InputError, Parser, blame, integer, run_cli

from .layout import MADE_UP, SPLITS
from .writer import FOLDERS as LABELS
from .writer import Writer

# How far a lesion lies from the tissue around it, as a part of the full grey range; drawn anew for every image.
# This is the difficulty: (0.1, 0.2) is hard to see, (0.4, 0.6) is glaring.
CONTRAST = (0.3, 0.5)
FAINT = 0.2  # the part of a pixel's colour that is lesion, below which none is painted; the mask is every pixel above
NOTICE = "synthetic: drawn by dataset/phantom.py, it says nothing about medicine"

Array = np.ndarray
Rng = np.random.Generator


# --- shapes; coordinates run from -1 to 1, x to the right and y down, whatever the size ---


def plane(size: int) -> tuple[Array, Array]:
    """Pixel-centre coordinates x and y, two (size, size) arrays in (-1, 1)."""
    axis = (np.arange(size) + 0.5) * 2 / size - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return x, y


def smooth(rng: Rng, size: int, cells: int) -> Array:
    """Smooth noise (size, size) around 0 with spread about 0.7 and `cells` independent values along a side."""
    grid = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)


def inside(distance: Array, soft: float = 0.03) -> Array:
    """Coverage in [0, 1]: 1 where distance < -soft, 0 where distance > soft, smooth between."""
    t = np.clip(0.5 - distance / (2 * soft), 0, 1)
    return t * t * (3 - 2 * t)


def ellipse(size: int, cx: float, cy: float, rx: float, ry: float) -> Array:
    """Distance to an ellipse's border, in units of its radius: -1 in its centre, 0 on the border."""
    x, y = plane(size)
    return np.hypot((x - cx) / rx, (y - cy) / ry) - 1


def blend(image: Array, cover: Array, value: float | Array) -> Array:
    """The image (S, S) or (S, S, 3) with `value` in the part that `cover` (S, S) in [0, 1] says."""
    return image + (cover if image.ndim == 2 else cover[..., None]) * (value - image)


# --- the healthy: an image in [0, 1], and the part of it (S, S) in [0, 1] where lesions may lie ---


def brain(size: int, rng: Rng) -> tuple[Array, Array]:
    """Like an axial MRI slice: a bright rim around grey tissue with two dark ventricles."""
    wide, tall = rng.uniform(0.68, 0.78), rng.uniform(0.82, 0.92)
    head = ellipse(size, rng.uniform(-0.05, 0.05), rng.uniform(-0.05, 0.05), wide, tall)
    head += 0.02 * smooth(rng, size, 6)
    image = blend(0.02 + 0.36 * inside(head), inside(head + 0.07), 0.06)
    image = blend(image, inside(head + 0.14), 0.4 + 0.05 * smooth(rng, size, 16))
    for side in (-1, 1):
        image = blend(image, inside(ellipse(size, side * rng.uniform(0.08, 0.16), 0, 0.07, 0.25), 0.2), 0.1)
    return image + 0.025 * rng.standard_normal(head.shape), inside(head + 0.3)


def liver(size: int, rng: Rng) -> tuple[Array, Array]:
    """Like an axial CT slice of the abdomen: a wide body with a spine and one large, even organ."""
    wide, tall = rng.uniform(0.88, 0.95), rng.uniform(0.7, 0.78)
    body = ellipse(size, rng.uniform(-0.03, 0.03), rng.uniform(-0.03, 0.03), wide, tall)
    image = blend(0.02 + 0.4 * inside(body), inside(body + 0.16), 0.22 + 0.04 * smooth(rng, size, 10))
    image = blend(image, inside(ellipse(size, 0, 0.45, 0.13, 0.13), 0.1), 0.95)
    organ = ellipse(size, -0.35, -0.08, rng.uniform(0.42, 0.48), rng.uniform(0.4, 0.48)) + 0.08 * smooth(rng, size, 6)
    lobe = inside(np.maximum(organ, body + 0.2))
    image = blend(image, lobe, rng.uniform(0.56, 0.62))
    return image + 0.035 * rng.standard_normal(body.shape), lobe


def retina(size: int, rng: Rng) -> tuple[Array, Array]:
    """Like an OCT B-scan: bright and dark layers, thinner at the fovea, under speckle."""
    x, y = plane(size)
    floor = rng.uniform(0.16, 0.28) + rng.uniform(-0.1, 0.1) * x + rng.uniform(-0.05, 0.1) * x**2
    pit = 1 - rng.uniform(0.35, 0.5) * np.exp(-(((x - rng.uniform(-0.25, 0.25)) / 0.2) ** 2))
    depth = (y - floor) / (rng.uniform(0.52, 0.6) * pit) + 1  # 0: the retina's inner surface, 1: its outer one
    edges = (-0.02, 0, 0.15, 0.35, 0.45, 0.8, 0.9, 1, 1.05, 1.7)
    layers = np.interp(depth, edges, (0.05, 0.7, 0.5, 0.3, 0.5, 0.3, 0.7, 0.9, 0.5, 0.1))
    image = layers * (0.4 + 0.6 * rng.gamma(6.0, 1 / 6.0, x.shape))
    return image + 0.02 * rng.random(x.shape), inside(np.abs(depth - 0.5) - 0.36, 0.04)


def chest(size: int, rng: Rng) -> tuple[Array, Array]:
    """Like a frontal chest film: two dark lungs behind ribs, and a bright middle."""
    x, y = plane(size)
    image = 0.03 + inside(np.abs(x) - rng.uniform(0.88, 0.96)) * (rng.uniform(0.53, 0.57) + 0.1 * y)
    wide, tall = rng.uniform(0.3, 0.36), rng.uniform(0.7, 0.8)
    lungs = inside(np.minimum(*(ellipse(size, side * 0.45, 0, wide, tall) for side in (-1, 1))), 0.05)
    image = blend(image, lungs, rng.uniform(0.14, 0.18) + 0.03 * smooth(rng, size, 12))
    image += 0.05 * np.cos(rng.uniform(18, 22) * (y + 0.4 * x**2) + rng.uniform(0, 6)) * inside(np.abs(x) - 0.85)
    return image + 0.02 * rng.standard_normal(x.shape), lungs


def tissue(size: int, rng: Rng) -> tuple[Array, Array]:
    """Like a stained tissue tile, in colour: pink ground with purple dots."""
    pink, purple = np.array([[0.88, 0.66, 0.78], [0.42, 0.26, 0.55]]) + rng.uniform(-0.03, 0.03, (2, 3))
    image = pink + 0.04 * smooth(rng, size, 40)[..., None] * np.array([0.5, 1.0, 0.6])
    image = blend(image, 0.85 * inside(1.0 - smooth(rng, size, 26), 0.2), purple)
    return image + 0.02 * rng.standard_normal(image.shape), np.ones((size, size))


class Kind(NamedTuple):
    """What the pictures of a data set are like."""

    healthy: Callable[[int, Rng], tuple[Array, Array]]
    lesions: tuple[int, int]  # of lesions in an abnormal image: at least, less than
    radius: tuple[float, float]
    tone: int  # 1: lesions are brighter than the tissue; -1: darker
    has_masks: bool


KINDS = {
    "Brain": Kind(brain, (1, 2), (0.15, 0.34), 1, True),
    "Liver": Kind(liver, (1, 5), (0.08, 0.2), -1, True),
    "Retina_RESC": Kind(retina, (2, 6), (0.1, 0.2), -1, True),
    "Retina_OCT2017": Kind(retina, (2, 6), (0.1, 0.2), -1, False),
    "Chest": Kind(chest, (2, 6), (0.18, 0.4), 1, False),
    "Histopathology": Kind(tissue, (1, 2), (0.25, 0.7), -1, False),
}


def lesion(rng: Rng, room: Array, radius: float) -> Array:
    """Coverage (S, S) of an irregular round spot of about that radius somewhere in `room` (S, S)."""
    size = len(room)
    rows, columns = np.nonzero(room >= 0.9 * room.max())
    pick = rng.integers(len(rows))
    x, y = plane(size)
    u, v = x - x[0, columns[pick]], y - y[rows[pick], 0]
    angle = np.arctan2(v, u)
    border = sum(0.3 / k * rng.uniform(-1, 1) * np.cos(k * angle + rng.uniform(0, 2 * math.pi)) for k in range(2, 6))
    cover: Array = inside(np.hypot(u, v) / (radius * (1 + border)) - 1, 0.15) * room
    return cover


def paint(key: Sequence[int], obj: str, size: int, abnormal: bool) -> tuple[Array, Array]:
    """Paint what `key` seeds, with (`abnormal`) or without its lesions: uint8 image and bool mask (size, size)."""
    kind, rng = KINDS[obj], np.random.default_rng([*key, 1])
    healthy, room = kind.healthy(size, np.random.default_rng([*key, 0]))
    image, mask = healthy, np.zeros((size, size), bool)
    if abnormal:
        ill = healthy + kind.tone * rng.uniform(*CONTRAST)
        for _ in range(rng.integers(*kind.lesions)):
            cover = lesion(rng, room, rng.uniform(*kind.radius))
            image, mask = blend(image, np.where(cover >= FAINT, cover, 0.0), ill), mask | (cover >= FAINT)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8), mask


def draw(obj: str, split: str, label: str, index: int, seed: int, size: int) -> tuple[Array, Array]:
    """One picture, which depends on nothing but these arguments.

    Returns:
        The uint8 image, (size, size) or for Histopathology (size, size, 3), and the bool mask (size, size): the pixels
        that a lesion has changed, all False for label "good".
    """
    key = (seed, list(KINDS).index(obj), SPLITS.index(split), LABELS.index(label), index)
    return paint(key, obj, size, abnormal=label == "Ungood")


def write(out: str | Path, objs: Sequence[str], valid: int, test: int, seed: int, size: int) -> None:
    """Write the data sets `objs` below `out`, with `valid` and `test` images a class; size in pixels.

    An earlier phantom's pictures, masks and shot lists are replaced.

    Raises:
        InputError: for a folder that is there but is no phantom (nothing has been written by then), or one that cannot
            be written.
    """
    folders = {obj: Path(out) / f"{obj}_AD" for obj in objs}
    for folder in folders.values():
        if folder.exists() and not (folder / MADE_UP).is_file():
            raise InputError(f"{folder} exists and is not a phantom; choose another --out")
    for obj, folder in folders.items():
        with blame(f"--out {folder}", errors=(OSError,)):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MADE_UP).write_text(f"{NOTICE}\n", encoding="utf-8")  # first, so that it can be repeated
            old = [f"{split}/{label}/*/{split}_{label}_*.png" for split, label in product(SPLITS, LABELS)]
            for path in [path for pattern in (*old, "fewshot_seed/my*-shot.txt") for path in folder.glob(pattern)]:
                path.unlink()
            writer = Writer(folder)
            for split, label in product(SPLITS, LABELS):
                for index in range(valid if split == "valid" else test):
                    image, marked = draw(obj, split, label, index, seed, size)
                    has_mask = KINDS[obj].has_masks and marked.any()
                    mask = Image.fromarray(marked.astype(np.uint8) * 255) if has_mask else None
                    name = f"{split}_{label}_{index:05d}"
                    writer.add(split, LABELS.index(label), name, Image.fromarray(image), mask)
            writer.write_lists()
        print(f"{folder}: {writer.counts()}, {size} px")
    print(NOTICE)


def main() -> None:
    """Read the command line and write the data sets."""
    parser = Parser(prog="python -m dataset.phantom", description=f"Draw a data set ({NOTICE}).")
    flag, count = parser.add_argument, integer(0, 99_999)  # the names have five digits
    flag("--out", default="data", help="folder that will hold <obj>_AD (default: data)")
    flag(
        "--obj", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="OBJ", help=f"of {', '.join(KINDS)} (all)"
    )
    flag("--valid", type=count, default=20, help="images a class in valid/ (20)")
    flag("--test", type=count, default=30, help="images a class in test/ (30)")
    flag("--seed", type=integer(0), default=0, help="another seed, other pictures (0)")
    flag("--size", type=integer(32, 4096), default=240, help="height and width in pixels (240)")
    args = parser.parse_args()
    write(args.out, args.obj, args.valid, args.test, args.seed, args.size)


if __name__ == "__main__":
    run_cli(main)
