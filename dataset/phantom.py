"""Draw a made-up data set in the MVFA layout, so that everything runs before real data are at hand.

    python -m dataset.phantom --out data --obj Brain Chest --valid 20 --test 30

The pictures are textured ellipses with round spots as lesions. They vary like the paper's six data sets (grey or
colour, the shape of the background, bright or dark lesions, masks or none) and say NOTHING about medicine: results on
them show that the code works, not that a method works. A lesion changes pixels only inside its mask; everywhere else,
an abnormal image equals its healthy twin.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils import InputError, Parser, blame, integer, run_cli

from .layout import MADE_UP, SPLITS
from .writer import FOLDERS, Writer

CONTRAST = (0.3, 0.5)  # of lesion and tissue, as a fraction of the full grey range: sets the difficulty
FAINT = 0.2  # minimum opacity of a lesion at a pixel; fainter pixels are not painted and not in the mask
NOTICE = "synthetic: drawn by dataset/phantom.py, it says nothing about medicine"


class Style(NamedTuple):
    """The appearance of a data set's pictures; lengths are in halves of a picture's side."""

    body: tuple[float, float]  # half axes of the ellipse, across and down
    grain: int  # independent values of the texture along a side
    lesions: tuple[int, int]  # number of lesions in an abnormal image: lower bound, upper bound (exclusive)
    radius: tuple[float, float]  # of a lesion
    tone: int  # 1: lesions are brighter than the tissue; -1: darker
    has_masks: bool
    colour: tuple[float, float, float] | None = None  # tint (RGB; 0.5 is neutral); None: grey


STYLES = {
    "Brain": Style((0.7, 0.85), 16, (1, 2), (0.15, 0.34), 1, True),
    "Liver": Style((0.9, 0.7), 10, (1, 5), (0.08, 0.2), -1, True),
    "Retina_RESC": Style((2.0, 0.4), 60, (2, 6), (0.1, 0.2), -1, True),
    "Retina_OCT2017": Style((2.0, 0.4), 60, (2, 6), (0.1, 0.2), -1, False),
    "Chest": Style((0.9, 1.5), 12, (2, 6), (0.18, 0.4), 1, False),
    "Histopathology": Style((3.0, 3.0), 30, (1, 2), (0.25, 0.7), -1, False, (0.9, 0.6, 0.75)),
}


def spot(size: int, center: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Coverage (size, size) in [0, 1] of an ellipse with a soft border; picture coordinates run from -1 to 1."""
    axis = (np.arange(size) + 0.5) * 2 / size - 1
    distance: np.ndarray = np.hypot((axis[None] - center[0]) / axes[0], (axis[:, None] - center[1]) / axes[1])
    return ((1.1 - distance) / 0.2).clip(0, 1)


def draw(obj: str, split: str, label: str, index: int, seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one picture, which depends only on the arguments.

    Returns the uint8 image, (size, size) or for Histopathology (size, size, 3), and the bool mask (size, size) of the
    pixels that a lesion changed, all False for label "good".
    """
    key = seed, list(STYLES).index(obj), SPLITS.index(split), FOLDERS.index(label), index
    style, rng = STYLES[obj], np.random.default_rng([*key, 0])
    center, axes = rng.uniform(-0.05, 0.05, 2), rng.uniform(0.92, 1.08, 2) * np.array(style.body)
    coarse = Image.fromarray(rng.standard_normal((style.grain, style.grain)).astype(np.float32))
    texture = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float64)
    rim, room = spot(size, center, axes), spot(size, center, 0.8 * axes)  # `room`: where lesions may be
    image = 0.05 + 0.25 * rim + room * (0.2 + 0.05 * texture) + 0.02 * rng.standard_normal((size, size))
    mask = np.zeros((size, size), bool)
    if label == "Ungood":
        rng = np.random.default_rng([*key, 1])
        ill = image + style.tone * rng.uniform(*CONTRAST)
        rows, columns = np.nonzero(room >= 0.9)
        for _ in range(rng.integers(*style.lesions)):
            pick, radius = rng.integers(len(rows)), rng.uniform(*style.radius)
            center = (np.array((columns[pick], rows[pick])) + 0.5) * 2 / size - 1
            cover = room * spot(size, center, radius * rng.uniform(0.8, 1.25, 2))
            marked = cover >= FAINT
            image, mask = image + np.where(marked, cover, 0) * (ill - image), mask | marked
    if style.colour:
        image = image[..., None] + np.array(style.colour) - 0.5
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8), mask


def write(out: str | Path, obj: Sequence[str], valid: int, test: int, seed: int, size: int) -> None:
    """Write the data sets `obj` below `out`, with `valid` and `test` images per class; `size` is in pixels.

    Pictures, masks and shot lists of an earlier phantom are replaced. Raises `InputError` if a folder exists and is no
    phantom (nothing is written in that case), or cannot be written.
    """
    folders = {name: Path(out) / f"{name}_AD" for name in obj}
    if foreign := [folder for folder in folders.values() if folder.exists() and not (folder / MADE_UP).is_file()]:
        raise InputError(f"{foreign[0]} exists and is not a phantom; choose another --out")
    for name, folder in folders.items():
        with blame(f"--out {folder}", errors=(OSError,)):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MADE_UP).write_text(f"{NOTICE}\n", encoding="utf-8")  # first: a rerun accepts the folder
            for path in [*folder.glob("*/*/*/*_*_[0-9]*.png"), *folder.glob("fewshot_seed/my*-shot.txt")]:
                path.unlink()
            writer = Writer(folder)
            for split, (number, label) in product(SPLITS, enumerate(FOLDERS)):
                for index in range(valid if split == "valid" else test):
                    image, marked = draw(name, split, label, index, seed, size)
                    mask = Image.fromarray(marked).convert("L") if marked.any() and STYLES[name].has_masks else None
                    writer.add(split, number, f"{split}_{label}_{index:05d}", Image.fromarray(image), mask)
            writer.write_lists(*(writer.names["valid", label] for label in (0, 1)))
        print(f"{folder}: {writer.counts()}, {size} px")
    print(NOTICE)


def main() -> None:
    """Parse the command line and write the data sets."""
    parser = Parser(prog="python -m dataset.phantom", description=f"Draw a data set ({NOTICE}).")
    flag, count, names = parser.add_argument, integer(0, 99_999), list(STYLES)  # file names have five digits
    flag("--out", default="data", help="folder that will hold <obj>_AD (default: data)")
    flag("--obj", nargs="+", default=names, choices=names, metavar="OBJ", help=f"of {', '.join(names)} (all)")
    flag("--valid", type=count, default=20, help="images a class in valid/ (20)")
    flag("--test", type=count, default=30, help="images a class in test/ (30)")
    flag("--seed", type=integer(0), default=0, help="another seed, other pictures (0)")
    flag("--size", type=integer(32, 4096), default=240, help="height and width in pixels (240)")
    write(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_cli(main)
