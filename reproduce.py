"""The paper's tables: plan a grid of runs, do what is not done yet, write Markdown, CSV and LaTeX.

    python reproduce.py --table main --dry_run                          cells, images, disk and hours; needs no data
    python reproduce.py --table main --verdict                          six data sets, 4 shots, three seeds
    python reproduce.py --table shots --obj Brain Chest --shots 2 4 8 16
    python reproduce.py --table cross --executor slurm --jobs 8 --job_options slurm_partition=gpu gpus_per_node=1

Every other flag goes to train.py (`python train.py --help`). A cell is one run, with a folder of its own under OUT/runs
that all tables share; the same command again goes on where it was stopped or killed. Tokens are kept on disk unless
--cache says otherwise, for all cells together: the frozen tower sees an image once (and again for another --fidelity,
and the colour-jittered view of a shot wherever a cell draws it anew).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

import dataset
from CLIP import ModelConfig
from dataset.layout import BENCHMARKS, MADE_UP, object_name
from engine import cost
from engine.config import (
    MODEL_FLAGS,
    RESUMABLE,
    Formatter,
    check_layers,
    nonempty_path,
    positive,
    test_options,
    train_options,
)
from engine.jobs import EXECUTORS, one_line, run_jobs
from engine.report.tables import METRICS, Figure, Published, Table, read_published
from utils import (
    VIEWS,
    InputError,
    Parser,
    checked,
    locked,
    probe_writable,
    read_text,
    run_script,
    tune_allocator,
    write_json,
)

if TYPE_CHECKING:
    from dataset import MedicalDataset, Sample
    from engine.run import RunFolder

# The tables, and what they show.
TITLES = {
    "main": "figures on each data set",
    "cross": "trained on one data set, tested on another",
    "leave_one_out": "trained on the shots of all other data sets, tested on one",
    "ablation": "one component changed at a time",
    "shots": "figures over the number of shots",
    "baselines": "beside baselines on the same tokens, shots and test images",
}
# The paper's components, in the table's words; each is changed alone.
COMPONENTS = {
    "text_mood": "text", "contrast_mood": "dual objective", "loss_type": "loss", "dec_type": "decision",
    "visionA": "adapters", "features_list": "layers", "fidelity": "fidelity",
}  # fmt: skip
EPOCHS = {"selected": "selected on test", "last": "last epoch"}
CLEAN = "_without_shot_patients"  # of a result's keys
GRID_FLAGS = (
    "--obj", "--seed", "--shot", "--shot_normal", "--shot_abnormal", "--select", "--save_model", "--no-save_model",
    "--save_path", "--run_dir", "--exp_name", "--resume", "--out_json",
)  # fmt: skip
# Of train.py's flags, what may differ between a run on disk and the command that goes on with it.
MACHINE_FLAGS = RESUMABLE - {"epoch", "data_path", "data_root", "weights"}
TEST_FLAGS = ("data_path", "weights", "batch_size", "device", "precision", "num_workers", "cache", "cache_dir",
              "cache_dtype")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One training, and the tests of its checkpoint on other data sets; or the baselines on one set of shots."""

    obj: str
    shot: int
    seed: int
    change: tuple[str, str] | None = None  # a flag of train.py and its value, where the ablation sets one
    others: tuple[str, ...] = ()  # the data sets that it is tested on beside its own
    sources: tuple[str, ...] = ()  # the data sets whose shots it is trained on, where they are not its own
    baselines: bool = False

    @property
    def name(self) -> str:
        """The run's name: the same cell in two tables is one run."""
        words = [self.obj, f"{self.shot}shot", f"seed{self.seed}", *(self.change or ())]
        if self.sources:
            words.insert(1, "-".join(["from", *self.sources]))
        return "-".join([*words, *(["baselines"] if self.baselines else [])]).replace(" ", "-")


