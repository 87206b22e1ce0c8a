"""Score one's own images with a MadCLIP checkpoint. Research use, not a medical device.

    python predict.py --ckpt ckpt/Brain.pth scan.png more_scans/ --out predictions --report page
    python predict.py --ckpt ckpt/Liver.pth series/ --window 40 400 --group_by series --out predictions
    python predict.py --ckpt ckpt/Brain.pth head.nii.gz --plane coronal --out predictions
    python predict.py --ckpt ckpt/Brain.pth --calibrate labelled --threshold_at tpr=0.95 --save_ckpt Brain-95.pth

For each image: the score, the decision at the checkpoint's threshold, the heat map (overlay and raw) and its contours;
of volumes and DICOM series the heat map in the scan's own space too. docs/predict.md describes the files.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dataset.layout import object_of
from dataset.pairing import MASK_FOLDERS
from dataset.readers import PLANES, ReadOptions, parse_window, picture_notes, read, to_tensor
from engine.files.config import (
    PAPER,
    Formatter,
    add_machine_flags,
    add_model_flags,
    nonempty_path,
    positive,
    threshold_rule,
)
from engine.scans import Entry, InputList, OpenImage, list_entries
from utils import (
    InputError,
    Parser,
    atomic_path,
    bar_seconds,
    integer,
    prefetch,
    printable,
    probe_writable,
    run_cli,
    warn,
    write_json,
)

if TYPE_CHECKING:
    from engine.files.config import Settings
    from engine.predictor import Prediction, Predictor
    from engine.report.page import Card

NOTE = "research use, not a medical device"
COLUMNS = (
    "file", "frame", "score", "threshold", "abnormal", "width", "height", "PatientID", "StudyInstanceUID",
    "SeriesInstanceUID", "InstanceNumber", "slice_position", "plane", "orientation", "regions", "overlay", "raw",
    "contours", "heat_volume", "notes",
)  # fmt: skip
GROUP_COLUMNS = ("group", "images", "largest", "mean", "percentile_95", "kth_largest", "k", "deciding_file",
                 "deciding_frame", "threshold", "abnormal")  # fmt: skip
GROUP_NOTE = (
    "a group is abnormal if its largest score is; the threshold was calibrated for single images, so that the more "
    "images a group has, the more often one exceeds it by chance"
)
REMARKS = {
    "window": "the range of greys", "constant": "nearly constant", "clipped": "mostly white or black",
    "dark": "all but black", "wide": "8 bits in a wider file", "pixels": "pixels far from square",
}  # fmt: skip
HARMLESS = ("window", "wide", "pixels")
NAMES = {"dicom": "DICOM", "nifti": "NIfTI", "pillow": "picture"}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="predict.py", description=__doc__.split("\n\n")[0], formatter_class=Formatter)
    flag = parser.add_argument
    flag("images", nargs="*", type=nonempty_path, metavar="IMAGE_OR_FOLDER",
         help="PNG, JPEG, BMP, TIFF, WebP, GIF, JPEG 2000; DICOM (with pydicom), NIfTI (with nibabel)")  # fmt: skip
    flag("--ckpt", required=True, type=nonempty_path, help="checkpoint of train.py, or one in the published format")
    flag("--obj", help="of a published checkpoint: the data set that it was trained on")
    flag("--weights", type=nonempty_path, help="file with CLIP weights, instead of that in CLIP/ckpt")
    flag("--allow_other_weights", action="store_true", help="only warn when these are not the trained ones")
    flag("--batch_size", type=integer(1, 65536), default=16, help="images through the network at a time")
    add_reading_flags(parser)
    add_result_flags(parser)
    add_machine_flags(parser)
    add_model_flags(parser, from_checkpoint=True)  # for published files, which do not say
    options = parser.parse_intermixed_args(arguments)
    # --window takes one word or two, and what follows these are images.
    words = options.window or []
    taken = 1 if words[:1] in (["auto"], ["full"]) else 2
    options.images += map(nonempty_path, words[taken:])
    options.window = parse_window(words[:taken])
    return check(options)


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """How files are read, and where the threshold lies."""
    flag = parser.add_argument_group("reading").add_argument
    flag("--window", nargs="+", metavar=("C W|auto|full", ""),
         help="centre and width of grey values beyond 8 bits; auto: robust percentiles of the series or volume; full: "
         "its whole range (default: as in training, else the file's own window)")  # fmt: skip
    flag("--plane", choices=PLANES, help="in which NIfTI volumes are cut (default: as in training, else axial)")
    flag = parser.add_argument_group("decisions").add_argument
    flag("--threshold", type=float, help="abnormal is score >= threshold (default: the checkpoint's)")
    flag("--threshold_at", type=threshold_rule, metavar="RULE",
         help="set it on --calibrate's images: f1 (max., the default there), fpr=0.05, tpr=0.95")  # fmt: skip
    flag("--calibrate", type=nonempty_path, metavar="FOLDER",
         help="labelled images, in any layout that dataset.check knows")  # fmt: skip
    flag("--save_ckpt", type=nonempty_path, metavar="FILE",
         help="a copy of the checkpoint with the thresholds of --calibrate")  # fmt: skip


def add_result_flags(parser: argparse.ArgumentParser) -> None:
    """What is written."""
    flag, switch = parser.add_argument_group("results").add_argument, argparse.BooleanOptionalAction
    flag("--out", type=nonempty_path, help="folder of the results")
    flag("--pictures", action=switch, default=True, help="write heat maps and contours")
    flag("--volumes", action=switch, default=True,
         help="with --pictures, write heat maps of NIfTI volumes and DICOM series in the scan's own space")  # fmt: skip
    flag("--group_by", choices=("series", "patient", "folder"), help="a row for each, in groups.csv")
    flag("--kth", type=positive, default=3, metavar="K", help="which largest score a group lists too")
    flag("--report", type=nonempty_path, metavar="FOLDER",
         help="a page (index.html) with every image, highest scores first")  # fmt: skip
    flag("--anonymous", action="store_true", help="hashes instead of file names, patients and UIDs in all results")


def check(options: argparse.Namespace) -> argparse.Namespace:
    """Flags that belong together; `InputError` for others."""
    if options.threshold is not None and not math.isfinite(options.threshold):
        raise InputError(f"--threshold {options.threshold:g}: not a finite number")
    if options.threshold_at and not options.calibrate:
        raise InputError(f"--threshold_at {options.threshold_at}: needs labelled images, --calibrate FOLDER")
    if options.threshold is not None and options.calibrate:
        raise InputError("--threshold and --calibrate both set the threshold: give one of them")
    if options.save_ckpt and not options.calibrate:
        raise InputError("--save_ckpt: nothing new to keep without --calibrate FOLDER")
    if options.save_ckpt and os.path.realpath(options.save_ckpt) == os.path.realpath(options.ckpt):
        raise InputError(f"--save_ckpt {options.save_ckpt}: is the checkpoint itself; give another name")
    if options.save_ckpt:
        from engine.files.checkpoint import read as read_ckpt  # noqa: PLC0415 - imports torch

        probe_writable(options.save_ckpt, "--save_ckpt", "checkpoint", read_ckpt)
    if not options.images and not options.calibrate:
        raise InputError("name images or folders of images")
    if options.images and not options.out:
        raise InputError("name the folder of the results: --out FOLDER")
    return options


# --- reading ---


def open_images(listing: InputList, model: Predictor, options: argparse.Namespace) -> Iterator[OpenImage]:
    """The images, read beside the network; what cannot be read is printed, and added to the listing's faults."""
    from engine.report.images import MAX_OVERLAY_SIDE, shrink  # noqa: PLC0415

    keep = options.pictures or bool(options.report)

    def read_entry(entry: Entry) -> OpenImage | str:
        try:
            picture = read(entry.frame)
        except InputError as error:
            return str(error)
        preview = shrink(picture.image, MAX_OVERLAY_SIDE)
        notes = {**picture.notes, **picture_notes(preview)}
        tensor = to_tensor(picture.image, model.settings.img_size)
        return OpenImage(entry, tensor, preview if keep else None, picture.image.size, notes)

    ahead = min(options.batch_size, 16)
    for result in prefetch(read_entry, listing.entries, options.num_workers, ahead):
        if isinstance(result, OpenImage):
            yield result
        else:
            listing.faults.append(result)
            _print(f"skipped: {result}")


