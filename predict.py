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
import hashlib
import math
import os
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from dataset.images import (
    PLANES,
    Frame,
    MissingPackageError,
    NoImageError,
    ReadOptions,
    file_kind,
    frames,
    list_files,
    parse_window,
    picture_notes,
    read,
    stem,
    to_tensor,
)  # fmt: skip
from dataset.layout import named_after, object_name
from dataset.patients import patient
from engine.config import (
    PAPER,
    Formatter,
    add_machine_flags,
    add_model_flags,
    nonempty_path,
    positive,
    threshold_rule,
)  # fmt: skip
from engine.scans import MARK, DicomHeat, NiftiHeat, Slice, in_order, is_own_result, slices_of
from utils import (
    InputError,
    Parser,
    anonymous_name,
    atomic_path,
    integer,
    prefetch,
    printable,
    probe_writable,
    run_cli,
    warn,
    write_json,
)  # fmt: skip

if TYPE_CHECKING:
    import numpy as np
    from engine.report.page import Card
    from torch import Tensor

    from engine.predictor import Prediction, Predictor

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
NAMES = {"dicom": "DICOM", "nifti": "NIfTI", "pillow": "picture"}
PRESETS = {"Brain": " --like Brain", "Liver": " --like Liver"}  # of dataset.convert
NAME_BYTES = 150  # of a picture's name, without what is added; a file system takes 255, and many a cloud fewer
LETTERS = 256  # pixels of an overlay's longer side from which letters can be read


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="predict.py", description=__doc__.split("\n\n")[0], formatter_class=Formatter)
    parser.add_argument(
        "images", nargs="*", type=nonempty_path, metavar="IMAGE_OR_FOLDER",
        help="PNG, JPEG, BMP, TIFF, WebP, GIF, JPEG 2000; DICOM (with pydicom), NIfTI (with nibabel)",
    )  # fmt: skip
    parser.add_argument(
        "--ckpt", required=True, type=nonempty_path, help="checkpoint of train.py, or one in the published format"
    )
    parser.add_argument("--obj", help="of a published checkpoint: the data set that it was trained on")
    parser.add_argument("--weights", type=nonempty_path, help="file with CLIP weights, instead of that in CLIP/ckpt")
    parser.add_argument(
        "--allow_other_weights", action="store_true", help="only warn when these are not the trained ones"
    )
    parser.add_argument("--batch_size", type=integer(1, 65536), default=16, help="images through the network at a time")
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
    reading = parser.add_argument_group("reading")
    reading.add_argument(
        "--window", nargs="+", metavar=("C W|auto|full", ""),
        help="centre and width of grey values beyond 8 bits; auto: robust percentiles of the series or volume; full: "
        "its whole range (default: as in training, else the file's own window)",
    )  # fmt: skip
    reading.add_argument(
        "--plane", choices=PLANES, help="in which NIfTI volumes are cut (default: as in training, else axial)"
    )
    decision = parser.add_argument_group("decisions")
    decision.add_argument("--threshold", type=float, help="abnormal is score >= threshold (default: the checkpoint's)")
    decision.add_argument(
        "--threshold_at", type=threshold_rule, metavar="RULE",
        help="set it on --calibrate's images: f1 (max., the default there), fpr=0.05, tpr=0.95",
    )  # fmt: skip
    decision.add_argument(
        "--calibrate", type=nonempty_path, metavar="FOLDER",
        help="labelled images, in any layout that dataset.check knows",
    )  # fmt: skip
    decision.add_argument(
        "--save_ckpt", type=nonempty_path, metavar="FILE",
        help="a copy of the checkpoint with the thresholds of --calibrate",
    )  # fmt: skip