@dataclass(frozen=True)
class Grid:
    """What turns a cell into a run: the folder, and train.py's flags."""

    out: Path
    flags: tuple[str, ...]

    def arguments(self, cell: Cell) -> list[str]:
        """train.py's command line."""
        change = [f"--{cell.change[0]}", *cell.change[1].split()] if cell.change else []
        obj, shot, select = cell.obj, cell.shot, "test"
        union = []
        if cell.sources:
            obj, shot, select = cell.name, cell.shot * len(cell.sources), "last"
            union = ["--data_path", str(self.out / "unions"), "--iterate", "0"]
        return [
            "--cache", "disk", *self.flags, *union, "--obj", obj, "--shot", str(shot), "--seed", str(cell.seed),
            *change, "--select", select, "--no-save_model", "--run_dir", str(self.out / "runs"),
            "--exp_name", cell.name,
        ]  # fmt: skip

    def parse(self, cell: Cell) -> argparse.Namespace:
        """train.py's options."""
        return train_options(self.arguments(cell))

    def log(self, cell: Cell) -> Path:
        """What the cell printed."""
        return self.out / "logs" / f"{cell.name}.txt"

    def run(self, cell: Cell) -> RunFolder:
        """The cell's folder, whether it is there or not."""
        from engine.run import RunFolder  # noqa: PLC0415 - imports torch

        return RunFolder(self.out / "runs" / cell.name)

    def tests(self, cell: Cell, obj: str) -> dict[str, Path]:
        """Where the results on another data set lie: of the selected and of the last epoch."""
        folder = self.run(cell).path
        return {"selected": folder / f"on-{obj}.json", "last": folder / f"on-{obj}-last.json"}

    def done(self, cell: Cell) -> bool:
        """Whether nothing is left to do."""
        tests = [path for obj in cell.others for path in self.tests(cell, obj).values()]
        return all(path.is_file() for path in (self.run(cell).result, *tests))

    def epochs_done(self, cell: Cell) -> int:
        """Finished epochs of its training."""
        try:
            return self.run(cell).metrics.read_bytes().count(b"\n")
        except OSError:
            return 0

    def check(self, cell: Cell) -> None:
        """`InputError` where the cell's folder holds a run with other flags."""
        run, asked = self.run(cell), vars(self.parse(cell))
        stored = run.read_config()["options"] if run.config.is_file() else {}
        for name, value in asked.items():
            if name in stored and name not in MACHINE_FLAGS and stored[name] != value:
                raise InputError(f"{run.path} was made with --{name} {stored[name]}, not {value}: choose another --out")

    def compute(self, cell: Cell, on_line: Callable[[], None] = lambda: None) -> None:
        """Train, or go on training, and test; what is printed goes to OUT/logs, and `on_line` hears of each line."""
        import train  # noqa: PLC0415 - imports torch

        lock = self.out / "locks" / cell.name
        for path in (lock, self.log(cell)):
            path.parent.mkdir(parents=True, exist_ok=True)
        with (
            Log(self.log(cell), on_line) as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
            locked(lock, f"{cell.name}: another process is at it; waiting for it"),
        ):
            run, arguments = self.run(cell), self.arguments(cell)
            if cell.baselines:
                if not run.result.is_file():
                    from engine.baselines import measure_baselines  # noqa: PLC0415 - imports torch

                    write_json(run.result, measure_baselines(self.parse(cell)))
                return
            if not run.result.is_file():
                if cell.sources:
                    write_union(cell, self.parse(replace(cell, sources=())), self.out / "unions" / f"{cell.name}_AD")
                if run.config.is_file():
                    arguments += ["--resume", str(run.path)]
                else:  # killed before it had begun
                    shutil.rmtree(run.path, ignore_errors=True)
                train.train(train_options(arguments))
            for obj in cell.others:
                self.compute_tests(cell, obj)

    def compute_tests(self, cell: Cell, obj: str) -> None:
        """Test the selected and the last epoch on another data set."""
        import test  # noqa: PLC0415 - imports torch
        from engine.checkpoint import Checkpoint  # noqa: PLC0415 - imports torch

        run, options = self.run(cell), vars(self.parse(cell))
        last = run.path / "last-checkpoint.pth"
        state = run.load()
        if not last.is_file() and state is not None:
            selected = Checkpoint.load(run.best)
            metrics = {name: state["history"][-1][name] for name in ("epoch", "auc", "pauc")}
            metadata = {**selected.metadata, "select": "last", "metrics": metrics}
            replace(selected, parts=state["parts"], metadata=metadata).save(last)
        flags = [word for name in TEST_FLAGS if options[name] is not None for word in (f"--{name}", str(options[name]))]
        for kind, path in self.tests(cell, obj).items():
            ckpt = last if kind == "last" else run.best
            if not path.is_file():
                test.test(test_options(["--obj", obj, "--ckpt", str(ckpt), "--out_json", str(path), *flags]))

    def figures(self, cell: Cell, obj: str, kind: str) -> dict[str, Any] | None:
        """The cell's figures on a data set: of the `selected` or `last` epoch, or of a baseline; None: not done."""
        path, key = (self.run(cell).result, kind) if obj == cell.obj else (self.tests(cell, obj)[kind], "selected")
        return read_figures(path).get(key, {}) if path.is_file() else None


