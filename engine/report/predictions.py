"""The output of prediction: the pictures of each image, the heat maps of volumes, the tables and the page."""

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from dataset.readers.grey import Picture
from utils import InputError, atomic_path, blame, csv_cell, preview, sha256_file, write_json

from ..heat_volumes import write_volume
from ..predictor import Prediction, Predictor
from ..scans import LOCK, MARK, PARTIAL, Entry, InputList
from .figures import threshold_words
from .images import contours, overlay, raw
from .page import MAX_CARDS, Card, layers, write

Row = dict[str, Any]
NOTE = "research use, not a medical device"
GROUP_NOTE = (
    "a group is abnormal if its largest score is; the threshold was calibrated for single images, so the more "
    "images a group has, the more likely one of them exceeds it by chance"
)
MACHINE = {"images", "device", "num_workers", "batch_size", "out"}  # flags that do not affect the rows


class Results:
    """The files of a prediction; tables and page of an earlier run are replaced as a whole.

    Until all is done, each complete volume, series or single file is appended to predictions.partial.jsonl, from which
    the same command continues if it was killed. Only one process at a time can write to a folder, else `InputError`.

    Args:
        options: those of predict.py.
        model: the predictor.
        listing: the images to predict; the attribute `todo` holds those of series that no earlier run completed.
    """

    def __init__(self, options: argparse.Namespace, model: Predictor, listing: InputList) -> None:
        self.out, self.options, self.model, self.listing = Path(options.out), options, model, listing
        self.entries = {entry.key: entry for entry in listing.entries}
        self.lock = FileLock(self.out / LOCK)
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"--out {self.out}: another predict.py writes there; give another folder") from error
        flags = {name: value for name, value in vars(options).items() if name not in MACHINE}
        head = f"{json.dumps([flags, sha256_file(options.ckpt)])}\n".encode()
        self.file = (self.out / PARTIAL).open("a+b")
        self.file.seek(0)
        is_same = self.file.readline() == head
        whole = sum(len(line) for line in self.file if line.endswith(b"\n"))  # the last line may be cut short
        self.file.truncate(len(head) + whole if is_same else 0)
        self.file.write(b"" if is_same else head)
        done = {key for key, *_ in self.lines()}
        broken = {entry.series for key, entry in self.entries.items() if key not in done}
        self.todo = [entry for entry in listing.entries if entry.series in broken]

    def draw(self, entry: Entry, picture: Picture, prediction: Prediction) -> tuple[Row, Card | None]:
        """Write an image's pictures; returns its row of the table and its card of the page. Called by threads."""
        (width, height), info = prediction.size, entry.slice
        row: Row = {
            "file": entry.file, "frame": entry.index, "score": prediction.score,
            "threshold": self.model.threshold, "abnormal": prediction.decision, "width": width, "height": height,
            "PatientID": info.patient_id or None, "StudyInstanceUID": info.study_uid or None,
            "SeriesInstanceUID": info.series_uid or None, "description": info.description or None,
            "InstanceNumber": info.instance_number, "slice_position": info.position, "plane": info.plane or None,
            "orientation": info.orientation or None, "regions": None, "overlay": None, "raw": None, "contours": None,
            "heat_volume": None, "notes": "; ".join(picture.notes.values()) or None,
        }  # fmt: skip
        if self.options.pictures:
            row |= self.pictures(entry, picture.image, prediction)
        if not self.options.report:
            return row, None
        group = entry.title if entry.count > 1 else None
        name = f"{group}, slice {entry.number} of {entry.count}" if group else entry.title
        card = {"name": name, "score": prediction.score, "label": None, "group": group}
        return row, card | layers(picture.image, prediction.heat, self.model.heat_range)

    def pictures(self, entry: Entry, picture: Image.Image, prediction: Prediction) -> Row:
        """Write the files of overlay, raw heat map and contours; returns the columns that name them."""
        model, heat, size = self.model, prediction.heat, prediction.size
        regions = [] if model.pixel_threshold is None else contours(heat, model.pixel_threshold, size)
        drawn = overlay(picture, heat, model.heat_range, regions, size)
        mark = PngImagePlugin.PngInfo()
        mark.add_text("Software", MARK)
        files = {kind: f"{entry.name}_{kind}.png" for kind in ("overlay", "raw")}
        for kind, image in (("overlay", label(drawn, entry.slice.edges, model.weak)), ("raw", raw(heat, model.layers))):
            with atomic_path(self.out / files[kind], "--out") as path:
                image.save(path, "PNG", pnginfo=mark, compress_level=1)  # a third of the default's time, 10% more bytes
        shape = {"pixel_threshold": model.pixel_threshold, "width": size[0], "height": size[1], "regions": regions}
        files["contours"] = f"{entry.name}_contours.json"
        with atomic_path(self.out / files["contours"], "--out") as path:
            path.write_text(json.dumps(shape), encoding="utf-8")
        return {"regions": sum(region["area"] > 0 for region in regions), **files}

    def add(self, images: Sequence[tuple[Entry, Prediction, Row, Card | None]]) -> None:
        """Save a complete volume, series or single file: its heat map in its own space, and its rows."""
        if images and self.options.pictures and self.options.volumes:
            slices = [(entry, prediction) for entry, prediction, *_ in images]
            names = write_volume(self.out, slices, self.model, self.options.anonymous)
            for (_, _, row, _), name in zip(images, names, strict=True):
                row["heat_volume"] = name
        with blame(f"--out {self.file.name}: cannot be written (disk full?)"):
            for entry, _, row, card in images:
                self.file.write(json.dumps({"key": entry.key, "row": row, "card": card}).encode() + b"\n")
            self.file.flush()

    def lines(self) -> Iterator[tuple[str, Row, Card | None]]:
        """Yields key, row and card of each image; an image that was predicted twice comes twice, the later one last."""
        self.file.seek(0)
        next(self.file)
        for line in map(json.loads, self.file):
            if line["key"] in self.entries:
                yield line["key"], line["row"], line["card"]

    def close(self) -> list[tuple[Entry, Row]]:
        """Write the final tables; at no time does a CSV file lie beside a JSON file of another run.

        Returns:
            The rows, in the order of the entries.

        Raises:
            InputError: there are no rows.
        """
        table, model, listing = {key: row for key, row, _ in self.lines()}, self.model, self.listing
        result = [(entry, table[key]) for key, entry in self.entries.items() if key in table]
        rows, hidden = [row for _, row in result], self.options.anonymous
        faults, heads = list(map(str, listing.faults.values())), "segmentation heads"
        content = {
            "note": NOTE, "group_note": GROUP_NOTE,
            "checkpoint": Path(self.options.ckpt).name if hidden else self.options.ckpt,
            "settings": model.settings.to_dict(), "calibration": model.calibration, "heat_range": model.heat_range,
            "heat": "weak localisation from the detection heads, not measured" if model.weak else heads,
            "window": model.reading.window, "plane": model.reading.plane,
            "no_image": len(listing.no_image) if hidden else listing.no_image,
            "not_read": len(faults) if hidden else faults,
        }  # fmt: skip
        if rows:
            (self.out / "groups.csv").unlink(missing_ok=True)
            if self.options.group_by:
                groups = group_rows(result, self.options.group_by, model.threshold)
                write_csv(self.out / "groups.csv", groups)
                content |= {"group_by": self.options.group_by, "groups": groups}
            with atomic_path(self.out / "predictions.json", "--out") as path:
                write_json(path, {**content, "predictions": rows}, "--out")
                (self.out / "predictions.json").unlink(missing_ok=True)
                write_csv(self.out / "predictions.csv", rows)
            if self.options.report:
                print(f"report: {self.write_page(result)}")
        self.file.close()
        (self.out / PARTIAL).unlink()
        self.lock.release()
        if not rows:
            raise InputError(f"no image could be read, see above; {self.out} is as it was")
        return result

    def write_page(self, rows: Sequence[tuple[Entry, Row]]) -> Path:
        """Write --report's page: the MAX_CARDS highest-scoring images, volumes as strips of their slices in order."""
        options, model, scores = self.options, self.model, np.array([row["score"] for _, row in rows])
        highest = sorted(np.argsort(-scores, kind="stable")[:MAX_CARDS].tolist())
        shown = dict.fromkeys(rows[i][0].key for i in highest)  # in order
        cards = {key: card for key, _, card in self.lines() if card and key in shown}
        origin = threshold_words(model.calibration) if model.calibration else "The checkpoint has no threshold."
        if options.threshold is not None:
            origin = "It was given with --threshold."
        return write(
            options.report, "predictions.html", [cards[key] for key in shown], scores=[scores],
            threshold=model.threshold, heat_range=model.heat_range, origin=origin, weak=model.weak,
            title="Predictions" if options.anonymous else preview([Path(name).name for name in options.images]),
            counts=", ".join(summary(rows)[:-1]), made=model.settings.to_dict(),
        )  # fmt: skip


