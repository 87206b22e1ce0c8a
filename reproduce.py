"""The paper's tables: plan a grid of runs, compute the missing cells, write Markdown, CSV and LaTeX.

    python reproduce.py --table main --dry_run                          cells, images and disk space; needs no data
    python reproduce.py --table main                                    six data sets, 4 shots, three seeds
    python reproduce.py --table shots --obj Brain Chest --shots 2 4 8 16
    python reproduce.py --table baselines --obj MINE --data_path data --model_name tower.json --weights tower.pt
    python reproduce.py --table cross --executor slurm --jobs 8 --job_options slurm_partition=gpu gpus_per_node=1

Other flags are passed to train.py, and to the tests on other data sets. Each cell is one run with its own folder under
OUT/runs, which all tables share. Repeating the command continues a table that was stopped or killed. Tokens are kept on
disk unless --cache says otherwise, and all cells share them: the frozen tower processes each image once (again for
another --fidelity; and again for the colour-jittered view of a shot, if a cell draws other jitter).
"""

from engine.study.options import parse
from utils import run_script

if __name__ == "__main__":  # parses flags before importing torch; jobs need the functions in a module `reproduce`
    run_script("reproduce", parse)

import contextlib
import shlex
import shutil
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from filelock import FileLock
from tqdm import tqdm

import test
import train
from CLIP.dinov2 import load_config
from dataset.lists import write_list
from engine import baselines
from engine.files.checkpoint import Checkpoint
from engine.files.config import SELECTS, shared_options, test_options, train_options
from engine.metrics import METRICS
from engine.study.grid import COMPONENTS, Cell, Grid, layers_of, read_result
from engine.study.jobs import run_jobs
from engine.study.tables import Published, Statistic, Table, read_published
from utils import InputError, bar_seconds, one_line, probe_writable, show_traceback, tune_allocator, write_json

TABLE_METRICS = ("auc", "pauc")  # the METRICS that tables show
READING_KEYS = ("mask_above", "mask_labels", "window", "plane")  # fields of a layout: how its files are read
CLEAN_SUFFIX = "_without_shot_patients"  # suffix of keys in a result


def main(options: Namespace) -> None:
    """Plan the grid, compute the missing cells, write the table after every cell; `InputError` if any cell failed."""
    read_published(options.compare)  # reports errors before hours are spent on cells
    grid = Grid(options)
    waiting = [cell for cell in grid.cells if not grid.done(cell)]
    if options.dry_run:
        for cell in grid.cells:
            command = f"{'baselines of' if cell.baselines else 'python train.py'} {shlex.join(grid.arguments(cell))}"
            print("to do" if cell in waiting else "done ", cell.name, command, sep="  ")
        print(f"cells:  {len(waiting)} of {len(grid.cells)} to do\n{grid.cost(waiting)}")
        return
    for obj in options.obj:
        grid.dataset(obj)  # raises an error if it is missing
    probe_writable(grid.out / f"{options.table}.md", "--out")
    ended: Iterator[tuple[Cell, str | None]] = ((cell, run_cell(grid, cell)) for cell in waiting)
    if options.executor != "here":
        places = options.executor, grid.out / "jobs", options.jobs, options.job_options
        ended = run_jobs(partial(run_cell, grid), waiting, *places)
    failed: dict[Cell, str] = {}
    table = make_table(grid, failed)
    table.write(grid.out)
    title, done = f"table {options.table}", len(grid.cells) - len(waiting)
    with tqdm(total=len(grid.cells), desc=title, unit="cell", initial=done, mininterval=bar_seconds()) as progress:
        for cell, error in ended:
            if error:
                failed[cell] = error
                tqdm.write(f"{cell.name}: {error} (log: {grid.log(cell)})", file=sys.stderr)
            table = make_table(grid, failed)
            table.write(grid.out)
            progress.update()
    print(f"{table.markdown()}\nwritten: {grid.out / table.name}.md, .csv and .tex")
    if failed:
        raise InputError(f"{len(failed)} of {len(grid.cells)} cells failed; the same command tries them again")


