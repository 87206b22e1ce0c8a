"""Atomic files, hashes, messages, exit codes, reading of files, and threads."""

import argparse
import hashlib
import json
import os
import stat
import sys
from pathlib import Path

import pytest

import utils
from engine.files.config import run_name
from utils import (
    InputError,
    atomic_path,
    csv_cell,
    integer,
    one_line,
    prefetch,
    printable,
    probe_writable,
    read_text,
    run_cli,
    sha256_file,
)


def test_atomic_file_has_default_permissions_and_leaves_no_temporary_file(tmp_path):
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


def test_integers_in_a_range():
    parse = integer(-2, 5)
    assert [parse(text) for text in ("-2", "5", " 3 ")] == [-2, 5, 3]
    for text in ("-3", "6"):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            parse(text)
    with pytest.raises(ValueError):
        parse("1.0")


def test_run_names():
    for name in ("Brain-16shot", "two words", "\u00e9t\u00e9 1", "a.b"):
        assert run_name(name) == name
    for name in ("", "a/b", "..", "-x", ".x", "a\nb", "x" * 101):
        with pytest.raises(argparse.ArgumentTypeError):
            run_name(name)


def test_a_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    path, read, opened = tmp_path / "x", [], Path.open

    def note(self: Path, *arguments: object, **options: object):
        read.extend([self.name] * (arguments == ("rb",)))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", note)
    path.write_bytes(b"abc")
    assert sha256_file(path) == sha256_file(str(path)) == hashlib.sha256(b"abc").hexdigest()
    assert read == ["x"]
    path.write_bytes(b"xyz")
    os.utime(path, (0, 0))
    assert sha256_file(path) == hashlib.sha256(b"xyz").hexdigest()
    assert read == ["x", "x"]


# Messages.


def test_control_characters_and_formulas_are_escaped():
    texts = ("=1", "+1", "-1", "@x", "\t=1", "a=1", -1)
    assert list(map(csv_cell, texts)) == ["'=1", "'+1", "'-1", "'@x", "'\t=1", "a=1", -1]
    assert printable("é x.png") == "é x.png"
    assert printable("a\x1b[2Jb\n\r\u202e\udcff") == "a\\x1b[2Jb\\n\\r\\u202e\\udcff"


def test_one_line_names_the_error_type_and_hides_secrets():
    error = OSError("cannot reach\x1b[2J https://me:wo/r@d@host/x\n with KEY")
    assert one_line(error, "KEY") == "OSError: cannot reach [2J https://***@host/x with ***"
    assert one_line(MemoryError()) == "MemoryError"
    assert one_line("as it is") == "as it is"
    assert len(one_line("a" * 5000)) == 200


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("x"), 2, "error: x\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (InputError("a\nb.png:\n  is\tbad"), 2, "error: a b.png: is bad\n"),
        (PermissionError(13, "Permission denied", "x.png"), 2, "error: x.png: Permission denied\n"),
        (
            RuntimeError("DefaultCPUAllocator: can't"),
            2,
            "error: out of memory (RuntimeError: DefaultCPUAllocator: "
            "can't); try a smaller --batch_size, or --cache disk for tokens\n",
        ),
    ],
)
def test_exit_codes(capsys, error, code, line):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        run_cli(main)
    assert (left.value.code, capsys.readouterr().err) == (code, line)


# Reading of files.


def test_probe_writable_changes_nothing(tmp_path):
    probe_writable(None, "--out")
    probe_writable(tmp_path / "deep/x.json", "--out")
    assert list((tmp_path / "deep").iterdir()) == []
    path = tmp_path / "x.json"
    path.write_text("{}")
    probe_writable(path, "--out", "JSON", lambda path: json.loads(path.read_text()))
    assert path.read_text() == "{}"
    path.write_text("a poem")
    with pytest.raises(InputError, match=r"--out .*x\.json: a file that is no JSON is there; give another name"):
        probe_writable(path, "--out", "JSON", lambda path: json.loads(path.read_text()))
    assert path.read_text() == "a poem"


def test_read_text_drops_the_bom_and_reads_only_files(tmp_path):
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbfa\n")
    assert read_text(tmp_path / "x") == "a\n"
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ""):
        with pytest.raises(OSError, match="not a file"):
            read_text(tmp_path / name)


# Threads.


@pytest.mark.parametrize("workers", [1, 3])
def test_prefetch_keeps_the_order_and_limits_work_ahead(workers):
    asked = []

    def inputs():
        for number in range(20):
            asked.append(number)
            yield number

    results = prefetch(lambda number: number * number, inputs(), workers, ahead=2)
    assert next(results) == 0
    assert len(asked) <= max(workers, 2) + 1
    assert list(results) == [number * number for number in range(1, 20)]


def test_prefetch_raises_an_error_in_its_place():
    def refuse(number: int) -> int:
        if number == 2:
            raise InputError("the third")
        return number

    results = prefetch(refuse, range(5), workers=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(InputError, match="the third"):
        next(results)


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_debug_shows_the_traceback_of_a_refusal(capsys, monkeypatch, by):
    def main() -> None:
        assert "--debug" not in sys.argv
        raise InputError("x")

    monkeypatch.setattr(sys, "argv", ["train.py"] + ["--debug"] * (by == "flag"))
    monkeypatch.setenv("MADCLIP_DEBUG", "1" if by == "variable" else "")
    with pytest.raises(SystemExit):
        run_cli(main)
    lines = capsys.readouterr().err
    assert lines.startswith("Traceback") and lines.endswith("error: x\n")


def test_debug_shows_no_traceback_for_a_bad_flag(capsys, monkeypatch):
    """A bad flag prints one line even with MADCLIP_DEBUG, as there is no underlying exception."""
    monkeypatch.setenv("MADCLIP_DEBUG", "1")
    with pytest.raises(SystemExit):
        utils.Parser(prog="x").parse_args(["--nonsense"])
    assert capsys.readouterr().err == "error: unrecognized arguments: --nonsense\n"


def test_blame_turns_expected_errors_into_one_line_and_no_others(tmp_path):
    with pytest.raises(InputError, match=r"x\.json: No such file or directory; give another"):
        utils.read_json(tmp_path / "x.json", "give another")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match=r"x\.json: "):
        utils.read_json(tmp_path / "x.json")
    with pytest.raises(InputError, match=r"^inner$"), utils.blame("outer"):
        raise InputError("inner")
    with pytest.raises(TypeError), utils.blame("a fault of the program"):
        raise TypeError
