"""DICOM (needs pydicom) and NIfTI (needs nibabel): either file is opened as a `Volume`, from which images are taken.

A NIfTI volume's axes are turned to x right, y anterior, z superior, whatever their order on disk.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
from PIL import Image

from utils import InputError, blame

from .grey import (
    DAMAGE,
    PLANES,
    Array,
    Frame,
    NoImageError,
    Picture,
    Range,
    Size,
    Slice,
    Volume,
    apply_window,
    optional,
    read_bytes,
    square,
    stretch,
    to_rgb,
    warn_once,
)

Header = Any  # pydicom's Dataset
NO_PICTURE = ("RTDOSE", "RTSTRUCT", "RTPLAN", "RTRECORD", "SEG", "SR", "PR", "KO", "REG", "ECG", "HD", "DOC")
ELEMENTS = ("Rows", "Columns", "BitsAllocated", "BitsStored", "PhotometricInterpretation")  # no image is without
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio")  # each: of rows, of columns
SAMPLED_FRAMES = 64  # of a file, for its range
OPPOSITE = dict(zip("LRPASI", "RLAPIS", strict=True))  # the patient's sides
EDGES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
MAX_VOXELS = 2**31
SAME_PLACE = 0.1  # of a voxel, by which the corners of a mask and its volume may differ
_lock = RLock()  # threads ask for images of the same file or series: it is read once


@dataclass(frozen=True)
class Scans:
    """The reader of a format whose files are volumes."""

    open: Callable[[Path, str, int], Volume]  # path, plane, time; kept for the next image of the file

    def volume(self, path: Path, plane: str) -> Volume:
        """The file; `InputError`, `MissingPackageError` or `NoImageError` where that is impossible."""
        with _lock, blame(path):
            return self.open(path, plane, path.stat().st_mtime_ns)

    def describe(self, path: Path, plane: str) -> Sequence[Slice]:
        """What the file says of each of its images."""
        return self.volume(path, plane).axes

    def read(self, frame: Frame) -> Picture:
        """An image: of DICOM by the header's first window or LUT, of NIfTI over the volume's range by default."""
        return self.volume(frame.path, frame.options.plane).show(frame.index or 0, frame.options.window)

    def sizes(self, frame: Frame) -> set[Size]:
        """Width and height that an image's mask may have: before and after its pixels were made square."""
        picture = self.read(frame)
        return {picture.image.size, picture.stored}

    def read_mask(self, path: Path, of: Frame, count: int) -> Picture:
        """The mask of an image, of which its file holds `count`: never windowed, every label but 0 is abnormal.

        DICOM whose values reach from 128 to 255 holds greys instead.
        """
        index, plane = of.index or 0, of.options.plane
        volume = grid = self.volume(path, plane)
        if not isinstance(volume.values, Frames):
            grid = self.volume(of.path, plane)
            slices = _onto(volume, grid, path, plane)
        elif len(volume.values) == count:
            slices = replace(volume.values, is_rescaled=False)
        else:
            raise InputError(f"{path}: {len(volume.values)} frames, but its image has {count}")
        values = np.nan_to_num(slices[index]).astype(np.float32)
        if values.ndim == 3:
            values = values.max(axis=2)
        is_grey = volume.mode == "DICOM" and 127 < values.max() <= 255
        grey = (values if is_grey else (values != 0) * 255).astype(np.uint8)
        nearest = partial(square, spacing=grid.spacing[index], how=Image.Resampling.NEAREST)
        image, labels = nearest(Image.fromarray(grey)), nearest(Image.fromarray(values))
        stored = values.shape[1], values.shape[0]
        levels = None if is_grey else np.asarray(labels)
        return Picture(image, "", volume.mode, stored, levels=levels, is_labelled=not is_grey)


# --- NIfTI ---


