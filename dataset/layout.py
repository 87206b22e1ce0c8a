"""Where a data set's images and masks lie: as its JSON file says, or as the folder itself shows.

The file is <NAME>.json in the data set's own folder, or else in dataset/. docs/data.md explains its keys, which are the
fields of `Layout`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from utils import InputError, integer, read_text

from .patients import compile_rule
from .readers import ABNORMAL_ABOVE, PLANES, ReadOptions, check_file, list_files, parse_window, stem

Classes = dict[str, list[Path]]  # `KINDS` -> folders
FOLDER = Path(__file__).parent
PUBLISHED = FOLDER / "published_results.json"  # figures to compare with, the one JSON file that is no data set
SPLITS = ("valid", "test")
KINDS = ("normal", "abnormal")  # label 0, label 1
VALID_SHARE = 0.3
MVFA = {split: {"normal": [f"{split}/good/img"], "abnormal": [f"{split}/Ungood/img"]} for split in SPLITS}
MVFA_MASKS = "{parent}/anomaly_mask/{stem}"
PLACEHOLDERS = ("parent", "folder", "above", "beside")
# The paper's data sets: trees of other papers are accepted under their names, and their known leaks are no error.
BENCHMARKS = ("Brain", "Chest", "Histopathology", "Liver", "Retina_OCT2017", "Retina_RESC")
NO_LAYOUT = (
    "no known layout; expected valid/ and test/ with good/ and Ungood/, normal/ and abnormal/ or 0/ and 1/ in each, "
    "those two alone, or MVTec's train/good and test/<defect>; or describe it in a JSON file, which `python -m "
    "dataset.check` begins and docs/data.md explains"
)
MADE_UP = "PHANTOM.txt"  # marks what dataset.phantom has drawn
# What `detect` knows, each in the order of preference; upper and lower case are the same.
CLASS_NAMES = (("good", "ungood"), ("normal", "abnormal"), ("0", "1"))
SUPPORT_NAMES = ("valid", "val", "train")
MASK_FOLDERS = ("anomaly_mask", "label", "labels", "mask", "masks", "ground_truth")
MASK_PLACES = (
    *(f"{place}/{{stem}}".replace("NAME", name)
      for place in ("{parent}/NAME", "{parent}/{folder}/NAME", "{parent}/NAME/{folder}")
      for name in ("anomaly_mask", "label", "mask", "masks")),
    "{above}/label/{folder}/{stem}",  # BMAD's older Liver: valid/img/Ungood, valid/label/Ungood
    "{above}/{beside}_label/{folder}/{stem}",  # its older RESC: Val/val/Ungood, Val/val_label/Ungood
    "ground_truth/{folder}/{stem}_mask",
    "ground_truth/{folder}/{stem}",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """What the JSON file says, with the defaults filled in."""

    prompt_name: str
    pixel_metrics: bool
    valid: dict[str, list[str]]  # `KINDS` -> folders
    test: dict[str, list[str]]
    masks: str = MVFA_MASKS
    valid_share: float = VALID_SHARE
    patient: str | None = None  # a regular expression; None: the known names
    mask_above: int = ABNORMAL_ABOVE
    window: tuple[float, float] | str | None = None
    plane: str = "axial"

    @classmethod
    def load(cls, name: str, root: Path) -> Layout:
        """What the data set's JSON file says, or without one what lies in `root`; `InputError` for faults."""
        path = config_path(name, root)
        given = read_config(path) if path.is_file() else {}
        if not (given.keys() & set(SPLITS)) and not (path.is_file() and _is_mvfa(root)):
            try:
                given = {**detect(root), **given}
            except InputError:
                if not path.is_file():
                    raise
        given = {**MVFA, **given}
        given.setdefault("prompt_name", re.sub(r"[_-]+", " ", name).strip() or name)
        if "pixel_metrics" not in given:
            given["pixel_metrics"] = any(mask_places(root, given, [given.get("masks", MVFA_MASKS)]))
        return cls(**given)

    @property
    def options(self) -> ReadOptions:
        """How files with more than 8 bits or more than one slice are read."""
        return ReadOptions(self.window, self.plane)

    def folders(self, split: str, kind: str) -> list[str]:
        """The folders of a class in a split, relative to the data set's."""
        return (self.valid if split == "valid" else self.test)[kind]

    def shared(self, kind: str) -> list[str]:
        """The folders of a class that both splits name."""
        return [folder for folder in self.valid[kind] if folder in self.test[kind]]

    def to_json(self) -> str:
        """The text of a JSON file that means this layout."""
        values: dict[str, Any] = {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if entry.name == "masks" or entry.default is MISSING or getattr(self, entry.name) != entry.default
        }
        if any(map(self.shared, KINDS)):
            values["valid_share"] = self.valid_share
        for split in SPLITS:
            values[split] = {k: folders[0] if len(folders) == 1 else folders for k, folders in values[split].items()}
        return json.dumps(values, indent=2)


