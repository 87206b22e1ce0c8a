"""Which file is the mask of which image, by their names and folders.

A mask lies beside its image, as `X_mask.png`, `X_mask_1.png`, `X-mask.png`, `X_seg.nii.gz`, `X_label.png` or `X_gt.png`
beside X, or under the image's name, with such a word behind it or without, in a folder of masks. Where that folder is
a template says, such as `{parent}/anomaly_mask/{stem}`. Upper and lower case are the same in folders' names, and so are
the two ways in which Unicode writes an accent.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .readers import check_file, file_kind, list_files, stem

MASK_FOLDERS = (
    "anomaly_mask", "label", "labels", "mask", "masks", "seg", "segmentation", "segmentations", "gt", "ground_truth",
)  # fmt: skip
MASK_NAME = re.compile(
    r"(.+?)[ _-]+(?:anomaly[ _-]?mask|masks?|seg|segmentation|labels?|gt|ground[ _-]?truth)(?:[ _-]?\d+)?",
    re.IGNORECASE,
)
BESIDE = "{here}/{stem}_mask"
PLACES = (
    "{parent}/NAME/{stem}", "{parent}/{folder}/NAME/{stem}", "{parent}/NAME/{folder}/{stem}",
    "{above}/NAME/{folder}/{stem}", "{up}/NAME/{stem}", "{here}/NAME/{stem}",
)  # fmt: skip
PLACEHOLDERS = ("parent", "folder", "above", "here", "up")
# What NAS boxes and macOS put beside pictures; names that begin with a dot are left out as well.
CLUTTER = ("@eadir", "__macosx", "#recycle")


class Pairs(NamedTuple):
    """Files told apart by their names."""

    images: list[Path]
    masks: dict[Path, list[Path]]  # image -> the masks beside it, sorted
    lost: list[Path]  # named like masks, but there is no image that they could belong to


def one_form(name: str) -> str:
    """A name with its accents in one form, as macOS writes them in another."""
    return unicodedata.normalize("NFC", name)


def base(name: str) -> str:
    """A mask's name, without extension, as its image's: `X` of X_mask_1; another name as it is."""
    match = MASK_NAME.fullmatch(one_form(name))
    return match[1] if match else one_form(name)


def tell_apart(files: Iterable[Path]) -> Pairs:
    """Images, the masks beside them, and what looks like a mask and fits no image; prediction goes by this, too."""
    files = list(files)
    names = {path: one_form(stem(path)) for path in files}
    suspects = {path for path, name in names.items() if base(name) != name}
    by_name = {(path.parent, name): path for path, name in names.items() if path not in suspects}
    masks: defaultdict[Path, list[Path]] = defaultdict(list)
    lost = []
    for path in sorted(suspects):
        image = by_name.get((path.parent, base(names[path])))
        if image:
            masks[image].append(path)
        else:
            lost.append(path)
    return Pairs([path for path in files if path not in suspects], dict(masks), lost)


def is_clutter(place: str) -> bool:
    """Whether a path leads through a folder of previews that a NAS or macOS keeps."""
    return not set(CLUTTER).isdisjoint(place.lower().split("/"))


def in_mask_folder(place: str) -> bool:
    """Whether a path, relative to where images are sought, leads through a folder of masks."""
    return not set(MASK_FOLDERS).isdisjoint(place.lower().split("/")[:-1])


def list_pictures(folder: Path) -> list[Path]:
    """The files in a folder and below it that are images or masks beside them, sorted; none where it is missing.

    Folders of masks are left out. `InputError` for a folder that cannot be read, a link to nothing, a pipe, socket or
    device: leaving it out would change the numbers.
    """
    result = []
    for path, place in list_files([folder] if folder.is_dir() else []):
        if not in_mask_folder(place) and not is_clutter(place):
            check_file(path)
            result.append(path)
    return sorted(result)


def list_images(folder: Path) -> list[Path]:
    """The images in a folder and below it (a folder for each patient), sorted, without masks beside them."""
    return tell_apart(list_pictures(folder)).images


def mask_folder(root: Path, folder: str, template: str, home: Path | None = None) -> Path:
    """Where the masks lie of the images in `home`, which is a class's folder or one below it.

    Below a place that a template gives for the class, each folder of images has one of its name.
    """
    home, path = home or root / folder, PurePosixPath(folder)
    here = PurePosixPath(home.relative_to(root).as_posix())
    values = {"parent": path.parent, "folder": path.name, "above": path.parent.parent, "here": here, "up": here.parent}
    place = _existing(root, template.rpartition("/")[0].format(**values))
    return place if "{here}" in template or "{up}" in template else place / home.relative_to(root / folder)


def _existing(root: Path, place: str) -> Path:
    """The folder, by another case or form of accents where it is not there as written."""
    for part in PurePosixPath(place).parts:
        if not (root / part).is_dir() and root.is_dir():
            alike = [path for path in sorted(root.iterdir()) if one_form(path.name).lower() == one_form(part).lower()]
            root = alike[0] if alike else root / part
        else:
            root /= part
    return root


def find_masks(
    root: Path, folder: str, templates: Sequence[str], images: Sequence[Path]
) -> list[tuple[str, list[Path]]]:
    """For each image of `folder` the first template by which it has masks, and these, sorted."""
    found: dict[Path, tuple[str, list[Path]]] = {}
    for home in dict.fromkeys(image.parent for image in images):
        here = [image for image in images if image.parent == home]
        for template in templates:
            place, name = mask_folder(root, folder, template, home), template.rpartition("/")[2]
            masks = defaultdict(list)
            for path in sorted(place.iterdir()) if place.is_dir() else ():
                if (
                    path.name[0] != "."
                    and file_kind(path)
                    and (place != home or base(stem(path)) != one_form(stem(path)))
                ):
                    check_file(path)
                    masks[base(stem(path))].append(path)
            for image in here:
                fitting = masks.get(base(name.replace("{stem}", one_form(stem(image)), 1)))
                if fitting and image not in found:
                    found[image] = (template, fitting)
    return [found.get(image, ("", [])) for image in images]


def mask_places(root: Path, folders: Iterable[str], places: Sequence[str] | None = None) -> list[str]:
    """The templates by which images of some folders have masks: the one that finds most, then what finds the others.

    They are sought among `places`, or else among the usual ones for the folders of masks that there are.
    """
    if places is None:
        homes = {place.rpartition("/")[0] for _, place in list_files([root])}
        names = {part.lower() for home in homes for part in home.split("/")}
        places = [*(place.replace("NAME", name) for place in PLACES for name in MASK_FOLDERS if name in names), BESIDE]
    found: dict[str, set[Path]] = {place: set() for place in places}
    for folder in folders:
        images = list_images(root / folder)
        for place in places:
            pairs = zip(images, find_masks(root, folder, [place], images), strict=True)
            found[place] |= {image for image, (_, masks) in pairs if masks}
    result: list[str] = []
    while best := max(found, key=lambda place: len(found[place]), default=None):
        covered = found.pop(best)
        if not covered:
            break
        result.append(best)
        found = {place: images - covered for place, images in found.items()}
    return result
