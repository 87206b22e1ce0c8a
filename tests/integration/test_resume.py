"""Run folders: a run that is killed, stopped or out of disk goes on as if nothing had happened."""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import HALT, Call, Change, Commands
from tests.helpers.data import SMALL
from tests.integration.test_scripts import refusal

EPOCHS = 8
EVAL_EVERY = 3  # so of this seed the sixth epoch is the best, by far, and best.pth the only copy of it at the end
KILLS = 20
KILLS_OF_THE_PASS = 4
# What an epoch of this run does: 2 x 2 shots in 16 views, in batches of 16.
STEP, STEPS = "engine.training.TrainingState.step", 4


def flags(folder: Path, phantoms: Path, *more: object) -> list[object]:
    """A run called `one`; the store on disk, so that a killed pass over the images goes on as well."""
    paths = ["--data_path", phantoms, "--save_path", folder / "ckpt", "--run_dir", folder / "runs"]
    store = ["--cache", "disk", "--cache_dir", folder / "store"]
    run = [
        "--obj",
        "Brain",
        "--shot",
        2,
        "--epoch",
        EPOCHS,
        "--eval_every",
        EVAL_EVERY,
        "--exp_name",
        "one",
        "--seed",
        5,
    ]
    return [*run, *SMALL, *paths, *store, *more]


@pytest.fixture(scope="module")
def undisturbed(command, phantoms, once) -> Path:
    """The folder of a run that nothing happened to."""

    def make(folder: Path) -> None:
        assert train(command, folder, *flags(folder, phantoms)).returncode == 0

    return once("undisturbed", make) / "runs" / "one"


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


def train(command: Commands, folder: Path, *arguments: object, **how: object) -> subprocess.CompletedProcess[str]:
    """train.py started in `folder`: a run that is gone on with may write below it."""
    return command("train.py", *arguments, cwd=folder, **how)


def go_on(command: Commands, folder: Path, phantoms: Path, **how: object) -> subprocess.CompletedProcess[str]:
    """Resume the run `one` where there is something to resume, else start it."""
    run = folder / "runs" / "one"
    arguments = ["--resume", run] if (run / "config.json").is_file() else flags(folder, phantoms)
    return train(command, folder, *arguments, **how)


def epochs(run: Path) -> int:
    """How many epochs metrics.jsonl has."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


@pytest.mark.equality
def test_twenty_kills(command, phantoms, tmp_path, undisturbed):
    """Before a random change of the store, then before a random change of the run's files or a random step."""
    run, draw = tmp_path / "runs" / "one", random.Random(5)
    seen, kills = set(), 0
    while kills < KILLS:
        store = Change(str(tmp_path / "store"), draw.randint(1, 300))
        files, step = Change(str(tmp_path / "runs"), draw.randint(1, 30)), Call(STEP, draw.randint(1, 5 * STEPS))
        event = store if kills < KILLS_OF_THE_PASS else draw.choice([files, step])
        result = go_on(command, tmp_path, phantoms, on=(event, signal.SIGKILL))
        if result.returncode == 0:  # the end came before the event: once more from the start
            same(run, undisturbed)
            shutil.rmtree(run)
            continue
        assert result.returncode == -signal.SIGKILL, result.stderr
        kills += 1
        lines = (run / "metrics.jsonl").read_text() if epochs(run) else ""
        assert (undisturbed / "metrics.jsonl").read_text().startswith(lines)
        seen.add(epochs(run))
    assert len(seen) > 4, "the kills should meet the run at different epochs"
    assert go_on(command, tmp_path, phantoms).returncode == 0
    same(run, undisturbed)


