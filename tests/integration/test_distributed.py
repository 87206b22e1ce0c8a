"""Two gloo processes on the CPU against one: the same numbers to every digit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import device
from torch.distributed import TCPStore

from engine.distributed import pick_device
from tests.helpers.commands import HANG, ROOT, Commands
from tests.helpers.data import SMALL
from tests.integration.test_scripts import printed

ENVIRONMENT = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}


def torchrun(*words: object) -> list[str]:
    """A script by torchrun, in two processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [sys.executable, *launcher, *map(str, words)]


def two(command: Commands, script: str, *arguments: object) -> str:
    """What rank 0 prints of two processes, started as torchrun starts them but for its seconds of imports."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent has one
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
              "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
    ranks = [command.start(script, *arguments, env={**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    first, second = [rank.wait() for rank in ranks]
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert second.stdout == ""  # one process prints
    return first.stdout


CASES = {
    # 32 views in batches of 31: a second step with a single view.
    "ram": ["--obj", "Brain", "--cache", "ram", "--batch_size", 31],
    "disk": ["--obj", "Brain", "--cache", "disk", "--batch_size", 3, "--visionA", "MViTFC"],
    "corrected ram": ["--obj", "Brain", "--cache", "ram", "--fidelity", "corrected", "--batch_size", 3],
    "corrected disk": ["--obj", "Brain", "--cache", "disk", "--fidelity", "corrected", "--select", "valid"],
    "off": ["--obj", "Chest", "--cache", "off", "--batch_size", 5, "--text_mood", "fix", "--loss_type", "softmax"],
}


@pytest.mark.equality
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(command, phantoms, tmp_path, case):
    """Losses, metrics, thresholds, the selected epoch and every image's score, in training and of the checkpoint."""
    runs, tested = [], []
    for name in ("one", "two"):
        start = two if name == "two" else printed
        paths = ["--data_path", phantoms, "--save_path", tmp_path / name, "--cache_dir", tmp_path / name / "store"]
        run = ["--run_dir", tmp_path / "runs", "--exp_name", name, "--shot", 1, "--epoch", 2]
        output = start(command, "train.py", *SMALL, *CASES[case], *paths, *run)
        assert output.count("epoch 1/2") == 1
        result = json.loads((tmp_path / "runs" / name / "result.json").read_text())
        runs.append(((tmp_path / "runs" / name / "metrics.jsonl").read_bytes(), {**result, "seconds": 0, "run": ""}))
        # The other one's checkpoint: a difference in training could else hide one of the pass and the scoring.
        ckpt = tmp_path / "one" / f"{result['obj']}.pth"
        other = ["--ckpt", ckpt, "--cache_dir", tmp_path / name / "store of the test", "--batch_size", 3]
        out = tmp_path / f"{name}.json"
        start(command, "test.py", *CASES[case][:4], *paths, *other, "--device", "cpu", "--out_json", out)
        tested.append(json.loads(out.read_text()))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] == runs[1][1]
    assert tested[0] == tested[1]
    assert len(tested[0]["per_image"]) == 14


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
def test_a_process_that_dies(command, phantoms, tmp_path):
    """By torchrun itself: the others end in one line, and the run goes on with another number of processes."""
    paths = ["--data_path", phantoms, "--save_path", tmp_path / "ckpt", "--run_dir", tmp_path / "runs"]
    arguments = [*SMALL, *paths, "--obj", "Brain", "--shot", 1, "--epoch", 10**6, "--exp_name", "one"]
    process = subprocess.Popen(
        torchrun("train.py", *arguments), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    metrics = tmp_path / "runs/one/metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    os.kill(rank_one(tmp_path), signal.SIGKILL)
    error = process.communicate(timeout=HANG)[1].decode()
    assert process.returncode != 0
    assert "rank 0: another process of this run died" in error or "stopped after epoch" in error
    assert "--resume" in error

    before = metrics.read_text()
    lines = before.count("\n")
    printed(command, "train.py", "--resume", tmp_path / "runs/one", "--epoch", lines + 2, cwd=tmp_path)
    assert metrics.read_text().startswith(before)
    assert metrics.read_text().count("\n") == lines + 2


def test_processes_may_share_a_gpu(monkeypatch):
    """A GPU each, where there are as many; else they share them."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for count, index in ((2, 1), (1, 0)):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        assert pick_device("auto") == device("cuda", index)
