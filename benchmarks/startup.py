"""How long a command takes before it does anything: --help, and a warm start to the first training step.

python -m benchmarks.startup                           --help of every command
python -m benchmarks.startup --warm                    also ViT-L-14-336 with all tokens in the store
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import print_table, write_json
from CLIP.clip import create_model
from dataset import phantom
from utils import Parser, run_cli

HELPS = (["train.py"], ["test.py"], ["predict.py"], ["reproduce.py"], ["-m", "dataset.check"])


def cpu_seconds(command: list[str]) -> float:
    """CPU seconds (user and system) of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def seconds_to_first_step(command: list[str]) -> float:
    """Wall seconds from the start of a training to its first step, at which it is ended."""
    script = (
        "import sys, time, runpy; from engine import training\n"
        "def first(*args):\n    print('FIRST STEP', time.time(), flush=True); sys.exit(0)\n"
        "training.TrainingState.step = first\n"
        f"sys.argv = {command!r}; runpy.run_path('train.py', run_name='__main__')"
    )
    start = time.time()
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    return float(output.rpartition("FIRST STEP")[2]) - start


def main() -> None:
    """Command line."""
    parser = Parser(prog="python -m benchmarks.startup", description=__doc__.split("\n\n")[0])
    parser.add_argument("--warm", action="store_true", help="also the warm start, which first fills a store")
    parser.add_argument("--model", default="ViT-L-14-336")
    parser.add_argument("--json", default="benchmarks/results/startup.json")
    options = parser.parse_args()
    rows: list[dict[str, object]] = [
        {"command": " ".join([*command, "--help"]), "CPU s": min(cpu_seconds([*command, "--help"]) for _ in range(3))}
        for command in HELPS
    ]
    if options.warm:
        with tempfile.TemporaryDirectory() as folder:
            phantom.write(Path(folder), ["Brain"], valid=2, test=12, seed=0, size=240)
            weights = Path(folder) / "weights.pt"
            torch.save(create_model(options.model, "random").state_dict(), weights)
            flags = ["train.py", "--obj", "Brain", "--shot", "1", "--data_path", folder, "--model_name", options.model,
                     "--weights", str(weights), "--cache", "disk", "--cache_dir", f"{folder}/cache", "--run_dir",
                     f"{folder}/runs", "--no-save_model"]  # fmt: skip
            for name, seed in (("cold store", "111"), ("warm store", "111"), ("warm store, another seed", "2")):
                row = {"command": f"first step, {name}", "wall s": seconds_to_first_step([*flags, "--seed", seed])}
                rows.append(row)
    print_table(rows, ["command", "CPU s", "wall s"])
    write_json(options.json, rows)


if __name__ == "__main__":
    run_cli(main)
