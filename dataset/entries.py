"""Every image file of a data set, and what is known of it before it is opened: class, split, masks, patient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from utils import InputError, preview

from .fewshot import list_paths, parse_shot_list
from .layout import KINDS, SPLITS, Layout
from .pairing import find_masks, in_mask_folder, list_pictures
from .patients import compile_rule, falls_in_valid, patient, spelled_alike
from .readers.grey import Slice, check_file
from .readers.images import file_kind, frames


@dataclass
class Entry:
    """An image file of a class."""

    path: Path
    name: str  # the path below the data set's folder
    kind: str  # of `KINDS`
    folder: str  # the class's, relative to the data set's: the file lies in it or below
    masks: list[Path] = field(default_factory=list)  # the files that fit as its mask; several are united
    split: str = ""  # of `SPLITS`
    divided: bool = False  # its folder serves both splits
    listed: str = ""  # what few-shot lists call it
    patient: str | None = None  # as far as rule, header or name tells
    from_header: bool = False  # the patient is the DICOM header's
    series: str = ""  # the DICOM header's SeriesInstanceUID
    index: int | None = None  # the slice that a list names; None: all of them
    shot: bool = False  # a list says so
    word: str = ""  # for its kind of abnormal, such as malignant: a list's, or its folder where there are several


def read_folders(root: Path, layout: Layout) -> list[Entry]:
    """What a layout's folders hold, class by class, folder by folder and sorted; a missing folder holds nothing.

    Raises:
        InputError: a mask fits no image, a patient's rule is none, a few-shot list cannot be read; an image is a link
            to nothing, a pipe or a device, which nobody may leave out without a word.
    """
    entries: list[Entry] = []
    images, masks = list_pictures(root)
    parents = {path.parent for path in images}
    defects = {PurePosixPath(folder.removesuffix("/img")).name for split in SPLITS
               for folder in layout.folders(split, "abnormal")}  # fmt: skip
    for kind in KINDS:
        for folder in dict.fromkeys((*layout.valid[kind], *layout.test[kind])):
            splits = [split for split in SPLITS if folder in layout.folders(split, kind)]
            split = splits[0] if len(splits) == 1 else ""
            word = PurePosixPath(folder.removesuffix("/img")).name if kind == "abnormal" and len(defects) > 1 else ""
            home = root / folder
            inside = {parent for parent in parents if home in (parent, *parent.parents)}
            for path in (path for path in images if path.parent in inside):
                check_file(path)
                name = path.relative_to(root).as_posix()
                entries.append(Entry(path, name, kind, folder, split=split, divided=not split, word=word))
    pair(root, entries, masks)
    used = {mask for entry in entries for mask in entry.masks}
    classes = {root / entry.folder for entry in entries}
    if lost := [path for path in masks if path not in used and not classes.isdisjoint(path.parents)
                and not in_mask_folder(path.relative_to(root).as_posix())]:  # fmt: skip
        raise InputError(
            f"{preview([str(path) for path in lost])}: named like masks, but no image has that name "
            f"({len(lost)} files); rename them, or write a list (docs/data.md)"
        )
    name_for_lists(entries)
    name_patients(entries, layout.patient)
    divide(entries, root, layout.valid_share)
    return entries


def pair(root: Path, entries: Sequence[Entry], masks: Sequence[Path]) -> None:
    """Give entries their masks."""
    for entry, own in zip(entries, find_masks(root, [entry.path for entry in entries], masks), strict=True):
        for mask in own:
            check_file(mask)
        entry.masks = own


def name_for_lists(entries: Sequence[Entry]) -> None:
    """Say what few-shot lists call each file: its name, or its path where those of its class lie in several folders."""
    for kind in KINDS:
        own = [entry for entry in entries if entry.kind == kind and entry.split != "test"]
        flat = len({entry.path.parent for entry in own}) == 1
        for entry in own:
            entry.listed = entry.path.name if flat else entry.name


def name_patients(entries: Sequence[Entry], rule: str | None) -> None:
    """Find each entry's patient: by the rule, or else the DICOM header, or the name.

    One PatientID for all files is what some programs leave to hide names: then the names tell. Of several spellings of
    one patient the first in order stands for all.
    """
    pattern = compile_rule(rule, "--patient") if rule else None
    headers = {entry.path: _header(entry.path) for entry in entries if file_kind(entry.path) == "dicom"}
    tell = pattern is None and len({header.patient_id for header in headers.values()}) > 1
    for entry in entries:
        header = headers.get(entry.path, Slice())
        entry.series, entry.from_header = header.series_uid, tell and bool(header.patient_id)
        below = entry.name.removeprefix(f"{PurePosixPath(entry.folder).as_posix()}/")
        entry.patient = entry.patient or (tell and header.patient_id) or patient(entry.name, pattern, below)
    names = sorted({entry.patient for entry in entries if entry.patient}, reverse=True)
    spelling = {spelled_alike(name) or name: name for name in names}
    for entry in entries:
        entry.patient = entry.patient and spelling[spelled_alike(entry.patient) or entry.patient]


def _header(path: Path) -> Slice:
    try:
        return frames(path)[0].slice
    except InputError:  # it is reported where it is read
        return Slice()


def divide(entries: Sequence[Entry], root: Path, share: float) -> None:
    """Give files without a split one by a hash; but what a list of the data set's own names as a shot is valid.

    So is whatever else is a listed image's patient's. All lists count, whichever --shot and --iterate, so that the test
    set is the same for all.
    """
    names: Counter[tuple[str, str]] = Counter()
    for path in list_paths(root / "fewshot_seed"):
        for (letter, _), line in parse_shot_list(path)[0].items():
            names.update((letter, name.partition("#")[0]) for name in line)
    left = [entry for entry in entries if not entry.split]
    for entry in left:
        if entry.shot or (entry.kind[0], entry.listed) in names:
            entry.split = "valid"
    patients = {entry.patient for entry in left if entry.split} - {None}
    for entry in left:
        is_valid = entry.split or entry.patient in patients or falls_in_valid(entry.name, share, entry.patient)
        entry.split = "valid" if is_valid else "test"
