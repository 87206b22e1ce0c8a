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
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, product
from pathlib import Path

from tqdm import tqdm

from utils import InputError, Parser, bar_seconds, integer, prefetch, printable, run_cli

from .fewshot import SEEDS, check_shot_names, parse_shot_list
from .layout import KINDS, SPLITS, add_reading_flags, config_path, list_images, mask_folder, object_name, object_of
from .medical_few import ImageFile, MedicalDataset, Sample, data_folder
from .patients import compile_rule
from .readers import (
    ABNORMAL_ABOVE,
    NoImageError,
    file_kind,
    frames,
    mask_notes,
    parse_window,
    picture_notes,
    read,
    read_mask,
)

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

# What is found, and what it is called. Errors first, in the order of the report.
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
    "bad list": "few-shot lists",
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
TOLERATED = ("leak", "patient", "two labels")  # of the paper's own files, where they are listed, but no error
Finding = tuple[str, str]  # kind, words


@dataclass
class Inspection:
    """What one image and its mask showed."""

    name: str
    findings: list[Finding]
    mode: str = ""
    size: tuple[int, int] | None = None  # width, height; None where it could not be read
    digest: bytes = b""  # of the pixels: a picture saved anew without loss is the same


def inspect_file(dataset: MedicalDataset, file: ImageFile, kind: str) -> list[Inspection]:
    """Decode every image in a file, and its mask where it has one of its own."""
    name = dataset.name(file.path)
    masks = file.masks if len(file.masks) == 1 else []
    try:
        frames(file.path, dataset.options)
        samples = dataset.samples_in(file._replace(masks=masks), kind)
    except NoImageError as error:
        return [Inspection(name, [("no image", str(error))])]
    except InputError as error:
        return [Inspection(name, [("unusable", str(error))])]
    if not samples:
        return [Inspection(name, [("empty", f"{masks[0]}: no slice is marked")])]
    return [inspect_image(sample, dataset.mask_above, alone=len(samples) == 1) for sample in samples]