# A metric, its interval, and both without the shots' patients, by their keys in a result.
FIGURES = make_dataclass("Figures", [
    (name, kind, field(default=None))
    for metric in METRICS for suffix in ("", CLEAN)
    for name, kind in ((f"{metric}{suffix}", float | None), (f"{metric}{suffix}_ci95", tuple[float, float] | None))
])  # fmt: skip


@cache
def read_figures(path: Path) -> dict[str, dict[str, Any]]:
    """The figures of a result file, which is not read twice: of the result, of its last epoch, of its baselines.

    `InputError` where they are not what a run writes.
    """
    where = f"{path}: damaged; delete it, and the same command makes it again"
    try:
        result = json.loads(read_text(path))
        parts = {"selected": result, "last": result.get("last", {}), **result.get("baselines", {})}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where} ({one_line(error)})") from error
    return {kind: {k: v for k, v in vars(checked(FIGURES, part, where)).items() if k in part}
            for kind, part in parts.items()}  # fmt: skip


class Log(io.TextIOBase):
    """A text file to append to, that says when a line is complete."""

    def __init__(self, path: Path, on_line: Callable[[], None]) -> None:
        self.file, self.on_line = path.open("a", encoding="utf-8"), on_line

    def write(self, text: str) -> int:
        """Append."""
        count = self.file.write(text)
        if "\n" in text:
            self.on_line()
        return count

    def flush(self) -> None:
        """Write what is buffered."""
        if not self.file.closed:
            self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        super().close()


def write_union(cell: Cell, options: argparse.Namespace, root: Path) -> None:
    """A data set whose shots are those of other data sets, and whose test images are those of the cell's.

    It is a folder of links in the MVFA layout (of copies, where the system has no links).
    """
    target = dataset.MedicalDataset.open(cell.obj, options.data_path, None)
    shots: dict[str, list[Sample]] = {"good": [], "Ungood": []}
    for obj in cell.sources:
        source = dataset.MedicalDataset.open(obj, options.data_path, None).shots(
            cell.shot, cell.shot, options.iterate, cell.seed
        )
        shots["good"] += source.normal
        shots["Ungood"] += source.abnormal
    tests = {kind: [s for s in target.samples("test") if s.label == label] for label, kind in enumerate(shots)}
    shutil.rmtree(root, ignore_errors=True)
    for split, samples_of in (("valid", shots), ("test", tests)):
        for kind, samples in samples_of.items():
            for number, sample in enumerate(samples):
                link(sample.path, root / split / kind / "img" / f"{number:05d}-{sample.path.name}")
                if sample.mask is not None and target.pixel_metrics:
                    name = f"{number:05d}-{sample.path.stem}{sample.mask.suffix}"
                    link(sample.mask, root / split / kind / "anomaly_mask" / name)
    if any(sample.index is not None for group in (*shots.values(), *tests.values()) for sample in group):
        raise InputError(f"{cell.name}: volumes and series cannot be joined: save their slices as images")
    names = {kind: " ".join(path.name for path in sorted((root / "valid" / kind / "img").iterdir())) for kind in shots}
    lists = root / "fewshot_seed"
    lists.mkdir()
    text = f"a-0: {names['Ungood']}\nn-0: {names['good']}\n"
    (lists / f"my{cell.shot * len(cell.sources)}-shot.txt").write_text(text, encoding="utf-8")
    write_json(root / f"{cell.name}.json", {"prompt_name": target.prompt_name, "pixel_metrics": target.pixel_metrics})