# --- cells ---


def run_cell(grid: Grid, cell: Cell) -> str | None:
    """Compute a cell, with its output in its log. Returns any error as a message, so that the other cells go on."""
    tune_allocator()  # for a job, which runs in its own process
    reason, path = None, grid.log(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace") as log:
        try:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                compute(grid, cell)
        except InputError as error:
            show_traceback(error, log)
            reason = str(error)
        except Exception as error:  # such as out of memory, or a bug; the traceback is in the log
            traceback.print_exc(file=log)
            reason = one_line(error)
    torch.cuda.empty_cache()  # outside the handler, which keeps the failed cell's tensors alive
    return reason


def compute(grid: Grid, cell: Cell) -> None:
    """Measure the baselines, or train (or resume training) and test on the other data sets."""
    lock, run, options = grid.out / "locks" / cell.name, grid.run(cell), grid.parse(cell)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):  # waits for another process that computes this cell
        if cell.baselines:
            write_json(run.config, {"options": vars(options)})
            write_json(run.result, baselines.measure_baselines(options))
            return
        if not read_result(run.result):
            if cell.sources:
                write_union(grid, cell)
            if run.config.is_file():
                options = train_options([*grid.arguments(cell), "--resume", str(run.path)])
            else:  # new, or killed before it wrote config.json
                shutil.rmtree(run.path, ignore_errors=True)
            train.train(options)
        for obj in (obj for obj in cell.others if not read_result(grid.file(cell, obj))):
            test_on(grid, cell, obj)


def test_on(grid: Grid, cell: Cell, obj: str) -> None:
    """Test the selected and the last epoch on another data set, with the flags that training and test share."""
    run, last = grid.run(cell), grid.run(cell).path / "last-checkpoint.pth"
    if not last.is_file():
        state = run.load()
        assert state is not None  # the run is finished
        selected, record = Checkpoint.load(run.best), state["history"][-1]
        metrics = {name: record[name] for name in ("epoch", *TABLE_METRICS)}
        metadata = {**selected.metadata, "select": "last", "metrics": metrics}
        if selected.metadata["metrics"]["epoch"] != record["epoch"]:
            metadata |= {"threshold": None, "figures": None}  # they belong to the selected epoch
        replace(selected, parts=state["parts"], metadata=metadata).save(last)
    shared = shared_options(grid.parse(cell))
    results = [test.test(test_options(["--obj", obj, "--ckpt", str(ckpt)], shared)) for ckpt in (run.best, last)]
    write_json(grid.file(cell, obj), {**results[0], "last": results[1]})


def write_union(grid: Grid, cell: Cell) -> None:
    """Write a data set, as a list, with the shots of other data sets and the test images of the cell's own."""
    root = grid.out / "unions" / f"{cell.name}_AD"
    target, *sources = datasets = [grid.dataset(obj) for obj in (cell.obj, *cell.sources)]
    chosen = [(target, "test", sample) for sample in target.samples("test")]
    for source in sources:
        shots = source.shots(cell.shot, cell.shot, grid.base.iterate, cell.seed)
        chosen += [(source, "valid", sample) for sample in (*shots.normal, *shots.abnormal)]
    readings = [{name: getattr(dataset.layout, name) for name in READING_KEYS} for dataset in datasets]
    if any(reading != readings[0] for reading in readings):
        flags = ", ".join(f"--{name}" for name in READING_KEYS)
        raise InputError(f"{', '.join(data.obj for data in datasets)} are read in different ways: give {flags} for all")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for dataset in datasets:
        (root / dataset.obj).symlink_to(dataset.root.absolute())
    listed = []
    for dataset, split, sample in chosen:
        files = sample.path, *(sample.masks if target.pixel_metrics else ())
        path, *masks = (root / dataset.obj / file.relative_to(dataset.root) for file in files)
        patient = sample.patient and f"{dataset.obj} {sample.patient}"
        moved = replace(sample, path=path, masks=tuple(masks), patient=patient, split=split, shot=split == "valid")
        listed.append(moved)
    write_list(root / "images.jsonl", root, listed)
    # Each data set has already decided, above, what an empty mask means; `abnormal` keeps the labels as they are.
    judged = {"prompt_name": target.layout.prompt_name, "pixel_metrics": target.pixel_metrics, "unmarked": "abnormal"}
    given = {name: value for name, value in readings[0].items() if value not in (None, ())}
    write_json(root / f"{cell.name}.json", {**judged, **given})


