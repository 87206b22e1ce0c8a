"""One interface to the readers of all formats, and Pillow's reader: PNG, JPEG, BMP, TIFF, WebP, GIF, JPEG 2000.

Every picture becomes 8-bit RGB at its own size. Three rules hold for all formats:

    orientation   tags (EXIF, TIFF) are ignored in images and masks, as the published program does for PNG and JPEG
    grey levels   8 bits are kept; 16 bits are divided by 257 (Pillow would saturate to white). Whole values up to 255
                  in wider files are read as 8 bits, as in the published program, unless other files of the data set
                  have higher values (`ReadOptions.deep`)
    identity      the hash is of what was decoded, the file's bytes or a scan's pixels: the file is read once
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from utils import InputError, blame, sha256_file

from . import grey
from .grey import AS_STORED, Array, Frame, MaskFile, Notes, Picture, Range, ReadOptions, Size, Slice, Window
from .volumes import Dicom, Nifti, Volume

if TYPE_CHECKING:
    from torch import Tensor

READER = 3  # version, increased when the same file gives different pixels, so that stored tokens are computed again
# Formats that Pillow may try, whatever a file's name. Not EPS, which would start Ghostscript. JPEG includes MPO.
PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000")
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"GIF8", b"\0\0\0\x0cjP  ")
MAX_PIXELS = 89_478_485  # 9,459 x 9,459, above which Pillow warns; several pictures are decoded at a time
DARK = 8192  # of 65535: a 16-bit picture with only lower values is almost black
ORIENTATION, PHOTOMETRIC = 0x0112, 0x0106  # tags
SIXTEEN = re.compile(r"\b(RGBA?|LA);16([BLN])")  # Pillow's raw modes of 16-bit colours, with byte order
LOW_BYTES = {"B": "L", "L": "B", "N": "B"}  # the byte order with which Pillow keeps the low byte instead of the high
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `_opened` refuses such pictures
for _package in ("PIL", "pydicom"):  # about damaged tags; if these matter, an error follows
    warnings.filterwarnings("ignore", category=UserWarning, module=_package)


@dataclass(frozen=True)
class Sample(Frame):
    """An image file of a data set, or one image in it: the file itself, or a frame or slice."""

    label: int  # 1 = abnormal; -1 = not known yet, in a list to be filled in
    masks: tuple[Path, ...]  # of an abnormal image, if the data set has masks; several are united
    name: str  # in reports and JSON files: the path below the data set's folder, with `#INDEX` for a frame or slice
    patient: str | None = None  # None if unknown
    index: int | None = field(default=None, kw_only=True)
    options: ReadOptions = field(default=AS_STORED, compare=False, kw_only=True)
    published: bool = field(default=False, compare=False)  # of the paper's own data: masks are read as published
    kind: str = field(default="", compare=False)  # of abnormality, such as malignant, if the list or folders name it
    split: str = field(default="", compare=False)  # valid or test
    divided: bool = field(default=False, compare=False)  # both splits share its folder
    folder: str = field(default="", compare=False)  # the class's folder, relative to the data set's
    listed: str = field(default="", compare=False)  # name in few-shot lists
    shot: bool = field(default=False, compare=False)  # the list of images marks it as a shot
    view: int = field(default=0, kw_only=True)  # of the 16 of a shot, see dataset/views.py; 0 is the image itself
    jitter: tuple[float, float] | None = field(default=None, kw_only=True)  # random numbers of the colour-jitter view

    def content_hash(self) -> str:
        """The hash that `load_image_with_hash` returns, of the file as it is now."""
        if file_kind(self.path) != "pillow":
            return read(self).sha256
        with blame(self.path):
            return _content_hash(sha256_file(self.path), self)


class Pictures:
    """The reader of Pillow's formats; `Volume` has the same methods for scans."""

    def describe(self, path: Path, _plane: str) -> Sequence[Slice]:
        """An empty `Slice` (no metadata is used) for each image in the file, except previews embedded in a JPEG."""
        count = 1
        if path.suffix.lower() not in (".jpg", ".jpeg", ".jfif", ".bmp"):
            with _opened(Frame(path)) as image:
                count = getattr(image, "n_frames", 1)
        return [Slice()] * count

    def sizes(self, frame: Frame) -> set[Size]:
        """The sizes that an image's mask may have: only the image's, read from its header."""
        with _opened(frame) as image:
            return {image.size}

    def read(self, frame: Frame) -> Picture:
        """Read an image; 8-bit values stay as they are, wider ones are converted by the options."""
        with blame(frame.path):
            data = frame.path.read_bytes()
        picture, values, is_inverted = _decode(data, frame)
        image, notes = pillow_to_rgb(picture.image, frame, values, partial(_pages, data, frame.path), is_inverted)
        digest = _content_hash(hashlib.sha256(data).hexdigest(), frame)
        return replace(picture, image=image, notes=notes, sha256=digest)

    def read_mask(self, path: Path, of: Frame, count: int) -> MaskFile:
        """Read a mask's grey levels: the luminance of colours, or the alpha channel if only that varies.

        Raises `InputError` if the number of pictures in the mask's file is not `count`, that of its image's file.
        """
        pages = len(self.describe(path, ""))
        if pages != count:
            raise InputError(f"{path}: {pages} pictures, but its image's file has {count}")
        frame = Frame(path, of.index if pages > 1 else None)
        with blame(path):
            data = path.read_bytes()
        picture, values, _ = _decode(data, frame)
        stored, notes = picture.image, Notes()
        if picture.orientation != 1:
            notes["orientation"] = f"orientation {picture.orientation}"
        if values is not None:
            own, remarks = _own_window(values, frame)
            greys = np.asarray(grey.to_rgb(own(values)).convert("L"))
            return MaskFile(greys, values if values.ndim == 2 else greys, False, notes | remarks)
        greys = np.asarray(stored.convert("L"))
        if stored.has_transparency_data:
            alpha = np.asarray(stored.convert("RGBA").getchannel("A"))
            if np.ptp(greys) == 0 < np.ptp(alpha):
                return MaskFile(alpha, alpha, False, notes | {"alpha": "the mask lies in the alpha channel"})
        if stored.mode != "P":
            return MaskFile(greys, greys, False, notes)
        levels = np.asarray(stored)
        colours = np.asarray(stored.getpalette() or []).reshape(-1, 3)[np.unique(levels)]
        return MaskFile(greys, levels, bool((colours != colours[:, :1]).any()), notes)


