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
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from utils import InputError

if TYPE_CHECKING:
    from pydicom import Dataset

Array = np.ndarray
Ends = tuple[float, float]
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

    window: Ends | str | None = None
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
        if stat.S_ISDIR(mode):
            next(os.scandir(path), None)  # one that cannot be read is said to be that
            raise InputError(f"{path}: a folder, no image")
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: a pipe, a socket or a device, no image")


# --- arrays become pictures ---


def to_rgb(values: Array) -> Image.Image:
    """An array as 8-bit RGB: (H, W), (H, W, 1) or (H, W, 3) of uint8, uint16, or float in [0, 1]; else `InputError`."""
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


class Range(NamedTuple):
    """The finite grey values of a picture, series or volume: what becomes black and white."""

    whole: Ends
    robust: Ends  # the percentiles `ROBUST`, or the whole range where these are equal

    @classmethod
    def of(cls, parts: list[Array], path: object) -> Range:
        """Over arrays of any shape; `InputError` where none holds a finite number."""
        extremes: list[float] = []
        sample = []
        for part in parts:
            flat = part.ravel(order="K")  # in the order of memory: no copy of a volume stored x first
            for start in range(0, flat.size, 2**24):
                piece = flat[start : start + 2**24]
                finite = piece[np.isfinite(piece)]
                extremes += [float(finite.min()), float(finite.max())] if finite.size else []
            sample.append(flat[:: max(flat.size * len(parts) // SAMPLED, 1)])
        if not extremes:
            raise InputError(f"{path}: no pixel holds a finite number")
        whole = min(extremes), max(extremes)
        values = np.concatenate(sample).astype(np.float64)
        values = values[np.isfinite(values)]
        low, high = map(float, np.percentile(values, ROBUST)) if values.size else whole
        return cls(whole, (low, high) if high > low else whole)

    def show(self, values: Array, window: str | None, of: str) -> tuple[Array, str]:
        """Values -> [0, 1] over the robust (`auto`) or the whole range, and that in words."""
        (low, high), words = (self.robust, "robust") if window == "auto" else (self.whole, "whole")
        return stretch(values, low, high), f"shown from {low:g} to {high:g}, the {words} range of {of}"


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
    count = 1 if header.get("NumberOfFrames") in (None, "") else int(header.NumberOfFrames)
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
        while piece := unpacker.unconsumed_tail or file.read(2**20):
            size += len(unpacker.decompress(piece, 2**24))
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
        is_plain = values.dtype == np.uint8 and bits == 8
        return to_rgb(values if is_plain else (values / (2.0**bits - 1)).clip(0, 1)), {}, ""
    rescaled, is_stored = _rescale(values, header, index)
    display = _frame_values(header, index, "FrameVOILUTSequence")
    center, width = _number(display.get("WindowCenter")), _number(display.get("WindowWidth"))
    window = None if center is None or width is None else (center, width)
    notes: Notes = {}
    series = ""
    if isinstance(options.window, tuple):
        gray = apply_window(rescaled, *options.window)
    elif options.window is None and window and window[1] > 0:
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
        gray, words = span.show(rescaled, options.window, of)
        if window is None:
            words = f"no window in the header: {words}"
        elif window[1] <= 0:
            words = f"the header's window is {window[1]:g} wide, which is ignored: {words}"
        notes["window"] = words
    return to_rgb(np.nan_to_num(1 - gray if photometric == "MONOCHROME1" else gray).clip(0, 1)), notes, series


def _pixels(header: Dataset, path: Path, index: int) -> Array:
    try:
        values: Array = _package("pydicom.pixels", path).pixel_array(header, index=index)
    except RuntimeError as error:
        if "missing dependencies" not in str(error):
            raise
        name = header.file_meta.TransferSyntaxUID.name
        decoders = "pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
        raise InputError(f"{path}: no decoder for {name}: pip install {decoders}") from error
    return values


def _number(value: Any) -> float | None:  # noqa: ANN401 - whatever an element holds
    """The first number of an element; None where it is absent, empty or not finite."""
    values = np.atleast_1d(np.asarray([] if value in (None, "") else value, dtype=object)).ravel()
    try:
        number = float(values[0])
    except (IndexError, TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


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
                uid = str(parse_dicom(file, path, header_only=True).get("SeriesInstanceUID") or "")
        except Exception:  # it is reported where it is read itself, and so below
            continue
        series.setdefault(uid, []).append(path)
    return series


_ranges: dict[tuple[Path, str], tuple[Range, str]] = {}


def _series_range(header: Dataset, path: Path, picture: Array) -> tuple[Range, str]:
    """The grey values of all pictures of this file's series in its folder, and how many these are in words."""
    count = int(header.get("NumberOfFrames") or 1)
    uid = str(header.get("SeriesInstanceUID") or "") if count == 1 else ""
    key = (path.parent, uid) if uid else (path, "")
    with _lock:
        if key not in _ranges:
            files = _series_in(path.parent).get(uid, []) if uid else []
            if len(files) > 1:
                parts = [part for file in files for part in _thinned(file)]
                _ranges[key] = Range.of(parts or [picture], path), f"its series ({len(files)} files)"
            elif count > 1:
                chosen = np.linspace(0, count - 1, min(count, SAMPLED_SLICES)).astype(int)
                parts = [_rescale(_pixels(header, path, int(i)), header, int(i))[0] for i in chosen]
                _ranges[key] = Range.of(parts, path), f"its {count} frames"
            else:
                return Range.of([picture], path), "this picture"
        return _ranges[key]


def _thinned(path: Path) -> list[Array]:
    """The rescaled pixels of a single-frame neighbour, thinned, and their extremes; nothing where it is damaged."""
    try:
        with path.open("rb") as file:
            header = parse_dicom(file, path)
        values = _rescale(_pixels(header, path, 0), header, 0)[0]
    except Exception:
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
    return shape[order.index(PLANES.index(plane))] * math.prod(shape[3:])


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _open_nifti(raw: BinaryIO, path: Path) -> tuple[BinaryIO, Any, Any, int]:
    """The unpacked file at its beginning, nibabel's class for it, its header, and how many bytes it must hold.

    `InputError` for what cannot be a volume.
    """
    nibabel = _package("nibabel", path)
    packed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    file: Any = gzip.GzipFile(fileobj=raw) if packed else raw
    head = file.read(1024)
    file.seek(0)
    is_second = 540 in (int.from_bytes(head[:4], order) for order in ("little", "big"))
    kind = nibabel.Nifti2Image if is_second else nibabel.Nifti1Image
    header = kind.header_class.from_fileobj(BytesIO(head))
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
    return file, kind, header, needed


def _cut_short(path: Path, needed: int, held: int) -> InputError:
    return InputError(f"{path}: its header claims {needed:,} bytes, but it holds {held:,}: cut short")


@lru_cache(maxsize=4096)
def _nifti_shape(path: Path, _state: tuple[int, int]) -> tuple[tuple[int, ...], list[int]]:
    """The shape on disk, and which of x, y, z each of its first three axes is; the file holds that many voxels."""
    with path.open("rb") as raw:
        file, _, header, needed = _open_nifti(raw, path)
        file.seek(needed - 1)  # unpacks, and keeps nothing
        if not file.read(1):
            raise _cut_short(path, needed, file.seek(0, os.SEEK_END))
    turn = _package("nibabel", path).io_orientation(header.get_best_affine())
    return tuple(header.get_data_shape()), [int(axis) for axis in turn[:, 0]]


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
    file, kind, _, needed = _open_nifti(BytesIO(data), path)
    if isinstance(file, gzip.GzipFile):
        data = file.read(needed)  # not more, whatever else it unpacks to
    if len(data) < needed:
        raise _cut_short(path, needed, len(data))
    nibabel = _package("nibabel", path)
    image = nibabel.as_closest_canonical(nibabel.squeeze_image(kind.from_bytes(data)))
    values = image.get_fdata(dtype=np.float32, caching="unchanged")
    zooms = tuple(float(zoom) for zoom in image.header.get_zooms()[:3])
    return Volume(digest, values[..., None] if values.ndim == 3 else values, zooms, Range.of([values], path))


def read_nifti(volume: Volume, index: int, options: ReadOptions) -> tuple[Image.Image, Notes]:
    """A slice with square pixels; without a window the volume's lowest value is black, its highest white."""
    values, spacing = volume.plane(index, options.plane)
    notes: Notes = {}
    if isinstance(options.window, tuple):
        gray = apply_window(values, *options.window)
    else:
        gray, notes["window"] = volume.span.show(values, options.window, "the volume")
    if _ratio(spacing) > 3:
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
    sides = zip(image.size, reversed(spacing), strict=True)
    width, height = (min(max(round(side * step / min(spacing)), 1), MAX_SIDE) for side, step in sides)
    return image.resize((width, height), how)
