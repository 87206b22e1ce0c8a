"""The MVFA layout on disk: splits, images, masks and the few-shot lists.

<data_path>/<obj>_AD/{valid,test}/{good,Ungood}/{img,anomaly_mask}/NAME
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from utils import InputError

FOLDER = Path(__file__).parent
CLASS_FOLDERS = ("good", "Ungood")  # label 0, label 1
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Sample:
    """One image on disk."""

    path: Path
    label: int  # 1 = abnormal
    mask: Path | None  # of abnormal images, where the data set has masks
    name: str  # the path below the data set's folder: what reports and JSON files call it

    def content_hash(self) -> str:
        """SHA-256 of the file's bytes: a changed file is another image."""
        try:
            return hashlib.sha256(self.path.read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class MedicalDataset:
    """A data set: its folder, its name in prompts and whether it has masks."""

    obj: str
    root: Path
    prompt_name: str
    pixel_metrics: bool

    @classmethod
    def open(cls, obj: str, data_path: str | Path) -> MedicalDataset:
        """Find <data_path>/<obj>_AD; `InputError` where it or one of its splits is missing."""
        config = json.loads((FOLDER / f"{obj}.json").read_text())
        root = Path(data_path) / f"{obj}_AD"
        for split in ("valid", "test"):
            if not (root / split).is_dir():
                raise InputError(
                    f"--data_path {data_path}: {root / split} not found; the README says where to get {obj}, "
                    f"and `python -m dataset.phantom --obj {obj} --out {data_path}` draws a made-up one"
                )
        return cls(obj, root, config["prompt_name"], config["pixel_metrics"])

    def samples(self, split: str) -> list[Sample]:
        """The images of `valid` or `test`, normal first, each class sorted by name."""
        return [
            self._sample(path, label)
            for label, folder in enumerate(CLASS_FOLDERS)
            for path in self._images(split, folder)
        ]

    def _images(self, split: str, class_folder: str) -> list[Path]:
        folder = self.root / split / class_folder / "img"
        if not folder.is_dir():
            raise InputError(f"{folder} not found; the README shows the layout of a data set")
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and path.is_file())
        if not paths:
            raise InputError(f"{folder}: no images ({', '.join(EXTENSIONS)})")
        return paths

    def _sample(self, path: Path, label: int) -> Sample:
        mask = self._mask(path) if label and self.pixel_metrics else None
        return Sample(path, label, mask, path.relative_to(self.root).as_posix())

    @staticmethod
    def _mask(image: Path) -> Path:
        folder = image.parent.parent / "anomaly_mask"
        for suffix in (image.suffix, *EXTENSIONS):
            mask = folder / f"{image.stem}{suffix}"
            if mask.is_file():
                return mask
        raise InputError(f"{image}: has no mask {folder / image.name}")

    def shots(self, shot: int, iterate: int, seed: int) -> Shots:
        """The few-shot images; see `Shots`."""
        names = {kind: [path.name for path in self._images("valid", kind)] for kind in CLASS_FOLDERS}
        chosen = None
        if iterate >= 0:
            own = self.root / "fewshot_seed" / f"my{shot}-shot.txt"
            project = FOLDER / "fewshot_seed" / self.obj / f"my{shot}-shot.txt"
            if own.is_file():
                chosen = read_shot_list(own, iterate)
                source = str(own)
            elif project.is_file():
                chosen = read_shot_list(project, iterate)
                source = f"dataset/fewshot_seed/{self.obj}/{project.name}"
                if not any(
                    set(listed) & set(names[kind]) for listed, kind in zip(chosen, CLASS_FOLDERS[::-1], strict=True)
                ):
                    chosen = None  # a list for other images under the same name, as with the phantom
        if chosen is None:
            chosen = sample_shots(names["Ungood"], names["good"], shot, seed)
            source = f"sampled with seed {seed} from the sorted names of valid/ (no list for {shot} shots is used)"
        abnormal, normal = (
            self._find_shots(listed, kind, source) for listed, kind in zip(chosen, CLASS_FOLDERS[::-1], strict=True)
        )
        return Shots(abnormal, normal, source)

    def _find_shots(self, names: list[str], class_folder: str, source: str) -> list[Sample]:
        folder = self.root / "valid" / class_folder / "img"
        found = []
        for name in names:
            if PurePath(name).name != name or name in ("..", "."):
                raise InputError(f"{source}: {name!r} is not a plain file name")
            if not (folder / name).is_file():
                raise InputError(f"{source}: names {name}, but {folder / name} does not exist")
            found.append(self._sample(folder / name, CLASS_FOLDERS.index(class_folder)))
        return found


