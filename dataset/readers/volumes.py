"""Readers for DICOM (needs pydicom) and NIfTI (needs nibabel): a file is opened as a `Volume`, which gives images.

A NIfTI volume is reoriented to the axes x right, y anterior, z superior, whatever their order on disk.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from threading import RLock
from typing import Any, cast

import numpy as np
from PIL import Image

from utils import InputError, blame

from . import grey
from .grey import DAMAGE, PLANES, Array, Ends, Frame, MaskFile, NoImageError, Picture, Range, Size, Slice, optional

Header = Any  # pydicom's Dataset
NO_PICTURE = ("RTDOSE", "RTSTRUCT", "RTPLAN", "RTRECORD", "SEG", "SR", "PR", "KO", "REG", "ECG", "HD", "DOC")
ELEMENTS = ("Rows", "Columns", "BitsAllocated", "BitsStored", "PhotometricInterpretation")  # every image has these
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio")  # each: row height, column width
DECODERS = "other decoders: pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
SAMPLED_FRAMES = 64  # at most, to measure the range of a file
EDGES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
MAX_VOXELS = 2**31
SAME_PLACE = 0.1  # voxels by which the corners of a mask and its volume may differ
_lock = RLock()  # lets threads that need the same file or series read it only once


class Volume:
    """An opened scan; each format is a subclass.

    Opening raises `MissingPackageError`, `NoImageError` for a DICOM object without a picture, and `InputError` for a
    file that is damaged, cut short or claims more than it holds.
    """

    mode: str  # the format
    axes: list[Slice]  # for each image, its metadata
    spacing: list[Ends]  # for each image, row height and column width in millimetres
    windows: Sequence[Callable[[Array], Array] | None]  # for each image, the file's own window: values -> [0, 1]
    is_inverted = False  # low values are white
    values: Callable[[int], Array]  # an image (H, W) in the file's units, or colours (H, W, 3); decoded on demand
    measure: Callable[[Array], Range]  # an image's values -> the range of its volume, series or file
    mask_values: Callable[[Frame, int], tuple[Array, Ends]]  # labels of an image, (H, W) or colours, and their spacing

    @classmethod
    def open(cls, path: Path, plane: str) -> Volume:
        """Open a file, or return it from the cache, as several images are read from the same file."""
        with _lock, blame(path):
            return _opened(cls, path, plane, path.stat().st_mtime_ns)  # type: ignore[arg-type] # of a subclass

    @classmethod
    def describe(cls, path: Path, plane: str) -> Sequence[Slice]:
        """The metadata of each image in a file."""
        return cls.open(path, plane).axes

    @classmethod
    def read(cls, frame: Frame) -> Picture:
        """Read an image; the default window is the header's first window or LUT (DICOM), the volume's range (NIfTI)."""
        volume, index = cls.open(frame.path, frame.options.plane), frame.index or 0
        values, (down, across) = volume.values(index), volume.spacing[index]
        own, measure = volume.windows[index], partial(volume.measure, values)
        image, notes = grey.show(values, frame.options.window, own, measure, volume.is_inverted)
        if grey.is_stretched((down, across), 3):
            times, sides = max(down / across, across / down), "high as wide" if down > across else "wide as high"
            notes["pixels"] = f"pixels {times:.3g} times as {sides}, resampled to square ones"
        shown = grey.square(image, (down, across))
        digest = hashlib.sha256(f"{shown.size} ".encode() + shown.tobytes()).hexdigest()
        return Picture(shown, digest, volume.mode, image.size, notes=notes)

    @classmethod
    def sizes(cls, frame: Frame) -> set[Size]:
        """The sizes that an image's mask may have: the image's before and after its pixels were made square."""
        picture = cls.read(frame)
        return {picture.image.size, picture.stored}

    @classmethod
    def read_mask(cls, path: Path, of: Frame, count: int) -> MaskFile:
        """The mask of an image in a file of `count` images: never windowed, and every label except 0 is abnormal.

        A DICOM mask whose largest value is between 128 and 255 holds grey levels instead of labels.
        """
        volume = cls.open(path, of.options.plane)
        values, spacing = volume.mask_values(of, count)
        values = np.nan_to_num(values).astype(np.float32)
        if values.ndim == 3:
            values = values.max(axis=2)
        is_grey = volume.mode == "DICOM" and 127 < values.max() <= 255
        labels = np.asarray(grey.square(Image.fromarray(values), spacing, Image.Resampling.NEAREST))
        greys = (labels if is_grey else (labels != 0) * 255).astype(np.uint8)
        return MaskFile(greys, greys if is_grey else labels, not is_grey, {})


@lru_cache(maxsize=3)  # an image and its mask being read, and a scan whose pictures are being written
def _opened(kind: Callable[[Path, str], Volume], path: Path, plane: str, _time: int) -> Volume:
    return kind(path, plane)


# --- NIfTI ---


class Nifti(Volume):
    """A NIfTI file, sliced along a plane."""

    mode = "NIfTI"

    def __init__(self, path: Path, plane: str) -> None:
        self.path, self.plane = path, plane
        nibabel = optional("nibabel", path)
        errors = nibabel.spatialimages.HeaderDataError, nibabel.wrapstruct.WrapStructError
        own = *errors, nibabel.filebasedimages.ImageFileError
        with blame(f"{path}: not readable as NIfTI, or cut short", errors=(*DAMAGE, *own)):
            stored = nibabel.load(path, mmap=False)
            if not 0 < math.prod(stored.shape) < MAX_VOXELS or stored.get_data_dtype().kind not in "iuf":
                fault = f"shape {stored.shape} and type {stored.get_data_dtype()} are not supported"
                raise InputError(f"{path}: {fault}")
            image = nibabel.squeeze_image(stored)
            if image.ndim == 2:
                image = type(image)(image.get_fdata(dtype=np.float32)[..., None], image.affine, image.header)
            if image.ndim not in (3, 4):
                raise InputError(f"{path}: {image.ndim} axes; split it into volumes of 3 or 4")
            image = nibabel.as_closest_canonical(image)
            values = image.get_fdata(dtype=np.float32, caching="unchanged")
        is_known = max(stored.header[name] for name in ("qform_code", "sform_code")) > 0  # how the axes lie
        axis, center = PLANES.index(plane), np.append((np.array(values.shape[:3]) - 1) / 2, 1.0)
        center[axis] = 0
        first, step = float((image.affine @ center)[axis]), float(image.affine[axis, axis])
        places = [round(first + step * number, 3) for number in range(values.shape[axis])] * math.prod(values.shape[3:])
        self.axes = [Slice(position=place, plane=plane, edges=EDGES[plane] if is_known else "") for place in places]
        across, down = (float(zoom) for i, zoom in enumerate(image.header.get_zooms()[:3]) if i != axis)
        self.spacing, self.windows = [(down, across)] * len(places), [None] * len(places)
        whole = Range.measure([values], "the volume", path)
        self.measure = lambda _: whole
        self.slices, self.grid = slices_of(values, plane), nibabel.Nifti1Image(values, image.affine)
        self.values = self.slices.__getitem__

    def mask_values(self, of: Frame, count: int) -> tuple[Array, Ends]:
        """The mask's slice on the image's grid, according to the positions in both headers."""
        if not of.path.name.lower().endswith((".nii", ".nii.gz")):
            raise InputError(f"{self.path}: a NIfTI mask, but {of.path.name} is no NIfTI file; save both in one format")
        image, index = cast(Nifti, self.open(of.path, of.options.plane)), of.index or 0
        return _resampled_onto(self, image)[index], image.spacing[index]


def slices_of(values: Array, plane: str) -> list[Array]:
    """The slices of (X, Y, Z) or (X, Y, Z, T) in radiological orientation: views (rows, columns), not copies.

    The patient's right is on the left, anterior or superior at the top; sagittal slices have anterior on the left.
    Slices are numbered consecutively over all time points.
    """
    times = np.moveaxis(values, 3, 0) if values.ndim == 4 else values[None]
    return [cut[::-1, ::-1].T for time in times for cut in np.moveaxis(time, PLANES.index(plane), 0)]


@lru_cache(maxsize=3)
def _resampled_onto(mask: Nifti, image: Nifti) -> Sequence[Array]:
    """A mask's slices on its image's grid: unchanged if shape and position agree, else resampled with a warning.

    Raises `InputError` if the headers do not relate the two, or nothing that the mask marks is in the image.
    """
    there, here, path = mask.grid, image.grid, mask.path
    apart = np.abs(there.affine - here.affine) @ [*there.shape[:3], 1]
    if there.shape == here.shape and apart.max() < SAME_PLACE * min(there.header.get_zooms()[:3]):
        return mask.slices
    if max(here.ndim, there.ndim) > 3 or not (mask.axes[0].edges and image.axes[0].edges):
        fault = f"its {there.shape} voxels are not aligned with the {here.shape} of its image"
        raise InputError(f"{path}: {fault}, and the headers do not say how to align them")
    moved = optional("nibabel.processing", path).resample_from_to(there, here, order=0)
    values = moved.get_fdata(dtype=np.float32)
    if there.get_fdata().any() and not values.any():
        raise InputError(f"{path}: nothing that it marks lies in its image: the headers say that it lies elsewhere")
    fault = "shape or affine differ from its image's: the mask is resampled onto it, to the nearest voxel"
    grey.warn_once(f"{path}: {fault}")
    return slices_of(values, mask.plane)


# --- DICOM ---


class Dicom(Volume):
    """A DICOM file of one or more frames."""

    mode = "DICOM"

    def __init__(self, path: Path, plane: str) -> None:
        own = optional("pydicom.errors", path).BytesLengthException
        with blame(f"{path}: not readable as DICOM, or cut short", errors=(*DAMAGE, own)):  # parsed on access
            self.path, self.header = path, _parse(path.read_bytes(), path)
            each = range(_count(self.header, path))
            self.axes = [_slice(self.header, i, len(each)) for i in each]
            self.spacing = [_spacing(self.header, i) for i in each]
            self.windows = [_window(self.header, i) for i in each]
            self.is_inverted = self.header.PhotometricInterpretation == "MONOCHROME1"

    def values(self, index: int, rescaled: bool = True) -> Array:
        """Grey values in the modality's units (float64), or as stored if `rescaled` is False; or colours."""
        pixels, header = optional("pydicom.pixels", self.path), self.header
        with blame(f"{self.path}: not a readable image, or cut short", errors=DAMAGE):
            name = header.file_meta.TransferSyntaxUID.name
            with blame(f"{self.path}: {name} cannot be decoded", DECODERS, (RuntimeError,)):
                values: Array = pixels.pixel_array(header, index=index)
            if header.PhotometricInterpretation == "PALETTE COLOR":
                return np.asarray(grey.to_rgb(pixels.apply_color_lut(values, header)))
            if values.ndim == 3 or not rescaled:
                return values
            group = frame_values(header, index, "PixelValueTransformationSequence")
            if group.get("ModalityLUTSequence"):
                return _table(header, group.ModalityLUTSequence[0])(values)
            slope, intercept = numbers(group, "RescaleSlope") or [1.0], numbers(group, "RescaleIntercept") or [0.0]
            return values.astype(np.float64) * slope[0] + intercept[0]

    def mask_values(self, of: Frame, count: int) -> tuple[Array, Ends]:
        """The mask's frame with the image's number, as stored."""
        if len(self.axes) != count:
            raise InputError(f"{self.path}: {len(self.axes)} frames, but its image has {count}")
        return self.values(of.index or 0, rescaled=False), self.spacing[of.index or 0]

    def measure(self, values: Array) -> Range:
        """The range of the file's frames or, for a single frame, of all files of its series in its folder."""
        frames, uid, folder, common = len(self.axes), self.axes[0].series_uid, self.path.parent, None
        with _lock:
            if frames > 1:
                common = _common_range((self.path,), f"its {frames} frames", self.path.stat().st_mtime_ns)
            elif uid and len(files := _series_in(folder, folder.stat().st_mtime_ns).get(uid, [])) > 1:
                common = _common_range(tuple(files), f"its series ({len(files)} files)", uid)
        return common or Range.measure([values], "this picture", self.path)


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
    if header.file_meta.get("TransferSyntaxUID") is None:  # no file header: use the encoding that pydicom detected
        uid, (implicit, little) = optional("pydicom.uid", path), header.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        header.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    return header