def reading_notes(settings: Settings, trained: ReadOptions, reading: ReadOptions, kinds: set[str]) -> list[str]:
    """Where these images are read in another way than those of the training, in words."""
    scans = kinds & {"dicom", "nifti"}
    if scans and settings.obj in PAPER:
        words = " and ".join(NAMES[kind] for kind in sorted(scans))
        return [
            f"the checkpoint was trained on {settings.obj}'s prepared PNG files, and these are {words}: their pixels "
            f"differ, so scores and threshold may not hold"
        ]
    notes = []
    for name, words in (("window", "--window"), ("plane", "--plane")):
        given, before = getattr(reading, name), getattr(trained, name)
        if settings.reading is not None and given != before and (name == "window" or "nifti" in kinds):
            notes.append(f"{words} {_words(given)}, but the checkpoint was trained with {words} {_words(before)}")
    known = set((settings.reading or {}).get("formats") or kinds)
    if kinds - known:
        before, now = (", ".join(NAMES.get(kind, kind) for kind in sorted(group)) for group in (known, kinds - known))
        notes.append(f"the checkpoint was trained on {before} files, not on {now}")
    return notes


def _words(value: object) -> str:
    return " ".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value or "as in the file")


# --- tables ---


def row_of(image: OpenImage, prediction: Prediction, threshold: float | None) -> dict[str, Any]:
    """An image's row of the table, without its pictures."""
    return dict.fromkeys(COLUMNS) | image.entry.columns() | {
        "score": prediction.score, "threshold": threshold, "abnormal": prediction.abnormal,
        "width": prediction.size[0], "height": prediction.size[1], "notes": "; ".join(image.notes.values()) or None,
    }  # fmt: skip


