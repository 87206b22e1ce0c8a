"""The epochs of a run, from its metrics.jsonl."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils import InputError, checked, read_text

from ..files.config import run_name

FILE = "metrics.jsonl"
MAX_VALUE = 1e30  # of a loss or an epoch: nothing that could be drawn is larger


@dataclass(frozen=True)
class Row:
    """What is drawn of a line of metrics.jsonl; None where an epoch was not evaluated."""

    epoch: int  # counted from 1
    det: float | None = None
    seg: float | None = None
    total: float | None = None
    similarity: float | None = None
    auc: float | None = None
    pauc: float | None = None
    valid_auc: float | None = None
    valid_pauc: float | None = None


def read_history(path: str | Path, flag: str = "--history") -> list[dict[str, Any]]:
    """The epochs of a run: one JSON object a line, with the entries of `Row`; others are ignored.

    Raises:
        InputError: naming the file and the line, for a file that cannot be read, or a line that is no such object.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag} {path}: cannot be read ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        where = f"{flag} {path}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not the JSON of an epoch; is it a run's {FILE}?") from error
        row = asdict(checked(Row, values, where))
        large = [name for name, value in row.items() if value is not None and not abs(value) <= MAX_VALUE]  # NaN too
        if large or row["epoch"] < 1:
            raise InputError(f"{where}: {large[0] if large else 'epoch'} is out of range")
        rows.append(row)
    return rows


def find_history(
    ckpt_path: str | Path, metadata: Mapping[str, Any], run_dir: str | Path = "runs"
) -> list[dict[str, Any]]:
    """The epochs of the run that wrote a checkpoint; none where they are not there any more.

    They are looked for beside the checkpoint, and in `run_dir` under the run's name, and must hold the checkpoint's
    epoch with its AUC.

    Args:
        ckpt_path: the checkpoint.
        metadata: of the checkpoint: `run`, the run's name, and `metrics`, with `epoch` and `auc`.
        run_dir: the folder of the runs.
    """
    metrics = metadata.get("metrics")
    if not isinstance(metrics, dict) or not isinstance(metrics.get("epoch"), int):
        return []
    folders = [Path(ckpt_path).parent]
    with contextlib.suppress(argparse.ArgumentTypeError, TypeError, AttributeError):  # not a plain name
        folders.append(Path(run_dir) / run_name(metadata.get("run", "")))
    for folder in folders:
        with contextlib.suppress(InputError):
            history = read_history(folder / FILE)
            if any((row["epoch"], row["auc"]) == (metrics["epoch"], metrics.get("auc")) for row in history):
                return history
    return []
