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
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from utils import InputError, blame, sha256_file

from .grey import (
    AS_STORED,
    DAMAGE,
    Array,
    Ends,
    Frame,
    Notes,
    Picture,
    Range,
    ReadOptions,
    Size,
    Slice,
    Volume,
    check_file,
    read_bytes,
    stretch,
    to_rgb,
)
from .volumes import Scans, open_dicom, open_nifti

if TYPE_CHECKING:
    from torch import Tensor

READER = 3  # raised when the same file gives other pixels, so that tokens kept by an older reader are computed anew
# What Pillow may try, whatever a file is called: not EPS, for which it would start Ghostscript. JPEG includes MPO.
PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000")
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"GIF8", b"\0\0\0\x0cjP  ")
MAX_PIXELS = 89_478_485  # 9,459 x 9,459, where Pillow warns: several are decoded at a time
DARK = 8192  # of 65535: the largest value, below which a 16-bit picture is all but black
ORIENTATION, PHOTOMETRIC = 0x0112, 0x0106  # tags
# What undoes the turn that Pillow makes of a TIFF's orientation.
INVERSE_ORIENTATION = dict(zip(range(2, 9), (
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_270,
), strict=True))  # fmt: skip
SIXTEEN = re.compile(r"\b(RGBA?|LA);16([BLN])")  # Pillow's names for 16-bit colours in a file, and their order of bytes
LOW_BYTES = {"B": "L", "L": "B", "N": "B"}  # the order by which Pillow keeps the other byte
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `_opened` refuses such pictures
for _package in ("PIL", "pydicom"):  # remarks on damaged tags, of which an error follows where it matters
    warnings.filterwarnings("ignore", category=UserWarning, module=_package)


@dataclass(frozen=True)
class Sample:
    """One image of a data set: a file, or a frame or slice of one."""

    path: Path
    label: int  # 1 = abnormal
    masks: tuple[Path, ...]  # of abnormal images, where the data set has masks; several are united
    name: str  # the path below the data set's folder, `#INDEX` behind it: what reports and JSON files call it
    patient: str | None = None  # as far as the name tells
    index: int | None = None  # the frame of a series or slice of a volume, counted from 0
    options: ReadOptions = field(default=AS_STORED, compare=False)
    published: bool = field(default=False, compare=False)  # of the paper's own data: masks are read as it read them
    kind: str = field(default="", compare=False)  # of abnormal images, where list or folders name kinds: malignant

    def content_hash(self) -> str:
        """What `load_image_with_hash` gives for the file as it is now: a changed file is another image."""
        frame = as_frame(self)
        if file_kind(self.path) != "pillow":
            return read(frame).sha256
        with blame(self.path):
            return _content_hash(sha256_file(self.path), frame)


Source = Frame | Sample | str | Path


class Pictures:
    """The reader of Pillow's formats; `Scans` has the same methods for DICOM and NIfTI."""

    def describe(self, path: Path, _plane: str) -> Sequence[Slice]:
        """What the file says of each of the images in it: nothing, but how many there are.

        The previews that cameras add to a JPEG are none.
        """
        count = 1
        if path.suffix.lower() not in (".jpg", ".jpeg", ".jfif", ".bmp"):
            with path.open("rb") as file, _opened(file, path) as image:
                count = getattr(image, "n_frames", 1)
        return [Slice()] * count

    def sizes(self, frame: Frame) -> set[Size]:
        """Width and height that an image's mask may have: the image's, from its header."""
        with frame.path.open("rb") as file, _opened(file, frame) as image:
            return {(image.tag_v2[256], image.tag_v2[257]) if isinstance(image, TiffImageFile) else image.size}

    def read(self, frame: Frame) -> Picture:
        """An image: 8 bits as they are, wider ones by the options."""
        data, window = read_bytes(frame.path), frame.options.window
        picture, values, is_inverted = _decode(data, frame)
        picture = replace(picture, sha256=_content_hash(picture.sha256, frame))
        if values is None:
            return replace(picture, image=_narrow(picture.image, "RGB"))
        own, notes = (None, Notes()) if window else _own_window(values, frame)
        wide = Volume([values], [own], lambda _: _pages(data, frame.path), picture.mode, is_inverted=is_inverted)
        shown = wide.show(0, window)
        return replace(picture, image=shown.image, notes={**shown.notes, **notes})

    def read_mask(self, path: Path, of: Frame, count: int) -> Picture:
        """A mask's greys: colours become their luminance, or the alpha channel where that alone holds a mask."""
        pages = len(self.describe(path, ""))
        if pages != count:
            raise InputError(f"{path}: {pages} pictures, but its image's file has {count}")
        frame = Frame(path, of.index if pages > 1 else None)
        picture, values, _ = _decode(read_bytes(path), frame)
        stored, notes = picture.image, Notes()
        if picture.orientation != 1:
            notes["orientation"] = f"orientation {picture.orientation}"
        if values is not None:
            own, remarks = _own_window(values, frame)
            grey = to_rgb(own(values)).convert("L")
            return replace(picture, image=grey, levels=values, notes={**notes, **remarks})
        grey = _narrow(stored, "L")
        if stored.has_transparency_data:
            alpha = stored.convert("RGBA").getchannel("A")
            colours, shades = grey.getextrema(), alpha.getextrema()
            if colours[0] == colours[1] and shades[0] != shades[1]:
                return replace(picture, image=alpha, notes={**notes, "alpha": "the mask lies in the alpha channel"})
        levels = np.asarray(stored) if stored.mode == "P" else None
        is_labelled = levels is not None and _is_coloured(stored)
        return replace(picture, image=grey, levels=levels, is_labelled=is_labelled, notes=notes)


