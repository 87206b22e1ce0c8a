"""The one reader of pictures, for training and prediction: PNG, JPEG, BMP, TIFF, WebP, GIF, JPEG 2000, DICOM, NIfTI.

Whatever the format, a picture becomes 8-bit RGB at its own size. Three rules hold for all formats:

    orientation   tags (EXIF, TIFF) are ignored, in image and mask alike, as the published program does for PNG and JPEG
    grey levels   8 bits as they are; 16 bits divided by 257, where Pillow would saturate to white; but 8-bit values in
                  a wider file (largest at most 255) are taken as 8 bits, as the published program takes them
    identity      what is hashed is what was decoded: the file is read once
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from utils import InputError, warn

from .volumes import (
    AS_STORED,
    PLANES,
    MissingPackageError,
    NoImageError,
    Notes,
    Range,
    ReadOptions,
    apply_window,
    check_file,
    count_dicom,
    count_nifti,
    read_bytes,
    read_dicom,
    read_nifti,
    read_nifti_mask,
    read_volume,
    to_rgb,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ABNORMAL_ABOVE", "AS_STORED", "EXTENSIONS", "PLANES", "Frame", "MissingPackageError", "NoImageError",
    "Picture", "ReadOptions", "apply_window", "check_mask", "file_kind", "frames", "list_files", "load_grey_mask",
    "load_image", "load_image_with_hash", "load_mask", "parse_window", "picture_notes", "picture_size",
    "pillow_to_rgb", "read", "read_bytes", "read_mask", "to_rgb", "to_tensor",
]  # fmt: skip

PILLOW_EXTENSIONS = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jp2")
DICOM_EXTENSIONS = (".dcm", ".dicom")
NIFTI_EXTENSIONS = (".nii", ".nii.gz")
EXTENSIONS = (*PILLOW_EXTENSIONS, *DICOM_EXTENSIONS, *NIFTI_EXTENSIONS)
# What Pillow may try, whatever a file is called: not EPS, for which it would start Ghostscript. JPEG includes MPO.
PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000")
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"GIF8", b"\0\0\0\x0cjP  ")
PAGED = (".tif", ".tiff")
MAX_PIXELS = 89_478_485  # 9,459 x 9,459, where Pillow warns: several are decoded at a time
ABNORMAL_ABOVE = 127  # of 255, in a mask
FULL_MASK = 0.9  # the part of an image above which a mask is said
DARK = 8192  # of 65535: the largest value, below which a 16-bit picture is all but black
Result = TypeVar("Result")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `_open` refuses such pictures
for _package in ("PIL", "pydicom"):  # remarks on damaged tags, of which an error follows where it matters
    warnings.filterwarnings("ignore", category=UserWarning, module=_package)


class Source(Protocol):
    """An image on disk: a `Frame`, or a `Sample` of a data set."""

    @property
    def path(self) -> Path: ...
    @property
    def index(self) -> int | None: ...
    @property
    def options(self) -> ReadOptions: ...


class MaskedSource(Source, Protocol):
    """An image that may have a mask: a `Sample`."""

    @property
    def mask(self) -> Path | None: ...
    @property
    def any_mask_size(self) -> bool: ...


@dataclass(frozen=True)
class Frame:
    """One image: a file, or a frame, page or slice of it (counted from 0; of a 4-D volume time by time)."""

    path: Path
    index: int | None = None
    options: ReadOptions = AS_STORED

    def __str__(self) -> str:
        return str(self.path) if self.index is None else f"{self.path}, frame {self.index}"

    def read(self) -> Image.Image:
        """The image, RGB at its own size; `InputError` naming the file where it cannot be read."""
        return read(self).image


@dataclass(frozen=True)
class Picture:
    """A decoded image and what its file says of itself."""

    image: Image.Image  # RGB, 8 bits, at its own size
    sha256: str  # of the very bytes that were decoded, with frame, options and a series' range where they matter
    mode: str  # Pillow's, as stored: L, RGB, I;16, ...; or DICOM, NIfTI
    orientation: int = 1  # 1 is upright; ignored
    notes: Notes = field(default_factory=dict)  # `wide`, `dark`, `window`, `pixels` -> what is to be said


def read(source: Source | str | Path) -> Picture:
    """Read a picture of any format.

    Raises:
        MissingPackageError: DICOM without pydicom, NIfTI without nibabel.
        NoImageError: a DICOM object without a picture.
        InputError: unreadable, cut short, too large, several pictures in a file that has no index.
    """
    frame = as_frame(source)
    try:
        kind = _kind(frame.path)
        if kind == "nifti":
            volume = read_volume(frame.path)
            image, notes = read_nifti(volume, frame.index or 0, frame.options)
            return Picture(image, content_hash(volume.sha256, frame), "NIfTI", 1, notes)
        data = read_bytes(frame.path)
        digest = content_hash(hashlib.sha256(data).hexdigest(), frame)
        if kind == "dicom":
            image, notes, series = read_dicom(data, frame.path, frame.index or 0, frame.options)
            if series:  # other files have a part in the picture
                digest = hashlib.sha256(f"{digest} {series}".encode()).hexdigest()
            return Picture(image, digest, "DICOM", 1, notes)
        return _decode(data, frame, digest)
    except Exception as error:  # whatever a damaged file provokes in three parsers
        raise _input_error(frame, error) from error


def as_frame(source: Source | str | Path) -> Frame:
    """A path, a `Sample` or a `Frame` as a `Frame`."""
    if isinstance(source, Frame):
        return source
    return Frame(Path(source)) if isinstance(source, str | Path) else Frame(source.path, source.index, source.options)


def content_hash(file_sha256: str, source: Source) -> str:
    """The hash of a picture: its file's, and where frame or options matter, of these as well."""
    words = f"{'' if source.index is None else source.index} {source.options.key()}".strip()
    return hashlib.sha256(f"{file_sha256} {words}".encode()).hexdigest() if words else file_sha256


