"""Examine a data set before any training.

    python -m dataset.check --obj Brain --data_path data
    python -m dataset.check --data_root bottle                a folder of your own
    python -m dataset.check --data_root bottle --write_list images.csv      recognised layout, to correct by hand

Errors would stop a training or falsify its results: exit code 1. Warnings leave it at 0, and so do known faults of the
paper's six data sets (`TOLERATED`). A bad argument gives code 2. Of an image's pixels, only a hash is kept.
"""

import argparse
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from pathlib import Path

from tqdm import tqdm

from utils import InputError, Parser, bar_seconds, integer, prefetch, printable, run_cli

from . import notes
from .fewshot import LETTERS, SEEDS, check_shot_names, parse_shot_list
from .layout import KINDS, SPLITS, add_reading_flags, config_path, object_given, object_name
from .lists import write_list
from .medical_few import SOUGHT, MedicalDataset, data_folder
from .pairing import list_pictures, pair
from .patients import compile_rule
from .readers.images import Sample, file_kind, parse_window, picture_notes, read
from .readers.masks import ABNORMAL_ABOVE, mask_notes, read_mask

Findings = defaultdict[str, list[str]]  # key of `TITLES` -> descriptions

SHOWN = 3  # examples of a finding
NAMED = ("no mask", "valid mask")  # shown in full: a missing mask is easily overlooked

# Kind of finding -> its title, in the order of the report.
TITLES = {
    "layout": "error: the layout",
    "unusable": "error: images or masks that cannot be used",
    "no mask": f"error: abnormal images without a mask ({SOUGHT})",
    "unclear": "error: abnormal images whose masks also match other images, or share one name",
    "mask size": "error: masks of another size than their image",
    "mask range": "error: masks with no pixel above --mask_above, though not empty: they count as empty",
    "leak": "error: the same picture in valid and in test",
    "patient": "error: patients in valid and in test",
    "two labels": "error: the same picture among the normal and the abnormal",
    "bad list": "error: few-shot lists",
    "duplicate": "warning: the same picture twice in a class",
    "valid mask": "warning: abnormal images in valid without a mask: not used as shots or for calibration",
    "any size": "warning: masks of another size than their image: resized, as the published loader does",
    "empty": "warning: abnormal images with an empty mask",
    "full": "warning: masks that cover more than 90% of their image",
    "alpha": "warning: masks that lie in the alpha channel",
    "wide": "warning: 8-bit values in 16- or 32-bit files, read as 8 bits, as the published program reads them",
    "dark": "warning: 16-bit images with small values: almost black once scaled",
    "window": "warning: grey levels scaled by their range, not by a window",
    "pixels": "warning: slices resampled to square pixels by a factor above 3",
    "binary": "warning: pictures in black and white: are they masks?",
    "constant": "warning: pictures that are nearly constant",
    "clipped": "warning: pictures that are clipped",
    "orientation": "warning: images or masks with an orientation tag, which is never applied: do image and mask match?",
    "ignored": "warning: files without the extension of an image, left out",
    "list": "warning: few-shot lists",
}
TOLERATED = ("leak", "patient", "two labels")  # reported for the paper's own data sets, but not as errors


@dataclass
class Seen:
    """What was found in one image and its mask."""

    name: str
    findings: dict[str, str]  # kind -> description
    mode: str = ""
    size: tuple[int, int] | None = None  # width, height; None if the image is unreadable or no sample
    digest: bytes = b""  # hash of the pixels, which a lossless copy shares
    has_mask: bool = False


def examine(dataset: MedicalDataset, workers: int, findings: Findings) -> dict[tuple[str, int], list[Seen]]:
    """Add the findings in all classes, splits and few-shot lists to `findings`; returns the images of each class.

    If a class is missing, the remaining checks are skipped.
    """
    seen: dict[tuple[str, int], list[Seen]] = {}
    try:
        for split, label in product(SPLITS, (0, 1)):
            files = dataset.image_files(split, label, (split, label) != ("valid", 1))
            results, pause = prefetch(partial(look_into, dataset), files, workers), bar_seconds()
            bar = tqdm(results, f"{split} {KINDS[label]}", len(files), unit="file", mininterval=pause, delay=pause)
            seen[split, label] = list(chain.from_iterable(bar))
    except InputError as error:
        findings["layout"].append(str(error))
        return seen
    finally:
        compare(seen, findings)
    findings["unclear"] += dataset.unclear
    valid, test = ({file.patient for file in dataset.files if file.split == split} for split in SPLITS)
    findings["patient"] += sorted(filter(None, valid & test))
    own = dataset.listing, config_path(dataset.obj, dataset.root)
    for folder in sorted({file.path.parent for file in dataset.files}):
        others = [path for path in sorted(folder.glob("[!.]*")) if path.is_file() and path not in own]
        findings["ignored"] += [str(path) for path in others if file_kind(path) is None]
    shots = check_lists(dataset, findings)
    for file in dataset.files if dataset.pixel_metrics else ():
        if file.label and not file.masks:
            may_lack = file.split == "valid" and file.path not in shots
            findings["valid mask" if may_lack else "no mask"].append(str(file.path))
    return seen


