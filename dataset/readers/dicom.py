"""DICOM: how many frames a file holds, a frame as an 8-bit picture, and what the header says of it. Needs pydicom."""

from __future__ import annotations

import math
import zlib
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from utils import InputError

from . import reading
from .grey import Array, Ends, Range, apply_window, stretch, to_rgb
from .reading import OPPOSITE, PLANES, Decoded, NoImageError, ReadOptions, Slice, decoded, optional

if TYPE_CHECKING:
    from pydicom import Dataset

NO_PICTURE = ("RTDOSE", "RTSTRUCT", "RTPLAN", "RTRECORD", "SEG", "SR", "PR", "KO", "REG", "ECG", "HD", "DOC")
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio")  # each: of rows, of columns
SAMPLED_FRAMES = 64  # of a file, for its range
_lock = RLock()  # threads ask for frames of the same series: its range is measured once


def parse(file: BinaryIO, path: Path, header_only: bool = False) -> Dataset:
    """The data set in an open file; `NoImageError` where it holds no picture."""
    reader = optional("pydicom.filereader", path)
    is_whole = reader.read_preamble(file, force=True) is not None  # some archives write files without a preamble
    syntax = reader._read_file_meta_info(file).get("TransferSyntaxUID")
    if syntax is not None and syntax.is_deflated:  # which `dcmread` unpacks whole, however large
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        size = 0
        while piece := unpacker.unconsumed_tail or file.read(2**20):
            size += len(unpacker.decompress(piece, 2**24))
            if size > reading.MAX_BYTES:
                raise InputError(f"{path}: unpacks to more than {reading.MAX_BYTES:,} bytes")
    file.seek(0)
    header: Dataset = reader.dcmread(file, force=True, stop_before_pixels=header_only)
    kind = header.get("SOPClassUID")
    if not is_whole and kind is None:
        raise InputError(f"{path}: no DICOM file, or damaged: it has neither the mark DICM nor a SOPClassUID")
    modality = str(header.get("Modality") or "")
    if modality in NO_PICTURE or "Rows" not in header or "Columns" not in header:
        raise NoImageError(f"{path}: no image ({getattr(kind, 'name', '') or modality or 'a DICOM object'})")
    if syntax is None:  # as a file without a preamble: pydicom has found out how it is written
        uid, (implicit, little) = optional("pydicom.uid", path), header.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        header.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    return header


def read_header(path: Path) -> Dataset:
    """All but the pixels; errors are those of `parse`."""
    with path.open("rb") as file:
        return parse(file, path, header_only=True)


def count(path: Path) -> int:
    """How many frames a file holds.

    Raises:
        NoImageError: it holds no picture.
        InputError: it claims more frames than its bytes can hold, or cannot be read.
    """
    header = read_header(path)
    claimed = 1 if header.get("NumberOfFrames") in (None, "") else int(header.NumberOfFrames)
    if claimed == 1:
        return 1
    size = path.stat().st_size
    pixel_bytes = header.Rows * header.Columns * header.get("SamplesPerPixel", 1) * header.BitsAllocated / 8
    syntax = header.file_meta.TransferSyntaxUID
    held = size // 8 if syntax.is_compressed else int(size // max(pixel_bytes, 1))  # a fragment's own header: 8 bytes
    if syntax.is_deflated:
        held = claimed  # `parse` has unpacked it; a frame that is missing shows when it is read
    elif syntax.is_compressed and 1 <= claimed <= held:
        with path.open("rb") as file:
            held = optional("pydicom.encaps", path).parse_fragments(parse(file, path).PixelData)[0]
    if not 1 <= claimed <= held:
        raise InputError(f"{path}: NumberOfFrames is {claimed}, but the file holds at most {held}")
    return claimed


