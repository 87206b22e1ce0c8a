"""DICOM and NIfTI: files whose grey levels need a range and that may hold many slices; every slice becomes 8-bit RGB.

DICOM needs pydicom and NIfTI nibabel, imported where they are used. `dataset.images` is the way in.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import stat
import zlib
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from io import BytesIO
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from utils import InputError

if TYPE_CHECKING:
    from pydicom import Dataset

Array = np.ndarray
Notes = dict[str, str]  # a kind of remark -> what is to be said of this picture
PLANES = ("sagittal", "coronal", "axial")  # which of the axes x, y, z is cut
MAX_BYTES = 4 * 2**30  # of a file, and of what it unpacks to
MAX_SIDE = 16_384  # pixels of a slice after it was resampled
ROBUST = (0.5, 99.5)  # the percentiles of `--window auto`
SAMPLED = 2**20  # values that percentiles are taken from
SAMPLED_SLICES = 64
NO_PICTURE = ("RTDOSE", "RTSTRUCT", "RTPLAN", "RTRECORD", "SEG", "SR", "PR", "KO", "REG", "ECG", "HD", "DOC")
_lock = RLock()  # threads ask for slices of the same file: it is read once


class MissingPackageError(InputError):
    """A format needs a package that is not installed: nothing that skipping a file would help."""


class NoImageError(InputError):
    """A DICOM object that is sound but holds no picture: a report, a plan, a dose, a waveform."""


@dataclass(frozen=True)
class ReadOptions:
    """How files with more than 8 bits or more than one slice become images.

    `window` is (centre, width): centre - width/2 is black, centre + width/2 white; `auto`: the percentiles `ROBUST` of
    the whole volume, series or file; `full`: its lowest to its highest value; None: the window in the file where there
    is one, else `full` (16-bit pictures: the range of 16 bits).
    """

    window: tuple[float, float] | str | None = None
    plane: str = "axial"  # of NIfTI volumes

    def key(self) -> str:
        """What tells pictures apart that these options make of the same bytes; empty for the defaults."""
        return "" if self == type(self)() else f"window {self.window} plane {self.plane}"


AS_STORED = ReadOptions()  # the defaults


def read_bytes(path: Path) -> bytes:
    """A file's content, read once; `InputError` for a folder, a pipe, a device, or more than `MAX_BYTES`."""
    check_file(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: more than {MAX_BYTES:,} bytes")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def check_file(path: Path) -> None:
    """`InputError` unless `path` is a file: a pipe may never end."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if stat.S_ISDIR(mode):
        try:
            next(os.scandir(path), None)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        raise InputError(f"{path}: a folder, no image")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: a pipe, a socket or a device, no image")


# --- arrays become pictures ---


def to_rgb(values: Array) -> Image.Image:
    """An array as 8-bit RGB: (H, W), (H, W, 1) or (H, W, 3) of uint8, uint16, or float in [0, 1].

    Raises:
        InputError: another shape or type, NaN, or floats outside [0, 1].
    """
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] != 3) or 0 in values.shape:
        raise InputError(f"an array of shape {values.shape} is no image: expected (H, W) or (H, W, 3)")
    if values.dtype == np.uint16:
        values = (values / 257).round()
    elif values.dtype.kind == "f":
        if not (values.min() >= 0 and values.max() <= 1):
            raise InputError(f"floating-point pixels from {values.min()} to {values.max()}: expected [0, 1]")
        values = (values * 255).round()
    elif values.dtype != np.uint8:
        raise InputError(f"pixels of type {values.dtype}: expected uint8, uint16 or floats in [0, 1]")
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def apply_window(values: Array, center: float, width: float, function: str = "LINEAR_EXACT") -> Array:
    """Grey values of any shape -> [0, 1], by DICOM's functions (PS3.3, C.11.2.1): LINEAR, LINEAR_EXACT, SIGMOID."""
    values = values.astype(np.float64)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR":
        center, width = center - 0.5, max(width - 1, 1e-6)
    windowed: Array = np.nan_to_num(((values - center) / width + 0.5).clip(0, 1))
    return windowed


def stretch(values: Array, low: float, high: float) -> Array:
    """Grey values -> [0, 1], `low` to `high`; 0 where a value is NaN or there is no range."""
    if not high > low:
        return np.zeros(values.shape)
    return np.nan_to_num((values.astype(np.float64) - low) / (high - low)).clip(0, 1)


@dataclass(frozen=True)
class Range:
    """The finite grey values of a picture, series or volume."""

    low: float
    high: float
    robust_low: float  # the percentiles `ROBUST`
    robust_high: float

    @classmethod
    def of(cls, parts: list[Array], path: object) -> Range:
        """Over arrays of any shape; `InputError` where none holds a finite number."""
        lows, highs, sample = [], [], []
        for part in parts:
            flat = part.ravel(order="K")  # in the order of memory: no copy of a volume stored x first
            for start in range(0, flat.size, 2**24):
                piece = flat[start : start + 2**24]
                finite = piece if piece.dtype.kind != "f" else piece[np.isfinite(piece)]
                if finite.size:
                    lows.append(float(finite.min()))
                    highs.append(float(finite.max()))
            sample.append(flat[:: max(flat.size * len(parts) // SAMPLED, 1)])
        if not lows:
            raise InputError(f"{path}: no pixel holds a finite number")
        values = np.concatenate(sample).astype(np.float64)
        values = values[np.isfinite(values)]
        robust = np.percentile(values, ROBUST) if values.size else (min(lows), max(highs))
        return cls(min(lows), max(highs), float(robust[0]), float(robust[1]))

    def apply(self, values: Array, robust: bool) -> Array:
        """Values -> [0, 1] over the whole or the robust range; the whole one where the robust one is empty."""
        low, high = self.ends(robust)
        return stretch(values, low, high)

    def ends(self, robust: bool) -> tuple[float, float]:
        """Black and white."""
        return (self.robust_low, self.robust_high) if robust and self.robust_high > self.robust_low else (
            self.low, self.high)  # fmt: skip

    def note(self, robust: bool, of: str) -> str:
        """The range in words."""
        low, high = self.ends(robust)
        return f"shown from {low:g} to {high:g}, {'the robust' if robust else 'the whole'} range of {of}"


def _package(name: str, path: object) -> Any:  # noqa: ANN401 - a module, which may not be installed
    package = name.split(".", maxsplit=1)[0]
    try:
        import_module(package)
        return import_module(name)
    except ImportError as error:
        kind, advice = ("DICOM", "'pydicom>=3'") if package == "pydicom" else ("NIfTI", package)
        raise MissingPackageError(f"{path}: {kind} needs {package}: pip install {advice}") from error


# --- DICOM ---


def count_dicom(path: Path) -> int:
    """How many frames a DICOM file holds.

    Raises:
        NoImageError: it holds no picture.
        InputError: it claims more frames than its bytes can hold, or cannot be read.
    """
    with path.open("rb") as file:
        header = parse_dicom(file, path, header_only=True)
    claimed = header.get("NumberOfFrames")
    count = 1 if claimed in (None, "") else int(claimed)
    if count == 1:
        return 1
    size = path.stat().st_size
    pixel_bytes = header.Rows * header.Columns * header.get("SamplesPerPixel", 1) * header.BitsAllocated / 8
    syntax = header.file_meta.TransferSyntaxUID
    most = size // 8 if syntax.is_compressed else int(size // max(pixel_bytes, 1))  # a fragment's own header: 8 bytes
    if syntax.is_deflated:
        most = count  # `parse_dicom` has unpacked it; a frame that is missing shows when it is read
    elif syntax.is_compressed and 1 <= count <= most:
        with path.open("rb") as file:
            most = _package("pydicom.encaps", path).parse_fragments(parse_dicom(file, path).PixelData)[0]
    if not 1 <= count <= most:
        raise InputError(f"{path}: NumberOfFrames is {count}, but the file holds at most {most}")
    return count


def parse_dicom(file: BinaryIO, path: Path, header_only: bool = False) -> Dataset:
    """The data set in an open file; `NoImageError` where it holds no picture."""
    reader = _package("pydicom.filereader", path)
    reader.read_preamble(file, force=False)
    syntax = reader._read_file_meta_info(file).get("TransferSyntaxUID")
    if syntax is not None and syntax.is_deflated:  # which `dcmread` unpacks whole, however large
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        size = 0
        while piece := file.read(2**20):
            while piece:
                size += len(unpacker.decompress(piece, 2**24))
                piece = unpacker.unconsumed_tail
                if size > MAX_BYTES:
                    raise InputError(f"{path}: unpacks to more than {MAX_BYTES:,} bytes")
    file.seek(0)
    header: Dataset = reader.dcmread(file, stop_before_pixels=header_only)
    modality = str(header.get("Modality") or "")
    if modality in NO_PICTURE or "Rows" not in header or "Columns" not in header:
        kind = header.get("SOPClassUID")
        raise NoImageError(f"{path}: no image ({getattr(kind, 'name', '') or modality or 'a DICOM object'})")
    return header


def read_dicom(data: bytes, path: Path, index: int, options: ReadOptions) -> tuple[Image.Image, Notes, str]:
    """A frame, rescaled and windowed by `options`, else by the header's first window or LUT, else over the series.

    Returns:
        The picture, what is to be said of it, and the range of grey where other files of the series shaped it.
    """
    header = parse_dicom(BytesIO(data), path)
    values = _pixels(header, path, index)
    photometric, bits = header.PhotometricInterpretation, int(header.BitsStored)
    if photometric == "PALETTE COLOR":
        return to_rgb(_package("pydicom.pixels", path).apply_color_lut(values, header)), {}, ""
    if values.ndim == 3:
        return (
            to_rgb(values if values.dtype == np.uint8 and bits == 8 else (values / (2.0**bits - 1)).clip(0, 1)),
            {},
            "",
        )
    rescaled, is_stored = _rescale(values, header, index)
    display = _frame_values(header, index, "FrameVOILUTSequence")
    window, fault = _header_window(display)
    notes: Notes = {}
    series = ""
    if isinstance(options.window, tuple):
        gray = apply_window(rescaled, *options.window)
    elif options.window is None and window:
        gray = apply_window(rescaled, *window, display.get("VOILUTFunction") or "LINEAR")
    elif options.window is None and display.get("VOILUTSequence"):
        voi_lut = _package("pydicom.pixels", path).apply_voi_lut
        gray = voi_lut(rescaled, display) / (2.0 ** display.VOILUTSequence[0].LUTDescriptor[2] - 1)
    elif options.window is None and bits <= 8 and is_stored:
        least = -(2 ** (bits - 1)) if header.get("PixelRepresentation") else 0
        gray = stretch(values, least, least + 2**bits - 1)
    else:
        span, of = _series_range(header, path, rescaled)
        series = str(span) if "series" in of else ""
        gray = span.apply(rescaled, options.window == "auto")
        notes["window"] = f"{fault}{span.note(options.window == 'auto', of)}"
    return to_rgb(np.nan_to_num(1 - gray if photometric == "MONOCHROME1" else gray).clip(0, 1)), notes, series


def _pixels(header: Dataset, path: Path, index: int) -> Array:
    try:
        values: Array = _package("pydicom.pixels", path).pixel_array(header, index=index)
    except RuntimeError as error:
        if "missing dependencies" not in str(error):
            raise
        decoders = "pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
        name = header.file_meta.TransferSyntaxUID.name
        raise InputError(f"{path}: no decoder for {name}: pip install {decoders}") from error
    else:
        return values


def _number(value: Any) -> float | None:  # noqa: ANN401 - whatever an element holds
    """The first number of an element; None where it is absent, empty or not finite."""
    values = np.atleast_1d(np.asarray([] if value in (None, "") else value, dtype=object)).ravel()
    try:
        number = float(values[0])
    except (IndexError, TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _header_window(display: Dataset) -> tuple[tuple[float, float] | None, str]:
    """The header's first window, and what is wrong with it."""
    center, width = _number(display.get("WindowCenter")), _number(display.get("WindowWidth"))
    if center is None or width is None:
        return None, "no window in the header: "
    if width <= 0:
        return None, f"the header's window is {width:g} wide, which is ignored: "
    return (center, width), ""


def _rescale(values: Array, header: Dataset, index: int) -> tuple[Array, bool]:
    """Stored values in the modality's units, and whether these are the stored values themselves."""
    group = _frame_values(header, index, "PixelValueTransformationSequence")
    if group.get("ModalityLUTSequence"):
        return _package("pydicom.pixels", "DICOM").apply_modality_lut(values, group), False
    slope, intercept = _number(group.get("RescaleSlope")), _number(group.get("RescaleIntercept"))
    if (slope, intercept) in ((None, None), (1.0, 0.0)):
        return values, True
    return values * (1.0 if slope is None else slope) + (intercept or 0.0), False


def _frame_values(header: Dataset, index: int, sequence: str) -> Dataset:
    """Where a frame's values stand: in enhanced files its own or the shared functional group, else the file itself."""
    per_frame, shared = (header.get(f"{name}FunctionalGroupsSequence") or [] for name in ("PerFrame", "Shared"))
    for group in (*per_frame[index : index + 1], *shared):
        if group.get(sequence):
            values: Dataset = group[sequence][0]
            return values
    return header


@lru_cache(maxsize=64)
def _series_in(folder: Path) -> dict[str, list[Path]]:
    """The series in a folder: SeriesInstanceUID -> files."""
    series: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        try:
            with path.open("rb") as file:
                if file.read(132)[128:] != b"DICM":
                    continue
                file.seek(0)
                uid = str(parse_dicom(file, path, header_only=True).get("SeriesInstanceUID") or "")
        except Exception:
            continue
        series.setdefault(uid, []).append(path)
    return series


_ranges: dict[tuple[Path, str], tuple[Range, str]] = {}


def _series_range(header: Dataset, path: Path, picture: Array) -> tuple[Range, str]:
    """The grey values of all pictures of this file's series in its folder, and how many these are in words."""
    uid = str(header.get("SeriesInstanceUID") or "")
    count = int(header.get("NumberOfFrames") or 1)
    key = (path.parent, uid) if uid and count == 1 else (path, "")
    with _lock:
        if key not in _ranges:
            files = _series_in(path.parent).get(uid, []) if uid and count == 1 else []
            if len(files) > 1:
                parts = [part for file in files for part in _frames_of(file)]
                _ranges[key] = Range.of(parts or [picture], path), f"its series ({len(files)} files)"
            elif count > 1:
                chosen = np.linspace(0, count - 1, min(count, SAMPLED_SLICES)).astype(int)
                parts = [_rescale(_pixels(header, path, int(i)), header, int(i))[0] for i in chosen]
                _ranges[key] = Range.of(parts, path), f"its {count} frames"
            else:
                return Range.of([picture], path), "this picture"
        return _ranges[key]


def _frames_of(path: Path) -> list[Array]:
    """The rescaled pixels of a single-frame neighbour, thinned; nothing where it is damaged."""
    try:
        with path.open("rb") as file:
            header = parse_dicom(file, path)
        values = _rescale(_pixels(header, path, 0), header, 0)[0]
    except Exception:  # it is reported where it is read itself
        return []
    extremes = np.array([values.min(), values.max()], dtype=values.dtype)
    return [extremes, values.ravel()[:: max(values.size // 4096, 1)]] if values.ndim == 2 else []


# --- NIfTI ---


@dataclass(frozen=True)
class Volume:
    """A NIfTI file with its axes turned to x right, y anterior, z superior."""

    sha256: str  # of the file's bytes
    values: Array  # (X, Y, Z, T) float32
    zooms: tuple[float, ...]  # millimetres along x, y, z
    span: Range
    affine: Array  # (4, 4), of the turned axes

    def plane(self, index: int, name: str) -> tuple[Array, tuple[float, float]]:
        """A slice (rows, columns) as radiologists look at it, and the millimetres of a row and of a column.

        The patient's right is on the left, anterior or superior at the top; sagittal slices have anterior on the left.
        """
        axis = PLANES.index(name)
        time, place = divmod(index, self.values.shape[axis])
        across, down = (self.zooms[i] for i in range(3) if i != axis)
        # A view: `take` would copy a volume that is stored x first, whole, for each slice.
        return np.moveaxis(self.values[..., time], axis, 0)[place][::-1, ::-1].T, (down, across)


def count_nifti(path: Path, plane: str) -> int:
    """How many slices a NIfTI file holds along a plane, over all its time points; see `read_volume` for errors."""
    shape, order = _nifti_shape(path, _state(path))
    axis = order.index(PLANES.index(plane))
    return shape[axis] * math.prod(shape[3:])


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _nifti_class(head: bytes, path: Path) -> Any:  # noqa: ANN401 - nibabel may not be installed
    nibabel = _package("nibabel", path)
    is_second = 540 in (int.from_bytes(head[:4], order) for order in ("little", "big"))
    return nibabel.Nifti2Image if is_second else nibabel.Nifti1Image


def _nifti_header(head: bytes, path: Path) -> tuple[Any, int]:
    """The header, and how many bytes the unpacked file must hold; `InputError` for what cannot be a volume."""
    header = _nifti_class(head, path).header_class.from_fileobj(BytesIO(head))
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise InputError(f"{path}: voxels of type {dtype}: expected numbers")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise InputError(f"{path}: {len(shape)} axes of {shape}; split it into volumes of 3 or 4")
    needed = int(header.get_data_offset()) + math.prod(shape) * dtype.itemsize
    if needed > MAX_BYTES:
        raise InputError(f"{path}: {shape} voxels are more than the {MAX_BYTES:,} bytes that are read")
    return header, needed


@lru_cache(maxsize=4096)
def _nifti_shape(path: Path, _state: tuple[int, int]) -> tuple[tuple[int, ...], list[int]]:
    """The shape on disk, and which of x, y, z each of its first three axes is; the file holds that many voxels."""
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        head = file.read(1024)
        header, needed = _nifti_header(head, path)
        size = len(head) if packed else path.stat().st_size
        while packed and size < needed and (piece := file.read(2**20)):
            size += len(piece)
    if size < needed:
        raise InputError(f"{path}: its header claims {needed:,} bytes, but it holds {size:,}: cut short")
    orientation = _package("nibabel", path).io_orientation
    return tuple(header.get_data_shape()), [int(axis) for axis in orientation(header.get_best_affine())[:, 0]]


def read_volume(path: Path) -> Volume:
    """The whole volume, kept for the next slice of it.

    Raises:
        MissingPackageError: nibabel is not installed.
        InputError: no numbers, not 3 or 4 axes, or fewer bytes than the header claims.
    """
    with _lock:
        return _volume(path, _state(path))


@lru_cache(maxsize=3)  # images and mask of one that is being read, and one whose pictures are being written
def _volume(path: Path, _state: tuple[int, int]) -> Volume:
    data = read_bytes(path)
    digest = hashlib.sha256(data).hexdigest()
    if data[:2] == b"\x1f\x8b":
        file = gzip.GzipFile(fileobj=BytesIO(data))
        head = file.read(1024)
        needed = _nifti_header(head, path)[1]
        data = head + file.read(max(needed - len(head), 0))  # not more, whatever else it unpacks to
    else:
        needed = _nifti_header(data[:1024], path)[1]
    if len(data) < needed:
        raise InputError(f"{path}: its header claims {needed:,} bytes, but it holds {len(data):,}: cut short")
    nibabel = _package("nibabel", path)
    image = nibabel.as_closest_canonical(nibabel.squeeze_image(_nifti_class(data, path).from_bytes(data)))
    values = image.get_fdata(dtype=np.float32, caching="unchanged")
    span = Range.of([values], path)
    zooms = tuple(float(zoom) for zoom in image.header.get_zooms()[:3])
    return Volume(digest, values[..., None] if values.ndim == 3 else values, zooms, span, image.affine)


def read_nifti(volume: Volume, index: int, options: ReadOptions) -> tuple[Image.Image, Notes]:
    """A slice with square pixels; without a window the volume's lowest value is black, its highest white."""
    values, spacing = volume.plane(index, options.plane)
    notes: Notes = {}
    if isinstance(options.window, tuple):
        gray = apply_window(values, *options.window)
    else:
        gray = volume.span.apply(values, options.window == "auto")
        notes["window"] = volume.span.note(options.window == "auto", "the volume")
    ratio = _ratio(spacing)
    if ratio > 3:
        notes["pixels"] = f"pixels of {spacing[1]:g} x {spacing[0]:g} mm, resampled to square ones"
    return square(to_rgb(gray), spacing, Image.Resampling.BICUBIC), notes


def read_nifti_mask(volume: Volume, index: int, plane: str) -> Image.Image:
    """The slice's labels as a mask: 255 where a label is not 0 (NaN counts as 0), else 0; square pixels."""
    values, spacing = volume.plane(index, plane)
    marked = (np.nan_to_num(values) != 0).astype(np.uint8) * 255
    return square(Image.fromarray(marked), spacing, Image.Resampling.NEAREST)


def _ratio(spacing: tuple[float, float]) -> float:
    return max(spacing) / min(spacing) if all(math.isfinite(s) and s > 0 for s in spacing) else 1.0


def square(image: Image.Image, spacing: tuple[float, float], how: Image.Resampling) -> Image.Image:
    """The image enlarged along its coarser axis to pixels as wide as high; `spacing` is that of a row and a column."""
    if _ratio(spacing) < 1.01:
        return image
    fine = min(spacing)
    width, height = (
        min(max(round(side * step / fine), 1), MAX_SIDE)
        for side, step in zip(image.size, reversed(spacing), strict=True)
    )
    return image.resize((width, height), how)


# --- what a slice is ---

SIDES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}  # left, right, top and bottom of a picture


def describe(path: Path, index: int | None, plane: str) -> dict[str, Any]:
    """What a table says of a DICOM or NIfTI picture; errors are those of reading it.

    DICOM: patient_id, study_uid, series_uid (these three name a person: hash them before they are shared),
    instance_number, position (millimetres along the slices' normal; None where the file does not say). NIfTI: plane,
    slice and time (counted from 0), position (millimetres along the plane's axis), and the sides `left`, `right`,
    `top`, `bottom` of the picture as letters (R, L, A, P, S, I).
    """
    if path.name.lower().endswith((".nii", ".nii.gz")):
        volume, axis = read_volume(path), PLANES.index(plane)
        time, place = divmod(index or 0, volume.values.shape[axis])
        along = round(float(volume.affine[axis, axis] * place + volume.affine[axis, 3]), 3)
        sides = dict(zip(("left", "right", "top", "bottom"), SIDES[plane], strict=True))
        return {"plane": plane, "slice": place, "time": time, "position": along, **sides}
    with path.open("rb") as file:
        header = parse_dicom(file, path, header_only=True)
    names = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")
    patient_id, study, series = (str(header[name].value) if header.get(name) else None for name in names)
    number, where = _number(header.get("InstanceNumber")), header.get("ImagePositionPatient")
    turn = header.get("ImageOrientationPatient")
    position: float | None = None
    if where and turn and len(where) == 3 and len(turn) == 6:
        normal = np.cross(np.asarray(turn[:3], float), np.asarray(turn[3:], float))
        position = round(float(normal @ np.asarray(where, float)), 3)
    return {"patient_id": patient_id, "study_uid": study, "series_uid": series,
            "instance_number": None if number is None else int(number), "position": position}  # fmt: skip
