"""The images that are to be predicted: which files, what belongs together in what order, and by what names."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, groupby, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dataset.pairing import in_mask_folder, is_clutter, tell_apart
from dataset.patients import patient
from dataset.readers import (
    Frame,
    MissingPackageError,
    NoImageError,
    ReadOptions,
    Slice,
    describe,
    file_kind,
    frames,
    is_deep,
    list_files,
    stem,
)
from utils import InputError, printable

MARK = "MadCLIP heat map, research use"  # in the head of every picture that is written, so that none becomes an input
PARTIAL = "predictions.partial.jsonl"  # the tables while they grow
LOCK = ".predict.lock"
TABLES = ("predictions.csv", "predictions.json", "groups.csv", PARTIAL, LOCK)
NAME_BYTES = 150  # of a picture's name, without what is added; a file system takes 255, and many a cloud fewer
GAP = 1.5  # times the usual distance of two slices


def in_order(slices: Sequence[Slice]) -> list[int]:
    """The order of the slices of one series: by position where all have one along the same normal, else by number."""
    normals = [slice_.normal for slice_ in slices]
    parallel = len({bool(n) for n in normals}) == 1 and all(np.dot(n, normals[0]) > 0.99 for n in normals if n)

    def key(i: int) -> list[float]:
        values = (slices[i].position if parallel else 0.0, slices[i].instance_number)
        return [math.inf if value is None else value for value in values]

    return sorted(range(len(slices)), key=key)


def is_own_result(path: Path) -> bool:
    """Whether prediction has written a file: it is no input."""
    if path.name in TABLES or path.name.endswith("_contours.json"):  # no pictures anyway
        return True
    if not path.name.endswith(("_overlay.png", "_raw.png", "_heat.nii.gz")) and not path.parent.name.endswith("_heat"):
        return False
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            return MARK.encode() in file.read(4096)
    except (OSError, EOFError):
        return False


@dataclass(frozen=True)
class Entry:
    """One image to predict."""

    frame: Frame
    slice: Slice  # with the names that the results give
    file: str  # as the results name it
    name: str  # of its pictures, which no two images share and every file system takes
    series: str  # tells the volume, series or single file that it belongs to from others
    title: str  # what that is called
    number: int  # of the image in that, counted from 1
    count: int  # how many images that has
    volume: str  # the name of its heat map in the scan's own space
    groups: dict[str, str]  # what it is counted with, by --group_by

    @property
    def kind(self) -> str:
        """`pillow`, `dicom` or `nifti`."""
        return file_kind(self.frame.path) or ""

    def columns(self) -> dict[str, Any]:
        """What the tables say of the file and its slice."""
        info = self.slice
        return {
            "file": self.file, "frame": self.frame.index, "PatientID": info.patient_id or None,
            "StudyInstanceUID": info.study_uid or None, "SeriesInstanceUID": info.series_uid or None,
            "description": info.description or None, "InstanceNumber": info.instance_number,
            "slice_position": info.position, "plane": info.plane or None, "orientation": info.orientation or None,
        }  # fmt: skip

    def key(self) -> str:
        """Tells this image of this content from others, for a run that goes on."""
        status = self.frame.path.stat()
        words = f"{self.name} {self.frame} {status.st_size} {status.st_mtime_ns}"
        return hashlib.sha256(os.fsencode(words)).hexdigest()[:16]


class Names:
    """What the results call files, patients, series and folders: with --anonymous running numbers, else as they are."""

    def __init__(self, hidden: bool) -> None:
        self.hidden = hidden
        self._numbers: defaultdict[str, dict[str, int]] = defaultdict(dict)
        self._used: set[str] = set()

    def word(self, kind: str, text: str) -> str:
        """A name of that kind; the same text has the same one."""
        if not self.hidden or not text:
            return printable(text)
        return f"{kind}-{self._numbers[kind].setdefault(text, len(self._numbers[kind]) + 1):05}"

    def file(self, path: Path) -> str:
        """A file's."""
        return self.word("image", str(path)) + path.suffix.lower() if self.hidden else printable(str(path))

    def slice(self, info: Slice) -> Slice:
        """What a header says, with these names."""
        return replace(
            info, patient_id=self.word("patient", info.patient_id), study_uid=self.word("study", info.study_uid),
            series_uid=self.word("series", info.series_uid),
            description="" if self.hidden else printable(info.description),
        )  # fmt: skip

    def picture(self, frame: Frame, place: str) -> tuple[str, str]:
        """A new name for what is drawn of a file, and of an image in it; `place` is its path below its input."""
        path = Path(self.file(frame.path) if self.hidden else place)
        place = path.with_name(stem(path)).as_posix() if self.hidden or place.endswith(".gz") else place
        clean = re.sub(r"[^\w./-]+", "_", place).replace("/", "__").strip(".")
        if len(os.fsencode(clean)) > NAME_BYTES:
            end = os.fsencode(clean)[-NAME_BYTES:].decode("utf-8", "ignore")
            clean = f"{hashlib.sha256(clean.encode()).hexdigest()[:8]}_{end}"
        index = "" if frame.index is None else f"_{frame.index:04d}"
        tried = (f"{clean}{f'-{number}' * (number > 1)}" for number in count(1))
        name = next(name for name in tried if name + index not in self._used)
        self._used.add(name + index)
        return name, name + index


