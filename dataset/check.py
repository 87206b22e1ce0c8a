"""Examine a data set before any training.

    python -m dataset.check --obj Brain --data_path data
    python -m dataset.check --data_root /path/bottle          any folder; proposes a dataset/bottle.json

Errors stop a training or make its numbers false: exit code 1. Warnings are for a look and leave it 0, and so does what
the paper's own six data sets are known for. A bad argument is code 2. Every image is decoded once; what is kept of it
is a hash of its pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from utils import InputError, Parser, integer, prefetch, printable, run_cli

from .fewshot import SEEDS, check_shot_names, parse_shot_list
from .images import (
    ABNORMAL_ABOVE,
    NoImageError,
    Picture,
    file_kind,
    frames,
    mask_notes,
    parse_window,
    picture_notes,
    read,
    read_mask,
)
from .layout import KINDS, SPLITS, config_path, list_images, mask_folder, named_after, object_name
from .medical_few import ImageFile, MedicalDataset, Sample, data_folder
from .patients import compile_rule
from .volumes import PLANES

SHOWN = 3  # examples of a finding
NAMED = ("no mask", "valid mask")  # of these every example is shown: one cannot see what is not there
SMALL = 32  # pixels a side
# Images of the paper's data sets, (normal, abnormal) or all of them; where sources disagree, each.
PUBLISHED_COUNTS: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {
    "Brain": {"valid": ((39, 44),), "test": ((640, 3075),)},
    "Liver": {"valid": ((93, 73),), "test": ((833, 660),)},
    "Retina_RESC": {"valid": ((45, 70),), "test": ((1041, 764),)},
    "Retina_OCT2017": {"test": ((242, 726),)},
    "Chest": {"valid": ((1490,),), "test": ((17194,),)},
    "Histopathology": {"test": ((1028, 1008), (1003, 994))},
}

# What a finding is called, and whether it is an error.
ERRORS = {
    "layout": "the layout",
    "unusable": "images or masks that cannot be used",
    "no mask": "abnormal images without a mask",
    "ambiguous": "names that make masks ambiguous",
    "mask size": "masks of another size than their image",
    "mask range": "masks with no pixel above --mask_above, though not empty: they count as empty",
    "leak": "the same picture in valid and in test",
    "patient": "patients, by the names, in valid and in test",
    "two labels": "the same picture among the normal and the abnormal",
    "list": "few-shot lists",
}
WARNINGS = {
    "duplicate": "the same picture twice in a class",
    "same name": "names that differ in the extension only",
    "valid mask": "abnormal images of valid without a mask: no shots, and left out of the calibration",
    "any size": "masks of another size than their image: resized, as the published loader does",
    "empty": "abnormal images with an empty mask",
    "full": "masks that cover more than 90% of their image",
    "grey": "masks with greys: above --mask_above counts as abnormal",
    "alpha": "masks that lie in the alpha channel",
    "wide": "8-bit values in 16- or 32-bit files, read as 8 bits, as the published program reads them",
    "dark": "16-bit images with small values: scaled, they are all but black",
    "window": "grey levels without a window of their own",
    "pixels": "slices resampled to square pixels, more than 3 times",
    "constant": "pictures that are nearly constant",
    "clipped": "pictures that are clipped",
    "small": f"images under {SMALL} pixels a side",
    "orientation": "images or masks with an orientation tag, which is ignored, whatever the format: do they fit?",
    "no image": "DICOM objects without a picture, left out",
    "ignored": "files that are no image by their extension, left out",
    "unused": "masks that are not used: their names fit no image, or pixel_metrics is false",
    "list": "few-shot lists",
}
# What the paper's own files are known for: listed, but no error.
KNOWN = {kind: f"published: {ERRORS[kind]}" for kind in ("leak", "patient", "two labels")}


@dataclass
class Findings:
    """Counts of what was found, with the first few examples of each, and all of `NAMED`."""

    titles: dict[str, str]
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Note one finding, or `count` that share an example."""
        self.counts[kind] += count
        if kind in NAMED or len(self.examples[kind]) < SHOWN:
            self.examples[kind].append(example)

    def lines(self, word: str = "") -> Iterator[str]:
        """A line for each kind, and one for each of its examples."""
        for kind, title in self.titles.items():
            if self.counts[kind]:
                yield f"{word}{title}: {self.counts[kind]}"
                yield from (f"    {example}" for example in self.examples[kind])
                if self.counts[kind] > len(self.examples[kind]) == SHOWN:
                    yield "    ..."


