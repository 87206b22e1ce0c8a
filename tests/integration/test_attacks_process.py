"""What happens around a command: closed and full outputs, Ctrl-C, several processes, patients' names, passwords."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.helpers.attacks import UNGOOD, driver, fine, read_json, refused
from tests.helpers.commands import ROOT
from tests.integration.test_distributed import torchrun

ENVIRONMENT = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}


# --- stdout and stderr ---

OUTPUTS = {
    "stdout closed": "os.close(1); sys.stdout = None",
    "stderr closed": "os.close(2); sys.stderr = None",
    "both and stdin closed": "os.closerange(0, 3); sys.stdin = sys.stdout = sys.stderr = None",
    "stdout on a full disk": "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)",
    "stderr on a full disk": "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)",
    "stderr without a reader": "pipe = os.pipe(); os.dup2(pipe[1], 2); os.close(pipe[0]); os.close(pipe[1])",
}


@pytest.mark.parametrize("what", OUTPUTS)
def test_training_goes_on_whatever_becomes_of_its_output(command, home, tmp_path, what):
    """Its files are those of an undisturbed run, and no traceback is printed."""
    script = driver(tmp_path, OUTPUTS[what])
    result = command(script, "train.py", *home.train(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
    if what == "stdout on a full disk":
        assert "stdout cannot be written (No space left on device)" in result.stderr
    run = tmp_path / "runs/one"
    assert (run / "metrics.jsonl").read_bytes() == (home.run / "metrics.jsonl").read_bytes()
    assert read_json(run / "result.json")["per_image"] == read_json(home.run / "result.json")["per_image"]
    state = torch.load(run / "last.pth", weights_only=True)["state"]  # no text of stdout in it
    assert len(state["history"]) == 2


def test_a_reader_that_leaves_finds_the_finished_epochs_on_disk(command, home, tmp_path):
    """`train.py | head -1` ends the run without a traceback, and --resume goes on with it."""
    code = "pipe = os.pipe(); os.dup2(pipe[1], 1); os.close(pipe[1]); os.close(pipe[0])"
    late = f"import engine.training as t\nline = t.epoch_line\ndef gone(*a):\n    {code}\n    return line(*a)\n"
    script = driver(tmp_path, late + "import train\ntrain.epoch_line = gone")
    result = command(script, "train.py", *home.train(tmp_path))
    assert result.returncode == 128 + signal.SIGPIPE
    assert "Traceback" not in result.stderr
    run = tmp_path / "runs/one"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    fine(command("train.py", "--resume", run, "--save_path", tmp_path / "ckpt", "--cache_dir", tmp_path / "store"))
    assert (run / "metrics.jsonl").read_bytes() == (home.run / "metrics.jsonl").read_bytes()


# --- Ctrl-C ---


@pytest.mark.parametrize("command_line", [["train.py"], ["predict.py"], ["-m", "engine.checkpoint"]])
@pytest.mark.parametrize("module", ["CLIP.config", "torch", "torch.nn.functional"])
def test_ctrl_c_while_python_imports_gives_no_traceback(tmp_path, command_line, module):
    """The signal comes while the named module is imported: the process ends by it, or with code 130."""
    hook = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # also where pytest runs in the background
        "def stop(event, args):\n"
        f"    if event == 'import' and args[0] == {module!r}:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.addaudithook(stop)\n"
    )
    (tmp_path / "sitecustomize.py").write_text(hook)
    flags = {"train.py": ["--obj", "Brain"], "predict.py": ["--ckpt", "x", "y", "--out", "z"]}
    call = [sys.executable, *command_line, *flags.get(command_line[0], ["show", "x"])]
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(call, cwd=tmp_path if command_line[0] == "-m" else ROOT, env=environment, check=False,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode in (-signal.SIGINT, 130), (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr


# --- several processes ---


def test_several_processes_say_what_is_wrong_once(home, tmp_path):
    """Of a mistyped flag and of missing data one process of torchrun prints the line; its own report is torchrun's."""
    for wrong, words in ((["--no_such_flag"], "--no_such_flag"), (["--data_path", "nowhere"], "--data_path nowhere")):
        call = torchrun("train.py", *home.train(tmp_path), *wrong)
        done = subprocess.run(call, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        lines = [line for line in done.stderr.splitlines() if "error: " in line and words in line]
        assert len(lines) == 1, done.stderr
        assert "interrupted" not in done.stderr
        assert 'train.py", line' not in done.stderr  # no traceback of ours


# --- names and passwords ---


def contents(folder: Path) -> bytes:
    """All files below a folder, packed members of archives too."""
    parts = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            parts.append(path.read_bytes())
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    parts += [archive.read(name) for name in archive.namelist()]
    return b"\n".join(parts)


def test_anonymous_results_hold_no_file_name(command, home, tmp_path):
    """Checkpoint, results, page and figures of train.py and test.py, tables and pictures of predict.py."""
    data = home.copy_data(tmp_path)
    for path in list((data / "Brain_AD").rglob("*Ungood_0000*.png")):
        path.rename(path.with_name(path.name.replace("Ungood_", "Miller_Ann_")))
    lists = data / "Brain_AD/fewshot_seed/my2-shot.txt"
    lists.write_text(lists.read_text().replace("Ungood_", "Miller_Ann_"))
    train = command("train.py", *home.train(tmp_path, data), "--anonymous", "--out_json", tmp_path / "train.json")
    fine(train)
    results = ["--out_json", tmp_path / "test.json", "--figures", tmp_path / "figures", "--report", tmp_path / "page"]
    ckpt = ["--ckpt", tmp_path / "ckpt/Brain.pth"]
    test = command("test.py", *home.flags(data), *ckpt, "--anonymous", *results)
    fine(test)
    images = data / UNGOOD / "img"
    flags = [*ckpt, "--device", "cpu", "--anonymous", "--report", tmp_path / "out/page", "--out", tmp_path / "out"]
    fine(command("predict.py", *flags, images))
    run = [f"runs/one/{name}" for name in ("index.html", "result.json", "best.pth")]
    for name in ("ckpt", "train.json", "test.json", "figures", "page", "out", *run):
        path = tmp_path / name
        assert b"Miller" not in (contents(path) if path.is_dir() else path.read_bytes()), name
    assert "Miller" not in train.stdout + train.stderr + test.stdout + test.stderr
    assert "--anonymous" in "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))


def test_the_password_in_an_address_is_never_printed(command, home, tmp_path):
    """Of WANDB_BASE_URL, and of `--url`, whatever characters it holds; nor is it in the run's files."""
    address = "http://ann:s3cr@et@127.0.0.1:9"
    env = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online", "WANDB_INIT_TIMEOUT": "1",
           "HOME": str(tmp_path)}  # fmt: skip
    done = command("train.py", *home.train(tmp_path), "--epoch", 1, "--log_images_every", 0, env=env)
    fine(done)
    assert not re.search(r"s3cr|et@127", done.stdout + done.stderr)
    assert b"s3cr" not in contents(tmp_path / "runs")
    for url in (f"{address}/{'0' * 64}/x.pt", f"{address.replace('http', 'ftp')}/x.pt"):
        done = command("CLIP.download", "ViT-B-16", "--url", url, "--out", tmp_path / "x.pt")
        assert done.returncode == 2
        assert not re.search(r"s3cr|et@127", done.stdout + done.stderr), done.stderr


