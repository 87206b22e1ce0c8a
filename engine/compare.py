"""Runs beside each other, on the same test images.

python -m engine.compare RUN_A RUN_B [...]                 Markdown on stdout; a run's folder, or test.py's --out_json
python -m engine.compare RUN_A RUN_B --out results         results/compare.md, .csv and .tex too

Every other run is compared with the first: differences of the image AUC with DeLong's interval for pairs, of the pixel
AUC with that of a bootstrap over the same draws of images.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, rankdata

from utils import EXPECTED, InputError, Parser, blame, preview, read_json, run_cli

from .metrics import CONFIDENCE_LEVEL, Z_95, placements
from .study.tables import Statistic, Table

CAPTION = "Runs on the same test images, in percent [95% interval]; differences are to {first}."
DISAGREEMENTS = 5  # images that are named
SHORT = 60  # characters of a setting; of a longer one only that it differs is said
BESIDE = ("seed", "select", "shots")  # what shapes a run beside its settings
Value = tuple[float, Sequence[float]]  # with its interval, both in [0, 1]


@dataclass(frozen=True)
class Result:
    """What a run or a test has written, its images sorted by name."""

    name: str
    values: dict[str, Any]  # the file
    files: list[str]
    labels: np.ndarray  # (M,)
    scores: np.ndarray  # (M,)

    @classmethod
    def read(cls, path: Path) -> Result:
        """From a run's folder or a file of --out_json; `InputError` for anything else."""
        hint = "give a run's folder, or a file of test.py's --out_json"
        values = read_json(path / "result.json" if path.is_dir() else path, hint)
        with blame(path, hint, (*EXPECTED, TypeError)):
            rows = sorted(values["per_image"], key=lambda row: row["file"])
            labels, scores = (np.array([row[name] for row in rows]) for name in ("label", "score"))
        return cls(path.stem if path.is_file() else path.name, values, [row["file"] for row in rows], labels, scores)


def auc_difference(labels: np.ndarray, one: np.ndarray, other: np.ndarray) -> Value:
    """AUROC of `other` less that of `one`, scores (M,) of the same images, and DeLong's (1988) interval for pairs."""
    parts = [after - before for before, after in zip(placements(labels, one), placements(labels, other), strict=True)]
    error = sum(float(part.var(ddof=1)) / len(part) for part in parts if len(part) > 1) ** 0.5
    difference = float(parts[0].mean())
    return difference, (difference - Z_95 * error, difference + Z_95 * error)


def pauc_difference(one: Result, other: Result) -> Value | None:
    """The same of the pixel AUROC, from the draws of the bootstrap; None where one has none, or of other images."""
    draws = [np.array(result.values.get("pauc_draws") or ()) for result in (one, other)]
    order = [[row["file"] for row in result.values["per_image"]] for result in (one, other)]
    if not len(draws[0]) or len(draws[0]) != len(draws[1]) or order[0] != order[1]:
        return None
    tail = (1 - CONFIDENCE_LEVEL) / 2
    return other.values["pauc"] - one.values["pauc"], np.quantile(draws[1] - draws[0], [tail, 1 - tail]).tolist()


def rate(hits: np.ndarray) -> Value:
    """The share of hits (M,) and its 95% interval by Wilson's score, which does not degenerate at 0 and 1."""
    return float(hits.mean()), binomtest(int(hits.sum()), len(hits)).proportion_ci(CONFIDENCE_LEVEL, "wilson")


def figures(first: Result, result: Result) -> Iterator[tuple[str, Value | None]]:
    """What is compared: names and values."""
    values, called = result.values, None
    kinds = {f"image AUC of {name[7:]}": name for name in values if re.fullmatch("auc_of_.*(?<!_ci95)", name)}
    for words, name in {"image AUC": "auc", "pixel AUC": "pauc", **kinds}.items():
        yield words, None if values.get(name) is None else (values[name], values.get(f"{name}_ci95") or ())
    if result is not first:
        yield "image AUC, difference", auc_difference(result.labels, first.scores, result.scores)
        yield "pixel AUC, difference", pauc_difference(first, result)
    if decision := values.get("decision"):
        called = result.scores >= decision["value"]
        yield "sensitivity at its threshold", rate(called[result.labels == 1])
        yield "specificity at its threshold", rate(~called[result.labels == 0])


def compare(results: Sequence[Result]) -> Table:
    """The table, with what else differs as its notes; `InputError` where the test images are not the same."""
    first = results[0]
    for other in results[1:]:
        if apart := sorted(set(first.files) ^ set(other.files)):
            raise InputError(f"{first.name} and {other.name} were not tested on the same images: {preview(apart)}")
        if (first.labels != other.labels).any():
            at = first.files[int((first.labels != other.labels).argmax())]
            raise InputError(f"{first.name} and {other.name} do not agree on what is abnormal: {at}")
    columns = [f"{place}: {result.name}" for place, result in enumerate(results, 1)]
    table = Table("compare", CAPTION.format(first=columns[0]), [], "run", list(notes(results, columns)))
    for column, result in zip(columns, results, strict=True):
        for name, value in figures(first, result):
            if value:
                table.add(name, [], column, Statistic.over([value[0]], [value[1]] if value[1] else [], 1))
    return table


def notes(results: Sequence[Result], columns: Sequence[str]) -> Iterator[str]:
    """Which settings differ, and on which images the runs disagree most, by the place that each gives them."""
    beside = [{name: result.values[name] for name in BESIDE if name in result.values} for result in results]
    settings = [{**result.values["settings"], **more} for result, more in zip(results, beside, strict=True)]
    differing = []
    for name in dict.fromkeys(chain(*settings)):
        values = [str(own[name]) for own in settings if name in own]
        if len(set(values)) > 1:
            differing.append(f"{name} {' / '.join(values)}" if max(map(len, values)) < SHORT else name)
    yield f"Settings that differ: {'; '.join(differing) or 'none'}."
    orders = {tuple(row["file"] for row in result.values["per_image"]) for result in results}
    if len(orders) > 1 and all(result.values.get("pauc_draws") for result in results):
        yield "The results list the images in different orders: the bootstrap of pixel AUCs cannot be paired."
    ranks = np.array([rankdata(result.scores) for result in results])
    for i in np.argsort(-np.ptp(ranks, axis=0), kind="stable")[:DISAGREEMENTS]:
        places = ", ".join(f"{rank:g} in {name}" for rank, name in zip(ranks[:, i], columns, strict=True))
        truth = ("normal", "abnormal")[results[0].labels[i]]
        yield f"Disagreement: {results[0].files[i]} ({truth}) is number {places}, counted from the lowest score."


def main() -> None:
    """Command line."""
    parser = Parser(prog="python -m engine.compare", description="Compare runs on the same test images.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or test.py's --out_json")
    parser.add_argument("--out", type=Path, help="folder for compare.md, .csv and .tex")
    options = parser.parse_args()
    if len(options.runs) < 2:
        raise InputError("name at least two runs")
    table = compare([Result.read(path) for path in options.runs])
    print(table.markdown())
    if options.out:
        table.write(options.out)


if __name__ == "__main__":
    run_cli(main)