@dataclass
class Inspection:
    """What one image and its mask showed."""

    name: str
    mode: str = ""
    size: tuple[int, int] | None = None  # width, height
    digest: bytes = b""  # of the pixels: a picture saved anew without loss is the same
    errors: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)


def inspect_image(sample: Sample, above: int, alone: bool = True) -> Inspection:
    """Decode an image, and its mask where it has one of its own.

    `alone` is False for slices, of which some may be black.
    """
    result = Inspection(sample.name)
    try:
        picture = read(sample)
        result.mode, result.size = picture.mode, picture.image.size
        content = hashlib.sha256(f"{picture.image.size}".encode())
        content.update(picture.image.tobytes())
        result.digest = content.digest()
        notes = picture.notes
        if alone and min(picture.image.size) >= SMALL and "dark" not in notes:
            notes = {**notes, **picture_notes(picture.image)}
        result.warnings |= {kind: f"{sample.path}: {text}" for kind, text in notes.items()}
        if min(picture.image.size) < SMALL:
            result.warnings["small"] = f"{sample.path}: {_size(picture.image.size)}"
        if picture.orientation != 1:
            result.warnings["orientation"] = f"{sample.path}: orientation {picture.orientation}"
        inspect_mask(sample, picture, above, result)
    except InputError as error:
        result.errors["unusable"] = str(error)
    return result