@dataclass(frozen=True)
class Shots:
    """The few labelled images that training sees."""

    abnormal: list[Sample]
    normal: list[Sample]
    source: str  # the list file, or how they were sampled

    def names(self) -> dict[str, list[str]]:
        """What is printed, logged and stored in the checkpoint."""
        return {
            "abnormal": [sample.path.name for sample in self.abnormal],
            "normal": [sample.path.name for sample in self.normal],
        }


def read_shot_list(path: Path, iterate: int) -> tuple[list[str], list[str]]:
    """Read lines `a-K: name name ...` and `n-K: name name ...` of a few-shot list.

    Returns:
        Names of the abnormal and of the normal shots, in the file's order.

    Raises:
        InputError: unreadable file, a line of another form, no line or two lines for `iterate`, a name twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a few-shot list ({error})") from error
    lines: dict[tuple[str, int], list[str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        match = re.fullmatch(r"\s*([an])-(\d{1,9})\s*:(.*)", line)
        if match is None:
            raise InputError(f"{path}, line {number}: expected `a-K: name ...` or `n-K: name ...`, found {line[:60]!r}")
        key = (match[1], int(match[2]))
        if key in lines:
            raise InputError(f"{path}, line {number}: a second line for {key[0]}-{key[1]}")
        lines[key] = match[3].split()
        if len(set(lines[key])) < len(lines[key]):
            raise InputError(f"{path}, line {number}: a name stands there twice")
    for kind in "an":
        if not lines.get((kind, iterate)):
            known = ", ".join(sorted({str(index) for _, index in lines})) or "none"
            raise InputError(f"--iterate {iterate}: {path} has no line `{kind}-{iterate}:` with names (it has {known})")
    return lines["a", iterate], lines["n", iterate]


def sample_shots(abnormal: list[str], normal: list[str], shot: int, seed: int) -> tuple[list[str], list[str]]:
    """Draw `shot` names of each class from the sorted names; `InputError` where there are too few."""
    for kind, names in (("Ungood", abnormal), ("good", normal)):
        if len(names) < shot:
            raise InputError(f"--shot {shot}: valid/{kind}/img holds only {len(names)} images")
    draw = random.Random(seed)
    return draw.sample(sorted(abnormal), shot), draw.sample(sorted(normal), shot)


def load_image(path: Path, size: int) -> Tensor:
    """Read an image as RGB, resized bicubically (antialiased): (3, size, size) float32 in [0, 1]."""
    image = _open(path).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def load_mask(sample: Sample, size: int) -> Tensor:
    """The mask of a sample, resized by nearest neighbour: (size, size) bool, all False where there is none."""
    if sample.mask is None:
        return torch.zeros(size, size, dtype=torch.bool)
    mask = _open(sample.mask, "L")
    with Image.open(sample.path) as image:
        if image.size != mask.size:
            raise InputError(f"{sample.mask}: {mask.size} pixels, but its image has {image.size}")
    return torch.from_numpy(np.array(mask.resize((size, size), Image.Resampling.NEAREST))) > 127


def _open(path: Path, mode: str = "RGB") -> Image.Image:
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits a pixel: scaled, where Pillow would saturate to white
                values = np.asarray(image).astype(np.float64)
                return Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8)).convert(mode)
            return image.convert(mode)
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: too many pixels; make it smaller than 13,000 x 13,000") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path}: not a readable image, or cut short ({error})") from error
