"""A table as a grid of cells, each a run of train.py: their flags, files, results and cost."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from CLIP.dinov2 import load_config
from dataset.layout import PUBLISHED_COUNTS, config_path, described, read_config
from dataset.medical_few import MedicalDataset
from dataset.views import VIEWS
from utils import InputError, read_json

from ..calibration import MAX_IMAGES
from ..files.config import MODEL_FLAGS, RESUMABLE, check_layers, train_options
from ..files.run import RunFolder
from .options import TABLES

# The paper's components, flag -> name in the table; the ablation changes one at a time.
COMPONENTS = {
    "text_mood": "text", "contrast_mood": "dual objective", "loss_type": "loss", "dec_type": "decision",
    "visionA": "adapters", "features_list": "layers", "fidelity": "fidelity",
}  # fmt: skip
# Flags that may differ between a run on disk and the command that resumes it.
MACHINE_FLAGS = RESUMABLE - {"epoch", "data_path", "data_root", "weights"}


@dataclass(frozen=True)
class Cell:
    """One training run and the tests of its checkpoint on other data sets; or the baselines on one set of shots."""

    obj: str
    shot: int
    seed: int
    change: tuple[str, ...] = ()  # in an ablation: the changed flag of train.py, and its value
    others: tuple[str, ...] = ()  # other data sets to test on
    sources: tuple[str, ...] = ()  # data sets whose shots are used for training; empty: those of `obj`
    baselines: bool = False

    @property
    def name(self) -> str:
        """The run's name: the same cell in two tables is one run."""
        sources = ["from", *self.sources] if self.sources else []
        words = [self.obj, *sources, f"{self.shot}shot", f"seed{self.seed}", *self.change]
        return "-".join([*words, *["baselines"] * self.baselines]).replace(" ", "-")


