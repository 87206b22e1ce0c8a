"""Where a data set's images and masks lie: as its JSON file says, or as the folder itself shows.

The file is <NAME>.json in the data set's own folder, or else in dataset/. docs/data.md explains its keys, which are the
fields of `Layout`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from utils import InputError, integer, read_json

from .pairing import MASK_FOLDERS, PLACEHOLDERS, is_clutter, list_images, mask_places, one_form
from .patients import compile_rule
from .readers import ABNORMAL_ABOVE, PLANES, ReadOptions, list_files, parse_window

FOLDER = Path(__file__).parent
PUBLISHED = FOLDER / "published_results.json"  # figures to compare with, the one JSON file that is no data set
SPLITS = ("valid", "test")
KINDS = ("normal", "abnormal")  # label 0, label 1
VALID_SHARE = 0.3
MVFA_MASKS = "{parent}/anomaly_mask/{stem}"
# Images of the paper's data sets, (normal, abnormal) or all of them; where sources disagree, each.
PUBLISHED_COUNTS: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {
    "Brain": {"valid": ((39, 44),), "test": ((640, 3075),)},
    "Chest": {"valid": ((1490,),), "test": ((17194,),)},
    "Histopathology": {"test": ((1028, 1008), (1003, 994))},
    "Liver": {"valid": ((93, 73),), "test": ((833, 660),)},
    "Retina_OCT2017": {"test": ((242, 726),)},
    "Retina_RESC": {"valid": ((45, 70),), "test": ((1041, 764),)},
}
BENCHMARKS = tuple(PUBLISHED_COUNTS)
NO_LAYOUT = (
    "no known layout; expected valid/ and test/ with good/ and Ungood/, normal/ and abnormal/ or 0/ and 1/ in each, "
    "those two alone, normal/ beside folders of defects, or MVTec's train/good and test/<defect>; or write a list: "
    "`python -m dataset.check --data_root FOLDER --write_list images.csv` begins one, and docs/data.md explains it"
)
MADE_UP = "PHANTOM.txt"  # marks what dataset.phantom has drawn
UNMARKED = ("out", "normal", "abnormal")
# What `detect` knows, each in the order of preference; upper and lower case are the same.
CLASS_NAMES = (("good", "ungood"), ("normal", "abnormal"), ("0", "1"))
SUPPORT_NAMES = ("valid", "val", "train")

Classes = dict[str, list[Path]]  # `KINDS` -> folders


@dataclass(frozen=True)
class Layout:
    """What the JSON file says, with the defaults filled in."""

    prompt_name: str
    pixel_metrics: bool | None  # whether masks are used; None: where there are any
    valid: dict[str, list[str]]  # `KINDS` -> folders
    test: dict[str, list[str]]
    masks: tuple[str, ...] = (MVFA_MASKS,)  # the first by which an image has masks
    valid_share: float = VALID_SHARE
    normal: tuple[str, ...] = ()  # a list's labels that mean normal, where any other word means abnormal
    patient: str | None = None  # a regular expression; None: the known names
    mask_above: int = ABNORMAL_ABOVE
    mask_labels: tuple[int, ...] = ()  # what counts in a mask instead of the grey above `mask_above`
    unmarked: str | None = None  # what an abnormal image is whose mask marks nothing, of `UNMARKED`; None: see `check`
    window: tuple[float, float] | str | None = None
    plane: str = "axial"

    @classmethod
    def load(cls, name: str, root: Path, listed: bool = False) -> Layout:
        """What the data set's JSON file says, and what lies in `root`; `InputError` for faults.

        Where the images are `listed`, folders mean nothing.
        """
        path = config_path(name, root)
        given = read_config(path) if path.is_file() else {}
        if listed:
            given |= {split: {kind: [] for kind in KINDS} for split in SPLITS}
        elif not set(SPLITS) <= given.keys():
            given = {**detect(root), **given}
        prompt_name = re.sub(r"[_-]+", " ", name).strip() or name
        given = {"prompt_name": prompt_name, "pixel_metrics": None, **given}
        if "masks" not in given and given["pixel_metrics"] is not False:
            folders = dict.fromkeys(folder for split in SPLITS for folder in given[split]["abnormal"])
            given["masks"] = tuple(mask_places(root, folders)) or (MVFA_MASKS,)
        return cls(**given)

    @property
    def options(self) -> ReadOptions:
        """How files with more than 8 bits or more than one slice are read, and what counts in masks."""
        return ReadOptions(self.window, self.plane, self.mask_labels)

    def folders(self, split: str, kind: str) -> list[str]:
        """The folders of a class in a split, relative to the data set's."""
        return (self.valid if split == "valid" else self.test)[kind]

    def shared(self, kind: str) -> list[str]:
        """The folders of a class that both splits name."""
        return [folder for folder in self.valid[kind] if folder in self.test[kind]]


