"""A list instead of folders: a row for each image, in images.csv, .tsv or .jsonl.

Columns are image and label, and optionally mask (several with | between), patient, split (valid or test; train counts
as valid), slice (of a volume, counted from 0) and shot (1: this is one). Paths are relative to the list. What is not
given follows the rules of folders: a division by patient, masks beside the images. Tables may look as Excel writes
them: semicolons, a byte-order mark, empty lines, backslashes in paths.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from utils import InputError, atomic_path, blame, read_text

from .entries import Entry, divide, name_for_lists, name_patients, pair
from .layout import Layout
from .pairing import list_pictures

COLUMNS = ("image", "label", "mask", "patient", "split", "slice", "shot")
NAMES = ("images.csv", "images.tsv", "images.jsonl")
LABELS = {
    "0": "normal",
    "normal": "normal",
    "good": "normal",
    "1": "abnormal",
    "abnormal": "abnormal",
    "ungood": "abnormal",
}
SPLITS = {"": "", "valid": "valid", "val": "valid", "train": "valid", "test": "test"}
SWITCH = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}
Row = dict[str, str]  # column -> cell, without blanks around it


def find_list(root: Path) -> Path | None:
    """The list in a data set's folder, if there is one."""
    return next((root / name for name in NAMES if (root / name).is_file()), None)


def read_list(path: Path, layout: Layout) -> list[Entry]:
    """The images on a list, normal ones first, else in its order.

    Raises:
        InputError: naming the line: a file that is not there, a label or split that is unknown, an image that stands
            twice, a path that leads out of the list's folder.
    """
    entries: list[Entry] = []
    lines: dict[tuple[Path, int | None], int] = {}
    has_masks = False
    for number, row in read_rows(path):
        where = f"{path}, line {number}"
        image = _locate(path.parent, row["image"], where)
        with blame(f"{where}: slice {row.get('slice')}"):
            index = int(float(row["slice"])) if row.get("slice") else None
        if (image, index) in lines:
            raise InputError(f"{where}: {row['image']} stands in line {lines[image, index]} already")
        lines[image, index] = number
        known = {**LABELS, **dict.fromkeys(map(str.lower, layout.normal), "normal")}
        others = "abnormal" if layout.normal and row["label"] else None
        kind = _choose(known, row["label"].removesuffix(".0"), f"{where}: label", others)
        split = _choose(SPLITS, row.get("split", ""), f"{where}: split")
        has_masks |= "mask" in row
        masks = [_locate(path.parent, text, where) for text in filter(None, row.get("mask", "").split("|"))]
        entries.append(Entry(
            image, image.relative_to(path.parent).as_posix(), kind, image.parent.relative_to(path.parent).as_posix(),
            masks, split, divided=not split, patient=row.get("patient") or None, index=index,
            shot=_choose(SWITCH, row.get("shot", ""), f"{where}: shot"),
            word="" if kind == "normal" or row["label"].lower() in LABELS else row["label"],
        ))  # fmt: skip
    entries.sort(key=lambda entry: entry.kind == "abnormal")
    if not has_masks:
        pair(path.parent, entries, list_pictures(path.parent)[1])
    name_for_lists(entries)
    name_patients(entries, layout.patient)
    divide(entries, path.parent, layout.valid_share)
    return entries


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a list that are not empty, and their line numbers; `InputError` where they are no table."""
    with blame(path):
        text = read_text(path)
    rows = _json_rows(path, text) if path.suffix.lower() == ".jsonl" else _table_rows(path, text)
    for number, row in rows:
        if any(row.values()):
            if missing := [name for name in COLUMNS[:2] if name not in row]:
                raise InputError(f"{path}, line {number}: no column {missing[0]}; a list has {', '.join(COLUMNS)}")
            yield number, row


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            with blame(f"{path}, line {number}"):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {number}: not an object")
            yield number, {str(name).lower(): "" if cell is None else str(cell).strip() for name, cell in row.items()}


def _table_rows(path: Path, text: str) -> Iterator[tuple[int, Row]]:
    first = next((line for line in text.splitlines() if line.strip() and not line.startswith("sep=")), "")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True)
    heads: list[str] = []
    with blame(path, errors=(csv.Error,)):
        for cells in reader:
            row, where = [cell.strip() for cell in cells], f"{path}, line {reader.line_num}"
            if not any(row) or (not heads and row[0].startswith("sep=")):
                continue
            if not heads:
                heads = [name.lower() for name in row]
                if unknown := [name for name in heads if name and heads.count(name) > 1]:
                    raise InputError(f"{where}: two columns {unknown[0]}")
            elif len(row) > len(heads) and any(row[len(heads) :]):
                raise InputError(f"{where}: {len(row)} cells for {len(heads)} columns; put quotes around a comma")
            else:
                yield reader.line_num, dict(zip(heads, row + [""] * len(heads), strict=False))


def _locate(root: Path, text: str, where: str) -> Path:
    """The file that a cell names."""
    place = PurePosixPath(text.replace("\\", "/"))
    if place.is_absolute() or ".." in place.parts or re.match("[A-Za-z]:", text):
        raise InputError(f"{where}: {text} leads out of the list's folder")
    if not (root / place).is_file():
        raise InputError(f"{where}: {text or 'an image without a name'}: no such file in {root}")
    return root / place


def _choose(known: dict[str, Any], cell: str, where: str, otherwise: Any = None) -> Any:  # noqa: ANN401 - of `known`
    if cell.lower() not in known and otherwise is None:
        words = ", ".join(list(filter(None, known))[:8])
        raise InputError(f"{where} {cell!r} is unknown; it may be {words} (docs/data.md)")
    return known.get(cell.lower(), otherwise)


def write_list(path: Path, root: Path, entries: Iterable[Entry]) -> Path:
    """Write a list of a data set's images, for the user to correct, and return where; `InputError` where it cannot be.

    A name without a folder is a file in the data set's, from where it is read.
    """
    path = root / path if path.parent == Path() else path
    if path.exists():
        raise InputError(f"--write_list {path}: is there already")
    if path.resolve().parent not in (root.resolve(), *root.resolve().parents):
        raise InputError(
            f"--write_list {path}: a list lies in the data set's folder or above it, as its paths lead down"
        )

    def place(file: Path) -> str:
        return file.resolve().relative_to(path.resolve().parent).as_posix()

    with atomic_path(path, "--write_list") as temporary, temporary.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(COLUMNS)
        for entry in entries:
            masks = "|".join(map(place, entry.masks))
            index = "" if entry.index is None else entry.index
            writer.writerow((place(entry.path), entry.kind, masks, entry.patient, entry.split, index, int(entry.shot)))
    return path


def unlabelled(root: Path) -> list[Entry]:
    """Every picture in a folder of no known layout, for a list whose labels are to be filled in."""
    images, masks = list_pictures(root)
    entries = [Entry(path, path.name, "", "") for path in images]
    pair(root, entries, masks)
    return entries
