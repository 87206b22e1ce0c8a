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


def test_the_first_run_on_a_gpu_is_rehearsed(command, tmp_path):
    """Every part of benchmarks.gpu on the CPU; one that fails is told with its reason and stops no other."""
    done = command("benchmarks.gpu", "--device", "cpu", "--small", "--json", tmp_path / "g.json")
    assert done.returncode == 0, done.stdout[-3000:]
    rows = {row["part"]: row for row in json.loads((tmp_path / "g.json").read_text())["rows"]}
    assert {row["result"] for row in rows.values()} == {"passed"}
    assert rows["fp32"]["figures"]["tokens"] == 0  # the CPU against itself
    assert {"commands", "speed", "full card", "two processes"} < set(rows)
    failing = command("benchmarks.gpu", "--device", "cuda", "--small", "--parts", "fp32", "full card", "--json",
                      tmp_path / "f.json", env={"CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    assert failing.returncode == 1
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [(row["part"], row["result"]) for row in rows] == [("fp32", "failed"), ("full card", "failed")]
    assert all(row["reason"] for row in rows)
