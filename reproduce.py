"""The paper's tables: plan a grid of runs, do what is not done yet, write Markdown, CSV and LaTeX.

    python reproduce.py --table main                                    six data sets, 4 shots, three seeds
    python reproduce.py --table shots --obj Brain Chest --shots 2 4 8 16
    python reproduce.py --table ablation --obj Brain --dry_run          lists the cells
    python reproduce.py --table cross --executor slurm --jobs 8 --job_options slurm_partition=gpu gpus_per_node=1

Every other flag goes to train.py (`python train.py --help`). A cell is one run, with a folder of its own under OUT/runs
that all tables share; the same command again goes on where it was stopped or killed. Features are kept on disk unless
--cache says otherwise, for all cells together: the frozen tower sees an image once (and again for another --fidelity,
and the colour-jittered view of a shot wherever a cell draws it anew).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

import test
import train
from CLIP import ModelConfig
from dataset import OBJECTS, MedicalDataset, object_name
from dataset.phantom import MARKER
from engine.checkpoint import Checkpoint
from engine.jobs import EXECUTORS, run_jobs
from engine.options import MODEL_FLAGS, Formatter, check_layers, positive, writable
from engine.run import RunFolder
from engine.tables import METRICS, Figure, Table, read_published
from engine.towers import Towers
from utils import InputError, Parser, locked, run_cli, tune_allocator

# The tables, and what they show.
TITLES = {
    "main": "figures on each data set",
    "cross": "trained on one data set, tested on another",
    "ablation": "one component changed at a time",
    "shots": "figures over the number of shots",
}
# The paper's components, in the table's words; each is changed alone.
COMPONENTS = {
    "text_mood": "text", "contrast_mood": "dual objective", "loss_type": "loss", "dec_type": "decision",
    "visionA": "adapters", "features_list": "layers", "fidelity": "fidelity",
}  # fmt: skip
GRID_FLAGS = (
    "--obj", "--seed", "--shot", "--shot_normal", "--shot_abnormal", "--select", "--save_model", "--no-save_model",
    "--save_path", "--run_dir", "--exp_name", "--resume", "--out_json",
)  # fmt: skip
# Of train.py's flags, what may differ between a run on disk and the command that goes on with it.
MACHINE_FLAGS = train.RESUMABLE - {"epoch", "data_path", "data_root", "weights"}
TEST_FLAGS = ("data_path", "weights", "batch_size", "device", "precision", "num_workers", "cache", "cache_dir",
              "cache_dtype")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One training, and the tests of its checkpoint on other data sets."""

    obj: str
    shot: int
    seed: int
    change: tuple[str, str] | None = None  # a flag of train.py and its value, where the ablation sets one
    others: tuple[str, ...] = ()  # the data sets that it is tested on beside its own

    @property
    def name(self) -> str:
        """The run's name: the same cell in two tables is one run."""
        words = [self.obj, f"{self.shot}shot", f"seed{self.seed}", *(self.change or ())]
        return "-".join(words).replace(" ", "-")