def look_into(dataset: MedicalDataset, file: Sample) -> list[Seen]:
    """Decode every image in a file, and its mask if it has one."""
    try:
        images = dataset.images_in(file)
        used = {sample.index for sample in dataset.samples_in(file)}
        seen = [look_at(sample, dataset.layout.mask_above, is_alone=len(images) == 1) for sample in images]
    except InputError as error:
        return [Seen(file.name, {"unusable": str(error)})]
    for sample, one in zip(images, seen, strict=True):
        if sample.index not in used:  # not used, perhaps because its mask is wrong: report that
            one.size, one.findings = None, {kind: text for kind, text in one.findings.items() if kind == "mask range"}
    return seen


def look_at(sample: Sample, above: int, is_alone: bool) -> Seen:
    """Decode an image and its mask; no `picture_notes` unless it `is_alone` in its file, as some slices are dark."""
    picture = read(sample)
    digest = hashlib.sha256(f"{picture.image.size}".encode() + picture.image.tobytes()).digest()
    remarks = dict(picture.notes)
    if is_alone and "dark" not in remarks:
        remarks |= picture_notes(picture.image)
    if picture.orientation != 1:
        remarks["orientation"] = f"orientation {picture.orientation}"
    findings = {kind: f"{sample.path}: {text}" for kind, text in remarks.items()}
    mask = read_mask(sample)
    if mask:
        remarks = mask.notes | mask_notes(mask, above)
        if labels := remarks.pop("labels", ""):
            remarks.pop("wide", None)
            remarks["mask range"] = labels
        if mask.image.size not in (picture.image.size, picture.stored):
            remarks["any size" if sample.published else "mask size"] = (
                f"{_size([mask.image.size])}, its image {_size([picture.image.size])}"
            )
        findings |= {kind: f"{sample.masks[0]}: {text}" for kind, text in remarks.items()}
    return Seen(sample.name, findings, picture.mode, picture.image.size, digest, mask is not None)


def compare(seen: dict[tuple[str, int], list[Seen]], findings: Findings) -> None:
    """Add the findings of each image, and identical pictures."""
    first: dict[bytes, tuple[str, int, str]] = {}  # digest -> split, label, name of the first such picture
    for (split, label), images in seen.items():
        for one in images:
            for kind, words in one.findings.items():
                findings[kind].append(words)
            if one.size:
                other_split, other_label, other = first.setdefault(one.digest, (split, label, one.name))
                pair_of = f"{other} = {one.name}"
                if other_label != label:
                    findings["two labels"].append(pair_of)
                if other_split != split:
                    findings["leak"].append(pair_of)
                elif other_label == label and other != one.name:
                    findings["duplicate"].append(pair_of)


def check_lists(dataset: MedicalDataset, findings: Findings) -> set[Path]:
    """Check every line of every few-shot list that a training could use; returns the paths of the listed images."""
    known: dict[str, dict[str, Sample]] = {}  # letter of `LETTERS` -> name -> image
    for label, letter in enumerate(LETTERS):
        with suppress(InputError):  # a file that is reported already, or no abnormal images in valid, which is allowed
            known[letter] = dataset.known_shots(label)
    shots = set()
    for path in sorted(dataset.shot_lists().values()):
        try:
            lines, warnings = parse_shot_list(path)
        except InputError as error:
            findings["bad list"].append(str(error))
            continue
        if SEEDS in path.parents and set(chain(*known.values())).isdisjoint(chain(*lines.values())):
            continue  # made for another data set of that name: shots are sampled instead
        count = int(path.name.removeprefix("my").removesuffix("-shot.txt"))
        for (letter, index), names in lines.items():
            if letter in known:
                try:
                    where = f"{path}, {letter}-{index}"
                    warnings += check_shot_names(names, known[letter], count, where, dataset.root)
                except InputError as error:
                    findings["bad list"].append(str(error))
                shots |= {known[letter][name].path for name in names if name in known[letter]}
        findings["list"] += warnings
    return shots


# --- output ---


