"""Write a MedMNIST v2 set in this project's layout: real images in one command.

    python -m dataset.medmnist breastmnist --size 224 --out data      downloaded by the package medmnist (optional)
    python -m dataset.medmnist pneumoniamnist --npz FILE --out data   from a file that you have

valid/ holds the images of train and val, test/ those of test; every class but the normal one is abnormal. There are no
masks, so image metrics alone are measured, and no patient numbers: MedMNIST's own division is kept, and nothing more
is known. Afterwards: `python train.py --obj breastmnist --data_path data --shot 16`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils import InputError, Parser, integer, run_cli

SIZES = (28, 64, 128, 224)
SHOTS = (2, 4, 8, 16)
FOLDERS = ("good", "Ungood")  # label 0, label 1
SPLITS = {"valid": ("train", "val"), "test": ("test",)}  # ours -> MedMNIST's
CITATION = (
    "Yang J, Shi R, Wei D, et al. MedMNIST v2 - A large-scale lightweight benchmark for 2D and 3D biomedical image "
    "classification. Scientific Data 10, 41 (2023)."
)
KERMANY = (
    "Kermany DS, Goldbaum M, Cai W, et al. Identifying medical diagnoses and treatable diseases by image-based deep "
    "learning. Cell 172(5), 1122-1131 (2018)."
)


@dataclass(frozen=True)
class Source:
    """What MedMNIST's labels of a set mean here, and whose images they are (licences as in medmnist 3.0.2)."""

    normal: int | None  # the label of normal images; None: a row of 0 and 1 for each finding, normal without any
    classes: str
    prompt_name: str
    citation: str
    licence: str = "CC BY 4.0"


SOURCES = {
    "breastmnist": Source(
        1, "0 malignant; 1 normal or benign, which counts as normal", "breast ultrasound",
        "Al-Dhabyani W, Gomaa M, Khaled H, Fahmy A. Dataset of breast ultrasound images. Data in Brief 28, 104863 "
        "(2020).",
    ),
    "chestmnist": Source(
        None, "14 findings, any number of them; normal is none", "chest x-ray",
        "Wang X, Peng Y, Lu L, et al. ChestX-ray8: Hospital-scale chest X-ray database and benchmarks on "
        "weakly-supervised classification and localization of common thorax diseases. CVPR, 3462-3471 (2017).",
    ),
    "octmnist": Source(
        3, "0 choroidal neovascularization, 1 diabetic macular edema, 2 drusen, 3 normal", "retina OCT", KERMANY
    ),
    "pathmnist": Source(
        6, "0 adipose, 1 background, 2 debris, 3 lymphocytes, 4 mucus, 5 smooth muscle, 6 normal colon mucosa, "
        "7 cancer-associated stroma, 8 colorectal adenocarcinoma epithelium: most of what counts as abnormal is "
        "another tissue, not a disease", "colon mucosa",
        "Kather JN, Krisam J, Charoentong P, et al. Predicting survival from colorectal cancer histology slides using "
        "deep learning: A retrospective multicenter study. PLOS Medicine 16(1), e1002730 (2019).",
    ),
    "pneumoniamnist": Source(0, "0 normal, 1 pneumonia", "chest x-ray", KERMANY),
    "retinamnist": Source(
        0, "grades 0 to 4 of diabetic retinopathy; 0 is none", "retina",
        "Liu R, Wang X, Wu Q, et al. DeepDRiD: Diabetic Retinopathy - Grading and Image Quality Estimation Challenge. "
        "Patterns 3(6), 100512 (2022).",
    ),
}  # fmt: skip


def set_name(text: str) -> str:
    """An argparse type: a set with a normal class; `InputError` that says why another has none."""
    if text in SOURCES:
        return text
    why = "holds volumes, not images" if text.endswith("3d") else "has no normal class, or is no MedMNIST set"
    raise InputError(f"{text}: {why}; use one of {', '.join(SOURCES)}")