@dataclass
class InputList:
    """Every image, and what is none."""

    entries: list[Entry] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # could not be read
    no_image: list[str] = field(default_factory=list)  # sound, but without a picture
    own: int = 0  # results of an earlier run
    masks: int = 0  # below an input


def list_entries(inputs: Sequence[str], reading: ReadOptions, hidden: bool) -> InputList:
    """Walk the inputs; the slices of a series follow each other in the order of their position."""
    result, files, names = InputList(), [], Names(hidden)
    found = [(path, place) for path, place in list_files(map(Path, inputs)) if not is_clutter(place)]
    reading = replace(reading, deep=reading.deep or is_deep([path for path, _ in found]))
    masks = {mask for beside in tell_apart(path for path, _ in found).masks.values() for mask in beside}
    for path, place in found:
        if is_own_result(path):
            result.own += 1
            continue
        if path in masks or in_mask_folder(place):
            result.masks += 1
            continue
        try:
            inside = frames(path, reading)
        except MissingPackageError:
            raise
        except NoImageError as error:
            result.no_image.append(str(error))
        except InputError as error:
            result.faults.append(str(error))
        else:
            files.append((place, inside, describe(inside)))
    series: defaultdict[str, list[tuple[Frame, str, Slice]]] = defaultdict(list)
    for number, (place, inside, slices) in enumerate(files):
        for frame, slice_ in zip(inside, slices, strict=True):
            series[slice_.series_uid or str(number)].append((frame, place, slice_))
    for key, members in series.items():
        frame, place, first = members[0]
        shown = names.file(frame.path) if hidden else printable(place)
        if first.series_uid:
            words = (printable(place.rpartition("/")[0]) if not hidden else "", names.slice(first).description)
            shown = " ".join(filter(None, (*words, names.word("series", first.series_uid)[-12:])))
        volume = ""
        for number, i in enumerate(in_order([slice_ for *_, slice_ in members]), 1):
            frame, place, slice_ = members[i]
            file, info = names.file(frame.path), names.slice(slice_)
            person = info.patient_id or names.word("patient", patient(place, None, place) or "")
            groups = {"series": info.series_uid or file, "folder": names.word("folder", str(frame.path.parent))}
            groups["patient"] = person or groups["series"]
            base, picture = names.picture(frame, place)
            volume = volume or base
            entry = Entry(frame, info, file, picture, key, shown, number, len(members), volume, groups)
            result.entries.append(entry)
    return result


def series_notes(entries: Sequence[Entry]) -> Iterator[str]:
    """What is odd about a series: slices that are missing between others, images in another direction than the rest."""
    for _, group in groupby(entries, key=lambda entry: entry.series):
        members = list(group)
        planes = Counter(member.slice.plane for member in members)
        usual = planes.most_common(1)[0][0]
        if others := [member for member in members if member.slice.plane != usual or member.slice.localizer]:
            words = f"{len(others)} of {len(members)} images are localizers or cut in another direction"
            yield f"{members[0].title}: {words}, such as {others[0].file}"
        places = [m.slice.position for m in members if m.slice.plane == usual and m.slice.position is not None]
        steps = [after - before for before, after in pairwise(places) if after > before]
        if len(steps) > 2 and max(steps) > GAP * median(steps):
            wide = sum(step > GAP * median(steps) for step in steps)
            words = f"up to {max(steps):.3g} mm from slice to slice, where {median(steps):.3g} mm are usual"
            yield f"{members[0].title}: {wide} gaps, {words}: are slices missing?"