Reader = Pictures | type[Volume]
READERS: dict[str, Reader] = {"pillow": Pictures(), "dicom": Dicom, "nifti": Nifti}
ENDINGS = {
    "pillow": (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jp2"),
    "dicom": (".dcm", ".dicom"),
    "nifti": (".nii", ".nii.gz"),
}
EXTENSIONS = tuple(ending for endings in ENDINGS.values() for ending in endings)


def read(source: Frame | str | Path) -> Picture:
    """Read a picture of any format.

    Raises:
        MissingPackageError: DICOM without pydicom, NIfTI without nibabel.
        NoImageError: a DICOM object without a picture.
        InputError: a file that is unreadable, cut short or too large, or has several pictures but no index is given.
    """
    frame = source if isinstance(source, Frame) else Frame(Path(source))
    reader = reader_of(frame.path)
    count = 1 if frame.index is not None else len(reader.describe(frame.path, frame.options.plane))
    if count > 1:
        raise InputError(f"{frame.path}: holds {count} pictures; say which one is meant, or save it as its own file")
    return reader.read(frame)


def _content_hash(file_sha256: str, frame: Frame) -> str:
    """The hash of a picture: that of its file, combined with index and options if these are not the defaults."""
    words = f"{'' if frame.index is None else frame.index} {frame.options.key()}".strip()
    return hashlib.sha256(f"{file_sha256} {words}".encode()).hexdigest() if words else file_sha256


def load_image(source: Frame | str | Path, size: int) -> Tensor:
    """Read a picture, resized bicubically (antialiased): (3, size, size) float32 in [0, 1]; raises as `read` does."""
    return to_tensor(read(source).image, size)


def load_image_with_hash(sample: Sample, size: int) -> tuple[str, Tensor]:
    """The SHA-256 (hexadecimal) of what was decoded, see `Picture`, and the result of `load_image`."""
    picture = read(sample)
    return picture.sha256, to_tensor(picture.image, size)


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """An RGB image resized as `load_image` does: (3, size, size) float32 in [0, 1]."""
    import torch  # noqa: PLC0415 (takes half a second, which `--help` avoids)

    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def frames(path: Path, options: ReadOptions = AS_STORED) -> list[Frame]:
    """The images in a file: DICOM frames, TIFF pages, slices of a NIfTI volume; the index of a single image is None.

    Raises:
        MissingPackageError: DICOM without pydicom, NIfTI without nibabel.
        NoImageError: a DICOM object without a picture.
        InputError: the header cannot be read, or claims more than the file holds.
    """
    says = reader_of(path).describe(path, options.plane)
    return [Frame(path, i if len(says) > 1 else None, options, slice=slice_) for i, slice_ in enumerate(says)]


def is_deep(paths: Sequence[Path]) -> bool:
    """Whether any picture has values above 255, so that a dark one among them must not be read as 8 bits.

    Of a long list, about 64 evenly spaced headers are read, and pixels only if a header says more than 8 bits.
    """
    for path in paths[:: max(len(paths) // 64, 1)]:
        if path.suffix.lower() in (".png", ".tif", ".tiff", ".jp2"):
            with suppress(InputError):  # reported when it is read as a sample
                with _opened(Frame(path)) as image:
                    is_wide = _is_wide(image)
                values = _decode(path.read_bytes(), Frame(path))[1] if is_wide else None
                if values is not None and values.max() > 255:
                    return True
    return False


def reader_of(path: Path) -> Reader:
    """The reader of a file; raises `InputError` unless `path` is a file in a supported format."""
    grey.check_file(path)
    kind = file_kind(path)
    if kind is None:
        raise InputError(f"{path}: not one of the formats that are read ({', '.join(EXTENSIONS)})")
    return READERS[kind]


def file_kind(path: Path) -> str | None:
    """`pillow`, `nifti`, `dicom` or None, by extension, else by the first bytes (pictures only without extension)."""
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
    """Yield the files to read, each with its path below the input that it came from.

    Folders are walked in sorted order; hidden files and unsupported formats are skipped. Inputs that are not folders
    are passed on unchecked, and so are folders that cannot be read, which `check_file` refuses.
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
    """Whether a folder is a link to a folder above it."""
    return folder.is_symlink() and folder.resolve() in (parent := folder.parent.resolve(), *parent.parents)


def parse_window(words: Sequence[str]) -> Window:
    """Parse the words of `--window`: centre and width, `auto`, `full` or nothing (None); else raises `InputError`."""
    if not words:
        return None
    if len(words) == 1 and words[0] in ("auto", "full"):
        return words[0]
    with suppress(ValueError):
        center, width = map(float, words)
        if math.isfinite(center) and 0 < width < math.inf:
            return center, width
    raise InputError(f"--window {' '.join(words)}: give two finite numbers, CENTER and a WIDTH above 0; auto; or full")


# --- Pillow's formats ---


@contextmanager
def _opened(frame: Frame, data: bytes | None = None) -> Iterator[ImageFile]:
    """Open a picture without decoding it, from a file or from its content `data`; its size is the stored one.

    Raises `InputError` if it is not a picture, is damaged or has too many pixels.
    """
    grey.check_file(frame.path)
    try:
        with (
            blame(f"{frame}: not a readable image, or cut short", errors=grey.DAMAGE),
            Image.open(frame.path if data is None else BytesIO(data), formats=PILLOW_FORMATS) as image,
        ):
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.seek(frame.index or 0)
            if isinstance(image, TiffImageFile):  # Pillow swaps the sides if the orientation is a quarter turn
                image._size = image.tag_v2[256], image.tag_v2[257]
            yield image
    except Image.DecompressionBombError as error:
        raise InputError(f"{frame}: more than {MAX_PIXELS:,} pixels; scale it down or cut it into tiles") from error


def _is_wide(image: ImageFile) -> bool:
    """Whether a picture that is not loaded yet has more than 8 bits per channel."""
    return image.mode == "F" or image.mode.startswith("I") or bool(SIXTEEN.search(str(image.tile[:1])))


def _decode(data: bytes, frame: Frame) -> tuple[Picture, Array | None, bool]:
    """The picture in its own mode, its values if they are wider than 8 bits (else None), and whether 0 is white."""
    with _opened(frame, data) as image:
        mode, is_wide, halved = image.mode, _is_wide(image), SIXTEEN.search(str(image.tile[:1]))
        is_inverted = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == 0
        orientation = _load(image)
    values = np.asarray(image) if is_wide else None
    if halved:  # Pillow keeps only the high bytes of 16-bit colours: read the low bytes, too
        layout, order = halved.groups()
        with _opened(frame, data) as other:
            raw = f"{layout};16{LOW_BYTES[order]}"
            if layout == "LA":  # both bytes of both channels as four channels
                raw = other._mode = "RGBA"
            other.tile = [t._replace(args=(raw, *t[3][1:]) if isinstance(t[3], tuple) else raw) for t in other.tile]
            _load(other)
        low, high = (np.asarray(part).astype(np.uint16) for part in (other, image))
        values = low[..., 0] * 256 + low[..., 1] if layout == "LA" else (high * 256 + low)[..., :3]
    return Picture(image, "", mode, image.size, orientation), values, is_inverted


def _load(image: ImageFile) -> int:
    """Decode a picture as it is stored, and return its orientation, by which Pillow would rotate a TIFF."""
    if not isinstance(image, TiffImageFile):
        image.load()  # first, as a PNG may store the orientation after the pixels
    orientation = image.getexif().pop(ORIENTATION, 1)
    image.load()
    return int(orientation)


@lru_cache(maxsize=2)
def _pages(data: bytes, path: Path) -> Range:
    """The range of grey values over all pages of a file."""
    with _opened(Frame(path), data) as image:
        count = getattr(image, "n_frames", 1)
    pages = [_decode(data, Frame(path, page))[1] for page in range(count)]
    return Range.measure([values for values in pages if values is not None], "the file", path)


def _own_window(values: Array, frame: Frame) -> tuple[Callable[[Array], Array], Notes]:
    """The default window for wide values, the range of 8 or 16 bits, with notes; raises `InputError` if none fits."""
    low, high = values.min(), values.max()
    is_float = values.dtype.kind == "f"  # may mean [0, 1], which the published program would read as black
    is_whole = not is_float or bool(high > 1 and (values == values.round()).all())
    if low >= 0 and high <= 255 and is_whole and not frame.options.deep:
        words = f"8-bit values in a {8 * values.dtype.itemsize}-bit file (largest {high:g}): read as 8 bits"
        return partial(grey.stretch, low=0, high=255), {"wide": words}
    if is_float or not 0 <= low <= high <= 65535:
        raise InputError(f"{frame.path}: 32-bit pixels have no known range; save with 8 or 16 bits, or give --window")
    notes, high = {}, int(high)
    if high < DARK:
        used = f"range used: {max(100 * high / 65535, 1):.0f}%, the largest value is {high} of 65535"
        kind = f"a {high.bit_length()}-bit picture in a 16-bit file"
        notes["dark"] = f"{kind} ({used}): almost black; give --window"
    return partial(grey.stretch, low=0, high=65535), notes


def pillow_to_rgb(
    image: Image.Image,
    frame: Frame,
    values: Array | None = None,
    measure: Callable[[], Range] | None = None,
    is_inverted: bool = False,
) -> tuple[Image.Image, Notes]:
    """Convert a Pillow image to 8-bit RGB by a frame's options, with notes; `values` wider than 8 bits replace it."""
    if values is None and (image.mode == "F" or image.mode.startswith("I")):
        values = np.asarray(image)
    if values is None:
        return image.convert("RGB"), {}
    own, notes = (None, Notes()) if frame.options.window else _own_window(values, frame)
    measure = measure or partial(Range.measure, [values], "the image", frame.path)
    shown, remarks = grey.show(values, frame.options.window, own, measure, is_inverted)
    return shown, remarks | notes


def picture_notes(image: Image.Image) -> Notes:
    """A note on an unusual 8-bit picture: `binary` (only black and white), nearly `constant`, or largely `clipped`."""
    counts = np.asarray(image.convert("L").histogram())
    if np.flatnonzero(counts).tolist() == [0, 255]:
        return {"binary": "all pixels are black or white"}
    total = counts.sum()
    low, high = np.searchsorted(counts.cumsum(), [0.01 * total, 0.99 * total])
    if high - low < 8:
        return {"constant": f"nearly constant: 98% of the pixels lie between {low} and {high} of 255"}
    for level, word in ((255, "white"), (0, "black")):
        if counts[level] > 0.75 * total:
            return {"clipped": f"{counts[level] / total:.0%} of the pixels are {word}: does the window fit?"}
    return {}