def test_a_key_file_or_netrc_that_is_a_pipe_is_not_waited_for(command, home, tmp_path):
    """Key.json and ~/.netrc; the run goes on without them."""
    key = json.dumps(str(tmp_path / "key.json"))
    os.mkfifo(tmp_path / "key.json")
    os.mkfifo(tmp_path / ".netrc")
    code = "import engine.report.tracking as t\nfrom pathlib import Path\nread = t.read_key\n"
    code += f"t.read_key = lambda path: read(Path({key}))\n"
    env = {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    env["NETRC"] = str(tmp_path / ".netrc")
    done = command(driver(tmp_path, code), "train.py", *home.train(tmp_path), "--epoch", 1, env=env)
    fine(done)


# --- the terminal ---


def test_escape_sequences_never_reach_the_terminal(command, home, tmp_path):
    """Neither from names of files and shots, nor from the fields of a checkpoint, on stdout or on stderr."""
    data, evil = home.copy_data(tmp_path), "\x1b]0;owned\x07\x1b[2J"
    for folder in ("img", "anomaly_mask"):
        path = data / UNGOOD / folder / "valid_Ungood_00000.png"
        path.rename(path.with_name(f"{evil}.png"))
    shot = data / "Brain_AD/test/good/img/test_good_00000.png"
    shot.rename(shot.with_name(f"{evil}.png"))
    results = [command("train.py", *home.train(tmp_path, data), "--iterate", -1, "--shot", 4)]
    payload = torch.load(home.ckpt, weights_only=True)
    for name, change in (
        ("run", {"about": {**payload["about"], "run": evil}}),
        ("select", {"about": {**payload["about"], "select": evil}}),
        ("prompt", {"settings": {**payload["settings"], "prompt_name": evil, "obj": evil}}),
        ("part", {evil: torch.ones(1)}),
    ):
        path = tmp_path / f"{name}{evil.replace('/', '')}.pth"
        torch.save({**payload, **change}, path)
        results.append(command("engine.checkpoint", "show", path))
        results.append(command("test.py", *home.flags(data), "--ckpt", path))
        results.append(command("predict.py", "--ckpt", path, "--device", "cpu", data / UNGOOD / "img/", "--out",
                               tmp_path / "out", "--no-pictures"))  # fmt: skip
    results.append(command("dataset.check", "--obj", "Brain", "--data_path", data))
    results.append(command("train.py", "--resume", tmp_path / evil))
    assert any("u001b" in r.stdout + r.stderr or "x1b" in r.stdout + r.stderr for r in results)
    for result in results:
        assert "Traceback" not in result.stderr
        assert "\x1b" not in result.stdout + result.stderr, result.args
        assert "\x07" not in result.stdout + result.stderr, result.args


def test_a_refusal_is_one_line_and_exit_code_2(command, home):
    """As all of the other tests here say of theirs."""
    refused(command("test.py", *home.flags(), "--ckpt", "nowhere.pth"), "nowhere.pth")


# A step, the scoring and the pass through the tower need more memory than there is.
NO_MEMORY = """
import torch
def none(*_, **__):
    raise {error}
import {module}
{module}.{name} = none
"""


@pytest.mark.parametrize(
    ("error", "words"),
    [("torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')", "CUDA out of memory"),
     ("RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes')", "DefaultCPUAllocator"),
     ("MemoryError()", "MemoryError")],
)  # fmt: skip
@pytest.mark.parametrize(
    ("module", "name"),
    [("engine.training", "TrainingState.step"), ("engine.detector", "Detector.patch_scores"),
     ("engine.features", "TokenStore._tokens")],
)  # fmt: skip
def test_too_little_memory_is_one_line(command, home, tmp_path, error, words, module, name):
    script = driver(tmp_path, NO_MEMORY.format(error=error, module=module, name=name))
    done = command(script, "train.py", *home.train(tmp_path))
    refused(done, f"out of memory ({error.partition('(')[0].rpartition('.')[2]}", words, "smaller --batch_size")