def load_image(source: Source | str | Path, size: int) -> Tensor:
    """A picture resized bicubically (antialiased): (3, size, size) float32 in [0, 1]; errors are those of `read`."""
    return to_tensor(read(source).image, size)


def load_image_with_hash(source: Source | str | Path, size: int) -> tuple[str, Tensor]:
    """`load_image`, after the SHA-256 of the very bytes that it was made from (hexadecimal)."""
    picture = read(source)
    return picture.sha256, to_tensor(picture.image, size)


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """An RGB image resized as `load_image` does: (3, size, size) float32 in [0, 1]."""
    import torch  # noqa: PLC0415 (half a second, which `--help` need not wait for)

    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def frames(path: Path, options: ReadOptions | None = None) -> list[Frame]:
    """The images in a file: DICOM frames, TIFF pages, slices of a NIfTI volume; a file of one image has index None.

    Raises:
        MissingPackageError: DICOM without pydicom, NIfTI without nibabel.
        NoImageError: a DICOM object without a picture.
        InputError: the header cannot be read, or claims more than the file holds.
    """
    options = options or AS_STORED
    try:
        count = _count(path, options.plane)
    except Exception as error:
        raise _input_error(path, error) from error
    return [Frame(path, None, options)] if count == 1 else [Frame(path, i, options) for i in range(count)]


def _count(path: Path, plane: str) -> int:
    kind = _kind(path)
    if kind == "dicom":
        return count_dicom(path)
    if kind == "nifti":
        return count_nifti(path, plane)
    if path.name.lower().endswith(PAGED):
        with path.open("rb") as file:
            return _open(file, path, lambda image: int(getattr(image, "n_frames", 1)))
    return 1


def _kind(path: Path) -> str:
    """`InputError` unless `path` is a file in a format that is read."""
    check_file(path)
    kind = file_kind(path)
    if kind is None:
        raise InputError(f"{path}: not one of the formats that are read ({', '.join(EXTENSIONS)})")
    return kind