def add_result_flags(parser: argparse.ArgumentParser) -> None:
    """What is written."""
    results = parser.add_argument_group("results")
    results.add_argument("--out", type=nonempty_path, help="folder of the results")
    results.add_argument(
        "--pictures", action=argparse.BooleanOptionalAction, default=True, help="write heat maps and contours"
    )
    results.add_argument(
        "--volumes", action=argparse.BooleanOptionalAction, default=True,
        help="with --pictures, write heat maps of NIfTI volumes and DICOM series in the scan's own space",
    )  # fmt: skip
    results.add_argument("--group_by", choices=("series", "patient", "folder"), help="a row for each, in groups.csv")
    results.add_argument("--kth", type=positive, default=3, metavar="K", help="which largest score a group lists too")
    results.add_argument(
        "--report", type=nonempty_path, metavar="FOLDER",
        help="a page (index.html) with every image, highest scores first",
    )  # fmt: skip
    results.add_argument(
        "--anonymous", action="store_true", help="hashes instead of file names, patients and UIDs in all results"
    )


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
    if not options.images and not options.calibrate:
        raise InputError("name images or folders of images")
    if options.images and not options.out:
        raise InputError("name the folder of the results: --out FOLDER")
    return options


# --- what there is to do ---


@dataclass(frozen=True)
class Entry:
    """One image to predict."""

    frame: Frame
    place: str  # the file's path below the input that it came from
    slice: Slice
    series: str  # names the volume, series or single file that it belongs to
    number: int  # of the image in that, counted from 1
    count: int  # how many images that has
    hidden: bool = False  # --anonymous

    @property
    def file(self) -> str:
        """The file as the results name it."""
        path = str(self.frame.path)
        return anonymous_name(path) if self.hidden else printable(path)

    @property
    def kind(self) -> str:
        """`pillow`, `dicom` or `nifti`."""
        return file_kind(self.frame.path) or ""

    def word(self, text: str) -> str:
        """A name or number of the scan as the results give it."""
        return hashlib.sha256(text.encode()).hexdigest()[:16] if self.hidden and text else printable(text)

    def group(self, by: str) -> str:
        """What it is counted with in groups.csv."""
        if by == "folder":
            return self.word(str(self.frame.path.parent))
        if by == "patient" and (name := self.slice.patient_id or patient(self.place, None, self.place)):
            return self.word(name)
        return self.word(self.slice.series_uid) or self.file


@dataclass
class Listing:
    """Every image, and what is none."""

    entries: list[Entry] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # could not be read
    no_image: list[str] = field(default_factory=list)  # sound, but without a picture
    own: int = 0  # results of an earlier run


def list_entries(options: argparse.Namespace, reading: ReadOptions) -> Listing:
    """Walk the inputs; the slices of a series follow each other in the order of their position."""
    result, files = Listing(), []
    for path, place in list_files(map(Path, options.images)):
        if is_own_result(path):
            result.own += 1
            continue
        try:
            inside = frames(path, reading)
        except MissingPackageError:
            raise
        except NoImageError as error:
            result.no_image.append(str(error))
        except InputError as error:
            result.faults.append(str(error))
        else:
            files.append((place, inside, slices_of(inside)))
    series: defaultdict[str, list[tuple[Frame, str, Slice]]] = defaultdict(list)
    for number, (place, inside, slices) in enumerate(files):
        for frame, slice_ in zip(inside, slices, strict=True):
            series[slice_.series_uid or str(number)].append((frame, place, slice_))
    for key, members in series.items():
        for number, i in enumerate(in_order([slice_ for *_, slice_ in members]), 1):
            frame, place, slice_ = members[i]
            result.entries.append(Entry(frame, place, slice_, key, number, len(members), options.anonymous))
    return result


@dataclass(frozen=True)
class Opened:
    """A decoded image: what the network and the pictures need of it, not its own pixels."""

    entry: Entry
    tensor: Tensor
    preview: Image.Image | None  # at most as large as an overlay
    size: tuple[int, int]
    notes: dict[str, str]


def open_entry(entry: Entry, size: int, keep: bool) -> Opened | str:
    """Read an image; what is wrong in words where that fails. `keep` also holds a small picture, for the overlay."""
    from engine.report.images import LONGEST, shrink  # noqa: PLC0415

    try:
        picture = read(entry.frame)
    except InputError as error:
        return str(error)
    preview = shrink(picture.image, LONGEST)
    notes = {**picture.notes, **picture_notes(preview)}
    return Opened(entry, to_tensor(picture.image, size), preview if keep else None, picture.image.size, notes)


