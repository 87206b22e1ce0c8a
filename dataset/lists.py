"""A list instead of folders: a row for each image, in images.csv, .tsv or .jsonl.

Columns are image and label, and optionally kind (of abnormal, such as malignant), mask (several with | between),
patient, split (valid or test; train counts as valid), slice (of a volume, counted from 0) and shot (1: this is one).
Paths are relative to the list. What is not given follows the rules of folders: a division by patient, masks beside the
images. Tables may look as Excel writes them: semicolons, a byte-order mark, empty lines, backslashes in paths.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from utils import EXPECTED, InputError, atomic_path, blame, read_text

from .entries import Entry, divide, name_for_lists, name_patients, pair
from .layout import Layout
from .pairing import list_pictures
from .readers.images import file_kind

COLUMNS = ("image", "label", "kind", "mask", "patient", "split", "slice", "shot")
NAMES = ("images.csv", "images.tsv", "images.jsonl")
LABELS = {"0": "normal", "normal": "normal", "good": "normal",
          "1": "abnormal", "abnormal": "abnormal", "ungood": "abnormal"}  # fmt: skip
SPLITS = {"": "", "valid": "valid", "val": "valid", "train": "valid", "test": "test"}
SWITCH = {"": False, "0": False, "false": False, "1": True, "true": True}
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
    for number, row in _rows(path):
        with blame(where := f"{path}, line {number}"):
            entry = _entry(path.parent, row, layout, where)
        first = lines.setdefault((entry.path, entry.index), number)
        if first != number:
            raise InputError(f"{where}: {row['image']} stands in line {first} already")
        entries.append(entry)
        has_masks |= "mask" in row
    entries.sort(key=lambda entry: entry.kind == "abnormal")
    if not has_masks:
        pair(path.parent, entries, list_pictures(path.parent)[1])
    name_for_lists(entries)
    name_patients(entries, layout.patient)
    divide(entries, path.parent, layout.valid_share)
    return entries


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows that are not empty, and the line in which each ends; `InputError` where they are no table."""
    with blame(path, "save it as CSV in UTF-8"):
        text = read_text(path)
    if path.suffix.lower() != ".jsonl":
        yield from _table_rows(path, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            with blame(f"{path}, line {number}", errors=(*EXPECTED, TypeError)):  # a TypeError: it is no object
                row = dict(json.loads(line))
            yield number, {name.lower(): "" if cell is None else str(cell).strip() for name, cell in row.items()}


def _table_rows(path: Path, text: str) -> Iterator[tuple[int, Row]]:
    first = next((line for line in text.splitlines() if line.strip(",; \t") and not line.startswith("sep=")), "")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True)
    heads: list[str] = []
    number = 0
    try:
        for number, cells in ((reader.line_num, list(map(str.strip, cells))) for cells in reader):
            if not any(cells) or (not heads and cells[0] == "sep="):  # sep=; tells Excel
                continue
            if not heads:
                heads = [name.lower() for name in cells]
                if twice := {name for name in heads if name and heads.count(name) > 1}:
                    raise InputError(f"{path}, line {number}: two columns {min(twice)}")
            elif any(cells[len(heads) :]):
                raise InputError(f"{path}, line {number}: {len(cells)} cells for {len(heads)} columns; put quotes "
                                 f"around a path with a comma")  # fmt: skip
            else:
                yield number, dict(zip(heads, cells + [""] * len(heads), strict=False))
    except csv.Error as error:
        raise InputError(f"{path}, line {number + 1}: {error}; is a quotation mark not closed?") from error


def _entry(root: Path, row: Row, layout: Layout, where: str) -> Entry:
    """The image of a row; a `ValueError` is a slice that is no number."""
    if missing := [name for name in COLUMNS[:2] if name not in row]:
        raise InputError(f"{where}: no column {missing[0]}; a list has {', '.join(COLUMNS)}")
    paths = (row["image"], *filter(None, row.get("mask", "").split("|")))
    image, *masks = [_locate(root, text, where) for text in paths]
    label = row["label"].removesuffix(".0")
    known = LABELS | dict.fromkeys(map(str.lower, layout.normal), "normal")
    kind = _choose(known, label, f"{where}: label", "abnormal" if layout.normal and label else None)
    word = row.get("kind", "") or (label if label.lower() not in known else "")
    split = _choose(SPLITS, row.get("split", ""), f"{where}: split")
    return Entry(
        image, image.relative_to(root).as_posix(), kind, image.parent.relative_to(root).as_posix(), masks, split,
        divided=not split, patient=row.get("patient") or None, word=word if kind == "abnormal" else "",
        index=int(float(row["slice"])) if row.get("slice") else None,
        shot=_choose(SWITCH, row.get("shot", "").removesuffix(".0"), f"{where}: shot"),
    )  # fmt: skip


def _locate(root: Path, text: str, where: str) -> Path:
    """The file that a cell names."""
    place = PurePosixPath(text.replace("\\", "/"))
    if place.is_absolute() or ".." in place.parts or re.match("[A-Za-z]:", text):
        raise InputError(f"{where}: {text} leads out of the list's folder")
    if not (root / place).is_file():
        raise InputError(f"{where}: {text or 'an image without a name'}: no such file in {root}")
    if file_kind(root / place) is None:
        raise InputError(f"{where}: {text} is no image by its extension")
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
    with blame(f"--write_list {path}", "write it into the data set's folder or above it: its paths lead down"):
        top = root.resolve().relative_to(path.resolve().parent)

    def row(entry: Entry) -> Row:
        image, *masks = [(top / file.relative_to(root)).as_posix() for file in (entry.path, *entry.masks)]
        index = "" if entry.index is None else str(entry.index)
        cells = (image, entry.kind, entry.word, "|".join(masks), entry.patient or "", entry.split, index)
        return dict(zip(COLUMNS, (*cells, str(int(entry.shot))), strict=True))

    is_json = path.suffix.lower() == ".jsonl"
    encoding = "utf-8" if is_json else "utf-8-sig"  # by its mark Excel knows UTF-8
    with atomic_path(path, "--write_list") as temporary, temporary.open("w", encoding=encoding, newline="") as file:
        if is_json:
            file.writelines(json.dumps(row(entry), ensure_ascii=False) + "\n" for entry in entries)
        else:
            writer = csv.DictWriter(file, COLUMNS, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(map(row, entries))
    return path


def unlabelled(root: Path) -> list[Entry]:
    """Every picture in a folder of no known layout, for a list whose labels are to be filled in."""
    images, masks = list_pictures(root)
    entries = [Entry(path, path.name, "", "") for path in images]
    pair(root, entries, masks)
    return entries
