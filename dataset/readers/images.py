"""Every format's reader by one protocol, and Pillow's: PNG, JPEG, BMP, TIFF, WebP, GIF, JPEG 2000.

Whatever the format, a picture becomes 8-bit RGB at its own size. Three rules hold for all formats:

    orientation   tags (EXIF, TIFF) are ignored, in image and mask alike, as the published program does for PNG and JPEG
    grey levels   8 bits as they are; 16 bits divided by 257, where Pillow would saturate to white; but whole values up
                  to 255 in a wider file are taken as 8 bits, as the published program takes them, unless other files
                  of the data set hold more (`ReadOptions.deep`)
    identity      what is hashed is what was decoded, the file's bytes or a scan's pixels: the file is read once
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

READER = 3  # raised when the same file gives other pixels, so that tokens kept by an older reader are computed anew
# What Pillow may try, whatever a file is called: not EPS, for which it would start Ghostscript. JPEG includes MPO.
PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000")
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"GIF8", b"\0\0\0\x0cjP  ")
MAX_PIXELS = 89_478_485  # 9,459 x 9,459, where Pillow warns: several are decoded at a time
DARK = 8192  # of 65535: the largest value, below which a 16-bit picture is all but black
ORIENTATION, PHOTOMETRIC = 0x0112, 0x0106  # tags
SIXTEEN = re.compile(r"\b(RGBA?|LA);16([BLN])")  # Pillow's names for 16-bit colours in a file, and their order of bytes
LOW_BYTES = {"B": "L", "L": "B", "N": "B"}  # the order by which Pillow keeps the other byte
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `_opened` refuses such pictures
for _package in ("PIL", "pydicom"):  # remarks on damaged tags, of which an error follows where it matters
    warnings.filterwarnings("ignore", category=UserWarning, module=_package)


@dataclass(frozen=True)
class Sample(Frame):
    """An image file of a data set, or one image of it: itself, or a frame or slice."""

    label: int  # 1 = abnormal; -1: not known yet, in a list that is to be filled in
    masks: tuple[Path, ...]  # of abnormal images, where the data set has masks; several are united
    name: str  # the path below the data set's folder, `#INDEX` behind it: what reports and JSON files call it
    patient: str | None = None  # as far as rule, header or name tells
    index: int | None = field(default=None, kw_only=True)
    options: ReadOptions = field(default=AS_STORED, compare=False, kw_only=True)
    published: bool = field(default=False, compare=False)  # of the paper's own data: masks are read as it read them
    kind: str = field(default="", compare=False)  # of abnormal images, where list or folders name kinds: malignant
    split: str = field(default="", compare=False)  # valid or test
    divided: bool = field(default=False, compare=False)  # its folder serves both splits
    folder: str = field(default="", compare=False)  # the class's, relative to the data set's: the file lies below
    listed: str = field(default="", compare=False)  # what few-shot lists call the file
    shot: bool = field(default=False, compare=False)  # the data set's own list says so
    view: int = field(default=0, kw_only=True)  # of the 16 of a shot, see dataset/views.py; 0 is the image itself
    jitter: tuple[float, float] | None = field(default=None, kw_only=True)  # the draws of the colour-jitter view

    def content_hash(self) -> str:
        """What `load_image_with_hash` gives for the file as it is now: a changed file is another image."""
        if file_kind(self.path) != "pillow":
            return read(self).sha256
        with blame(self.path):
            return _content_hash(sha256_file(self.path), self)


class Pictures:
    """The protocol of Pillow's formats; `Volume` has the same methods for scans."""

    def describe(self, path: Path, _plane: str) -> Sequence[Slice]:
        """What the file says of each of the images in it: nothing, but how many there are.

        The previews that cameras add to a JPEG are none.
        """
        count = 1
        if path.suffix.lower() not in (".jpg", ".jpeg", ".jfif", ".bmp"):
            with _opened(Frame(path)) as image:
                count = getattr(image, "n_frames", 1)
        return [Slice()] * count

    def sizes(self, frame: Frame) -> set[Size]:
        """Width and height that an image's mask may have: the image's, from its header."""
        with _opened(frame) as image:
            return {image.size}

    def read(self, frame: Frame) -> Picture:
        """An image: 8 bits as they are, wider ones by the options."""
        with blame(frame.path):
            data = frame.path.read_bytes()
        picture, values, is_inverted = _decode(data, frame)
        image, notes = pillow_to_rgb(picture.image, frame, values, partial(_pages, data, frame.path), is_inverted)
        digest = _content_hash(hashlib.sha256(data).hexdigest(), frame)
        return replace(picture, image=image, notes=notes, sha256=digest)

    def read_mask(self, path: Path, of: Frame, count: int) -> MaskFile:
        """A mask's greys: colours become their luminance, or the alpha channel where that alone holds a mask."""
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
        InputError: unreadable, cut short, too large, several pictures in a file where no index is given.
    """
    frame = source if isinstance(source, Frame) else Frame(Path(source))
    reader = reader_of(frame.path)
    count = 1 if frame.index is not None else len(reader.describe(frame.path, frame.options.plane))
    if count > 1:
        raise InputError(f"{frame.path}: holds {count} pictures; say which one is meant, or save it as its own file")
    return reader.read(frame)


def _content_hash(file_sha256: str, frame: Frame) -> str:
    """The hash of a picture: its file's, and where index or options matter, of these as well."""
    words = f"{'' if frame.index is None else frame.index} {frame.options.key()}".strip()
    return hashlib.sha256(f"{file_sha256} {words}".encode()).hexdigest() if words else file_sha256


