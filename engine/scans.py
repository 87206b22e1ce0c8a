"""The images to predict: which files, which slices form a series and in what order, and their names in results."""

import gzip
import hashlib
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, pairwise
from pathlib import Path
from statistics import median_low

import numpy as np

from dataset.pairing import in_mask_folder, is_clutter, named_masks
from dataset.patients import patient
from dataset.readers.grey import Frame, MissingPackageError, NoImageError, ReadOptions
from dataset.readers.images import frames, is_deep, list_files, stem
from utils import InputError, printable

MARK = "MadCLIP heat map, research use"  # in the header of every picture written, so that it is never an input
PARTIAL = "predictions.partial.jsonl"  # the rows so far, until the tables are written
LOCK = ".predict.lock"
OWN_FILES = ("predictions.csv", "predictions.json", "groups.csv", PARTIAL, LOCK)
NAME_BYTES = 150  # of a picture's name without suffixes; file systems allow 255, some cloud services fewer
GAP = 1.5  # slices are missing if a step is longer than this many usual ones
Member = tuple[Frame, str]  # an image, and the path of its file below its input


def is_own_result(path: Path) -> bool:
    """Whether prediction has written a file, so that it is not an input."""
    if path.name in OWN_FILES or path.name.endswith("_contours.json"):  # never pictures
        return True
    if not path.name.endswith(("_overlay.png", "_raw.png", "_heat.nii.gz")) and not path.parent.name.endswith("_heat"):
        return False
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            return MARK.encode() in file.read(4096)
    except (OSError, EOFError):
        return False


@dataclass(frozen=True, kw_only=True)
class Entry(Frame):
    """One image to predict, and its names in the results; its `slice` holds texts as the results show them."""

    file: str
    name: str  # base name of its pictures, see `picture_name`
    series: str  # identifies the volume, series or single file that it belongs to
    title: str  # displayed name of that volume, series or file
    number: int  # of the image in it, counted from 1
    count: int  # number of images in it
    volume: str  # base name of its heat map in the scan's own space
    groups: dict[str, str]  # the image's group for each choice of --group_by

    @cached_property
    def key(self) -> str:
        """Identifies the image and its content (size and time of the file), to tell what a resumed run has done."""
        status = self.path.stat()
        words = f"{self.name} {self} {status.st_size} {status.st_mtime_ns}"
        return hashlib.sha256(os.fsencode(words)).hexdigest()[:16]


@dataclass
class InputList:
    """All images to predict, and notes on the files that are not predicted."""

    entries: list[Entry] = field(default_factory=list)
    faults: dict[Path, InputError] = field(default_factory=dict)  # errors, by unreadable file
    no_image: list[str] = field(default_factory=list)  # notes on valid files without a picture
    remarks: list[str] = field(default_factory=list)  # notes on skipped files and unusual series


def list_entries(inputs: Sequence[str], reading: ReadOptions, hidden: bool) -> InputList:
    """List the images in the inputs; the slices of a series follow each other, ordered by position.

    Args:
        inputs: files and folders; those that cannot be read become `faults`.
        reading: how files are read.
        hidden: results show running numbers, which reveal nothing, instead of names.

    Raises:
        MissingPackageError: DICOM without pydicom, NIfTI without nibabel.
    """
    result, series = InputList(), defaultdict[str, list[Member]](list)
    files = pick_files(inputs, result)
    reading = replace(reading, deep=reading.deep or is_deep([path for path, _ in files]))
    for number, (path, place) in enumerate(files):
        try:
            inside = frames(path, reading)
        except MissingPackageError:  # noqa: PERF203 - a fault of one file
            raise
        except NoImageError as error:
            result.no_image.append(str(error))
        except InputError as error:
            result.faults[path] = error
        else:
            for frame in inside:
                series[frame.slice.series_uid or str(number)].append((frame, place))
    numbers, used = defaultdict[str, dict[str, int]](dict), set[str]()

    def shown(kind: str, text: str) -> str:
        if hidden and text:
            return f"{kind}-{numbers[kind].setdefault(text, len(numbers[kind]) + 1):05}"
        return printable(text)

    for key, members in series.items():
        frame, place = members[0]
        first = frame.slice
        words = place.rpartition("/")[0] or frame.path.parent.name, first.description, first.series_uid[-12:]
        title, volume, entries = " ".join(filter(None, words)) if first.series_uid else place, "", []
        for number, (frame, place) in enumerate(in_order(members), 1):
            file, info, known = str(frame.path), frame.slice, frame.slice.patient_id or patient(place, None, place)
            slice_ = replace(
                info, patient_id=shown("patient", info.patient_id), study_uid=shown("study", info.study_uid),
                series_uid=shown("series", info.series_uid), description=printable(info.description) * (not hidden),
            )  # fmt: skip
            groups = {"series": shown("series", info.series_uid or file),
                      "folder": shown("folder", str(frame.path.parent))}  # fmt: skip
            groups["patient"] = shown("patient", known) if known else groups["series"]
            file = shown("image", file) + frame.path.suffix.lower() * hidden
            base, name = picture_name(frame, place, used)
            name, volume = shown("picture", name), volume or shown("volume", base)
            called = slice_.series_uid or file if hidden else printable(title)
            entries.append(Entry(
                frame.path, frame.index, frame.options, slice=slice_, file=file, name=name, series=key, title=called,
                number=number, count=len(members), volume=volume, groups=groups,
            ))  # fmt: skip
        result.entries += entries
        result.remarks += series_notes(entries)
    return result


