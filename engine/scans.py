"""The images that are to be predicted, and what their files say of them: patient, series, position, orientation.

Pictures without a patient's coordinate system (PNG, TIFF, ...) have empty answers. Positions are in millimetres.
"""

from __future__ import annotations

import gzip
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset.images import PLANES, Frame, MissingPackageError, NoImageError, ReadOptions, file_kind, frames, list_files
from dataset.patients import patient
from dataset.volumes import parse_dicom
from utils import InputError, anonymous_name, printable

if TYPE_CHECKING:
    from PIL import Image
    from pydicom import Dataset
    from torch import Tensor

MARK = "MadCLIP heat map, research use"  # in the head of every picture that is written, so that none becomes an input
TABLES = ("predictions.csv", "predictions.json", "predictions.partial.csv", "groups.csv")
POSITIVE = {"dicom": "LPS", "nifti": "RAS"}  # where the coordinates x, y, z grow
OPPOSITE = dict(zip("LRPASI", "RLAPIS", strict=True))


@dataclass(frozen=True)
class Slice:
    """What a file says of one of its images."""

    patient_id: str = ""
    study_uid: str = ""
    series_uid: str = ""
    instance_number: int | None = None
    position: float | None = None  # along the slices' normal (NIfTI: the axis that is cut)
    plane: str = ""
    normal: tuple[float, ...] = ()  # of DICOM slices
    edges: str = ""  # the patient's sides at the left, right, top and bottom edge of the image, such as RLAP

    @property
    def orientation(self) -> str:
        """The edges in words."""
        names = ("left", "right", "top", "bottom")
        return ", ".join(f"{name} {side}" for name, side in zip(names, self.edges, strict=False))


def slices_of(frames: Sequence[Frame]) -> list[Slice]:
    """What a file says of its frames, which are of one file; nothing where its header is odd."""
    kind = file_kind(frames[0].path)
    try:
        if kind == "dicom":
            with frames[0].path.open("rb") as file:
                header = parse_dicom(file, frames[0].path, header_only=True)
            return [_dicom_slice(header, frame.index, len(frames)) for frame in frames]
        if kind == "nifti":
            return _nifti_slices(frames)
    except (OSError, InputError, ValueError, TypeError, AttributeError):  # the reader says what is wrong
        pass
    return [Slice()] * len(frames)


def in_order(slices: Sequence[Slice]) -> list[int]:
    """The order of the slices of one series: by position where all have one along the same normal, else by number."""
    normals = [slice_.normal for slice_ in slices]
    parallel = len({bool(n) for n in normals}) == 1 and all(np.dot(n, normals[0]) > 0.99 for n in normals if n)

    def key(i: int) -> tuple[float, float]:
        position, number = slices[i].position, slices[i].instance_number
        infinite = float("inf")
        place = infinite if position is None else position
        return (place if parallel else 0.0), (infinite if number is None else number)

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


# --- what a slice is ---


def _dicom_slice(header: Dataset, index: int | None, count: int) -> Slice:
    def numbers(sequence: str, keyword: str, size: int) -> np.ndarray | None:
        holder = frame_values(header, index or 0, sequence)
        if holder is header and count > 1:  # one position for many frames is not a frame's
            return None if keyword == "ImagePositionPatient" else vector(header.get(keyword), size)
        return vector(holder.get(keyword), size)

    place = numbers("PlanePositionSequence", "ImagePositionPatient", 3)
    directions = numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    plane, edges, normal = "", "", None
    if directions is not None:
        across, down = directions[:3], directions[3:]
        normal = np.cross(across, down)
        plane = PLANES[int(np.abs(normal).argmax())]
        right, bottom = _side(across, "dicom"), _side(down, "dicom")
        edges = OPPOSITE[right] + right + OPPOSITE[bottom] + bottom
    number = None
    with suppress(TypeError, ValueError):
        number = int(header.get("InstanceNumber")) if index is None else index + 1
    return Slice(
        str(header.get("PatientID") or ""),
        str(header.get("StudyInstanceUID") or ""),
        str(header.get("SeriesInstanceUID") or ""),
        number,
        None if place is None or normal is None else round(float(np.dot(place, normal)), 3),
        plane,
        () if normal is None else tuple(normal.tolist()),
        edges,
    )


