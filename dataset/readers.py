"""Reading images for prediction: PNG, JPEG, BMP, TIFF, 16-bit gray, DICOM and NIfTI; every frame or slice is an image.

Whatever the format, an image becomes 8-bit RGB at its own size, which is what training reads. DICOM needs pydicom and
NIfTI nibabel; neither is needed for the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from utils import InputError

from .layout import EXTENSIONS
from .medical_few import decode, read_picture, to_mode

if TYPE_CHECKING:
    from pydicom import Dataset

DICOM_EXTENSIONS = (".dcm", ".dicom")
NIFTI_EXTENSIONS = (".nii", ".nii.gz")
PAGED = (".tif", ".tiff")
FORMATS = (*EXTENSIONS, *DICOM_EXTENSIONS, *NIFTI_EXTENSIONS)
PLANES = ("sagittal", "coronal", "axial")  # which of the axes x, y, z is cut
_volume_lock = Lock()


class MissingPackageError(InputError):
    """A format needs a package that is not installed: nothing that skipping a file would help."""


@dataclass(frozen=True)
class ReadOptions:
    """How files with more than 8 bits or more than one slice become images."""

    window: tuple[float, float] | None = None  # centre and width: centre - width/2 is black, centre + width/2 white
    plane: str = "axial"  # of NIfTI volumes


@dataclass(frozen=True)
class Frame:
    """One image: a file, or a frame, page or slice of it (counted from 0)."""

    path: Path
    index: int | None = None
    options: ReadOptions = ReadOptions()

    def __str__(self) -> str:
        return str(self.path) if self.index is None else f"{self.path}, frame {self.index}"

    def read(self) -> Image.Image:
        """The image, RGB at its own size; `InputError` naming the file where it cannot be read."""
        try:
            _check_file(self.path)
            kind = file_kind(self.path)
            if kind == "dicom":
                return _read_dicom(self.path, self.index or 0, self.options.window)
            if kind == "nifti":
                return _read_nifti(self.path, self.index or 0, self.options)
            return _read_pillow(self.path, self.index or 0, self.options.window)
        except Exception as error:  # whatever a damaged file provokes in three parsers
            raise _input_error(self, error) from error


def frames(path: Path, options: ReadOptions | None = None) -> list[Frame]:
    """The images in a file, from its header alone.

    DICOM frames, TIFF pages, and slices of a NIfTI volume along `options.plane`; a file of one image has index None.

    Raises:
        MissingPackageError: DICOM without pydicom, NIfTI without nibabel.
        InputError: the header cannot be read.
    """
    options = options or ReadOptions()
    try:
        count = _count(path, options.plane)
    except Exception as error:
        raise _input_error(path, error) from error
    return [Frame(path, None, options)] if count == 1 else [Frame(path, i, options) for i in range(count)]


def list_files(inputs: Iterable[Path], skip: Path | None = None) -> Iterator[tuple[Path, str]]:
    """Files to read, each with its path below the input that it came from.

    Folders are walked in sorted order; hidden files, formats that are not read, and what lies in `skip` (results of
    an earlier run) are left out. Other inputs are passed on as they are.
    """
    skip = skip.resolve() if skip else None
    for given in inputs:
        if not given.is_dir():
            yield given, given.name
            continue
        for folder, subfolders, names in os.walk(given):
            here = Path(folder)
            subfolders[:] = sorted(
                name for name in subfolders if not name.startswith(".") and (here / name).resolve() != skip
            )
            for name in sorted(names):
                if not name.startswith(".") and name != "DICOMDIR" and file_kind(here / name):
                    yield here / name, (here / name).relative_to(given).as_posix()


def file_kind(path: Path) -> str | None:
    """`pillow`, `nifti`, `dicom` (by its magic too, as PACS exports have no endings), or None."""
    name = path.name.lower()
    if name.endswith(EXTENSIONS):
        return "pillow"
    if name.endswith(NIFTI_EXTENSIONS):
        return "nifti"
    if name.endswith(DICOM_EXTENSIONS):
        return "dicom"
    try:
        if not path.is_file():  # reading a pipe or a device may never end
            return None
        with path.open("rb") as file:
            return "dicom" if file.read(132)[128:] == b"DICM" else None
    except OSError:
        return None


def to_rgb(values: np.ndarray) -> Image.Image:
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


def pillow_to_rgb(image: Image.Image, window: tuple[float, float] | None = None, path: object = "image") -> Image.Image:
    """A Pillow image as 8-bit RGB, as training reads it; `window` maps gray of more than 8 bits instead."""
    if window and (image.mode == "F" or image.mode.startswith("I")):
        return to_rgb(apply_window(np.asarray(image), *window))
    return to_mode(image, "RGB", path)


def apply_window(values: np.ndarray, center: float, width: float, function: str = "LINEAR_EXACT") -> np.ndarray:
    """Gray values of any shape -> [0, 1], by DICOM's functions (PS3.3, C.11.2.1): LINEAR, LINEAR_EXACT, SIGMOID."""
    values = values.astype(np.float64)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    if function == "LINEAR":
        center, width = center - 0.5, max(width - 1, 1e-6)
    return ((values - center) / width + 0.5).clip(0, 1)


def stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Gray values -> [0, 1], `low` to `high`; 0 where a value is NaN or there is no range."""
    if not high > low:
        return np.zeros(values.shape)
    return np.nan_to_num((values.astype(np.float64) - low) / (high - low)).clip(0, 1)


def _input_error(what: object, error: Exception) -> InputError:
    """One line for whatever reading raised."""
    if isinstance(error, InputError):
        return error
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{what}: cannot be read as an image ({reason[:200]})")


def _count(path: Path, plane: str) -> int:
    _check_file(path)
    kind = file_kind(path)
    if kind == "dicom":
        return int(_dicom_header(path).get("NumberOfFrames") or 1)
    if kind == "nifti":
        return _canonical(path).shape[PLANES.index(plane)]
    if path.name.lower().endswith(PAGED):
        return read_picture(path, lambda image: image.n_frames)
    return 1


def _check_file(path: Path) -> None:
    """`InputError` unless `path` is a file in a format that is read."""
    if not path.is_file():  # a pipe may never end
        raise InputError(f"{path}: {'a folder, a pipe or a device, no image' if path.exists() else 'not found'}")
    if file_kind(path) is None:
        raise InputError(f"{path}: not one of the formats that are read ({', '.join(FORMATS)})")


def _read_pillow(path: Path, index: int, window: tuple[float, float] | None) -> Image.Image:
    if not window and not path.name.lower().endswith(PAGED):
        return decode(path)

    def use(image: Image.Image) -> Image.Image:
        if index:
            image.seek(index)
        return pillow_to_rgb(image, window, path)

    return read_picture(path, use)


def _dicom_header(path: Path) -> Dataset:
    try:
        from pydicom import dcmread  # noqa: PLC0415 (optional)
    except ImportError as error:
        raise MissingPackageError(f"{path}: DICOM needs pydicom: pip install 'pydicom>=3'") from error
    return dcmread(path, stop_before_pixels=True)


def _read_dicom(path: Path, index: int, window: tuple[float, float] | None) -> Image.Image:
    """Rescaled, then windowed by `window`, the header's first window or LUT, else from its lowest to highest value."""
    header = _dicom_header(path)
    from pydicom import dcmread  # noqa: PLC0415 (optional)
    from pydicom.pixels import (  # noqa: PLC0415 (optional)
        apply_color_lut,
        apply_modality_lut,
        apply_voi_lut,
        pixel_array,
    )

    syntax = header.file_meta.TransferSyntaxUID
    try:
        values = pixel_array(dcmread(path) if syntax.is_deflated else path, index=index)
    except RuntimeError as error:
        if "missing dependencies" not in str(error):
            raise
        decoders = "pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
        raise InputError(f"{path}: no decoder for {syntax.name}: pip install {decoders}") from error
    photometric, bits = header.PhotometricInterpretation, header.BitsStored
    if photometric == "PALETTE COLOR":
        return to_rgb(apply_color_lut(values, header))
    if values.ndim == 3:
        return to_rgb(values if bits == 8 else values / (2.0**bits - 1))

    rescale = _frame_values(header, index, "PixelValueTransformationSequence")
    display = _frame_values(header, index, "FrameVOILUTSequence")
    rescaled = apply_modality_lut(values, rescale)
    if window:
        gray = apply_window(rescaled, *window)
    elif "WindowCenter" in display and "WindowWidth" in display:
        center, width = (np.atleast_1d(display[name].value)[0] for name in ("WindowCenter", "WindowWidth"))
        gray = apply_window(rescaled, float(center), float(width), display.get("VOILUTFunction") or "LINEAR")
    elif "VOILUTSequence" in display:
        gray = apply_voi_lut(rescaled, display) / (2.0 ** display.VOILUTSequence[0].LUTDescriptor[2] - 1)
    elif bits <= 8:
        gray = stretch(values, 0, 2**bits - 1)
    else:
        gray = stretch(rescaled, rescaled.min(), rescaled.max())
    return to_rgb(1 - gray if photometric == "MONOCHROME1" else gray)


def _frame_values(header: Dataset, index: int, sequence: str) -> Dataset:
    """Where a frame's values stand: in enhanced files its own or the shared functional group, else the file itself."""
    per_frame, shared = (header.get(f"{name}FunctionalGroupsSequence") or [] for name in ("PerFrame", "Shared"))
    for group in (*per_frame[index : index + 1], *shared):
        if group.get(sequence):
            return group[sequence][0]
    return header


def _canonical(path: Path):  # noqa: ANN202 (a nibabel image, which may not be installed)
    """The volume with its axes turned to x right, y anterior, z superior; no pixels are read."""
    try:
        import nibabel  # noqa: PLC0415 (optional)
    except ImportError as error:
        raise MissingPackageError(f"{path}: NIfTI needs nibabel: pip install nibabel") from error
    image = nibabel.squeeze_image(nibabel.load(path))
    if image.ndim != 3:
        raise InputError(f"{path}: {image.ndim} axes of {image.shape}; split it into volumes of 3")
    return nibabel.as_closest_canonical(image)


@lru_cache(maxsize=2)  # one that is being scored, one whose pictures are being written
def _volume(path: Path) -> tuple[np.ndarray, float, float]:
    """Voxels (X, Y, Z) and the range of the finite ones."""
    image = _canonical(path)
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(f"{path}: voxels of type {image.get_data_dtype()}: expected numbers")
    values = image.get_fdata(dtype=np.float32)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise InputError(f"{path}: no voxel holds a finite number")
    return values, float(finite.min()), float(finite.max())


def _read_nifti(path: Path, index: int, options: ReadOptions) -> Image.Image:
    """A slice as radiologists look at it: the patient's right on the left, anterior or superior at the top.

    Sagittal slices have anterior on the left. Without a window the volume's lowest value is black, its highest white.
    """
    with _volume_lock:  # threads ask for slices of the same file: it is read once
        volume, low, high = _volume(path)
    plane = volume.take(index, axis=PLANES.index(options.plane))[::-1, ::-1].T
    return to_rgb(np.nan_to_num(apply_window(plane, *options.window)) if options.window else stretch(plane, low, high))
