"""Tables of results: our metrics over seeds and published ones, as Markdown, CSV and LaTeX for a two-column article."""

from __future__ import annotations

import csv
import io
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import jinja2

from dataset.layout import PUBLISHED
from utils import EXPECTED, atomic_path, blame, csv_cell, read_json

NOTES_IN_LATEX = 480  # characters: three lines of \footnotesize over both columns
LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    "<": "$<$", ">": "$>$", "|": "$|$", '"': "''", **{character: f"\\{character}" for character in "&%$#_{}"},
}  # fmt: skip
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True,
    variable_start_string="<<", variable_end_string=">>", block_start_string="<%", block_end_string="%>",
    keep_trailing_newline=True,
)  # fmt: skip


@dataclass(frozen=True)
class Statistic:
    """A metric in percent over seeds."""

    mean: float
    std: float | None = None  # of the sample (n - 1); None for a single seed
    interval: tuple[float, float] | None = None  # 95%, over the test images; the mean of the seeds' bounds
    seeds: int | None = None  # None for a published figure
    planned: int | None = None  # seeds that the table asks for

    @classmethod
    def over(cls, values: Sequence[float], intervals: Sequence[Sequence[float]], planned: int) -> Statistic:
        """From a value and an interval per seed, as fractions, or from values without intervals."""
        low_high = [100 * mean(bound) for bound in zip(*intervals, strict=True)]
        std = 100 * stdev(values) if len(values) > 1 else None
        return cls(100 * mean(values), std, (low_high[0], low_high[1]) if low_high else None, len(values), planned)

    def __str__(self) -> str:
        text = f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"
        return text if self.seeds == self.planned else f"{text} ({self.seeds} of {self.planned} seeds)"


@dataclass
class Table:
    """A table whose cells are statistics or short texts (`to do`, `failed`), by metric, row labels and column heading.

    Args:
        name: of the files, and of the label in LaTeX.
        caption: at most three lines of an article, so about 300 characters.
        labels: headings of the row labels.
        heading: what the columns are.
        notes: sentences under the table, the most important first; LaTeX shows as many as fit into three lines.
        scope: the flags that define the table's content; written into the Markdown file as a comment.
    """

    name: str
    caption: str
    labels: Sequence[str]
    heading: str = "data set"
    notes: Sequence[str] = ()
    scope: str = ""
    cells: dict[tuple[str, tuple[str, ...], str], Statistic | str] = field(default_factory=dict)

    def add(self, metric: str, row: Sequence[str], column: str, value: Statistic | str | None) -> None:
        """Add a cell; None is ignored, and a row or column without cells is not shown."""
        if value is not None:
            self.cells[metric, tuple(row), column] = value

    def rows(self) -> list[list[str]]:
        """The heading, a row for each metric and label, then the rows of intervals; no empty rows or columns."""
        texts: dict[str, dict[tuple[str, ...], dict[str, str]]] = {}  # metric -> row -> column -> text
        for intervals in (False, True):
            for (metric, row, column), value in self.cells.items():
                bounds = value.interval if isinstance(value, Statistic) and intervals else None
                if bounds or not intervals:
                    name = f"{metric}, 95% interval" if bounds else metric
                    text = f"[{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else str(value)
                    texts.setdefault(name, {}).setdefault(row, {})[column] = text
        columns = dict.fromkeys(column for _, _, column in self.cells)
        cells = ((name, row, own) for name, rows in texts.items() for row, own in rows.items())
        body = [[name, *row, *(own.get(column, "") for column in columns)] for name, row, own in cells]
        return [["metric", *self.labels, *columns], *body]

    def markdown(self) -> str:
        """The table in Markdown (a pipe table)."""
        heading, *body = self.rows()
        rule = ["---"] * (1 + len(self.labels)) + ["---:"] * (len(heading) - 1 - len(self.labels))
        escaped = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in (heading, rule, *body))
        table = "\n".join(f"| {row} |" for row in escaped)
        scope = [f"<!-- {self.scope} -->"] if self.scope else []
        return "\n\n".join([self.caption, table, *self.notes, *scope]) + "\n"

    def latex(self) -> str:
        """The table as a LaTeX `table*` (table.tex.jinja), scaled down if it is wider or higher than a page."""
        heading, *body = self.rows()
        notes = [note for i, note in enumerate(self.notes) if len(" ".join(self.notes[: i + 1])) <= NOTES_IN_LATEX]
        template = TEMPLATES.get_template("table.tex.jinja")
        return template.render(table=self, heading=heading, body=body, notes=notes, left=1 + len(self.labels))

    def csv(self) -> str:
        """The table as CSV, with a line for each cell."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        names = ("metric", "mean", "std", "ci95_low", "ci95_high", "seeds", "note")
        writer.writerow([*self.labels, self.heading, *names])
        for (metric, row, column), value in self.cells.items():
            cells: list[object] = ["", "", "", "", "", csv_cell(value)]
            if isinstance(value, Statistic):
                numbers = value.mean, value.std, *(value.interval or (None, None))
                cells = [*("" if number is None else f"{number:.6f}" for number in numbers), value.seeds, ""]
            writer.writerow([*map(csv_cell, (*row, column, metric)), *cells])
        return file.getvalue()

    def write(self, folder: Path) -> None:
        """Write `name`.md, .csv and .tex; existing files of another scope are renamed first, and a note is printed."""
        texts = {".md": self.markdown(), ".csv": self.csv(), ".tex": self.latex()}
        page = folder / f"{self.name}.md"
        if self.scope and page.is_file() and f"<!-- {self.scope} -->" not in page.read_text(encoding="utf-8"):
            kept = f"{self.name}.before-{time.strftime('%Y%m%d-%H%M%S')}"
            for path in (path for suffix in texts if (path := folder / f"{self.name}{suffix}").is_file()):
                path.rename(folder / f"{kept}{path.suffix}")
            print(f"{page} holds other data sets, seeds or shots: renamed to {kept}.md, .csv and .tex", flush=True)
        for suffix, text in texts.items():
            with atomic_path(folder / f"{self.name}{suffix}", "--out") as path:
                path.write_text(text, encoding="utf-8")


def latex(text: str) -> str:
    """Text with LaTeX's special characters escaped, with minus signs, and without a `--` that would become a dash."""
    escaped = "".join(LATEX.get(character, character) for character in text)
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", re.sub("-(?=-)", "-{}", escaped))