def file_kind(path: Path) -> str | None:
    """`pillow`, `nifti`, `dicom`, or None, by the name; without an ending that is known by the first bytes."""
    name = path.name.lower()
    for kind, endings in (("pillow", PILLOW_EXTENSIONS), ("nifti", NIFTI_EXTENSIONS), ("dicom", DICOM_EXTENSIONS)):
        if name.endswith(endings):
            return kind
    try:
        if not path.is_file():  # reading a pipe or a device may never end
            return None
        with path.open("rb") as file:
            head = file.read(132)
    except OSError:
        return None
    if head[128:] == b"DICM":
        return "dicom"
    is_picture = head.startswith(MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
    return "pillow" if is_picture and not path.suffix else None


def stem(path: Path) -> str:
    """A file's name without the extension: `v` for v.nii.gz."""
    return path.name[:-7] if path.name.lower().endswith(".nii.gz") else path.stem


def list_files(inputs: Iterable[Path], skip: Path | None = None) -> Iterator[tuple[Path, str]]:
    """Files to read, each with its path below the input that it came from.

    Folders are walked in sorted order; hidden files, formats that are not read, and what lies in `skip` (results of an
    earlier run) are left out. Other inputs are passed on as they are, and so are folders that cannot be read, for
    `frames` to refuse.
    """
    skip = skip.resolve() if skip else None
    for given in inputs:
        if not given.is_dir():
            yield given, given.name
            continue
        unreadable: list[Path] = []
        walk = os.walk(given, onerror=lambda error, into=unreadable: into.append(Path(error.filename)))  # type: ignore[misc]
        for folder, subfolders, names in walk:
            here = Path(folder)
            subfolders[:] = sorted(
                name for name in subfolders if not name.startswith(".") and (here / name).resolve() != skip
            )
            for name in sorted(names):
                if not name.startswith(".") and name != "DICOMDIR" and file_kind(here / name):
                    yield here / name, (here / name).relative_to(given).as_posix()
        yield from ((path, path.relative_to(given).as_posix()) for path in unreadable)


def parse_window(words: Sequence[str]) -> tuple[float, float] | str | None:
    """`--window` from its words: centre and width, `auto` or `full`; None for none; `InputError` for anything else."""
    if not words:
        return None
    if len(words) == 1 and words[0] in ("auto", "full"):
        return words[0]
    try:
        center, width = map(float, words)
    except ValueError:
        center, width = math.nan, math.nan
    if not (math.isfinite(center) and math.isfinite(width) and width > 0):
        raise InputError(
            f"--window {' '.join(words)}: give two finite numbers, CENTER and a WIDTH above 0; auto; or full"
        )
    return center, width


# --- Pillow's formats ---


def _open(file: IO[bytes], path: object, use: Callable[[Image.Image], Result]) -> Result:
    """What `use` makes of the picture in a file; `InputError` naming `path` for whatever goes wrong."""
    try:
        with Image.open(file, formats=PILLOW_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"{path}: more than {MAX_PIXELS:,} pixels; scale it down or cut it into tiles")
            return use(image)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: more than {MAX_PIXELS:,} pixels; scale it down or cut it into tiles") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not a readable image, or cut short (none of {', '.join(PILLOW_FORMATS)})") from error
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: not a readable image, or cut short ({reason})") from error


def _decode(data: bytes, frame: Frame, digest: str) -> Picture:
    def use(image: Image.Image) -> Picture:
        mode = image.mode
        stored, orientation = _as_stored(image, frame)
        pages = _page_range(data, digest) if isinstance(frame.options.window, str) and _is_wide(image) else None
        rgb, notes = to_mode(stored, "RGB", frame, frame.options.window, pages)
        # EXIF last: in a PNG it may follow the pixels. A TIFF has lost its own by then.
        return Picture(rgb, digest, mode, orientation or image.getexif().get(0x0112, 1), notes)

    return _open(BytesIO(data), frame, use)


# What undoes the turn that Pillow makes of a TIFF's orientation.
UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip


