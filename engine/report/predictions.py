"""What prediction writes: an image's pictures, the heat maps of volumes, the tables, the page."""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from dataset.readers.grey import Picture
from utils import InputError, atomic_path, blame, csv_cell, preview, printable, probe_writable, write_json

from ..heat_volumes import DicomHeat, NiftiHeat
from ..predictor import Prediction, Predictor
from ..scans import LOCK, MARK, PARTIAL, Entry
from .figures import threshold_words
from .images import contours, overlay, raw
from .page import MAX_CARDS, Card, make_card, write

Row = dict[str, Any]


class Drawer:
    """Writes the pictures of an image and, slice by slice, the heat maps of volumes; `draw` is called by threads."""

    def __init__(self, options: argparse.Namespace, model: Predictor) -> None:
        self.out, self.model, self.options = Path(options.out), model, options
        self.volumes: dict[str, NiftiHeat | DicomHeat] = {}
        self._lock = Lock()

    def draw(self, entry: Entry, picture: Picture, prediction: Prediction) -> tuple[Row, Card | None]:
        """An image's row of the table, its pictures written, and its card of the page."""
        (width, height), info = prediction.size, entry.slice
        row: Row = {
            "file": entry.file, "frame": entry.frame.index, "score": prediction.score,
            "threshold": self.model.threshold, "abnormal": prediction.decision, "width": width, "height": height,
            "PatientID": printable(info.patient_id) or None, "StudyInstanceUID": printable(info.study_uid) or None,
            "SeriesInstanceUID": printable(info.series_uid) or None, "description": printable(info.description) or None,
            "InstanceNumber": info.instance_number, "slice_position": info.position, "plane": info.plane or None,
            "orientation": info.orientation or None, "regions": None, "overlay": None, "raw": None, "contours": None,
            "heat_volume": None, "notes": "; ".join(picture.notes.values()) or None,
        }  # fmt: skip
        if self.options.pictures:
            row |= self.pictures(entry, picture.image, prediction)
            if self.options.volumes:
                row["heat_volume"] = self.add_to_volume(entry, prediction.heat)
        if not self.options.report:
            return row, None
        name = f"{entry.title}, slice {entry.number} of {entry.count}" if entry.count > 1 else entry.title
        group = entry.title if entry.count > 1 else None
        heat_range = self.model.heat_range
        return row, make_card(name, prediction.score, picture.image, prediction.heat, heat_range, group=group)

    def pictures(self, entry: Entry, picture: Image.Image, prediction: Prediction) -> Row:
        """Overlay, raw heat map and contours as files; the columns that name them."""
        model, heat, (width, height) = self.model, prediction.heat, prediction.size
        edges, level = entry.slice.edges, model.pixel_threshold
        regions = [] if level is None else contours(heat, level, prediction.size)
        drawn = overlay(picture, heat, model.heat_range, regions, prediction.size)
        pictures = {"overlay": label(drawn, edges, model.weak), "raw": raw(heat, model.layers)}
        mark = PngImagePlugin.PngInfo()
        mark.add_text("Software", MARK)
        for kind, drawn in pictures.items():
            with atomic_path(self.out / f"{entry.name}_{kind}.png", "--out") as path:
                drawn.save(path, "PNG", pnginfo=mark, compress_level=1)  # a third of the time, 10% more bytes
        shape = {"pixel_threshold": level, "width": width, "height": height, "regions": regions}
        with atomic_path(self.out / f"{entry.name}_contours.json", "--out") as path:
            path.write_text(json.dumps(shape), encoding="utf-8")
        files = {kind: f"{entry.name}_{kind}.png" for kind in pictures}
        count = sum(region["area"] > 0 for region in regions)
        return {"regions": count, **files, "contours": f"{entry.name}_contours.json"}

    def add_to_volume(self, entry: Entry, heat: np.ndarray) -> str | None:
        """Put the heat map into that of its volume or series, where it is a slice of one; the file's name."""
        if entry.kind == "pillow" or (entry.kind == "dicom" and entry.count == 1):
            return None
        with self._lock:
            volume = self.volumes.get(entry.series)
            if volume is None:
                path, heat_range = self.out / f"{entry.volume}_heat", self.model.heat_range
                if entry.kind == "nifti":
                    volume = NiftiHeat(path.with_name(f"{path.name}.nii.gz"), entry.frame, heat_range)
                else:
                    volume = DicomHeat(path, self.model.layers, heat_range, self.options.anonymous)
                self.volumes[entry.series] = volume
        return volume.add(entry.frame, entry.number, heat)

    def finish(self, series: str) -> None:
        """Write the file of a volume that is complete."""
        volume = self.volumes.pop(series, None)
        if isinstance(volume, NiftiHeat):
            volume.close()


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


