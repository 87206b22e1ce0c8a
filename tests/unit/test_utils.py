"""Atomic files, command lines."""

from __future__ import annotations

import argparse
import json
import os
import stat
from pathlib import Path

import pytest

from engine.config import run_name
from utils import InputError, atomic_path, integer, run_cli, write_json


def test_a_finished_file_has_ordinary_permissions_and_leaves_nothing_beside_it(tmp_path):
    previous = os.umask(0o022)
    try:
        with atomic_path(tmp_path / "deep" / "x.txt") as path:
            path.write_text("new")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "deep/x.txt").stat().st_mode) == 0o644
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["x.txt"]


def test_a_failure_keeps_the_old_file(tmp_path):
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["x.txt"]


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": [1.5, None]}, "--out")
    assert json.loads(path.read_text()) == {"a": [1.5, None]}

    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match=r"--out .*x\.json: cannot be written: No space .*disk full\?.*intact"):
        write_json(path, {}, "--out")
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"a": [1.5, None]}
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["x.json"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to(os.devnull)
    for name in ("pipe", "null", ""):
        with pytest.raises(InputError, match="a folder, a device or a pipe"):
            write_json(tmp_path / name, {})
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "null").is_symlink()


def test_an_error_is_one_line(capsys):
    def main() -> None:
        raise InputError("a\nb.png:\n  is\tbad")

    with pytest.raises(SystemExit) as left:
        run_cli(main)
    assert (left.value.code, capsys.readouterr().err) == (2, "error: a b.png: is bad\n")


def test_integers_in_a_range():
    parse = integer(-2, 5)
    assert [parse(text) for text in ("-2", "5", " 3 ")] == [-2, 5, 3]
    for text in ("-3", "6"):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            parse(text)
    with pytest.raises(ValueError):
        parse("1.0")


@pytest.mark.parametrize("name", ["Brain-16shot", "two words", "\u00e9t\u00e9 1", "x" * 100, "a.b"])
def test_run_names(name):
    assert run_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", " ", "a/b", "a\\b", "..", "a..b", "-x", ".x", "a\nb", "\x1b[0m", "x" * 101, "\udcff", "\U0001f600" * 100],
)
def test_names_that_no_run_may_have(name):
    with pytest.raises(argparse.ArgumentTypeError):
        run_name(name)