def load_image(source: Frame | str | Path, size: int) -> Tensor:
    """A picture resized bicubically (antialiased): (3, size, size) float32 in [0, 1]; errors are those of `read`."""
    return to_tensor(read(source).image, size)


def load_image_with_hash(sample: Sample, size: int) -> tuple[str, Tensor]:
    """`load_image`, after the SHA-256 of the very bytes that it was made from (hexadecimal)."""
    picture = read(sample)
    return picture.sha256, to_tensor(picture.image, size)


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """An RGB image resized as `load_image` does: (3, size, size) float32 in [0, 1]."""
    import torch  # noqa: PLC0415 (half a second, which `--help` need not wait for)

    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def frames(path: Path, options: ReadOptions = AS_STORED) -> list[Frame]:
    """The images in a file: DICOM frames, TIFF pages, slices of a NIfTI volume; a file of one image has index None.

    Raises:
        MissingPackageError: DICOM without pydicom, NIfTI without nibabel.
        NoImageError: a DICOM object without a picture.
        InputError: the header cannot be read, or claims more than the file holds.
    """
    says = reader_of(path).describe(path, options.plane)
    return [Frame(path, i if len(says) > 1 else None, options, slice=slice_) for i, slice_ in enumerate(says)]


def is_deep(paths: Sequence[Path]) -> bool:
    """Whether pictures hold more than 8 bits, so that a dark one among them is not taken as 8 bits.

    Of a long list some 64 headers are read; only where one of these promises more than 8 bits, are pixels.
    """
    for path in paths[:: max(len(paths) // 64, 1)]:
        if path.suffix.lower() in (".png", ".tif", ".tiff", ".jp2"):
            with suppress(InputError):  # it is reported where it is read
                with _opened(Frame(path)) as image:
                    is_wide = _is_wide(image)
                values = _decode(path.read_bytes(), Frame(path))[1] if is_wide else None
                if values is not None and values.max() > 255:
                    return True
    return False


def reader_of(path: Path) -> Reader:
    """`InputError` unless `path` is a file in a format that is read."""
    grey.check_file(path)
    kind = file_kind(path)
    if kind is None:
        raise InputError(f"{path}: not one of the formats that are read ({', '.join(EXTENSIONS)})")
    return READERS[kind]


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


def parse_window(words: Sequence[str]) -> Window:
    """`--window` from its words: centre and width, `auto` or `full`; None for none; `InputError` for anything else."""
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
    """A picture, not decoded yet, from a file or its content; its size is that of what is stored.

    `InputError` where it is none, damaged, or has too many pixels.
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
            if isinstance(image, TiffImageFile):  # Pillow says the size after the turn that the orientation asks for
                image._size = image.tag_v2[256], image.tag_v2[257]
            yield image
    except Image.DecompressionBombError as error:
        raise InputError(f"{frame}: more than {MAX_PIXELS:,} pixels; scale it down or cut it into tiles") from error


def _is_wide(image: ImageFile) -> bool:
    """Whether a picture that is not loaded yet has more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I") or bool(SIXTEEN.search(str(image.tile[:1])))


def _decode(data: bytes, frame: Frame) -> tuple[Picture, Array | None, bool]:
    """The picture in its own mode, its values where they are wider than 8 bits, and whether 0 is white."""
    with _opened(frame, data) as image:
        mode, is_wide, halved = image.mode, _is_wide(image), SIXTEEN.search(str(image.tile[:1]))
        is_inverted = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == 0
        orientation = _load(image)
    values = np.asarray(image) if is_wide else None
    if halved:  # of 16-bit colours Pillow has kept the high bytes alone
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
    """Decode a picture as it is stored; its orientation, by which Pillow would turn a TIFF."""
    if not isinstance(image, TiffImageFile):
        image.load()  # in a PNG the orientation may follow the pixels
    orientation = image.getexif().pop(ORIENTATION, 1)
    image.load()
    return int(orientation)


@lru_cache(maxsize=2)
def _pages(data: bytes, path: Path) -> Range:
    """The grey values of all pages of a file."""
    with _opened(Frame(path), data) as image:
        count = getattr(image, "n_frames", 1)
    pages = [_decode(data, Frame(path, page))[1] for page in range(count)]
    return Range.measure([values for values in pages if values is not None], "the file", path)


def _own_window(values: Array, frame: Frame) -> tuple[Callable[[Array], Array], Notes]:
    """How values wider than 8 bits are shown without a window: all of 8 or of 16 bits; and what is to be said."""
    low, high = values.min(), values.max()
    is_float = values.dtype.kind == "f"  # in which [0, 1] may be meant, and the published program would see black
    is_whole = not is_float or bool(high > 1 and (values == values.round()).all())
    if low >= 0 and high <= 255 and is_whole and not frame.options.deep:
        words = f"8-bit values in a {8 * values.dtype.itemsize}-bit file (largest {high:g}): read as 8 bits"
        return partial(grey.stretch, low=0, high=255), {"wide": words}
    if is_float or not 0 <= low <= high <= 65535:
        raise InputError(f"{frame.path}: 32 bits a pixel have no known range; save it with 8 or 16, or give --window")
    notes, high = {}, int(high)
    if high < DARK:
        used = f"range used: {max(100 * high / 65535, 1):.0f}%, the largest value is {high} of 65535"
        kind = f"a {high.bit_length()}-bit picture in a 16-bit file"
        notes["dark"] = f"{kind} ({used}): all but black; give --window"
    return partial(grey.stretch, low=0, high=65535), notes


def pillow_to_rgb(
    image: Image.Image,
    frame: Frame,
    values: Array | None = None,
    measure: Callable[[], Range] | None = None,
    is_inverted: bool = False,
) -> tuple[Image.Image, Notes]:
    """A Pillow image as 8-bit RGB by a frame's options, and what is to be said; values wider than 8 bits count."""
    if values is None and (image.mode == "F" or image.mode.startswith("I")):
        values = np.asarray(image)
    if values is None:
        return image.convert("RGB"), {}
    own, notes = (None, Notes()) if frame.options.window else _own_window(values, frame)
    measure = measure or partial(Range.measure, [values], "the image", frame.path)
    shown, remarks = grey.show(values, frame.options.window, own, measure, is_inverted)
    return shown, remarks | notes


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
