"""The images that are to be predicted: which files, which of their slices belong together, and in what order."""

from __future__ import annotations

import gzip
import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset.pairing import MASK_FOLDERS
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
    list_files,
)
from utils import InputError, anonymous_name, printable

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

MARK = "MadCLIP heat map, research use"  # in the head of every picture that is written, so that none becomes an input
TABLES = ("predictions.csv", "predictions.json", "predictions.partial.csv", "groups.csv")


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
    place: str  # the file's path below the input that it came from
    slice: Slice
    series: str  # tells the volume, series or single file that it belongs to from others
    title: str  # what that is called
    number: int  # of the image in that, counted from 1
    count: int  # how many images that has
    hidden: bool = False  # --anonymous

    @property
    def file(self) -> str:
        """The file as the results name it."""
        path = str(self.frame.path)
        return anonymous_name(path) if self.hidden else printable(path)

    @property
    def kind(self) -> str:
        """`pillow`, `dicom` or `nifti`."""
        return file_kind(self.frame.path) or ""

    def word(self, text: str) -> str:
        """A name or number of the scan as the results give it."""
        return hashlib.sha256(text.encode()).hexdigest()[:16] if self.hidden and text else printable(text)

    def columns(self) -> dict[str, Any]:
        """What the tables say of the file and its slice."""
        info = self.slice
        return {
            "file": self.file, "frame": self.frame.index, "PatientID": self.word(info.patient_id) or None,
            "StudyInstanceUID": self.word(info.study_uid) or None,
            "SeriesInstanceUID": self.word(info.series_uid) or None, "InstanceNumber": info.instance_number,
            "slice_position": info.position, "plane": info.plane or None, "orientation": info.orientation or None,
        }  # fmt: skip

    def group(self, by: str) -> str:
        """What it is counted with in groups.csv."""
        if by == "folder":
            return self.word(str(self.frame.path.parent))
        if by == "patient" and (name := self.slice.patient_id or patient(self.place, None, self.place)):
            return self.word(name)
        return self.word(self.slice.series_uid) or self.file


@dataclass
class InputList:
    """Every image, and what is none."""

    entries: list[Entry] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # could not be read
    no_image: list[str] = field(default_factory=list)  # sound, but without a picture
    own: int = 0  # results of an earlier run
    masks: int = 0  # files in folders of masks below an input


def list_entries(inputs: Sequence[str], reading: ReadOptions, hidden: bool) -> InputList:
    """Walk the inputs; the slices of a series follow each other in the order of their position."""
    result, files = InputList(), []
    for path, place in list_files(map(Path, inputs)):
        if is_own_result(path):
            result.own += 1
            continue
        if {part.lower() for part in Path(place).parts[:-1]} & set(MASK_FOLDERS):
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
        _, place, first = members[0]
        folder = place.rpartition("/")[0]
        title = f"{folder or 'series'} {first.series_uid[-8:]}" if first.series_uid else place
        for number, i in enumerate(in_order([slice_ for *_, slice_ in members]), 1):
            frame, place, slice_ = members[i]
            result.entries.append(Entry(frame, place, slice_, key, title, number, len(members), hidden))
    return result


@dataclass(frozen=True)
class OpenImage:
    """A decoded image: what the network and the pictures need of it, not its own pixels."""

    entry: Entry
    tensor: Tensor  # (3, S, S)
    preview: Image.Image | None  # at most as large as an overlay
    size: tuple[int, int]  # W, H
    notes: dict[str, str]