def _count(header: Header, path: Path) -> int:
    """The number of frames in a file; raises `InputError` if it claims more than its bytes can hold."""
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


def _window(header: Header, index: int) -> Callable[[Array], Array] | None:
    """A frame's window: the whole range (colours), the header's first window or LUT, the range (8 bits), or None."""
    display, bits = frame_values(header, index, "FrameVOILUTSequence"), int(header.BitsStored)
    center, width = numbers(display, "WindowCenter"), numbers(display, "WindowWidth")
    if int(header.get("SamplesPerPixel", 1)) > 1:
        return partial(grey.stretch, low=0, high=2**bits - 1)
    if center and width and width[0] > 0:
        function = display.get("VOILUTFunction") or "LINEAR"
        return partial(grey.apply_window, center=center[0], width=width[0], function=function)
    if display.get("VOILUTSequence"):
        table, bits = _table(header, display.VOILUTSequence[0]), display.VOILUTSequence[0].LUTDescriptor[2]
        return lambda values: (table(values) / (2.0**bits - 1)).clip(0, 1)
    group = frame_values(header, index, "PixelValueTransformationSequence")
    rescaled = [*numbers(group, "RescaleSlope"), *numbers(group, "RescaleIntercept")] not in ([], [1, 0])
    if bits <= 8 and not rescaled and not group.get("ModalityLUTSequence"):
        least = -(2 ** (bits - 1)) if header.get("PixelRepresentation") else 0
        return partial(grey.stretch, low=least, high=least + 2**bits - 1)
    return None