def label(picture: Image.Image, edges: str, weak: bool) -> Image.Image:
    """Write the patient's sides at the picture's edges and, if `weak`, that the localisation is weak."""
    width, height = picture.size
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(12, min(width, height) // 16))
    places = (((3, height / 2), "lm"), ((width - 3, height / 2), "rm"), ((width / 2, 3), "ma"),
              ((width / 2, height - 3), "md"))  # fmt: skip
    words = [(side, *place) for side, place in zip(edges, places, strict=False)]
    words += [("weak localisation", (3, 3), "la")] * weak
    for text, place, anchor in words:
        draw.text(place, text, "white", font, anchor, stroke_width=2, stroke_fill="black")
    return picture


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write a table; its columns are those of the first row."""
    with (
        atomic_path(path, "--out") as new,
        new.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)


def group_rows(rows: Iterable[tuple[Entry, Row]], by: str, threshold: float | None) -> list[Row]:
    """A row for each group of --group_by, the highest score first."""
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


def summary(rows: Sequence[tuple[Entry, Row]]) -> list[str]:
    """How many of the patients, series and images are abnormal; patients and series only if there are some."""
    names = {
        "patients": [entry.slice.patient_id for entry, _ in rows],
        "series": [entry.series if entry.count > 1 else "" for entry, _ in rows],
        "images": [entry.name for entry, _ in rows],
    }
    counts = []
    for kind, of in names.items():
        abnormal = {name for name, (_, row) in zip(of, rows, strict=True) if row["abnormal"]}
        counts += [f"{len(abnormal - {''})} of {len(set(of) - {''})} {kind}"] * any(of)
    return counts
