"""Tables of results: figures over seeds beside published ones, as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from dataset import PUBLISHED
from utils import atomic_path

METRICS = {"auc": "image AUC", "pauc": "pixel AUC"}
NOT_ON_RECORD = "not on record"
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
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
        """From one value in [0, 1] and one interval a seed; None without any."""
        if not values:
            return None
        bounds = [100 * mean(bound) for bound in zip(*intervals, strict=True)]
        std = 100 * stdev(values) if len(values) > 1 else None
        return cls(100 * mean(values), std, tuple(bounds) if bounds else None, len(values), planned)

    def __str__(self) -> str:
        words = f"{self.mean:.2f}"
        if self.std is not None:
            words += f" ± {self.std:.2f}"
        if self.interval:
            words += f" [{self.interval[0]:.2f}, {self.interval[1]:.2f}]"
        return words if self.seeds == self.planned else f"{words} ({self.seeds} of {self.planned} seeds)"


@dataclass
class Table:
    """Rows of labels and figures; a text or None stands where there is no figure."""

    caption: str
    labels: Sequence[str]  # headings of the label columns
    columns: Sequence[str]  # headings of the columns with figures
    notes: Sequence[str] = ()
    rows: list[tuple[Sequence[str], Sequence[Figure | str | None]]] = field(default_factory=list)

    def _texts(self) -> Iterator[list[str]]:
        for labels, cells in self.rows:
            yield [*labels, *("" if cell is None else str(cell) for cell in cells)]

    def markdown(self) -> str:
        """A pipe table between its caption and its notes."""
        lines = [[*self.labels, *self.columns], ["---"] * len(self.labels) + ["---:"] * len(self.columns)]
        lines += self._texts()
        table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        return "\n\n".join([self.caption, table, *self.notes]) + "\n"

    def latex(self) -> str:
        """A `table*` that needs the package booktabs."""
        rows = [" & ".join(map(latex, line)) + r" \\" for line in self._texts()]
        return "\n".join([
            r"\begin{table*}",
            r"\centering\small",
            rf"\caption{{{latex(' '.join([self.caption, *self.notes]))}}}",
            rf"\begin{{tabular}}{{{'l' * len(self.labels)}{'r' * len(self.columns)}}}",
            r"\toprule",
            " & ".join(map(latex, [*self.labels, *self.columns])) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table*}",
            "",
        ])  # fmt: skip

    def csv(self) -> str:
        """A line for each figure; what is missing stays empty."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*self.labels, "column", "mean", "std", "ci95_low", "ci95_high", "seeds", "note"])
        for labels, cells in self.rows:
            for column, cell in zip(self.columns, cells, strict=True):
                if isinstance(cell, Figure):
                    low, high = (None, None) if cell.interval is None else cell.interval
                    numbers = [cell.mean, cell.std, low, high]
                    texts = ["" if number is None else f"{number:.6f}" for number in numbers]
                    writer.writerow([*labels, column, *texts, cell.seeds, ""])
                else:
                    writer.writerow([*labels, column, "", "", "", "", "", cell or ""])
        return file.getvalue()

    def write(self, stem: Path) -> list[Path]:
        """Write `stem`.md, .csv and .tex."""
        texts = {".md": self.markdown(), ".csv": self.csv(), ".tex": self.latex()}
        for suffix, text in texts.items():
            with atomic_path(stem.with_suffix(suffix), "--out") as path:
                path.write_text(text, encoding="utf-8")
        return [stem.with_suffix(suffix) for suffix in texts]


def latex(text: str) -> str:
    """Text with LaTeX's own characters escaped."""
    return "".join(LATEX.get(character, character) for character in text)


@dataclass(frozen=True)
class Published:
    """One column of published figures."""

    method: str
    source: str
    shots: int | None
    figures: dict[str, dict[str, float]] | None  # metric -> data set -> percent; None: not on record

    def figure(self, obj: str, shots: int, metric: str) -> Figure | str | None:
        """The cell for a data set; None where the source has none for it or for so many shots."""
        if self.figures is None:
            return NOT_ON_RECORD
        percent = self.figures[metric].get(obj) if shots == self.shots else None
        return None if percent is None else Figure(percent)


def read_published(path: Path = PUBLISHED) -> list[Published]:
    """What dataset/published_results.json holds."""
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    return [
        Published(
            found["method"], found["source"], found["shots"],
            None if found["auc"] is None else {metric: found[metric] for metric in METRICS},
        )
        for found in results
    ]  # fmt: skip