def print_table(seen: dict[tuple[str, int], list[Seen]]) -> None:
    """Print the number of images and masks in each class, with their sizes and modes."""
    rows: list[Sequence[object]] = [("split", "class", "images", "masks", "width x height", "modes")]
    for (split, label), every in seen.items():
        sizes = Counter(one.size for one in every if one.size)
        modes = Counter(one.mode for one in every if one.size)
        images = sizes.total() + sum("unusable" in one.findings for one in every)
        masks = sum(one.has_mask for one in every if one.size)
        size = _size(sizes) + (f" ({len(sizes)} sizes)" if len(sizes) > 1 else "")
        mode = ", ".join(mode if count == images else f"{mode} {count}" for mode, count in modes.items())
        rows.append((split, KINDS[label], images, masks or "-", size, mode))
    for row in rows:
        print("{:5}  {:8}  {:<6}  {:<5}  {:14}  {}".format(*row).rstrip())


def _size(sizes: Iterable[tuple[int, int]]) -> str:
    """Width and height in words, each as a range if sizes differ."""
    sides = (sorted({min(side), max(side)}) for side in zip(*sizes, strict=True))
    return " x ".join("-".join(map(str, ends)) for ends in sides)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(prog="python -m dataset.check", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--obj", type=object_name, help="data set (default: the name of its folder)")
    parser.add_argument("--data_path", default="./data/", help="folder that holds <obj>_AD (default: ./data/)")
    parser.add_argument("--data_root", help="the data set's own folder, instead of <data_path>/<obj>_AD")
    add_reading_flags(parser)
    parser.add_argument("--write_list", type=Path, metavar="FILE",
                        help="write what was recognised as a list to correct, such as images.csv")  # fmt: skip
    parser.add_argument("--num_workers", type=integer(1, 256), default=2, help="threads that decode (default: 2)")
    options = parser.parse_args(arguments)
    parse_window(options.window or ())  # wrong flags are reported before the folder is read
    compile_rule(options.patient or "", "--patient")
    if options.list and not Path(options.list).is_file():
        raise InputError(f"--list {options.list}: no such file")
    options.obj = options.obj or object_given(options)
    if options.obj is None:
        raise InputError("give --obj NAME, or --data_root DIR")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a data set and print the findings; returns the exit code."""
    options = parse(arguments)
    root = Path(options.list).parent if options.list else data_folder(options.obj, options.data_path, options.data_root)
    findings: Findings = defaultdict(list)
    known: tuple[str, ...] = ()
    lines, remarks, files = list[str](), list[str](), list[Sample]()
    try:
        dataset = MedicalDataset.from_options(options)
    except InputError as error:
        findings["layout"].append(str(error))
        with suppress(InputError):  # such as an unreadable folder: already an error
            images, masks = list_pictures(root)  # for --write_list, with labels to fill in
            files = pair(root, [Sample(path, -1, (), path.name) for path in images], masks)
        counts = Counter(file.path.parent.relative_to(root).as_posix() for file in files)
        lines = [f"{options.obj}: {root}", *(f"    {name}: {count} pictures" for name, count in sorted(counts.items()))]
    else:
        files, known = dataset.files, TOLERATED if dataset.is_benchmark else ()
        seen = examine(dataset, options.num_workers, findings)
        remarks = [] if findings["layout"] else notes.describe(dataset)
        metrics = "images and pixels are measured" if dataset.pixel_metrics else "images are measured, no masks"
        if dataset.pixel_metrics and dataset.layout.mask_above != ABNORMAL_ABOVE:
            metrics += f", a mask's grey above {dataset.layout.mask_above} is abnormal"
        print(printable(f'{options.obj}: {root}; prompts say "{dataset.layout.prompt_name}"; {metrics}'))
        print_table(seen)
    totals = Counter(remark.partition(": ")[0] for remark in remarks)
    for kind, title in TITLES.items():
        if examples := findings[kind]:
            level, _, words = title.partition(": ")
            level = "published" if kind in known else level
            totals[level] += len(examples)
            shown = examples if kind in NAMED else examples[:SHOWN]
            lines += [f"{level}: {words}: {len(examples)}", *(f"    {example}" for example in shown)]
            lines += ["    ..."] * (len(shown) < len(examples))
    for line in (*lines, *remarks):
        print(printable(line))
    errors, warnings = totals["error"], totals["warning"]
    print(f"errors: {errors}, warnings: {warnings}" if errors or warnings else "fine")
    if options.write_list:
        print(printable(f"written: {write_list(options.write_list, root, files)}"))
    return 1 if errors else 0


if __name__ == "__main__":
    run_cli(main)
