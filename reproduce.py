"""The paper's tables: plan a grid of runs, do what is not done yet, write Markdown, CSV and LaTeX.

    python reproduce.py --table main --dry_run                          cells, images, disk and hours; needs no data
    python reproduce.py --table main --verdict                          six data sets, 4 shots, three seeds
    python reproduce.py --table shots --obj Brain Chest --shots 2 4 8 16
    python reproduce.py --table baselines --obj MINE --data_path data --model_name tower.json --weights tower.pt
    python reproduce.py --table cross --executor slurm --jobs 8 --job_options slurm_partition=gpu gpus_per_node=1

Other flags go to train.py, and to the tests on other data sets. A cell is one run, with a folder of its own under
OUT/runs that all tables share; the same command again goes on where it was stopped or killed. Tokens are kept on disk
unless --cache says otherwise, for all cells together: the frozen tower sees an image once (and again for another
--fidelity, and the colour-jittered view of a shot wherever a cell draws it anew).
"""

from __future__ import annotations

from engine.study.grid import parse
from utils import run_script

if __name__ == "__main__":  # reads the flags before it imports torch; jobs look for their functions under this name
    run_script("reproduce", parse)

import contextlib
import io
import json
import shlex
import shutil
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field, make_dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import test
import train
from CLIP.config import ModelConfig
from dataset.layout import BENCHMARKS, MADE_UP, PUBLISHED_COUNTS
from engine import baselines
from engine.files.checkpoint import Checkpoint
from engine.files.config import NO_EFFECT_IN_TEST, given_options, test_options, test_parser, to_arguments, train_options
from engine.metrics import METRICS
from engine.study.cost import grid_cost, measured_rate
from engine.study.grid import COMPONENTS, Cell, Grid, layers_of
from engine.study.jobs import run_jobs
from engine.study.tables import Published, Statistic, Table, read_published
from utils import (
    InputError,
    bar_seconds,
    checked,
    locked,
    one_line,
    probe_writable,
    read_text,
    tune_allocator,
    write_json,
)

SHOWN = ("auc", "pauc")  # of METRICS, what tables show
EPOCHS = {"selected": "selected on test", "last": "last epoch"}
CLEAN = "_without_shot_patients"  # ends a result's keys


def main(options: Namespace) -> None:
    """Plan, compute, and write the table after every cell."""
    read_published(options.compare)  # before hours are spent
    grid = Grid(options)
    waiting = [cell for cell in grid.cells if not grid.done(cell)]
    if options.dry_run:
        dry_run(grid, waiting)
        return
    for obj in options.obj:
        grid.dataset(obj)  # is there
    probe_writable(grid.out / f"{options.table}.md", "--out")
    failed: dict[Cell, str] = {}
    with Progress(grid) as progress:
        ended: Iterator[tuple[Cell, str | None]] = (
            (cell, run_cell(grid, cell, progress.refresh_bar)) for cell in waiting
        )
        if options.executor != "here":
            places = options.executor, grid.out / "jobs", options.jobs, options.job_options
            ended = run_jobs(partial(run_cell, grid), waiting, *places, progress.refresh_bar)
        make_table(grid, failed).write(grid.out)
        try:
            for cell, error in ended:
                if error:
                    failed[cell] = error
                    tqdm.write(f"{cell.name}: {error} (log: {grid.log(cell)})", file=sys.stderr)
                make_table(grid, failed).write(grid.out)
                progress.refresh_bar(cell)
        except KeyboardInterrupt:
            tqdm.write("stopped; the same command goes on from here", file=sys.stderr)
            raise
    table = make_table(grid, failed)
    for shown in [table, *([make_verdict(grid, table)] if options.verdict else [])]:
        shown.write(grid.out)
        print(f"{shown.markdown()}\nwritten: {grid.out / shown.name}.md, .csv and .tex")
    if failed:
        raise InputError(f"{len(failed)} of {len(grid.cells)} cells failed; the same command tries them again")