@lru_cache(maxsize=3)  # images and mask of one that is being read, and one whose pictures are being written
def open_nifti(path: Path, plane: str, _time: int = 0) -> Volume:
    """A NIfTI file, cut along a plane.

    Raises:
        MissingPackageError: nibabel is not installed.
        InputError: no numbers, not 3 or 4 axes, or fewer bytes than the header claims.
    """
    nibabel, data = optional("nibabel", path), read_bytes(path)
    errors = nibabel.spatialimages.HeaderDataError, nibabel.wrapstruct.WrapStructError
    own = *errors, nibabel.orientations.OrientationError
    with blame(f"{path}: not readable as NIfTI, or cut short", errors=(*DAMAGE, *own)):
        file: Any = BytesIO(data) if data[:2] != b"\x1f\x8b" else gzip.GzipFile(fileobj=BytesIO(data))
        is_second = 540 in (int.from_bytes(start, order) for start in [file.read(4)] for order in ("little", "big"))
        file.seek(0)
        stored = (nibabel.Nifti2Image if is_second else nibabel.Nifti1Image).from_stream(file)
        if not 0 < math.prod(stored.shape) < MAX_VOXELS or stored.get_data_dtype().kind not in "iuf":
            raise InputError(f"{path}: {stored.shape} of {stored.get_data_dtype()}, no volume of numbers that is read")
        image = nibabel.as_closest_canonical(nibabel.squeeze_image(stored))
        if image.ndim not in (3, 4):
            raise InputError(f"{path}: {image.ndim} axes; split it into volumes of 3 or 4")
        values = image.get_fdata(dtype=np.float32, caching="unchanged")
    codes = int(stored.header["qform_code"]), int(stored.header["sform_code"])
    edges = EDGES[plane] if max(codes) > 0 else ""  # else the axes' directions are a guess
    axis, center = PLANES.index(plane), np.append((np.array(values.shape[:3]) - 1) / 2, 1.0)
    center[axis] = 0
    first, step = float((image.affine @ center)[axis]), float(image.affine[axis, axis])
    places = [round(first + step * number, 3) for number in range(values.shape[axis])] * math.prod(values.shape[3:])
    axes = [Slice(position=place, plane=plane, edges=edges) for place in places]
    across, down = (float(zoom) for i, zoom in enumerate(image.header.get_zooms()[:3]) if i != axis)
    whole = Range.measure([values], "the volume", path)
    spacing, grid = [(down, across)] * len(axes), nibabel.Nifti1Image(values, image.affine)
    return Volume(slices_of(values, plane), [None] * len(axes), lambda _: whole, "NIfTI", spacing, axes, grid=grid)


def slices_of(values: Array, plane: str) -> list[Array]:
    """The slices of (X, Y, Z) or (X, Y, Z, T) as radiologists look at them: views (rows, columns), not copies.

    The patient's right is on the left, anterior or superior at the top; sagittal slices have anterior on the left.
    Slices are counted over all time points.
    """
    times = np.moveaxis(values, 3, 0) if values.ndim == 4 else values[None]
    return [cut[::-1, ::-1].T for time in times for cut in np.moveaxis(time, PLANES.index(plane), 0)]


@lru_cache(maxsize=3)
def _onto(mask: Volume, image: Volume, path: Path, plane: str) -> Sequence[Array]:
    """A mask's slices on its image's grid: as they are where shape and place agree, else resampled, which is said."""
    there, here = mask.grid, image.grid
    apart = np.abs(there.affine - here.affine) @ [*there.shape[:3], 1]
    if there.shape == here.shape and apart.max() < SAME_PLACE * min(there.header.get_zooms()[:3]):
        return mask.values
    if max(here.ndim, there.ndim) > 3 or not (mask.axes[0].edges and image.axes[0].edges):
        fault = f"its {there.shape} voxels lie elsewhere than the {here.shape} of its image"
        raise InputError(f"{path}: {fault}, and the headers do not say how both lie in the patient")
    moved = optional("nibabel.processing", path).resample_from_to(there, here, order=0)
    values = moved.get_fdata(dtype=np.float32)
    if there.get_fdata().any() and not values.any():
        raise InputError(f"{path}: nothing that it marks lies in its image: the headers say that it lies elsewhere")
    warn_once(f"{path}: shape or affine differ from its image's: the mask is resampled onto it, to the nearest voxel")
    return slices_of(values, plane)


# --- DICOM ---


@dataclass(frozen=True)
class Frames(Sequence[Array]):
    """The frames of a DICOM file, decoded when they are asked for: rescaled grey (H, W), or colours (H, W, 3)."""

    header: Header
    path: Path
    length: int
    is_rescaled: bool = True  # into the modality's units; else as stored

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - a sequence also takes slices, which nobody asks for
        pixels, header = optional("pydicom.pixels", self.path), self.header
        with blame(f"{self.path}: not a readable image, or cut short", errors=DAMAGE):
            try:
                values = pixels.pixel_array(header, index=index)
            except RuntimeError as error:
                name, reason = header.file_meta.TransferSyntaxUID.name, str(error).rpartition(": ")[2]
                lacks = "missing dependencies" in str(error)
                fault = f"no decoder for {name}" if lacks else f"{name} cannot be decoded ({reason})"
                hint = "other decoders: pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
                raise InputError(f"{self.path}: {fault}; {hint}") from error
            if header.PhotometricInterpretation == "PALETTE COLOR":
                return np.asarray(to_rgb(pixels.apply_color_lut(values, header)))
            if values.ndim == 3 or not self.is_rescaled:
                return values
            line = _line(header, index)
            if line is None:
                group = frame_values(header, index, "PixelValueTransformationSequence")
                return pixels.apply_modality_lut(values, group)
        if line == (1, 0):
            return values.astype(np.int16) if values.dtype == np.uint8 else values  # 8-bit grey has a window, too
        return values * line[0] + line[1]