def _table(header: Header, item: Header) -> Callable[[Array], Array]:
    """A look-up table: values -> its entries; values beyond its ends get the first or the last entry."""
    (count, first, _), data = item.LUTDescriptor, item.LUTData
    if isinstance(data, bytes):  # entries of 8 bits may be packed
        order, count = "><"[header.original_encoding[1]], count or 2**16
        data = np.frombuffer(data, f"{order}u{2 if len(data) >= 2 * count else 1}")[:count]
    entries, last = np.asarray(data, np.float64), len(data) - 1
    return lambda values: entries[(values.astype(np.int64) - first).clip(0, last)]


def numbers(group: Header, name: str) -> list[float]:
    """The numbers of an element; an empty list if it is absent or empty, or if a number is not finite."""
    with suppress(TypeError, ValueError):
        result = [float(part) for part in np.atleast_1d(np.asarray(group.get(name), dtype=object))]
        return result if all(map(math.isfinite, result)) else []
    return []


def frame_values(header: Header, index: int, sequence: str) -> Header:
    """The header of a frame's values: its own or the shared functional group in enhanced files, else the file's."""
    per_frame, shared = (header.get(f"{name}FunctionalGroupsSequence") or [] for name in ("PerFrame", "Shared"))
    groups = (*per_frame[index : index + 1], *shared)
    return next((group[sequence][0] for group in groups if group.get(sequence)), header)