def link(source: Path, path: Path) -> None:
    """A link at `path`, or a copy where the system has no links."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.symlink_to(source.absolute())
    except OSError:
        shutil.copyfile(source, path)


def layers_of(options: argparse.Namespace) -> tuple[int, ...]:
    """The layers that adapters read."""
    return check_layers(options.features_list, ModelConfig.load(options.model_name).layers, options.model_name)


def layer_choices(layers: Sequence[int]) -> list[str]:
    """Parts of a list of layers: each alone, the halves, all but one."""
    half, each = len(layers) // 2, range(len(layers))
    parts = [
        *([layer] for layer in layers),
        layers[:half],
        layers[half:],
        *([*layers[:k], *layers[k + 1 :]] for k in each),
    ]
    words = [" ".join(map(str, part)) for part in parts]
    return [text for text in dict.fromkeys(words) if text and text != " ".join(map(str, layers))]


def ablations(base: argparse.Namespace) -> list[tuple[str, str]]:
    """Every other choice of each component, one at a time."""
    changes = []
    for flag in COMPONENTS:
        choices = layer_choices(layers_of(base)) if flag == "features_list" else MODEL_FLAGS[flag]["choices"]
        changes += [(flag, choice) for choice in choices if choice != getattr(base, flag)]
    return changes


def plan(options: argparse.Namespace) -> tuple[list[Cell], Grid]:
    """The table's cells, in an order in which neighbours share the most, and how they are run. It needs no data.

    Raises:
        InputError: a flag that fits no cell, or a run on disk with other flags.
    """
    grid = Grid(Path(options.out), tuple(options.flags))
    base = grid.parse(Cell(options.obj[0], options.shots[0], options.seeds[0]))
    if base.data_root and (len(options.obj) > 1 or options.table == "leave_one_out"):
        raise InputError(f"--data_root {base.data_root}: one folder for {len(options.obj)} data sets; name one --obj")
    cells = []
    for obj in options.obj:
        others = tuple(other for other in options.obj if other != obj)
        for seed in options.seeds:
            for shot in options.shots:
                cell = Cell(obj, shot, seed, others=others if options.table == "cross" else ())
                if options.table == "leave_one_out":
                    cell = replace(cell, sources=sources(obj, others, base))
                cells.append(cell)
                if options.table == "ablation":
                    cells += [replace(cell, change=change) for change in ablations(base)]
                if options.table == "baselines":
                    cells.append(replace(cell, baselines=True))
    for cell in cells:
        layers_of(grid.parse(cell))
        grid.check(cell)
    return cells, grid


def sources(obj: str, others: Sequence[str], base: argparse.Namespace) -> tuple[str, ...]:
    """The data sets whose shots serve `obj`: for one with masks those with masks, else all."""
    if not has_masks(obj, base):
        return tuple(others)
    chosen = tuple(other for other in others if has_masks(other, base))
    if not chosen:
        raise InputError(f"--table leave_one_out: {obj} has masks, and none of the others: name more data sets")
    return chosen


def has_masks(obj: str, base: argparse.Namespace) -> bool:
    """Whether a data set has masks; where it is not there, whether the published one has."""
    with contextlib.suppress(InputError):
        return bool(dataset.MedicalDataset.open(obj, base.data_path).pixel_metrics)
    return obj in ("Brain", "Liver", "Retina_RESC")


def grid_cost(cells: Sequence[Cell], grid: Grid) -> tuple[cost.Cost, list[str]]:
    """What these cells cost, and the data sets whose size is not known. Cells share images, as they share the store."""
    parsed = [(cell, grid.parse(cell)) for cell in cells]
    config = ModelConfig.load(parsed[0][1].model_name)
    img_size = parsed[0][1].img_size
    layers = tuple(sorted({layer for _, options in parsed for layer in layers_of(options)}))
    images: dict[tuple[object, ...], int] = {}
    operations, unknown = 0.0, set()
    for cell, options in parsed:
        data_path = grid.parse(replace(cell, sources=())).data_path
        tests = {obj: test_images(obj, data_path, options.data_root) for obj in (cell.obj, *cell.others)}
        unknown |= {obj for obj, count in tests.items() if count is None}
        shots = 2 * options.shot
        images |= {(options.fidelity, obj): count or 0 for obj, count in tests.items()}
        images[options.fidelity, cell.obj, "calibration"] = cost.CALIBRATION_IMAGES
        drawn_by = cell.seed if options.iterate < 0 else None
        images[options.fidelity, cell.obj, cell.sources, cell.shot, drawn_by] = (VIEWS - 1) * shots
        images[options.fidelity, cell.obj, cell.sources, cell.shot, "jitter", cell.seed] = shots
        if not cell.baselines:
            operations += options.epoch * cost.epoch_operations(
                config, img_size, len(layers_of(options)), shots, tests[cell.obj] or 0, options.batch_size,
                options.fidelity,
            )  # fmt: skip
    passes = cost.store_cost(config, img_size, layers, sum(images.values()))
    return replace(passes, epochs=operations), sorted(unknown)


@cache
def test_images(obj: str, data_path: str, data_root: str | None) -> int | None:
    """How many test images a data set has: counted, or where it is not there as published; None: not known."""
    try:
        return len(dataset.MedicalDataset.open(obj, data_path, data_root).samples("test"))
    except InputError:
        return cost.TEST_IMAGES.get(obj)


def caption(options: argparse.Namespace, base: argparse.Namespace) -> str:
    """What the figures are: three lines of an article."""
    shots = "" if len(options.shots) > 1 else f", {options.shots[0]} shots"
    seeds = f"seeds {' '.join(map(str, options.seeds))}" if len(options.seeds) > 1 else f"seed {options.seeds[0]}"
    return (
        f"MadCLIP, re-implemented: {TITLES[options.table]}. {base.model_name}, {base.pretrain} weights, "
        f"{base.img_size} px, {base.fidelity}, {base.epoch} epochs{shots}; percent, mean ± standard deviation over "
        f"{seeds}."
    )


def notes(
    options: argparse.Namespace, cells: Sequence[Cell], grid: Grid, datasets: dict[str, MedicalDataset],
    failed: dict[Cell, str],
) -> list[str]:  # fmt: skip
    """How the figures were made, how the epoch was chosen, what failed, and what they are worth."""
    base = grid.parse(cells[0])
    where = " of the data set trained on" if options.table == "cross" else ""
    texts = [
        f"{sum(map(grid.done, cells))} of {len(cells)} cells are done.",
        "Intervals: over the test images by bootstrap, the mean of the seeds' bounds.",
        "Last epoch: nothing is selected.",
    ]
    if options.table != "leave_one_out":
        texts.append(f"Selected on test: the epoch that is best on the test set{where} (--select test), as published.")
    else:
        texts.append(
            "A data set with masks is tested after training on the shots of the others that have masks, one without on "
            "the shots of all others; --shots counts those of each."
        )
    if options.table == "ablation":
        values = {**vars(base), "features_list": " ".join(map(str, layers_of(base)))}
        texts.append(f"Default: {', '.join(f'{words} {values[flag]}' for flag, words in COMPONENTS.items())}.")
    if options.clean:
        texts.append("Clean: without the test images of patients whose images are shots.")
    if failed:
        texts.append("Failed: " + "; ".join(f"{cell.name} ({reason})" for cell, reason in failed.items()) + ".")
    if base.pretrain == "random":
        texts.append("Nothing is pre-trained: these figures only show that the program runs.")
    made_up = [obj for obj, found in datasets.items() if (found.root / MADE_UP).is_file()]
    if made_up:
        texts.append(f"Made-up images ({', '.join(made_up)}): their figures compare with none that is published.")
    return texts


def compared(options: argparse.Namespace) -> list[Published]:
    """The published methods that have a figure for the table; none in tables of another protocol."""
    if options.table not in ("main", "shots", "baselines"):
        return []
    return [
        entry
        for entry in read_published(options.compare)
        if any(entry.figure(obj, shot, m) for obj in options.obj for shot in options.shots for m in METRICS)
    ]


def published_note(published: Sequence[Published]) -> list[str]:
    """Where the published figures are from, under the numbers that the rows bear."""
    numbered = "; ".join(f"({i}) {entry.note()}" for i, entry in enumerate(published, 1))
    return [f"Published figures: {numbered}."] if published else []


def make_table(
    options: argparse.Namespace, cells: Sequence[Cell], grid: Grid, datasets: dict[str, MedicalDataset],
    failed: dict[Cell, str],
) -> Table:  # fmt: skip
    """The table as far as its cells are done."""
    published = compared(options)
    texts = [*notes(options, cells, grid, datasets, failed), *published_note(published)]
    labels = {"cross": ["trained on", "epoch"], "ablation": ["component", "setting", "epoch"]}
    heading = "tested on" if options.table in ("cross", "leave_one_out") else "data set"
    several = ["shots"] if len(options.shots) > 1 else []
    table = Table(
        options.table, caption(options, grid.parse(cells[0])), [*several, *labels.get(options.table, ["method"])],
        heading, texts,
    )  # fmt: skip
    for shot in options.shots:
        before = [str(shot)] if several else []
        groups: dict[Cell, list[Cell]] = {}
        for cell in cells:
            if cell.shot == shot:
                groups.setdefault(replace(cell, seed=0), []).append(cell)
        for first, members in groups.items():
            for obj in (first.obj, *first.others):
                pixels = datasets[first.obj].pixel_metrics and datasets[obj].pixel_metrics
                for metric in METRICS if pixels else ("auc",):
                    for row, kind, suffix in our_rows(options, first):
                        figure = over_seeds(grid, members, obj, kind, metric, suffix, failed)
                        table.add(METRICS[metric], [*before, *row], obj, figure)
        for i, entry in enumerate(published, 1):
            for metric, words in METRICS.items():
                for obj in options.obj:
                    table.add(words, [*before, f"{entry.method} ({i})"], obj, entry.figure(obj, shot, metric))
    return table


def our_rows(options: argparse.Namespace, cell: Cell) -> Iterator[tuple[list[str], str, str]]:
    """The rows of a cell in its table: labels, kind of figures, and what is appended to a metric's key."""
    if cell.baselines:
        from engine.baselines import NAMES  # noqa: PLC0415

        for name in NAMES:
            yield [name], name, ""
        return
    for kind, words in EPOCHS.items():
        if cell.sources and kind == "selected":
            continue
        for suffix in ("", CLEAN) if options.clean else ("",):
            epoch = f"{words}, clean" if suffix else words
            if options.table == "cross":
                yield [cell.obj, epoch], kind, suffix
            elif options.table == "ablation":
                change = (COMPONENTS[cell.change[0]], cell.change[1]) if cell.change else ("default", "")
                yield [*change, epoch], kind, suffix
            else:
                yield [f"ours, {epoch}"], kind, suffix


