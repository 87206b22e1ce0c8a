"""Two gloo processes on the CPU, started by torchrun, against one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dataset import phantom

ROOT = Path(__file__).parents[2]
SMALL = ["--model_name", "ViT-tiny-14-56", "--pretrain", "random", "--img_size", "42", "--device", "cpu"]
ENVIRONMENT = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}


def command(processes: int, *words: object) -> list[str]:
    """A script by torchrun, or by Python alone."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else []), *map(str, words)]


def run(processes: int, *words: object) -> str:
    """Start a script; its stdout."""
    call = command(processes, *words)
    done = subprocess.run(call, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def data_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    # 20 test images: two batches of 16 or so, and an odd number of them for two processes below.
    phantom.write(path, ["Brain", "Chest"], valid=4, test=10, seed=0, size=64)
    return path


def train(processes: int, folder: Path, data_path: Path, *more: object) -> tuple[list[dict], dict]:
    """metrics.jsonl and result.json of a run."""
    paths = ["--data_path", data_path, "--save_path", folder / "ckpt", "--run_dir", folder / "runs"]
    arguments = ["--exp_name", processes, "--shot", 1, "--epoch", 2, *more]
    output = run(processes, "train.py", *SMALL, *paths, *arguments)
    assert output.count("epoch 1/2") == 1  # one process prints
    path = folder / "runs" / str(processes)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return lines, json.loads((path / "result.json").read_text())


@pytest.mark.parametrize(
    "flags",
    [
        # 32 views in batches of 31: in the second step one process has nothing to do.
        ["--obj", "Brain", "--batch_size", 31],
        ["--obj", "Chest", "--batch_size", 3, "--text_mood", "fix", "--loss_type", "softmax"],
        ["--obj", "Brain", "--visionA", "MViTFC", "--cache", "disk", "--batch_size", 3],  # its batches are not split
    ],
)
def test_two_processes_are_one(data_path, tmp_path, flags):
    one, result = train(1, tmp_path, data_path, *flags, "--cache_dir", tmp_path / "one")
    two, other = train(2, tmp_path, data_path, *flags, "--cache_dir", tmp_path / "two")
    for line, same in zip(one, two, strict=True):
        assert [same[name] for name in ("det", "seg", "total")] == pytest.approx(
            [line[name] for name in ("det", "seg", "total")], rel=1e-5
        )
        assert (same["auc"], same["best"]) == (line["auc"], line["best"])
        assert (same["pauc"] or 0) == pytest.approx(line["pauc"] or 0, abs=1e-4)
    assert other["selected_epoch"] == result["selected_epoch"]

    # The pass and the evaluation of one checkpoint: the same bits.
    found = []
    for processes in (1, 2):
        path = tmp_path / f"{processes}.json"
        store = ["--cache", "disk", "--cache_dir", tmp_path / f"store{processes}", "--batch_size", 3]
        arguments = ["--data_path", data_path, "--save_path", tmp_path / "ckpt", *flags[:2], "--out_json", path]
        run(processes, "test.py", *arguments, *store, "--device", "cpu")
        found.append(json.loads(path.read_text()))
    assert found[0] == found[1]
    assert len(found[0]["per_image"]) == 20


def rank_one(folder: Path) -> int:
    """The process number of rank 1 of the run in `folder`."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in words and b"\0RANK=1\0" in variables:
            return int(entry.name)
    raise AssertionError("no process of rank 1")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the process in /proc")
def test_a_process_that_dies(data_path, tmp_path):
    paths = ["--data_path", data_path, "--save_path", tmp_path / "ckpt", "--run_dir", tmp_path / "runs"]
    arguments = [*SMALL, *paths, "--obj", "Brain", "--shot", 1, "--epoch", 200, "--exp_name", "one"]
    call = command(2, "train.py", *arguments)
    process = subprocess.Popen(call, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "runs/one/metrics.jsonl"
    started = time.monotonic()
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() - started < 100
        time.sleep(0.05)
    os.kill(rank_one(tmp_path), signal.SIGKILL)
    error = process.communicate(timeout=100)[1].decode()
    assert process.returncode != 0
    assert "rank 0: another process of this run died" in error or "stopped after epoch" in error
    assert "--resume" in error

    done = metrics.read_text()
    lines = done.count("\n")
    assert lines < 200
    run(1, "train.py", "--resume", tmp_path / "runs/one", "--epoch", lines + 2)  # with another number of processes
    assert metrics.read_text().startswith(done)
    assert metrics.read_text().count("\n") == lines + 2