class Grid:
    """The cells of a table, ordered so that neighbours share the most, and the run of each.

    It needs the options of `parse`, but no data. `InputError` if flags do not fit, or contradict a run on disk.
    """

    def __init__(self, options: Namespace) -> None:
        self.options, self.kind, self.out = options, TABLES[options.table], Path(options.out)
        self.base = self.parse(Cell(options.obj[0], options.shots[0], options.seeds[0]))
        if self.base.data_root and len(options.obj) > 1:
            raise InputError(f"--data_root {self.base.data_root}: give one data set with --obj, not {len(options.obj)}")
        self._datasets: dict[str, MedicalDataset] = {}
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
        self.groups: dict[Cell, list[Cell]] = {}  # cells that differ only in seed
        for cell in self.cells:
            self.check(cell)
            self.groups.setdefault(replace(cell, seed=0), []).append(cell)

    def sources(self, obj: str, others: tuple[str, ...]) -> tuple[str, ...]:
        """The data sets whose shots are used for `obj`: only those with masks if `obj` has masks, else all."""
        chosen = tuple(filter(self.has_masks, others)) if self.has_masks(obj) else others
        if not chosen:
            raise InputError(f"--table leave_one_out: {obj} has masks, and none of the others: name more data sets")
        return chosen

    def dataset(self, obj: str) -> MedicalDataset:
        """A data set, read as the flags say; `InputError` if it is missing."""
        if obj not in self._datasets:
            self._datasets[obj] = MedicalDataset.from_options(Namespace(**{**vars(self.base), "obj": obj}))
        return self._datasets[obj]

    def has_masks(self, obj: str) -> bool:
        """Whether a data set has masks; if it is missing, whether its JSON file says so."""
        try:
            return self.dataset(obj).pixel_metrics
        except InputError:
            return obj in described() and read_config(config_path(obj)).get("pixel_metrics", False)

    # --- a cell's flags ---

    def arguments(self, cell: Cell) -> list[str]:
        """The arguments of train.py for a cell."""
        obj, shot, union = cell.obj, cell.shot, list[str]()
        if cell.sources:
            obj, shot = cell.name, cell.shot * len(cell.sources)
            union = ["--data_path", str(self.out / "unions"), "--iterate", "0", "--select", "last"]
        change = [f"--{cell.change[0]}", *cell.change[1].split()] if cell.change else []
        return [
            "--cache", "disk", *self.options.flags, *union, "--obj", obj, "--shot", str(shot), "--seed", str(cell.seed),
            *change, "--no-save_model", "--run_dir", str(self.out / "runs"), "--exp_name", cell.name,
        ]  # fmt: skip

    def parse(self, cell: Cell) -> Namespace:
        """The options of train.py for a cell."""
        return train_options(self.arguments(cell))

    def check(self, cell: Cell) -> None:
        """Raise an `InputError` if the tower lacks a layer, or the cell's folder holds a run with other flags."""
        run, asked = self.run(cell), vars(self.parse(cell))
        layers_of(Namespace(**asked))
        stored = read_json(run.config)["options"] if run.config.is_file() else {}
        for name, value in asked.items():
            chosen = name == "select" and value is None  # the run chooses the rule
            if name in stored and name not in MACHINE_FLAGS and stored[name] != value and not chosen:
                raise InputError(f"{run.path} was made with --{name} {stored[name]}, not {value}: choose another --out")

    # --- a cell's files and results ---

    def run(self, cell: Cell) -> RunFolder:
        """The cell's folder, whether it exists or not."""
        return RunFolder(self.out / "runs" / cell.name)

    def log(self, cell: Cell) -> Path:
        """The file with the cell's output."""
        return self.out / "logs" / f"{cell.name}.txt"

    def file(self, cell: Cell, obj: str) -> Path:
        """The file with the results on a data set: of the selected epoch and, under `last`, of the last one."""
        run = self.run(cell)
        return run.result if obj == cell.obj else run.path / f"on-{obj}.json"

    def figures(self, cell: Cell, obj: str, key: str) -> dict[str, Any] | None:
        """The metrics on a data set, of the `selected` or `last` epoch or of a baseline; None if not measured yet."""
        result = read_result(self.file(cell, obj))
        parts = {"selected": result, "last": result.get("last", {}), **result.get("baselines", {})}
        return parts.get(key, {}) if result else None

    def epochs(self, cell: Cell) -> dict[str, str]:
        """The reported epochs and their names: the selected one, unless nothing is selected, and the last one."""
        select = (
            "last" if cell.sources else self.base.select or ("test" if self.dataset(cell.obj).is_benchmark else "last")
        )
        select = read_result(self.file(cell, cell.obj)).get("select", select)  # on your own data, the run may choose
        return {**({} if select == "last" else {"selected": f"selected on {select}"}), "last": "last epoch"}

    def done(self, cell: Cell) -> bool:
        """Whether all results of a cell exist."""
        return all(read_result(self.file(cell, obj)) for obj in (cell.obj, *cell.others))

    # --- the cost of cells ---

    def cost(self, cells: Sequence[Cell]) -> str:
        """Lines that tell how many images pass through the tower for some cells, and how large their tokens are."""
        images, layers = dict[tuple[object, ...], int](), set[int]()
        for cell in cells:
            options = self.parse(cell)
            layers |= set(layers_of(options))
            images |= {(options.fidelity, obj): self.count_tests(obj) for obj in (cell.obj, *cell.others)}
            images[options.fidelity, cell.obj, "calibration"] = 2 * MAX_IMAGES
            images[options.fidelity, cell.obj, cell.sources, cell.shot, cell.seed] = VIEWS * 2 * options.shot
        config, total = load_config(self.base.model_name, self.base.image_tower), sum(images.values())
        one = 2 * len(layers) * config.grid(self.base.img_size) ** 2 * config.width  # bytes
        return (
            f"images: at most {total:,} through the frozen tower, once each\nstore:  {total * one / 1e9:,.1f} GB "
            f"({one / 1e6:.2f} MB an image) in 16 bits, as CUDA computes; twice that in float32, as a CPU does"
        )

    def count_tests(self, obj: str) -> int:
        """The number of test images; if the data set is missing, the published number, or else an `InputError`."""
        try:
            return len(self.dataset(obj).samples("test"))
        except InputError:
            if obj not in PUBLISHED_COUNTS:
                raise
            return sum(PUBLISHED_COUNTS[obj]["test"][0])


def read_result(path: Path) -> dict[str, Any]:
    """The result that a run or a test has written; empty if there is no file, or no metric in it."""
    return _read_result(path, path.stat().st_mtime_ns) if path.is_file() else {}


@cache  # since a table is written after every cell
def _read_result(path: Path, _changed: int) -> dict[str, Any]:
    result = read_json(path, "delete it; the same command makes it again")
    if not isinstance(result, dict) or not result.keys() & {"auc", "baselines"}:
        return {}
    return {name: value for name, value in result.items() if name != "per_image"}


def layers_of(options: Namespace) -> tuple[int, ...]:
    """The layers that adapters read."""
    return check_layers(options.features_list, load_config(options.model_name, options.image_tower))


def layer_choices(layers: tuple[int, ...]) -> list[str]:
    """Subsets of the layers: each one alone, each half, all but one."""
    half, all_but_one = len(layers) // 2, [layers[:k] + layers[k + 1 :] for k in range(len(layers))]
    parts = [*((layer,) for layer in layers), layers[:half], layers[half:], *all_but_one]
    return list(dict.fromkeys(" ".join(map(str, part)) for part in parts if 0 < len(part) < len(layers)))


def ablations(base: Namespace) -> list[tuple[str, str]]:
    """Every other choice of each component, changed one at a time: (flag, choice)."""
    choices = {flag: MODEL_FLAGS[flag].get("choices") or layer_choices(layers_of(base)) for flag in COMPONENTS}
    return [(flag, choice) for flag in COMPONENTS for choice in choices[flag] if choice != getattr(base, flag)]