def pick_files(inputs: Sequence[str], result: InputList) -> list[tuple[Path, str]]:
    """The files to read, each with its path relative to its input; notes on skipped files are added to `result`."""
    files = [(path, place) for path, place in list_files(map(Path, inputs)) if not is_clutter(place)]
    masks, lost = named_masks([path for path, _ in files])
    lost -= set(map(Path, inputs))
    kept, left_out = [], Counter[str]()
    for path, place in files:
        if is_own_result(path):
            left_out["results of an earlier run"] += 1
        elif path in masks or in_mask_folder(place):
            left_out["masks of images"] += 1
        elif path in lost:
            result.no_image.append(f"{path}: named like a mask, but matches no image here: left out")
        else:
            kept.append((path, place))
    result.remarks += [f"{number} files are {words}, and left out" for words, number in left_out.items()]
    return kept


def in_order(members: list[Member]) -> list[Member]:
    """The slices of a series, sorted by position if their normals are parallel, else by instance number."""
    normals = [frame.slice.normal for frame, _ in members]
    parallel = len({bool(n) for n in normals}) == 1 and all(np.dot(n, normals[0]) > 0.99 for n in normals if n)

    def place(member: Member) -> list[float]:
        slice_, index = member[0].slice, member[0].index  # frames are in the order of their files already
        values = (slice_.position if parallel else 0.0, slice_.instance_number if index is None else None)
        return [math.inf if value is None else value for value in values]

    return sorted(members, key=place)


def picture_name(frame: Frame, place: str, used: set[str]) -> tuple[str, str]:
    """New base names for the outputs of a file and of an image in it, made from its path relative to its input.

    They are valid on every file system. `used` holds the names that are taken; the new one is added.
    """
    place = Path(place).with_name(stem(Path(place))).as_posix() if place.endswith(".gz") else place
    clean = re.sub(r"[^\w./-]+", "_", place).replace("/", "__").strip(".-")
    clean = os.fsencode(clean)[-NAME_BYTES:].decode("utf-8", "ignore")
    index = "" if frame.index is None else f"_{frame.index:04d}"
    tried = (f"{clean}{f'-{number}' * (number > 1)}" for number in count(1))
    base = next(name for name in tried if name + index not in used)
    used.add(base + index)
    return base, base + index


def series_notes(members: Sequence[Entry]) -> Iterator[str]:
    """Notes on an unusual series: gaps between slices, or images in another direction than most."""
    usual = Counter(member.slice.plane for member in members).most_common(1)[0][0]
    if others := [member for member in members if member.slice.plane != usual or member.slice.localizer]:
        words = f"{len(others)} of {len(members)} images are localizers or cut in another direction"
        yield f"{members[0].title}: {words}, such as {others[0].file}"
    stack = [member.slice for member in members if member.slice.plane == usual]
    stack = [slice_ for slice_ in stack if not slice_.normal or np.dot(slice_.normal, stack[0].normal) > 0.99]
    places = sorted(slice_.position for slice_ in stack if slice_.position is not None)
    steps = [after - before for before, after in pairwise(places) if after > before]
    usual_step = median_low(steps or [0.0])
    if gaps := [step for step in steps if step > GAP * usual_step]:
        words = f"up to {max(gaps):.3g} mm between slices, where {usual_step:.3g} mm is usual"
        yield f"{members[0].title}: gaps ({len(gaps)} of {len(steps)} steps), {words}: are slices missing?"
