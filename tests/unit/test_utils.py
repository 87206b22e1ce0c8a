"""Atomic files."""

from __future__ import annotations

import os
import stat

import pytest

from utils import atomic_path


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
