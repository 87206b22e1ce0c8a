"""The benchmark by which the published program is compared, on the small model."""

from __future__ import annotations

import json

import pytest


def test_what_recomputes_everything_agrees(command, tmp_path):
    """The stand-in for the published program passes every image again in every epoch, and gets the same numbers."""
    small = [
        "--model",
        "ViT-tiny-14-56",
        "--fidelity",
        "corrected",
        "--epochs",
        1,
        "--recompute_epochs",
        1,
        "--test",
        4,
    ]
    done = command("benchmarks.train", *small, "--json", tmp_path / "t.json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert row["largest loss difference"] == pytest.approx(0, abs=1e-4)
    assert row["peak MiB"] > 100
    assert row["largest pAUC difference"] == pytest.approx(0, abs=1e-4)
