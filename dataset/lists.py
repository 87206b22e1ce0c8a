"""A list of images instead of class folders: one row per image, in images.csv, .tsv or .jsonl.

The columns are image and label, and optionally kind (of abnormality, such as malignant), mask (several separated by |),
patient, split (valid or test; train counts as valid), slice (of a volume, or page of a TIFF, counted from 0) and shot
(1 marks a shot). Paths are relative to the list. The rules for folders apply to missing splits (by patient) and, if
there is no column mask, to masks (by name). Tables as written by Excel are accepted: semicolons, byte-order mark,
empty lines, backslashes in paths.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any

from utils import EXPECTED, InputError, atomic_path, blame, read_text

from .folders import complete
from .layout import KINDS, Layout
from .pairing import list_pictures, pair
from .readers.images import Sample, file_kind

COLUMNS = ("image", "label", "kind", "mask", "patient", "split", "slice", "shot")
NAMES = ("images.csv", "images.tsv", "images.jsonl")  # in a data set's folder
CHOICES: dict[str, dict[str, Any]] = {
    "label": {"0": 0, "normal": 0, "good": 0, "1": 1, "abnormal": 1, "ungood": 1},
    "split": {"": "", "valid": "valid", "val": "valid", "train": "valid", "test": "test"},
    "shot": {"": False, "0": False, "false": False, "1": True, "true": True},
}
Row = dict[str, str]  # column in lower case -> cell, both stripped


def read_list(path: Path, layout: Layout) -> list[Sample]:
    """The images on a list, normal ones first, otherwise in the order of the list.

    Raises:
        InputError: a column is missing, a file does not exist, a label or split is unknown, an image is listed twice,
            or a path leads out of the list's folder; the message names the line. Also the errors of `complete`.
    """
    files: list[Sample] = []
    lines: dict[tuple[Path, int | None], int] = {}
    rows = list(_rows(path))
    for number, row in rows:
        with blame(where := f"{path}, line {number}"):
            file = _file(path.parent, row, layout, where)
        if (first := lines.setdefault((file.path, file.index), number)) != number:
            raise InputError(f"{where}: {row['image']} stands in line {first} already")
        files.append(file)
    if not any("mask" in row for _, row in rows):
        files = pair(path.parent, files, list_pictures(path.parent)[1])
    return complete(files, path.parent, layout)


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows that are not empty, with their line numbers; raises `InputError` for a line that is not a row."""
    with blame(path), blame(path, "save it as CSV in UTF-8", (UnicodeError,)):
        lines = read_text(path).split("\n")
    errors = (*EXPECTED, csv.Error, TypeError)  # TypeError: not a JSON object
    heads, delimiter = list[str](), ""
    for number, line in enumerate(lines, start=1):
        if not line.strip(",;\t ") or line.startswith("sep="):  # `sep=;` is for Excel
            continue
        with blame(where := f"{path}, line {number}", "is a quotation mark not closed?", errors):
            if path.suffix.lower() == ".jsonl":
                row = dict(json.loads(line))
            else:
                delimiter = delimiter or max(",;\t", key=line.count)
                cells = next(csv.reader([line], delimiter=delimiter, strict=True))
                if any(cells[len(heads) :]) and heads:
                    raise InputError(f"{where}: {len(cells)} cells for {len(heads)} columns; put quotes around a path "
                                     f"with a comma")  # fmt: skip
                row = dict(zip_longest(heads, cells[: len(heads)], fillvalue=""))
                heads = heads or cells
        row = {name.strip().lower(): str("" if cell is None else cell).strip() for name, cell in row.items()}
        if row:
            yield number, row


def _file(root: Path, row: Row, layout: Layout, where: str) -> Sample:
    """The image of a row; raises `InputError`, or `ValueError` if the slice is not a number."""
    if missing := [name for name in COLUMNS[:2] if name not in row]:
        raise InputError(f"{where}: no column {missing[0]}; a list has {', '.join(COLUMNS)}")
    paths = (row["image"], *filter(None, row.get("mask", "").split("|")))
    image, *masks = [_locate(root, text, where) for text in paths]
    word, labels = row["label"].removesuffix(".0"), CHOICES["label"] | dict.fromkeys(map(str.lower, layout.normal), 0)
    kind = row.get("kind") or (word if layout.normal else "")
    if layout.normal and word:
        labels.setdefault(word.lower(), 1)
    chosen = {}
    for column, known in {**CHOICES, "label": labels}.items():
        cell = row.get(column, "").removesuffix(".0")
        if cell.lower() not in known:
            words = ", ".join(list(filter(None, known))[:8])
            raise InputError(f"{where}: {column} {cell!r} is unknown; it may be {words} (docs/data.md)")
        chosen[column] = known[cell.lower()]
    name, folder = (place.relative_to(root).as_posix() for place in (image, image.parent))
    return Sample(
        image, masks=tuple(masks), name=name, folder=folder, patient=row.get("patient") or None,
        index=int(float(row["slice"])) if row.get("slice") else None, kind=kind if chosen["label"] else "", **chosen,
    )  # fmt: skip


def _locate(root: Path, text: str, where: str) -> Path:
    """The path of the image or mask that a cell names; raises `InputError` if there is no such file below `root`."""
    place = PurePosixPath(text.replace("\\", "/"))
    if place.is_absolute() or ".." in place.parts or re.match("[A-Za-z]:", text):
        raise InputError(f"{where}: {text} leads out of the list's folder")
    if not (root / place).is_file():
        raise InputError(f"{where}: {text or 'an image without a name'}: no such file in {root}")
    if file_kind(root / place) is None:
        raise InputError(f"{where}: {text} does not have the extension of an image")
    return root / place


def write_list(path: Path, root: Path, files: Iterable[Sample]) -> Path:
    """Write a list of a data set's images for the user to correct, and return its path.

    A name without a folder is placed in the data set's folder. Raises `InputError` if `path` exists or is not writable.
    """
    path = root / path if path.parent == Path() else path
    if path.exists():
        raise InputError(f"--write_list {path}: is there already")
    with blame(f"--write_list {path}", "write it to the data set's folder or one above, so that no path needs '..'"):
        top = root.resolve().relative_to(path.resolve().parent)
    rows = []
    for file in files:
        image, *masks = [(top / place.relative_to(root)).as_posix() for place in (file.path, *file.masks)]
        label = "" if file.label < 0 else KINDS[file.label]
        rows.append((image, label, file.kind, "|".join(masks), file.patient, file.split, file.index, int(file.shot)))
    is_json = path.suffix.lower() == ".jsonl"
    encoding = "utf-8" if is_json else "utf-8-sig"  # Excel recognises UTF-8 by the byte-order mark
    names = blame(f"--write_list {path}", "rename the files whose names are not UTF-8", (UnicodeError,))
    with names, atomic_path(path, "--write_list") as draft, draft.open("w", encoding=encoding, newline="") as out:
        if is_json:
            out.writelines(json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)
        else:
            csv.writer(out, delimiter="\t" if path.suffix.lower() == ".tsv" else ",").writerows([COLUMNS, *rows])
    return path
