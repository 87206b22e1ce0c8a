"""How long a command takes before it does anything: `--help` of every command.

python -m benchmarks.startup
"""

import resource
import subprocess
import sys

from benchmarks.common import print_table, write_json
from utils import Parser, run_cli

HELPS = (["train.py"], ["test.py"], ["predict.py"], ["reproduce.py"], ["-m", "dataset.check"])


def cpu_seconds(command: list[str]) -> float:
    """CPU seconds (user and system) of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Run the command line."""
    parser = Parser(prog="python -m benchmarks.startup", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", default="benchmarks/results/startup.json")
    options = parser.parse_args()
    rows = [
        {"command": " ".join([*command, "--help"]), "CPU s": min(cpu_seconds([*command, "--help"]) for _ in range(3))}
        for command in HELPS
    ]
    print_table(rows, ["command", "CPU s"])
    write_json(options.json, rows)


if __name__ == "__main__":
    run_cli(main)
