"""The paper's tables as grids of cells, each one run of train.py: which cells a table has, their flags, their files.

Imports no torch, so that `--help` is instant.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from CLIP.config import ModelConfig
from dataset.layout import BENCHMARKS, config_path, described, object_name, read_config
from utils import InputError, Parser

from ..files.config import MODEL_FLAGS, RESUMABLE, Formatter, check_layers, nonempty_path, positive, train_options
from .jobs import EXECUTORS

if TYPE_CHECKING:
    from dataset.medical_few import MedicalDataset

    from ..files.run import RunFolder


@dataclass(frozen=True)
class Kind:
    """What sets a table apart; which cells it has is in `Grid`."""

    title: str
    labels: tuple[str, ...] = ("method",)  # headings of what stands before a row's figures
    heading: str = "data set"  # of the columns
    published: bool = False  # published figures stand beside ours
    shots: tuple[int, ...] = (4,)  # where --shots is not given
    data_sets: int = 1  # as many at least
    epochs: tuple[str, ...] = ("selected", "last")


TABLES = {
    "main": Kind("figures on each data set", published=True),
    "cross": Kind("trained on one data set, tested on another", ("trained on", "epoch"), "tested on", data_sets=2),
    "leave_one_out": Kind(
        "trained on the shots of all other data sets, tested on one", heading="tested on", data_sets=2, epochs=("last",)
    ),
    "ablation": Kind("one component changed at a time", ("component", "setting", "epoch")),
    "shots": Kind("figures over the number of shots", published=True, shots=(2, 4, 8, 16)),
    "baselines": Kind("beside baselines on the same tokens, shots and test images", published=True),
}
# The paper's components, in the table's words; each is changed alone.
COMPONENTS = {
    "text_mood": "text", "contrast_mood": "dual objective", "loss_type": "loss", "dec_type": "decision",
    "visionA": "adapters", "features_list": "layers", "fidelity": "fidelity",
}  # fmt: skip
# Flags of train.py that the grid sets itself.
OWN_FLAGS = (
    "--obj", "--seed", "--shot", "--shot_normal", "--shot_abnormal", "--select", "--save_model", "--no-save_model",
    "--save_path", "--run_dir", "--exp_name", "--resume", "--out_json",
)  # fmt: skip
# What may differ between a run on disk and the command that goes on with it.
MACHINE_FLAGS = RESUMABLE - {"epoch", "data_path", "data_root", "weights"}


@dataclass(frozen=True)
class Cell:
    """One training, and the tests of its checkpoint on other data sets; or the baselines on one set of shots."""

    obj: str
    shot: int
    seed: int
    change: tuple[str, ...] = ()  # a flag of train.py and its value, where the ablation sets one
    others: tuple[str, ...] = ()  # the data sets that it is tested on beside its own
    sources: tuple[str, ...] = ()  # the data sets whose shots it is trained on, where they are not its own
    baselines: bool = False

    @property
    def name(self) -> str:
        """The run's name: the same cell in two tables is one run."""
        sources = ["from", *self.sources] if self.sources else []
        words = [self.obj, *sources, f"{self.shot}shot", f"seed{self.seed}", *self.change]
        return "-".join([*words, *["baselines"] * self.baselines]).replace(" ", "-")