@lru_cache(maxsize=3)
def open_dicom(path: Path, _plane: str = "", _time: int = 0) -> Volume:
    """A DICOM file.

    Raises:
        MissingPackageError: pydicom is not installed.
        NoImageError: it holds no picture.
        InputError: it is damaged, cut short, or claims more frames than it holds.
    """
    data, own = read_bytes(path), optional("pydicom.errors", path).BytesLengthException
    with blame(f"{path}: not readable as DICOM, or cut short", errors=(*DAMAGE, own)):  # elements are parsed when read
        header = _parse(data, path)
        each = range(_count(header, path))
        return Volume(
            Frames(header, path, len(each)), [_window(header, path, i) for i in each], partial(_range, header, path),
            "DICOM", [_spacing(header, i) for i in each],
            [_slice(header, i, len(each)) for i in each], header.PhotometricInterpretation == "MONOCHROME1",
        )  # fmt: skip


def _parse(data: bytes, path: Path) -> Header:
    header = optional("pydicom.filereader", path).dcmread(BytesIO(data), force=True)
    kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    name, modality = getattr(kind, "name", ""), str(header.get("Modality") or "")
    absent = [element for element in ELEMENTS if header.get(element) in (None, "")]
    if data[128:132] != b"DICM" and kind is None:
        raise InputError(f"{path}: no DICOM file, or damaged: it has neither the mark DICM nor a SOPClassUID")
    if modality in NO_PICTURE or (absent and "Image Storage" not in name):
        raise NoImageError(f"{path}: no image ({name or modality or 'a DICOM object'})")
    if absent:
        raise InputError(f"{path}: cut short or damaged: its header holds no {absent[0]}")
    if header.file_meta.get("TransferSyntaxUID") is None:  # without a preamble: pydicom found how it is written
        uid, (implicit, little) = optional("pydicom.uid", path), header.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        header.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    return header


def _count(header: Header, path: Path) -> int:
    """How many frames a file holds; `InputError` where it claims more than its bytes can hold."""
    given, pixels = header.get("NumberOfFrames"), header.get("PixelData", b"")
    claimed = 1 if given in (None, "") else int(given)
    held = len(pixels) * 8 // max(int(header.Rows) * int(header.Columns) * int(header.BitsAllocated), 1)
    if header.file_meta.TransferSyntaxUID.is_encapsulated and claimed > 1:
        held = optional("pydicom.encaps", path).parse_fragments(pixels)[0]
    if claimed != 1 and not 1 <= claimed <= held:
        raise InputError(f"{path}: NumberOfFrames is {claimed}, but the file holds at most {held}")
    return claimed


def _spacing(header: Header, index: int) -> tuple[float, float]:
    measures = frame_values(header, index, "PixelMeasuresSequence")
    given = (numbers(measures, name) for name in SPACINGS)
    down, across = next((pair for pair in given if len(pair) == 2), [1.0, 1.0])
    return down, across


def _line(header: Header, index: int) -> tuple[float, float] | None:
    """Slope and intercept from stored values to the modality's units; None where a table does that."""
    group = frame_values(header, index, "PixelValueTransformationSequence")
    slope, intercept = numbers(group, "RescaleSlope") or [1.0], numbers(group, "RescaleIntercept") or [0.0]
    return None if group.get("ModalityLUTSequence") else (slope[0], intercept[0])


def _window(header: Header, path: Path, index: int) -> Callable[[Array], Array] | None:
    """How the header wants a frame shown: its first window or table; up to 8 bits, and colours, their whole range."""
    display, bits = frame_values(header, index, "FrameVOILUTSequence"), int(header.BitsStored)
    center, width = numbers(display, "WindowCenter"), numbers(display, "WindowWidth")
    if int(header.get("SamplesPerPixel", 1)) > 1:
        return partial(stretch, low=0, high=2**bits - 1)
    if center and width and width[0] > 0:
        function = display.get("VOILUTFunction") or "LINEAR"
        return partial(apply_window, center=center[0], width=width[0], function=function)
    if display.get("VOILUTSequence"):
        look_up, top = optional("pydicom.pixels", path).apply_voi_lut, display.VOILUTSequence[0].LUTDescriptor[2]
        return lambda values: np.asarray(look_up(values, display) / (2.0**top - 1))
    if bits <= 8 and _line(header, index) == (1, 0):
        least = -(2 ** (bits - 1)) if header.get("PixelRepresentation") else 0
        return partial(stretch, low=least, high=least + 2**bits - 1)
    return None


