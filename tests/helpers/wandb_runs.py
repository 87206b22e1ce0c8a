"""What a W&B run on disk holds, as `wandb leet inspect` prints it: nothing here knows wandb's file format."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WANDB = Path(sys.executable).with_name("wandb")


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of the one offline run somewhere below `folder`, in their order."""
    (path,) = folder.rglob("offline-run-*/run-*.wandb")
    with tempfile.TemporaryDirectory() as home:
        environment = {"HOME": home, "PATH": os.environ["PATH"], "WANDB_ERROR_REPORTING": "false"}
        done = subprocess.run(
            [WANDB, "leet", "inspect", "--json", path], capture_output=True, text=True, timeout=120, check=True,
            env=environment,
        )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_type(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The records of one type: run, history, summary, metric, artifact, exit."""
    return [row[kind] for row in rows if row["type"] == kind]


def history(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A dictionary a step; names of nested values have dots."""
    return [row["item"] for row in of_type(rows, "history")]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The run's summary at its end."""
    result: dict[str, Any] = {}
    for row in of_type(rows, "summary"):
        result |= row.get("update", {})
    return result


def config(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the run was started with."""
    return of_type(rows, "run")[0]["config"]["update"]