@dataclass(frozen=True)
class Grid:
    """What turns a cell into a run: the folder, train.py's flags, and what the cells read of the towers together."""

    out: Path
    flags: tuple[str, ...]
    layers: tuple[int, ...] = ()
    class_token: bool = False

    def arguments(self, cell: Cell) -> list[str]:
        """train.py's command line."""
        change = [f"--{cell.change[0]}", *cell.change[1].split()] if cell.change else []
        return [
            "--cache", "disk", *self.flags, "--obj", cell.obj, "--shot", str(cell.shot), "--seed", str(cell.seed),
            *change, "--select", "test", "--no-save_model", "--run_dir", str(self.out / "runs"),
            "--exp_name", cell.name,
        ]  # fmt: skip

    def parse(self, cell: Cell) -> argparse.Namespace:
        """train.py's options."""
        return train.parse(self.arguments(cell))

    def log(self, cell: Cell) -> Path:
        """What the cell printed."""
        return self.out / "logs" / f"{cell.name}.txt"

    def run(self, cell: Cell) -> RunFolder:
        """The cell's folder, whether it is there or not."""
        return RunFolder(self.out / "runs" / cell.name)

    def tests(self, cell: Cell, obj: str) -> dict[str, Path]:
        """Where the results on another data set lie: of the selected and of the last epoch."""
        folder = self.run(cell).path
        return {"selected": folder / f"on-{obj}.json", "last": folder / f"on-{obj}-last.json"}

    def done(self, cell: Cell) -> bool:
        """Whether nothing is left to do."""
        tests = [path for obj in cell.others for path in self.tests(cell, obj).values()]
        return all(path.is_file() for path in (self.run(cell).result, *tests))

    def check(self, cell: Cell) -> None:
        """`InputError` where the cell's folder holds a run with other flags."""
        run, asked = self.run(cell), vars(self.parse(cell))
        stored = run.read_config()["options"] if run.config.is_file() else {}
        for name, value in asked.items():
            if name in stored and name not in MACHINE_FLAGS and stored[name] != value:
                raise InputError(f"{run.path} was made with --{name} {stored[name]}, not {value}: choose another --out")

    def compute(self, cell: Cell, towers: Towers) -> None:
        """Train, or go on training, and test; what is printed goes to OUT/logs."""
        lock = self.out / "locks" / cell.name
        for path in (lock, self.log(cell)):
            path.parent.mkdir(parents=True, exist_ok=True)
        with (
            self.log(cell).open("a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
            locked(lock, f"{cell.name}: another process is at it; waiting for it"),
        ):
            run, arguments = self.run(cell), self.arguments(cell)
            if not run.result.is_file():
                if run.config.is_file():
                    arguments += ["--resume", str(run.path)]
                else:  # killed before it had begun
                    shutil.rmtree(run.path, ignore_errors=True)
                train.train(train.parse(arguments), towers)
            for obj in cell.others:
                self.compute_tests(cell, obj, towers)

    def compute_tests(self, cell: Cell, obj: str, towers: Towers) -> None:
        """Test the selected and the last epoch on another data set."""
        run, options = self.run(cell), vars(self.parse(cell))
        last = run.path / "last-checkpoint.pth"
        if not last.is_file():
            selected, (state, history) = Checkpoint.load(run.best), run.load()
            metrics = {name: history[-1][name] for name in ("epoch", "auc", "pauc")}
            about = {**selected.about, "select": "last", "metrics": metrics}
            replace(selected, parts=state["parts"], about=about).save(last)
        flags = [word for name in TEST_FLAGS if options[name] is not None for word in (f"--{name}", str(options[name]))]
        for kind, path in self.tests(cell, obj).items():
            ckpt = last if kind == "last" else run.best
            if not path.is_file():
                test.test(test.parse(["--obj", obj, "--ckpt", str(ckpt), "--out_json", str(path), *flags]), towers)

    def figures(self, cell: Cell, obj: str, epoch: str) -> dict[str, Any] | None:
        """The cell's figures on a data set, of the `selected` or the `last` epoch; None where it is not done."""
        path, kind = (self.run(cell).result, epoch) if obj == cell.obj else (self.tests(cell, obj)[epoch], "selected")
        return read_figures(path)[kind] if path.is_file() else None


@cache
def read_figures(path: Path) -> dict[str, dict[str, Any]]:
    """The figures of a result file, which is not read twice: of the result itself, and of its last epoch if any."""
    result = json.loads(path.read_text(encoding="utf-8"))
    names = [name for metric in METRICS for name in (metric, f"{metric}_ci95")]
    return {
        kind: {name: found.get(name) for name in names}
        for kind, found in (("selected", result), ("last", result.get("last", {})))
    }


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
    layers = check_layers(base.features_list, ModelConfig.load(base.model_name))
    changes = []
    for flag in COMPONENTS:
        choices = layer_choices(layers) if flag == "features_list" else MODEL_FLAGS[flag]["choices"]
        changes += [(flag, choice) for choice in choices if choice != getattr(base, flag)]
    return changes


def plan(options: argparse.Namespace, flags: Sequence[str]) -> tuple[list[Cell], Grid]:
    """The table's cells, in an order in which neighbours share the most, and how they are run.

    Raises:
        InputError: a flag that fits no cell, or a run on disk with other flags.
    """
    grid = Grid(Path(options.out), tuple(flags))
    base = grid.parse(Cell(options.obj[0], options.shots[0], options.seeds[0]))
    if base.data_root and len(options.obj) > 1:
        raise InputError(f"--data_root {base.data_root}: one folder for {len(options.obj)} data sets; name one --obj")
    cells = [
        Cell(obj, shot, seed, change, tuple(o for o in options.obj if o != obj) if options.table == "cross" else ())
        for obj in options.obj
        for seed in options.seeds
        for shot in options.shots
        for change in [None, *(ablations(base) if options.table == "ablation" else ())]
    ]
    for cell in cells:
        grid.check(cell)
    parsed = [grid.parse(cell) for cell in cells]
    config = ModelConfig.load(base.model_name)
    layers = {layer for found in parsed for layer in check_layers(found.features_list, config)}
    class_token = any((found.visionA, found.fidelity) == ("MViTFC", "corrected") for found in parsed)
    return cells, replace(grid, layers=tuple(sorted(layers)), class_token=class_token)


def caption(options: argparse.Namespace, base: argparse.Namespace, datasets: dict[str, MedicalDataset]) -> str:
    """What the figures are, how they were made, and how the epoch was chosen."""
    seeds = " ".join(map(str, options.seeds))
    where = " of the data set trained on" if options.table == "cross" else ""
    words = [
        f"MadCLIP, re-implemented: {TITLES[options.table]}.",
        f"{base.model_name}, {base.pretrain} weights, {base.img_size} px, {base.fidelity}, {base.epoch} epochs, seeds "
        f"{seeds}.",
        "In percent: mean ± standard deviation over the seeds [95% interval over the test images by bootstrap, mean of "
        "the seeds' bounds].",
        f"Selected on test: the epoch that is best on the test set{where}, the published protocol (--select test). "
        f"Last epoch: nothing is selected.",
    ]
    if base.pretrain == "random":
        words.append("Nothing is pre-trained: these figures only show that the program runs.")
    made_up = [obj for obj, dataset in datasets.items() if (dataset.root / MARKER).is_file()]
    if made_up:
        words.append(f"Made-up images ({', '.join(made_up)}): their figures compare with none that is published.")
    return " ".join(words)


def make_table(
    options: argparse.Namespace, cells: Sequence[Cell], grid: Grid, datasets: dict[str, MedicalDataset]
) -> Table:
    """The table as far as its cells are done."""
    base = grid.parse(cells[0])
    published = read_published() if options.table in ("main", "shots") else []
    notes = [
        f"({i}) {found.method}: {found.source}" + (f", {found.shots} shots" if found.shots else "")
        for i, found in enumerate(published, 1)
    ]
    labels = {"cross": ("trained on", "tested on", "shots"), "ablation": ("data set", "shots", "component", "setting")}
    table = Table(
        f"{caption(options, base, datasets)} {sum(map(grid.done, cells))} of {len(cells)} cells are done.",
        [*labels.get(options.table, ("data set", "shots")), "metric"],
        ["selected on test", "last epoch", *(f"{found.method} ({i})" for i, found in enumerate(published, 1))],
        [f"Published figures: {'; '.join(notes)}."] if notes else [],
    )
    groups: dict[Cell, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(replace(cell, seed=0), []).append(cell)
    for group, members in groups.items():
        for obj in (group.obj, *group.others):
            for metric, words in METRICS.items():
                if metric == "pauc" and not (datasets[group.obj].pixel_metrics and datasets[obj].pixel_metrics):
                    continue
                ours = [over_seeds(grid, members, obj, epoch, metric) for epoch in ("selected", "last")]
                theirs = [found.figure(obj, group.shot, metric) for found in published]
                table.rows.append(([*row_labels(options.table, group, obj, base), words], [*ours, *theirs]))
    return table


def over_seeds(grid: Grid, cells: Sequence[Cell], obj: str, epoch: str, metric: str) -> Figure | None:
    """A figure of cells that differ in their seeds; None where none of them is done."""
    found = [figures for cell in cells if (figures := grid.figures(cell, obj, epoch))]
    return Figure.over([one[metric] for one in found], [one[f"{metric}_ci95"] for one in found], len(cells))


def row_labels(table: str, cell: Cell, obj: str, base: argparse.Namespace) -> list[str]:
    """What a row is about."""
    if table == "cross":
        return [cell.obj, obj, str(cell.shot)]
    if table != "ablation":
        return [cell.obj, str(cell.shot)]
    if cell.change is None:
        layers = check_layers(base.features_list, ModelConfig.load(base.model_name))
        values = {**vars(base), "features_list": " ".join(map(str, layers))}
        return [cell.obj, str(cell.shot), "default", ", ".join(values[flag] for flag in COMPONENTS)]
    return [cell.obj, str(cell.shot), COMPONENTS[cell.change[0]], cell.change[1]]


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The grid's flags, and the others, which are train.py's."""
    parser = Parser(
        description=__doc__.split("\n\n")[0], epilog="Every other flag goes to train.py.", formatter_class=Formatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--table", required=True, choices=tuple(TITLES))
    parser.add_argument("--obj", nargs="+", type=object_name, default=list(OBJECTS), help="data sets")
    parser.add_argument("--seeds", nargs="+", type=int, default=[111, 112, 113], help="means are over these")
    parser.add_argument("--shots", nargs="+", type=positive, help="(default: 4; of the table shots 2 4 8 16)")
    parser.add_argument("--out", default="results", help="folder of tables, runs and logs")
    parser.add_argument("--dry_run", action="store_true", help="list the cells and do nothing")
    parser.add_argument("--executor", choices=("here", *EXECUTORS), default="here", help="here: in this process; "
                        "local, slurm: jobs through submitit, at most --jobs at once")  # fmt: skip
    parser.add_argument("--jobs", type=positive, default=1, help="jobs at once")
    parser.add_argument(
        "--job_options", nargs="+", default=[], metavar="KEY=VALUE", help="submitit's, such as timeout_min=240"
    )
    options, flags = parser.parse_known_args(arguments)
    if options.shots is None:
        options.shots = [2, 4, 8, 16] if options.table == "shots" else [4]
    for name in ("obj", "seeds", "shots"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    for flag in flags:
        if flag.split("=")[0] in GRID_FLAGS:
            raise InputError(f"{flag}: reproduce.py sets this flag of train.py itself; see its own with --help")
    if options.table == "cross" and len(options.obj) < 2:
        raise InputError("--table cross: name two data sets or more with --obj")
    return options, flags


def compute_here(cells: Sequence[Cell], grid: Grid) -> Iterator[tuple[Cell, str | None]]:
    """Compute cell after cell in this process; yields each with what went wrong, if anything did."""
    towers = Towers(grid.layers, grid.class_token)
    for cell in cells:
        yield cell, attempt(cell, grid, towers)


def attempt(cell: Cell, grid: Grid, towers: Towers) -> str | None:
    """Compute a cell; returns what was wrong with it, so that the others go on."""
    try:
        grid.compute(cell, towers)
    except InputError as error:
        return str(error)
    return None


def job(grid: Grid, cell: Cell) -> str | None:
    """A cell in a process of its own."""
    tune_allocator()
    return attempt(cell, grid, Towers(grid.layers, grid.class_token))


def main() -> None:
    """Plan, compute, and write the table after every cell."""
    options, flags = parse()
    cells, grid = plan(options, flags)
    base = grid.parse(cells[0])
    datasets = {obj: MedicalDataset.open(obj, base.data_path, base.data_root) for obj in options.obj}
    waiting = [cell for cell in cells if not grid.done(cell)]
    if options.dry_run:
        for cell in cells:
            state = "to do" if cell in waiting else "done "
            print(f"{state}  {cell.name}  python train.py {shlex.join(grid.arguments(cell))}")
        return
    stem = writable(grid.out / f"{options.table}.md", "--out").with_suffix("")
    if options.executor == "here":
        finished = compute_here(waiting, grid)
    else:
        finished = run_jobs(
            partial(job, grid), waiting, options.executor, grid.out / "jobs", options.jobs, options.job_options
        )
    failed = 0
    with tqdm(total=len(cells), initial=len(cells) - len(waiting), desc=f"table {options.table}", unit="cell") as bar:
        make_table(options, cells, grid, datasets).write(stem)
        try:
            for cell, error in finished:
                if error:
                    failed += 1
                    tqdm.write(f"{cell.name}: {error} (log: {grid.log(cell)})", file=sys.stderr)
                make_table(options, cells, grid, datasets).write(stem)
                bar.update()
        except KeyboardInterrupt:
            tqdm.write("stopped; the same command goes on from here", file=sys.stderr)
            raise
    print(make_table(options, cells, grid, datasets).markdown())
    print(f"written: {stem}.md, .csv and .tex")
    if failed:
        raise InputError(f"{failed} of {len(cells)} cells failed, see above; the same command tries them again")


if __name__ == "__main__":
    import reproduce  # jobs look for their functions under this name, not in __main__

    run_cli(reproduce.main)