def add_reading_flags(group: Any) -> None:  # noqa: ANN401 - a parser or a group, which is private in argparse
    """The flags that stand for what a data set's JSON file says."""
    flag, otherwise = group.add_argument, "default: the data set's, else"
    flag("--list", metavar="FILE",
         help="images and labels in a .csv, .tsv or .jsonl (default: images.csv in the data's folder)")  # fmt: skip
    flag("--patient", metavar="REGEX", help="regular expression: the patient in an image's path (docs/data.md)")
    flag("--mask_above", type=integer(0, 254), metavar="GREY",
         help=f"grey of masks above which a pixel is abnormal ({otherwise} 127; 25: BMAD, 0: AA-CLIP)")  # fmt: skip
    flag("--mask_labels", type=integer(0, 65535), nargs="+", metavar="LABEL",
         help="abnormal grey levels, palette indices or labels of masks, instead of --mask_above")  # fmt: skip
    flag("--unmarked", choices=UNMARKED,
         help="how abnormal images with an empty mask count; out: not at all "
              f"({otherwise} out; the paper's six: abnormal, as published)")  # fmt: skip
    flag("--window", nargs="+", metavar="W",
         help=f"CENTER WIDTH, auto or full: grey range beyond 8 bits ({otherwise} the file's)")  # fmt: skip
    flag("--plane", choices=PLANES, help=f"in which NIfTI volumes are cut ({otherwise} axial)")


def described() -> tuple[str, ...]:
    """The names of the data sets that have a JSON file in dataset/, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json") if path != PUBLISHED))


def config_path(name: str, root: Path | None = None) -> Path:
    """<root>/<name>.json where it is there, else dataset/<name>.json, whether that is there or not."""
    own = root / f"{name}.json" if root else None
    return own if own and own.is_file() else FOLDER / f"{name}.json"


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


def object_of(data_root: str | Path) -> str:
    """`named_after` where that may be a data set's name; else `InputError`."""
    try:
        return object_name(named_after(data_root))
    except InputError as error:
        raise InputError(f"--data_root {data_root}: its name cannot be a data set's; give --obj NAME") from error


def object_given(options: Any) -> str | None:  # noqa: ANN401 - the flags
    """The name that follows from --data_root or --list, where one of them is given."""
    folder = options.data_root or (options.list and Path(options.list).parent)
    return object_of(folder) if folder else None


# --- the JSON file ---


def read_config(path: Path) -> dict[str, Any]:
    """The checked content of a JSON file, folders as lists; `InputError` that names the file and the key."""
    config = read_json(path)
    known = Layout.__dataclass_fields__
    if unknown := sorted(set(config) - set(known)) if isinstance(config, dict) else ["not an object"]:
        raise InputError(f"{path}: unknown {unknown[0]!r:.80}; it may hold {', '.join(known)}")
    tests: dict[str, Callable[[Any], Any]] = {
        "prompt_name": lambda value: isinstance(value, str) and value.strip() and len(value) <= 200,
        "pixel_metrics": lambda value: isinstance(value, bool),
        "valid_share": lambda value: isinstance(value, int | float) and 0 < value < 1,
        "masks": lambda value: all(isinstance(text, str) and _is_mask_template(text) for text in _several(value)),
        "normal": lambda value: all(isinstance(word, str) and word for word in _several(value)),
        "patient": lambda value: isinstance(value, str) and compile_rule(value, f"{path}: patient"),
        "mask_above": lambda value: type(value) is int and 0 <= value <= 254,
        "mask_labels": lambda value: all(type(label) is int and 0 <= label <= 65535 for label in _several(value)),
        "unmarked": lambda value: value in UNMARKED,
        "window": _is_window,
        "plane": lambda value: value in PLANES,
        **dict.fromkeys(SPLITS, _are_folders),
    }
    for key, value in config.items():
        if not tests[key](value):
            raise InputError(f"{path}: {key} cannot be {value!r:.80}; docs/data.md says what it may be")
    for split in set(SPLITS) & config.keys():
        config[split] = {kind: _several(folders) for kind, folders in config[split].items()}
    for key in {"masks", "mask_labels", "normal"} & config.keys():
        config[key] = tuple(_several(config[key]))
    if isinstance(config.get("window"), list):
        config["window"] = tuple(map(float, config["window"]))
    return dict(config)


def _several(value: Any) -> list[Any]:  # noqa: ANN401 - whatever JSON holds
    return value if isinstance(value, list) else [value]