def dry_run(grid: Grid, waiting: Sequence[Cell]) -> None:
    """Print the cells and what those that are not done cost."""
    for cell in grid.cells:
        command = f"{'baselines of' if cell.baselines else 'python train.py'} {shlex.join(grid.arguments(cell))}"
        print("to do" if cell in waiting else "done ", cell.name, command, sep="  ")
    print(f"cells:  {len(waiting)} of {len(grid.cells)} to do")
    if waiting:
        print(grid_cost(grid, waiting).describe(*measured_rate()))


class Progress(tqdm):  # type: ignore[type-arg]
    """A bar over all cells that moves with their epochs."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.ended = grid, set(filter(grid.done, grid.cells))
        self.epochs = {cell: 1 if cell.baselines else grid.parse(cell).epoch for cell in grid.cells}
        total, title = sum(self.epochs.values()), f"table {grid.options.table}"
        super().__init__(total=total, desc=title, unit="epoch", initial=self.finished(), mininterval=bar_seconds())

    def finished(self) -> int:
        """Epochs that are finished; a cell that has ended counts as all of its own."""
        waiting = [
            (self.grid.run(cell).metrics, epochs) for cell, epochs in self.epochs.items() if cell not in self.ended
        ]
        started = sum(min(epochs, path.read_bytes().count(b"\n")) for path, epochs in waiting if path.is_file())
        return started + sum(self.epochs[cell] for cell in self.ended)

    def refresh_bar(self, ended: Cell | None = None) -> None:
        """Look how far the cells have come; nothing more comes of one that has ended."""
        self.ended |= {ended} if ended else set()
        self.set_postfix_str(f"{len(self.ended)} of {len(self.epochs)} cells", refresh=False)
        self.update(self.finished() - self.n)


# --- cells ---


class Log(io.TextIOWrapper):
    """A text file to append to, that calls `on_line` when a line is complete."""

    def __init__(self, path: Path, on_line: Callable[[], None]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(path.open("ab"), encoding="utf-8", errors="backslashreplace")
        self.on_line = on_line

    def write(self, text: str) -> int:
        """Append."""
        count = super().write(text)
        if "\n" in text:
            self.on_line()
        return count


def run_cell(grid: Grid, cell: Cell, on_line: Callable[[], None] = lambda: None) -> str | None:
    """Compute a cell; returns what was wrong with it, whatever that is, so that the others go on."""
    tune_allocator()  # of a job, which has a process of its own
    reason = None
    try:
        compute(grid, cell, on_line)
    except InputError as error:
        reason = str(error)
    except Exception as error:  # out of memory, a bug
        with grid.log(cell).open("a", encoding="utf-8") as log:
            traceback.print_exc(file=log)
        reason = one_line(error)
    torch.cuda.empty_cache()  # outside of the handler, which holds the failed cell's tensors
    return reason


def compute(grid: Grid, cell: Cell, on_line: Callable[[], None]) -> None:
    """Train, or go on training, and test; what is printed goes to the cell's log, `on_line` hears of each line."""
    lock, run, options = grid.out / "locks" / cell.name, grid.run(cell), grid.parse(cell)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with (
        Log(grid.log(cell), on_line) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        locked(lock, f"{cell.name}: another process is at it; waiting for it"),
    ):
        if cell.baselines and not run.result.is_file():
            write_json(run.config, {"options": vars(options)})
            write_json(run.result, baselines.measure_baselines(options))
        elif not run.result.is_file():
            if cell.sources:
                write_union(grid, cell)
            if run.config.is_file():
                options = train_options([*grid.arguments(cell), "--resume", str(run.path)])
            else:  # killed before it had begun
                shutil.rmtree(run.path, ignore_errors=True)
            train.train(options)
        for obj in cell.others:
            test_on(grid, cell, obj)


def test_on(grid: Grid, cell: Cell, obj: str) -> None:
    """Test the selected and the last epoch on another data set, with those of the flags that a test knows."""
    run, parser = grid.run(cell), test_parser()
    last = run.path / "last-checkpoint.pth"
    state = run.load()
    if not last.is_file() and state is not None:
        selected = Checkpoint.load(run.best)
        metrics = {name: state["history"][-1][name] for name in ("epoch", "auc", "pauc")}
        metadata = {**selected.metadata, "select": "last", "metrics": metrics}
        replace(selected, parts=state["parts"], metadata=metadata).save(last)
    given = given_options(["--cache", "disk", *grid.options.flags])
    flags = [word for name in given.keys() - set(NO_EFFECT_IN_TEST) for word in to_arguments(parser, name, given[name])]
    for epoch, ckpt in (("selected", run.best), ("last", last)):
        path = grid.result(cell, obj, epoch)
        if not path.is_file():
            test.test(test_options([*flags, "--obj", obj, "--ckpt", str(ckpt), "--out_json", str(path)]))


