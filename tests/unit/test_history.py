"""A run's metrics.jsonl: what is read, what is refused, and where it is looked for."""

from __future__ import annotations

import json

import pytest

from engine.report.history import find_history, read_history
from utils import InputError

ROWS = [
    {"epoch": 1, "det": 5.0, "seg": 4.0, "total": 9.0, "similarity": 0.9, "auc": 0.5, "pauc": None, "best": True},
    {"epoch": 2, "det": 4, "seg": 3.0, "total": 7.0, "similarity": -1, "auc": 0.8, "pauc": 0.7, "best": True},
]
METADATA = {"metrics": {"epoch": 2, "auc": 0.8}, "run": "a-run"}


def write(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def test_rows_are_read(tmp_path):
    write(tmp_path / "metrics.jsonl")
    rows = read_history(tmp_path / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[0]["pauc"] is None
    assert (rows[1]["det"], rows[1]["similarity"], rows[1]["valid_auc"]) == (4.0, -1.0, None)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("not json\n", 1),
        ("[1]\n", 1),
        ('{"epoch": 1}\n{"auc": 1}\n', 2),
        ('{"epoch": 1, "auc": Infinity}\n', 1),
        ('{"epoch": 1, "auc": NaN}\n', 1),
        ('{"epoch": 1, "det": 1e308}\n', 1),
        ('{"epoch": 1, "det": -1e40}\n', 1),
        (f'{{"epoch": 1, "det": {"9" * 400}}}\n', 1),
        (f'{{"epoch": {"9" * 5000}}}\n', 1),
        ('{"epoch": 1.5}\n', 1),
        ('{"epoch": true}\n', 1),
        ('{"epoch": 0}\n', 1),
        ('{"epoch": "1"}\n', 1),
        ('{"epoch": 1, "auc": "high"}\n', 1),
        ('{"epoch": 1}\n' + '{"a": ' * 100_000, 2),
        ('{"epoch": 1, "det": ' + "[" * 100_000 + "\n", 1),
    ],
)
def test_a_line_that_is_no_epoch_is_named(tmp_path, text, line):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match=rf"^--history .*metrics\.jsonl, line {line}: [^\n]{{1,200}}$"):
        read_history(tmp_path / "metrics.jsonl")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_history(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        read_history(tmp_path)


def test_the_run_is_found_beside_the_checkpoint_and_by_its_name(tmp_path):
    ckpt, runs = tmp_path / "ckpt" / "Brain.pth", tmp_path / "runs"
    assert find_history(ckpt, METADATA, runs) == []
    write(runs / "a-run" / "metrics.jsonl")
    assert [row["epoch"] for row in find_history(ckpt, METADATA, runs)] == [1, 2]
    assert find_history(ckpt, {**METADATA, "run": "other"}, runs) == []
    write(ckpt.parent / "metrics.jsonl")
    assert [row["epoch"] for row in find_history(ckpt, {"metrics": METADATA["metrics"]}, runs)] == [1, 2]


def test_another_run_and_a_damaged_one_are_not_taken(tmp_path):
    write(tmp_path / "metrics.jsonl")
    ckpt = tmp_path / "Brain.pth"
    assert find_history(ckpt, {"metrics": {"epoch": 2, "auc": 0.81}}, tmp_path) == []
    assert find_history(ckpt, {"metrics": {"epoch": "x"}}, tmp_path) == []
    assert find_history(ckpt, {}, tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1')
    assert find_history(ckpt, METADATA, tmp_path) == []


@pytest.mark.parametrize("run", ["../outside", "/etc", "a/b", "", None, 5, ["x"], "a\0b"])
def test_a_run_that_is_no_plain_name_leads_nowhere(tmp_path, run):
    write(tmp_path / "outside" / "metrics.jsonl")
    assert find_history(tmp_path / "none" / "x.pth", {**METADATA, "run": run}, tmp_path / "runs") == []
