"""What is said of a data set, a line each: what was recognised, what was left out, and what lies there and is not used.

A line that begins with `warning: ` is for a look. Lines on samples tell of those that were asked for so far.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from utils import preview

from .entries import Entry
from .layout import BENCHMARKS, SPLITS
from .medical_few import HASHED, MedicalDataset
from .pairing import is_mask_folder, list_pictures
from .readers.masks import read_mask


def describe(dataset: MedicalDataset, names: bool = True) -> list[str]:
    """All lines; without `names` none names a file, a folder that is not used, or a patient."""
    listing = f"images by {dataset.listing}" if dataset.listing else None
    lines = [
        listing, benchmark_note(dataset), split_note(dataset), kinds_note(dataset), masks_note(dataset),
        normal_note(dataset, names), *dataset.left_out_lines(names), dataset.levels_line(),
        *(unused_notes(dataset) if names else []), patients_note(dataset, names),
    ]  # fmt: skip
    return [line for line in lines if line]


def benchmark_note(dataset: MedicalDataset) -> str | None:
    """Where the name is one of the paper's six: whether the counts are, too."""
    if dataset.obj not in BENCHMARKS or dataset.is_made_up:
        return None
    if dataset.is_benchmark:
        counts = "; ".join(f"{split} {' + '.join(map(str, dataset.count(split)))}" for split in SPLITS)
        return f"counts as published: {counts} (normal + abnormal): this is the paper's {dataset.obj}"
    counts = f"other than published: is the copy whole?: {'; '.join(dataset.other_counts)} (normal + abnormal)"
    return f"warning: counts: {counts}; treated as data of your own, not as the paper's {dataset.obj}"


def split_note(dataset: MedicalDataset) -> str | None:
    """The folders that are divided between the splits."""
    divided = [entry for entry in dataset.entries if entry.divided]
    if not divided:
        return None
    names = preview(list(dict.fromkeys(entry.folder for entry in divided)))
    valid = sum(entry.split == "valid" for entry in divided)
    counts = f"of their {len(divided)} images {valid} are valid, for shots, and {len(divided) - valid} test"
    return f"{dataset.obj}: {names} serve both splits: {counts}, by a hash of {HASHED}"


def kinds_note(dataset: MedicalDataset) -> str | None:
    """The folders that count as abnormal, where there are several."""
    folders = dataset.layout.test["abnormal"]
    return f"abnormal are {len(folders)} folders: {', '.join(folders)}" if len(folders) > 1 else None


def masks_note(dataset: MedicalDataset) -> str | None:
    """Where the masks were found; or what the label of a slice means without."""
    abnormal = [entry for entry in dataset.entries if entry.kind == "abnormal"]
    if dataset.pixel_metrics:
        found = Counter(_place(entry) for entry in abnormal if entry.masks)
        rules = ", ".join(f"{count} {place}" for place, count in sorted(found.items()))
        return f"masks: {rules}" if rules else None
    if any(len(dataset.samples_in(entry, judged=False)) > 1 for entry in abnormal):
        return "labels are per slice: without masks every slice of an abnormal series or volume counts as abnormal"
    return None


def _place(entry: Entry) -> str:
    """Where an image's masks lie, in words."""
    home = entry.masks[0].parent
    if home == entry.path.parent:
        return "beside the images"
    named = [part for part in home.parts if is_mask_folder(part)]
    return f"in folders called {named[-1]}" if named else "in other folders"  # a patient's name, perhaps


def normal_note(dataset: MedicalDataset, examples: bool = True) -> str | None:
    """Normal images whose mask marks something; the paper's are not looked at."""
    masked = [entry for entry in dataset.entries if entry.kind == "normal" and entry.masks and not dataset.is_benchmark]
    names = [
        sample.name
        for entry in masked
        for sample in dataset.samples_in(entry)
        if (mask := read_mask(replace(sample, masks=tuple(entry.masks)))) and mask.marks(dataset.layout.mask_above)
    ]
    such = f": {preview(names)}" if examples else ""
    return f"warning: {len(names)} normal images have a mask that marks something{such}" if names else None


def unused_notes(dataset: MedicalDataset) -> list[str]:
    """The pictures in the folder that are neither images nor masks of the data set, folder by folder."""
    images, masks = list_pictures(dataset.root)
    used = {path for entry in dataset.entries for path in (entry.path, *entry.masks)}
    lines = []
    for words, paths in (("not used: pictures in", images), ("masks that fit no image, in name and folder, in", masks)):
        folders = Counter(path.parent.relative_to(dataset.root).as_posix() for path in paths if path not in used)
        if folders:
            lines.append(f"warning: {words} {', '.join(f'{name} ({n})' for name, n in sorted(folders.items()))}")
    return lines


def patients_note(dataset: MedicalDataset, examples: bool = True) -> str:
    """How many patients were recognised, with examples; a warning where none was."""
    if dataset.is_made_up:
        return "patients: none, as the images are made up"
    entries = dataset.entries
    patients = sorted({entry.patient for entry in entries if entry.patient})
    if not patients:
        such = f" (such as {entries[0].name})" if examples else ""
        fault = f"none recognised in the names{such}"
        advice = f"say how to find them with --patient REGEX, or `patient` in {dataset.obj}.json"
        return f"warning: patients: {fault}, so one may be in both splits unnoticed; {advice}"
    without = sum(entry.patient is None for entry in entries)
    unknown = f" ({without} images without)" if without else ""
    source = "PatientIDs" if any(entry.from_header for entry in entries) else "names"
    such = f": {preview(patients)}" if examples else ""
    return f"patients: {len(patients)} recognised in {len(entries)} {source}{unknown}{such}"
