"""Shared by all formats: reading options, the types of what is read, and the conversion of grey levels to 8 bits."""

from __future__ import annotations

import math
import os
import stat
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from utils import EXPECTED, InputError, blame, warn

Array = np.ndarray
Ends = tuple[float, float]
Size = tuple[int, int]  # width and height
Notes = dict[str, str]  # kind of note -> note for the user on this picture
Window = Ends | str | None  # see `ReadOptions`
PLANES = ("sagittal", "coronal", "axial")  # perpendicular to the axes x, y, z
ROBUST = (0.5, 99.5)  # the percentiles of `--window auto`
SAMPLED = 2**20  # number of values from which percentiles are computed
MAX_SIDE = 16_384  # longest side of a resampled slice, in pixels
# What Pillow, pydicom and nibabel raise for damaged files, including what `utils.blame` expects.
DAMAGE = (*EXPECTED, AttributeError, RuntimeError, SyntaxError, TypeError, struct.error, zlib.error)


class MissingPackageError(InputError):
    """A format needs a package that is not installed; skipping the file would not help."""


class NoImageError(InputError):
    """A valid DICOM object without a picture: a report, a plan, a dose, a waveform."""


@dataclass(frozen=True)
class ReadOptions:
    """How files with more than 8 bits or more than one slice become images.

    `window` is (centre, width): centre - width/2 is black, centre + width/2 white; `auto`: robust percentiles of the
    whole volume, series or file; `full`: its lowest to its highest value; None: the window in the file if there is
    one, else `full` (16-bit pictures: the range of 16 bits).
    """

    window: Window = None
    plane: str = "axial"  # of NIfTI volumes
    mask_labels: tuple[int, ...] = field(default=(), compare=False)  # abnormal levels of masks; empty: the default
    deep: bool = False  # do not read values up to 255 as 8 bits, as other files have higher ones: see `is_deep`

    def key(self) -> str:
        """A text that tells apart pictures read from the same bytes with other options; empty for the defaults."""
        return "" if self == type(self)() else f"window {self.window} plane {self.plane}" + " deep" * self.deep


AS_STORED = ReadOptions()  # the defaults


@dataclass(frozen=True)
class Slice:
    """Metadata of one image in a file; empty for pictures without a patient coordinate system."""

    patient_id: str = ""
    study_uid: str = ""
    series_uid: str = ""
    instance_number: int | None = None
    position: float | None = None  # in millimetres along the slices' normal (NIfTI: along the sliced axis)
    plane: str = ""
    normal: tuple[float, ...] = ()  # of DICOM slices
    edges: str = ""  # the patient's sides at the left, right, top and bottom edge of the image, such as RLAP
    description: str = ""  # of the series
    localizer: bool = False  # an overview image for planning other slices

    @property
    def orientation(self) -> str:
        """The edges in words."""
        names = ("left", "right", "top", "bottom")
        return ", ".join(f"{name} {side}" for name, side in zip(names, self.edges, strict=False))


@dataclass(frozen=True)
class Frame:
    """One image: a file, or a frame, page or slice of it (counted from 0; in 4-D volumes, time point by time point)."""

    path: Path
    index: int | None = None
    options: ReadOptions = AS_STORED
    slice: Slice = field(default=Slice(), compare=False, kw_only=True)  # set by `images.frames`

    def __str__(self) -> str:
        return str(self.path) if self.index is None else f"{self.path}, frame {self.index}"


@dataclass(frozen=True)
class Picture:
    """An image that was read, with its metadata."""

    image: Image.Image  # 8-bit RGB at its own size, with square pixels
    sha256: str  # of the file's bytes, with index and options unless these are the defaults; of scans: of `image`
    mode: str  # Pillow's, as stored: L, RGB, I;16, ...; or DICOM, NIfTI
    stored: Size  # before the pixels were made square
    orientation: int = 1  # of the tag, 1 = upright; never applied
    notes: Notes = field(default_factory=dict)  # `wide`, `dark`, `window`, `pixels`, ... -> note for the user

    @property
    def is_blank(self) -> bool:
        """Whether all pixels have nearly the same colour, as at the ends of a volume."""
        extremes = np.asarray(self.image.getextrema())
        return bool((extremes[..., 1] - extremes[..., 0]).max() < 8)


class MaskFile(NamedTuple):
    """The content of a mask file; arrays are (H, W) at the mask's own size."""

    grey: Array  # uint8
    levels: Array  # what `mask_labels` refers to: grey levels, 16 bits as stored, palette indices or labels
    is_labelled: bool  # every level except 0 is abnormal, whatever its grey
    notes: Notes


# --- files ---