def reading_notes(model: Predictor, options: argparse.Namespace, reading: ReadOptions, kinds: set[str]) -> list[str]:
    """Where these images are read in another way than the checkpoint's were, in words."""
    settings, scans = model.settings, kinds & {"dicom", "nifti"}
    if scans and settings.obj in PAPER:
        words = " and ".join(NAMES[kind] for kind in sorted(scans))
        return [
            f"the checkpoint was trained on {settings.obj}'s prepared PNG files, and these are {words}: their pixels "
            f"differ, so scores and threshold may not hold; prepare them with `python -m dataset.convert"
            f"{PRESETS.get(settings.obj, '')}` first"
        ]
    notes, trained = [], model.reading
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


# --- pictures of an image ---


class Drawer:
    """Writes the pictures of an image; `row` is called by threads."""

    def __init__(self, options: argparse.Namespace, model: Predictor) -> None:
        self.out, self.model, self.options = Path(options.out), model, options
        self.names: Counter[str] = Counter()
        self.volumes: dict[str, NiftiHeat | DicomHeat] = {}
        self._lock = Lock()

    def row(self, item: tuple[Opened, Prediction, str]) -> tuple[Entry, dict[str, Any], dict[str, str], Card | None]:
        """An image's row of the table, what is to be said of it, and its card of the page."""
        opened, prediction, name = item
        entry, slice_ = opened.entry, opened.entry.slice
        row: dict[str, Any] = dict.fromkeys(COLUMNS) | {
            "file": entry.file, "frame": entry.frame.index, "score": prediction.score,
            "threshold": self.model.threshold, "abnormal": prediction.abnormal, "width": prediction.size[0],
            "height": prediction.size[1], "PatientID": entry.word(slice_.patient_id) or None,
            "StudyInstanceUID": entry.word(slice_.study_uid) or None,
            "SeriesInstanceUID": entry.word(slice_.series_uid) or None, "InstanceNumber": slice_.instance_number,
            "slice_position": slice_.position, "plane": slice_.plane or None,
            "orientation": slice_.orientation or None, "notes": "; ".join(opened.notes.values()) or None,
        }  # fmt: skip
        if self.options.pictures and opened.preview is not None:
            row |= self.draw(name, opened.preview, prediction, slice_.edges)
            if self.options.volumes:
                row["heat_volume"] = self.add_to_volume(entry, name, prediction.heat)
        return entry, row, opened.notes, self.card(entry, opened.preview, prediction)

    def card(self, entry: Entry, preview: Image.Image | None, prediction: Prediction) -> Card | None:
        """The image's part of the page."""
        if not self.options.report:
            return None
        from engine.report.page import prediction_row  # noqa: PLC0415

        index = "" if entry.frame.index is None else f"#{entry.frame.index}"
        place = entry.file if entry.hidden else printable(entry.place)
        folder = Path(place).parent.as_posix() if entry.slice.series_uid and not entry.hidden else ""
        group = place if folder in ("", ".") else f"{folder} (series {entry.slice.series_uid[-8:]})"
        return prediction_row(
            place + index, prediction.score, preview, prediction.heat, group if entry.count > 1 else None
        )

    def draw(self, name: str, preview: Image.Image, prediction: Prediction, edges: str) -> dict[str, Any]:
        """Overlay, raw heat map and contours as files."""
        from engine.report.images import contours, overlay, raw, shrink  # noqa: PLC0415

        model, heat, size = self.model, prediction.heat, prediction.size
        regions = [] if model.pixel_threshold is None else contours(heat, model.pixel_threshold, size)
        if (edges or model.weak) and max(preview.size) < LETTERS:
            preview = shrink(preview, LETTERS, enlarge=True)
        scale = [after / before for after, before in zip(preview.size, size, strict=True)]
        outlines = [{**r, "points": [[x * scale[0], y * scale[1]] for x, y in r["points"]]} for r in regions]
        pictures = {
            "overlay.png": label(overlay(preview, heat, model.heat_range, outlines), edges, model.weak),
            "raw.png": raw(heat, model.layers),
        }
        mark = PngImagePlugin.PngInfo()
        mark.add_text("Software", MARK)
        for kind, picture in pictures.items():
            with atomic_path(self.out / f"{name}_{kind}", "--out") as path:
                picture.save(path, "PNG", pnginfo=mark)
        shape = {"pixel_threshold": model.pixel_threshold, "width": size[0], "height": size[1], "regions": regions}
        write_json(self.out / f"{name}_contours.json", shape, "--out")
        kinds = (*pictures, "contours.json")
        return {"regions": sum(r["area"] > 0 for r in regions), **{k.split(".")[0]: f"{name}_{k}" for k in kinds}}

    def add_to_volume(self, entry: Entry, name: str, heat: np.ndarray) -> str | None:
        """Put the heat map into that of its volume or series, where it is a slice of one; the file's name."""
        if entry.kind == "pillow" or (entry.kind == "dicom" and entry.count == 1):
            return None
        with self._lock:
            volume = self.volumes.get(entry.series)
            if volume is None:
                volume = self.volumes[entry.series] = self.volume(entry, name)
        if isinstance(volume, NiftiHeat):
            volume.add(entry.frame.index or 0, heat)
            return volume.path.name
        volume.add(entry.frame, entry.number, heat)
        return f"{volume.folder.name}/{entry.number:05d}.dcm"

    def volume(self, entry: Entry, name: str) -> NiftiHeat | DicomHeat:
        """Begin the heat map of a volume or series, under the name of its first image."""
        model, name = self.model, re.sub(r"_\d{4,}$", "", name) if entry.frame.index is not None else name
        if entry.kind == "nifti":
            path, plane = self.out / f"{name}_heat.nii.gz", entry.frame.options.plane
            return NiftiHeat(path, entry.frame.path, plane, model.layers, model.heat_range)
        return DicomHeat(self.out / f"{name}_heat", model.layers, model.heat_range, self.options.anonymous)

    def finish(self, series: str, keep: bool = True) -> None:
        """Write the file of a volume that is complete."""
        volume = self.volumes.pop(series, None)
        if isinstance(volume, NiftiHeat):
            volume.close(keep)

    def name(self, entry: Entry) -> str:
        """The name of an image's pictures, which no two images share and every file system takes."""
        place = (
            entry.place if entry.kind != "nifti" else Path(entry.place).with_name(stem(Path(entry.place))).as_posix()
        )
        clean = re.sub(r"[^\w./-]+", "_", place).replace("/", "__").strip(".")
        if entry.hidden:
            clean = entry.file.rpartition(".")[0] or entry.file
        if len(os.fsencode(clean)) > NAME_BYTES:
            kept = os.fsencode(clean)[-NAME_BYTES:].decode("utf-8", "ignore")
            clean = f"{hashlib.sha256(clean.encode()).hexdigest()[:8]}_{kept}"
        name = clean if entry.frame.index is None else f"{clean}_{entry.frame.index:04d}"
        self.names[name] += 1
        return name if self.names[name] == 1 else self.name(replace(entry, place=f"{entry.place}-{self.names[name]}"))