def frame_values(header: Dataset, index: int, sequence: str) -> Dataset:
    """Where a frame's values stand: in enhanced files its own or the shared functional group, else the file itself."""
    per_frame, shared = (header.get(f"{name}FunctionalGroupsSequence") or [] for name in ("PerFrame", "Shared"))
    for group in (*per_frame[index : index + 1], *shared):
        if group.get(sequence):
            values: Dataset = group[sequence][0]
            return values
    return header


def vector(value: Any, size: int) -> np.ndarray | None:  # noqa: ANN401 - whatever an element holds
    """The element as `size` finite numbers; None for anything else."""
    try:
        numbers = np.array([float(number) for number in value or ()])
    except (TypeError, ValueError):
        return None
    return numbers if numbers.shape == (size,) and np.isfinite(numbers).all() else None


def _side(direction: np.ndarray, kind: str) -> str:
    """The patient's side to which a direction mostly points."""
    axis = int(np.abs(direction).argmax())
    side = POSITIVE[kind][axis]
    return side if direction[axis] > 0 else OPPOSITE[side]


@lru_cache(maxsize=64)
def nifti_header(path: Path) -> Any:  # noqa: ANN401 - nibabel has no types
    """The header as it is in the file, unpacked where need be."""
    nibabel: Any = import_module("nibabel")  # optional, and without types

    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else path.open("rb") as file:
        head = file.read(1024)
    is_second = 540 in (int.from_bytes(head[:4], order) for order in ("little", "big"))
    kind = nibabel.Nifti2Header if is_second else nibabel.Nifti1Header
    return kind(head[: kind.template_dtype.itemsize])


def nifti_shape(header: Any) -> tuple[int, ...]:  # noqa: ANN401
    """The shape without trailing axes of 1 beyond three, as the reader takes it."""
    shape = tuple(int(side) for side in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _nifti_slices(frames: Sequence[Frame]) -> list[Slice]:
    orientations: Any = import_module("nibabel.orientations")
    header, plane = nifti_header(frames[0].path), frames[0].options.plane
    shape, axis = nifti_shape(header), PLANES.index(plane)
    affine = header.get_best_affine()
    turned = orientations.io_orientation(affine)
    affine = affine @ orientations.inv_ornt_aff(turned, shape[:3])  # of the axes turned to x right, y anterior, z up
    sides = np.empty(3, dtype=int)
    sides[turned[:, 0].astype(int)] = shape[:3]
    known = int(header["qform_code"]) > 0 or int(header["sform_code"]) > 0  # else the axes' directions are a guess
    edges = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}[plane] if known else ""
    slices = []
    for frame in frames:
        center = np.append((sides - 1) / 2, 1.0)
        center[axis] = (frame.index or 0) % sides[axis]
        slices.append(Slice(position=round(float((affine @ center)[axis]), 3), plane=plane, edges=edges))
    return slices


# --- what there is to predict ---


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

    def group(self, by: str) -> str:
        """What it is counted with in groups.csv."""
        if by == "folder":
            return self.word(str(self.frame.path.parent))
        if by == "patient" and (name := self.slice.patient_id or patient(self.place, None, self.place)):
            return self.word(name)
        return self.word(self.slice.series_uid) or self.file


@dataclass
class Listing:
    """Every image, and what is none."""

    entries: list[Entry] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # could not be read
    no_image: list[str] = field(default_factory=list)  # sound, but without a picture
    own: int = 0  # results of an earlier run


def list_entries(inputs: Sequence[str], reading: ReadOptions, hidden: bool) -> Listing:
    """Walk the inputs; the slices of a series follow each other in the order of their position."""
    result, files = Listing(), []
    for path, place in list_files(map(Path, inputs)):
        if is_own_result(path):
            result.own += 1
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
            files.append((place, inside, slices_of(inside)))
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
class Opened:
    """A decoded image: what the network and the pictures need of it, not its own pixels."""

    entry: Entry
    tensor: Tensor  # (3, S, S)
    preview: Image.Image | None  # at most as large as an overlay
    size: tuple[int, int]  # W, H
    notes: dict[str, str]
