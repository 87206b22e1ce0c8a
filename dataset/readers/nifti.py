"""NIfTI: how many slices a file holds, a slice as an 8-bit picture or mask, and what the header says. Needs nibabel.

Whatever the order on disk, the axes are turned to x right, y anterior, z superior.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from threading import RLock
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from utils import InputError

from . import reading
from .grey import Array, Ends, Range, apply_window, square, to_rgb
from .reading import PLANES, Decoded, ReadOptions, Slice, decoded, optional, read_bytes

EDGES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
_lock = RLock()  # threads ask for slices of the same file: it is read once


@dataclass(frozen=True)
class Volume:
    """A file with its axes turned."""

    sha256: str  # of the file's bytes
    values: Array  # (X, Y, Z, T) float32
    zooms: tuple[float, ...]  # millimetres along x, y, z
    span: Range

    def plane(self, index: int, name: str) -> tuple[Array, Ends]:
        """A slice (rows, columns), see `slice_of`, and the millimetres of a row and of a column."""
        axis = PLANES.index(name)
        across, down = (self.zooms[i] for i in range(3) if i != axis)
        return slice_of(self.values, index, axis), (down, across)


def slice_of(values: Array, index: int, axis: int) -> Array:
    """A slice of (X, Y, Z, T) across `axis` as radiologists look at it: a view (rows, columns), not a copy.

    The patient's right is on the left, anterior or superior at the top; sagittal slices have anterior on the left.
    Slices are counted over all time points.
    """
    time, place = divmod(index, values.shape[axis])
    view: Array = np.moveaxis(values[..., time], axis, 0)[place][::-1, ::-1].T
    return view


def count(path: Path, plane: str) -> int:
    """How many slices a file holds along a plane, over all its time points; see `read_volume` for errors."""
    shape: tuple[int, ...] = header_of(path).get_data_shape()
    return shape[_axes(path).index(PLANES.index(plane))] * math.prod(shape[3:])


def header_of(path: Path) -> Any:  # noqa: ANN401 - nibabel has no types
    """The header, its shape without axes of 1 beyond the third; the file holds as many voxels as it claims."""
    return _header(path, _state(path))


def orientation_of(path: Path) -> Array:
    """Which of x, y, z each axis on disk is, and its direction: (3, 2), as `nibabel.orientations` has it."""
    turn: Array = optional("nibabel.orientations", path).io_orientation(header_of(path).get_best_affine())
    return turn


def _axes(path: Path) -> list[int]:
    return [int(axis) for axis in orientation_of(path)[:, 0]]


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _open(raw: BinaryIO, path: Path) -> tuple[BinaryIO, Any, Any, int]:
    """The unpacked file at its beginning, nibabel's class for it, its header, and how many bytes it must hold.

    `InputError` for what cannot be a volume.
    """
    nibabel = optional("nibabel", path)
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
    if needed > reading.MAX_BYTES:
        raise InputError(f"{path}: {shape} voxels are more than the {reading.MAX_BYTES:,} bytes that are read")
    header.set_data_shape(shape)
    return file, kind, header, needed


def _cut_short(path: Path, needed: int, held: int) -> InputError:
    return InputError(f"{path}: its header claims {needed:,} bytes, but it holds {held:,}: cut short")


@lru_cache(maxsize=4096)
def _header(path: Path, _state: tuple[int, int]) -> Any:  # noqa: ANN401
    with path.open("rb") as raw:
        file, _, header, needed = _open(raw, path)
        file.seek(needed - 1)  # unpacks, and keeps nothing
        if not file.read(1):
            raise _cut_short(path, needed, file.seek(0, os.SEEK_END))
    return header


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
    file, kind, _, needed = _open(BytesIO(data), path)
    if isinstance(file, gzip.GzipFile):
        data = file.read(needed)  # not more, whatever else it unpacks to
    if len(data) < needed:
        raise _cut_short(path, needed, len(data))
    nibabel = optional("nibabel", path)
    image = nibabel.as_closest_canonical(nibabel.squeeze_image(kind.from_bytes(data)))
    values = image.get_fdata(dtype=np.float32, caching="unchanged")
    zooms = tuple(float(zoom) for zoom in image.header.get_zooms()[:3])
    span = Range.measure([values], "the volume", path)
    return Volume(digest, values[..., None] if values.ndim == 3 else values, zooms, span)


def read(volume: Volume, index: int, options: ReadOptions) -> Decoded:
    """A slice with square pixels; without a window the volume's lowest value is black, its highest white."""
    values, spacing = volume.plane(index, options.plane)
    if isinstance(options.window, tuple):
        grey, words = apply_window(values, *options.window), ""
    else:
        grey, words = volume.span.show(values, options.window)
    return decoded(to_rgb(grey), spacing, words, "NIfTI")


def read_mask(volume: Volume, index: int, plane: str) -> Image.Image:
    """The slice's labels as a mask: 255 where a label is not 0 (NaN counts as 0), else 0; square pixels."""
    values, spacing = volume.plane(index, plane)
    return mask_of(np.nan_to_num(values) != 0, spacing)


def mask_of(marked: Array, spacing: Ends) -> Image.Image:
    """A mask (rows, columns) bool as 0 and 255, with square pixels."""
    return square(Image.fromarray(marked.astype(np.uint8) * 255), spacing, Image.Resampling.NEAREST)


def describe(path: Path, plane: str) -> list[Slice]:
    """What the header says of each slice along a plane."""
    header, turn, axis = header_of(path), orientation_of(path), PLANES.index(plane)
    shape = header.get_data_shape()
    turned = header.get_best_affine() @ optional("nibabel.orientations", path).inv_ornt_aff(turn, shape[:3])
    sides = np.empty(3, dtype=int)
    sides[_axes(path)] = shape[:3]
    known = int(header["qform_code"]) > 0 or int(header["sform_code"]) > 0  # else the axes' directions are a guess
    center = np.append((sides - 1) / 2, 1.0)
    slices = []
    for index in range(count(path, plane)):
        center[axis] = index % sides[axis]
        position = round(float((turned @ center)[axis]), 3)
        slices.append(Slice(position=position, plane=plane, edges=EDGES[plane] if known else ""))
    return slices
