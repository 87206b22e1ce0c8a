"""Write a MedMNIST v2 set in this project's layout: real images in one command.

    python -m dataset.medmnist breastmnist --size 224 --out data      downloaded by the package medmnist (optional)
    python -m dataset.medmnist pneumoniamnist --npz FILE --out data   from a local file

valid/ holds the images of train and val, test/ those of test; every class except the normal one is abnormal. There are
no masks, so only image metrics are measured. There are no patient numbers either: MedMNIST's own splits are kept.
Afterwards: `python train.py --obj breastmnist --data_path data --shot 16`.
"""

import csv
import random
from itertools import groupby, product
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from utils import EXPECTED, InputError, Parser, blame, integer, run_cli, write_json

from .layout import FOLDER, SPLITS
from .writer import Writer, new_folder

SIZES = (28, 64, 128, 224)
PARTS = {"valid": ("train", "val"), "test": ("test",)}  # our split -> MedMNIST's
LICENCE = "CC BY 4.0"  # of all of these, in medmnist 3.0.2
# For each set: MedMNIST's label of normal images (`normal`; "": labels are rows of 0 and 1 for each finding, and normal
# images have none), what prompts call it, and whom to cite.
with (FOLDER / "medmnist.csv").open(encoding="utf-8", newline="") as _file:
    SOURCES = {row["name"]: row for row in csv.DictReader(_file)}
LICENCE_TEXT = """{name} of MedMNIST v2. Licence: {licence}.

Please cite
  Yang et al. MedMNIST v2. Scientific Data 10, 41 (2023).
  {citation}

MedMNIST's classes: {classes}.
Changed here: written as PNG files, pixel for pixel; train and val are valid/, test is test/; every class but the normal
one is abnormal.
"""


def convert(archive: Path, name: str, folder: Path, most_valid: int, seed: int) -> Writer:
    """Write images, shot lists, NAME.json and LICENSE.txt into the empty `folder`.

    At most `most_valid` images per class (0: all) are drawn for valid/. A damaged or wrong archive raises `InputError`.
    """
    source, rng, writer = SOURCES[name], random.Random(seed), Writer(folder)
    with blame(f"--npz {archive}", errors=(*EXPECTED, BadZipFile)), np.load(archive) as arrays:
        labels = {part: arrays[f"{part}_labels"] for part in ("train", "val", "test")}
        for part, values in labels.items():  # -> (M,) bool, True is abnormal
            if values.ndim != 2 or (values.shape[1] == 1) != bool(source["normal"]):
                raise InputError(f"{archive}: {part}_labels are {values.shape}: not those of {name}")
            labels[part] = values[:, 0] != int(source["normal"]) if source["normal"] else values.any(axis=1)
        for split, label in product(SPLITS, (0, 1)):
            rows = [(part, row) for part in PARTS[split] for row in np.flatnonzero(labels[part] == label).tolist()]
            if split == "valid" and 0 < most_valid < len(rows):
                rows = sorted(rng.sample(rows, most_valid))
            for part, chosen in groupby(rows, key=lambda row: row[0]):  # one part in memory at a time: up to 13 GB
                images = arrays[f"{part}_images"]
                for _, row in chosen:
                    writer.add(split, label, f"{part}{row:06d}", Image.fromarray(images[row]))
    valid = [writer.names["valid", label] for label in (0, 1)]
    writer.write_lists(*(rng.sample(names, len(names)) for names in valid))
    write_json(folder / f"{name}.json", {"prompt_name": source["prompt_name"], "pixel_metrics": False})
    (folder / "LICENSE.txt").write_text(LICENCE_TEXT.format(licence=LICENCE, **source), encoding="utf-8")
    return writer


def download(name: str, size: int, folder: Path) -> Path:
    """Download MedMNIST's file with the package `medmnist`, which verifies it; raises `InputError` if that fails."""
    try:
        import medmnist  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        advice = "`pip install 'medmnist>=3'` downloads it; or fetch the .npz by hand and give it with --npz"
        raise InputError(f"{name}: {advice}") from error
    folder.mkdir(parents=True, exist_ok=True)
    kind = getattr(medmnist, medmnist.INFO[name]["python_class"])
    errors = RuntimeError, TypeError, OSError
    with blame(f"{name}: medmnist could not download it", "give the .npz with --npz", errors):
        kind(split="val", download=True, size=size, root=str(folder))  # loads the split too: val is the smallest
    return folder / (f"{name}.npz" if size == SIZES[0] else f"{name}_{size}.npz")


def main() -> None:
    """Run the command line."""
    parser = Parser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("name", choices=SOURCES, help="a set that has a normal class")
    parser.add_argument("--size", type=int, choices=SIZES, default=224, help="pixels a side, of the download")
    parser.add_argument("--npz", type=Path, metavar="FILE", help="MedMNIST's file, instead of the download")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder for <name>_AD (default: data)")
    parser.add_argument("--valid", type=integer(0), default=500, metavar="COUNT",
                        help="most images of a class in valid/, drawn with --seed; 0: all (default: 500)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=111, help="of the draws (default: 111)")
    parser.add_argument("--download_dir", type=Path, default=Path(".cache/medmnist"), help="where downloads are kept")
    options = parser.parse_args()
    root = options.out / f"{options.name}_AD"
    with new_folder(root, "--out") as temporary:
        archive = options.npz or download(options.name, options.size, options.download_dir)
        writer = convert(archive, options.name, temporary, options.valid, options.seed)
    print(f"{root}: {writer.counts()}")
    print(f"{options.name}: {LICENCE}; {root / 'LICENSE.txt'} says whom to cite")
    print(f"next: python train.py --obj {options.name} --data_path {options.out} --shot 16")


if __name__ == "__main__":
    run_cli(main)