def add_reading_flags(group: Any) -> None:  # noqa: ANN401 - a parser or a group, which is private in argparse
    """The flags that stand for what a data set's JSON file says."""
    flag, otherwise = group.add_argument, "default: the data set's, else"
    flag("--patient", metavar="REGEX", help="finds the patient in an image's path below its folder (docs/data.md)")
    flag("--mask_above", type=integer(0, 254), metavar="GREY",
         help=f"a mask's grey above which a pixel is abnormal ({otherwise} 127; 25: BMAD, 0: AA-CLIP)")  # fmt: skip
    flag("--window", nargs="+", metavar="W",
         help=f"CENTER WIDTH, auto or full: grey levels beyond 8 bits ({otherwise} the file's)")  # fmt: skip
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


def read_config(path: Path) -> dict[str, Any]:
    """The checked content of a JSON file, folders as lists; `InputError` that names the file and the key."""
    try:
        config: Any = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    known = Layout.__dataclass_fields__
    if unknown := sorted(set(config) - set(known)) if isinstance(config, dict) else ["not an object"]:
        raise InputError(f"{path}: unknown {unknown[0]!r:.80}; it may hold {', '.join(known)}")
    tests: dict[str, Callable[[Any], Any]] = {
        "prompt_name": lambda value: isinstance(value, str) and value.strip() and len(value) <= 200,
        "pixel_metrics": lambda value: isinstance(value, bool),
        "valid_share": lambda value: isinstance(value, int | float) and 0 < value < 1,
        "masks": lambda value: isinstance(value, str) and _is_mask_template(value),
        "patient": lambda value: isinstance(value, str) and compile_rule(value, f"{path}: patient"),
        "mask_above": lambda value: type(value) is int and 0 <= value <= 254,
        "window": _is_window,
        "plane": lambda value: value in PLANES,
    }
    for key, test in tests.items():
        if key in config and not test(config[key]):
            raise InputError(f"{path}: {key} cannot be {config[key]!r:.80}; docs/data.md says what it may be")
    for split in SPLITS:
        if split in config:
            config[split] = _read_folders(config[split], f"{path}: {split}")
    if isinstance(config.get("window"), list):
        config["window"] = tuple(map(float, config["window"]))
    return dict(config)


def _is_window(value: object) -> bool:
    with contextlib.suppress(InputError):
        return parse_window([str(part) for part in value] if isinstance(value, list) else [str(value)]) is not None
    return False


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
    plain = re.sub(rf"\{{({'|'.join(PLACEHOLDERS)})\}}", "", parent) + name.replace("{stem}", "", 1)
    return "{stem}" in name and not re.search(r"[{}]", plain) and _is_below(text)


def list_images(folder: Path) -> list[Path]:
    """The image files in a folder and below it (a folder for each patient), sorted; none where it is missing.

    Folders of masks are left out. `InputError` for a folder that cannot be read, a link to nothing, a pipe, socket or
    device: leaving it out would change the numbers.
    """
    result = []
    for path, place in list_files([folder] if folder.is_dir() else []):
        if not {part.lower() for part in Path(place).parts[:-1]} & set(MASK_FOLDERS):
            check_file(path)
            result.append(path)
    return sorted(result)


def mask_folder(root: Path, folder: str, template: str) -> Path:
    """Where the masks of the images in `folder` lie."""
    path = PurePosixPath(folder)
    places = {"parent": path.parent, "folder": path.name, "above": path.parent.parent, "beside": path.parent.name}
    return root / template.rpartition("/")[0].format(**places)


def find_masks(root: Path, folder: str, template: str, images: Iterable[Path]) -> list[list[Path]]:
    """For each image of `folder` the files that fit as its mask: one, unless something is wrong.

    The mask of an image in a folder below lies in a folder of that name, too.
    """
    masks, by_name = mask_folder(root, folder, template), defaultdict(list)
    for path in list_images(masks):
        by_name[path.parent.relative_to(masks), stem(path)].append(path)
    name, home = template.rpartition("/")[2], root / folder
    return [by_name[image.parent.relative_to(home), name.replace("{stem}", stem(image), 1)] for image in images]


