"""Run folders: a run that is killed, stopped or out of disk goes on as if nothing had happened."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from dataset import phantom
from tests.helpers.commands import Commands

SMALL = ["--model_name", "ViT-tiny-14-56", "--pretrain", "random", "--img_size", 42, "--device", "cpu"]
EPOCHS = 8
KILLS = 20


@pytest.fixture(scope="module")
def data_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    phantom.write(path, ["Brain"], valid=4, test=12, seed=0, size=64)
    return path


def flags(folder: Path, data_path: Path, *more: object) -> list[object]:
    """A run called `one`; the store on disk, so that a killed pass over the images goes on as well."""
    paths = ["--data_path", data_path, "--save_path", folder / "ckpt", "--run_dir", folder / "runs"]
    store = ["--cache", "disk", "--cache_dir", folder / "store"]
    train = ["--obj", "Brain", "--shot", 2, "--epoch", EPOCHS, "--exp_name", "one"]
    return [*train, *SMALL, *paths, *store, *more]


@pytest.fixture(scope="module")
def undisturbed(command, data_path, tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert command("train.py", *flags(folder, data_path)).returncode == 0
    return folder / "runs" / "one"


def same(run: Path, other: Path) -> None:
    """Bit for bit the same metrics, parameters, optimizers, random states, best epoch and result."""
    assert (run / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    first, second = (torch.load(path / "last.pth", weights_only=True) for path in (run, other))
    first["state"].pop("seconds"), second["state"].pop("seconds")
    assert flat(first).keys() == flat(second).keys()
    assert all(torch.equal(value, flat(second)[name]) for name, value in flat(first).items())
    best, other_best = (torch.load(path / "best.pth", weights_only=True) for path in (run, other))
    assert all(torch.equal(value, flat(other_best)[name]) for name, value in flat(best).items() if "about" not in name)
    results = [json.loads((path / "result.json").read_text()) for path in (run, other)]
    for result in results:
        del result["seconds"], result["run"]
    assert results[0] == results[1]


def flat(value: object, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor and number in nested dicts and lists, as tensors by path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for k, v in pairs for key, leaf in flat(v, f"{name}/{k}").items()}
    return {name: torch.tensor(value, dtype=torch.float64)} if isinstance(value, int | float) else {}


def go_on(command: Commands, run: Path, start: list[object], **how: object) -> subprocess.CompletedProcess[str]:
    """Resume where there is something to resume, else start."""
    arguments = ["--resume", run] if (run / "config.json").is_file() else start
    return command("train.py", *arguments, **how)


@pytest.fixture(scope="module")
def duration(command, data_path, tmp_path_factory) -> float:
    """Seconds that a whole run takes here and now."""
    started = time.monotonic()
    command("train.py", *flags(tmp_path_factory.mktemp("timed"), data_path))
    return time.monotonic() - started


def test_killed_at_random_moments(command, data_path, tmp_path, undisturbed, duration):
    run, moments = tmp_path / "runs" / "one", random.Random(5)
    found, kills = set(), 0
    while kills < KILLS:
        stop = (duration * moments.uniform(0.1, 0.9), signal.SIGKILL)
        result = go_on(command, run, flags(tmp_path, data_path), stop=stop)
        assert result.returncode in (0, -signal.SIGKILL), result.stderr
        if result.returncode == 0:  # done before the kill: once more from the start
            same(run, undisturbed)
            shutil.rmtree(run)
            continue
        kills += 1
        lines = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").is_file() else ""
        assert (undisturbed / "metrics.jsonl").read_text().startswith(lines)
        found.add(lines.count("\n"))
    assert len(found) > 2, "the kills should meet the run at different epochs"
    assert go_on(command, run, flags(tmp_path, data_path)).returncode == 0
    same(run, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(command, data_path, tmp_path, undisturbed, duration, number):
    run, stopped, seconds = tmp_path / "runs" / "one", 0, duration / 2
    while not stopped:
        result = command("train.py", *flags(tmp_path, data_path), stop=(seconds, number))
        stopped = result.returncode
        if stopped == -number:  # before train.py looks for signals
            stopped, seconds = 0, seconds * 1.2
        elif not stopped:
            run.rename(tmp_path / "runs" / f"done{seconds}")
            seconds /= 1.5
    assert stopped == 130
    assert "Traceback" not in result.stderr
    if run.is_dir():
        done = (run / "metrics.jsonl").read_text().count("\n")
        assert f"stopped after epoch {done} of {EPOCHS}" in result.stderr
        assert f"python train.py --resume {run}" in result.stderr
    assert go_on(command, run, flags(tmp_path, data_path)).returncode == 0
    same(run, undisturbed)


def test_a_disk_that_fills_up(command, data_path, tmp_path, undisturbed):
    start = flags(tmp_path, data_path)
    run = tmp_path / "runs" / "one"
    result = command("train.py", *start, "--cache", "ram", file_bytes=1_000_000)  # last.pth needs more
    assert result.returncode == 2
    assert result.stderr.count("error: ") == 1
    assert "last.pth" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(run.glob(".*"))  # no half-written file

    assert command("train.py", "--resume", run, "--epoch", 3).returncode == 0
    before = (run / "last.pth").read_bytes()
    assert command("train.py", "--resume", run, "--epoch", EPOCHS, file_bytes=1_000_000).returncode == 2
    assert (run / "last.pth").read_bytes() == before
    assert command("train.py", "--resume", run, "--epoch", EPOCHS).returncode == 0
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


def test_half_of_an_epochs_files(command, data_path, tmp_path, undisturbed):
    """Killed right after last.pth was written: metrics.jsonl lacks a line and best.pth is of an earlier epoch."""
    start = flags(tmp_path, data_path)
    assert command("train.py", *start).returncode == 0
    run = tmp_path / "runs" / "one"
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    (run / "result.json").unlink()
    if json.loads(lines[-1])["best"]:
        (run / "best.pth").unlink()
    assert command("train.py", "--resume", run).returncode == 0
    same(run, undisturbed)


def test_the_folder_of_a_run(undisturbed):
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["options"]["shot"] == 2
    assert config["settings"]["weights_sha256"]
    assert len(config["shots"]["normal"]) == 2
    assert {"torch", "python", "git_commit", "host", "device", "command"} <= config.keys()
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, EPOCHS + 1))
    assert all(0 <= line["auc"] <= 1 and 0 <= line["pauc"] <= 1 for line in lines)
    result = json.loads((undisturbed / "result.json").read_text())
    best = max(lines, key=lambda line: line["auc"] + line["pauc"])
    assert (result["selected_epoch"], result["auc"]) == (best["epoch"], best["auc"])
    assert result["pauc"] == pytest.approx(best["pauc"], abs=1e-12)
    assert result["last"]["auc"] == lines[-1]["auc"]


def test_names_of_runs(command, data_path, tmp_path):
    start = flags(tmp_path, data_path, "--epoch", 1)
    first, second = command("train.py", *start), command("train.py", *start)
    assert (first.returncode, second.returncode) == (0, 0)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["one", "one-2"]
    assert "is there already, so this run is" in second.stderr


def test_what_cannot_be_resumed(command, data_path, tmp_path, undisturbed):
    def refused(*arguments: object) -> str:
        result = command("train.py", *arguments)
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr
        (line,) = [line for line in result.stderr.splitlines() if "error: " in line]
        return line

    assert "no config.json" in refused("--resume", tmp_path)
    assert "--learning_rate 0.5 contradicts" in refused("--resume", undisturbed, "--learning_rate", 0.5)
    assert "--shot 1 contradicts" in refused("--resume", undisturbed, "--shot", 1)
    config = (undisturbed / "config.json").read_bytes()
    assert f"has finished {EPOCHS} already" in refused("--resume", undisturbed, "--epoch", 2)
    assert (undisturbed / "config.json").read_bytes() == config  # else a plain --resume would be refused from here on
    assert "no config.json" in refused("--resume", "")
    assert command("train.py", *flags(tmp_path, data_path, "--epoch", 1)).returncode == 0
    run = tmp_path / "runs" / "one"
    (run / "last.pth").write_bytes((run / "last.pth").read_bytes()[:-5000])
    assert "last.pth" in refused("--resume", run, "--epoch", 2)
    (run / "config.json").write_text("{")
    assert "config.json is damaged" in refused("--resume", run)