def check_file(path: Path) -> None:
    """Raise `InputError` unless `path` is an existing regular file: reading a pipe may never end."""
    with blame(f"{path}: cannot be read"):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            next(os.scandir(path), None)  # an unreadable folder raises an error of its own
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: a folder, a pipe, a socket or a device, no image")


def optional(name: str, path: object) -> Any:  # noqa: ANN401 - a module, which may not be installed
    """Import a module of pydicom or nibabel; raises `MissingPackageError`, which names `path`."""
    package = name.split(".", maxsplit=1)[0]
    try:
        return import_module(name)
    except ImportError as error:
        kind, advice = ("DICOM", "'pydicom>=3'") if package == "pydicom" else ("NIfTI", package)
        raise MissingPackageError(f"{path}: {kind} needs {package}: pip install {advice}") from error


@cache
def warn_once(text: str) -> None:
    """Print a warning on stderr, once per process."""
    warn(text)


# --- grey levels ---


def to_rgb(values: Array) -> Image.Image:
    """8-bit RGB from (H, W), (H, W, 1) or (H, W, 3), uint8, uint16 or float in [0, 1]; others raise `InputError`."""
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
        return np.nan_to_num(1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700))))
    if function == "LINEAR" and width >= 1:  # DICOM forbids less: treated as LINEAR_EXACT
        center, width = center - 0.5, max(width - 1, 1e-6)
    return np.nan_to_num(np.clip((values - center) / width + 0.5, 0, 1))


def stretch(values: Array, low: float, high: float) -> Array:
    """Map grey values from [`low`, `high`] to [0, 1], clipped; NaN becomes 0, and so does everything if low >= high."""
    if not high > low:
        return np.zeros(values.shape)
    return np.nan_to_num((values.astype(np.float64) - low) / (high - low)).clip(0, 1)


class Range(NamedTuple):
    """The range of finite grey values in a picture, series or volume, to be shown from black to white."""

    whole: Ends
    robust: Ends  # the percentiles `ROBUST`, or the whole range if these are equal
    of: str  # what was measured, in words

    @classmethod
    def measure(cls, parts: Sequence[Array], of: str, path: object) -> Range:
        """Measure arrays of any shape; raises `InputError` if none holds a finite number."""
        extremes: list[float] = []
        sample = []
        for part in parts:
            flat = part.ravel(order="K")  # in memory order: no copy of a volume stored x first
            finite = flat[np.isfinite(flat)]
            extremes += [float(finite.min()), float(finite.max())] if finite.size else []
            sample.append(flat[:: max(flat.size * len(parts) // SAMPLED, 1)])
        if not extremes:
            raise InputError(f"{path}: no pixel holds a finite number")
        whole = min(extremes), max(extremes)
        values = np.concatenate(sample).astype(np.float64)
        values = values[np.isfinite(values)]
        low, high = map(float, np.percentile(values, ROBUST)) if values.size else whole
        return cls(whole, (low, high) if high > low else whole, of)


def show(
    values: Array,
    window: Window,
    own: Callable[[Array], Array] | None,
    measure: Callable[[], Range],
    is_inverted: bool = False,
) -> tuple[Image.Image, Notes]:
    """Convert grey values, or colours of more than 8 bits, to 8-bit RGB, with notes; uint8 stays as it is.

    `window` is that of `ReadOptions`; `own` is the file's window, values -> [0, 1], if it has one; `measure` returns
    the range of the picture, series or volume to which the values belong. `is_inverted`: low values are white.
    """
    notes = Notes()
    if values.dtype == np.uint8:
        return to_rgb(values), notes
    if isinstance(window, tuple):
        grey = apply_window(values, *window)
    elif window is None and own is not None:
        grey = own(values)
    else:
        span = measure()
        (low, high), words = (span.robust, "robust") if window == "auto" else (span.whole, "whole")
        grey = stretch(values, low, high)
        notes["window"] = f"shown from {low:g} to {high:g}, the {words} range of {span.of}"
    return to_rgb(1 - grey if is_inverted else grey), notes


def is_stretched(spacing: Ends, ratio: float) -> bool:
    """Whether row and column spacing differ by more than the factor `ratio`; False if one is not a positive length."""
    return all(math.isfinite(step) and step > 0 for step in spacing) and max(spacing) > ratio * min(spacing)


def square(image: Image.Image, spacing: Ends, how: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """The image enlarged along its coarser axis until pixels are square; `spacing` is (row height, column width)."""
    if not is_stretched(spacing, 1.01):
        return image
    sides = zip(image.size, reversed(spacing), strict=True)
    width, height = (min(max(round(side * step / min(spacing)), 1), MAX_SIDE) for side, step in sides)
    return image.resize((width, height), how)