TEMPLATES.filters["latex"] = latex


@dataclass(frozen=True)
class Published:
    """One method's published results: an entry of dataset/published_results.json, or of a file in that form."""

    method: str
    source: str
    shots: int | None = None
    selection: str | None = None  # how the epoch was chosen; None: not stated
    auc: dict[str, float] | None = None  # data set -> percent; None: not on record
    pauc: dict[str, float] | None = None

    def __post_init__(self) -> None:
        figures = [*(self.auc or {}).values(), *(self.pauc or {}).values()]
        if wrong := [percent for percent in figures if not 1 < percent <= 100]:
            raise ValueError(f"{wrong[0]} is not a percentage above 1 and up to 100")
        if figures and not (self.shots or 0) >= 1:
            raise ValueError("results need their number of `shots`, from 1 on")

    def figure(self, obj: str, metric: str) -> Statistic | None:
        """`auc` or `pauc` on a data set; None if the source does not report it."""
        percent = (getattr(self, metric) or {}).get(obj)
        return None if percent is None else Statistic(percent)

    def note(self) -> str:
        """The source of the results, their number of shots, and how the epoch was selected."""
        shots = "" if self.shots is None else f", {self.shots} shots"
        return f"{self.method}: {self.source}{shots}, {self.selection or 'selection not stated'}"


def read_published(paths: Iterable[Path] = ()) -> list[Published]:
    """The entries of dataset/published_results.json and of other files: {"results": [an entry of `Published`, ...]}.

    Raises:
        InputError: a file or entry, named in the message, cannot be read or is not of that form.
    """
    entries, refused = [], (*EXPECTED, TypeError, AttributeError)
    for path in (PUBLISHED, *paths):
        hint = f"dataset/{PUBLISHED.name} shows the form"
        with blame(f"--compare {path}", hint, refused):
            results = list(read_json(path)["results"])
        for number, values in enumerate(results, 1):
            with blame(f"--compare {path}, entry {number}", hint, refused):
                entries.append(Published(**values))
    return entries
