"""Few-shot lists and sampling: which labelled images are used for training."""

import random
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from utils import InputError, blame, preview, read_text

LETTERS = "na"  # of the lines for label 0 (normal) and label 1 (abnormal)
Lines = dict[tuple[str, int], list[str]]  # (`a` or `n`, index) -> names
SEEDS = Path(__file__).parent / "fewshot_seed"  # the project's lists: SEEDS / obj
NAME = re.compile(r'"([^"]+)"|\'([^\']+)\'|(\S+)')  # quoted if it contains blanks


def list_paths(folder: Path) -> list[Path]:
    """The few-shot lists in a folder, sorted by name."""
    return [path for path in sorted(folder.glob("*")) if re.fullmatch(r"my\d+-shot\.txt", path.name)]


def parse_shot_list(path: Path) -> tuple[Lines, list[str]]:
    """Parse the lines `a-K: name name ...` and `n-K: name name ...` of a few-shot list like the published program.

    Returns:
        The names of each line, and warnings. Names that contain blanks are quoted in the list. Lines of another form
        are skipped; if two lines have the same letter and K, the first is used; a repeated name counts each time.

    Raises:
        InputError: the file cannot be read.
    """
    with blame(path):
        text = read_text(path)
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
            lines[key] = [next(filter(None, groups)) for groups in NAME.findall(match[3])]
            if repeated := [name for name, count in Counter(lines[key]).items() if count > 1]:
                warnings.append(f"{where}: names {preview(repeated)} more than once; each time is a shot")
    return lines, warnings


def quoted(names: Sequence[str]) -> str:
    """The names as written on a line of a list, with quotes around those that contain blanks."""
    return " ".join(f'"{name}"' if re.search(r"\s", name) else name for name in names)


def pick_names(lines: Lines, warnings: Sequence[str], path: Path, letter: str, iterate: int) -> list[str]:
    """The names of a class for `iterate`; raises `InputError` if there are none."""
    if not lines.get((letter, iterate)):
        known = ", ".join(sorted({str(index) for _, index in lines})) or "none"
        fault = f"--iterate {iterate}: {path} has no line `{letter}-{iterate}:` with names (it has {known})"
        raise InputError("; ".join([fault, *warnings[:1]]))
    return lines[letter, iterate]


def check_shot_names(names: Sequence[str], known: Collection[str], count: int, source: str, root: Path) -> list[str]:
    """A warning if a list has more than `count` names; all are used, as in the published program.

    Raises:
        InputError: a name is not an image of that class in valid, or there are fewer than `count` names.
    """
    for name in names:
        if name not in known:
            reason = "has no such image" if set(names) & set(known) else "has none of the images on this list"
            raise InputError(f"{source}: names {name}, but that class of valid {reason} in {root}")
    if len(names) < count:
        raise InputError(f"{source}: names {len(names)} images for {count} shots: {preview(names)}")
    if len(names) > count:
        return [f"{source}: names {len(names)} images for {count} shots; all of them are used"]
    return []


def draw_shots(draw: random.Random, patients: Mapping[str, str | None], count: int) -> list[str]:
    """Draw `count` names at random, from different patients if there are enough of them.

    Args:
        draw: the generator; if it draws several images of a patient, a separate generator draws the replacements.
        patients: name -> patient, None if unknown.
        count: at most the number of names.
    """

    def of_others(names: Sequence[str]) -> list[str]:
        first: dict[str, str] = {}  # patient, or the name if unknown -> name
        for name in names:
            first.setdefault(patients[name] or name, name)
        return list(first.values())

    names = draw.sample(sorted(patients), count)
    chosen = of_others(names)
    if len(chosen) < count:
        rest = sorted(patients.keys() - chosen)
        more = random.Random(" ".join(names)).sample(rest, len(rest))  # not `draw`: the next class must not change
        chosen = of_others([*chosen, *more])
        chosen += [name for name in names if name not in chosen]  # fewer patients than shots
    return chosen[:count]
