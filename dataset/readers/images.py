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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from utils import InputError, sha256_file

from . import dicom, nifti
from .grey import Ends, Range, apply_window, to_rgb
from .reading import AS_STORED, Decoded, Notes, ReadOptions, Slice, check_file, read_bytes

if TYPE_CHECKING:
    from torch import Tensor

ENDINGS = {
    "pillow": (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jp2"),
    "dicom": (".dcm", ".dicom"),
    "nifti": (".nii", ".nii.gz"),
}
EXTENSIONS = tuple(ending for endings in ENDINGS.values() for ending in endings)
# What Pillow may try, whatever a file is called: not EPS, for which it would start Ghostscript. JPEG includes MPO.
READER = 2  # raised when the same file gives other pixels, so that tokens kept by an older reader are computed anew
PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000")
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"GIF8", b"\0\0\0\x0cjP  ")
MAX_PIXELS = 89_478_485  # 9,459 x 9,459, where Pillow warns: several are decoded at a time
DARK = 8192  # of 65535: the largest value, below which a 16-bit picture is all but black
ORIENTATION = 0x0112
# What undoes the turn that Pillow makes of a TIFF's orientation.
INVERSE_ORIENTATION = dict(zip(range(2, 9), (
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_270,
), strict=True))  # fmt: skip
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `_opened` refuses such pictures
for _package in ("PIL", "pydicom"):  # remarks on damaged tags, of which an error follows where it matters
    warnings.filterwarnings("ignore", category=UserWarning, module=_package)


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
class Sample:
    """One image of a data set: a file, or a frame or slice of one."""

    path: Path
    label: int  # 1 = abnormal
    mask: Path | None  # of abnormal images, where the data set has masks
    name: str  # the path below the data set's folder, `#INDEX` behind it: what reports and JSON files call it
    patient: str | None = None  # as far as the name tells
    index: int | None = None  # the frame of a series or slice of a volume, counted from 0
    options: ReadOptions = field(default=AS_STORED, compare=False)
    published: bool = field(default=False, compare=False)  # of the paper's own data: masks are read as it read them
    more_masks: tuple[Path, ...] = ()  # united with `mask`

    def content_hash(self) -> str:
        """What `load_image_with_hash` gives for the file as it is now: a changed file is another image."""
        if file_kind(self.path) == "dicom" and not isinstance(self.options.window, tuple):
            return read(self).sha256  # other files of its series may have a part in it
        try:
            return _content_hash(sha256_file(self.path), as_frame(self))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from error


Source = Frame | Sample | str | Path


@dataclass(frozen=True)
class Picture:
    """A decoded image and what its file says of itself."""

    image: Image.Image  # RGB, 8 bits, at its own size, with square pixels
    sha256: str  # of the very bytes that were decoded, with frame, options and a series' range where they matter
    mode: str  # Pillow's, as stored: L, RGB, I;16, ...; or DICOM, NIfTI
    stored: tuple[int, int]  # width and height before the pixels were made square
    orientation: int  # 1 is upright; ignored
    notes: Notes  # `wide`, `dark`, `window`, `pixels` -> what is to be said


def read(source: Source) -> Picture:
    """Read a picture of any format.

    Raises:
        MissingPackageError: DICOM without pydicom, NIfTI without nibabel.
        NoImageError: a DICOM object without a picture.
        InputError: unreadable, cut short, too large, several pictures in a file that has no index.
    """
    frame = as_frame(source)
    with naming(frame):
        kind = kind_of(frame.path)
        if kind == "nifti":
            volume = nifti.read_volume(frame.path)
            digest, result = volume.sha256, nifti.read(volume, frame.index or 0, frame.options)
        else:
            data = read_bytes(frame.path)
            digest = hashlib.sha256(data).hexdigest()
            if kind == "dicom":
                result = dicom.read(data, frame.path, frame.index or 0, frame.options)
            else:
                result = _read_pillow(data, frame)
        digest = _content_hash(digest, frame)
        if result.series:  # other files have a part in the picture
            digest = hashlib.sha256(f"{digest} {result.series}".encode()).hexdigest()
        return Picture(result.image, digest, result.mode, result.stored, result.orientation, result.notes)


def as_frame(source: Source) -> Frame:
    """A path, a `Sample` or a `Frame` as a `Frame`."""
    if isinstance(source, Frame):
        return source
    return Frame(Path(source)) if isinstance(source, str | Path) else Frame(source.path, source.index, source.options)


def _content_hash(file_sha256: str, frame: Frame) -> str:
    """The hash of a picture: its file's, and where frame or options matter, of these as well."""
    words = f"{'' if frame.index is None else frame.index} {frame.options.key()}".strip()
    return hashlib.sha256(f"{file_sha256} {words}".encode()).hexdigest() if words else file_sha256