def over_seeds(
    grid: Grid, cells: Sequence[Cell], obj: str, kind: str, metric: str, suffix: str, failed: dict[Cell, str]
) -> Figure | str | None:
    """A figure of cells that differ in their seeds, or why there is none."""
    done = [figures for cell in cells if (figures := grid.figures(cell, obj, kind)) is not None]
    if not done:
        return "failed" if any(cell in failed for cell in cells) else "to do"
    key = f"{metric}{suffix}"
    measured = [figures for figures in done if figures.get(key) is not None]
    if not measured:  # of a class no image is left, or the metric is none of this data set's
        return "not measurable" if suffix and any(key in figures for figures in done) else None
    intervals = [figures[f"{key}_ci95"] for figures in measured if figures.get(f"{key}_ci95")]
    return Figure.over(
        [figures[key] for figures in measured], intervals if len(intervals) == len(measured) else [], len(cells)
    )


def make_verdict(options: argparse.Namespace, table: Table) -> Table:
    """Of the table's first row for each data set the difference to what is published."""
    result = Table(
        f"{table.name}-verdict", "Ours, selected on test, minus the published figure, in percentage points.",
        table.labels, table.heading,
        ["inside: the published figure lies in our 95% interval over the test images; below, above: it lies below or "
         "above that. docs/reproduce.md says where to look when it is outside.", *published_note(compared(options))],
    )  # fmt: skip
    ours = f"ours, {EPOCHS['selected']}"
    names = [f"{entry.method} ({i})" for i, entry in enumerate(compared(options), 1)]
    for (metric, row, obj), theirs in table.cells.items():
        figure = table.cells.get((metric, (*row[:-1], ours), obj))
        if row[-1] in names and isinstance(theirs, Figure) and isinstance(figure, Figure) and figure.interval:
            low, high = figure.interval
            place = "below" if theirs.mean < low else "above" if theirs.mean > high else "inside"
            result.add(metric, row, obj, f"{figure.mean - theirs.mean:+.2f} {place}")
    return result


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The grid's flags, and as `flags` the others, which are train.py's."""
    parser = Parser(
        description=__doc__.split("\n\n")[0], epilog="Every other flag goes to train.py.", formatter_class=Formatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--table", required=True, choices=tuple(TITLES))
    parser.add_argument("--obj", nargs="+", type=object_name, default=list(BENCHMARKS), help="data sets")
    parser.add_argument("--seeds", nargs="+", type=int, default=[111, 112, 113], help="means are over these")
    parser.add_argument("--shots", nargs="+", type=positive, help="(default: 4; of the table shots 2 4 8 16)")
    parser.add_argument("--out", type=nonempty_path, default="results", help="folder of tables, runs and logs")
    parser.add_argument("--dry_run", action="store_true", help="list cells, images, disk and hours, and do nothing")
    parser.add_argument("--compare", nargs="+", type=Path, default=[], metavar="JSON",
                        help="more published figures, in the form of dataset/published_results.json")  # fmt: skip
    parser.add_argument("--verdict", action="store_true", help="also a table of differences to the published figures")
    parser.add_argument("--clean", action="store_true", help="also figures without test images of the shots' patients")
    parser.add_argument("--executor", choices=("here", *EXECUTORS), default="here", help="here: in this process; "
                        "local, slurm: jobs through submitit, at most --jobs at once")  # fmt: skip
    parser.add_argument("--jobs", type=positive, default=1, help="jobs at once")
    parser.add_argument(
        "--job_options", nargs="+", default=[], metavar="KEY=VALUE", help="submitit's, such as timeout_min=240"
    )
    options, flags = parser.parse_known_args(arguments)
    options.flags = flags
    if options.shots is None:
        options.shots = [2, 4, 8, 16] if options.table == "shots" else [4]
    for name in ("obj", "seeds", "shots"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    for flag in flags:
        if flag.split("=")[0] in GRID_FLAGS:
            raise InputError(f"{flag}: reproduce.py sets this flag of train.py itself; see its own with --help")
    if options.table in ("cross", "leave_one_out") and len(options.obj) < 2:
        raise InputError(f"--table {options.table}: name two data sets or more with --obj")
    for flag in ("verdict", "compare"):
        if getattr(options, flag) and options.table not in ("main", "shots", "baselines"):
            raise InputError(f"--{flag}: no published figure belongs in --table {options.table}")
    read_published(options.compare)  # before hours are spent
    return options


class Progress:
    """A bar over all cells that moves with their epochs."""

    def __init__(self, table: str, cells: Sequence[Cell], grid: Grid) -> None:
        self.grid, self.cells = grid, cells
        self.epochs = {cell: 1 if cell.baselines else grid.parse(cell).epoch for cell in cells}
        self.ended = {cell for cell in cells if grid.done(cell)}
        self.counted = {cell: self.count(cell) for cell in cells}
        self.bar = tqdm(
            total=sum(self.epochs.values()), initial=sum(self.counted.values()), desc=f"table {table}", unit="epoch"
        )

    def count(self, cell: Cell) -> int:
        """A cell's finished epochs; a cell that has ended counts as all of them."""
        epochs = self.epochs[cell]
        return epochs if cell in self.ended else min(self.grid.epochs_done(cell), epochs)

    def refresh(self, cells: Sequence[Cell] | None = None) -> None:
        """Look how far these cells, or all, have come."""
        for cell in self.cells if cells is None else cells:
            now = self.count(cell)
            if now != self.counted[cell]:
                self.bar.set_postfix_str(f"{len(self.ended)} of {len(self.cells)} cells, {cell.name}", refresh=False)
                self.bar.update(now - self.counted[cell])
                self.counted[cell] = now

    def end(self, cell: Cell) -> None:
        """Nothing more comes of this cell."""
        self.ended.add(cell)
        self.refresh([cell])


