"""The image files of a data set, and what is known of each before it is opened: class, split, masks, patient."""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from utils import InputError, preview

from .fewshot import LETTERS, list_paths, parse_shot_list
from .layout import Layout
from .pairing import in_mask_folder, is_clutter, is_mask_folder, list_pictures, pair
from .patients import compile_rule, falls_in_valid, patient, spelled_alike
from .readers.grey import Slice, check_file
from .readers.images import Sample, file_kind, frames

NO_LAYOUT = (
    "no known layout; expected valid/ and test/ with good/ and Ungood/, normal/ and abnormal/ or 0/ and 1/ in each, "
    "those two alone, normal/ beside folders of defects, or MVTec's train/good and test/<defect>; or write a list: "
    "`python -m dataset.check --data_root FOLDER --write_list images.csv` begins one, and docs/data.md explains it"
)
# Each in the order of preference; upper and lower case are the same.
CLASS_NAMES = (("good", "ungood"), ("normal", "abnormal"), ("0", "1"))
SUPPORT_NAMES = ("valid", "val", "train")


def read_folders(root: Path, layout: Layout) -> list[Sample]:
    """The image files in the folders of classes, as `complete` gives them.

    Raises:
        InputError: no known layout, a mask fits no image, a patient's rule is none, a few-shot list cannot
            be read; an image is a link to nothing, a pipe or a device, which nobody may leave out without a word.
    """
    places = find_places(root)
    images, masks = list_pictures(root)
    names = {folder: (folder.parent if folder.name.lower() == "img" else folder).name for folder in places}
    several = len({names[folder] for folder, (_, label) in places.items() if label}) > 1
    files = []
    for path in images:
        if folder := next((folder for folder in path.parents if folder in places), None):
            check_file(path)
            split, label = places[folder]
            kind = names[folder] if label and several else ""
            name, home = (place.relative_to(root).as_posix() for place in (path, folder))
            files.append(Sample(path, label, (), name, kind=kind, split=split, folder=home))
    files = pair(root, files, masks)
    used = {mask for file in files for mask in file.masks}
    if lost := [str(path) for path in masks if path not in used and not places.keys().isdisjoint(path.parents)
                and not in_mask_folder(path.relative_to(root).as_posix())]:  # fmt: skip
        raise InputError(f"{preview(lost)}: named like masks, but no image has that name ({len(lost)} files); "
                         f"rename them, or write a list (docs/data.md)")  # fmt: skip
    return complete(files, root, layout)


# --- where the classes lie ---


def find_places(root: Path) -> dict[Path, tuple[str, int]]:
    """The folders with a class's images -> their split ("": both share them) and label; `InputError` where none fit.

    Known are <valid|val|train>/ and test/ with a folder for each class; the two classes beside test/; normal images
    alone beside test/, as in MVTec's train/good, test/good and test/<defect>; and the classes alone; all of it also in
    a single folder below the root. Classes are called good and Ungood, normal and abnormal, or 0 and 1; beside good or
    normal without its counterpart, every other folder of images is abnormal. They hold their images in img/, or else
    directly or in folders below. Where there are no abnormal images beside the test's, or no splits, folders are shared
    between the splits.
    """
    known = {"test", *SUPPORT_NAMES, *(name for names in CLASS_NAMES for name in names)}
    if result := _places(root):
        return result
    below = [places for name, path in _inside(root).items() if name not in known and (places := _places(path))]
    if len(below) != 1:
        raise InputError(f"{root}: {NO_LAYOUT}")
    return below[0]


def _places(root: Path) -> dict[Path, tuple[str, int]]:
    """`find_places` in this very folder; empty where they are not all found."""
    inside, own = _inside(root), _classes(root)
    test, *supports = [_classes(inside[name]) if name in inside else {} for name in ("test", *SUPPORT_NAMES)]
    for needed in ({0, 1}, {0}):
        for support in (*supports, own) if set(test.values()) == {0, 1} else ():
            if set(support.values()) == needed:
                measured = {path: ("test" if label in needed else "", label) for path, label in test.items()}
                return {path: ("valid", label) for path, label in support.items()} | measured
    return {path: ("", label) for path, label in own.items()} if len(set(own.values())) == 2 else {}