# --- tables ---


def make_table(grid: Grid, failed: dict[Cell, str]) -> Table:
    """The table, with the results of the cells that are done so far."""
    options = grid.options
    published = read_published(options.compare) if grid.kind.published else []
    labels = [*["shots"] * (len(options.shots) > 1), *grid.kind.labels]
    scope = " ".join(f"--{name} {' '.join(map(str, getattr(options, name)))}" for name in ("obj", "seeds", "shots"))
    notes = list(notes_on(grid, published, failed))
    table = Table(options.table, caption(grid), labels, grid.kind.heading, notes, scope)
    masks = {obj: grid.has_masks(obj) for obj in options.obj}
    for shot in options.shots:
        for first, cells in ((first, cells) for first, cells in grid.groups.items() if first.shot == shot):
            for obj in (first.obj, *first.others):
                metrics = TABLE_METRICS if masks[first.obj] and masks[obj] else ("auc",)
                for metric, (words, key, suffix) in product(metrics, our_rows(grid, cells)):
                    figure = mean_over_seeds(grid, cells, obj, key, f"{metric}{suffix}", failed)
                    table.add(METRICS[metric][0], [words[label] for label in labels], obj, figure)
        for (i, entry), metric, obj in product(enumerate(published, 1), TABLE_METRICS, options.obj):
            if entry.shots == shot:
                words = {"shots": str(shot), "method": f"{entry.method} ({i})"}
                table.add(METRICS[metric][0], [words[label] for label in labels], obj, entry.figure(obj, metric))
    return table


def our_rows(grid: Grid, cells: Sequence[Cell]) -> list[tuple[dict[str, str], str, str]]:
    """Rows for cells that differ only in seed: (labels by heading, key of the figures, suffix of the metrics' keys)."""
    cell, rows = cells[0], []
    keys = {name: name for name in baselines.NAMES} if cell.baselines else grid.epochs(cell)
    component, setting = (COMPONENTS[cell.change[0]], cell.change[1]) if cell.change else ("default", "")
    for (key, words), suffix in product(keys.items(), ("", CLEAN_SUFFIX) if grid.options.clean else ("",)):
        epoch = f"{words}, without the shots' patients" if suffix else words
        labels = {
            "shots": str(cell.shot), "method": epoch if cell.baselines else f"ours, {epoch}", "epoch": epoch,
            "trained on": cell.obj, "component": component, "setting": setting,
        }  # fmt: skip
        rows.append((labels, key, suffix))
    return rows


def mean_over_seeds(
    grid: Grid, cells: Sequence[Cell], obj: str, key: str, metric: str, failed: dict[Cell, str]
) -> Statistic | str | None:
    """A metric over cells that differ only in seed, or the reason why there is none; None if the data set lacks it."""
    done = [values for cell in cells if (values := grid.figures(cell, obj, key)) is not None]
    if not done:
        return "failed" if any(cell in failed for cell in cells) else "to do"
    measured = [values for values in done if values.get(metric) is not None]
    if not measured:  # this data set lacks the metric, or a class has no image left
        if not metric.endswith(CLEAN_SUFFIX):
            return None
        return "not measurable" if any(metric in values for values in done) else "patients not known"
    intervals = [values[f"{metric}_ci95"] for values in measured if values.get(f"{metric}_ci95")]
    complete = len(intervals) == len(measured)
    return Statistic.over([values[metric] for values in measured], intervals if complete else [], len(cells))


