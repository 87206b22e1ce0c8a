"""Notes for the user on a data set, one line each: what was recognised, left out, or present but not used.

A line that begins with `warning: ` needs attention. Notes on samples cover only the files read so far.
"""

from collections import Counter
from dataclasses import replace

from utils import preview

from .layout import BENCHMARKS, SPLITS
from .medical_few import HASHED, MedicalDataset
from .pairing import is_mask_folder, list_pictures
from .readers.images import Sample
from .readers.masks import read_mask


def describe(dataset: MedicalDataset) -> list[str]:
    """All notes; with --anonymous none names a file, an unused folder or a patient."""
    lines = [
        f"images by {dataset.listing}" if dataset.listing else None,
        benchmark_note(dataset), split_note(dataset), kinds_note(dataset), masks_note(dataset),
        normal_note(dataset), *dataset.left_out_lines(), *(unused_notes(dataset) if dataset.numbers is None else []),
        patients_note(dataset),
    ]  # fmt: skip
    return [line for line in lines if line]


def benchmark_note(dataset: MedicalDataset) -> str | None:
    """Whether a data set named like one of the paper's six has its number of images; None for others and phantoms."""
    if dataset.obj not in BENCHMARKS or dataset.is_made_up:
        return None
    if dataset.is_benchmark:
        counts = "; ".join(f"{split} {' + '.join(map(str, dataset.count(split)))}" for split in SPLITS)
        return f"counts as published: {counts} (normal + abnormal): this is the paper's {dataset.obj}"
    counts = f"not as published (is the copy complete?): {'; '.join(dataset.other_counts)} (normal + abnormal)"
    return f"warning: counts: {counts}; treated as data of your own, not as the paper's {dataset.obj}"


def split_note(dataset: MedicalDataset) -> str | None:
    """The folders whose images are divided between the splits."""
    divided = [file for file in dataset.files if file.divided]
    if not divided:
        return None
    names = preview(list(dict.fromkeys(file.folder for file in divided)))
    valid = sum(file.split == "valid" for file in divided)
    counts = f"{valid} of their {len(divided)} images are in valid, for shots, and {len(divided) - valid} in test"
    return f"{dataset.obj}: {names} serve both splits: {counts}, by a hash of {HASHED}"


def kinds_note(dataset: MedicalDataset) -> str | None:
    """The folders that count as abnormal, if there are several."""
    measured = [file for file in dataset.files if file.label and (file.divided or file.split == "test")]
    folders = list(dict.fromkeys(file.folder for file in measured))
    return f"{len(folders)} folders are abnormal: {', '.join(folders)}" if folders[1:] and not dataset.listing else None


def masks_note(dataset: MedicalDataset) -> str | None:
    """Where the masks were found, or what labels mean for slices if there are no masks."""
    abnormal = [file for file in dataset.files if file.label]
    if dataset.pixel_metrics:
        places = Counter(_place(file) for file in abnormal if file.masks)
        rules = ", ".join(f"{count} {place}" for place, count in sorted(places.items()))
        return f"masks: {rules}" if rules else None
    if any(len(dataset.images_in(file)) > 1 for file in abnormal):
        return "labels are per slice: without masks every slice of an abnormal series or volume counts as abnormal"
    return None


def _place(file: Sample) -> str:
    """The location of an image's masks, in words."""
    home = file.masks[0].parent
    if home == file.path.parent:
        return "beside the images"
    named = [part for part in home.parts if is_mask_folder(part)]
    return f"in folders called {named[-1]}" if named else "in other folders"  # not named: it may be a patient's name


def normal_note(dataset: MedicalDataset) -> str | None:
    """Normal images whose mask marks something; the paper's data sets are not inspected."""
    masked = [file for file in dataset.files if not file.label and file.masks and not dataset.is_benchmark]
    names = [
        sample.name
        for file in masked
        for sample in dataset.samples_in(file)
        if (mask := read_mask(replace(sample, masks=file.masks))) and mask.marks(dataset.layout.mask_above)
    ]
    return f"warning: {len(names)} normal images have a mask that marks something: {preview(names)}" if names else None


def unused_notes(dataset: MedicalDataset) -> list[str]:
    """The pictures in the folder that are neither images nor masks of the data set, folder by folder."""
    images, masks = list_pictures(dataset.root)
    used = {path for file in dataset.files for path in (file.path, *file.masks)}
    lines = []
    for words, paths in (("not used: pictures in", images), ("masks that fit no image by name and folder, in", masks)):
        folders = Counter(path.parent.relative_to(dataset.root).as_posix() for path in paths if path not in used)
        if folders:
            lines.append(f"warning: {words} {preview([f'{name} ({n})' for name, n in sorted(folders.items())], 20)}")
    return lines


def patients_note(dataset: MedicalDataset) -> str:
    """How many patients were recognised, with examples; a warning if there are none."""
    if dataset.is_made_up:
        return "patients: none, as the images are made up"
    files = dataset.files
    patients = sorted({file.patient for file in files if file.patient})
    if not patients:
        fault = f"none recognised in the names (such as {files[0].name})"
        advice = f"say how to find them with --patient REGEX, or `patient` in {dataset.obj}.json"
        return f"warning: patients: {fault}, so one may be in both splits unnoticed; {advice}"
    without = sum(file.patient is None for file in files)
    unknown = f" ({without} images without)" if without else ""
    source = "PatientIDs" if any(file.patient == file.slice.patient_id for file in files) else "names"
    return f"patients: {len(patients)} recognised in {len(files)} {source}{unknown}: {preview(patients)}"