MOMENTS = {
    "in the pass": (Call("engine.features.TokenStore._keep", 2), 0),
    "in a step": (Call(STEP, 2 * STEPS + 2), 2),
    "in an evaluation": (Call("train.evaluate", 2), 5),
    "while files are written": (Call("engine.files.run.RunFolder.save", 3), 3),  # it waits for the epoch's last file
    "at the end": (Call("train.calibrate_run"), EPOCHS),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", MOMENTS)
def test_stopped_by_a_signal(command, phantoms, tmp_path, undisturbed, number, when):
    event, done = MOMENTS[when]
    run = tmp_path / "runs" / "one"
    result = command("train.py", *flags(tmp_path, phantoms), on=(event, number))
    assert result.returncode == 130
    assert "Traceback" not in result.stderr
    assert epochs(run) == done
    assert f"stopped after epoch {done} of {EPOCHS}" in result.stderr
    assert f"python train.py --resume {run}" in result.stderr
    if number == signal.SIGINT:
        assert go_on(command, tmp_path, phantoms).returncode == 0
        same(run, undisturbed)


def test_a_run_has_one_writer(command, phantoms, tmp_path, undisturbed):
    """While it lives, --resume is refused and changes nothing; the lock of a dead process is taken over."""
    run, third_epoch = tmp_path / "runs" / "one", Call("engine.files.run.RunFolder.save", 3)
    running = command.start("train.py", *flags(tmp_path, phantoms), on=(third_epoch, HALT), cwd=tmp_path)
    running.halted()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    line = refusal(command, "train.py", "--resume", run, cwd=tmp_path)
    assert f"process {running.pid} on {socket.gethostname()} is still at this run" in line
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    running.go()
    result = running.wait()
    assert result.returncode == 0, result.stderr
    same(run, undisturbed)

    second = tmp_path / "runs" / "one-2"
    running = command.start("train.py", *flags(tmp_path, phantoms), on=(third_epoch, HALT), cwd=tmp_path)
    running.halted()
    running.kill()
    assert running.wait().returncode == -signal.SIGKILL
    assert (second / "lock").exists()
    assert train(command, tmp_path, "--resume", second).returncode == 0
    same(second, undisturbed)


def test_a_disk_that_fills_up(command, phantoms, tmp_path, undisturbed):
    start = flags(tmp_path, phantoms)
    run = tmp_path / "runs" / "one"
    result = train(command, tmp_path, *start, "--cache", "ram", file_bytes=1_000_000)  # last.pth needs more
    assert result.returncode == 2
    assert result.stderr.count("error: ") == 1
    assert "last.pth" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(run.glob(".*"))  # no half-written file

    assert train(command, tmp_path, "--resume", run, "--epoch", 3).returncode == 0
    before = (run / "last.pth").read_bytes()
    assert train(command, tmp_path, "--resume", run, "--epoch", EPOCHS, file_bytes=1_000_000).returncode == 2
    assert (run / "last.pth").read_bytes() == before
    assert train(command, tmp_path, "--resume", run, "--epoch", EPOCHS).returncode == 0
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


def test_killed_before_the_best_epoch_is_written(command, phantoms, tmp_path, undisturbed):
    """last.pth says that the sixth epoch is the best, and best.pth is still of the third."""
    result = train(command, tmp_path, *flags(tmp_path, phantoms), on=(Call("train.save_best", 2), signal.SIGKILL))
    assert result.returncode == -signal.SIGKILL
    assert epochs(tmp_path / "runs" / "one") == 6
    assert json.loads((undisturbed / "result.json").read_text())["selected_epoch"] == 6, "else this test shows nothing"
    assert go_on(command, tmp_path, phantoms).returncode == 0
    same(tmp_path / "runs" / "one", undisturbed)


def test_half_of_an_epochs_files(command, tmp_path, undisturbed):
    """Killed while metrics.jsonl was written, after last.pth."""
    folder = tmp_path / "moved"
    shutil.copytree(undisturbed.parents[1], folder)
    run = folder / "runs" / "one"
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    (run / "result.json").unlink()
    assert train(command, folder, "--resume", run).returncode == 0
    same(run, undisturbed)


def test_the_folder_of_a_run(undisturbed):
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["options"]["shot"] == 2
    assert config["settings"]["weights_sha256"]
    assert len(config["shots"]["normal"]) == 2
    assert {"torch", "python", "git_commit", "host", "device", "command"} <= config.keys()
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, EPOCHS + 1))
    assert [line["epoch"] for line in lines if line["auc"] is not None] == [3, 6, 8]
    assert all(0 <= lines[epoch - 1][name] <= 1 for epoch in (3, 6, 8) for name in ("auc", "pauc"))
    result = json.loads((undisturbed / "result.json").read_text())
    best = max(lines[2], lines[5], key=lambda line: line["auc"] + line["pauc"])
    assert (result["selected_epoch"], result["auc"]) == (best["epoch"], best["auc"])
    assert result["pauc"] == pytest.approx(best["pauc"], abs=1e-12)
    assert result["last"]["auc"] == lines[-1]["auc"]


