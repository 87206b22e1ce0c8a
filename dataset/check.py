"""Examine a data set before any training.

    python -m dataset.check --obj Brain --data_path data
    python -m dataset.check --data_root bottle                any folder
    python -m dataset.check --data_root bottle --write_list images.csv      what was recognised, to be corrected by hand

Errors stop a training or make its numbers false: exit code 1. Warnings are for a look and leave it 0, and so does what
the paper's own six data sets are known for. A bad argument is code 2. What is kept of an image is a hash of its pixels.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, product
from pathlib import Path

from tqdm import tqdm

from utils import InputError, Parser, bar_seconds, integer, prefetch, printable, run_cli

from . import notes
from .entries import Entry
from .fewshot import SEEDS, check_shot_names, parse_shot_list
from .layout import KINDS, SPLITS, add_reading_flags, object_given, object_name
from .lists import unlabelled, write_list
from .medical_few import SOUGHT, MedicalDataset, data_folder
from .patients import compile_rule
from .readers.images import Sample, file_kind, parse_window, picture_notes, read
from .readers.masks import ABNORMAL_ABOVE, mask_notes, read_mask

SHOWN = 3  # examples of a finding
NAMED = ("no mask", "valid mask")  # of these every example is shown: one cannot see what is not there

# What is found, and what it is called. Errors first, in the order of the report.
ERRORS = {
    "layout": "the layout",
    "unusable": "images or masks that cannot be used",
    "no mask": f"abnormal images without a mask ({SOUGHT})",
    "ambiguous": "names that make masks ambiguous",
    "mask size": "masks of another size than their image",
    "mask range": "masks with no pixel above --mask_above, though not empty: they count as empty",
    "leak": "the same picture in valid and in test",
    "patient": "patients in valid and in test",
    "two labels": "the same picture among the normal and the abnormal",
    "bad list": "few-shot lists",
}
WARNINGS = {
    "duplicate": "the same picture twice in a class",
    "valid mask": "abnormal images of valid without a mask: no shots, and left out of the calibration",
    "any size": "masks of another size than their image: resized, as the published loader does",
    "empty": "abnormal images with an empty mask",
    "full": "masks that cover more than 90% of their image",
    "alpha": "masks that lie in the alpha channel",
    "wide": "8-bit values in 16- or 32-bit files, read as 8 bits, as the published program reads them",
    "dark": "16-bit images with small values: scaled, they are all but black",
    "window": "grey levels without a window of their own",
    "pixels": "slices resampled to square pixels, more than 3 times",
    "constant": "pictures that are nearly constant",
    "clipped": "pictures that are clipped",
    "orientation": "images or masks with an orientation tag, which is ignored, whatever the format: do they fit?",
    "ignored": "files that are no image by their extension, left out",
    "list": "few-shot lists",
}
TOLERATED = ("leak", "patient", "two labels")  # of the paper's own files, where they are listed, but no error


@dataclass
class Row:
    """A class of a split in the table."""

    split: str
    kind: str
    images: int = 0
    masks: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)

    def cells(self) -> tuple[str, ...]:
        """The row's texts."""
        modes = ", ".join(mode if count == self.images else f"{mode} {count}" for mode, count in self.modes.items())
        size = "".join(map(_size, self.sizes))
        if len(self.sizes) > 1:
            spans = (f"{min(sides)}-{max(sides)}" for sides in zip(*self.sizes, strict=True))
            size = f"{' x '.join(spans)} ({len(self.sizes)} sizes)"
        return self.split, self.kind, f"{self.images}", f"{self.masks or '-'}", size, modes


@dataclass
class Seen:
    """What one image and its mask showed."""

    name: str
    findings: dict[str, str]  # kind -> words
    mode: str = ""
    size: tuple[int, int] | None = None  # width, height; None where it could not be read
    digest: bytes = b""  # of the pixels: a picture saved anew without loss is the same
    has_mask: bool = False


def look_into(dataset: MedicalDataset, file: Entry) -> list[Seen]:
    """Decode every image in a file that is a sample, and its mask where it has one."""
    try:
        every = dataset.samples_in(file, judged=False)
        used = {sample.index for sample in dataset.samples_in(file)}
        seen = [look_at(sample, dataset.layout.mask_above, is_alone=len(every) == 1) for sample in every]
    except InputError as error:
        return [Seen(file.name, {"unusable": str(error)})]
    for sample, one in zip(every, seen, strict=True):
        if sample.index not in used:  # it is no sample, but a wrong mask may be why
            one.size, one.findings = None, {kind: text for kind, text in one.findings.items() if kind == "mask range"}
    return seen


def look_at(sample: Sample, above: int, is_alone: bool) -> Seen:
    """Decode an image and its mask; `is_alone` is False for slices, of which some may be dark."""
    picture = read(sample)
    digest = hashlib.sha256(f"{picture.image.size}".encode() + picture.image.tobytes()).digest()
    remarks = dict(picture.notes)
    if is_alone and "dark" not in remarks:
        remarks |= picture_notes(picture.image)
    if picture.orientation != 1:
        remarks["orientation"] = f"orientation {picture.orientation}"
    findings = {kind: f"{sample.path}: {text}" for kind, text in remarks.items()}
    mask = read_mask(sample)
    if mask:
        remarks = mask.notes | mask_notes(mask, above)
        if labels := remarks.pop("labels", ""):
            remarks.pop("wide", None)
            remarks["mask range"] = labels
        if mask.image.size not in (picture.image.size, picture.stored):
            remarks["any size" if sample.published else "mask size"] = (
                f"{_size(mask.image.size)}, its image {_size(picture.image.size)}"
            )
        findings |= {kind: f"{sample.masks[0]}: {text}" for kind, text in remarks.items()}
    return Seen(sample.name, findings, picture.mode, picture.image.size, digest, mask is not None)


