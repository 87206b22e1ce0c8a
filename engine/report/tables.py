"""Tables of results: figures over seeds beside published ones, as Markdown, CSV and LaTeX for a two-column article."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dataset.layout import PUBLISHED
from utils import InputError, atomic_path, read_text

METRICS = {"auc": "image AUC", "pauc": "pixel AUC"}
ROWS_ON_A_PAGE = 40  # of LaTeX's \footnotesize, with room for caption and notes; a longer table is divided
LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    "<": "$<$", ">": "$>$", "|": "$|$", '"': "''",
}  # fmt: skip
LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


@dataclass(frozen=True)
class Figure:
    """A metric in percent over seeds."""

    mean: float
    std: float | None = None  # of the sample; None for a single seed
    interval: tuple[float, float] | None = None  # 95%, over the test images; the mean of the seeds' bounds
    seeds: int | None = None  # None for a published figure
    planned: int | None = None  # seeds that the table asks for

    @classmethod
    def over(cls, values: Sequence[float], intervals: Sequence[Sequence[float]], planned: int) -> Figure | None:
        """From one value in [0, 1] and one interval a seed; None without any value."""
        if not values:
            return None
        bounds = [100 * mean(bound) for bound in zip(*intervals, strict=True)]
        std = 100 * stdev(values) if len(values) > 1 else None
        return cls(100 * mean(values), std, (bounds[0], bounds[1]) if bounds else None, len(values), planned)

    def __str__(self) -> str:
        text = f"{self.mean:.2f}"
        if self.std is not None:
            text += f" ± {self.std:.2f}"
        return text if self.seeds == self.planned else f"{text} ({self.seeds} of {self.planned} seeds)"


@dataclass(frozen=True)
class Block:
    """The part of a table for one metric: a grid of texts, without empty rows and columns."""

    metric: str
    columns: list[str]
    rows: list[tuple[tuple[str, ...], list[str]]]  # a row's labels and its cells


@dataclass
class Table:
    """Figures or short texts (`to do`, `failed`) under a metric, a row's labels and a column's heading.

    Args:
        name: of files and of LaTeX's label.
        caption: at most three lines of an article, so about 300 characters.
        labels: headings of the labels that a row has.
        heading: what the columns are.
        notes: sentences under the table.
    """

    name: str
    caption: str
    labels: Sequence[str]
    heading: str = "data set"
    notes: Sequence[str] = ()
    cells: dict[tuple[str, tuple[str, ...], str], Figure | str] = field(default_factory=dict)

    def add(self, metric: str, row: Sequence[str], column: str, value: Figure | str | None) -> None:
        """Put a cell at the end of the table's order; None is no cell, and a row or column without any is not shown."""
        if value is not None:
            self.cells[metric, tuple(row), column] = value

    def blocks(self, intervals: bool = False) -> list[Block]:
        """One block a metric: of the figures and texts, or of the intervals of those figures that have one."""
        shown = dict(self._texts(intervals))
        order = dict.fromkeys(column for _, _, column in self.cells)
        blocks = []
        for metric in dict.fromkeys(metric for metric, _, _ in shown):
            keys = [key for key in shown if key[0] == metric]
            columns = [column for column in order if any(column == key[2] for key in keys)]
            rows = dict.fromkeys(row for _, row, _ in keys)
            cells = [(row, [shown.get((metric, row, column), "") for column in columns]) for row in rows]
            blocks.append(Block(metric, columns, cells))
        return blocks

    def _texts(self, intervals: bool) -> Iterator[tuple[tuple[str, tuple[str, ...], str], str]]:
        for key, value in self.cells.items():
            if not intervals:
                yield key, str(value)
            elif isinstance(value, Figure) and value.interval:
                yield key, f"[{value.interval[0]:.2f}, {value.interval[1]:.2f}]"

    def markdown(self) -> str:
        """A pipe table a metric, and one of its intervals."""
        parts = [self.caption]
        for intervals, word in ((False, ""), (True, ", 95% intervals")):
            for block in self.blocks(intervals):
                lines = [
                    [*self.labels, *block.columns],
                    ["---"] * len(self.labels) + ["---:"] * len(block.columns),
                    *([*row, *cells] for row, cells in block.rows),
                ]
                escaped = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
                parts += [f"**{block.metric}{word}**", "\n".join(f"| {line} |" for line in escaped)]
        return "\n\n".join([*parts, *self.notes]) + "\n"

    def latex(self) -> str:
        """`table*` environments: the figures, then the intervals; each fits a page as far as one metric does."""
        parts = [r"% needs \usepackage{booktabs} and \usepackage{graphicx}"]
        for intervals in (False, True):
            blocks = self.blocks(intervals)
            caption = rf"95\% intervals of the figures in Table~\ref{{tab:{self.name}}}." if intervals else ""
            together = sum(len(block.rows) for block in blocks) <= ROWS_ON_A_PAGE
            for i, group in enumerate([blocks] if together and blocks else [[block] for block in blocks]):
                label = f"tab:{self.name}{'-intervals' if intervals else ''}{f'-{i + 1}' if i else ''}"
                text = (caption or latex(self.caption)) + (" (Continued.)" if i else "")
                parts.append(self._float(group, text, label, () if i or intervals else self.notes))
        return "\n\n".join(parts) + "\n"

    def _float(self, blocks: Sequence[Block], caption: str, label: str, notes: Sequence[str]) -> str:
        columns = list(dict.fromkeys(column for block in blocks for column in block.columns))
        lines = [" & ".join(map(latex, [*self.labels, *columns])) + r" \\"]
        width = len(self.labels) + len(columns)
        for block in blocks:
            lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\emph{{{latex(block.metric)}}}}} \\"]
            before: tuple[str, ...] = ("",) * len(self.labels)
            for row, cells in block.rows:
                # A label that stands above already is not repeated.
                same = next((k for k, (a, b) in enumerate(zip(row, before, strict=True)) if a != b), len(row))
                labels = [("" if k < same and k < len(row) - 1 else label) for k, label in enumerate(row)]
                of_column = dict(zip(block.columns, cells, strict=True))
                lines.append(" & ".join(map(latex, [*labels, *(of_column.get(c, "") for c in columns)])) + r" \\")
                before = row
        return "\n".join([
            r"\begin{table*}[t]",
            r"\centering\footnotesize\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{caption}}}",
            rf"\label{{{label}}}\par\smallskip",
            rf"\sbox0{{\begin{{tabular}}{{{'l' * len(self.labels)}{'r' * len(columns)}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}}%",
            r"\ifdim\wd0>\textwidth\resizebox{\textwidth}{!}{\usebox0}\else\usebox0\fi",
            *([rf"\par\smallskip\parbox{{\textwidth}}{{{latex(' '.join(notes))}}}"] if notes else []),
            r"\end{table*}",
        ])  # fmt: skip

    def csv(self) -> str:
        """A line for each figure."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([
            *self.labels, self.heading, "metric", "mean", "std", "ci95_low", "ci95_high", "seeds", "note"
        ])  # fmt: skip
        for (metric, row, column), value in self.cells.items():
            if isinstance(value, Figure):
                numbers = [value.mean, value.std, *(value.interval or (None, None))]
                texts = ["" if number is None else f"{number:.6f}" for number in numbers]
                writer.writerow([*row, column, metric, *texts, value.seeds, ""])
            else:
                writer.writerow([*row, column, metric, "", "", "", "", "", value])
        return file.getvalue()

    def write(self, folder: Path) -> list[Path]:
        """Write `name`.md, .csv and .tex."""
        texts = {".md": self.markdown(), ".csv": self.csv(), ".tex": self.latex()}
        for suffix, text in texts.items():
            with atomic_path(folder / f"{self.name}{suffix}", "--out") as path:
                path.write_text(text, encoding="utf-8")
        return [folder / f"{self.name}{suffix}" for suffix in texts]


def latex(text: str) -> str:
    """Text with LaTeX's own characters escaped, without a `--` that would become a dash, and with minus signs."""
    escaped = "".join(LATEX.get(character, character) for character in text)
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", re.sub("-(?=-)", "-{}", escaped))