def mask_places(root: Path, splits: Mapping[str, Any], places: Iterable[str]) -> Iterator[str]:
    """Those of some templates by which an abnormal image has a mask; `splits` as in a JSON file."""
    images = {folder: list_images(root / folder) for split in SPLITS for folder in splits[split]["abnormal"]}
    return (place for place in places if any(any(find_masks(root, f, place, i)) for f, i in images.items()))


def _is_mvfa(root: Path) -> bool:
    """Whether the published layout is meant, complete or not: some of its folders, and none that only BMAD's has."""
    folders = [root / folder for split in SPLITS for kind in KINDS for folder in MVFA[split][kind]]
    expected = {folder.parent for folder in folders} | {root / split for split in SPLITS}
    other_names = [_entry(path.parent, path.name.lower()) not in (path, None) for path in expected]
    labels = [(folder.parent / "label").is_dir() for folder in folders]
    return any(folder.is_dir() for folder in folders) and not any(other_names) and not any(labels)


def detect(root: Path) -> dict[str, Any]:
    """What a JSON file for this folder would say; `InputError` where no known layout is found.

    Known are <valid|val|train>/ and test/ with a folder for each class; the same with normal images alone beside test/,
    as in MVTec's train/good, test/good and test/<defect>; and the two classes alone. Classes are called good and
    Ungood, normal and abnormal, or 0 and 1, and hold their images directly, in img/, or in folders below. So do the
    trees of BMAD: masks in label/, classes in valid/img/ or Val/val/, all of it in a single folder below the root.
    Where there are no abnormal images beside the test's, or no splits, folders are shared between the splits.
    """
    splits = _splits(root)
    if splits is None and root.is_dir():
        known = {"test", *SUPPORT_NAMES, *(name for names in CLASS_NAMES for name in names)}
        inside = [path for path in sorted(root.iterdir()) if path.is_dir() and path.name.lower() not in known]
        below = [nested for path in inside if (nested := _splits(path))]
        splits = below[0] if len(below) == 1 else None
    if splits is None:
        raise InputError(f"{root}: {NO_LAYOUT}")
    result: dict[str, Any] = {
        split: {kind: [path.relative_to(root).as_posix() for path in folders] for kind, folders in classes.items()}
        for split, classes in splits.items()
    }
    masks = next(mask_places(root, result, MASK_PLACES), None)
    return {**result, "pixel_metrics": masks is not None, **({"masks": masks} if masks else {})}


def _splits(root: Path) -> dict[str, Classes] | None:
    """The folders of each class of each split; None where they are not all found."""
    test_folder = _entry(root, "test") or root / "test"
    test = _classes(test_folder)
    supports = [_classes(folder) for name in SUPPORT_NAMES if (folder := _entry(root, name))]
    support = next((classes for classes in supports if len(classes) == 2), None)
    normal = next((classes["normal"] for classes in supports if "normal" in classes), None)
    if support and len(test) == 2:
        return {"valid": support, "test": test}
    if "normal" in test and normal:
        inside = [_images_folder(path) for path in sorted(test_folder.iterdir()) if path.is_dir()]
        defects = [path for path in inside if [path] != test["normal"] and list_images(path)]
        splits = {"valid": {"normal": normal, "abnormal": defects}, "test": {**test, "abnormal": defects}}
    else:
        splits = dict.fromkeys(SPLITS, _classes(root))
    complete = all(splits[split].get(kind) for split in SPLITS for kind in KINDS)
    return splits if complete else None


def _entry(folder: Path, name: str) -> Path | None:
    """The folder of that name in another one, whatever its letters' case."""
    if not folder.is_dir():
        return None
    return next((path for path in sorted(folder.iterdir()) if path.name.lower() == name and path.is_dir()), None)


def _classes(folder: Path) -> Classes:
    """The folder with each class's images, as far as there are such folders."""
    for holder in (folder, _entry(folder, "img"), _entry(folder, folder.name.lower())):
        if holder is None or not holder.is_dir():
            continue
        inside = {path.name.lower(): path for path in holder.iterdir() if path.is_dir()}
        for names in CLASS_NAMES:
            result = {kind: [_images_folder(inside[n])] for kind, n in zip(KINDS, names, strict=True) if n in inside}
            if result:
                return result
    return {}


def _images_folder(path: Path) -> Path:
    """Where a class's images lie: in img/ as in MVFA's layout, or in its folder."""
    return path / "img" if (path / "img").is_dir() else path
