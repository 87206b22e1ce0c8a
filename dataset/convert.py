"""Write a data set of DICOM and NIfTI files as PNGs, in the layout that everything reads.

    python -m dataset.convert scans data/knee_AD --window 40 400 --plane coronal
    python -m dataset.convert BraTS2021 data/FLAIR_AD --like Brain
    python -m dataset.convert LiTS data/CT_AD --like Liver

IN is a data set that dataset.check knows, or a folder with volumes beside their labels: X_flair.nii.gz and
X_seg.nii.gz (BraTS), volume-X.nii and segmentation-X.nii (LiTS). There a slice is abnormal where its labels say so,
and each patient's slices go to valid or to test. `--like` prepares slices as BMAD's data sets were, as far as that is
on record; it was not held against BMAD's own files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from utils import InputError, Parser, bar_seconds, run_cli, write_json

from .layout import SPLITS, VALID_SHARE, add_reading_flags, named_after, object_name
from .medical_few import MedicalDataset
from .patients import compile_rule, falls_in_valid, patient
from .readers import (
    ABNORMAL_ABOVE,
    PLANES,
    ReadOptions,
    list_files,
    parse_window,
    read,
    read_mask,
    square,
    stem,
    stretch,
    to_rgb,
)
from .readers.nifti import Volume, mask_of, read_volume
from .readers.nifti import read as read_slice
from .writer import Writer, new_folder

LABELLED = ((r"(.*)_seg(\.nii(?:\.gz)?)", r"\1_flair\2"), (r"segmentation(-.*\.nii(?:\.gz)?)", r"volume\1"))
SIZE = 240  # pixels a side of BMAD's brain slices
LIVER_HU = (-200.0, 250.0)
TUMOUR = 2  # LiTS: 1 is liver


class Slice(NamedTuple):
    """A picture to be written."""

    split: str
    label: int
    name: str  # without the extension
    patient: str | None
    image: Image.Image
    mask: Image.Image | None  # 0 and 255


def from_samples(dataset: MedicalDataset) -> Iterator[Slice]:
    """The slices of a data set whose folders say what is abnormal."""
    for split in SPLITS:
        for sample in dataset.samples(split):
            picture, mask = read(sample), read_mask(sample)[0]
            if mask is not None:
                mask = mask.point([255 * (grey > dataset.mask_above) for grey in range(256)])
                if mask.size == picture.stored:  # drawn before the pixels were made square
                    mask = mask.resize(picture.image.size, Image.Resampling.NEAREST)
            name = stem(sample.path) + ("" if sample.index is None else f"_{sample.index}")
            yield Slice(split, sample.label, name, sample.patient, picture.image, mask)


def labelled_volumes(folder: Path) -> list[tuple[Path, Path]]:
    """Volumes below a folder and the labels beside them."""
    names = [(path, re.sub(f"^{old}$", new, path.name)) for path, _ in list_files([folder]) for old, new in LABELLED]
    pairs = [(path.with_name(volume), path) for path, volume in names if volume != path.name]
    return [pair for pair in pairs if pair[0].is_file()]


def from_labels(
    folder: Path, pairs: list[tuple[Path, Path]], options: ReadOptions, like: str | None, rule: re.Pattern[str] | None
) -> Iterator[Slice]:
    """The slices of volumes whose labels say what is abnormal; empty slices are left out."""
    for path, label_path in pairs:
        volume, labels = read_volume(path), read_volume(label_path)
        if volume.values.shape != labels.values.shape:
            raise InputError(f"{label_path}: {labels.values.shape} voxels, its volume has {volume.values.shape}")
        name = path.relative_to(folder).as_posix()
        number = patient(name, rule, below=name) or stem(path)
        split = SPLITS[not falls_in_valid(name, VALID_SHARE, number)]
        for index in range(volume.values.shape[PLANES.index(options.plane)]):
            marks, spacing = labels.plane(index, options.plane)
            marks = np.nan_to_num(marks)
            picture = prepare(volume, marks, index, options, like)
            if picture is None:
                continue
            abnormal = marks >= TUMOUR if like == "Liver" else marks != 0
            mask = mask_of(abnormal, spacing).resize(picture.size, Image.Resampling.NEAREST)
            label = int(abnormal.any())
            yield Slice(split, label, f"{stem(path)}_{index}", number, picture, mask if label else None)


def prepare(
    volume: Volume, labels: np.ndarray, index: int, options: ReadOptions, like: str | None
) -> Image.Image | None:
    """A slice as the options or a preset say; None where there is nothing to see."""
    values, spacing = volume.plane(index, options.plane)
    if like == "Liver":
        if not labels.any():
            return None
        inside = Image.fromarray((labels > 0).astype(np.uint8) * 255)
        grey = to_rgb(stretch(values, *LIVER_HU)).convert("L")
        picture = Image.composite(ImageOps.equalize(grey, mask=inside), Image.new("L", grey.size), inside)
        return square(picture.convert("RGB"), spacing)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if not high > low:
        return None
    if like == "Brain":
        from matplotlib import colormaps  # noqa: PLC0415

        colours = colormaps["bone"](stretch(values, low, high))[..., :3]
        return to_rgb(colours).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return read_slice(volume, index, options).image


def write(slices: Iterator[Slice], writer: Writer) -> None:
    """Write the pictures and masks; names that two slices have get a number."""
    names: Counter[tuple[str, int, str]] = Counter()
    for entry in tqdm(slices, desc="convert", unit="image", mininterval=bar_seconds()):
        name = re.sub(r"[^\w.=+-]+", "-", f"{entry.patient}__{entry.name}" if entry.patient else entry.name)[-150:]
        names[entry.split, entry.label, name] += 1
        number = names[entry.split, entry.label, name]
        writer.add(entry.split, entry.label, f"{name}-{number}" if number > 1 else name, entry.image, entry.mask)


def main() -> None:
    """Read the command line and IN, write OUT."""
    parser = Parser(prog="python -m dataset.convert", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("source", type=Path, metavar="IN", help="a data set's folder, or volumes beside their labels")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--obj", type=object_name, help="the data set's name (default: the name of IN)")
    add_reading_flags(parser)
    parser.add_argument("--like", choices=("Brain", "Liver"), help="as BMAD prepared FLAIR or CT volumes")
    options = parser.parse_args()
    if not options.source.is_dir():
        raise InputError(f"IN {options.source}: no folder")
    if options.like and options.window:
        raise InputError(f"--window: --like {options.like} sets the grey levels itself; give one of the two")
    how = ReadOptions(parse_window(options.window or ()), options.plane or "axial")
    pairs = labelled_volumes(options.source)
    if options.like and not pairs:
        expected = "X_flair.nii.gz and X_seg.nii.gz, or volume-X.nii and segmentation-X.nii"
        raise InputError(f"--like {options.like}: {options.source} holds no volumes beside their labels ({expected})")
    if pairs:
        rule = None if options.patient is None else compile_rule(options.patient, "--patient")
        slices = from_labels(options.source, pairs, how, options.like, rule)
    else:
        obj = options.obj or named_after(options.source)
        slices = from_samples(
            MedicalDataset.open(obj, "", options.source, options.patient, options.mask_above, how.window, options.plane)
        )
    with new_folder(options.out, "OUT") as folder:
        writer = Writer(folder)
        write(slices, writer)
        if not any(writer.names.values()):
            raise InputError(f"{options.source}: no slice to write")
        name = named_after(options.out)
        config = {"prompt_name": re.sub(r"[_-]+", " ", name), "patient": r"([^/]+?)__", "mask_above": ABNORMAL_ABOVE}
        write_json(folder / f"{name}.json", config, "OUT")
    print(f"{options.out}: {writer.counts()}")


if __name__ == "__main__":
    run_cli(main)