@dataclass(frozen=True)
class Published:
    """One method's published figures."""

    method: str
    source: str
    shots: int | None
    selection: str | None  # how the epoch was chosen; None: not stated
    figures: dict[str, dict[str, float]]  # metric -> data set -> percent; nothing where they are not on record

    def figure(self, obj: str, shots: int, metric: str) -> Figure | None:
        """The figure for a data set; None where the source has none for it or for so many shots."""
        percent = self.figures.get(metric, {}).get(obj) if shots == self.shots else None
        return None if percent is None else Figure(percent)

    def note(self) -> str:
        """Where the figures are from, and how they came about."""
        shots = "" if self.shots is None else f", {self.shots} shots"
        return f"{self.method}: {self.source}{shots}, {self.selection or 'selection not stated'}"


def read_published(paths: Iterable[Path] = ()) -> list[Published]:
    """What dataset/published_results.json holds, and then other files of that form.

    Such a file is {"results": [{"method": ..., "source": ..., "shots": 4, "selection": ..., "auc": {data set: percent},
    "pauc": {...}}, ...]}; `selection` and either metric may be left out or null.

    Raises:
        InputError: naming file and entry, for what is not of that form, or is not in percent.
    """
    return [entry for path in (PUBLISHED, *paths) for entry in _read_results(path)]


def _read_results(path: Path) -> Iterator[Published]:
    try:
        results = json.loads(read_text(path))["results"]
    except OSError as error:
        raise InputError(f"--compare {path}: cannot be read ({error.strerror})") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f'--compare {path}: expected JSON {{"results": [...]}} ({error})') from error
    for number, entry in enumerate(results if isinstance(results, list) else [results], 1):
        if fault := next(_faults(entry), None):
            raise InputError(f"--compare {path}, entry {number}: {fault}; see dataset/{PUBLISHED.name}")
        yield Published(
            entry["method"], entry["source"], entry.get("shots"), entry.get("selection"),
            {metric: entry[metric] for metric in METRICS if entry.get(metric)},
        )  # fmt: skip


def _faults(entry: Any) -> Iterator[str]:  # noqa: ANN401 - whatever JSON holds
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("method", "source")):
        yield "needs a text for `method` and for `source`"
        return
    known = {"method", "source", "shots", "selection", *METRICS}
    if unknown := sorted(set(entry) - known):
        yield f"unknown {unknown[0]!r}; it may hold {', '.join(sorted(known))}"
    shots, selection = entry.get("shots"), entry.get("selection")
    if not (shots is None or (type(shots) is int and shots > 0)) or not isinstance(selection, str | None):
        yield "`shots` is a number from 1 on, `selection` a text"
    for metric in METRICS:
        values = entry.get(metric) or {}
        if not isinstance(values, dict):
            yield f"`{metric}` must be {{data set: percent}}"
            continue
        if values and shots is None:
            yield "figures need their number of `shots`"
        for obj, value in values.items():
            if type(value) not in (int, float) or not 1 < value <= 100:
                yield f"`{metric}` of {obj} is {value!r:.40}, not a percentage above 1 and up to 100"