def inspect_image(sample: Sample, above: int, alone: bool) -> Inspection:
    """Decode an image and its mask; `alone` is False for slices, of which some may be black."""
    result = Inspection(sample.name, [])
    try:
        picture = read(sample)
        size, notes = picture.image.size, dict(picture.notes)
        if alone and min(size) >= SMALL and "dark" not in notes:
            notes |= picture_notes(picture.image)
        if min(size) < SMALL:
            notes["small"] = _size(size)
        if picture.orientation != 1:
            notes["orientation"] = f"orientation {picture.orientation}"
        result.findings += [(kind, f"{sample.path}: {text}") for kind, text in notes.items()]
        result.mode, result.size = picture.mode, size
        result.digest = hashlib.sha256(f"{size}".encode() + picture.image.tobytes()).digest()
        mask = read_mask(sample)
        if mask is not None:
            notes = mask.notes | mask_notes(mask, above)
            if labels := notes.pop("labels", ""):
                notes.pop("wide", None)
                notes["mask range"] = labels
            if mask.image.size not in (size, picture.stored):
                kind = "any size" if sample.published else "mask size"
                notes[kind] = f"{_size(mask.image.size)}, its image {_size(size)}"
            result.findings += [(kind, f"{sample.mask}: {text}") for kind, text in notes.items()]
    except InputError as error:
        result.findings.append(("unusable", str(error)))
    return result


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
    """Goes through a data set; `rows`, `counts`, `examples` and `notes` are what it found."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  # of `ERRORS` and `WARNINGS`
        self.examples: defaultdict[str, list[str]] = defaultdict(list)  # the first few of each, and all of `NAMED`
        self.rows: list[ClassSummary] = []
        self.notes: list[str] = []
        self.known: tuple[str, ...] = ()  # kinds that are no error here
        self.first: dict[bytes, tuple[str, str, str]] = {}  # digest -> split, class, name of the first such picture
        self.without_mask: set[str] = set()  # abnormal images of valid

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Note one finding, or `count` that share an example."""
        self.counts[kind] += count
        if kind in NAMED or len(self.examples[kind]) < SHOWN:
            self.examples[kind].append(example)

    def lines(self) -> Iterator[str]:
        """A line for each kind of finding, and one for each of its examples."""
        titles = {kind: f"error: {title}" for kind, title in ERRORS.items() if kind not in self.known}
        titles |= {kind: f"warning: {title}" for kind, title in WARNINGS.items()}
        titles |= {kind: f"published: {ERRORS[kind]}" for kind in self.known}
        for kind, title in titles.items():
            if self.counts[kind]:
                yield f"{title}: {self.counts[kind]}"
                yield from (f"    {example}" for example in self.examples[kind])
                if self.counts[kind] > len(self.examples[kind]) == SHOWN:
                    yield "    ..."

    def run(self, dataset: MedicalDataset, workers: int = 2) -> None:
        """Examine every class of every split, then the few-shot lists."""
        self.known = TOLERATED if dataset.is_benchmark else ()
        files: dict[tuple[str, str], list[ImageFile]] = {}
        for split, kind in product(SPLITS, KINDS):
            if dataset.layout.folders(split, kind):
                try:
                    files[split, kind] = dataset.image_files(split, kind)
                except InputError as error:
                    self.add("layout", str(error))
                    files[split, kind] = []
        patients: dict[str, set[str | None]] = {split: set() for split in SPLITS}
        with tqdm(total=sum(map(len, files.values())), desc="check", unit="file", mininterval=bar_seconds()) as bar:
            for (split, kind), listed in files.items():
                self.names(dataset, split, kind, listed)
                row = ClassSummary(split, kind)
                self.rows.append(row)
                inspect = partial(inspect_file, dataset, kind=kind)
                for file, results in zip(listed, prefetch(inspect, listed, workers), strict=True):
                    row.masks += bool(file.masks)
                    for result in results:
                        self.image(row, result)
                    patients[split].add(dataset.patient(file.path, file.folder))
                    bar.update()
        for number in sorted(filter(None, patients["valid"] & patients["test"])):
            self.add("patient", number)
        self.folders(dataset)
        self.lists(dataset)
        for path in sorted(self.without_mask):
            self.add("valid mask", path)
        self.compare_counts(dataset)
        if not self.counts["layout"]:
            self.notes.append(dataset.patients_note())

    def image(self, row: ClassSummary, result: Inspection) -> None:
        """Add one image to its row and to the findings."""
        row.images += all(kind != "no image" for kind, _ in result.findings)
        for finding in result.findings:
            self.add(*finding)
        if not result.size:
            return
        row.sizes[result.size] += 1
        row.modes[result.mode] += 1
        split, kind, other = self.first.setdefault(result.digest, (row.split, row.kind, result.name))
        if kind != row.kind:
            self.add("two labels", f"{other} = {result.name}")
        if split != row.split:
            self.add("leak", f"{other} = {result.name}")
        elif kind == row.kind and other != result.name:
            self.add("duplicate", f"{other} = {result.name}")

    def names(self, dataset: MedicalDataset, split: str, kind: str, files: list[ImageFile]) -> None:
        """Names that are alike, and masks that are missing or ambiguous."""
        if kind == "abnormal" and dataset.pixel_metrics:
            missing, ambiguous = dataset.mask_problems(files)
            if split == "valid":
                self.without_mask |= set(missing)  # an error only where it is a shot
                missing = []
            for name, faults in (("no mask", missing), ("ambiguous", ambiguous)):
                for words in faults:
                    self.add(name, words)
            return
        for path, count in Counter(file.path.with_name(file.path.stem) for file in files).items():
            if count > 1:
                self.add("same name", f"{path}.*: {count} images ({split})")

    def folders(self, dataset: MedicalDataset) -> None:
        """Files beside the images that are left out, and masks that are not used."""
        listed = {name for split, kind in product(SPLITS, KINDS) for name in dataset.layout.folders(split, kind)}
        for name in sorted(listed):
            folder = dataset.root / name
            others = [path for path in folder.glob("[!.]*") if path.is_file() and file_kind(path) is None]
            for suffix, count in Counter(path.suffix.lower() or "no extension" for path in others).items():
                self.add("ignored", f"{folder}: {count} x {suffix}", count)
            masks = mask_folder(dataset.root, name, dataset.layout.masks)
            if masks.is_dir() and not dataset.pixel_metrics and masks != folder:
                self.add("unused", str(masks))

    def lists(self, dataset: MedicalDataset) -> None:
        """Every line of every few-shot list that a training could use."""
        shots: dict[str, dict[str, str]] = {}  # `a` or `n` -> name -> path
        for kind in KINDS:
            with suppress(InputError):  # it is among the errors already
                shots[kind[0]] = {name: str(sample.path) for name, (_, sample) in dataset.known_shots(kind).items()}
        used = {path.name: path for path in reversed(dataset.shot_lists())}  # the first of a name wins
        for path in sorted(used.values()):
            try:
                lines, warnings = parse_shot_list(path)
            except InputError as error:
                self.add("bad list", str(error))
                continue
            if SEEDS in path.parents and set(chain(*shots.values())).isdisjoint(chain(*lines.values())):
                self.notes.append(f"{path.name} of the project names none of these images: shots would be sampled")
                continue
            count = int(path.name.removeprefix("my").removesuffix("-shot.txt"))
            for (letter, index), line in lines.items():
                if letter not in shots:
                    continue
                try:
                    where = f"{path}, {letter}-{index}"
                    warnings += check_shot_names(line, shots[letter], count, where, dataset.root)
                except InputError as error:
                    self.add("bad list", str(error))
                for path_of_shot in {shots[letter].get(name, "") for name in line} & self.without_mask:
                    self.without_mask.remove(path_of_shot)
                    self.add("no mask", path_of_shot)
            for text in warnings:
                self.add("list", text)

    def compare_counts(self, dataset: MedicalDataset) -> None:
        """A line that compares the numbers of images with the published ones, for the paper's six."""
        parts, complete = [], True
        for split, accepted in (PUBLISHED_COUNTS.get(dataset.obj, {}) if dataset.is_benchmark else {}).items():
            images = tuple(row.images for row in self.rows if row.split == split)
            match = images in accepted or (sum(images),) in accepted
            complete &= match
            published = " or ".join(" + ".join(map(str, counts)) for counts in accepted)
            parts.append(f"{split} {' + '.join(map(str, images))}" + ("" if match else f" (published: {published})"))
        words = "counts as published" if complete else "warning: counts: other than published: is the copy whole?"
        if parts:
            self.notes.append(f"{words}: {'; '.join(parts)} (normal + abnormal)")


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


