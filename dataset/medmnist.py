"""Write a MedMNIST v2 set in this project's layout: real images in one command.

    python -m dataset.medmnist breastmnist --size 224 --out data      downloaded by the package medmnist (optional)
    python -m dataset.medmnist pneumoniamnist --npz FILE --out data   from a file that you have

valid/ holds the images of train and val, test/ those of test; every class but the normal one is abnormal. There are no
masks, so image metrics alone are measured, and no patient numbers: MedMNIST's own division is kept, and nothing more
is known. Afterwards: `python train.py --obj breastmnist --data_path data --shot 16`.
"""

from __future__ import annotations

import random
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from utils import EXPECTED, InputError, Parser, blame, integer, run_cli, write_json

from .writer import Writer, new_folder

SIZES = (28, 64, 128, 224)
PARTS = {"valid": ("train", "val"), "test": ("test",)}  # our split -> MedMNIST's
CITATION = "Yang et al. MedMNIST v2. Scientific Data 10, 41 (2023)."
KERMANY = "Kermany et al. Identifying medical diagnoses by image-based deep learning. Cell 172(5), 1122-1131 (2018)."
LICENCE = "CC BY 4.0"  # of all of these, in medmnist 3.0.2


class Source(NamedTuple):
    """What MedMNIST's labels of a set mean here, and whose images they are."""

    normal: int | None  # the label of normal images; None: a row of 0 and 1 for each finding, normal without any
    classes: str
    prompt_name: str
    citation: str


SOURCES = {
    "breastmnist": Source(
        1, "0 malignant; 1 normal or benign, which counts as normal", "breast ultrasound",
        "Al-Dhabyani et al. Dataset of breast ultrasound images. Data in Brief 28, 104863 (2020)."),
    "chestmnist": Source(
        None, "14 findings, any number of them; normal is none", "chest x-ray",
        "Wang et al. ChestX-ray8: Hospital-scale chest X-ray database and benchmarks. CVPR, 3462-3471 (2017)."),
    "octmnist": Source(
        3, "0 choroidal neovascularization, 1 diabetic macular edema, 2 drusen, 3 normal", "retina OCT", KERMANY),
    "pathmnist": Source(
        6, "0 adipose, 1 background, 2 debris, 3 lymphocytes, 4 mucus, 5 smooth muscle, 6 normal colon mucosa, "
        "7 cancer-associated stroma, 8 colorectal adenocarcinoma epithelium: most of what counts as abnormal is "
        "another tissue, not a disease", "colon mucosa",
        "Kather et al. Predicting survival from colorectal histology slides. PLOS Medicine 16(1), e1002730 (2019)."),
    "pneumoniamnist": Source(0, "0 normal, 1 pneumonia", "chest x-ray", KERMANY),
    "retinamnist": Source(
        0, "grades 0 to 4 of diabetic retinopathy; 0 is none", "retina",
        "Liu et al. DeepDRiD: Diabetic Retinopathy - Grading and Image Quality. Patterns 3(6), 100512 (2022)."),
}  # fmt: skip
LICENCE_TEXT = """{name} of MedMNIST v2. Licence: {licence}.

Please cite
  {citation}
  {source.citation}

MedMNIST's classes: {source.classes}.
Changed here: written as PNG files, pixel for pixel; train and val are valid/, test is test/; every class but the normal
one is abnormal.
"""


def convert(archive: Path, name: str, folder: Path, most_valid: int, seed: int) -> Writer:
    """Write images, shot lists, NAME.json and LICENSE.txt below `folder`, which is empty.

    At most `most_valid` images of a class (0: all) are drawn for valid/. `InputError` for a damaged archive.
    """
    source, rng, writer = SOURCES[name], random.Random(seed), Writer(folder)
    with blame(f"--npz {archive}", errors=(*EXPECTED, BadZipFile)), np.load(archive) as arrays:
        labels: dict[str, np.ndarray] = {}  # part -> (M,) bool, True is abnormal
        for part in chain(*PARTS.values()):
            values = arrays[f"{part}_labels"]
            if values.ndim != 2 or (values.shape[1] > 1) != (source.normal is None):
                raise InputError(f"{archive}: {part}_labels are {values.shape}: not those of {name}")
            labels[part] = values.any(axis=1) if source.normal is None else values[:, 0] != source.normal
        for split, parts in PARTS.items():
            chosen = set[tuple[str, int]]()
            for label in (0, 1):
                known = [(part, number) for part in parts for number in np.flatnonzero(labels[part] == label).tolist()]
                is_drawn = split == "valid" and 0 < most_valid < len(known)
                chosen |= set(rng.sample(known, most_valid) if is_drawn else known)
            for part in parts:
                for number, pixels in enumerate(arrays[f"{part}_images"]):
                    if (part, number) in chosen:
                        writer.add(split, int(labels[part][number]), f"{part}{number:06d}", Image.fromarray(pixels))
    writer.write_lists({label: rng.sample(of, len(of)) for (s, label), of in writer.names.items() if s == "valid"})
    write_json(folder / f"{name}.json", {"prompt_name": source.prompt_name, "pixel_metrics": False})
    text = LICENCE_TEXT.format(name=name, licence=LICENCE, citation=CITATION, source=source)
    (folder / "LICENSE.txt").write_text(text, encoding="utf-8")
    return writer


def download(name: str, size: int, folder: Path) -> Path:
    """MedMNIST's file, which the package `medmnist` fetches and checks; `InputError` where that cannot be."""
    try:
        import medmnist  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        advice = "`pip install 'medmnist>=3'` downloads it; or fetch the .npz by hand and give it with --npz"
        raise InputError(f"{name}: {advice}") from error
    folder.mkdir(parents=True, exist_ok=True)
    kind = getattr(medmnist, medmnist.INFO[name]["python_class"])
    with blame(
        f"{name}: medmnist could not download it", "give the .npz with --npz", (RuntimeError, TypeError, OSError)
    ):
        kind(split="val", download=True, size=size, root=str(folder))  # the smallest split, as it is read as well
    return folder / (f"{name}.npz" if size == SIZES[0] else f"{name}_{size}.npz")


def main() -> None:
    """Command line."""
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