class Grid:
    """A table's cells, in an order in which neighbours share the most, and what turns each into a run.

    It takes what `parse` gives and needs no data. `InputError` where a flag fits no cell, or a run that is on disk.
    """

    def __init__(self, options: Namespace) -> None:
        self.options, self.kind, self.out = options, TABLES[options.table], Path(options.out)
        self.base = self.parse(Cell(options.obj[0], options.shots[0], options.seeds[0]))
        if self.base.data_root and len(options.obj) > 1:
            raise InputError(f"--data_root {self.base.data_root}: one folder for {len(options.obj)} data sets")
        self.cells: list[Cell] = []
        for obj, seed, shot in product(options.obj, options.seeds, options.shots):
            cell, others = Cell(obj, shot, seed), tuple(other for other in options.obj if other != obj)
            if options.table == "cross":
                cell = replace(cell, others=others)
            elif options.table == "leave_one_out":
                cell = replace(cell, sources=self.sources(obj, others))
            self.cells.append(cell)
            if options.table == "ablation":
                self.cells += [replace(cell, change=change) for change in ablations(self.base)]
            elif options.table == "baselines":
                self.cells.append(replace(cell, baselines=True))
        for cell in self.cells:
            self.check(cell)

    def sources(self, obj: str, others: tuple[str, ...]) -> tuple[str, ...]:
        """The data sets whose shots serve `obj`: for one with masks those with masks, else all."""
        chosen = tuple(filter(self.has_masks, others)) if self.has_masks(obj) else others
        if not chosen:
            raise InputError(f"--table leave_one_out: {obj} has masks, and none of the others: name more data sets")
        return chosen

    def dataset(self, obj: str) -> MedicalDataset:
        """A data set, read as the flags say; `InputError` where it is not there."""
        from dataset.medical_few import MedicalDataset  # noqa: PLC0415 - imports torch

        return MedicalDataset.from_options(Namespace(**{**vars(self.base), "obj": obj}))

    def has_masks(self, obj: str) -> bool:
        """Whether a data set has masks; where it is not there, whether its JSON file says so."""
        try:
            return self.dataset(obj).pixel_metrics
        except InputError:
            return obj in described() and read_config(config_path(obj)).get("pixel_metrics", False)

    def arguments(self, cell: Cell) -> list[str]:
        """train.py's command line."""
        obj, shot, select, union = cell.obj, cell.shot, "test", list[str]()
        if cell.sources:
            obj, shot, select = cell.name, cell.shot * len(cell.sources), "last"
            union = ["--data_path", str(self.out / "unions"), "--iterate", "0"]
        change = [f"--{cell.change[0]}", *cell.change[1].split()] if cell.change else []
        return [
            "--cache", "disk", *self.options.flags, *union, "--obj", obj, "--shot", str(shot), "--seed", str(cell.seed),
            *change, "--select", select, "--no-save_model", "--run_dir", str(self.out / "runs"),
            "--exp_name", cell.name,
        ]  # fmt: skip

    def parse(self, cell: Cell) -> Namespace:
        """train.py's options."""
        return train_options(self.arguments(cell))

    def run(self, cell: Cell) -> RunFolder:
        """The cell's folder, whether it is there or not."""
        from ..files.run import RunFolder  # noqa: PLC0415 - imports torch

        return RunFolder(self.out / "runs" / cell.name)

    def log(self, cell: Cell) -> Path:
        """What the cell printed."""
        return self.out / "logs" / f"{cell.name}.txt"

    def result(self, cell: Cell, obj: str, epoch: str) -> Path:
        """Where the figures on a data set lie; for its own those of every epoch, in one file."""
        run = self.run(cell)
        return run.result if obj == cell.obj else run.path / f"on-{obj}{'-last' * (epoch == 'last')}.json"

    def done(self, cell: Cell) -> bool:
        """Whether nothing is left to do."""
        tested = product((cell.obj, *cell.others), ("selected", "last"))
        return all(self.result(cell, obj, epoch).is_file() for obj, epoch in tested)

    def check(self, cell: Cell) -> None:
        """`InputError` where the tower lacks a layer, or the cell's folder holds a run with other flags."""
        run, asked = self.run(cell), vars(self.parse(cell))
        layers_of(Namespace(**asked))
        stored = run.read_config()["options"] if run.config.is_file() else {}
        for name, value in asked.items():
            if name in stored and name not in MACHINE_FLAGS and stored[name] != value:
                raise InputError(f"{run.path} was made with --{name} {stored[name]}, not {value}: choose another --out")


def layers_of(options: Namespace) -> tuple[int, ...]:
    """The layers that adapters read."""
    config = ModelConfig.load(options.model_name)
    return check_layers(options.features_list, config)


def layer_choices(layers: tuple[int, ...]) -> list[str]:
    """Parts of a list of layers: each alone, the halves, all but one."""
    half, all_but_one = len(layers) // 2, [layers[:k] + layers[k + 1 :] for k in range(len(layers))]
    parts = [*((layer,) for layer in layers), layers[:half], layers[half:], *all_but_one]
    return list(dict.fromkeys(" ".join(map(str, part)) for part in parts if 0 < len(part) < len(layers)))


def ablations(base: Namespace) -> list[tuple[str, str]]:
    """Every other choice of each component, one at a time."""
    choices = {flag: MODEL_FLAGS[flag].get("choices") or layer_choices(layers_of(base)) for flag in COMPONENTS}
    return [(flag, choice) for flag in COMPONENTS for choice in choices[flag] if choice != getattr(base, flag)]


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    """reproduce.py's command line; the flags that it does not know are train.py's, kept as `flags`."""
    parser = Parser(
        prog="reproduce.py", description="The paper's tables: plan a grid of runs, do what is not done yet, write "
        "Markdown, CSV and LaTeX.", epilog="Every other flag goes to train.py.", formatter_class=Formatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--table", required=True, choices=tuple(TABLES))
    add("--obj", nargs="+", type=object_name, default=list(BENCHMARKS), help="data sets")
    add("--seeds", nargs="+", type=int, default=[111, 112, 113], help="means are over these")
    add("--shots", nargs="+", type=positive, help="(default: 4; of the table shots 2 4 8 16)")
    add("--out", type=nonempty_path, default="results", help="folder of tables, runs and logs")
    add("--dry_run", action="store_true", help="list cells, images, disk and hours, and do nothing")
    add("--compare", nargs="+", type=Path, default=[], metavar="JSON",
        help="more published figures, in the form of dataset/published_results.json")  # fmt: skip
    add("--verdict", action="store_true", help="also a table of differences to the published figures")
    add("--clean", action="store_true", help="also figures without test images of the shots' patients")
    add("--executor", choices=("here", *EXECUTORS), default="here",
        help="here: in this process; local, slurm: jobs through submitit, at most --jobs at once")  # fmt: skip
    add("--jobs", type=positive, default=1, help="jobs at once")
    add("--job_options", nargs="+", default=[], metavar="KEY=VALUE", help="submitit's, such as timeout_min=240")
    options, flags = parser.parse_known_args(arguments)
    options.flags, kind = flags, TABLES[options.table]
    options.shots = options.shots or kind.shots
    for name in ("obj", "seeds", "shots"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    for flag in flags:
        if flag.split("=")[0] in OWN_FLAGS:
            raise InputError(f"{flag}: reproduce.py sets this flag of train.py itself; see its own with --help")
    if len(options.obj) < kind.data_sets:
        raise InputError(f"--table {options.table}: name two data sets or more with --obj")
    for flag in ("verdict", "compare"):
        if getattr(options, flag) and not kind.published:
            raise InputError(f"--{flag}: no published figure belongs in --table {options.table}")
    return options