Reader = Pictures | Scans
READERS: dict[str, Reader] = {"pillow": Pictures(), "dicom": Scans(open_dicom), "nifti": Scans(open_nifti)}
ENDINGS = {
    "pillow": (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jp2"),
    "dicom": (".dcm", ".dicom"),
    "nifti": (".nii", ".nii.gz"),
}
EXTENSIONS = tuple(ending for endings in ENDINGS.values() for ending in endings)


def read(source: Source) -> Picture:
    """Read a picture of any format.

    Raises:
        MissingPackageError: DICOM without pydicom, NIfTI without nibabel.
        NoImageError: a DICOM object without a picture.
        InputError: unreadable, cut short, too large, several pictures in a file where no index is given.
    """
    frame = as_frame(source)
    reader = _reader(frame.path)
    count = 1 if frame.index is not None else len(reader.describe(frame.path, frame.options.plane))
    if count > 1:
        raise InputError(f"{frame.path}: holds {count} pictures; say which one is meant, or save it as its own file")
    return reader.read(frame)


def read_mask_file(path: Path, of: Source) -> Picture:
    """A mask of an image as grey (L) at its own size, with its labels as `levels`.

    Raises:
        InputError: it cannot be read, or is none of that image: other counts, another place in the patient.
    """
    frame, reader, count = as_frame(of), _reader(path), 1
    if frame.index is not None:
        count = len(_reader(frame.path).describe(frame.path, frame.options.plane))
    return reader.read_mask(path, frame, count)


def as_frame(source: Source) -> Frame:
    """Whatever says where an image lies as a `Frame`."""
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


def frames(path: Path, options: ReadOptions = AS_STORED) -> list[Frame]:
    """The images in a file: DICOM frames, TIFF pages, slices of a NIfTI volume; a file of one image has index None.

    Raises:
        MissingPackageError: DICOM without pydicom, NIfTI without nibabel.
        NoImageError: a DICOM object without a picture.
        InputError: the header cannot be read, or claims more than the file holds.
    """
    count = len(_reader(path).describe(path, options.plane))
    return [Frame(path, None, options)] if count == 1 else [Frame(path, i, options) for i in range(count)]


def describe(inside: Sequence[Frame]) -> Sequence[Slice]:
    """What a file says of its images, all of which `inside` names; errors are those of `frames`."""
    return _reader(inside[0].path).describe(inside[0].path, inside[0].options.plane)


def is_deep(paths: Sequence[Path]) -> bool:
    """Whether pictures hold more than 8 bits, so that a dark one among them is not taken as 8 bits.

    Of a long list some 64 headers are read; only where one of these promises more than 8 bits, are pixels.
    """
    for path in paths[:: max(len(paths) // 64, 1)]:
        if path.suffix.lower() in (".png", ".tif", ".tiff", ".jp2"):
            with suppress(InputError):  # it is reported where it is read
                check_file(path)
                with path.open("rb") as file, _opened(file, path) as image:
                    is_wide = _is_wide(image)
                values = _decode(read_bytes(path), Frame(path, 0))[1] if is_wide else None
                if values is not None and values.max() > 255:
                    return True
    return False


def _reader(path: Path) -> Reader:
    """`InputError` unless `path` is a file in a format that is read."""
    check_file(path)
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


def parse_window(words: Sequence[str]) -> Ends | str | None:
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
def _opened(file: IO[bytes], path: object) -> Iterator[ImageFile]:
    """The picture in a file; `InputError` where it is none, damaged, or has too many pixels."""
    try:
        with (
            blame(f"{path}: not a readable image, or cut short", errors=DAMAGE),
            Image.open(file, formats=PILLOW_FORMATS) as image,
        ):
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: more than {MAX_PIXELS:,} pixels; scale it down or cut it into tiles") from error


def _is_wide(image: ImageFile) -> bool:
    """Whether a picture that is not loaded yet has more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I") or bool(SIXTEEN.search(str(image.tile[:1])))


def _decode(data: bytes, frame: Frame) -> tuple[Picture, Array | None, bool]:
    """The picture in its own mode, its values where they are wider than 8 bits, and whether 0 is white."""
    with _opened(BytesIO(data), frame) as image:
        image.seek(frame.index or 0)
        mode, is_wide, halved = image.mode, _is_wide(image), SIXTEEN.search(str(image.tile[:1]))
        is_inverted = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == 0
        stored, orientation = _as_stored(image)
    values = np.asarray(stored) if is_wide else None
    if halved:  # of 16-bit colours Pillow has kept the high bytes alone
        layout, order = halved.groups()
        with _opened(BytesIO(data), frame) as image:
            image.seek(frame.index or 0)
            raw = f"{layout};16{LOW_BYTES[order]}"
            if layout == "LA":  # both bytes of both channels as four channels
                raw = image._mode = "RGBA"
            image.tile = [t._replace(args=(raw, *t[3][1:]) if isinstance(t[3], tuple) else raw) for t in image.tile]
            low = np.asarray(_as_stored(image)[0]).astype(np.uint16)
        high = np.asarray(stored).astype(np.uint16)
        values = low[..., 0] * 256 + low[..., 1] if layout == "LA" else (high * 256 + low)[..., :3]
    digest = hashlib.sha256(data).hexdigest()
    return Picture(stored, digest, mode, stored.size, orientation), values, is_inverted


def _as_stored(image: ImageFile) -> tuple[Image.Image, int]:
    """The picture, loaded and without the turn that Pillow makes of a TIFF's orientation; and the orientation."""
    if not isinstance(image, TiffImageFile):
        image.load()  # before the orientation, which in a PNG may follow the pixels
        return image, image.getexif().get(ORIENTATION, 1)
    orientation = image.tag_v2.get(ORIENTATION, 1)
    image.load()  # a TIFF loses its orientation by that
    inverse = INVERSE_ORIENTATION.get(orientation)
    return (image if inverse is None else image.transpose(inverse)), orientation


@lru_cache(maxsize=2)
def _pages(data: bytes, path: Path) -> Range:
    """The grey values of all pages of a file."""
    with _opened(BytesIO(data), path) as image:
        count = getattr(image, "n_frames", 1)
    pages = [_decode(data, Frame(path, page))[1] for page in range(count)]
    return Range.measure([values for values in pages if values is not None], "the file", path)


def _narrow(image: Image.Image, mode: str) -> Image.Image:
    """A picture of at most 8 bits as `RGB` or `L`, without its transparency."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's advice on stderr to do so
    return image.convert(mode)


def _own_window(values: Array, frame: Frame) -> tuple[Callable[[Array], Array], Notes]:
    """How values wider than 8 bits are shown without a window: all of 8 or of 16 bits; and what is to be said."""
    low, high = values.min(), values.max()
    is_float = values.dtype.kind == "f"  # in which [0, 1] may be meant, and the published program would see black
    is_whole = not is_float or bool(high > 1 and (values == values.round()).all())
    if low >= 0 and high <= 255 and is_whole and not frame.options.deep:
        words = f"8-bit values in a {8 * values.dtype.itemsize}-bit file (largest {high:g}): read as 8 bits"
        return partial(stretch, low=0, high=255), {"wide": words}
    if is_float or not 0 <= low <= high <= 65535:
        raise InputError(f"{frame.path}: 32 bits a pixel have no known range; save it with 8 or 16, or give --window")
    notes, high = {}, int(high)
    if high < DARK:
        used = f"range used: {max(100 * high / 65535, 1):.0f}%, the largest value is {high} of 65535"
        kind = f"a {high.bit_length()}-bit picture in a 16-bit file"
        notes["dark"] = f"{kind} ({used}): all but black; give --window"
    return partial(stretch, low=0, high=65535), notes


def _is_coloured(image: Image.Image) -> bool:
    """Whether a palette's colours that are used are no greys."""
    palette = np.asarray(image.getpalette() or []).reshape(-1, 3)[np.unique(np.asarray(image))]
    return bool((palette != palette[:, :1]).any())


def pillow_to_rgb(image: Image.Image, window: Ends | str | None = None) -> Image.Image:
    """A Pillow image as 8-bit RGB, as training reads it; `window` maps grey of more than 8 bits instead."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return _narrow(image, "RGB")
    values = np.asarray(image)
    own = None if window else _own_window(values, Frame(Path("image")))[0]
    wide = Volume([values], [own], lambda _: Range.measure([values], "the image", "image"), image.mode)
    return wide.show(0, window).image


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


def mask_sizes(source: Source) -> set[Size]:
    """Width and height that a picture's mask may have: the picture's, before or after its pixels were made square."""
    frame = as_frame(source)
    return _reader(frame.path).sizes(frame)