def _as_stored(image: Image.Image, frame: Frame) -> tuple[Image.Image, int]:
    """The picture that is meant, loaded and as it is stored, and a TIFF's orientation (else 0).

    A file with several pictures needs an index, as the first slice of a volume would be a guess; the previews that
    cameras add (MPO) are not meant by that.
    """
    if frame.index is not None:
        image.seek(frame.index)
    elif (count := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
        raise InputError(f"{frame.path}: holds {count} pictures; save the one that is meant as its own file")
    if not isinstance(image, TiffImageFile):
        image.load()
        return image, 0
    orientation = image.tag_v2.get(0x0112, 1)
    image.load()
    return (image.transpose(UNDO[orientation]) if orientation in UNDO else image), orientation


def _is_wide(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


@lru_cache(maxsize=2)
def _page_range(data: bytes, _digest: str) -> Range:
    """The grey values of all pages of a file."""

    def use(image: Image.Image) -> Range:
        parts = []
        for page in range(getattr(image, "n_frames", 1)):
            image.seek(page)
            parts.append(np.asarray(image))
        return Range.of(parts, "image")

    return _open(BytesIO(data), "image", use)


def to_mode(
    image: Image.Image,
    mode: str,
    path: object,
    window: tuple[float, float] | str | None = None,
    span: Range | None = None,
) -> tuple[Image.Image, Notes]:
    """A Pillow picture in 8 bits, `RGB` or `L`, and what is to be said of its grey levels; transparency is dropped.

    `window` as in `ReadOptions`, over `span`, or else this picture's own range; it concerns more than 8 bits alone.
    """
    if not _is_wide(image):
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the same colours, without Pillow's advice on stderr to do so
        return image.convert(mode), {}
    values = np.asarray(image)
    if isinstance(window, tuple):
        return to_rgb(apply_window(values, *window)).convert(mode), {}
    if window is not None:
        span = span or Range.of([values], path)
        note = {"window": span.note(window == "auto", "the file")}
        return to_rgb(span.apply(values, window == "auto")).convert(mode), note
    low, high = values.min(), values.max()
    # In floating point [0, 1] may be meant, and the published program would see black.
    if low >= 0 and high <= 255 and (image.mode != "F" or high > 1):
        bits = 16 if image.mode.startswith("I;16") else 32
        return Image.fromarray(values.astype(np.uint8)).convert(mode), {
            "wide": f"8-bit values in a {bits}-bit file (largest {high:g}): read as 8 bits"
        }
    if image.mode == "F" or not 0 <= low <= high <= 65535:
        raise InputError(f"{path}: 32 bits a pixel have no known range; save it with 8 or 16 bits")
    notes = {}
    if high < DARK:
        notes["dark"] = f"16-bit picture whose largest value is {high} of 65535: all but black; give --window"
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert(mode), notes


def pillow_to_rgb(
    image: Image.Image, window: tuple[float, float] | str | None = None, path: object = "image"
) -> Image.Image:
    """A Pillow image as 8-bit RGB, as training reads it; `window` maps grey of more than 8 bits instead."""
    return to_mode(image, "RGB", path, window)[0]


def picture_notes(image: Image.Image) -> Notes:
    """What is odd about an 8-bit picture: `constant` (nearly one grey), `clipped` (most of it white or black)."""
    counts = np.asarray(image.convert("L").histogram())
    total = counts.sum()
    levels = np.searchsorted(counts.cumsum(), [0.01 * total, 0.99 * total])
    if levels[1] - levels[0] < 8:
        return {"constant": f"nearly constant: 98% of the pixels lie between {levels[0]} and {levels[1]} of 255"}
    for level, word in ((255, "white"), (0, "black")):
        if counts[level] > 0.75 * total:
            return {"clipped": f"{counts[level] / total:.0%} of the pixels are {word}: does the window fit?"}
    return {}


def picture_size(source: Source | str | Path) -> tuple[int, int]:
    """Width and height of a picture, of Pillow's formats from the header alone; errors are those of `read`."""
    frame = as_frame(source)
    try:
        if _kind(frame.path) != "pillow":
            return read(frame).image.size

        def use(image: Image.Image) -> tuple[int, int]:
            return (image.tag_v2[256], image.tag_v2[257]) if isinstance(image, TiffImageFile) else image.size

        with frame.path.open("rb") as file:
            return _open(file, frame, use)
    except Exception as error:
        raise _input_error(frame, error) from error


# --- masks ---


def read_mask(source: MaskedSource) -> tuple[Image.Image | None, Notes]:
    """A mask as 8-bit grey at its own size, None where there is none; and what is to be said of its file.

    Orientation is ignored as ever (note `orientation`). Colours become their luminance; where they are constant and the
    alpha channel is not, the mask is the alpha channel (note `alpha`). Of a NIfTI file the slice of the same number;
    every label but 0 is abnormal.
    """
    if source.mask is None:
        return None, {}
    frame = Frame(source.mask, None, source.options)
    try:
        kind = _kind(source.mask)
        if kind == "nifti":
            return read_nifti_mask(read_volume(source.mask), source.index or 0, source.options.plane), {}
        if kind == "dicom":
            return read(Frame(source.mask, source.index, source.options)).image.convert("L"), {}

        def use(image: Image.Image) -> tuple[Image.Image, Notes]:
            stored, orientation = _as_stored(image, frame)
            grey, notes = to_mode(stored, "L", source.mask)
            if (orientation := orientation or image.getexif().get(0x0112, 1)) != 1:
                notes["orientation"] = f"orientation {orientation}"
            if stored.has_transparency_data:
                alpha = stored.convert("RGBA").getchannel("A")
                colours, shades = grey.histogram(), alpha.histogram()
                if sum(map(bool, colours)) == 1 < sum(map(bool, shades)):
                    return alpha, {**notes, "alpha": "the mask lies in the alpha channel"}
            return grey, notes

        return _open(BytesIO(read_bytes(source.mask)), source.mask, use)
    except Exception as error:
        raise _input_error(source.mask, error) from error


def _fitting_mask(source: MaskedSource) -> Image.Image | None:
    """The mask, of its image's size; another size is refused, or said once where `any_mask_size`."""
    mask, _ = read_mask(source)
    if mask is None or mask.size == (size := picture_size(source)):
        return mask
    if not source.any_mask_size:
        raise InputError(f"{source.mask}: {mask.size} pixels, but its image has {size}")
    folder = source.mask.parent if source.mask else ""
    warn_once(f"{folder}: masks of another size than their images: resized, as the published loader does")
    return mask


@cache
def warn_once(text: str) -> None:
    """A warning on stderr, once a process."""
    warn(text)


def load_mask(source: MaskedSource, size: int, above: int = ABNORMAL_ABOVE) -> Tensor:
    """A mask resized by nearest neighbour: (size, size) bool, True where it is above `above` of 255.

    All False where there is no mask. `InputError` where it cannot be read or is of another size than its image.
    """
    return load_grey_mask(source, size)[0] > (above + 0.5) / 255


def load_grey_mask(source: MaskedSource, size: int) -> Tensor:
    """A mask's greys resized by nearest neighbour: (1, size, size) float32 in [0, 1], zeros where there is no mask.

    The published training augments these and thresholds afterwards: above 0.5 for 127, in general (above + 0.5) / 255.
    """
    import torch  # noqa: PLC0415 (half a second, which `--help` need not wait for)

    mask = _fitting_mask(source)
    if mask is None:
        return torch.zeros(1, size, size)
    return torch.from_numpy(np.array(mask.resize((size, size), Image.Resampling.NEAREST))).float()[None] / 255


def mask_notes(mask: Image.Image, above: int = ABNORMAL_ABOVE) -> Notes:
    """What is odd about a mask: `empty`, `labels` (marks something, but nothing above `above`), `full`, `grey`."""
    counts = np.asarray(mask.histogram())
    greys = np.flatnonzero(counts)
    share = counts[above + 1 :].sum() / max(counts.sum(), 1)
    if greys[-1] == 0:
        return {"empty": "empty"}
    if greys[-1] <= above:
        return {"labels": f"its largest value is {greys[-1]} of 255, and abnormal is above {above}: save 0 and 255"}
    if share > FULL_MASK:
        return {"full": f"{share:.0%} of the image is abnormal" + (" (a constant mask)" if len(greys) == 1 else "")}
    if not {0, 255}.issuperset(greys.tolist()):
        return {"grey": f"{len(greys)} greys"}
    return {}


def check_mask(source: MaskedSource, above: int = ABNORMAL_ABOVE) -> list[str]:
    """Warnings about a shot's mask: constant, or nearly all of the image.

    A test mask of labels counts as empty, as published, and `dataset.check` reports it.

    Raises:
        InputError: the mask marks something, but nothing as abnormal: labels 0 and 1 where 0 and 255 are meant.
    """
    mask, _ = read_mask(source)
    notes = {} if mask is None else mask_notes(mask, above)
    if "labels" in notes:
        raise InputError(f"{source.mask}: {notes['labels']}")
    return [f"{source.mask}: {notes[kind]}" for kind in ("empty", "full") if kind in notes]


def _input_error(what: object, error: Exception) -> InputError:
    """One line for whatever reading raised."""
    if isinstance(error, InputError):
        return error
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{what}: cannot be read as an image ({reason[:200]})")
