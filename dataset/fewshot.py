"""Few-shot lists and sampling: which labelled images training sees."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from utils import InputError, preview, read_text

Lines = dict[tuple[str, int], list[str]]  # (`a` or `n`, index) -> names
SEEDS = Path(__file__).parent / "fewshot_seed"  # the project's lists: SEEDS / obj


def parse_shot_list(path: Path) -> tuple[Lines, list[str]]:
    """Lines `a-K: name name ...` and `n-K: name name ...` of a few-shot list, as the published program takes them.

    Returns:
        The names of each line, and warnings: lines of another form are left out, of two for the same K the first
        counts, and a name that stands twice counts twice.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a few-shot list ({error})") from error
    lines: Lines = {}
    warnings = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        match = re.fullmatch(r"\s*([an])-(\d{1,9})\s*:(.*)", line)
        if match is None:
            warnings.append(f"{where}: left out, as it is no `a-K: name ...` or `n-K: name ...`: {line[:60]!r}")
        elif (key := (match[1], int(match[2]))) in lines:
            warnings.append(f"{where}: left out, as a line for {key[0]}-{key[1]} stands before it")
        else:
            lines[key] = match[3].split()
            if repeated := [name for name, count in Counter(lines[key]).items() if count > 1]:
                warnings.append(f"{where}: names {preview(repeated)} more than once; each time is a shot")
    return lines, warnings


def pick_lines(lines: Lines, warnings: Sequence[str], path: Path, iterate: int) -> tuple[list[str], list[str]]:
    """The abnormal and normal names for `iterate`; `InputError` where there are none."""
    for kind in "an":
        if not lines.get((kind, iterate)):
            known = ", ".join(sorted({str(index) for _, index in lines})) or "none"
            fault = f"--iterate {iterate}: {path} has no line `{kind}-{iterate}:` with names (it has {known})"
            raise InputError("; ".join([fault, *warnings[:1]]))
    return lines["a", iterate], lines["n", iterate]


def check_shot_names(names: Sequence[str], known: Collection[str], count: int, source: str, root: Path) -> list[str]:
    """Warnings about the names on a list: more than `count`, which are all used, as the published program does.

    Raises:
        InputError: a name that is no image of that class in valid, or too few of them.
    """
    for name in names:
        if name.startswith(("/", "\\")) or ".." in PurePosixPath(name).parts:
            raise InputError(f"{source}: {name!r} is not a plain file name")
        if name not in known:
            reason = "has no such image" if set(names) & set(known) else "has none of the images on this list"
            raise InputError(f"{source}: names {name}, but that class of valid {reason} in {root}")
    if len(names) < count:
        raise InputError(f"{source}: names {len(names)} images where {count} shots are meant: {preview(names)}")
    if len(names) > count:
        return [f"{source}: names {len(names)} images where {count} shots are meant; all of them are used"]
    return []
