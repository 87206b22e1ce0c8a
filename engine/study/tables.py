"""Tables of results: figures over seeds beside published ones, as Markdown, CSV and LaTeX for a two-column article."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from dataset.layout import PUBLISHED
from utils import InputError, atomic_path, checked, read_text

ROWS_ON_A_PAGE = 40  # of LaTeX's \footnotesize, with room for caption and notes; a longer table is divided
LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    "<": "$<$", ">": "$>$", "|": "$|$", '"': "''", **{character: f"\\{character}" for character in "&%$#_{}"},
}  # fmt: skip


@dataclass(frozen=True)
class Statistic:
    """A metric in percent over seeds."""

    mean: float
    std: float | None = None  # of the sample; None for a single seed
    interval: tuple[float, float] | None = None  # 95%, over the test images; the mean of the seeds' bounds
    seeds: int | None = None  # None for a published figure
    planned: int | None = None  # seeds that the table asks for

    @classmethod
    def over(cls, values: Sequence[float], intervals: Sequence[Sequence[float]], planned: int) -> Statistic:
        """From one value in [0, 1] and one interval a seed, or no intervals."""
        low_high = [100 * mean(bound) for bound in zip(*intervals, strict=True)]
        std = 100 * stdev(values) if len(values) > 1 else None
        return cls(100 * mean(values), std, (low_high[0], low_high[1]) if low_high else None, len(values), planned)

    def __str__(self) -> str:
        text = f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"
        return text if self.seeds == self.planned else f"{text} ({self.seeds} of {self.planned} seeds)"


class Block(NamedTuple):
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
    cells: dict[tuple[str, tuple[str, ...], str], Statistic | str] = field(default_factory=dict)

    def add(self, metric: str, row: Sequence[str], column: str, value: Statistic | str | None) -> None:
        """Put a cell at the end of the table's order; None is no cell, and a row or column without any is not shown."""
        if value is not None:
            self.cells[metric, tuple(row), column] = value

    def blocks(self, intervals: bool) -> Iterator[Block]:
        """One block a metric: of the figures and texts, or of the intervals of those figures that have one."""
        shown = {key: str(value) for key, value in self.cells.items()}
        if intervals:
            known = {key: value.interval for key, value in self.cells.items() if isinstance(value, Statistic)}
            shown = {key: f"[{bounds[0]:.2f}, {bounds[1]:.2f}]" for key, bounds in known.items() if bounds}
        for metric in dict.fromkeys(metric for metric, _, _ in shown):
            here = {column for other, _, column in shown if other == metric}
            columns = [column for column in dict.fromkeys(column for _, _, column in self.cells) if column in here]
            rows = dict.fromkeys(row for other, row, _ in shown if other == metric)
            yield Block(metric, columns, [(row, [shown.get((metric, row, c), "") for c in columns]) for row in rows])

    def markdown(self) -> str:
        """A pipe table a metric, and one of its intervals."""
        parts = [self.caption]
        for intervals, word in ((False, ""), (True, ", 95% intervals")):
            for metric, columns, rows in self.blocks(intervals):
                rule = ["---"] * len(self.labels) + ["---:"] * len(columns)
                lines = [[*self.labels, *columns], rule, *([*row, *cells] for row, cells in rows)]
                escaped = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
                parts += [f"**{metric}{word}**", "\n".join(f"| {line} |" for line in escaped)]
        return "\n\n".join([*parts, *self.notes]) + "\n"

    def latex(self) -> str:
        """`table*` environments: the figures, then the intervals; each fits a page as far as one metric does."""
        parts = [r"% needs \usepackage{booktabs} and \usepackage{graphicx}"]
        for intervals in (False, True):
            blocks = list(self.blocks(intervals))
            caption = rf"95\% intervals of the figures in Table~\ref{{tab:{self.name}}}." if intervals else ""
            together = blocks and sum(len(block.rows) for block in blocks) <= ROWS_ON_A_PAGE
            for i, group in enumerate([blocks] if together else [[block] for block in blocks]):
                label = f"tab:{self.name}{'-intervals' if intervals else ''}{f'-{i + 1}' if i else ''}"
                text = (caption or latex(self.caption)) + (" (Continued.)" if i else "")
                parts.append(self._float(group, text, label, () if i or intervals else self.notes))
        return "\n\n".join(parts) + "\n"

    def _float(self, blocks: Sequence[Block], caption: str, label: str, notes: Sequence[str]) -> str:
        columns = list(dict.fromkeys(column for block in blocks for column in block.columns))
        lines = [_latex_row([*self.labels, *columns])]
        for block in blocks:
            width = len(self.labels) + len(columns)
            lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\emph{{{latex(block.metric)}}}}} \\"]
            above: tuple[str, ...] = ()
            for row, cells in block.rows:
                # Labels that stand above already are not repeated, but the last always is.
                same = [row[: k + 1] == above[: k + 1] for k in range(len(row) - 1)]
                labels = ["" if repeated else label for label, repeated in zip(row, [*same, False], strict=True)]
                of_column = dict(zip(block.columns, cells, strict=True))
                lines.append(_latex_row([*labels, *(of_column.get(column, "") for column in columns)]))
                above = row
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
        names = ("metric", "mean", "std", "ci95_low", "ci95_high", "seeds", "note")
        writer.writerow([*self.labels, self.heading, *names])
        for (metric, row, column), value in self.cells.items():
            if isinstance(value, Statistic):
                numbers = [value.mean, value.std, *(value.interval or (None, None))]
                texts = ["" if number is None else f"{number:.6f}" for number in numbers]
                writer.writerow([*row, column, metric, *texts, value.seeds, ""])
            else:
                writer.writerow([*row, column, metric, "", "", "", "", "", value])
        return file.getvalue()

    def write(self, folder: Path) -> None:
        """Write `name`.md, .csv and .tex."""
        for suffix, text in ((".md", self.markdown()), (".csv", self.csv()), (".tex", self.latex())):
            with atomic_path(folder / f"{self.name}{suffix}", "--out") as path:
                path.write_text(text, encoding="utf-8")


