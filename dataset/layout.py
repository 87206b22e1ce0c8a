"""Where a data set's images and masks lie: as dataset/<NAME>.json says, or as the folder itself shows.

Every key of the JSON file has a default:

    prompt_name      what the prompts call the object; NAME with blanks for underscores
    pixel_metrics    whether masks are used; true where there are any
    valid, test      {"normal": FOLDER, "abnormal": FOLDER}, each a folder or a list of folders below the data set's,
                     with the images directly in them; the MVFA layout, <split>/{good,Ungood}/img. A folder that both
                     splits name is divided between them
    valid_share      the part of such a folder that is valid; 0.3
    masks            where an image's mask lies, without its extension; "{parent}/anomaly_mask/{stem}", where {stem} is
                     the image's name, {folder} its folder's name and {parent} the path of the folder above that
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from utils import InputError, read_text

FOLDER = Path(__file__).parent
PUBLISHED = FOLDER / "published_results.json"  # figures to compare with, the one JSON file that is no data set
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
SPLITS = ("valid", "test")
KINDS = ("normal", "abnormal")  # label 0, label 1
VALID_SHARE = 0.3
MVFA = {split: {"normal": [f"{split}/good/img"], "abnormal": [f"{split}/Ungood/img"]} for split in SPLITS}
MVFA_MASKS = "{parent}/anomaly_mask/{stem}"
# What `detect` knows, each in the order of preference.
CLASS_NAMES = (("good", "ungood"), ("normal", "abnormal"), ("0", "1"))
SUPPORT_NAMES = ("valid", "val", "train")
MASK_PLACES = (
    MVFA_MASKS,
    *(f"{{parent}}/{name}/{{stem}}" for name in ("label", "mask", "masks")),
    "ground_truth/{folder}/{stem}_mask",
    "ground_truth/{folder}/{stem}",
)


@dataclass(frozen=True)
class Layout:
    """What the JSON file says, with the defaults filled in."""

    prompt_name: str
    pixel_metrics: bool
    valid: dict[str, list[str]]  # `KINDS` -> folders
    test: dict[str, list[str]]
    masks: str = MVFA_MASKS
    valid_share: float = VALID_SHARE

    @classmethod
    def load(cls, name: str, root: Path) -> Layout:
        """dataset/<name>.json, or without one what lies in `root`; `InputError` for what cannot be understood."""
        path = config_path(name)
        given = {**MVFA, **read_config(path)} if path.is_file() else detect(root)
        given.setdefault("prompt_name", re.sub(r"[_-]+", " ", name).strip() or name)
        if "pixel_metrics" not in given:
            abnormal = {folder for split in SPLITS for folder in given[split]["abnormal"]}
            given["pixel_metrics"] = has_masks(root, abnormal, given.get("masks", MVFA_MASKS))
        return cls(**given)

    def folders(self, split: str, kind: str) -> list[str]:
        """The folders of a class in a split, relative to the data set's."""
        return getattr(self, split)[kind]

    def shared(self, kind: str) -> list[str]:
        """The folders of a class that both splits name."""
        return [folder for folder in self.valid[kind] if folder in self.test[kind]]

    def to_json(self) -> str:
        """The text of a JSON file that means this layout."""
        values = asdict(self)
        if not any(map(self.shared, KINDS)):
            del values["valid_share"]
        for split in SPLITS:
            values[split] = {k: folders[0] if len(folders) == 1 else folders for k, folders in values[split].items()}
        return json.dumps(values, indent=2)


def described() -> tuple[str, ...]:
    """The names of the data sets that have a JSON file, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json") if path != PUBLISHED))


def config_path(name: str) -> Path:
    """dataset/<name>.json, whether it is there or not."""
    return FOLDER / f"{name}.json"


def object_name(text: str) -> str:
    """A data set's name as it may stand in file names; `InputError` for any other."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", text):
        raise InputError(f"--obj {text!r}: use letters, digits, '_', '-' and '.', as the name goes into file names")
    if text == PUBLISHED.stem:
        raise InputError(f"--obj {text}: dataset/{PUBLISHED.name} holds published figures and describes no data set")
    return text


def named_after(folder: str | Path) -> str:
    """What a data set is called where only its folder is given: bottle for .../bottle, Brain for .../Brain_AD."""
    return Path(folder).absolute().name.removesuffix("_AD")


def read_config(path: Path) -> dict[str, Any]:
    """The checked content of a JSON file, folders as lists; `InputError` that names the file and the key."""
    try:
        config = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    known = Layout.__dataclass_fields__
    unknown = sorted(set(config) - set(known)) if isinstance(config, dict) else ["not an object"]
    if unknown:
        raise InputError(f"{path}: unknown {unknown[0]!r:.80}; it may hold {', '.join(known)}")
    tests = {
        "prompt_name": lambda value: isinstance(value, str) and value.strip() and len(value) <= 200,
        "pixel_metrics": lambda value: isinstance(value, bool),
        "valid_share": lambda value: isinstance(value, int | float) and 0 < value < 1,
        "masks": lambda value: isinstance(value, str) and _is_mask_template(value),
    }
    for key, test in tests.items():
        if key in config and not test(config[key]):
            raise InputError(f"{path}: {key} cannot be {config[key]!r:.80}; dataset/layout.py says what it may be")
    for split in SPLITS:
        if split in config:
            config[split] = _read_folders(config[split], f"{path}: {split}")
    return config


def _read_folders(value: object, where: str) -> dict[str, list[str]]:
    if not isinstance(value, dict) or set(value) != set(KINDS):
        raise InputError(f'{where} must be {{"normal": folders, "abnormal": folders}}')
    folders = {kind: [given] if isinstance(given, str) else given for kind, given in value.items()}
    for kind, listed in folders.items():
        if not isinstance(listed, list) or not all(isinstance(folder, str) and _is_below(folder) for folder in listed):
            raise InputError(f"{where}, {kind}: name folders below the data set's own, without '..'")
    return folders