def write_union(grid: Grid, cell: Cell) -> None:
    """A data set whose shots are those of other data sets, and whose test images are those of the cell's.

    It is a folder of links in the MVFA layout (of copies, where the system has no links).
    """
    root, iterate = grid.out / "unions" / f"{cell.name}_AD", grid.base.iterate
    target, *sources = datasets = [grid.dataset(obj) for obj in (cell.obj, *cell.sources)]
    reading, *others = [
        {"mask_above": d.mask_above, "window": d.layout.window, "plane": d.layout.plane} for d in datasets
    ]
    files = [("test", sample) for sample in target.samples("test")]
    for source, other in zip(sources, others, strict=True):
        if other != reading:
            raise InputError(f"{source.obj} is read otherwise than {cell.obj}: give --mask_above, --window or --plane")
        shots = source.shots(cell.shot, cell.shot, iterate, cell.seed)
        files += [("valid", sample) for sample in (*shots.normal, *shots.abnormal)]
    shutil.rmtree(root, ignore_errors=True)
    lines: dict[int, list[str]] = {0: ["n-0:"], 1: ["a-0:"]}  # of the few-shot list, by label
    for number, (split, sample) in enumerate(files):
        if sample.index is not None:
            raise InputError(f"{cell.name}: volumes and series cannot be joined: save their slices as images")
        folder = root / split / ("good", "Ungood")[sample.label]
        image = link(sample.path, folder / "img" / f"{number:05d}-{sample.path.name}")
        if sample.mask is not None and target.pixel_metrics:
            link(sample.mask, folder / "anomaly_mask" / f"{number:05d}-{sample.path.stem}{sample.mask.suffix}")
        if split == "valid":
            lines[sample.label].append(image.name)
    path = root / "fewshot_seed" / f"my{cell.shot * len(sources)}-shot.txt"
    path.parent.mkdir()
    path.write_text("".join(" ".join(line) + "\n" for line in lines.values()), encoding="utf-8")
    layout = {"prompt_name": target.prompt_name, "pixel_metrics": target.pixel_metrics, **reading}
    write_json(root / f"{cell.name}.json", {key: value for key, value in layout.items() if value is not None})