def _classes(folder: Path) -> dict[Path, int]:
    """The folders with each class's images -> its label, as far as there are such folders."""
    inside = _inside(folder)
    for normal, abnormal in CLASS_NAMES:
        result = {inside[name]: label for label, name in enumerate((normal, abnormal)) if name in inside}
        if result and abnormal not in inside and normal != "0":
            others = [path for name, path in inside.items() if name not in (normal, "test", *SUPPORT_NAMES)]
            result |= {path: 1 for path in others if list_pictures(path)[0]}
        if result:
            return {_inside(path).get("img", path): label for path, label in result.items()}
    return {}


def _inside(folder: Path) -> dict[str, Path]:
    """The folders in another one by their names in lower case, sorted, without hidden ones and those of masks."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    return {path.name.lower(): path for path in folders if not is_clutter(path.name) and not is_mask_folder(path.name)}


# --- what is known of the files, in folders and on lists ---


def complete(files: Iterable[Sample], root: Path, layout: Layout) -> list[Sample]:
    """The files, normal ones first, with patients, what few-shot lists call them, and splits where they have none."""
    files = _name_patients(sorted(files, key=lambda file: file.label), layout.patient)
    return _divide(files, root, layout.valid_share)


def _name_patients(files: Sequence[Sample], rule: str | None) -> list[Sample]:
    """Find each file's patient: by the rule, or else the DICOM header, or the name.

    One PatientID for all files is what some programs leave to hide names: then the names tell. Of several spellings of
    one patient the first in order stands for all.
    """
    pattern = compile_rule(rule, "--patient") if rule else None
    headers = {file.path: _header(file.path) for file in files}
    tell = pattern is None and len({header.patient_id for header in headers.values()} - {""}) > 1
    result = []
    for file in files:
        header = headers[file.path]
        below = file.name.removeprefix(f"{file.folder}/")
        who = file.patient or (tell and header.patient_id) or patient(file.name, pattern, below)
        result.append(replace(file, patient=who, slice=header))
    names = sorted({file.patient for file in result if file.patient}, reverse=True)
    spelling = {spelled_alike(name) or name: name for name in names}
    return [replace(f, patient=f.patient and spelling[spelled_alike(f.patient) or f.patient]) for f in result]


def _header(path: Path) -> Slice:
    """What a DICOM file's header says; of others, and of one that is reported where it is read, nothing."""
    with suppress(InputError):
        return frames(path)[0].slice if file_kind(path) == "dicom" else Slice()
    return Slice()


def _divide(files: Sequence[Sample], root: Path, share: float) -> list[Sample]:
    """Give files without a split one by a hash; but what a list of the data set's own names as a shot is valid.

    So is whatever else is a listed image's patient's. All lists count, whichever --shot and --iterate, so that the test
    set is the same for all. Lists call a file by its name, or its path where those of its class lie in several folders.
    """
    homes = [{file.path.parent for file in files if file.label == label and file.split != "test"} for label in (0, 1)]
    files = [replace(f, listed=f.path.name if len(homes[f.label]) == 1 else f.name, divided=not f.split) for f in files]
    lines = [line for path in list_paths(root / "fewshot_seed") for line in parse_shot_list(path)[0].items()]
    named = {(letter, name.partition("#")[0]) for (letter, _), names in lines for name in names}
    shots = {f for f in files if f.divided and (f.shot or (LETTERS[f.label], f.listed) in named)}
    patients = {file.patient for file in shots} - {None}

    def split(file: Sample) -> str:
        is_valid = file in shots or file.patient in patients or falls_in_valid(file.name, share, file.patient)
        return file.split or ("valid" if is_valid else "test")

    return [replace(file, split=split(file)) for file in files]


def number(files: Iterable[Sample]) -> tuple[list[Sample], dict[str, str]]:
    """The files under running numbers instead of names and patients, and patient -> number: for --anonymous.

    They are numbered in order, so that no number tells a name, and the same files give the same numbers, in training,
    in a test, and after --resume.
    """
    files = list(files)
    names = sorted({file.patient for file in files if file.patient})
    patients = {name: f"patient-{number:05}" for number, name in enumerate(names, start=1)}
    counts: Counter[str] = Counter()
    result = []
    for file in files:
        counts[file.split] += 1
        name, patient_id = f"{file.split}-{counts[file.split]:05}{file.path.suffix.lower()}", file.slice.patient_id
        info = replace(file.slice, patient_id=patients.get(patient_id, ""))
        result.append(replace(file, name=name, patient=patients.get(file.patient or ""), slice=info))
    return result, patients