def compute_here(cells: Sequence[Cell], grid: Grid, progress: Progress) -> Iterator[tuple[Cell, str | None]]:
    """Compute cell after cell in this process; yields each with what went wrong, if anything did."""
    for cell in cells:
        yield cell, attempt(cell, grid, partial(progress.refresh, [cell]))


def attempt(cell: Cell, grid: Grid, on_line: Callable[[], None] = lambda: None) -> str | None:
    """Compute a cell; returns what was wrong with it, whatever that is, so that the others go on."""
    try:
        grid.compute(cell, on_line)
    except InputError as error:
        return str(error)
    except Exception as error:  # out of memory, a bug: the grid goes on
        with grid.log(cell).open("a", encoding="utf-8") as log:
            traceback.print_exc(file=log)
        reason = f"{type(error).__name__}: {one_line(error)}"
    else:
        return None
    import torch  # noqa: PLC0415

    torch.cuda.empty_cache()  # outside of the handler, which holds the failed cell's tensors
    return reason


def job(grid: Grid, cell: Cell) -> str | None:
    """A cell in a process of its own."""
    tune_allocator()
    return attempt(cell, grid)


def dry_run(cells: Sequence[Cell], grid: Grid) -> None:
    """Print the cells and what those that are not done cost."""
    waiting = [cell for cell in cells if not grid.done(cell)]
    for cell in cells:
        state = "to do" if cell in waiting else "done "
        what = "baselines of" if cell.baselines else "python train.py"
        print(f"{state}  {cell.name}  {what} {shlex.join(grid.arguments(cell))}")
    print(f"cells:  {len(waiting)} of {len(cells)} to do")
    if waiting:
        total, unknown = grid_cost(waiting, grid)
        for line in cost.describe(total, *cost.measured_rate()):
            print(line)
        if unknown:
            print(f"not counted, as they are not there: the test images of {', '.join(unknown)}")