def caption(grid: Grid) -> str:
    """The table's caption: three lines in an article, without any path of this machine."""
    options, base = grid.options, grid.base
    epochs = f"{base.epoch} epoch{'s' * (base.epoch > 1)}"
    shots = "" if len(options.shots) > 1 else f", {options.shots[0]} shot{'s' * (options.shots[0] > 1)}"
    seeds = ", mean ± standard deviation (n - 1) over seeds" if len(options.seeds) > 1 else ", seed"
    weights = Path(base.weights).name if base.weights else f"{base.pretrain} weights"
    config = load_config(base.model_name, base.image_tower)
    tower = f"{config.name} with the image tower {config.tower.name}" if config.tower.name else config.name
    return (
        f"MadCLIP, re-implemented: {grid.kind.title}. {tower}, {weights}, "
        f"{base.img_size} px, {base.fidelity}, {epochs}{shots}; percent{seeds} {' '.join(map(str, options.seeds))}."
    )


def notes_on(grid: Grid, published: Sequence[Published], failed: dict[Cell, str]) -> Iterator[str]:
    """Notes that readers of the table need, the most important first."""
    options, base, datasets = grid.options, grid.base, [grid.dataset(obj) for obj in grid.options.obj]
    if base.pretrain == "random":
        nothing = "Nothing is pre-trained: these results only show that the program runs."
        yield "The text tower is random: no text is aligned with the images." if base.image_tower else nothing
    made_up = [data.obj for data in datasets if data.is_made_up]
    others = [data.obj for data in datasets if published and data.other_counts and not data.is_made_up]
    for what, objs in (("Made-up images", made_up), ("Images other than the published ones", others)):
        if objs:
            yield f"{what} ({', '.join(objs)}): they cannot be compared with published results."
    words = {words for cell in grid.cells if not cell.baselines for words in grid.epochs(cell).values()}
    where = " of the data set trained on" if options.table == "cross" else ""
    for select in (select for select in SELECTS if f"selected on {select}" in words):
        yield f"Selected on {select}: {SELECTS[select]}{where} (--select {select})."
    done = [list(filter(grid.done, cells)) for cells in grid.groups.values()]
    taken = [[read_result(grid.file(cell, cell.obj)).get("shots") for cell in cells] for cells in done]
    if several := [shots for shots in taken if len(shots) > 1]:
        same = all(shots == group[0] for group in several for shots in group)
        yield "All seeds have the same shots." if same else "Each seed draws other shots."
    yield "Intervals: 95%, over the test images; each bound is the mean over the seeds."
    if greys := [f"{data.layout.mask_above} ({data.obj})" for data in datasets if data.pixel_metrics]:
        yield f"Abnormal pixels: a mask's grey above {', '.join(greys)}."
    if options.table == "ablation":
        values = {**vars(base), "features_list": " ".join(map(str, layers_of(base)))}
        yield f"Default: {', '.join(f'{words} {values[flag]}' for flag, words in COMPONENTS.items())}."
    yield f"{sum(map(len, done))} of {len(grid.cells)} cells are done."
    for cell, reason in failed.items():
        yield f"Failed: {cell.name} ({reason})."
    known = [
        (i, entry) for i, entry in enumerate(published, 1)
        if any(entry.figure(obj, metric) for obj, metric in product(options.obj, TABLE_METRICS))
    ]  # fmt: skip
    if shown := [f"({i}) {entry.note()}" for i, entry in known if entry.shots in options.shots]:
        yield f"Published results: {'; '.join(shown)}."
    if others := [f"{entry.method} ({entry.shots} shots)" for _, entry in known if entry.shots not in options.shots]:
        yield f"Not shown, as they use another number of shots: {', '.join(others)}."