def link(source: Path, path: Path) -> Path:
    """A link at `path`, or a copy where the system has no links; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.symlink_to(source.absolute())
    except OSError:
        shutil.copyfile(source, path)
    return path


# --- tables ---


def make_table(grid: Grid, failed: dict[Cell, str]) -> Table:
    """The table as far as its cells are done."""
    options, published = grid.options, compared(grid)
    labels = [*["shots"] * (len(options.shots) > 1), *grid.kind.labels]
    notes = [*describe(grid, failed, published), *published_note(published)]
    table = Table(options.table, caption(grid), labels, grid.kind.heading, notes)
    masks = {obj: grid.has_masks(obj) for obj in options.obj}
    for shot in options.shots:
        groups: dict[Cell, list[Cell]] = {}  # of cells that differ in their seeds
        for cell in grid.cells:
            if cell.shot == shot:
                groups.setdefault(replace(cell, seed=0), []).append(cell)
        for first, cells in groups.items():
            for obj in (first.obj, *first.others):
                metrics = SHOWN if masks[first.obj] and masks[obj] else ("auc",)
                for metric, (words, key, suffix) in product(metrics, list(our_rows(grid, first))):
                    figure = mean_over_seeds(grid, cells, obj, key, f"{metric}{suffix}", failed)
                    table.add(METRICS[metric][0], [words[label] for label in labels], obj, figure)
        for (i, entry), metric, obj in product(enumerate(published, 1), SHOWN, options.obj):
            words = {"shots": str(shot), "method": f"{entry.method} ({i})"}
            row = [words[label] for label in labels]
            table.add(METRICS[metric][0], row, obj, entry.figure(obj, shot, metric))
    return table


def our_rows(grid: Grid, cell: Cell) -> Iterator[tuple[dict[str, str], str, str]]:
    """The rows of a cell in its table: labels by heading, the figures' key, and what ends a metric's key."""
    names = {name: name for name in baselines.NAMES}
    keys = names if cell.baselines else {key: EPOCHS[key] for key in grid.kind.epochs}
    component, setting = (COMPONENTS[cell.change[0]], cell.change[1]) if cell.change else ("default", "")
    for key, words in keys.items():
        for suffix in ("", CLEAN) if grid.options.clean else ("",):
            epoch = f"{words}, clean" if suffix else words
            yield {
                "shots": str(cell.shot), "method": epoch if cell.baselines else f"ours, {epoch}", "epoch": epoch,
                "trained on": cell.obj, "component": component, "setting": setting,
            }, key, suffix  # fmt: skip


# What tables show of a result: a metric, its interval, and both without the shots' patients.
SHOWN_METRICS = make_dataclass("ShownMetrics", [
    (name, kind, field(default=None))
    for metric in SHOWN for suffix in ("", CLEAN)
    for name, kind in ((f"{metric}{suffix}", float | None), (f"{metric}{suffix}_ci95", tuple[float, float] | None))
])  # fmt: skip


@cache
def read_result(path: Path) -> dict[str, dict[str, Any]]:
    """A result file, read once: what was measured of the `selected` epoch, the `last` one, and each baseline.

    `InputError` where it is not what a run writes.
    """
    where = f"{path}: damaged; delete it, and the same command makes it again"
    try:
        result = json.loads(read_text(path))
        parts = {"selected": result, "last": result.get("last", {}), **result.get("baselines", {})}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where} ({one_line(error)})") from error
    return {
        key: {name: value for name, value in vars(checked(SHOWN_METRICS, part, where)).items() if name in part}
        for key, part in parts.items()
    }


def mean_over_seeds(
    grid: Grid, cells: Sequence[Cell], obj: str, key: str, metric: str, failed: dict[Cell, str]
) -> Statistic | str | None:
    """A figure of cells that differ in their seeds, or why there is none."""
    files = [grid.result(cell, obj, key) for cell in cells]
    here = key if obj == cells[0].obj else "selected"  # each epoch's test on another data set has a file of its own
    done = [read_result(path).get(here, {}) for path in files if path.is_file()]
    if not done:
        return "failed" if any(cell in failed for cell in cells) else "to do"
    measured = [values for values in done if values.get(metric) is not None]
    if not measured:  # of a class no image is left, or the metric is none of this data set's
        return "not measurable" if metric.endswith(CLEAN) and any(metric in values for values in done) else None
    intervals = [values[f"{metric}_ci95"] for values in measured if values.get(f"{metric}_ci95")]
    complete = len(intervals) == len(measured)
    return Statistic.over([values[metric] for values in measured], intervals if complete else [], len(cells))


def caption(grid: Grid) -> str:
    """What the figures are: three lines of an article; no path of this machine."""
    options, base = grid.options, grid.base
    epochs = f"{base.epoch} epoch{'s' * (base.epoch > 1)}"
    shots = "" if len(options.shots) > 1 else f", {options.shots[0]} shot{'s' * (options.shots[0] > 1)}"
    seeds = f"seeds {' '.join(map(str, options.seeds))}" if len(options.seeds) > 1 else f"seed {options.seeds[0]}"
    weights = Path(base.weights).name if base.weights else f"{base.pretrain} weights"
    return (
        f"MadCLIP, re-implemented: {grid.kind.title}. {ModelConfig.load(base.model_name).name}, {weights}, "
        f"{base.img_size} px, {base.fidelity}, {epochs}{shots}; percent, mean ± standard deviation over "
        f"{seeds}."
    )


def describe(grid: Grid, failed: dict[Cell, str], published: Sequence[Published]) -> Iterator[str]:
    """How the figures were made, how the epoch was chosen, what failed, and why they may mean little."""
    options, base = grid.options, grid.base
    yield f"{sum(map(grid.done, grid.cells))} of {len(grid.cells)} cells are done."
    yield "Intervals: over the test images by bootstrap, the mean of the seeds' bounds."
    if levels := {str(data.mask_above) for data in map(grid.dataset, options.obj) if data.pixel_metrics}:
        yield f"Abnormal pixels: a mask's grey above {' or '.join(sorted(levels))} (--mask_above)."
    yield "Last epoch: nothing is selected."
    if options.table == "leave_one_out":
        yield (
            "A data set with masks is tested after training on the shots of the others that have masks, one without on "
            "the shots of all others; --shots counts those of each."
        )
    else:
        where = " of the data set trained on" if options.table == "cross" else ""
        protocol = ", as published" if set(options.obj) <= set(BENCHMARKS) else ""
        yield f"Selected on test: the epoch that is best on the test set{where} (--select test){protocol}."
    if options.table == "ablation":
        values = {**vars(base), "features_list": " ".join(map(str, layers_of(base)))}
        yield f"Default: {', '.join(f'{words} {values[flag]}' for flag, words in COMPONENTS.items())}."
    if options.clean:
        yield "Clean: without the test images of patients whose images are shots."
    if failed:
        yield "Failed: " + "; ".join(f"{cell.name} ({reason})" for cell, reason in failed.items()) + "."
    yield from caveats(grid, published)


def caveats(grid: Grid, published: Sequence[Published]) -> Iterator[str]:
    """Why the figures mean little, or compare with none of the published ones, where that is so."""
    if grid.base.pretrain == "random":
        yield "Nothing is pre-trained: these figures only show that the program runs."
    datasets = {obj: grid.dataset(obj) for obj in grid.options.obj}
    if made_up := [obj for obj, data in datasets.items() if (data.root / MADE_UP).is_file()]:
        yield f"Made-up images ({', '.join(made_up)}): their figures compare with none that is published."
    for obj in datasets.keys() & PUBLISHED_COUNTS.keys() - set(made_up) if published else ():
        images, counts = len(datasets[obj].samples("test")), map(sum, PUBLISHED_COUNTS[obj]["test"])
        if images not in counts:
            yield f"{obj}: {images} test images, not the published ones, so no published figure compares."


def compared(grid: Grid) -> list[Published]:
    """The published methods that have a figure for the table; none in tables of another protocol."""
    options = grid.options
    keys = [(obj, shot, metric) for obj in options.obj for shot in options.shots for metric in SHOWN]
    entries = read_published(options.compare) if grid.kind.published else []
    return [entry for entry in entries if any(entry.figure(*key) for key in keys)]


def published_note(published: Sequence[Published]) -> list[str]:
    """Where the published figures are from, under the numbers that the rows bear."""
    numbered = "; ".join(f"({i}) {entry.note()}" for i, entry in enumerate(published, 1))
    return [f"Published figures: {numbered}."] if published else []


def make_verdict(grid: Grid, table: Table) -> Table:
    """Of our figures that are selected on test the difference to each published one."""
    published = compared(grid)
    result = Table(
        f"{table.name}-verdict", "Ours, selected on test, minus the published figure, in percentage points.",
        table.labels, table.heading,
        ["inside, outside: whether the published figure lies in our 95% interval over the test images. "
         "docs/reproduce.md says where to look when it lies outside.",
         *caveats(grid, published), *published_note(published)],
    )  # fmt: skip
    names = [f"{entry.method} ({i})" for i, entry in enumerate(published, 1)]
    for (metric, row, obj), theirs in table.cells.items():
        ours = table.cells.get((metric, (*row[:-1], f"ours, {EPOCHS['selected']}"), obj))
        if row[-1] in names and isinstance(theirs, Statistic) and isinstance(ours, Statistic) and ours.interval:
            low, high = ours.interval
            difference = round(ours.mean - theirs.mean, 2) + 0.0  # no -0.00
            place = "inside" if low <= theirs.mean <= high else "outside"
            result.add(metric, row, obj, f"{difference:+.2f} {place}")
    return result
