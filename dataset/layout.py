"""Where a data set's classes and splits lie, as its folder shows; and its JSON file, which says what no folder shows.

The file is <NAME>.json in the data set's own folder, or else in dataset/. docs/data.md explains its keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils import InputError, integer, read_json

from .pairing import is_clutter, is_mask_folder, list_pictures
from .patients import compile_rule
from .readers.grey import PLANES
from .readers.images import parse_window
from .readers.masks import ABNORMAL_ABOVE

FOLDER = Path(__file__).parent
PUBLISHED = FOLDER / "published_results.json"  # figures to compare with, the one JSON file that is no data set
SPLITS = ("valid", "test")
KINDS = ("normal", "abnormal")  # label 0, label 1
VALID_SHARE = 0.3
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


def _no_folders() -> dict[str, list[str]]:
    return {kind: [] for kind in KINDS}


@dataclass(frozen=True)
class Layout:
    """The folders of a data set, and what its JSON file says."""

    prompt_name: str
    pixel_metrics: bool | None = None  # whether masks are used; None: where there are any
    valid_share: float = VALID_SHARE
    normal: tuple[str, ...] = ()  # a list's labels that mean normal, where any other word means abnormal
    patient: str | None = None  # a regular expression; None: the known names
    mask_above: int = ABNORMAL_ABOVE
    mask_labels: tuple[int, ...] = ()  # what counts in a mask instead of the grey above `mask_above`
    unmarked: str | None = None  # what an abnormal image is whose mask marks nothing, of `UNMARKED`; None: see `check`
    window: tuple[float, float] | str | None = None
    plane: str = "axial"
    valid: dict[str, list[str]] = field(default_factory=_no_folders)  # `KINDS` -> folders; empty where there is a list
    test: dict[str, list[str]] = field(default_factory=_no_folders)

    @classmethod
    def load(cls, name: str, root: Path, listed: bool = False) -> Layout:
        """What lies in `root`, unless its images are `listed`, and the JSON file says; `InputError` for faults."""
        path = config_path(name, root)
        given = read_config(path) if path.is_file() else {}
        folders = {} if listed else detect(root)
        return cls(**{"prompt_name": re.sub(r"[_-]+", " ", name).strip() or name, **given, **folders})

    def folders(self, split: str, kind: str) -> list[str]:
        """The folders of a class in a split, relative to the data set's."""
        return (self.valid if split == "valid" else self.test)[kind]


def add_reading_flags(group: Any) -> None:  # noqa: ANN401 - a parser or a group, which is private in argparse
    """The flags that stand for what a data set's JSON file says."""
    flag, otherwise = group.add_argument, "default: the data set's, else"
    flag("--list", metavar="FILE",
         help="images and labels in a .csv, .tsv or .jsonl (default: images.csv in the data's folder)")  # fmt: skip
    flag("--patient", metavar="REGEX", help="regular expression for the patient in an image's path (docs/data.md)")
    flag("--mask_above", type=integer(0, 254), metavar="GREY",
         help=f"grey level above which a mask marks a pixel ({otherwise} 127)")  # fmt: skip
    flag("--mask_labels", type=integer(0, 65535), nargs="+", metavar="LABEL",
         help="abnormal grey levels, palette indices or labels of masks, instead of --mask_above")  # fmt: skip
    flag("--unmarked", choices=UNMARKED,
         help=f"how to count abnormal images with an empty mask; out: not at all ({otherwise} out)")  # fmt: skip
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
        raise InputError(f"--obj {text}: dataset/{PUBLISHED.name} holds published results and describes no data set")
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
    """The checked content of a JSON file; `InputError` that names the file and the key."""
    config = read_json(path)
    tests: dict[str, Callable[[Any], Any]] = {
        "prompt_name": lambda value: isinstance(value, str) and value.strip() and len(value) <= 200,
        "pixel_metrics": lambda value: isinstance(value, bool),
        "valid_share": lambda value: isinstance(value, int | float) and 0 < value < 1,
        "normal": lambda value: all(isinstance(word, str) and word for word in _several(value)),
        "patient": lambda value: isinstance(value, str) and compile_rule(value, f"{path}: patient"),
        "mask_above": lambda value: type(value) is int and 0 <= value <= 254,
        "mask_labels": lambda value: all(type(label) is int and 0 <= label <= 65535 for label in _several(value)),
        "unmarked": lambda value: value in UNMARKED,
        "window": _is_window,
        "plane": lambda value: value in PLANES,
    }
    if unknown := sorted(config.keys() - tests.keys()) if isinstance(config, dict) else ["not an object"]:
        advice = "a list of images says where they lie" if {*SPLITS, "masks"} & set(unknown) else "see docs/data.md"
        raise InputError(f"{path}: unknown {unknown[0]!r:.80}; it may hold {', '.join(tests)}; {advice}")
    for key, value in config.items():
        if not tests[key](value):
            raise InputError(f"{path}: {key} cannot be {value!r:.80}; docs/data.md says what it may be")
    for key in {"mask_labels", "normal"} & config.keys():
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
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder and folder.is_dir() else []
    return [path for path in inside if not (path.name[0] == "." or is_clutter(path.name) or is_mask_folder(path.name))]


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
            if defects := [path for path in others if list_pictures(path)[0]]:
                found["abnormal"] = defects
        if found:
            return {kind: [_entry(path, "img") or path for path in paths] for kind, paths in found.items()}
    return {}
