"""Which files of a folder are masks, and which mask belongs to which image.

A file is a mask if it is in a mask folder (of `MASK_FOLDERS`, or `lung_masks`), or if its name ends with such a word:
`X_mask.png`, `X-mask.png`, `X_mask_1.png`, `X_seg.nii.gz`. A mask belongs to an image if its name without such a word
is the image's name, and if its folders, except mask folders, occur among the image's folders in the same order:

    benign/X_mask.png                        benign/X.png
    test/Ungood/anomaly_mask/X.png           test/Ungood/img/X.png
    ground_truth/crack/X_mask.png            test/crack/X.png
    abnormal/case09/mask/X.png               abnormal/case09/CT/X.dcm

If masks in several folders match, those in the folder that shares most folders with the image are used. Case is ignored
in folder names; in all names, the two Unicode forms of an accented letter are equal.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path, PurePosixPath

from .readers.grey import check_file
from .readers.images import Sample, list_files, stem

MASK_FOLDERS = (
    "anomaly_mask", "label", "labels", "mask", "masks", "seg", "segmentation", "segmentations", "gt", "ground_truth",
)  # fmt: skip
MASK_NAME = re.compile(
    r"(.+?)[ _-]+(?:anomaly[ _-]?mask|masks?|seg|segmentation|labels?|gt|ground[ _-]?truth)(?:[ _-]?\d+)?",
    re.IGNORECASE,
)
# Folders that NAS devices and macOS put beside pictures; names that begin with a dot are skipped as well.
CLUTTER = ("@eadir", "__macosx", "#recycle")


def one_form(name: str) -> str:
    """The name in Unicode's composed form (NFC); macOS stores accents in another form."""
    return unicodedata.normalize("NFC", name)


def base(name: str) -> str:
    """The image name in a mask's name (without extension): `X` for X_mask_1; other names are returned as they are."""
    match = MASK_NAME.fullmatch(one_form(name))
    return match[1] if match else one_form(name)


def is_clutter(place: str) -> bool:
    """Whether a path leads through a folder of `CLUTTER`."""
    return not set(CLUTTER).isdisjoint(place.lower().split("/"))


def is_mask_folder(name: str) -> bool:
    """Whether a folder of that name holds masks; `Ground Truth` counts as `ground_truth`, `lung masks` as `masks`."""
    word = re.sub("[ -]", "_", name.lower())
    return word in MASK_FOLDERS or word.endswith(("_mask", "_masks"))


def in_mask_folder(place: str) -> bool:
    """Whether a path, relative to the searched folder, leads through a folder of masks."""
    return any(map(is_mask_folder, place.split("/")[:-1]))


def list_pictures(root: Path) -> tuple[list[Path], list[Path]]:
    """The images and the masks in a folder and below it, sorted.

    Raises `InputError` if a folder cannot be read: skipping it would change the results.
    """
    images: list[Path] = []
    masks: list[Path] = []
    for path, place in list_files([root]):
        if path.is_dir():
            check_file(path)
        if not is_clutter(place):
            (masks if in_mask_folder(place) or MASK_NAME.fullmatch(one_form(stem(path))) else images).append(path)
    return sorted(images), sorted(masks)


def pair(root: Path, files: Iterable[Sample], masks: Iterable[Path]) -> list[Sample]:
    """The files with their masks, which are sorted; all masks of an image come from the same folder."""
    known: defaultdict[tuple[str, tuple[str, ...]], list[Path]] = defaultdict(list)
    for mask in sorted(masks):
        known[base(stem(mask)), _folders(root, mask)].append(mask)
    names, result = {name for name, _ in known}, []
    for file in files:
        name, above, fitting = base(stem(file.path)), _folders(root, file.path), list[Path]()
        for count in range(len(above), -1, -1) if name in names else ():  # a mask's folders, those with most first
            places = set(combinations(above, count))
            if fitting := sorted({mask for place in places for mask in known.get((name, place), ())} - {file.path}):
                break
        result.append(replace(file, masks=tuple(mask for mask in fitting if mask.parent == fitting[0].parent)))
    return result


def named_masks(paths: Sequence[Path]) -> tuple[set[Path], set[Path]]:
    """Files named like masks, for prediction: those whose image is in the same folder, and those without an image."""
    names = {(path.parent, one_form(stem(path))) for path in paths}
    named = {path for path in paths if MASK_NAME.fullmatch(one_form(stem(path)))}
    beside = {path for path in named if (path.parent, base(stem(path))) in names}
    return beside, named - beside


def _folders(root: Path, path: Path) -> tuple[str, ...]:
    """The folders from `root` to a file, lower case and NFC, without those of masks."""
    parts = PurePosixPath(one_form(path.relative_to(root).as_posix()).lower()).parts[:-1]
    return tuple(part for part in parts if not is_mask_folder(part))