def numbers(group: Header, name: str) -> list[float]:
    """The numbers of an element; none where it is absent or empty, or where one is not finite."""
    try:
        value = group.get(name)
        result = [float(part) for part in np.atleast_1d(np.asarray([] if value in (None, "") else value, dtype=object))]
    except (TypeError, ValueError):
        return []
    return result if all(map(math.isfinite, result)) else []


def frame_values(header: Header, index: int, sequence: str) -> Header:
    """Where a frame's values stand: in enhanced files its own or the shared functional group, else the file itself."""
    per_frame, shared = (header.get(f"{name}FunctionalGroupsSequence") or [] for name in ("PerFrame", "Shared"))
    groups = (*per_frame[index : index + 1], *shared)
    return next((group[sequence][0] for group in groups if group.get(sequence)), header)


@lru_cache(maxsize=64)
def _series_in(folder: Path) -> dict[str, list[Path]]:
    """The series in a folder: SeriesInstanceUID -> files, without those that cannot be read."""
    series: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with suppress(InputError), blame(path, errors=DAMAGE):
            read, tags = optional("pydicom.filereader", path).dcmread, ["SeriesInstanceUID"]
            uid = str(read(path, force=True, specific_tags=tags).get("SeriesInstanceUID") or "")
            series.setdefault(uid, []).append(path)
    return series


@lru_cache(maxsize=256)
def _common_range(files: tuple[Path, ...], of: str) -> Range | None:
    """The range of all pictures of some files: of several from thinned pixels, without those that are damaged."""
    parts = []
    for path in files:
        with suppress(InputError):
            values = open_dicom(path).values
            for index in np.linspace(0, len(values) - 1, min(len(values), SAMPLED_FRAMES)).astype(int).tolist():
                grey = values[index]
                step = max(grey.size // 4096, 1) if len(files) > 1 else 1
                parts += [np.array([grey.min(), grey.max()]), grey.ravel()[::step]] if grey.ndim == 2 else []
    return Range.measure(parts, of, files[0]) if parts else None


def _range(header: Header, path: Path, picture: Array) -> Range:
    """The grey values of all pictures of this file's series in its folder, or of the file's frames."""
    frames, uid = int(header.get("NumberOfFrames") or 1), str(header.get("SeriesInstanceUID") or "")
    with _lock:
        files = [path] if frames > 1 or not uid else _series_in(path.parent).get(uid, [path])
        of = f"its {frames} frames" if frames > 1 else f"its series ({len(files)} files)"
        common = _common_range(tuple(files), of) if frames > 1 or len(files) > 1 else None
    return common or Range.measure([picture], "this picture", path)


def _slice(header: Header, index: int, frames: int) -> Slice:
    holder = frame_values(header, index, "PlanePositionSequence")
    is_frames_own = frames == 1 or holder is not header  # one position for many frames is not a frame's
    place = numbers(holder, "ImagePositionPatient") if is_frames_own else []
    directions = np.array(numbers(frame_values(header, index, "PlaneOrientationSequence"), "ImageOrientationPatient"))
    number = numbers(header, "InstanceNumber") if frames == 1 else [index + 1]
    plane, edges, position, normal = "", "", None, np.empty(0)
    if directions.size == 6:
        across, down = directions[:3], directions[3:]
        normal = np.cross(across, down)
        plane = PLANES[int(np.abs(normal).argmax())]
        right, bottom = _side(across), _side(down)
        edges = OPPOSITE[right] + right + OPPOSITE[bottom] + bottom
        position = round(float(np.dot(place, normal)), 3) if len(place) == 3 else None
    patient, study, series, description, kind = (
        str(header.get(name) or "")
        for name in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SeriesDescription", "ImageType")
    )
    return Slice(
        patient, study, series, int(number[0]) if number else None, position, plane, tuple(normal.tolist()), edges,
        description, "LOCALIZER" in kind,
    )  # fmt: skip


def _side(direction: Array) -> str:
    """The patient's side to which a direction mostly points."""
    axis = int(np.abs(direction).argmax())
    side = "LPS"[axis]  # where DICOM's coordinates grow
    return side if direction[axis] > 0 else OPPOSITE[side]