def _is_below(folder: str) -> bool:
    path = PurePosixPath(folder)
    named = path.parts and folder.isprintable() and all(len(os.fsencode(part)) <= 255 for part in path.parts)
    return bool(named) and not path.is_absolute() and ".." not in path.parts


def _is_mask_template(text: str) -> bool:
    parent, _, name = text.rpartition("/")
    plain = re.sub(r"\{(parent|folder)\}", "", parent) + name.replace("{stem}", "", 1)
    return "{stem}" in name and not re.search(r"[{}]", plain) and _is_below(text)


def list_images(folder: Path) -> list[Path]:
    """The image files directly in a folder, sorted by name; none where it is missing. Hidden files are left out.

    `InputError` for a folder that cannot be read, and for a link to nothing: leaving it out would change the numbers.
    """
    try:
        named = [path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and path.name[0] != "."]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from error
    images = [path for path in named if path.is_file()]
    if len(images) < len(named) and (broken := [path for path in named if path.is_symlink() and not path.exists()]):
        raise InputError(f"{broken[0]}: a link to a file that is not there ({len(broken)} in this folder)")
    return sorted(images)


def mask_folder(root: Path, folder: str, template: str) -> Path:
    """Where the masks of the images in `folder` lie."""
    path = PurePosixPath(folder)
    return root / template.rpartition("/")[0].format(parent=path.parent, folder=path.name)


def find_masks(root: Path, folder: str, template: str, images: Iterable[Path]) -> list[list[Path]]:
    """For each image of `folder` the files that fit as its mask: one, unless something is wrong."""
    by_stem = defaultdict(list)
    for path in list_images(mask_folder(root, folder, template)):
        by_stem[path.stem].append(path)
    name = template.rpartition("/")[2]
    return [by_stem.get(name.format(stem=image.stem), []) for image in images]


def has_masks(root: Path, folders: Iterable[str], template: str) -> bool:
    """Whether any image of these folders has a mask."""
    return any(any(find_masks(root, folder, template, list_images(root / folder))) for folder in folders)


def detect(root: Path) -> dict[str, Any]:
    """What a JSON file for this folder would say; `InputError` where no known layout is found.

    Known are <valid|val|train>/ and test/ with a folder for each class; the same with normal images alone beside test/,
    as in MVTec's train/good, test/good and test/<defect>; and the two classes alone. Classes are called good and
    Ungood, normal and abnormal, or 0 and 1. Where there are no abnormal images beside the test's, or no splits, folders
    are shared between the splits.
    """
    test = _classes(root / "test")
    found_support = [_classes(root / name) for name in SUPPORT_NAMES]
    support = next((found for found in found_support if len(found) == 2), {})
    normal = next((found["normal"] for found in found_support if "normal" in found), None)
    if len(support) == len(test) == 2:
        splits = {"valid": support, "test": test}
    elif "normal" in test and normal:
        inside = map(_images_folder, sorted((root / "test").iterdir()))
        defects = [path.relative_to(root).as_posix() for path in inside if path != test["normal"] and list_images(path)]
        splits = {"valid": {"normal": normal, "abnormal": defects}, "test": {**test, "abnormal": defects}}
    else:
        splits = dict.fromkeys(SPLITS, _classes(root))
    if not all(splits[split].get(kind) for split in SPLITS for kind in KINDS):
        raise InputError(
            f"{root}: no known layout; expected valid/ and test/ with good/ and Ungood/, normal/ and abnormal/ or 0/ "
            f"and 1/ in each, those two alone, or MVTec's train/good and test/<defect>; or describe it in a JSON file, "
            f"which `python -m dataset.check` begins and dataset/layout.py explains"
        )
    found: dict[str, Any] = {
        split: {kind: _relative(root, folders) for kind, folders in classes.items()}
        for split, classes in splits.items()
    }
    abnormal = {folder for split in SPLITS for folder in found[split]["abnormal"]}
    masks = next((place for place in MASK_PLACES if has_masks(root, abnormal, place)), None)
    return {**found, "pixel_metrics": masks is not None, **({"masks": masks} if masks else {})}


def _classes(folder: Path) -> dict[str, Path]:
    """`KINDS` -> the folder with that class's images, as far as there are such folders."""
    inside = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else {}
    for names in CLASS_NAMES:
        found = {kind: inside[name] for kind, name in zip(KINDS, names, strict=True) if name in inside}
        if found:
            return {kind: _images_folder(path) for kind, path in found.items()}
    return {}


def _images_folder(path: Path) -> Path:
    """Where a class's images lie: in img/ as in MVFA's layout, or directly in its folder."""
    return path / "img" if (path / "img").is_dir() else path


def _relative(root: Path, folders: Path | list[str]) -> list[str]:
    return folders if isinstance(folders, list) else [folders.relative_to(root).as_posix()]


def patient(name: str) -> str | None:
    """The patient's number in names that end in `<patient>_<image>`, like 00124_80.png or CNV-6294785-2.jpeg."""
    match = re.search(r"(?:^|[_-])(\d+)[_-]\d{1,6}$", PurePosixPath(name).stem)
    return match[1] if match else None


def falls_in_valid(name: str, share: float) -> bool:
    """Whether an image of a folder that both splits name is in valid, by a hash of its patient or else of its name.

    So nothing moves when files are added, whatever the seed and the machine, and a patient is in one split (the rule
    of the Speech Commands data set, Warden 2018).
    """
    digest = hashlib.sha256(os.fsencode(patient(name) or name)).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