def test_names_of_runs(command, phantoms, tmp_path):
    start = flags(tmp_path, phantoms, "--epoch", 1)
    first, second = command("train.py", *start), command("train.py", *start)
    assert (first.returncode, second.returncode) == (0, 0)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["one", "one-2"]
    assert "is there already, so this run is" in second.stderr


def test_a_damaged_state_leaves_the_finished_epochs(command, tmp_path, undisturbed):
    """Of a last.pth that does not fit: metrics.jsonl is no line shorter after the refusal."""
    run = tmp_path / "one"
    shutil.copytree(undisturbed, run)
    before = (run / "metrics.jsonl").read_bytes()
    payload = torch.load(run / "last.pth", weights_only=True)
    payload["state"] |= {"history": payload["state"]["history"][:2], "optimizers": []}
    torch.save(payload, run / "last.pth")
    assert "last.pth" in refusal(command, "train.py", "--resume", run)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_another_number_of_threads_is_said(command, tmp_path, undisturbed):
    """As threads change bits; and of a run that is finished nothing is trained again."""
    run = tmp_path / "one"
    shutil.copytree(undisturbed, run)
    places = ["--resume", run, "--save_path", tmp_path, "--cache_dir", tmp_path]
    assert "so far" not in train(command, tmp_path, *places).stdout
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "threads": 3}))
    assert "1 threads, 3 so far" in train(command, tmp_path, *places).stdout


def test_what_cannot_be_resumed(command, tmp_path, undisturbed):
    assert "config.json" in refusal(command, "train.py", "--resume", tmp_path)
    assert "config.json" in refusal(command, "train.py", "--resume", "")
    for flag, value in (("--learning_rate", 0.5), ("--shot", 1)):
        line = refusal(command, "train.py", "--resume", undisturbed, flag, value)
        assert f"{flag} {value} contradicts" in line
    run = tmp_path / "one"
    shutil.copytree(undisturbed, run)
    places = ["--resume", run, "--save_path", tmp_path, "--cache_dir", tmp_path]
    config = (run / "config.json").read_bytes()
    assert f"has finished {EPOCHS} already" in refusal(command, "train.py", *places, "--epoch", 2)
    assert (run / "config.json").read_bytes() == config  # else a plain --resume would be refused from here on
    whole = (run / "last.pth").read_bytes()
    (run / "last.pth").write_bytes(whole[:-5000])
    assert "last.pth" in refusal(command, "train.py", *places)
    (run / "last.pth").unlink()
    assert "last.pth is missing" in refusal(command, "train.py", *places)
    (run / "last.pth").write_bytes(whole)
    best = (run / "best.pth").rename(tmp_path / "best.pth")
    assert "best.pth is missing, the only copy of the selected epoch 6" in refusal(command, "train.py", *places)
    best.rename(run / "best.pth")
    torch.save({"format": "madclip-run-1", "state": {}}, run / "last.pth")
    assert "a run of another version" in refusal(command, "train.py", *places)
    (run / "config.json").write_text("{")
    assert "config.json" in refusal(command, "train.py", *places)