def group_rows(table: Table, threshold: float | None) -> list[dict[str, Any]]:
    """A row for each group of --group_by, the highest first."""
    import numpy as np  # noqa: PLC0415

    members = defaultdict(list)
    for entry, row in zip(table.entries, table.rows, strict=True):
        members[entry.group(table.options.group_by)].append(row)
    result = []
    for group, rows in members.items():
        rows.sort(key=lambda row: -row["score"])
        scores = [row["score"] for row in rows]
        k = min(table.options.kth, len(rows))
        result.append({
            "group": group, "images": len(rows), "largest": scores[0], "mean": float(np.mean(scores)),
            "percentile_95": float(np.percentile(scores, 95)), "kth_largest": scores[k - 1], "k": k,
            "deciding_file": rows[0]["file"], "deciding_frame": rows[0]["frame"], "threshold": threshold,
            "abnormal": None if threshold is None else scores[0] >= threshold,
        })  # fmt: skip
    return sorted(result, key=lambda row: -row["largest"])


class Table:
    """predictions.csv and .json, and groups.csv: written beside the files of an earlier run, which they replace whole.

    While it grows the table is predictions.partial.csv, which a run that is killed leaves behind.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.out, self.options = Path(options.out), options
        self.rows: list[dict[str, Any]] = []
        self.entries: list[Entry] = []
        self.partial = self.out / "predictions.partial.csv"
        for name in ("predictions.csv", "predictions.json"):
            probe_writable(self.out / name, "--out")
        self.file = _open_csv(self.partial)
        self.table = csv.DictWriter(self.file, COLUMNS)
        self.table.writeheader()

    def add(self, entry: Entry, row: dict[str, Any]) -> None:
        """One image."""
        self.rows.append(row)
        self.entries.append(entry)
        try:
            self.table.writerow(row)
            self.file.flush()
        except OSError as error:
            raise InputError(f"--out {self.partial}: cannot be written ({error.strerror}; disk full?)") from error

    def close(self, metadata: dict[str, Any], threshold: float | None) -> None:
        """Put the finished files in their places: never a table of one run beside a JSON file of another."""
        self.file.close()
        if self.options.group_by:
            groups = group_rows(self, threshold)
            with atomic_path(self.out / "groups.csv", "--out") as path, _open_csv(path) as file:
                writer = csv.DictWriter(file, GROUP_COLUMNS)
                writer.writeheader()
                writer.writerows(groups)
            metadata |= {"group_by": self.options.group_by, "group_note": GROUP_NOTE, "groups": groups}
        with atomic_path(self.out / "predictions.json", "--out") as path:
            write_json(path, {**metadata, "predictions": self.rows}, "--out")
            (self.out / "predictions.json").unlink(missing_ok=True)
            self.partial.replace(self.out / "predictions.csv")


def _open_csv(path: Path) -> TextIO:
    return path.open("w", newline="", encoding="utf-8", errors="backslashreplace")  # names may be no UTF-8


class Remarks:
    """Prints notes on single images: the first of a kind, and five ranges of grey; the others are counted."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.printed: dict[str, set[str]] = defaultdict(set)

    def add(self, entry: Entry, notes: dict[str, str]) -> None:
        """Say what is new."""
        for kind, text in notes.items():
            self.counts[kind] += 1
            if text not in self.printed[kind] and len(self.printed[kind]) < (5 if kind == "window" else 1):
                _print(f"{'' if kind in HARMLESS else 'warning: '}{entry.file}: {text}")
                self.printed[kind].add(text)

    def sum_up(self) -> None:
        """Say of how many images each kind was noted, where of several."""
        for kind, count in self.counts.items():
            if count > 1:
                _print(f"{count} images: {REMARKS.get(kind, kind)}, see the column notes")


