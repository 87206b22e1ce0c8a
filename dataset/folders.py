"""The image files of a data set, with what is known before pixels are read: class, split, masks and patient."""

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
# In order of preference; case is ignored.
CLASS_NAMES = (("good", "ungood"), ("normal", "abnormal"), ("0", "1"))
SUPPORT_NAMES = ("valid", "val", "train")


def read_folders(root: Path, layout: Layout) -> list[Sample]:
    """The image files in the class folders, completed by `complete`.

    Raises:
        InputError: the layout is unknown, a mask matches no image, the patient rule is not a regular expression, a
            few-shot list cannot be read, or an image is a broken link, a pipe or a device (not skipped silently).
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


# --- folders of classes ---


def find_places(root: Path) -> dict[Path, tuple[str, int]]:
    """The folders that hold a class's images -> split ("" if both splits share the folder) and label.

    Raises `InputError` for an unknown layout. Known ones, of `root` itself or of exactly one folder below it:
    - <valid|val|train>/ and test/ with a folder for each class, or the two classes beside test/;
    - only normal images outside test/, as in MVTec (train/good, test/good, test/<defect>): abnormal ones are shared;
    - the two classes alone: all images are shared.
    Classes are called good and Ungood, normal and abnormal, or 0 and 1. If good or normal has no counterpart, every
    other folder with images is abnormal. Images are in a class's img/, or else in its folder or below.
    """
    known = {"test", *SUPPORT_NAMES, *(name for names in CLASS_NAMES for name in names)}
    if result := _places(root):
        return result
    below = [places for name, path in _inside(root).items() if name not in known and (places := _places(path))]
    if len(below) != 1:
        raise InputError(f"{root}: {NO_LAYOUT}")
    return below[0]


def _places(root: Path) -> dict[Path, tuple[str, int]]:
    """`find_places` for this folder only; empty if its layout is unknown."""
    inside, own = _inside(root), _classes(root)
    test, *supports = [_classes(inside[name]) if name in inside else {} for name in ("test", *SUPPORT_NAMES)]
    for needed in ({0, 1}, {0}):
        for support in (*supports, own) if set(test.values()) == {0, 1} else ():
            if set(support.values()) == needed:
                measured = {path: ("test" if label in needed else "", label) for path, label in test.items()}
                return {path: ("valid", label) for path, label in support.items()} | measured
    return {path: ("", label) for path, label in own.items()} if len(set(own.values())) == 2 else {}


def _classes(folder: Path) -> dict[Path, int]:
    """The folders with the images of each class in `folder` -> label; empty if there are none."""
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
    """The subfolders by lower-case name, sorted, without hidden folders, `CLUTTER` and mask folders."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    return {path.name.lower(): path for path in folders if not is_clutter(path.name) and not is_mask_folder(path.name)}


# --- information about the files, from folders or lists ---


def complete(files: Iterable[Sample], root: Path, layout: Layout) -> list[Sample]:
    """The files, normal ones first, with their patients, their names in few-shot lists, and missing splits added."""
    files = _name_patients(sorted(files, key=lambda file: file.label), layout.patient)
    return _divide(files, root, layout.valid_share)


def _name_patients(files: Sequence[Sample], rule: str | None) -> list[Sample]:
    """Find each file's patient: from the list, else by `rule` or, if that is None, from the DICOM header or the name.

    Some anonymisation programs write the same PatientID into all files; then the names are used. If a patient is
    spelled in several ways, the first spelling in sorted order is used for all.
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
    """The metadata of a DICOM file; empty for other formats and for unreadable files, which are reported later."""
    with suppress(InputError):
        return frames(path)[0].slice if file_kind(path) == "dicom" else Slice()
    return Slice()


def _divide(files: Sequence[Sample], root: Path, share: float) -> list[Sample]:
    """Assign files without a split by a hash; listed shots and all images of their patients are in valid.

    All lists in the data set's folder count, whatever --shot and --iterate, so that the test set is always the same.
    Lists name a file by its file name, or by its path if its class has files in several folders outside test.
    """
    homes = [{file.path.parent for file in files if file.label == label and file.split != "test"} for label in (0, 1)]
    files = [replace(f, listed=f.path.name if len(homes[f.label]) == 1 else f.name, divided=not f.split) for f in files]
    lines = [line for path in list_paths(root / "fewshot_seed") for line in parse_shot_list(path)[0].items()]
    named = {(line[0], part) for line, names in lines for name in names for part in (name, name.rpartition("#")[0])}
    shots = {f for f in files if f.divided and (f.shot or (LETTERS[f.label], f.listed) in named)}
    patients = {file.patient for file in shots} - {None}

    def split(file: Sample) -> str:
        is_valid = file in shots or file.patient in patients or falls_in_valid(file.name, share, file.patient)
        return file.split or ("valid" if is_valid else "test")

    return [replace(file, split=split(file)) for file in files]


def number(files: Iterable[Sample]) -> tuple[list[Sample], dict[str, str]]:
    """The files with numbers in place of names and patients, and patient -> number, for --anonymous.

    Numbers follow the order of the files. They reveal no name, and the same files get the same numbers in training, in
    a test and after --resume.
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