def main(options: argparse.Namespace) -> None:
    """Plan, compute, and write the table after every cell."""
    cells, grid = plan(options)
    if options.dry_run:
        dry_run(cells, grid)
        return
    base = grid.parse(replace(cells[0], sources=()))
    datasets = {obj: dataset.MedicalDataset.open(obj, base.data_path, base.data_root) for obj in options.obj}
    probe_writable(grid.out / f"{options.table}.md", "--out")
    waiting, failed = [cell for cell in cells if not grid.done(cell)], dict[Cell, str]()
    progress = Progress(options.table, cells, grid)
    finished = compute_here(waiting, grid, progress)
    if options.executor != "here":
        finished = run_jobs(
            partial(job, grid), waiting, options.executor, grid.out / "jobs", options.jobs, options.job_options,
            progress.refresh,
        )  # fmt: skip
    with progress.bar:
        make_table(options, cells, grid, datasets, failed).write(grid.out)
        try:
            for cell, error in finished:
                if error:
                    failed[cell] = error
                    tqdm.write(f"{cell.name}: {error} (log: {grid.log(cell)})", file=sys.stderr)
                make_table(options, cells, grid, datasets, failed).write(grid.out)
                progress.end(cell)
        except KeyboardInterrupt:
            tqdm.write("stopped; the same command goes on from here", file=sys.stderr)
            raise
    table = make_table(options, cells, grid, datasets, failed)
    for shown in [table, *([make_verdict(options, table)] if options.verdict else [])]:
        shown.write(grid.out)
        print(shown.markdown())
        print(f"written: {grid.out / shown.name}.md, .csv and .tex")
    if failed:
        raise InputError(f"{len(failed)} of {len(cells)} cells failed, see above; the same command tries them again")


if __name__ == "__main__":
    run_script("reproduce", parse)  # jobs look for their functions under this name, not in __main__