def _print(text: str) -> None:
    from tqdm import tqdm  # noqa: PLC0415

    tqdm.write(printable(text), file=sys.stderr)


# --- the run ---


def main(options: argparse.Namespace) -> None:
    """Arguments -> checkpoint -> images -> files."""
    from engine.predictor import build, read_checkpoint, reading_of  # noqa: PLC0415 - imports torch

    checkpoint = read_checkpoint(options)
    trained = reading_of(checkpoint.settings)
    reading = ReadOptions(options.window or trained.window, options.plane or trained.plane)
    listing = list_entries(options.images, reading, options.anonymous)
    for line in (*listing.no_image, *(f"skipped: {fault}" for fault in listing.faults)):
        _print(line)
    if listing.own:
        _print(f"{listing.own} files are results of an earlier run, and left out")
    if listing.masks:
        _print(f"{listing.masks} files lie in folders of masks ({', '.join(MASK_FOLDERS)}), and are left out")
    if options.images and not listing.entries:
        if listing.no_image and not listing.faults:
            print(f"no image in any of {len(listing.no_image)} files, see above")
            return
        raise InputError(listing.faults[0] if listing.faults else f"{options.images[0]}: no image in it")
    table = Table(options) if options.images else None
    model = build(checkpoint, options)
    model.reading = reading
    if options.calibrate:
        calibrate(model, options)
    if table is not None:
        for note in reading_notes(model.settings, trained, reading, {entry.kind for entry in listing.entries}):
            warn(note)
        predict(model, table, listing, options)


def calibrate(model: Predictor, options: argparse.Namespace) -> None:
    """Set the thresholds on labelled images, print and keep them."""
    from dataset.medical_few import MedicalDataset  # noqa: PLC0415
    from engine.calibration import describe_threshold  # noqa: PLC0415

    folder = Path(options.calibrate)
    try:
        name = object_of(folder)
    except InputError:  # its name cannot be a data set's, and none is needed
        name = "calibration"
    dataset = MedicalDataset.open(name, folder.parent, folder)
    if (options.window, options.plane, model.settings.reading) != (None, None, None):
        layout = replace(dataset.layout, window=model.reading.window, plane=model.reading.plane)
        dataset = replace(dataset, layout=layout)
    model.calibrate(dataset, options.threshold_at or "f1", options.batch_size, options.num_workers)
    print(describe_threshold(model.calibration))
    if options.save_ckpt:
        model.save(options.save_ckpt)
        print(f"{options.save_ckpt}: the checkpoint with these thresholds")