def latex(text: str) -> str:
    """Text with LaTeX's own characters escaped, without a `--` that would become a dash, and with minus signs."""
    escaped = "".join(LATEX.get(character, character) for character in text)
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", re.sub("-(?=-)", "-{}", escaped))


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(map(latex, cells)) + r" \\"


@dataclass(frozen=True)
class Published:
    """One method's published figures: an entry of dataset/published_results.json, or of a file of that form."""

    method: str
    source: str
    shots: int | None = None
    selection: str | None = None  # how the epoch was chosen; None: not stated
    auc: dict[str, float] | None = None  # data set -> percent; None: not on record
    pauc: dict[str, float] | None = None

    @classmethod
    def read(cls, values: Any, where: str) -> Published:  # noqa: ANN401 - whatever JSON holds
        """An entry of a file; `InputError` where it is not of that form, or not in percent."""
        entry = checked(cls, values, where)
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise InputError(f"{where}: unknown {unknown[0]!r}; it may hold {', '.join(known)}")
        for obj, percent in (*(entry.auc or {}).items(), *(entry.pauc or {}).items()):
            if not 1 < percent <= 100:
                raise InputError(f"{where}: {obj} has {percent}, not a percentage above 1 and up to 100")
            if (entry.shots or 0) < 1:
                raise InputError(f"{where}: figures need their number of `shots`, from 1 on")
        return entry

    def figure(self, obj: str, shots: int, metric: str) -> Statistic | None:
        """`auc` or `pauc` of a data set; None where the source has none for it or for so many shots."""
        percent = (getattr(self, metric) or {}).get(obj) if shots == self.shots else None
        return None if percent is None else Statistic(percent)

    def note(self) -> str:
        """Where the figures are from, and how they came about."""
        shots = "" if self.shots is None else f", {self.shots} shots"
        return f"{self.method}: {self.source}{shots}, {self.selection or 'selection not stated'}"


def read_published(paths: Iterable[Path] = ()) -> list[Published]:
    """The entries of dataset/published_results.json and of other files: {"results": [an entry of `Published`, ...]}.

    Raises:
        InputError: naming file and entry, for what cannot be read, or is not of that form.
    """
    entries = []
    for path in (PUBLISHED, *paths):
        try:
            results = json.loads(read_text(path))["results"]
        except OSError as error:
            raise InputError(f"--compare {path}: cannot be read ({error.strerror})") from error
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise InputError(f'--compare {path}: expected JSON {{"results": [...]}} ({error})') from error
        for number, values in enumerate(results if isinstance(results, list) else [results], 1):
            entries.append(Published.read(values, f"--compare {path}, entry {number}"))
    return entries