def read(data: bytes, path: Path, index: int, options: ReadOptions) -> Decoded:
    """A frame, rescaled and windowed by `options`, else by the header's first window or LUT, else over the series."""
    header = parse(BytesIO(data), path)
    values = _pixels(header, path, index)
    measures = frame_values(header, index, "PixelMeasuresSequence")
    given = (numbers(measures.get(name)) for name in SPACINGS)
    down, across = next((pair for pair in given if len(pair) == 2), [1.0, 1.0])
    words = series = ""
    if header.PhotometricInterpretation == "PALETTE COLOR":
        values = optional("pydicom.pixels", path).apply_color_lut(values, header)
    elif values.ndim == 2:
        values, words, series = _grey(values, header, path, index, options.window)
    elif values.dtype != np.uint8 or int(header.BitsStored) != 8:
        values = (values / (2.0 ** int(header.BitsStored) - 1)).clip(0, 1)
    return decoded(to_rgb(values), (down, across), words, "DICOM", series)


def _grey(values: Array, header: Dataset, path: Path, index: int, window: Ends | str | None) -> tuple[Array, str, str]:
    """Stored values (H, W) -> grey in [0, 1], its range in words, and the range if other files of the series set it."""
    rescaled, is_stored = _rescale(values, header, index)
    display = frame_values(header, index, "FrameVOILUTSequence")
    center, width = (numbers(display.get(name)) for name in ("WindowCenter", "WindowWidth"))
    words, series, bits = "", "", int(header.BitsStored)
    if isinstance(window, tuple):
        grey = apply_window(rescaled, *window)
    elif window is None and center and width and width[0] > 0:
        grey = apply_window(rescaled, center[0], width[0], display.get("VOILUTFunction") or "LINEAR")
    elif window is None and display.get("VOILUTSequence"):
        looked_up = optional("pydicom.pixels", path).apply_voi_lut(rescaled, display)
        grey = looked_up / (2.0 ** display.VOILUTSequence[0].LUTDescriptor[2] - 1)
    elif window is None and bits <= 8 and is_stored:
        least = -(2 ** (bits - 1)) if header.get("PixelRepresentation") else 0
        grey = stretch(values, least, least + 2**bits - 1)
    else:
        span, shaped_by_others = _range(header, path, rescaled)
        grey, words = span.show(rescaled, window)
        series = str(span) if shaped_by_others else ""
        if not (center and width):
            words = f"no window in the header: {words}"
        elif width[0] <= 0:
            words = f"the header's window is {width[0]:g} wide, which is ignored: {words}"
    inverted = header.PhotometricInterpretation == "MONOCHROME1"
    return np.nan_to_num(1 - grey if inverted else grey).clip(0, 1), words, series


def _pixels(header: Dataset, path: Path, index: int) -> Array:
    try:
        values: Array = optional("pydicom.pixels", path).pixel_array(header, index=index)
    except RuntimeError as error:
        name, decoders = header.file_meta.TransferSyntaxUID.name, "pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
        if "missing dependencies" in str(error):
            raise InputError(f"{path}: no decoder for {name}: pip install {decoders}") from error
        reason = str(error).rpartition(": ")[2]
        words = f"{name} cannot be decoded ({reason}); other decoders: pip install {decoders}"
        raise InputError(f"{path}: {words}") from error
    return values


def _rescale(values: Array, header: Dataset, index: int) -> tuple[Array, bool]:
    """Stored values in the modality's units, and whether these are the stored values themselves."""
    group = frame_values(header, index, "PixelValueTransformationSequence")
    if group.get("ModalityLUTSequence"):
        return optional("pydicom.pixels", "DICOM").apply_modality_lut(values, group), False
    slope, intercept = numbers(group.get("RescaleSlope")), numbers(group.get("RescaleIntercept"))
    line = (slope or [1.0])[0], (intercept or [0.0])[0]
    return (values, True) if line == (1.0, 0.0) else (values * line[0] + line[1], False)


def numbers(value: Any) -> list[float]:  # noqa: ANN401 - whatever an element holds
    """The numbers of an element; none where it is absent or empty, or where one is not finite."""
    try:
        result = [float(part) for part in np.atleast_1d(np.asarray([] if value in (None, "") else value, dtype=object))]
    except (TypeError, ValueError):
        return []
    return result if all(map(math.isfinite, result)) else []