def predict(model: Predictor, table: Table, listing: InputList, options: argparse.Namespace) -> None:
    """Images -> rows, pictures, page."""
    from tqdm import tqdm  # noqa: PLC0415

    from engine.report.predictions import Drawer, Gallery  # noqa: PLC0415

    for line in describe(model):
        print(line)
    drawer, remarks, gallery = Drawer(options, model), Remarks(), Gallery()

    def named() -> Iterator[tuple[OpenImage, Prediction, str]]:
        images = open_images(listing, model, options)
        while batch := list(islice(images, options.batch_size)):
            for image, prediction in zip(batch, model.predict_images(batch), strict=True):
                yield image, prediction, drawer.name(image.entry)

    def draw(item: tuple[OpenImage, Prediction, str]) -> tuple[OpenImage, dict[str, Any], Card | None]:
        image, prediction, name = item
        row = row_of(image, prediction, model.threshold) | drawer.files(image, prediction, name)
        return image, row, drawer.card(image.entry, image.preview, prediction)

    start, previous = time.perf_counter(), ""
    try:
        with tqdm(total=len(listing.entries), desc="predict", unit="image", mininterval=bar_seconds()) as bar:
            for image, row, card in prefetch(draw, named(), options.num_workers, ahead=4):
                if previous not in ("", image.entry.series):
                    drawer.finish(previous)
                previous = image.entry.series
                table.add(image.entry, row)
                remarks.add(image.entry, image.notes)
                gallery.add(card)
                bar.update()
        drawer.finish(previous)
    finally:
        drawer.drop()
    table.close(describe_run(model, listing, options), model.threshold)
    seconds = time.perf_counter() - start
    if options.report:
        print(f"report: {gallery.write(model, options)}")
    remarks.sum_up()
    finish(model, table, listing, seconds)


def describe(model: Predictor) -> Iterator[str]:
    """What is to be known of the results before one looks at them."""
    if model.threshold is None:
        yield "decisions: none, as the checkpoint has no threshold; give one with --threshold or --calibrate"
    if model.weak:
        yield f"heat maps: weak localisation only, as the checkpoint was trained without masks ({model.settings.obj})"
    if model.detector.adapters.mixes_images:
        yield "scores: MViTFC as published looks across the images of a batch, so they depend on --batch_size"


def describe_run(model: Predictor, listing: InputList, options: argparse.Namespace) -> dict[str, Any]:
    """What predictions.json says beside its rows."""
    from engine.predictor import WEAK  # noqa: PLC0415

    hidden = options.anonymous
    return {
        "note": NOTE, "checkpoint": Path(options.ckpt).name if hidden else options.ckpt,
        "settings": model.settings.to_dict(), "calibration": model.calibration, "heat_range": model.heat_range,
        "heat": WEAK if model.weak else "segmentation heads", "window": model.reading.window,
        "plane": model.reading.plane, "no_image": len(listing.no_image) if hidden else listing.no_image,
        "not_read": len(listing.faults) if hidden else listing.faults,
    }  # fmt: skip


def finish(model: Predictor, table: Table, listing: InputList, seconds: float) -> None:
    """The last lines; `InputError` where something could not be read."""
    rows, out = table.rows, table.out
    abnormal = sum(bool(row["abnormal"]) for row in rows)
    count = f"{abnormal} of {len(rows)} abnormal" if model.threshold is not None else f"{len(rows)} images"
    if table.options.group_by:
        print(f"groups: {out}/groups.csv; {GROUP_NOTE}")
    without = f"; no image in {len(listing.no_image)} files" if listing.no_image else ""
    print(f"{count}, {len(rows) / seconds:.1f} images a second; {out}/predictions.csv and .json{without} ({NOTE})")
    if listing.faults:
        raise InputError(
            f"{len(listing.faults)} of {len(rows) + len(listing.faults)} files or images could not be read, see above"
        )


if __name__ == "__main__":
    run_cli(lambda: main(parse()))