class Archive:
    """MedMNIST's .npz: {train,val,test}_images (M, S, S) or (M, S, S, 3) uint8, and _labels (M, 1), or (M, findings).

    Images are read one at a time, as an archive may hold 14 GB.

    Raises:
        InputError: here and in every method, naming the file, for one that is damaged or of another form.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{path}: cannot be read as .npz ({reason})") from error

    def rows(self, key: str) -> Iterator[np.ndarray]:
        """The rows of an array of bytes, in order."""
        try:
            with self.file.open(f"{key}.npy") as stream:
                version = np.lib.format.read_magic(stream)
                read_header = np.lib.format.read_array_header_1_0
                if version != (1, 0):
                    read_header = np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read_header(stream)
                if fortran or dtype != np.uint8 or len(shape) < 2:
                    raise InputError(f"{self.path}: {key} holds {dtype} of shape {shape}, where uint8 is expected")
                size = int(np.prod(shape[1:]))
                for _ in range(shape[0]):
                    yield np.frombuffer(stream.read(size), np.uint8).reshape(shape[1:])
        except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.path}: {key} is missing or damaged ({error})") from error

    def labels(self, split: str, normal: int | None) -> np.ndarray:
        """(M,) of 0 normal and 1 abnormal."""
        values = np.stack(list(self.rows(f"{split}_labels")) or [np.zeros(1, np.uint8)])
        columns = "more than one" if normal is None else "1"
        if (values.shape[1] > 1) != (normal is None):
            raise InputError(f"{self.path}: {split}_labels has {values.shape[1]} columns, where {columns} is expected")
        return values.any(axis=1).astype(int) if normal is None else (values[:, 0] != normal).astype(int)

    def images(self, split: str, wanted: set[int]) -> Iterator[tuple[int, Image.Image]]:
        """The images with these numbers."""
        for number, pixels in enumerate(self.rows(f"{split}_images")):
            if number in wanted:
                if pixels.ndim != 2 and pixels.shape[2:] != (3,):
                    raise InputError(f"{self.path}: {split}_images are {pixels.shape}, not (S, S) or (S, S, 3)")
                yield number, Image.fromarray(pixels)


def draw(labels: dict[str, np.ndarray], most: int, rng: random.Random) -> dict[str, set[int]]:
    """Of each split of MedMNIST's the numbers of at most `most` images a class in all, drawn; 0: all of them."""
    chosen: dict[str, set[int]] = {split: set() for split in labels}
    for label in (0, 1):
        known = [(split, number) for split, of in labels.items() for number in np.flatnonzero(of == label).tolist()]
        for split, number in rng.sample(known, most) if 0 < most < len(known) else known:
            chosen[split].add(number)
    return chosen


