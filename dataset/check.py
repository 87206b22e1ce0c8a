"""Examine a data set before any training.

    python -m dataset.check --obj Brain --data_path data
    python -m dataset.check --data_root /path/bottle          any folder; proposes a dataset/bottle.json

Errors stop a training or make its numbers false: exit code 1. Warnings are for a look and leave it 0. A bad argument
is code 2. Every image is decoded once; what is kept of it is a hash of its pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils import InputError, Parser, integer, prefetch, run_cli

from .layout import EXTENSIONS, KINDS, SPLITS, config_path, mask_folder, named_after, object_name, patient
from .medical_few import (
    ABNORMAL_ABOVE,
    Found,
    Header,
    MedicalDataset,
    check_shot_names,
    data_folder,
    decode,
    examine,
    parse_shot_list,
)

SHOWN = 3  # examples of a finding
NAMED = "no mask"  # the finding of which every example is shown: one cannot see what is not there
SMALL = 32  # pixels a side
SIXTEEN_BITS_AT_LEAST = 8192  # the largest value, below which a 16-bit image is all but black

# What a finding is called, and whether it is an error.
ERRORS = {
    "layout": "the layout",
    "unusable": "images or masks that cannot be used",
    "no mask": "abnormal images without a mask",
    "ambiguous": "names that make masks ambiguous",
    "mask size": "masks of another size than their image",
    "mask range": "masks with no pixel above half of the grey range, though not empty: they count as empty",
    "leak": "the same picture in valid and in test",
    "patient": "patients, by the number in the names, in valid and in test",
    "two labels": "the same picture among the normal and the abnormal",
    "list": "few-shot lists",
}
WARNINGS = {
    "duplicate": "the same picture twice in a class",
    "same name": "names that differ in the extension only",
    "empty mask": "abnormal images with an empty mask",
    "grey mask": "masks with greys: above half of the range counts as abnormal",
    "dark": "16-bit images with small values: scaled, they are all but black",
    "small": f"images under {SMALL} pixels a side",
    "orientation": "images with an EXIF rotation, which is ignored, as published: do their masks lie the same way?",
    "ignored": "files that are no image by their extension, left out",
    "unused": "masks that are not used: their names fit no image, or pixel_metrics is false",
}


@dataclass
class Findings:
    """Counts of what was found, with the first few examples of each, and all of `NAMED`."""

    titles: dict[str, str]
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Note one finding, or `count` that share an example."""
        self.counts[kind] += count
        if kind == NAMED or len(self.examples[kind]) < SHOWN:
            self.examples[kind].append(example)

    def lines(self, word: str) -> Iterator[str]:
        """A line for each kind, and one for each of its examples."""
        for kind, title in self.titles.items():
            if self.counts[kind]:
                yield f"{word}: {title}: {self.counts[kind]}"
                yield from (f"    {example}" for example in self.examples[kind])
                if self.counts[kind] > len(self.examples[kind]) == SHOWN:
                    yield "    ..."


@dataclass
class Look:
    """What one image and its mask showed."""

    header: Header | None = None
    digest: bytes = b""  # of the pixels: a picture saved anew without loss is the same
    errors: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)


def look(found: Found) -> Look:
    """Decode an image, and its mask where it has one of its own."""
    path, masks = found
    seen = Look()
    try:
        seen.header, image = examine(path)
        content = hashlib.sha256(f"{image.size}".encode())
        content.update(image.tobytes())
        seen.digest = content.digest()
        if seen.header.mode.startswith("I"):
            brightest = image.getextrema()[0][1] * 257
            if brightest < SIXTEEN_BITS_AT_LEAST:
                seen.warnings["dark"] = f"{path}: largest value about {brightest} of 65535"
        if min(image.size) < SMALL:
            seen.warnings["small"] = f"{path}: {_size(image.size)}"
        if seen.header.orientation != 1:
            seen.warnings["orientation"] = f"{path}: orientation {seen.header.orientation}"
        if len(masks) == 1:
            look_at_mask(masks[0], seen)
    except InputError as error:
        seen.errors["unusable"] = str(error)
    return seen


def look_at_mask(path: Path, seen: Look) -> None:
    """Compare a mask with its image and note what it holds."""
    mask = decode(path, "L")
    if mask.size != seen.header.size:
        seen.errors["mask size"] = f"{path}: {_size(mask.size)}, its image {_size(seen.header.size)}"
    greys = np.flatnonzero(mask.histogram())
    if greys[-1] == 0:
        seen.warnings["empty mask"] = str(path)
    elif greys[-1] <= ABNORMAL_ABOVE:
        seen.errors["mask range"] = f"{path}: largest value {greys[-1]} of 255"
    elif not {0, 255}.issuperset(greys.tolist()):
        seen.warnings["grey mask"] = f"{path}: {len(greys)} greys"


