"""What the readers of all formats share: options, errors, files, and what they give back."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from utils import InputError

from .grey import Ends, is_stretched, square

Notes = dict[str, str]  # a kind of remark -> what is to be said of this picture
PLANES = ("sagittal", "coronal", "axial")  # which of the axes x, y, z is cut
OPPOSITE = dict(zip("LRPASI", "RLAPIS", strict=True))  # the patient's sides
MAX_BYTES = 4 * 2**30  # of a file, and of what it unpacks to


class MissingPackageError(InputError):
    """A format needs a package that is not installed: nothing that skipping a file would help."""


class NoImageError(InputError):
    """A DICOM object that is sound but holds no picture: a report, a plan, a dose, a waveform."""


@dataclass(frozen=True)
class ReadOptions:
    """How files with more than 8 bits or more than one slice become images.

    `window` is (centre, width): centre - width/2 is black, centre + width/2 white; `auto`: robust percentiles of the
    whole volume, series or file; `full`: its lowest to its highest value; None: the window in the file where there
    is one, else `full` (16-bit pictures: the range of 16 bits).
    """

    window: Ends | str | None = None
    plane: str = "axial"  # of NIfTI volumes
    mask_labels: tuple[int, ...] = field(default=(), compare=False)  # of masks: what is abnormal; none: the default

    def key(self) -> str:
        """What tells pictures apart that these options make of the same bytes; empty for the defaults."""
        return "" if self == type(self)() else f"window {self.window} plane {self.plane}"


AS_STORED = ReadOptions()  # the defaults


@dataclass(frozen=True)
class Slice:
    """What a file says of one of its images; pictures without a patient's coordinate system say nothing."""

    patient_id: str = ""
    study_uid: str = ""
    series_uid: str = ""
    instance_number: int | None = None
    position: float | None = None  # in millimetres along the slices' normal (NIfTI: the axis that is cut)
    plane: str = ""
    normal: tuple[float, ...] = ()  # of DICOM slices
    edges: str = ""  # the patient's sides at the left, right, top and bottom edge of the image, such as RLAP

    @property
    def orientation(self) -> str:
        """The edges in words."""
        names = ("left", "right", "top", "bottom")
        return ", ".join(f"{name} {side}" for name, side in zip(names, self.edges, strict=False))


class Decoded(NamedTuple):
    """What a reader makes of a frame."""

    image: Image.Image  # RGB, 8 bits, with square pixels
    notes: Notes
    mode: str  # Pillow's, as stored: L, RGB, I;16, ...; or DICOM, NIfTI
    stored: tuple[int, int]  # width and height before the pixels were made square
    orientation: int = 1  # 1 is upright; ignored
    series: str = ""  # the range of grey, where other files of the series shaped it


# --- files and packages ---


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
        reason = "a link to a file that is not there" if path.is_symlink() else "not found"
        raise InputError(f"{path}: {reason}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: a pipe, a socket or a device, no image")


def optional(name: str, path: object) -> Any:  # noqa: ANN401 - a module, which may not be installed
    """A module of pydicom or nibabel; `MissingPackageError` that names `path`."""
    package = name.split(".", maxsplit=1)[0]
    try:
        import_module(package)
        return import_module(name)
    except ImportError as error:
        kind, advice = ("DICOM", "'pydicom>=3'") if package == "pydicom" else ("NIfTI", package)
        raise MissingPackageError(f"{path}: {kind} needs {package}: pip install {advice}") from error


def decoded(image: Image.Image, spacing: Ends, window: str, mode: str, series: str = "") -> Decoded:
    """A slice with square pixels, and what is to be said of it; `window` as `Range.show` words it."""
    notes = {"window": window} if window else {}
    if is_stretched(spacing, 3):
        down, across = spacing
        times, sides = max(spacing) / min(spacing), "high as wide" if down > across else "wide as high"
        notes["pixels"] = f"pixels {times:.3g} times as {sides}, resampled to square ones"
    return Decoded(square(image, spacing), notes, mode, image.size, series=series)
