"""The images that are to be predicted: which files, what belongs together in what order, and by what names."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, groupby, pairwise
from pathlib import Path
from statistics import median_low

import numpy as np

from dataset.pairing import in_mask_folder, is_clutter, named_masks
from dataset.patients import patient
from dataset.readers.grey import Frame, MissingPackageError, NoImageError, ReadOptions, Slice
from dataset.readers.images import file_kind, frames, is_deep, list_files, stem
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
    slice: Slice
    file: str
    name: str  # of its pictures: see `picture_name`
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

    def key(self) -> str:
        """Tells this image of this content from others, for a run that goes on."""
        status = self.frame.path.stat()
        words = f"{self.name} {self.frame} {status.st_size} {status.st_mtime_ns}"
        return hashlib.sha256(os.fsencode(words)).hexdigest()[:16]


@dataclass
class InputList:
    """Every image, and what is none."""

    entries: list[Entry] = field(default_factory=list)
    faults: list[InputError] = field(default_factory=list)  # could not be read
    no_image: list[str] = field(default_factory=list)  # sound, but without a picture
    own: int = 0  # results of an earlier run
    masks: int = 0  # below an input


def list_entries(inputs: Sequence[str], reading: ReadOptions, hidden: bool) -> InputList:
    """Walk the inputs; the slices of a series follow each other in the order of their position.

    Args:
        inputs: files and folders.
        reading: how they are read.
        hidden: running numbers instead of names.
    """
    result = InputList()
    series: defaultdict[str, list[tuple[Frame, str, Slice]]] = defaultdict(list)
    found = [(path, place) for path, place in list_files(map(Path, inputs)) if not is_clutter(place)]
    reading = replace(reading, deep=reading.deep or is_deep([path for path, _ in found]))
    masks, lost = named_masks([path for path, _ in found])
    lost -= set(map(Path, inputs))
    for number, (path, place) in enumerate(found):
        if is_own_result(path):
            result.own += 1
            continue
        if path in masks or in_mask_folder(place):
            result.masks += 1
            continue
        if path in lost:
            result.no_image.append(f"{path}: named like a mask, but of no image here: left out")
            continue
        try:
            inside = frames(path, reading)
        except MissingPackageError:
            raise
        except NoImageError as error:
            result.no_image.append(str(error))
        except InputError as error:
            result.faults.append(error)
        else:
            for frame in inside:
                series[frame.slice.series_uid or str(number)].append((frame, place, frame.slice))
    used: set[str] = set()
    for key, members in series.items():
        frame, place, first = members[0]
        words = place.rpartition("/")[0] or frame.path.parent.name, first.description, first.series_uid[-12:]
        title, volume = printable(" ".join(filter(None, words)) if first.series_uid else place), ""
        for number, i in enumerate(in_order([slice_ for *_, slice_ in members]), 1):
            frame, place, slice_ = members[i]
            file = printable(str(frame.path))
            groups = {"series": printable(slice_.series_uid) or file, "folder": printable(str(frame.path.parent))}
            groups["patient"] = printable(slice_.patient_id or patient(place, None, place) or "") or groups["series"]
            base, name = picture_name(frame, place, used)
            volume = volume or base
            entry = Entry(frame, slice_, file, name, key, title, number, len(members), volume, groups)
            result.entries.append(entry)
    result.entries = hide(result.entries) if hidden else result.entries
    return result


def picture_name(frame: Frame, place: str, used: set[str]) -> tuple[str, str]:
    """A new name for what is drawn of a file, and of an image in it, made of its path below its input.

    Every file system takes it; `used` holds the names that are taken.
    """
    place = Path(place).with_name(stem(Path(place))).as_posix() if place.endswith(".gz") else place
    clean = re.sub(r"[^\w./-]+", "_", place).replace("/", "__").strip(".")
    clean = os.fsencode(clean)[-NAME_BYTES:].decode("utf-8", "ignore")
    index = "" if frame.index is None else f"_{frame.index:04d}"
    tried = (f"{clean}{f'-{number}' * (number > 1)}" for number in count(1))
    base = next(name for name in tried if name + index not in used)
    used.add(base + index)
    return base, base + index


def hide(entries: Iterable[Entry]) -> list[Entry]:
    """The entries with running numbers for files, patients, studies, series and folders: no number tells a name."""
    numbers: defaultdict[str, dict[str, int]] = defaultdict(dict)

    def word(kind: str, text: str) -> str:
        return text and f"{kind}-{numbers[kind].setdefault(text, len(numbers[kind]) + 1):05}"

    result = []
    for entry in entries:
        info, file = entry.slice, word("image", entry.file) + entry.frame.path.suffix.lower()
        patient_id, study, series = map(
            word, ("patient", "study", "series"), (info.patient_id, info.study_uid, info.series_uid)
        )
        slice_ = replace(info, patient_id=patient_id, study_uid=study, series_uid=series, description="")
        known = "patient" if entry.groups["patient"] != entry.groups["series"] else "series"
        groups = {kind: word(known if kind == "patient" else kind, text) for kind, text in entry.groups.items()}
        name, volume = word("picture", entry.name), word("volume", entry.volume)
        title = series or file
        result.append(replace(entry, slice=slice_, file=file, name=name, volume=volume, title=title, groups=groups))
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
        usual_step = median_low(steps or [0.0])
        if gaps := [step for step in steps if step > GAP * usual_step]:
            words = f"up to {max(gaps):.3g} mm from slice to slice, where {usual_step:.3g} mm are usual"
            yield f"{members[0].title}: gaps ({len(gaps)} of {len(steps)} steps), {words}: are slices missing?"