def inspect_mask(sample: Sample, picture: Picture, above: int, result: Inspection) -> None:
    """Compare a mask with its image and note what it holds."""
    mask, notes = read_mask(sample)
    if mask is None:
        return
    notes |= mask_notes(mask, above)
    if "labels" in notes:
        result.errors["mask range"] = f"{sample.mask}: {notes.pop('labels')}"
        notes.pop("wide", None)
    result.warnings |= {kind: f"{sample.mask}: {text}" for kind, text in notes.items()}
    if mask.size != picture.image.size:
        words = f"{sample.mask}: {_size(mask.size)}, its image {_size(picture.image.size)}"
        findings = result.warnings if sample.any_mask_size else result.errors
        findings["any size" if sample.any_mask_size else "mask size"] = words


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
    """Goes through a data set; `rows`, `errors`, `warnings`, `known` and `notes` are what it found."""

    def __init__(self, workers: int = 2) -> None:
        self.workers = workers
        self.errors, self.warnings, self.known = Findings(ERRORS), Findings(WARNINGS), Findings(KNOWN)
        self.rows: list[ClassSummary] = []
        self.notes: list[str] = []
        self.first: dict[bytes, tuple[str, str, str]] = {}  # digest -> split, class, name of the first such picture
        self.patients: dict[str, set[str]] = {split: set() for split in SPLITS}
        self.without_mask: set[str] = set()  # abnormal images of valid

    def run(self, dataset: MedicalDataset) -> None:
        """Examine every class of every split, then the few-shot lists."""
        files = {
            (split, kind): self.find(dataset, split, kind)
            for split in SPLITS
            for kind in KINDS
            if dataset.layout.folders(split, kind)
        }
        leak = self.known if dataset.is_benchmark else self.errors
        with tqdm(total=sum(map(len, files.values())), desc="check", unit="file", mininterval=0.5) as bar:
            for (split, kind), found in files.items():
                self.names(dataset, split, kind, found)
                row = ClassSummary(split, kind)
                self.rows.append(row)

                def examine(file: ImageFile, kind: str = kind) -> list[Inspection]:
                    return inspect_file(dataset, file, kind)

                for file, results in zip(found, prefetch(examine, found, self.workers), strict=True):
                    row.masks += bool(file.masks)
                    for result in results:
                        self.image(row, result, leak)
                    if number := dataset.patient(file.path, file.folder):
                        self.patients[split].add(number)
                    bar.update()
        for number in sorted(self.patients["valid"] & self.patients["test"]):
            leak.add("patient", number)
        self.folders(dataset)
        self.lists(dataset)
        for path in sorted(self.without_mask):
            self.warnings.add("valid mask", path)
        self.counts(dataset)
        if not self.errors.counts["layout"]:
            self.notes.append(dataset.patients_note())

    def find(self, dataset: MedicalDataset, split: str, kind: str) -> list[ImageFile]:
        """The images of a class; none, and an error noted, where the folder is missing or empty."""
        try:
            return dataset.find(split, kind)
        except InputError as error:
            self.errors.add("layout", str(error))
            return []

    def image(self, row: ClassSummary, result: Inspection, leak: Findings) -> None:
        """Add one image to its row and to the findings."""
        row.images += "no image" not in result.warnings
        for kind, words in result.errors.items():
            self.errors.add(kind, words)
        for kind, words in result.warnings.items():
            self.warnings.add(kind, words)
        if result.size:
            row.sizes[result.size] += 1
            row.modes[result.mode] += 1
        if not result.digest:
            return
        name = result.name
        split, kind, other = self.first.setdefault(result.digest, (row.split, row.kind, name))
        if kind != row.kind:
            leak.add("two labels", f"{other} = {name}")
        if split != row.split:
            leak.add("leak", f"{other} = {name}")
        elif kind == row.kind and other != name:
            self.warnings.add("duplicate", f"{other} = {name}")

    def names(self, dataset: MedicalDataset, split: str, kind: str, found: list[ImageFile]) -> None:
        """Names that are alike, and masks that are missing or ambiguous."""
        if kind == "abnormal" and dataset.pixel_metrics:
            missing, ambiguous = dataset.mask_problems(found)
            for path in missing:
                if split == "valid":
                    self.without_mask.add(path)  # an error only where it is a shot
                else:
                    self.errors.add("no mask", path)
            for words in ambiguous:
                self.errors.add("ambiguous", words)
            return
        for (folder, stem), count in Counter((file.path.parent, file.path.stem) for file in found).items():
            if count > 1:
                self.warnings.add("same name", f"{folder / stem}.*: {count} images ({split})")

    def folders(self, dataset: MedicalDataset) -> None:
        """Files beside the images that are left out, and masks that are not used."""
        listed = {folder for split in SPLITS for kind in KINDS for folder in dataset.layout.folders(split, kind)}
        for folder in sorted(listed):
            others = Counter(
                path.suffix.lower() or "no extension"
                for path in (dataset.root / folder).glob("[!.]*")
                if path.is_file() and file_kind(path) is None
            )
            for suffix, count in others.items():
                self.warnings.add("ignored", f"{dataset.root / folder}: {count} x {suffix}", count)
            masks = mask_folder(dataset.root, folder, dataset.layout.masks)
            if masks.is_dir() and not dataset.pixel_metrics and masks != dataset.root / folder:
                self.warnings.add("unused", str(masks))

    def lists(self, dataset: MedicalDataset) -> None:
        """Every line of every few-shot list that a training could use."""
        shots = {kind: _known_shots(dataset, kind) for kind in KINDS}
        names = set().union(*(known or () for known in shots.values()))
        used = {path.name: path for path in reversed(dataset.shot_lists())}  # the first of a name wins
        for path in sorted(used.values()):
            try:
                lines, warnings = parse_shot_list(path)
            except InputError as error:
                self.errors.add("list", str(error))
                continue
            if SEEDS in path.parents and names.isdisjoint(chain.from_iterable(lines.values())):
                self.notes.append(f"{path.name} of the project names none of these images: shots would be sampled")
                continue
            count = int(path.name.removeprefix("my").removesuffix("-shot.txt"))
            for (letter, index), line in lines.items():
                known = shots[{"n": "normal", "a": "abnormal"}[letter]]
                if known is None:
                    continue
                try:
                    warnings += check_shot_names(line, known, count, f"{path}, {letter}-{index}", dataset.root)
                except InputError as error:
                    self.errors.add("list", str(error))
                for path_of_shot in {str(known[name].path) for name in line if name in known} & self.without_mask:
                    self.without_mask.remove(path_of_shot)
                    self.errors.add("no mask", path_of_shot)
            for text in warnings:
                self.warnings.add("list", text)

    def counts(self, dataset: MedicalDataset) -> None:
        """A line that compares the numbers of images with the published ones, for the paper's six."""
        expected = PUBLISHED_COUNTS.get(dataset.obj)
        if expected is None or not dataset.is_benchmark:
            return
        parts, complete = [], True
        for split, accepted in expected.items():
            images = tuple(row.images for row in self.rows if row.split == split)
            match = any((sum(images),) == counts if len(counts) == 1 else images == counts for counts in accepted)
            complete &= match
            published = " or ".join(" + ".join(map(str, counts)) for counts in accepted)
            parts.append(f"{split} {' + '.join(map(str, images))}" + ("" if match else f" (published: {published})"))
        words = "counts as published" if complete else "warning: counts: other than published: is the copy whole?"
        self.notes.append(f"{words}: {'; '.join(parts)} (normal + abnormal)")


def _known_shots(dataset: MedicalDataset, kind: str) -> dict[str, Sample] | None:
    try:
        return {name: sample for name, (_, sample) in dataset.known_shots(kind).items()}
    except InputError:
        return None  # it is among the errors already