def label(picture: Image.Image, edges: str, weak: bool) -> Image.Image:
    """Write the patient's sides at the picture's edges, and where it is so that the heat map is weak."""
    width, height = picture.size
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(12, min(width, height) // 16))
    places = (((3, height / 2), "lm"), ((width - 3, height / 2), "rm"), ((width / 2, 3), "ma"),
              ((width / 2, height - 3), "md"))  # fmt: skip
    words = [(side, *place) for side, place in zip(edges, places, strict=False)]
    if weak:
        words.append(("weak localisation", (3, 3), "la"))
    for text, place, anchor in words:
        draw.text(place, text, "white", font, anchor, stroke_width=2, stroke_fill="black")
    return picture


# --- tables ---


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
        self.file = self.partial.open("w", newline="", encoding="utf-8", errors="backslashreplace")
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
        groups = self.groups(threshold) if self.options.group_by else []
        if groups:
            with (
                atomic_path(self.out / "groups.csv", "--out") as path,
                path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
            ):
                writer = csv.DictWriter(file, GROUP_COLUMNS)
                writer.writeheader()
                writer.writerows(groups)
        grouped = {"group_by": self.options.group_by, "group_note": GROUP_NOTE, "groups": groups} if groups else {}
        with atomic_path(self.out / "predictions.json", "--out") as path:
            write_json(path, {**metadata, **grouped, "predictions": self.rows}, "--out")
            (self.out / "predictions.json").unlink(missing_ok=True)
            self.partial.replace(self.out / "predictions.csv")

    def groups(self, threshold: float | None) -> list[dict[str, Any]]:
        """A row for each group, the highest first."""
        import numpy as np  # noqa: PLC0415

        members = defaultdict(list)
        for entry, row in zip(self.entries, self.rows, strict=True):
            members[entry.group(self.options.group_by)].append(row)
        result = []
        for group, rows in members.items():
            rows.sort(key=lambda row: -row["score"])
            scores = np.array([row["score"] for row in rows])
            k = min(self.options.kth, len(rows))
            result.append({
                "group": group, "images": len(rows), "largest": rows[0]["score"], "mean": float(scores.mean()),
                "percentile_95": float(np.percentile(scores, 95)), "kth_largest": rows[k - 1]["score"], "k": k,
                "deciding_file": rows[0]["file"], "deciding_frame": rows[0]["frame"], "threshold": threshold,
                "abnormal": None if threshold is None else rows[0]["score"] >= threshold,
            })  # fmt: skip
        return sorted(result, key=lambda row: -row["largest"])


class Remarks:
    """What is said of single images: the first of a kind at once, the others counted."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.texts: dict[str, set[str]] = defaultdict(set)

    def add(self, entry: Entry, notes: dict[str, str]) -> None:
        """Say what is new."""
        for kind, text in notes.items():
            self.counts[kind] += 1
            ranges = self.texts[kind]
            if not ranges or (kind == "window" and text not in ranges and len(ranges) < 5):
                _say(f"{entry.file}: {text}")
            ranges.add(text)

    def summary(self) -> list[str]:
        """A line for each kind that concerns several images."""
        return [
            f"{count} images: {REMARKS.get(kind, kind)}, see the column notes"
            for kind, count in self.counts.items()
            if count > 1
        ]


def _say(text: str) -> None:
    from tqdm import tqdm  # noqa: PLC0415

    tqdm.write(printable(text), file=sys.stderr)


# --- the run ---


def main(options: argparse.Namespace) -> None:
    """Arguments -> checkpoint -> images -> files."""
    from engine.predictor import build, read_checkpoint, reading_of  # noqa: PLC0415 - imports torch

    checkpoint = read_checkpoint(options)
    trained = reading_of(checkpoint.settings)
    reading = ReadOptions(options.window or trained.window, options.plane or trained.plane)
    listing = list_entries(options, reading)
    for line in (*listing.no_image, *(f"skipped: {fault}" for fault in listing.faults)):
        _say(line)
    if listing.own:
        _say(f"{listing.own} files are results of an earlier run, and left out")
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
        for note in reading_notes(model, options, reading, {entry.kind for entry in listing.entries}):
            warn(note)
        predict(model, table, listing, options)


def calibrate(model: Predictor, options: argparse.Namespace) -> None:
    """Set the thresholds on labelled images, print and keep them."""
    from engine.calibration import describe_threshold  # noqa: PLC0415

    from dataset.medical_few import MedicalDataset  # noqa: PLC0415

    folder = Path(options.calibrate)
    try:
        name = object_name(named_after(folder))
    except InputError:  # its name cannot be a data set's, and none is needed
        name = "calibration"
    given = None if (options.window, options.plane, model.settings.reading) == (None, None, None) else model.reading
    dataset = MedicalDataset.open(name, folder.parent, folder, options=given)
    model.calibrate(dataset, options.threshold_at or "f1", options.batch_size, options.num_workers)
    print(describe_threshold(model.calibration))
    if options.save_ckpt:
        model.save(options.save_ckpt)
        print(f"{options.save_ckpt}: the checkpoint with these thresholds")


def describe(model: Predictor) -> Iterator[str]:
    """What is to be known of the results before one looks at them."""
    if model.threshold is None:
        yield "decisions: none, as the checkpoint has no threshold; give one with --threshold or --calibrate"
    if model.weak:
        yield f"heat maps: weak localisation only, as the checkpoint was trained without masks ({model.settings.obj})"
    if model.detector.adapters.mixes_images:
        yield "scores: MViTFC as published looks across the images of a batch, so they depend on --batch_size"


def predict(model: Predictor, table: Table, listing: Listing, options: argparse.Namespace) -> None:
    """Images -> rows, pictures, page."""
    from tqdm import tqdm  # noqa: PLC0415

    for line in describe(model):
        print(line)
    drawer, remarks, gallery = Drawer(options, model), Remarks(), Gallery()
    start, previous = time.perf_counter(), ""
    try:
        with tqdm(total=len(listing.entries), desc="predict", unit="image", mininterval=1.0) as bar:
            predicted = predictions(model, drawer, listing, options)
            for entry, row, notes, card in prefetch(drawer.row, predicted, options.num_workers, ahead=4):
                if previous not in ("", entry.series):
                    drawer.finish(previous)
                previous = entry.series
                table.add(entry, row)
                remarks.add(entry, notes)
                gallery.add(card)
                bar.update()
        drawer.finish(previous)
    finally:
        for series in list(drawer.volumes):
            drawer.finish(series, keep=False)
    table.close(describe_run(model, listing, options), model.threshold)
    seconds = time.perf_counter() - start
    if options.report:
        print(f"report: {gallery.write(model, options)}")
    finish(model, table, listing, remarks, seconds)


def predictions(
    model: Predictor, drawer: Drawer, listing: Listing, options: argparse.Namespace
) -> Iterator[tuple[Opened, Prediction, str]]:
    """Images, read beside the network and predicted a batch at a time; what cannot be read is added to the faults."""
    import torch  # noqa: PLC0415

    size, keep = model.settings.img_size, options.pictures or bool(options.report)
    batch: list[Opened] = []

    def results() -> Iterator[tuple[Opened, Prediction, str]]:
        tensors = torch.stack([opened.tensor for opened in batch])
        pairs = zip(batch, model.predict_tensors(tensors, [opened.size for opened in batch]), strict=True)
        yield from ((opened, prediction, drawer.name(opened.entry)) for opened, prediction in pairs)

    ahead = min(options.batch_size, 16)
    for opened in prefetch(lambda e: open_entry(e, size, keep), listing.entries, options.num_workers, ahead):
        if isinstance(opened, str):
            listing.faults.append(opened)
            _say(f"skipped: {opened}")
            continue
        batch.append(opened)
        if len(batch) == options.batch_size:
            yield from results()
            batch.clear()
    if batch:
        yield from results()


class Gallery:
    """The cards of the page, with pictures of the highest scores alone, so that any number of images fits."""

    def __init__(self) -> None:
        self.cards: list[Card] = []

    def add(self, card: Card | None) -> None:
        """One image."""
        from engine.report.page import KEPT  # noqa: PLC0415

        if card is None:
            return
        self.cards.append(card)
        if len(self.cards) % KEPT == 0:
            highest = {id(kept) for kept in sorted(self.cards, key=lambda card: -card.score)[:KEPT]}
            self.cards = [c if id(c) in highest else replace(c, image=None, heat=None) for c in self.cards]

    def write(self, model: Predictor, options: argparse.Namespace) -> Path:
        """Write the page."""
        from engine.report.page import write_prediction_page  # noqa: PLC0415

        source = model.calibration.get("from")
        origin = "given with --threshold" if options.threshold is not None else f"{source}" if source else "none"
        return write_prediction_page(
            options.report, self.cards, title=model.settings.obj, threshold=model.threshold, origin=origin,
            heat_range=model.heat_range, weak=model.weak, metadata=model.settings.to_dict(),
        )  # fmt: skip


def describe_run(model: Predictor, listing: Listing, options: argparse.Namespace) -> dict[str, Any]:
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


def finish(model: Predictor, table: Table, listing: Listing, remarks: Remarks, seconds: float) -> None:
    """The last lines; `InputError` where something could not be read."""
    for line in remarks.summary():
        _say(line)
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