@lru_cache(maxsize=64)
def _series_in(folder: Path, _time: int) -> dict[str, list[Path]]:
    """The series in a folder, SeriesInstanceUID -> files; unreadable files are skipped."""
    series: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with suppress(InputError), blame(path, errors=DAMAGE):
            series.setdefault(_series_uid(path, path.stat().st_mtime_ns), []).append(path)
    return series


@lru_cache(maxsize=2**16)  # a folder is listed again after each file that is written into it
def _series_uid(path: Path, _time: int) -> str:
    read, tags = optional("pydicom.filereader", path).dcmread, ["SeriesInstanceUID"]
    return str(read(path, force=True, specific_tags=tags).get("SeriesInstanceUID") or "")


@lru_cache(maxsize=256)
def _common_range(files: tuple[Path, ...], of: str, _version: int | str) -> Range | None:
    """The range of the files' grey pictures, None without any; several files are subsampled, damaged ones skipped."""
    parts = []
    for path in files:
        with suppress(InputError):
            volume = Dicom.open(path, "")
            count = len(volume.axes)
            for index in np.linspace(0, count - 1, min(count, SAMPLED_FRAMES)).astype(int).tolist():
                values = volume.values(index)
                step = max(values.size // 4096, 1) if len(files) > 1 else 1
                parts += [np.array([values.min(), values.max()]), values.ravel()[::step]] if values.ndim == 2 else []
    return Range.measure(parts, of, files[0]) if parts else None


def _slice(header: Header, index: int, frames: int) -> Slice:
    holder = frame_values(header, index, "PlanePositionSequence")
    is_frames_own = frames == 1 or holder is not header  # one position for all frames is no frame's own
    place = numbers(holder, "ImagePositionPatient") if is_frames_own else []
    directions = np.array(numbers(frame_values(header, index, "PlaneOrientationSequence"), "ImageOrientationPatient"))
    number = numbers(header, "InstanceNumber") if frames == 1 else [index + 1]
    plane, edges, position, normal = "", "", None, np.empty(0)
    if directions.size == 6:
        across, down = directions[:3], directions[3:]
        normal = np.cross(across, down)
        plane = PLANES[int(np.abs(normal).argmax())]
        edges = "".join(map(_side, (-across, across, -down, down)))
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
    return ("LPS" if direction[axis] > 0 else "RAI")[axis]  # DICOM's axes point to L, P and S
