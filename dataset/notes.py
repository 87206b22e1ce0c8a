"""What is said of a data set, a line each: what was recognised, what was left out, and what lies there and is not used.

A line that begins with `warning: ` is for a look. Lines on samples tell of those that were asked for so far.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from utils import preview

from .layout import BENCHMARKS, KINDS, SPLITS, unused
from .medical_few import HASHED, ImageFile, MedicalDataset
from .readers import read_mask


def describe(dataset: MedicalDataset) -> list[str]:
    """All lines."""
    lines = [
        benchmark_note(dataset), split_note(dataset), kinds_note(dataset), masks_note(dataset), normal_note(dataset),
        *dataset.left_out_lines(), dataset.levels_line(), unused_note(dataset), patients_note(dataset),
    ]  # fmt: skip
    return [line for line in lines if line]


def benchmark_note(dataset: MedicalDataset) -> str | None:
    """Where the name is one of the paper's six: whether the counts are, too."""
    if dataset.obj not in BENCHMARKS or dataset.is_made_up:
        return None
    if dataset.is_benchmark:
        return f"counts as published: this is the paper's {dataset.obj}"
    counts = f"other than published: is the copy whole?: {'; '.join(dataset.other_counts)} (normal + abnormal)"
    return f"warning: counts: {counts}; treated as data of your own, not as the paper's {dataset.obj}"


def split_note(dataset: MedicalDataset) -> str | None:
    """The folders that are divided between the splits."""
    shared = {kind: folders for kind in KINDS if (folders := dataset.layout.shared(kind))}
    if not shared:
        return None
    valid, test = (
        sum(file.folder in folders for kind, folders in shared.items() for file in dataset.image_files(split, kind))
        for split in SPLITS
    )
    names = preview([folder for folders in shared.values() for folder in folders])
    counts = f"of their {valid + test} images {valid} are valid, for shots, and {test} test"
    return f"{dataset.obj}: {names} serve both splits: {counts}, by a hash of {HASHED}"


def kinds_note(dataset: MedicalDataset) -> str | None:
    """The folders that count as abnormal, where there are several."""
    folders = dataset.layout.test["abnormal"]
    return f"abnormal are {len(folders)} folders: {', '.join(folders)}" if len(folders) > 1 else None


def masks_note(dataset: MedicalDataset) -> str | None:
    """The rules that found masks; or what the label of a slice means without."""
    if dataset.pixel_metrics:
        found = Counter(file.place for file in _every(dataset, "abnormal") if file.masks)
        rules = ", ".join(f"{count} by {place}" for place, count in sorted(found.items()))
        return f"masks: {rules}" if rules else None
    if any(len(dataset.samples_in(file, "abnormal", judged=False)) > 1 for file in _every(dataset, "abnormal")):
        return "labels are per slice: without masks every slice of an abnormal series or volume counts as abnormal"
    return None


def normal_note(dataset: MedicalDataset) -> str | None:
    """Normal images whose mask marks something; the paper's are not looked at."""
    names = [
        sample.name
        for file in (() if dataset.is_benchmark else _every(dataset, "normal"))
        for sample in (dataset.samples_in(file, "normal") if file.masks else ())
        if (mask := read_mask(replace(sample, mask=file.masks[0]))) and mask.marks(dataset.mask_above)
    ]
    return f"warning: {len(names)} normal images have a mask that marks something: {preview(names)}" if names else None


def unused_note(dataset: MedicalDataset) -> str | None:
    """The pictures in the folder that are neither images nor masks of the data set."""
    files = [file for kind in KINDS for file in _every(dataset, kind)]
    folders = unused(dataset.root, {path for file in files for path in (file.path, *file.masks)})
    return f"warning: not used: pictures in {', '.join(folders)}" if folders else None


def patients_note(dataset: MedicalDataset) -> str:
    """How many patients were recognised, with examples; a warning where none was."""
    if dataset.is_made_up:
        return "patients: none, as the images are made up"
    known = {path: dataset.patient(path, folder) for path, folder in dataset.pictures}
    patients = sorted(set(filter(None, known.values())))
    if not patients:
        fault = f"none recognised in the names (such as {dataset.name(next(iter(known)))})"
        advice = f"say how to find them with --patient REGEX, or `patient` in {dataset.obj}.json"
        return f"warning: patients: {fault}, so that one may be in both splits without a word; {advice}"
    unknown = "" if all(known.values()) else f" ({sum(name is None for name in known.values())} images without)"
    source = "PatientIDs" if dataset.headers_tell and not dataset.patient_rule else "names"
    return f"patients: {len(patients)} recognised in {len(known)} {source}{unknown}: {preview(patients)}"


def _every(dataset: MedicalDataset, kind: str) -> list[ImageFile]:
    """Every file of a class in both splits, once."""
    folders = dict.fromkeys(folder for split in SPLITS for folder in dataset.layout.folders(split, kind))
    return [file for folder in folders for file in dataset.files_in(folder)]