class Check:
    """Goes through a data set; `rows`, `counts`, `examples` and `notes` are what it found."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  # of `ERRORS` and `WARNINGS`
        self.examples: defaultdict[str, list[str]] = defaultdict(list)  # the first few of each, and all of `NAMED`
        self.rows: list[Row] = []
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
        patients: dict[str, set[str | None]] = {split: set() for split in SPLITS}
        try:
            self.known = TOLERATED if dataset.is_benchmark else ()
            for split, kind in product(SPLITS, KINDS):
                files = dataset.image_files(split, kind, (split, kind) != ("valid", "abnormal"))
                patients[split] |= {file.patient for file in files}
                self.look(dataset, Row(split, kind), files, workers)
        except InputError as error:
            self.add("layout", str(error))
            return
        for number in sorted(filter(None, patients["valid"] & patients["test"])):
            self.add("patient", number)
        for folder in sorted({entry.path.parent for entry in dataset.entries}):
            others = [path for path in folder.glob("[!.]*") if path.is_file() and file_kind(path) is None]
            for suffix, count in Counter(path.suffix.lower() or "no extension" for path in others).items():
                self.add("ignored", f"{folder}: {count} x {suffix}", count)
        self.lists(dataset)
        for path in sorted(self.without_mask):
            self.add("valid mask", path)
        self.notes += notes.describe(dataset)

    def look(self, dataset: MedicalDataset, row: Row, files: list[Entry], workers: int) -> None:
        """Examine the files of a class."""
        self.rows.append(row)
        if row.kind == "abnormal" and dataset.pixel_metrics:
            missing, ambiguous = dataset.mask_problems(files)
            if row.split == "valid":
                self.without_mask |= set(missing)  # an error only where it is a shot
                missing = []
            for name, faults in (("no mask", missing), ("ambiguous", ambiguous)):
                for words in faults:
                    self.add(name, words)
        results = prefetch(partial(look_into, dataset), files, workers)
        title, pause = f"{row.split} {row.kind}", bar_seconds()
        for seen in chain.from_iterable(tqdm(results, title, len(files), unit="file", mininterval=pause, delay=pause)):
            self.image(row, seen)

    def image(self, row: Row, seen: Seen) -> None:
        """Add one image to its row and to the findings."""
        for finding in seen.findings.items():
            self.add(*finding)
        row.images += bool(seen.size) or "unusable" in seen.findings
        if not seen.size:
            return
        row.masks += seen.has_mask
        row.sizes[seen.size] += 1
        row.modes[seen.mode] += 1
        split, kind, other = self.first.setdefault(seen.digest, (row.split, row.kind, seen.name))
        if kind != row.kind:
            self.add("two labels", f"{other} = {seen.name}")
        if split != row.split:
            self.add("leak", f"{other} = {seen.name}")
        elif kind == row.kind and other != seen.name:
            self.add("duplicate", f"{other} = {seen.name}")

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


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows of texts as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(prog="python -m dataset.check", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--obj", type=object_name, help="data set (default: the name of its folder)")
    parser.add_argument("--data_path", default="./data/", help="folder that holds <obj>_AD (default: ./data/)")
    parser.add_argument("--data_root", help="the data set's own folder, instead of <data_path>/<obj>_AD")
    add_reading_flags(parser)
    parser.add_argument("--write_list", type=Path, metavar="FILE",
                        help="write what was recognised as a list to correct, such as images.csv")  # fmt: skip
    parser.add_argument("--num_workers", type=integer(1, 256), default=2, help="threads that decode (default: 2)")
    options = parser.parse_args(arguments)
    if options.obj is None:
        options.obj = object_given(options)
    if options.obj is None:
        raise InputError("give --obj NAME, or --data_root DIR")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a data set and print what was found; returns the exit code."""
    options = parse(arguments)
    root = Path(options.list).parent if options.list else data_folder(options.obj, options.data_path, options.data_root)
    if options.patient is not None:
        compile_rule(options.patient, "--patient")
    parse_window(options.window)
    check = Check()
    entries: list[Entry] = []
    try:
        dataset = MedicalDataset.from_options(options)
        entries = dataset.entries
    except InputError as error:
        check.add("layout", str(error))
        print(printable(f"{options.obj}: {root}"))
        with suppress(InputError):  # a pipe, say, which is the error then
            entries = unlabelled(root)
        counts = Counter(entry.path.parent.relative_to(root).as_posix() for entry in entries)
        print(*(printable(f"    {folder}: {count} pictures") for folder, count in sorted(counts.items())), sep="\n")
    else:
        check.run(dataset, options.num_workers)
        metrics = "images and pixels are measured" if dataset.pixel_metrics else "images are measured, no masks"
        if dataset.pixel_metrics and dataset.layout.mask_above != ABNORMAL_ABOVE:
            metrics += f", a mask's grey above {dataset.layout.mask_above} is abnormal"
        print(printable(f'{options.obj}: {root}; prompts say "{dataset.layout.prompt_name}"; {metrics}'))
        heads = ("split", "class", "images", "masks", "width x height", "modes")
        print(table([heads, *(row.cells() for row in check.rows)]))
    for line in (*check.lines(), *check.notes):
        print(printable(line))
    errors = sum(check.counts[kind] for kind in ERRORS if kind not in check.known)
    warnings = sum(check.counts[kind] for kind in WARNINGS) + sum(n.startswith("warning: ") for n in check.notes)
    print(f"errors: {errors}, warnings: {warnings}" if errors or warnings else "fine")
    if options.write_list:
        print(printable(f"written: {write_list(options.write_list, root, entries)}"))
    return 1 if errors else 0


if __name__ == "__main__":
    run_cli(main)