def convert(archive: Archive, name: str, folder: Path, most_valid: int, seed: int) -> dict[str, dict[str, int]]:
    """Write images, shot lists, NAME.json and LICENSE.txt below `folder`.

    Args:
        archive: MedMNIST's file.
        name: of `SOURCES`.
        folder: the data set's, which is empty.
        most_valid: images of a class in valid/; 0 for all.
        seed: of the draws, of those images and of the shots.

    Returns:
        Split -> class's folder -> number of images.
    """
    source, rng = SOURCES[name], random.Random(seed)
    names: dict[str, dict[str, list[str]]] = {}
    for split, parts in SPLITS.items():
        labels = {part: archive.labels(part, source.normal) for part in parts}
        chosen = draw(labels, most_valid if split == "valid" else 0, rng)
        names[split] = {kind: [] for kind in FOLDERS}
        for kind in FOLDERS:
            (folder / split / kind / "img").mkdir(parents=True)
        for part in parts:
            for number, image in archive.images(part, chosen[part]):
                kind = FOLDERS[labels[part][number]]
                image.save(folder / split / kind / "img" / f"{part}{number:06d}.png")
                names[split][kind].append(f"{part}{number:06d}.png")
    write_shots(folder / "fewshot_seed", names["valid"], rng)
    config = {"prompt_name": source.prompt_name, "pixel_metrics": False}
    (folder / f"{name}.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "LICENSE.txt").write_text(licence_text(name), encoding="utf-8")
    return {split: {kind: len(of) for kind, of in kinds.items()} for split, kinds in names.items()}


def write_shots(folder: Path, valid: dict[str, list[str]], rng: random.Random) -> None:
    """my{2,4,8,16}-shot.txt, each list the beginning of the next; none that a class has too few images for."""
    folder.mkdir()
    drawn = {letter: rng.sample(valid[kind], len(valid[kind])) for letter, kind in zip("na", FOLDERS, strict=True)}
    for count in SHOTS:
        if all(len(of) >= count for of in drawn.values()):
            lines = [f"{letter}-0: {' '.join(drawn[letter][:count])}\n" for letter in "an"]
            (folder / f"my{count}-shot.txt").write_text("".join(lines), encoding="utf-8")


def licence_text(name: str) -> str:
    """What the licence asks to be said: whose the images are, the licence, and what was changed."""
    source = SOURCES[name]
    return (
        f"{name} of MedMNIST v2. Licence: {source.licence}.\n\nPlease cite\n  {CITATION}\n  {source.citation}\n\n"
        f"MedMNIST's classes: {source.classes}.\nChanged here: written as PNG files, pixel for pixel; train and val "
        f"are valid/, test is test/; every class but the normal one is abnormal.\n"
    )


def download(name: str, size: int, folder: Path) -> Path:
    """MedMNIST's file, which the package `medmnist` fetches and checks; `InputError` where that cannot be."""
    try:
        import medmnist  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise InputError(
            f"{name}: `pip install 'medmnist>=3'` downloads it; or fetch the .npz by hand and give it with --npz"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    kind = getattr(medmnist, medmnist.INFO[name]["python_class"])
    try:
        kind(split="val", download=True, size=size, root=str(folder))  # the smallest split, as it is read as well
    except (RuntimeError, TypeError) as error:  # versions before 3 have no `size`
        raise InputError(f"{name}: medmnist could not download it ({error}); give the .npz with --npz") from error
    return folder / (f"{name}.npz" if size == SIZES[0] else f"{name}_{size}.npz")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("name", type=set_name, help=", ".join(SOURCES))
    parser.add_argument("--size", type=int, choices=SIZES, default=224, help="pixels a side, of the download")
    parser.add_argument("--npz", type=Path, metavar="FILE", help="MedMNIST's file, instead of the download")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder for <name>_AD (default: data)")
    parser.add_argument("--valid", type=integer(0), default=500, metavar="COUNT",
                        help="most images of a class in valid/, drawn with --seed; 0: all (default: 500)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=111, help="of the draws (default: 111)")
    parser.add_argument("--download_dir", type=Path, default=Path(".cache/medmnist"), help="where downloads are kept")
    return parser.parse_args(arguments)


def main() -> None:
    """Command line."""
    options = parse()
    root = options.out / f"{options.name}_AD"
    if root.exists():
        raise InputError(f"--out {options.out}: {root} is there already; remove it or choose another folder")
    archive = Archive(options.npz or download(options.name, options.size, options.download_dir))
    temporary = root.with_name(f".{root.name}.{os.getpid()}.tmp")  # so that half a data set never has its name
    try:
        temporary.mkdir(parents=True)
        counts = convert(archive, options.name, temporary, options.valid, options.seed)
        temporary.replace(root)
    except OSError as error:
        raise InputError(
            f"--out {options.out}: {error.filename or root} cannot be written: {error.strerror}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for split, kinds in counts.items():
        print(f"{root / split}: {kinds['good']} normal and {kinds['Ungood']} abnormal images")
    print(f"{options.name}: {SOURCES[options.name].licence}; {root / 'LICENSE.txt'} says whom to cite")
    print(f"next: python train.py --obj {options.name} --data_path {options.out} --shot 16")


if __name__ == "__main__":
    run_cli(main)
