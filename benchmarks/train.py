"""A whole run by train.py: seconds of an epoch and of 60, and peak memory.

python -m benchmarks.train                   ViT-L-14-336, 1 shot, 24 test images; 60 epochs projected from 3
python -m benchmarks.train --epochs 60       all 60
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.common import print_table, write_json
from dataset import phantom
from utils import Parser, run_cli

EPOCHS = 60


def measure(flags: list[str], epochs: int) -> dict[str, object]:
    """Measure a row of the table; the median epoch counts, as the first one also allocates memory for later ones."""
    began = time.perf_counter()
    command = [sys.executable, "train.py", *flags, "--epoch", str(epochs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        output = process.stdout.read()
        _, code, usage = os.wait4(process.pid, 0)
    if code:
        raise SystemExit(f"failed: {' '.join(command)}")
    wall = time.perf_counter() - began
    epoch = median(float(text) for text in re.findall(r"^epoch .* ([\d.]+) s$", output, re.MULTILINE))
    whole = wall + max(EPOCHS - epochs, 0) * epoch  # includes start-up, the pass through the tower, and the result
    return {"epoch s": epoch, "60 epochs s": whole, "peak MiB": usage.ru_maxrss / 1024, "measured epochs": epochs}


def main() -> None:
    """Run the command line."""
    parser = Parser(prog="python -m benchmarks.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="ViT-L-14-336")
    parser.add_argument("--fidelity", nargs="+", default=["released", "corrected"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--test", type=int, default=24, help="test images")
    parser.add_argument("--json", default="benchmarks/results/train.json")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        phantom.write(Path(folder), ["Brain"], valid=2, test=options.test // 2, seed=0, size=240)
        for fidelity in options.fidelity:
            flags = ["--obj", "Brain", "--shot", "1", "--data_path", folder, "--run_dir", f"{folder}/runs",
                     "--model_name", options.model, "--pretrain", "random", "--fidelity", fidelity,
                     "--cache", "ram", "--no-save_model"]  # fmt: skip
            rows.append({"fidelity": fidelity, **measure(flags, options.epochs)})
            print_table(rows, list(rows[0]))
    write_json(options.json, rows)


if __name__ == "__main__":
    run_cli(main)