def inspect_file(dataset: MedicalDataset, file: ImageFile, kind: str) -> list[Inspection]:
    """Every image in a file."""
    name = dataset.name(file.path)
    masks = file.masks if len(file.masks) == 1 else []
    try:
        frames(file.path, dataset.options)
        samples = dataset.expand(file._replace(masks=masks), kind)
    except NoImageError as error:
        return [Inspection(name, warnings={"no image": str(error)})]
    except InputError as error:
        return [Inspection(name, errors={"unusable": str(error)})]
    if not samples:
        return [Inspection(name, warnings={"empty": f"{masks[0]}: no slice is marked"})]
    return [inspect_image(sample, dataset.mask_above, alone=len(samples) == 1) for sample in samples]


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
    counts = Counter(path.parent.relative_to(root).as_posix() for path in list_images(root))
    folders = [f"    {folder}: {count}" for folder, count in sorted(counts.items())]
    classes = dict.fromkeys(KINDS, "FOLDER")
    values = {"prompt_name": config.stem, "pixel_metrics": False, **dict.fromkeys(SPLITS, classes)}
    return "\n".join([
        "folders with images, and how many:", *(folders or ["    none"]),
        f"to say which is which, put this into dataset/{config.name} (or into the data set's own folder), with these "
        f"for FOLDER; a class may have the same in valid and in test, which is then divided:",
        json.dumps(values, indent=2),
    ])  # fmt: skip


def parse() -> argparse.Namespace:
    """Command line."""
    parser = Parser(prog="python -m dataset.check", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--obj", type=object_name, help="data set (default: the name of --data_root)")
    parser.add_argument("--data_path", default="./data/", help="folder that holds <obj>_AD (default: ./data/)")
    parser.add_argument("--data_root", help="the data set's own folder, instead of <data_path>/<obj>_AD")
    parser.add_argument("--patient", metavar="REGEX", help="finds the patient in an image's path below that folder")
    parser.add_argument("--mask_above", type=integer(0, 254), help="grey of a mask above which it is abnormal (127)")
    parser.add_argument("--window", nargs="+", default=[], metavar="W", help="CENTER WIDTH, auto or full, of grey "
                        "values beyond 8 bits (default: the file's)")  # fmt: skip
    parser.add_argument("--plane", choices=PLANES, help="in which NIfTI volumes are cut (axial)")
    parser.add_argument("--num_workers", type=integer(1, 256), default=2, help="threads that decode (default: 2)")
    options = parser.parse_args()
    if options.obj is None:
        if options.data_root is None:
            raise InputError("give --obj NAME, or --data_root DIR")
        options.obj = named_after(options.data_root)
        try:
            object_name(options.obj)
        except InputError as error:
            raise InputError(
                f"--data_root {options.data_root}: its name cannot be a data set's; give --obj NAME"
            ) from error
    return options


def main() -> int:
    """Check a data set and print what was found; returns the exit code."""
    options = parse()
    root = data_folder(options.obj, options.data_path, options.data_root)
    if options.patient is not None:
        compile_rule(options.patient, "--patient")
    parse_window(options.window)
    check = Check(options.num_workers)
    try:
        dataset = MedicalDataset.from_options(options)
    except InputError as error:
        check.errors.add("layout", str(error))
        print(printable(f"{options.obj}: {root}"))
    else:
        check.run(dataset)
        metrics = "images and pixels are measured" if dataset.pixel_metrics else "images are measured, no masks"
        if dataset.pixel_metrics and dataset.mask_above != ABNORMAL_ABOVE:
            metrics += f", a mask's grey above {dataset.mask_above} is abnormal"
        print(printable(f'{options.obj}: {root}; prompts say "{dataset.prompt_name}"; {metrics}'))
        if not check.errors.counts["layout"] and (note := dataset.split_note()):
            print(printable(note))
        print(
            table([("split", "class", "images", "masks", "width x height", "modes"), *(r.cells() for r in check.rows)])
        )
    found = (check.errors.lines("error: "), check.warnings.lines("warning: "), check.known.lines(), check.notes)
    for line in chain(*found):
        print(printable(line))
    errors = check.errors.counts.total()
    warnings = check.warnings.counts.total() + sum(note.startswith("warning: ") for note in check.notes)
    print(f"errors: {errors}, warnings: {warnings}" if errors or warnings else "fine")
    config = config_path(options.obj, root)
    if not config.is_file() and not check.rows:
        print(beginning(root, config))
    elif not config.is_file() and not check.errors.counts["layout"]:
        print(f"layout found, not named by a file; to name or change it, put this into dataset/{config.name}:")
        print(dataset.layout.to_json())
    return 1 if errors else 0


if __name__ == "__main__":
    run_cli(main)