def json_template(root: Path, config: Path) -> str:
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
    add_reading_flags(parser)
    parser.add_argument("--num_workers", type=integer(1, 256), default=2, help="threads that decode (default: 2)")
    options = parser.parse_args()
    if options.obj is None:
        if options.data_root is None:
            raise InputError("give --obj NAME, or --data_root DIR")
        options.obj = object_of(options.data_root)
    return options


def main() -> int:
    """Check a data set and print what was found; returns the exit code."""
    options = parse()
    root = data_folder(options.obj, options.data_path, options.data_root)
    if options.patient is not None:
        compile_rule(options.patient, "--patient")
    parse_window(options.window)
    check = Check()
    try:
        dataset = MedicalDataset.from_options(options)
    except InputError as error:
        check.add("layout", str(error))
        print(printable(f"{options.obj}: {root}"))
    else:
        check.run(dataset, options.num_workers)
        metrics = "images and pixels are measured" if dataset.pixel_metrics else "images are measured, no masks"
        if dataset.pixel_metrics and dataset.mask_above != ABNORMAL_ABOVE:
            metrics += f", a mask's grey above {dataset.mask_above} is abnormal"
        print(printable(f'{options.obj}: {root}; prompts say "{dataset.prompt_name}"; {metrics}'))
        if not check.counts["layout"] and (note := dataset.split_note()):
            print(printable(note))
        heads = ("split", "class", "images", "masks", "width x height", "modes")
        print(table([heads, *(row.cells() for row in check.rows)]))
    for line in (*check.lines(), *check.notes):
        print(printable(line))
    errors = sum(check.counts[kind] for kind in ERRORS if kind not in check.known)
    warnings = sum(check.counts[kind] for kind in WARNINGS) + sum(n.startswith("warning: ") for n in check.notes)
    print(f"errors: {errors}, warnings: {warnings}" if errors or warnings else "fine")
    config = config_path(options.obj, root)
    if not config.is_file() and not check.rows:
        print(json_template(root, config))
    elif not config.is_file() and not check.counts["layout"]:
        print(f"layout recognised without a JSON file; to change it, save this as dataset/{config.name}:")
        print(dataset.layout.to_json())
    return 1 if errors else 0


if __name__ == "__main__":
    run_cli(main)