def frame_values(header: Dataset, index: int, sequence: str) -> Dataset:
    """Where a frame's values stand: in enhanced files its own or the shared functional group, else the file itself."""
    per_frame, shared = (header.get(f"{name}FunctionalGroupsSequence") or [] for name in ("PerFrame", "Shared"))
    for group in (*per_frame[index : index + 1], *shared):
        if group.get(sequence):
            values: Dataset = group[sequence][0]
            return values
    return header


# --- the range of a series ---


@lru_cache(maxsize=64)
def _series_in(folder: Path) -> dict[str, list[Path]]:
    """The series in a folder: SeriesInstanceUID -> files."""
    series: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        try:
            uid = str(read_header(path).get("SeriesInstanceUID") or "")
        except Exception:  # it is reported where it is read itself, and so below
            continue
        series.setdefault(uid, []).append(path)
    return series


_ranges: dict[tuple[Path, str], tuple[Range, bool]] = {}


def _range(header: Dataset, path: Path, picture: Array) -> tuple[Range, bool]:
    """The grey values of all pictures of this file's series in its folder; whether other files have a part in it."""
    frames = int(header.get("NumberOfFrames") or 1)
    uid = str(header.get("SeriesInstanceUID") or "") if frames == 1 else ""
    key = (path.parent, uid) if uid else (path, "")
    with _lock:
        if key not in _ranges:
            files = _series_in(path.parent).get(uid, []) if uid else []
            if len(files) > 1:
                parts = [part for file in files for part in _thinned(file)] or [picture]
                _ranges[key] = Range.measure(parts, f"its series ({len(files)} files)", path), True
            elif frames > 1:
                chosen = np.linspace(0, frames - 1, min(frames, SAMPLED_FRAMES)).astype(int).tolist()
                parts = [_rescale(_pixels(header, path, i), header, i)[0] for i in chosen]
                _ranges[key] = Range.measure(parts, f"its {frames} frames", path), False
            else:
                return Range.measure([picture], "this picture", path), False
        return _ranges[key]


def _thinned(path: Path) -> list[Array]:
    """The rescaled pixels of a single-frame neighbour, thinned, and their extremes; nothing where it is damaged."""
    try:
        with path.open("rb") as file:
            header = parse(file, path)
        values = _rescale(_pixels(header, path, 0), header, 0)[0]
    except Exception:
        return []
    extremes = np.array([values.min(), values.max()], dtype=values.dtype)
    return [extremes, values.ravel()[:: max(values.size // 4096, 1)]] if values.ndim == 2 else []


# --- what the header says ---


def describe(path: Path, frames: int) -> list[Slice]:
    """What a file of that many frames says of each."""
    header = read_header(path)
    return [_slice(header, index, frames) for index in range(frames)]


def _slice(header: Dataset, index: int, frames: int) -> Slice:
    holder = frame_values(header, index, "PlanePositionSequence")
    is_frames_own = frames == 1 or holder is not header  # one position for many frames is not a frame's
    place = numbers(holder.get("ImagePositionPatient")) if is_frames_own else []
    directions = np.array(
        numbers(frame_values(header, index, "PlaneOrientationSequence").get("ImageOrientationPatient"))
    )
    number = numbers(header.get("InstanceNumber")) if frames == 1 else [index + 1]
    plane, edges, position, normal = "", "", None, np.empty(0)
    if directions.size == 6:
        across, down = directions[:3], directions[3:]
        normal = np.cross(across, down)
        plane = PLANES[int(np.abs(normal).argmax())]
        right, bottom = _side(across), _side(down)
        edges = OPPOSITE[right] + right + OPPOSITE[bottom] + bottom
        position = round(float(np.dot(place, normal)), 3) if len(place) == 3 else None
    return Slice(
        patient_id=str(header.get("PatientID") or ""),
        study_uid=str(header.get("StudyInstanceUID") or ""),
        series_uid=str(header.get("SeriesInstanceUID") or ""),
        instance_number=int(number[0]) if number else None,
        position=position,
        plane=plane,
        normal=tuple(normal.tolist()),
        edges=edges,
    )


def _side(direction: Array) -> str:
    """The patient's side to which a direction mostly points."""
    axis = int(np.abs(direction).argmax())
    side = "LPS"[axis]  # where DICOM's coordinates grow
    return side if direction[axis] > 0 else OPPOSITE[side]