def _is_window(value: object) -> bool:
    with suppress(InputError):
        return parse_window([str(part) for part in _several(value)]) is not None
    return False


def _are_folders(value: object) -> bool:
    """Whether it is {"normal": folders, "abnormal": folders}, below the data set's own."""
    listed = [_several(folders) for folders in value.values()] if isinstance(value, dict) else []
    return (
        isinstance(value, dict)
        and set(value) == set(KINDS)
        and all(isinstance(folder, str) and _is_below(folder) for folders in listed for folder in folders)
    )


def _is_below(folder: str) -> bool:
    path = PurePosixPath(folder)
    named = path.parts and folder.isprintable() and all(len(os.fsencode(part)) <= 255 for part in path.parts)
    return bool(named) and not path.is_absolute() and ".." not in path.parts


def _is_mask_template(text: str) -> bool:
    parent, _, name = text.rpartition("/")
    plain = re.sub(rf"\{{({'|'.join(PLACEHOLDERS)})\}}", "", parent) + name.replace("{stem}", "", 1)
    return "{stem}" in name and not re.search(r"[{}]", plain) and _is_below(text)


# --- what a folder shows ---


def detect(root: Path) -> dict[str, Any]:
    """The folders of each class of each split, as a JSON file for `root` would name them; `InputError` where none fit.

    Known are <valid|val|train>/ and test/ with a folder for each class; the two classes beside test/; normal images
    alone beside test/, as in MVTec's train/good, test/good and test/<defect>; and the classes alone; all of it also in
    a single folder below the root. Classes are called good and Ungood, normal and abnormal, or 0 and 1; beside good or
    normal without its counterpart, every other folder of images is abnormal. They hold their images in img/, or else
    directly or in folders below. Where there are no abnormal images beside the test's, or no splits, folders are shared
    between the splits.
    """
    splits = _splits(root)
    if splits is None:
        known = {"test", *SUPPORT_NAMES, *(name for names in CLASS_NAMES for name in names)}
        below = [nested for path in _folders(root) if path.name.lower() not in known and (nested := _splits(path))]
        splits = below[0] if len(below) == 1 else None
    if splits is None:
        raise InputError(f"{root}: {NO_LAYOUT}")
    return {
        split: {kind: [path.relative_to(root).as_posix() for path in folders] for kind, folders in classes.items()}
        for split, classes in splits.items()
    }


def _splits(root: Path) -> dict[str, Classes] | None:
    """The folders of each class of each split; None where they are not all found."""
    test, own = _classes(_entry(root, "test")), _classes(root)
    supports = [_classes(_entry(root, name)) for name in SUPPORT_NAMES] + [own]
    if len(test) == 2:
        if support := next((classes for classes in supports if len(classes) == 2), None):
            return {"valid": support, "test": test}
        if support := next((classes for classes in supports if "normal" in classes), None):
            return {"valid": {"normal": support["normal"], "abnormal": test["abnormal"]}, "test": test}
    return dict.fromkeys(SPLITS, own) if len(own) == 2 else None


def _folders(folder: Path | None) -> list[Path]:
    """The folders in another one, sorted, without hidden ones and those of masks."""
    inside = sorted(folder.iterdir()) if folder and folder.is_dir() else []
    names = {path: one_form(path.name).lower() for path in inside if path.is_dir()}
    return [
        path for path, name in names.items() if name[0] != "." and not is_clutter(name) and name not in MASK_FOLDERS
    ]


def _entry(folder: Path, name: str) -> Path | None:
    """The folder of that name in another one, whatever its letters' case."""
    return next((path for path in _folders(folder) if path.name.lower() == name), None)


def _classes(folder: Path | None) -> Classes:
    """The folders with each class's images, as far as there are such folders."""
    inside = {path.name.lower(): path for path in _folders(folder)}
    for normal, abnormal in CLASS_NAMES:
        found = {kind: [inside[name]] for kind, name in zip(KINDS, (normal, abnormal), strict=True) if name in inside}
        if "normal" in found and "abnormal" not in found and normal != "0":
            others = [path for name, path in inside.items() if name not in (normal, "test", *SUPPORT_NAMES)]
            if defects := [path for path in others if list_images(path)]:
                found["abnormal"] = defects
        if found:
            return {kind: [_entry(path, "img") or path for path in paths] for kind, paths in found.items()}
    return {}


def unused(root: Path, used: set[Path]) -> list[str]:
    """The folders of a data set that hold pictures which are neither images nor masks of it, and how many."""
    counts = Counter(
        str(PurePosixPath(place).parent)
        for path, place in list_files([root])
        if path not in used and not is_clutter(place)
    )
    return [f"{folder} ({count})" for folder, count in sorted(counts.items())]
