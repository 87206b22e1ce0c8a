"""The tables that reproduce.py makes, and its command line. Does not import torch, so that `--help` is instant."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.layout import BENCHMARKS, object_name
from utils import InputError, Parser

from ..files.config import Formatter, nonempty_path, positive


@dataclass(frozen=True)
class TableKind:
    """The properties of a table; its cells are in `Grid`."""

    title: str
    labels: tuple[str, ...] = ("method",)  # headings of the columns before the results
    heading: str = "data set"  # what the columns of results are
    published: bool = False  # published results stand beside ours
    shots: tuple[int, ...] = (4,)  # default of --shots
    data_sets: int = 1  # minimum number of data sets


TABLES = {
    "main": TableKind("results on each data set", published=True),
    "cross": TableKind("trained on one data set, tested on another", ("trained on", "epoch"), "tested on", data_sets=2),
    "leave_one_out": TableKind(
        "trained on the shots of all other data sets, tested on one", heading="tested on", data_sets=2
    ),
    "ablation": TableKind("one component changed at a time", ("component", "setting", "epoch")),
    "shots": TableKind("results over the number of shots", published=True, shots=(2, 4, 8, 16)),
    "baselines": TableKind("beside baselines on the same tokens, shots and test images", published=True),
}
# Flags of train.py that the grid sets itself; in tables where nothing is selected, also --select.
OWN_FLAGS = (
    "--obj", "--seed", "--shot", "--shot_normal", "--shot_abnormal", "--save_model", "--no-save_model", "--save_path",
    "--run_dir", "--exp_name", "--resume", "--out_json",
)  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    """Parse reproduce.py's command line; unknown flags become `flags`, for train.py. `InputError` for a wrong flag."""
    parser = Parser(
        prog="reproduce.py", description="The paper's tables: plan a grid of runs, compute the missing cells, write "
        "Markdown, CSV and LaTeX.", epilog="Every other flag goes to train.py.", formatter_class=Formatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--table", required=True, choices=tuple(TABLES), help="the table to make")
    add("--obj", nargs="+", type=object_name, default=list(BENCHMARKS), help="data sets")
    add("--seeds", nargs="+", type=int, default=[111, 112, 113], help="seeds to average over")
    add("--shots", nargs="+", type=positive, help="images of each class (default: 4; 2 4 8 16 for --table shots)")
    add("--out", type=nonempty_path, default="results", help="folder of tables, runs and logs")
    add("--dry_run", action="store_true", help="only list cells, images and disk space")
    add("--compare", nargs="+", type=Path, default=[], metavar="JSON",
        help="more published results, in the form of dataset/published_results.json")  # fmt: skip
    add("--clean", action="store_true", help="also results without test images of the shots' patients")
    add("--executor", choices=("here", "local", "slurm"), default="here",
        help="here: in this process; local, slurm: jobs through submitit")  # fmt: skip
    add("--jobs", type=positive, default=1, help="jobs at once")
    add("--job_options", nargs="+", default=[], metavar="KEY=VALUE", help="submitit options, such as timeout_min=240")
    options, flags = parser.parse_known_args(arguments)
    options.flags, kind = flags, TABLES[options.table]
    options.shots = options.shots or kind.shots
    for name in ("obj", "seeds", "shots"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    own = (*OWN_FLAGS, *["--select"] * (options.table == "leave_one_out"))
    for flag in flags:
        if flag.split("=")[0] in own:
            raise InputError(f"{flag}: reproduce.py sets this flag of train.py itself; see its own with --help")
    if len(options.obj) < kind.data_sets:
        raise InputError(f"--table {options.table}: name two data sets or more with --obj")
    if options.compare and not kind.published:
        raise InputError(f"--compare: no published result belongs in --table {options.table}")
    return options