@dataclass
class ClassSummary:
    """A row of the table."""

    split: str
    kind: str
    images: int = 0
    masks: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)

    def cells(self) -> tuple[str, ...]:
        """The row's texts."""
        modes = ", ".join(mode if count == self.images else f"{mode} {count}" for mode, count in self.modes.items())
        return self.split, self.kind, f"{self.images}", f"{self.masks or '-'}", _span(self.sizes), modes


class Check:
    """Goes through a data set; `rows`, `errors`, `warnings` and `notes` are what it found."""

    def __init__(self, workers: int = 2) -> None:
        self.workers = workers
        self.errors, self.warnings = Findings(ERRORS), Findings(WARNINGS)
        self.rows: list[ClassSummary] = []
        self.notes: list[str] = []
        self.first: dict[bytes, tuple[str, str, str]] = {}  # digest -> split, class, name of the first such picture
        self.patients: dict[str, set[str]] = {split: set() for split in SPLITS}

    def run(self, dataset: MedicalDataset) -> None:
        """Examine every class of every split, then the few-shot lists."""
        known = {
            (split, kind): self.find(dataset, split, kind)
            for split in SPLITS
            for kind in KINDS
            if dataset.layout.folders(split, kind)
        }
        with tqdm(total=sum(map(len, known.values())), desc="check", unit="image", mininterval=0.5) as bar:
            for (split, kind), found in known.items():
                self.names(dataset, split, kind, found)
                row = ClassSummary(split, kind, len(found), sum(bool(masks) for _, masks in found))
                self.rows.append(row)
                for (path, _), seen in zip(found, prefetch(look, found, self.workers), strict=True):
                    self.image(dataset.name(path), row, seen)
                    bar.update()
        for number in sorted(self.patients["valid"] & self.patients["test"]):
            self.errors.add("patient", number)
        self.folders(dataset)
        self.lists(dataset, known)

    def find(self, dataset: MedicalDataset, split: str, kind: str) -> list[Found]:
        """The images of a class; none, and an error noted, where the folder is missing or empty."""
        try:
            return dataset.find(split, kind)
        except InputError as error:
            self.errors.add("layout", str(error))
            return []

    def image(self, name: str, row: ClassSummary, seen: Look) -> None:
        """Add one image to its row and to the findings."""
        for kind, words in seen.errors.items():
            self.errors.add(kind, words)
        for kind, words in seen.warnings.items():
            self.warnings.add(kind, words)
        if seen.header:
            row.sizes[seen.header.size] += 1
            row.modes[seen.header.mode] += 1
        if number := patient(name):
            self.patients[row.split].add(number)
        if not seen.digest:
            return
        split, kind, other = self.first.setdefault(seen.digest, (row.split, row.kind, name))
        if kind != row.kind:
            self.errors.add("two labels", f"{other} = {name}")
        if split != row.split:
            self.errors.add("leak", f"{other} = {name}")
        elif kind == row.kind and other != name:
            self.warnings.add("duplicate", f"{other} = {name}")

    def names(self, dataset: MedicalDataset, split: str, kind: str, found: list[Found]) -> None:
        """Names that are alike, and masks that are missing or ambiguous."""
        if kind == "abnormal" and dataset.pixel_metrics:
            missing, ambiguous = dataset.mask_problems(found)
            for path in missing:
                self.errors.add("no mask", path)
            for words in ambiguous:
                self.errors.add("ambiguous", words)
            return
        for (folder, stem), count in Counter((path.parent, path.stem) for path, _ in found).items():
            if count > 1:
                self.warnings.add("same name", f"{folder / stem}.*: {count} images ({split})")

    def folders(self, dataset: MedicalDataset) -> None:
        """Files beside the images that are left out, and masks that are not used."""
        listed = {folder for split in SPLITS for kind in KINDS for folder in dataset.layout.folders(split, kind)}
        for folder in sorted(listed):
            others = Counter(
                path.suffix.lower() or "no extension"
                for path in (dataset.root / folder).glob("[!.]*")
                if path.is_file() and path.suffix.lower() not in EXTENSIONS
            )
            for suffix, count in others.items():
                self.warnings.add("ignored", f"{dataset.root / folder}: {count} x {suffix}", count)
            masks = mask_folder(dataset.root, folder, dataset.layout.masks)
            if masks.is_dir() and not dataset.pixel_metrics:
                self.warnings.add("unused", str(masks))

    def lists(self, dataset: MedicalDataset, known: dict[tuple[str, str], list[Found]]) -> None:
        """Every line of every few-shot list that a training could use."""
        names = {kind: {dataset.shot_name(path, kind) for path, _ in known.get(("valid", kind), ())} for kind in KINDS}
        used = {path.name: path for path in reversed(dataset.shot_lists())}  # the first of a name wins
        for path in sorted(used.values()):
            try:
                lines = parse_shot_list(path)
            except InputError as error:
                self.errors.add("list", str(error))
                continue
            published = dataset.root not in path.parents
            if published and set().union(*names.values()).isdisjoint(chain.from_iterable(lines.values())):
                self.notes.append(f"{path.name} of the project names none of these images: shots would be sampled")
            else:
                self.lines(path, lines, names, dataset.root)

    def lines(
        self, path: Path, lines: dict[tuple[str, int], list[str]], names: dict[str, set[str]], root: Path
    ) -> None:
        """Every line of one few-shot list."""
        shots = int(path.name.removeprefix("my").removesuffix("-shot.txt"))
        for (letter, index), line in lines.items():
            kind = {"n": "normal", "a": "abnormal"}[letter]
            try:
                check_shot_names(line, names[kind], shots, f"{path}, {letter}-{index}", root)
            except InputError as error:
                self.errors.add("list", str(error))


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _span(sizes: Counter[tuple[int, int]]) -> str:
    """One size, or the smallest and largest width and height."""
    if len(sizes) <= 1:
        return "".join(map(_size, sizes))
    spans = (f"{min(sides)}-{max(sides)}" for sides in zip(*sizes, strict=True))
    return f"{' x '.join(spans)} ({len(sizes)} sizes)"


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows of texts as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def beginning(root: Path, config: Path) -> str:
    """What a JSON file for an unknown layout may look like, for the user to fill in."""
    images = (path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS)
    counts = Counter(path.parent.relative_to(root).as_posix() for path in images)
    folders = [f"    {folder}: {count}" for folder, count in sorted(counts.items())]
    classes = dict.fromkeys(KINDS, "FOLDER")
    values = {"prompt_name": config.stem, "pixel_metrics": False, **dict.fromkeys(SPLITS, classes)}
    return "\n".join([
        "folders with images, and how many:", *(folders or ["    none"]),
        f"to say which is which, put this into dataset/{config.name}, with these for FOLDER; a class may have the same "
        f"in valid and in test, which is then divided:",
        json.dumps(values, indent=2),
    ])  # fmt: skip