def load_image(source: Source, size: int) -> Tensor:
    """A picture resized bicubically (antialiased): (3, size, size) float32 in [0, 1]; errors are those of `read`."""
    return to_tensor(read(source).image, size)


def load_image_with_hash(source: Source, size: int) -> tuple[str, Tensor]:
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
    options, count = options or AS_STORED, 1
    with naming(path):
        kind = kind_of(path)
        if kind == "dicom":
            count = dicom.count(path)
        elif kind == "nifti":
            count = nifti.count(path, options.plane)
        elif path.suffix.lower() in (".tif", ".tiff"):
            with path.open("rb") as file, _opened(file, path) as image:
                count = getattr(image, "n_frames", 1)
    return [Frame(path, None, options)] if count == 1 else [Frame(path, i, options) for i in range(count)]


def describe(inside: Sequence[Frame]) -> list[Slice]:
    """What a file says of its images, all of which `inside` names; nothing where its header is odd."""
    path, kind = inside[0].path, file_kind(inside[0].path)
    try:
        if kind == "dicom":
            return dicom.describe(path, len(inside))
        if kind == "nifti":
            return nifti.describe(path, inside[0].options.plane)
    except (OSError, InputError, ValueError, TypeError, AttributeError):  # the reader says what is wrong
        pass
    return [Slice()] * len(inside)


def kind_of(path: Path) -> str:
    """`InputError` unless `path` is a file in a format that is read."""
    check_file(path)
    kind = file_kind(path)
    if kind is None:
        raise InputError(f"{path}: not one of the formats that are read ({', '.join(EXTENSIONS)})")
    return kind


def file_kind(path: Path) -> str | None:
    """`pillow`, `nifti`, `dicom`, or None, by the name; without an ending that is known by the first bytes."""
    for kind, endings in ENDINGS.items():
        if path.name.lower().endswith(endings):
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


