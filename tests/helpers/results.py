"""What a command has left: its exit code and one line, or its output; the files that it wrote."""

import csv
import json
import subprocess
from pathlib import Path
from typing import Any


def refused(result: subprocess.CompletedProcess[str], *words: str) -> str:
    """The one line of a refusal, which holds `words`: exit code 2, no traceback."""
    assert result.returncode == 2, (result.returncode, result.stdout[-500:], result.stderr[-2000:])
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def fine(result: subprocess.CompletedProcess[str]) -> str:
    """The stdout of a command that must have succeeded."""
    assert result.returncode == 0, (result.returncode, result.stderr[-3000:])
    assert "Traceback" not in result.stderr
    return result.stdout


def rows(path: Path) -> list[dict[str, str]]:
    """A table; of a folder, that of its predictions."""
    with (path / "predictions.csv" if path.is_dir() else path).open(newline="") as file:
        return list(csv.DictReader(file))


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())
