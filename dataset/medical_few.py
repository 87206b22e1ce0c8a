"""A data set on disk: its images, masks and few-shot lists. Where they lie is dataset/layout.py's matter.

The six published data sets lie as <data_path>/<obj>_AD/{valid,test}/{good,Ungood}/{img,anomaly_mask}/NAME
"""

from __future__ import annotations

import hashlib
import random
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils import InputError, read_text

from .layout import (
    EXTENSIONS,
    FOLDER,
    KINDS,
    SPLITS,
    Layout,
    described,
    falls_in_valid,
    find_masks,
    list_images,
    mask_folder,
    object_name,
)

# Pillow only warns of images above Image.MAX_IMAGE_PIXELS (89,478,485, so 9,459 x 9,459); here that is the limit, as
# several are decoded at a time. This is the way that its manual gives.
warnings.simplefilter("error", Image.DecompressionBombWarning)
ABNORMAL_ABOVE = 127  # of 255, in a mask
Result = TypeVar("Result")
Found = tuple[Path, list[Path]]  # an image, and the files that fit as its mask


@dataclass(frozen=True)
class Sample:
    """One image on disk."""

    path: Path
    label: int  # 1 = abnormal
    mask: Path | None  # of abnormal images, where the data set has masks
    name: str  # the path below the data set's folder: what reports and JSON files call it

    def content_hash(self) -> str:
        """SHA-256 of the file's bytes: a changed file is another image."""
        try:
            return hashlib.sha256(self.path.read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from error


def leaks(
    samples_a: Iterable[Sample],
    samples_b: Iterable[Sample],
    content_hash: Callable[[Sample], str] = Sample.content_hash,
) -> list[tuple[Sample, Sample]]:
    """Pairs of samples whose files are equal, byte for byte, one of each list.

    `content_hash` lets a caller that has the hashes already (a feature store) save the reading.
    """
    by_hash = defaultdict(list)
    for sample in samples_a:
        by_hash[content_hash(sample)].append(sample)
    return [(first, second) for second in samples_b for first in by_hash.get(content_hash(second), ())]


def data_folder(obj: str, data_path: str | Path, data_root: str | Path | None = None) -> Path:
    """`data_root`, or <data_path>/<obj>_AD; `InputError` where it is no folder."""
    name = object_name(obj)
    root = Path(data_path) / f"{name}_AD" if data_root is None else Path(data_root)
    if not root.is_dir():
        flag = f"--data_path {data_path}" if data_root is None else f"--data_root {data_root}"
        raise InputError(f"{flag}: {root} not found; {_hint(obj, data_path)}")
    return root


def _hint(obj: str, data_path: str | Path) -> str:
    if (FOLDER / "fewshot_seed" / obj).is_dir():  # one of the published six
        return (
            f"the README says where to get {obj}, and `python -m dataset.phantom --obj {obj} --out {data_path}` "
            f"draws a made-up one"
        )
    return (
        f"--obj {obj} is none of {', '.join(described())}, but may be your own: put the data set there, or name its "
        f"folder with --data_root (README)"
    )


@dataclass(frozen=True)
class MedicalDataset:
    """A data set: its name, its folder and how that is laid out."""

    obj: str
    root: Path
    layout: Layout

    @classmethod
    def open(cls, obj: str, data_path: str | Path, data_root: str | Path | None = None) -> MedicalDataset:
        """Find `data_root` or <data_path>/<obj>_AD; `InputError` where it or a part of it is missing."""
        root = data_folder(obj, data_path, data_root)
        layout = Layout.load(obj, root)
        for folder in (folder for split in SPLITS for kind in KINDS for folder in layout.folders(split, kind)):
            top = root / PurePosixPath(folder).parts[0]
            if not top.is_dir():
                other = f"dataset/{obj}.json names it; under a new --obj the folder's own layout would be found"
                raise InputError(f"{top} not found; {_hint(obj, data_path) if data_root is None else other}")
        return cls(obj, root, layout)

    @property
    def prompt_name(self) -> str:
        """What the prompts call the object."""
        return self.layout.prompt_name

    @property
    def pixel_metrics(self) -> bool:
        """Whether the data set has masks that are used."""
        return self.layout.pixel_metrics

    def samples(self, split: str) -> list[Sample]:
        """The images of `valid` or `test`, normal first, each class sorted by name; `valid` may lack abnormal ones.

        Raises:
            InputError: a class without images, or with pixel metrics abnormal images without a mask of their own.
        """
        found = {kind: self.find(split, kind, (split, kind) != ("valid", "abnormal")) for kind in KINDS}
        return [sample for kind in KINDS for sample in self._samples(found[kind], kind)]

    def find(self, split: str, kind: str, required: bool = True) -> list[Found]:
        """The images of a class (`normal`, `abnormal`) in a split, folder by folder and sorted, with their masks.

        Raises:
            InputError: a folder is missing or there are no images; not where none are `required`.
        """
        found: list[Found] = []
        folders = self.layout.folders(split, kind)
        divided = 0  # images in folders that both splits share
        for folder in folders:
            if not (self.root / folder).is_dir():
                if not required:
                    continue
                raise InputError(f"{self.root / folder} not found; the README shows the layout of a data set")
            images = list_images(self.root / folder)
            if folder in self.layout.shared(kind):
                share = self.layout.valid_share
                divided += len(images)
                images = [path for path in images if falls_in_valid(self.name(path), share) == (split == "valid")]
            with_masks = kind == "abnormal" and self.pixel_metrics
            masks = find_masks(self.root, folder, self.layout.masks, images) if with_masks else [[]] * len(images)
            found += zip(images, masks, strict=True)
        if required and not found:
            where = ", ".join(str(self.root / folder) for folder in folders) or "its JSON file names no folder"
            if divided:
                raise InputError(
                    f"{where}: divided by a hash of the name (of the patient, where names have one), none of the "
                    f"{divided} {kind} images is {split}; give the splits folders of their own, "
                    f"in dataset/{self.obj}.json"
                )
            raise InputError(f"{where}: no images ({', '.join(EXTENSIONS)}) for {split}, {kind}")
        return found

    def name(self, path: Path) -> str:
        """The path below the data set's folder."""
        return path.relative_to(self.root).as_posix()

    def mask_problems(self, found: Sequence[Found]) -> tuple[list[str], list[str]]:
        """The images that have no mask, and those whose mask is ambiguous, in words."""
        stems = Counter((path.parent, path.stem) for path, _ in found)
        missing = [str(path) for path, masks in found if not masks]
        ambiguous = [
            f"{path} ({len(masks)} masks fit {stems[path.parent, path.stem]} images of that name)"
            for path, masks in found
            if masks and (len(masks) > 1 or stems[path.parent, path.stem] > 1)
        ]
        return missing, ambiguous

    def _samples(self, found: Sequence[Found], kind: str) -> list[Sample]:
        label = KINDS.index(kind)
        if label and self.pixel_metrics:
            missing, ambiguous = self.mask_problems(found)
            if missing:
                image = Path(missing[0])
                place = mask_folder(self.root, self.name(image.parent), self.layout.masks)
                raise InputError(
                    f"{some(missing)}: no mask ({len(missing)} of {len(found)} abnormal images); they are sought in "
                    f'{place}; `python -m dataset.check` names them all; add them, or set "pixel_metrics": false in '
                    f"dataset/{self.obj}.json"
                )
            if ambiguous:
                raise InputError(f"{some(ambiguous)}: give each image a name of its own, and its mask the same")
        return [Sample(path, label, masks[0] if masks else None, self.name(path)) for path, masks in found]

    def split_note(self) -> str | None:
        """A line on the folders that are divided between the splits; None where none is."""
        kinds = [kind for kind in KINDS if self.layout.shared(kind)]
        shared = [folder for kind in kinds for folder in self.layout.shared(kind)]
        if not shared:
            return None
        valid, test = (
            sum(self.name(path.parent) in shared for kind in kinds for path, _ in self.find(split, kind))
            for split in SPLITS
        )
        return (
            f"{self.obj}: in both splits: {some(shared)}; of the {valid + test} images there {valid} are valid, for "
            f"shots, and {test} test, by a hash of the name (of the patient, where names have one)"
        )

    def shots(self, shot_normal: int, shot_abnormal: int, iterate: int, seed: int) -> Shots:
        """The few-shot images; a class's list is the one for its own number of shots. See `Shots`."""
        counts = {"abnormal": shot_abnormal, "normal": shot_normal}
        draw = random.Random(seed)
        chosen: dict[str, list[Sample]] = {}
        names: dict[str, list[str]] = {}
        sources: dict[str, None] = {}  # an ordered set
        for kind, count in counts.items():
            known = (
                {self.shot_name(path, kind): (path, masks) for path, masks in self.find("valid", kind)} if count else {}
            )
            listed = self._listed(kind, count, iterate, known) if count and iterate >= 0 else None
            if listed is None:
                if len(known) < count:
                    flag = "--shot" if shot_normal == shot_abnormal else f"--shot_{kind}"
                    raise InputError(f"{flag} {count}: valid holds only {len(known)} {kind} images in {self.root}")
                names[kind] = draw.sample(sorted(known), count)
                source = f"sampled with seed {seed} from the sorted names of valid/ (no list for {count} shots is used)"
            else:
                names[kind], source = listed
            if count:
                sources[source] = None
            chosen[kind] = self._samples([known[name] for name in names[kind]], kind)
        return Shots(chosen["abnormal"], chosen["normal"], ", ".join(sources), names)

    def shot_name(self, path: Path, kind: str) -> str:
        """How lists call an image: by its name, or where a class has several folders by its path below the root."""
        return path.name if len(self.layout.valid[kind]) == 1 else self.name(path)

    def _listed(self, kind: str, count: int, iterate: int, known: dict[str, Found]) -> tuple[list[str], str] | None:
        """The names on the list for `count` shots and that list's name; None where there is none for these images."""
        path = next((path for path in self.shot_lists() if path.name == f"my{count}-shot.txt"), None)
        if path is None:
            return None
        names = read_shot_list(path, iterate)[0 if kind == "abnormal" else 1]
        if FOLDER in path.parents:
            if not set(names) & set(known):
                return None  # a list for other images under the same name, as with the phantom
            source = f"dataset/fewshot_seed/{self.obj}/{path.name}"
        else:
            source = str(path)
        check_shot_names(names, known, count, source, self.root)
        return names, source

    def shot_lists(self) -> list[Path]:
        """The few-shot lists, the data set's own first: they win over the project's of the same name."""
        folders = (self.root / "fewshot_seed", FOLDER / "fewshot_seed" / self.obj)
        return [
            path
            for folder in folders
            for path in sorted(folder.glob("*"))
            if re.fullmatch(r"my\d+-shot\.txt", path.name)
        ]


def some(words: Sequence[str], most: int = 3) -> str:
    """The first few of many, for a message."""
    return ", ".join(words[:most]) + (f", and {len(words) - most} more" if len(words) > most else "")


@dataclass(frozen=True)
class Shots:
    """The few labelled images that training sees."""

    abnormal: list[Sample]  # may be empty: normal-only support
    normal: list[Sample]
    source: str  # the list file, or how they were sampled
    listed: dict[str, list[str]]

    def names(self) -> dict[str, list[str]]:
        """What is printed, logged and stored in the checkpoint: the names as a list would give them."""
        return self.listed


def check_shot_names(names: Sequence[str], known: Iterable[str], count: int, source: str, root: Path) -> None:
    """`InputError` for names on a list that are no image of that class in valid, or that are too few or too many."""
    for name in names:
        if name.startswith(("/", "\\")) or ".." in PurePosixPath(name).parts:
            raise InputError(f"{source}: {name!r} is not a plain file name")
        if name not in known:
            raise InputError(f"{source}: names {name}, but valid has no such image of that class in {root}")
    if len(names) != count:
        raise InputError(f"{source}: names {len(names)} images where {count} shots are meant: {some(names)}")


def read_shot_list(path: Path, iterate: int) -> tuple[list[str], list[str]]:
    """The names of the abnormal and of the normal shots in lines `a-<iterate>:` and `n-<iterate>:`, in their order.

    Raises:
        InputError: what `parse_shot_list` refuses, or no line for `iterate`.
    """
    lines = parse_shot_list(path)
    for kind in "an":
        if not lines.get((kind, iterate)):
            known = ", ".join(sorted({str(index) for _, index in lines})) or "none"
            raise InputError(f"--iterate {iterate}: {path} has no line `{kind}-{iterate}:` with names (it has {known})")
    return lines["a", iterate], lines["n", iterate]


def parse_shot_list(path: Path) -> dict[tuple[str, int], list[str]]:
    """Read lines `a-K: name name ...` and `n-K: name name ...` of a few-shot list: (`a` or `n`, K) -> names.

    Raises:
        InputError: unreadable file, a line of another form, a second line of a kind, a name twice.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read as a few-shot list ({reason})") from error
    lines: dict[tuple[str, int], list[str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        match = re.fullmatch(r"\s*([an])-(\d{1,9})\s*:(.*)", line)
        if match is None:
            raise InputError(f"{path}, line {number}: expected `a-K: name ...` or `n-K: name ...`, found {line[:60]!r}")
        key = (match[1], int(match[2]))
        if key in lines:
            raise InputError(f"{path}, line {number}: a second line for {key[0]}-{key[1]}")
        lines[key] = match[3].split()
        if len(set(lines[key])) < len(lines[key]):
            raise InputError(f"{path}, line {number}: a name stands there twice")
    return lines


def load_image(path: Path, size: int) -> Tensor:
    """Read an image as RGB, resized bicubically (antialiased): (3, size, size) float32 in [0, 1]."""
    return to_tensor(decode(path), size)


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """An RGB image resized as `load_image` does: (3, size, size) float32 in [0, 1]."""
    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def load_mask(sample: Sample, size: int) -> Tensor:
    """The mask of a sample, resized by nearest neighbour: (size, size) bool, all False where there is none."""
    if sample.mask is None:
        return torch.zeros(size, size, dtype=torch.bool)
    mask = decode(sample.mask, "L")
    image_size = read_picture(sample.path, lambda image: image.size)
    if image_size != mask.size:
        raise InputError(f"{sample.mask}: {mask.size} pixels, but its image has {image_size}")
    return torch.from_numpy(np.array(mask.resize((size, size), Image.Resampling.NEAREST))) > ABNORMAL_ABOVE


def check_mask(sample: Sample) -> None:
    """`InputError` for a mask that marks something, but nothing as abnormal: labels 0 and 1 where 0 and 255 are meant.

    For shots; a test mask like that counts as empty, as published, and `dataset.check` reports it.
    """
    peak = decode(sample.mask, "L").getextrema()[1] if sample.mask else 0
    if 0 < peak <= ABNORMAL_ABOVE:
        raise InputError(
            f"{sample.mask}: its largest value is {peak} of 255, and abnormal is above {ABNORMAL_ABOVE}: save 0 and 255"
        )


@dataclass(frozen=True)
class Header:
    """What an image file says of itself."""

    size: tuple[int, int]  # width, height
    mode: str  # Pillow's: L, RGB, I;16, ...
    orientation: int  # EXIF; 1 is upright. It is ignored, as published, so that an image fits its mask


def decode(path: Path, mode: str = "RGB") -> Image.Image:
    """The pixels of an image file in 8 bits, `RGB` or `L`.

    16 bits are scaled, where Pillow would saturate to white; transparency is dropped, as published. A file with several
    pictures is refused, as the first slice of a volume would be a guess; the previews that cameras add (MPO) are not
    meant by that.

    Raises:
        InputError: unreadable or cut short, too many pixels, several pictures, pixels without a known range.
    """
    return read_picture(path, lambda image: _convert(image, mode, path))


def examine(path: Path) -> tuple[Header, Image.Image]:
    """What `decode` gives as `RGB`, with the file's header."""

    def use(image: Image.Image) -> tuple[Header, Image.Image]:
        size, mode, pixels = image.size, image.mode, _convert(image, "RGB", path)
        return Header(
            size, mode, image.getexif().get(0x0112, 1)
        ), pixels  # EXIF last: in a PNG it may follow the pixels

    return read_picture(path, use)


def _convert(image: Image.Image, mode: str, path: Path) -> Image.Image:
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise InputError(f"{path}: holds {image.n_frames} pictures; save the one that is meant as a file of its own")
    return to_mode(image, mode, path)


def to_mode(image: Image.Image, mode: str, path: object) -> Image.Image:
    """A picture in 8 bits, `RGB` or `L`, as `decode` says; `InputError` that names `path`."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise InputError(f"{path}: 32 bits a pixel have no known range; save it with 8 or 16 bits")
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert(mode)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's advice on stderr to do so
    return image.convert(mode)


def read_picture(path: Path, use: Callable[[Image.Image], Result]) -> Result:
    """What `use` makes of the image file that Pillow opens; `InputError` naming it for whatever goes wrong."""
    try:
        with Image.open(path) as image:
            return use(image)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise InputError(f"{path}: more than {limit} pixels; scale it down or cut it into tiles") from error
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: not a readable image, or cut short ({reason})") from error
