"""Runs beside each other, on the same test images.

python -m engine.compare RUN_A RUN_B [...]                 Markdown on stdout; a run's folder, or test.py's --out_json
python -m engine.compare RUN_A RUN_B --out results         results/compare.md, .csv and .tex too

Every other run is compared with the first. Differences of the image AUC have DeLong's interval for paired curves, those
of the pixel AUC a bootstrap interval over the same draws of images.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, rankdata

from utils import EXPECTED, InputError, Parser, blame, preview, read_json, run_cli

from .metrics import CONFIDENCE_LEVEL, Z_95, interval_of, placements
from .study.tables import Statistic, Table

DISAGREEMENTS = 5  # number of images to list
MAX_SETTING = 60  # characters; if a setting's value has as many or more, the note only names the setting
RUN_SETTINGS = ("seed", "select", "shots")  # entries of a result that shaped the run, besides its settings
Result = dict[str, Any]  # the result of a run or a test, with the entries that `read` adds
Estimate = tuple[float, Sequence[float]]  # a value and its interval, as fractions


def read(path: Path) -> Result:
    """Read the result in a run's folder or in a file of --out_json; `InputError` for anything else.

    Adds `name`, `order` (the images as the file lists them), and `files`, `labels` and `scores`, sorted by file name.
    """
    hint = "give a run's folder, or a file of test.py's --out_json"
    result: Result = read_json(path / "result.json" if path.is_dir() else path, hint)
    with blame(path, hint, (*EXPECTED, TypeError)):
        rows = sorted(result["per_image"], key=lambda row: row["file"])
        result["order"] = [row["file"] for row in result["per_image"]]
        for column in ("file", "label", "score"):
            result[f"{column}s"] = np.array([row[column] for row in rows])
    return {**result, "name": path.stem if path.is_file() else path.name}


def auc_difference(labels: np.ndarray, one: np.ndarray, other: np.ndarray) -> Estimate:
    """AUROC of `other` minus `one`, scores (M,), and DeLong's (1988) paired interval; () if a class has one image."""
    parts = [after - before for before, after in zip(placements(labels, one), placements(labels, other), strict=True)]
    difference = float(parts[0].mean())
    if min(map(len, parts)) == 1:  # the variance of one value is unknown
        return difference, ()
    error = sum(float(part.var(ddof=1)) / len(part) for part in parts) ** 0.5
    return difference, (difference - Z_95 * error, difference + Z_95 * error)


def pauc_difference(one: Result, other: Result) -> Estimate | None:
    """Pixel AUROC of `other` minus that of `one`, with a bootstrap interval; None if draws are missing or unpaired."""
    before, after = (np.array(result.get("pauc_draws") or ()) for result in (one, other))
    if not len(before) or len(before) != len(after) or one["order"] != other["order"]:
        return None
    return other["pauc"] - one["pauc"], interval_of(after - before)


def rate(hits: np.ndarray) -> Estimate:
    """The fraction of hits (M,) and its 95% Wilson score interval, which does not degenerate at 0 and 1."""
    return float(hits.mean()), binomtest(int(hits.sum()), len(hits)).proportion_ci(CONFIDENCE_LEVEL, "wilson")


def figures(first: Result, result: Result) -> Iterator[tuple[str, Estimate | None]]:
    """Yields the rows of the comparison for one result: name, and value or None if it was not measured."""
    kinds = [name for name in result if name.startswith("auc_of_") and not name.endswith("_ci95")]
    for name in ("auc", "pauc", *kinds):
        words = {"auc": "image AUC", "pauc": "pixel AUC"}.get(name, f"image AUC of {name[7:]}")
        yield words, None if result.get(name) is None else (result[name], result.get(f"{name}_ci95") or ())
    if result is not first:
        yield "image AUC, difference", auc_difference(result["labels"], first["scores"], result["scores"])
        yield "pixel AUC, difference", pauc_difference(first, result)
    if decision := result.get("decision"):
        called = result["scores"] >= decision["value"]
        yield "sensitivity at its threshold", rate(called[result["labels"] == 1])
        yield "specificity at its threshold", rate(~called[result["labels"] == 0])


def compare(results: Sequence[Result]) -> Table:
    """The table of the comparison, with further differences as notes; `InputError` if the test images differ."""
    first, *others = results
    for other in others:
        images = (set(zip(result["files"], result["labels"], strict=True)) for result in (first, other))
        if apart := sorted({name for name, _ in set.symmetric_difference(*images)}):
            raise InputError(f"{first['name']} and {other['name']}: different test images or labels: {preview(apart)}")
    columns = [f"{place}: {result['name']}" for place, result in enumerate(results, 1)]
    caption = f"Runs on the same test images, in percent [95% interval]; differences are to {columns[0]}."
    table = Table("compare", caption, [], "run", list(notes(results, columns)))
    for column, result in zip(columns, results, strict=True):
        for name, value in figures(first, result):
            table.add(name, [], column, value and Statistic.over([value[0]], [value[1]] if value[1] else [], 1))
    return table


def notes(results: Sequence[Result], columns: Sequence[str]) -> Iterator[str]:
    """Notes on the settings that differ, and on the images that the runs rank most differently."""
    settings = [{**r["settings"], **{name: r[name] for name in RUN_SETTINGS if name in r}} for r in results]
    differing = []
    for name in dict.fromkeys(name for own in settings for name in own):
        values = [str(own[name]) for own in settings if name in own]
        if len(set(values)) > 1:
            differing.append(f"{name} {' / '.join(values)}" if max(map(len, values)) < MAX_SETTING else name)
    yield f"Settings that differ: {'; '.join(differing) or 'none'}."
    if len(tested := dict.fromkeys(result["obj"] for result in results)) > 1:  # their files may just have equal names
        yield f"Tested on {' / '.join(tested)}: the differences mean nothing unless these hold the same images."
    if any(r["order"] != results[0]["order"] for r in results) and all(r.get("pauc_draws") for r in results):
        yield "The results list the images in different orders: the bootstrap of pixel AUCs cannot be paired."
    ranks = np.array([rankdata(result["scores"]) for result in results])
    for i in np.argsort(-np.ptp(ranks, axis=0), kind="stable")[:DISAGREEMENTS]:
        places = ", ".join(f"{rank:g} in {name}" for rank, name in zip(ranks[:, i], columns, strict=True))
        truth = ("normal", "abnormal")[results[0]["labels"][i]]
        yield f"Disagreement: {results[0]['files'][i]} ({truth}) ranks {places}, counted from the lowest score."


def main() -> None:
    """Run the command line."""
    parser = Parser(prog="python -m engine.compare", description="Compare runs on the same test images.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or test.py's --out_json")
    parser.add_argument("--out", type=Path, help="folder for compare.md, .csv and .tex")
    options = parser.parse_args()
    if len(options.runs) < 2:
        raise InputError("name at least two runs")
    table = compare([read(path) for path in options.runs])
    print(table.markdown())
    if options.out:
        table.write(options.out)


if __name__ == "__main__":
    run_cli(main)
