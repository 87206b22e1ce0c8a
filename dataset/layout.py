"""A data set's name, and its JSON file, which holds settings that folders cannot express.

The file is <NAME>.json in the data set's own folder, or else in dataset/. docs/data.md explains its keys.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import InputError, integer, read_json

from .patients import compile_rule
from .readers.grey import PLANES
from .readers.images import parse_window
from .readers.masks import ABNORMAL_ABOVE

FOLDER = Path(__file__).parent
PUBLISHED = FOLDER / "published_results.json"  # results to compare with; the only JSON file here that is no data set
SPLITS = ("valid", "test")
KINDS = ("normal", "abnormal")  # label 0, label 1
# Numbers of images in the paper's data sets, (normal, abnormal) or the total; if sources disagree, all variants.
PUBLISHED_COUNTS: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {
    "Brain": {"valid": ((39, 44),), "test": ((640, 3075),)},
    "Chest": {"valid": ((1490,),), "test": ((17194,),)},
    "Histopathology": {"test": ((1028, 1008), (1003, 994))},
    "Liver": {"valid": ((93, 73),), "test": ((833, 660),)},
    "Retina_OCT2017": {"test": ((242, 726),)},
    "Retina_RESC": {"valid": ((45, 70),), "test": ((1041, 764),)},
}
BENCHMARKS = tuple(PUBLISHED_COUNTS)
MADE_UP = "PHANTOM.txt"  # marks a data set drawn by dataset.phantom
UNMARKED = ("out", "normal", "abnormal")


@dataclass(frozen=True)
class Layout:
    """The settings in a data set's JSON file, with their defaults."""

    prompt_name: str
    pixel_metrics: bool | None = None  # whether masks are used; None: if there are any
    valid_share: float = 0.3  # of shared folders: the share of patients (or else of images) in valid
    normal: tuple[str, ...] = ()  # labels in a list that mean normal; any other word then means abnormal
    patient: str | None = None  # a regular expression; None: the rules of dataset/patients.py
    mask_above: int = ABNORMAL_ABOVE
    mask_labels: tuple[int, ...] = ()  # abnormal levels of a mask, instead of grey levels above `mask_above`
    unmarked: str | None = None  # how abnormal images with empty masks count; None: abnormal for a benchmark, else out
    window: tuple[float, float] | str | None = None  # see `ReadOptions`
    plane: str = "axial"  # of NIfTI volumes


def add_reading_flags(group: Any) -> None:  # noqa: ANN401 - a parser or a group, whose type is private in argparse
    """Add the flags for reading a data set: --list, and those that override its JSON file."""
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
    flag("--plane", choices=PLANES, help=f"slicing plane of NIfTI volumes ({otherwise} axial)")


def described() -> tuple[str, ...]:
    """The names of the data sets that have a JSON file in dataset/, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json") if path != PUBLISHED))


def config_path(name: str, root: Path | None = None) -> Path:
    """<root>/<name>.json if it exists, else dataset/<name>.json, which may not exist."""
    own = root / f"{name}.json" if root else None
    return own if own and own.is_file() else FOLDER / f"{name}.json"


def object_name(text: str) -> str:
    """Return a data set's name if it can be used in file names; raises `InputError` otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", text):
        raise InputError(f"--obj {text!r}: use letters, digits, '_', '-' and '.', as the name goes into file names")
    return text


def object_of(data_root: str | Path) -> str:
    """The name from the folder: bottle for .../bottle, Brain for .../Brain_AD; raises `InputError` if it is invalid."""
    try:
        return object_name(Path(data_root).absolute().name.removesuffix("_AD"))
    except InputError as error:
        raise InputError(f"--data_root {data_root}: its name cannot be a data set's; give --obj NAME") from error


def object_given(options: Any) -> str | None:  # noqa: ANN401 - the flags
    """The name that follows from --data_root or --list; None if neither is given."""
    folder = options.data_root or (options.list and Path(options.list).parent)
    return object_of(folder) if folder else None


# --- the JSON file ---


def load_layout(name: str, root: Path) -> Layout:
    """The settings of the data set in `root`, from its JSON file if it has one; raises `InputError` if invalid."""
    path = config_path(name, root)
    given = read_config(path) if path.is_file() else {}
    return Layout(**{"prompt_name": re.sub(r"[_-]+", " ", name).strip() or name, **given})


def read_config(path: Path) -> dict[str, Any]:
    """The validated content of a JSON file, with tuples for lists; raises `InputError`, which names file and key."""
    if not isinstance(config := read_json(path), dict):
        raise InputError(f"{path}: not a JSON object; see docs/data.md")
    tests: dict[str, Callable[[Any], Any]] = {
        "prompt_name": lambda value: isinstance(value, str) and value.strip() and len(value) <= 200,
        "pixel_metrics": lambda value: isinstance(value, bool),
        "valid_share": lambda value: isinstance(value, int | float) and 0 < value < 1,
        "normal": lambda words: all(isinstance(word, str) and word for word in words),
        "patient": lambda value: isinstance(value, str) and compile_rule(value, "patient"),
        "mask_above": lambda value: type(value) is int and 0 <= value <= 254,
        "mask_labels": lambda labels: all(type(label) is int and 0 <= label <= 65535 for label in labels),
        "unmarked": lambda value: value in UNMARKED,
        "window": lambda words: parse_window([str(word) for word in words]),
        "plane": lambda value: value in PLANES,
    }
    if unknown := sorted(config.keys() - tests.keys()):
        advice = "they belong in a list of images" if {*SPLITS, "masks"} & set(unknown) else "see docs/data.md"
        raise InputError(f"{path}: unknown {unknown[0]!r:.80}; it may hold {', '.join(tests)}; {advice}")
    result = {}
    for key, value in config.items():
        result[key] = value
        if key in ("normal", "mask_labels", "window"):
            result[key] = tuple(value) if isinstance(value, list) else (value,)
        try:
            if not tests[key](result[key]):
                raise InputError(f"{key} cannot be {value!r:.80}; docs/data.md says what it may be")
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    if "window" in result:
        result["window"] = tests["window"](result["window"])
    return result