class Results:
    """predictions.csv, predictions.json, groups.csv and the page; those of an earlier run are replaced whole.

    While they grow, each volume, series or single file that is complete becomes lines of predictions.partial.jsonl,
    from which the same command goes on after a kill. One process at a time writes to a folder.

    Args:
        options: predict.py's.
        command: what shapes the rows; lines of another command are dropped.
        entries: what is to be predicted.
    """

    def __init__(self, options: argparse.Namespace, command: str, entries: Sequence[Entry]) -> None:
        self.out, self.options = Path(options.out), options
        self.keys = {entry.key(): entry for entry in entries}
        self.key_of = {entry.name: key for key, entry in self.keys.items()}
        for name in ("predictions.csv", "predictions.json", PARTIAL):
            probe_writable(self.out / name, "--out")
        self.lock = FileLock(self.out / LOCK)
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"--out {self.out}: another predict.py writes there; give another folder") from error
        self.file = (self.out / PARTIAL).open("a+b")
        self.file.seek(0)
        end, done, head = 0, set(), f"{json.dumps(command)}\n".encode()
        if self.file.readline() == head:
            end = len(head)
            for line in self.file:
                if not line.endswith(b"\n"):  # cut short
                    break
                end += len(line)
                done.add(json.loads(line)["key"])
        self.file.truncate(end)
        self.file.write(head[end:])
        broken = {entry.series for key, entry in self.keys.items() if key not in done}
        self.todo = [entry for entry in entries if entry.series in broken]

    def add(self, rows: Iterable[tuple[Entry, Row, Card | None]]) -> None:
        """What was found in a volume, series or single file, all of it."""
        with blame(f"--out {self.file.name}: cannot be written (disk full?)"):
            for entry, row, card in rows:
                line = {"key": self.key_of[entry.name], "row": row, "card": None if card is None else asdict(card)}
                self.file.write(json.dumps(line).encode() + b"\n")
            self.file.flush()

    def lines(self) -> Iterator[tuple[str, Row, dict[str, Any] | None]]:
        """Key, row and card of each image; of one that was predicted twice, the later ones too."""
        self.file.seek(0)
        next(self.file)
        for line in map(json.loads, self.file):
            if line["key"] in self.keys:
                yield line["key"], line["row"], line["card"]

    def close(self, metadata: dict[str, Any], threshold: float | None) -> list[tuple[Entry, Row]]:
        """Put the finished tables in their places: never a CSV file of one run beside a JSON file of another.

        Returns:
            The rows, in the order of the entries.

        Raises:
            InputError: there is none.
        """
        found = {key: row for key, row, _ in self.lines()}
        if not found:
            self.remove_partial()
            raise InputError(f"no image could be read, see above; {self.out} is as it was")
        result = [(entry, found[key]) for key, entry in self.keys.items() if key in found]
        rows = [row for _, row in result]
        if self.options.group_by:
            groups = group_rows(result, self.options.group_by, threshold)
            write_csv(self.out / "groups.csv", groups)
            metadata |= {"group_by": self.options.group_by, "groups": groups}
        with atomic_path(self.out / "predictions.json", "--out") as path:
            write_json(path, {**metadata, "predictions": rows}, "--out")
            (self.out / "predictions.json").unlink(missing_ok=True)
            write_csv(self.out / "predictions.csv", rows)
        return result

    def remove_partial(self) -> None:
        """All is written: the next run begins anew."""
        self.file.close()
        (self.out / PARTIAL).unlink()
        self.lock.release()


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write a table, whose columns are those of its first row."""
    with (
        atomic_path(path, "--out") as new,
        new.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)


def group_rows(rows: Iterable[tuple[Entry, Row]], by: str, threshold: float | None) -> list[Row]:
    """A row for each group of --group_by, the highest first."""
    members = defaultdict(list)
    for entry, row in rows:
        members[entry.groups[by]].append(row)
    result = []
    for group, inside in members.items():
        inside.sort(key=lambda row: -row["score"])
        scores, first = [row["score"] for row in inside], inside[0]
        words = {name: " ".join(sorted({row[name] for row in inside if row[name]})) or None
                 for name in ("PatientID", "description")}  # fmt: skip
        result.append({
            "group": group, **words, "images": len(inside), "largest": scores[0], "mean": float(np.mean(scores)),
            "percentile_95": float(np.percentile(scores, 95)), "deciding_file": first["file"],
            "deciding_frame": first["frame"], "threshold": threshold,
            "abnormal": None if threshold is None else scores[0] >= threshold,
        })  # fmt: skip
    return sorted(result, key=lambda row: -row["largest"])


def write_page(results: Results, rows: Sequence[tuple[Entry, Row]], model: Predictor) -> Path:
    """Write --report's page: the images, highest scores first, volumes as strips of their slices in order."""
    options, scores = results.options, np.array([row["score"] for _, row in rows])
    place = {results.key_of[entry.name]: i for i, (entry, _) in enumerate(rows)}
    shown = set(np.argsort(-scores, kind="stable")[:MAX_CARDS].tolist())
    found = {place[key]: Card(**card) for key, _, card in results.lines() if card and place[key] in shown}
    notes = [f"The gallery holds the {MAX_CARDS:,} highest scores of {len(rows):,} images."] * (len(rows) > len(shown))
    threshold, origin = model.threshold, "The checkpoint has no threshold."
    if options.threshold is not None:
        origin = "It was given with --threshold."
    elif model.calibration:
        origin = threshold_words(model.calibration)
    return write(
        options.report, "predictions.html", [found[i] for i in sorted(found)], scores=[scores], threshold=threshold,
        heat_range=model.heat_range, kind="MadCLIP predictions", lead=[summary(rows)], notes=notes, weak=model.weak,
        title="Predictions" if options.anonymous else preview([Path(name).name for name in options.images]),
        origin=origin, made=model.settings.to_dict(),
        above=int((scores >= (np.inf if threshold is None else threshold)).sum()),
    )  # fmt: skip


def summary(rows: Sequence[tuple[Entry, Row]]) -> str:
    """How many patients, series and images are abnormal, of how many; patients and series where there are some."""
    names: dict[str, dict[str, bool]] = {"patients": {}, "series": {}, "images": {}}  # of each, whether it is abnormal
    for entry, row in rows:
        of = {"images": entry.name}
        if entry.count > 1:
            of["series"] = entry.series
        if entry.slice.patient_id:
            of["patients"] = entry.groups["patient"]
        for kind, name in of.items():
            names[kind][name] = names[kind].get(name, False) or bool(row["abnormal"])
    counts = (f"{sum(group.values())} of {len(group)} {kind}" for kind, group in names.items() if group)
    return f"{', '.join(counts)} abnormal"