def list_files(inputs: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Files to read, each with its path below the input that it came from.

    Folders are walked in sorted order; hidden files and formats that are not read are left out. Other inputs are passed
    on as they are, and so are folders that cannot be read, for `check_file` to refuse.
    """
    for given in inputs:
        if not given.is_dir():
            yield given, given.name
            continue
        unreadable: list[OSError] = []
        for folder, subfolders, names in os.walk(given, onerror=unreadable.append, followlinks=True):
            here = Path(folder)
            subfolders[:] = sorted(name for name in subfolders if name[0] != "." and not _is_loop(here / name))
            for name in sorted(names):
                if name[0] != "." and name != "DICOMDIR" and file_kind(here / name):
                    yield here / name, (here / name).relative_to(given).as_posix()
        for error in unreadable:
            yield Path(error.filename), Path(error.filename).relative_to(given).as_posix()


def _is_loop(folder: Path) -> bool:
    """Whether a folder is a link to one above it."""
    return folder.is_symlink() and folder.resolve() in (parent := folder.parent.resolve(), *parent.parents)


def parse_window(words: Sequence[str]) -> Ends | str | None:
    """`--window` from its words: centre and width, `auto` or `full`; None for none; `InputError` for anything else."""
    if not words:
        return None
    if len(words) == 1 and words[0] in ("auto", "full"):
        return words[0]
    try:
        center, width = map(float, words)
        if math.isfinite(center) and math.isfinite(width) and width > 0:
            return center, width
    except ValueError:
        pass
    raise InputError(f"--window {' '.join(words)}: give two finite numbers, CENTER and a WIDTH above 0; auto; or full")


# --- Pillow's formats ---


@contextmanager
def naming(what: object) -> Iterator[None]:
    """Whatever a damaged file provokes in three parsers becomes an `InputError` of one line that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"none of {', '.join(PILLOW_FORMATS)}"
        raise InputError(f"{what}: not a readable image, or cut short ({reason})") from error


@contextmanager
def _opened(file: IO[bytes], path: object) -> Iterator[Image.Image]:
    """The picture in a file; `InputError` where it has too many pixels."""
    try:
        with Image.open(file, formats=PILLOW_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: more than {MAX_PIXELS:,} pixels; scale it down or cut it into tiles") from error


def _as_stored(image: Image.Image, frame: Frame) -> tuple[Image.Image, int]:
    """The picture that is meant, loaded and as it is stored, and its orientation.

    A file with several pictures needs an index, as the first slice of a volume would be a guess; the previews that
    cameras add (MPO) are not meant by that.
    """
    if frame.index is not None:
        image.seek(frame.index)
    elif (count := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
        raise InputError(f"{frame.path}: holds {count} pictures; save the one that is meant as its own file")
    if not isinstance(image, TiffImageFile):
        image.load()  # before the orientation, which in a PNG may follow the pixels
        return image, image.getexif().get(ORIENTATION, 1)
    orientation = image.tag_v2.get(ORIENTATION, 1)
    image.load()  # a TIFF loses its orientation by that
    inverse = INVERSE_ORIENTATION.get(orientation)
    return (image if inverse is None else image.transpose(inverse)), orientation


def is_wide(image: Image.Image) -> bool:
    """Whether a picture has more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def as_stored(path: Path) -> tuple[Image.Image, int]:
    """The picture in a file of one of Pillow's formats, in its own mode, and its orientation."""
    with _opened(BytesIO(read_bytes(path)), path) as image:
        return _as_stored(image, Frame(path))


def _read_pillow(data: bytes, frame: Frame) -> Decoded:
    with _opened(BytesIO(data), frame) as opened:
        mode, window = opened.mode, frame.options.window
        stored, orientation = _as_stored(opened, frame)
        pages = _page_range(data) if isinstance(window, str) and is_wide(opened) else None
        image, notes = to_mode(stored, "RGB", frame, window, pages)
        return Decoded(image, notes, mode, image.size, orientation)


@lru_cache(maxsize=2)
def _page_range(data: bytes) -> Range:
    """The grey values of all pages of a file."""
    parts = []
    with _opened(BytesIO(data), "image") as image:
        for page in range(getattr(image, "n_frames", 1)):
            image.seek(page)
            parts.append(np.asarray(image))
    return Range.measure(parts, "the file", "image")


def to_mode(
    image: Image.Image, mode: str, path: object, window: Ends | str | None = None, span: Range | None = None
) -> tuple[Image.Image, Notes]:
    """A Pillow picture in 8 bits, `RGB` or `L`, and what is to be said of its grey levels; transparency is dropped.

    `window` as in `ReadOptions`, over `span`, or else this picture's own range; it concerns more than 8 bits alone.
    """
    if not is_wide(image):
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the same colours, without Pillow's advice on stderr to do so
        return image.convert(mode), {}
    values = np.asarray(image)
    if isinstance(window, tuple):
        return to_rgb(apply_window(values, *window)).convert(mode), {}
    if window is not None:
        grey, words = (span or Range.measure([values], "the file", path)).show(values, window)
        return to_rgb(grey).convert(mode), {"window": words}
    low, high = values.min(), values.max()
    # In floating point [0, 1] may be meant, and the published program would see black.
    if low >= 0 and high <= 255 and (image.mode != "F" or high > 1):
        bits = 16 if image.mode.startswith("I;16") else 32
        words = f"8-bit values in a {bits}-bit file (largest {high:g}): read as 8 bits"
        return Image.fromarray(values.astype(np.uint8)).convert(mode), {"wide": words}
    if image.mode == "F" or not 0 <= low <= high <= 65535:
        raise InputError(f"{path}: 32 bits a pixel have no known range; save it with 8 or 16 bits")
    eight = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert(mode)
    if high >= DARK:
        return eight, {}
    high = int(high)
    kind = f"a {high.bit_length()}-bit picture in a 16-bit file"
    used = f"range used: {max(100 * high / 65535, 1):.0f}%, the largest value is {high} of 65535"
    return eight, {"dark": f"{kind} ({used}): all but black; give --window"}


def pillow_to_rgb(image: Image.Image, window: Ends | str | None = None, path: object = "image") -> Image.Image:
    """A Pillow image as 8-bit RGB, as training reads it; `window` maps grey of more than 8 bits instead."""
    return to_mode(image, "RGB", path, window)[0]


def picture_notes(image: Image.Image) -> Notes:
    """What is odd about an 8-bit picture: `constant` (nearly one grey), `clipped` (most of it white or black)."""
    counts = np.asarray(image.convert("L").histogram())
    total = counts.sum()
    low, high = np.searchsorted(counts.cumsum(), [0.01 * total, 0.99 * total])
    if high - low < 8:
        return {"constant": f"nearly constant: 98% of the pixels lie between {low} and {high} of 255"}
    for level, word in ((255, "white"), (0, "black")):
        if counts[level] > 0.75 * total:
            return {"clipped": f"{counts[level] / total:.0%} of the pixels are {word}: does the window fit?"}
    return {}


def mask_sizes(source: Source) -> set[tuple[int, int]]:
    """Width and height that a picture's mask may have: the picture's, before or after its pixels were made square.

    Of Pillow's formats from the header alone; errors are those of `read`.
    """
    frame = as_frame(source)
    with naming(frame):
        if kind_of(frame.path) != "pillow":
            picture = read(frame)
            return {picture.image.size, picture.stored}
        with frame.path.open("rb") as file, _opened(file, frame) as image:
            return {(image.tag_v2[256], image.tag_v2[257]) if isinstance(image, TiffImageFile) else image.size}