def main() -> int:
    """Command line; returns the exit code."""
    parser = Parser(prog="python -m dataset.check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--obj", type=object_name, help="data set (default: the name of --data_root)")
    parser.add_argument("--data_path", default="./data/", help="folder that holds <obj>_AD (default: ./data/)")
    parser.add_argument("--data_root", help="the data set's own folder, instead of <data_path>/<obj>_AD")
    parser.add_argument("--num_workers", type=integer(1, 256), default=2, help="threads that decode (default: 2)")
    options = parser.parse_args()
    if options.obj is None:
        if options.data_root is None:
            raise InputError("give --obj NAME, or --data_root DIR")
        options.obj = named_after(options.data_root)
    root = data_folder(options.obj, options.data_path, options.data_root)
    check = Check(options.num_workers)
    try:
        dataset = MedicalDataset.open(options.obj, options.data_path, options.data_root)
    except InputError as error:
        check.errors.add("layout", str(error))
        print(f"{options.obj}: {root}")
    else:
        check.run(dataset)
        metrics = "images and pixels are measured" if dataset.pixel_metrics else "images are measured, no masks"
        print(f'{options.obj}: {root}; prompts say "{dataset.prompt_name}"; {metrics}')
        if not check.errors.counts["layout"] and (note := dataset.split_note()):
            print(note)
        print(
            table([("split", "class", "images", "masks", "width x height", "modes"), *(r.cells() for r in check.rows)])
        )
    for line in (*check.errors.lines("error"), *check.warnings.lines("warning"), *check.notes):
        print(line)
    errors, warnings = check.errors.counts.total(), check.warnings.counts.total()
    print(f"errors: {errors}, warnings: {warnings}" if errors or warnings else "fine")
    config = config_path(options.obj)
    if not config.is_file() and not check.rows:
        print(beginning(root, config))
    elif not config.is_file() and not check.errors.counts["layout"]:
        print(f"layout found, not named by a file; to name or change it, put this into dataset/{config.name}:")
        print(dataset.layout.to_json())
    return 1 if errors else 0


if __name__ == "__main__":
    run_cli(main)
