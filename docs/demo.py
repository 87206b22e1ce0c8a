"""The last step of `make demo`: logistic regression on the same tokens, and what the demo has shown, in five lines.

python -m docs.demo FOLDER FLAGS_OF_TRAIN      FOLDER/test.json is what test.py has written
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.baselines import NAMES, measure_baselines
from engine.files.config import train_options
from utils import read_json, run_cli


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the baseline and print the summary."""
    folder, *flags = sys.argv[1:] if arguments is None else arguments
    ours, options = read_json(Path(folder) / "test.json", "`make demo` writes it"), train_options(flags)
    regression = measure_baselines(options, NAMES[3:])["baselines"][NAMES[3]]
    normal, abnormal = ours["n_normal"], ours["n_abnormal"]
    print(f"""
MadCLIP ({options.shot} shots of each class, {normal} + {abnormal} test images): {_line(ours)}
logistic regression on the same tokens: {_line(regression)}
pictures: {folder}/pictures, {folder}/predictions (heat maps of some test images)
page: {folder}/report/index.html
What this is not: no CLIP, no aligned text (a random text tower), only {normal + abnormal} images, no diagnosis""")


def _line(values: Mapping[str, Any]) -> str:
    def percent(name: str) -> str:
        low, high = values[f"{name}_ci95"]
        return f"{values[name]:.1%} [{low:.1%}, {high:.1%}]"

    return f"image AUC {percent('auc')}, pixel AUC {percent('pauc')}"


if __name__ == "__main__":
    run_cli(main)
