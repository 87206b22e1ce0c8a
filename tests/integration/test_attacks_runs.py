"""Damaged run folders, runs that go on, kept tokens that vanish, results that would be lost."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.attacks import driver, fine, refused
from tests.helpers.commands import Call


@pytest.fixture
def run(home, tmp_path) -> Path:
    """A copy of the finished run, to be spoiled."""
    return home.copy_run(tmp_path)


# --- kept tokens ---

FORGET = """
import subprocess, shutil, engine.training as t
finish = t.TrainingState.finish_epoch
def forgetting(state, *a):
    from pathlib import Path
    if not state.history:
        {action}
    return finish(state, *a)
t.TrainingState.finish_epoch = forgetting
"""


def test_a_store_that_is_pruned_under_a_run_stops_it_with_a_word(command, home, tmp_path):
    """Never other rows, never a traceback; the run goes on from its last epoch with --resume."""
    action = f"shutil.rmtree({str(tmp_path / 'store')!r})"
    script = driver(tmp_path, FORGET.format(action=action))
    result = command(script, "train.py", *home.train(tmp_path), "--cache", "disk")
    refused(result, "removed by another command", "start again")
    run = tmp_path / "runs/one"
    fine(command("train.py", "--resume", run))
    assert (run / "metrics.jsonl").read_bytes() == (home.run / "metrics.jsonl").read_bytes()


# --- a run that goes on ---


def test_changed_images_stop_a_run_that_goes_on(command, home, tmp_path):
    """An image or mask of another content or name; nothing of the run is touched, and the same files go on."""
    data = home.copy_data(tmp_path)
    fine(command("train.py", *home.train(tmp_path, data)))
    run = tmp_path / "runs/one"
    resume = ["train.py", "--resume", run, "--epoch", 3]
    image = data / "Brain_AD/test/good/img/test_good_00001.png"
    mask = data / "Brain_AD/test/Ungood/anomaly_mask/test_Ungood_00002.png"
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    for path in (image, mask):
        kept = path.read_bytes()
        Image.eval(Image.open(path), lambda value: 255 - value).save(path)
        refused(command(*resume), str(run), "images and masks")
        path.write_bytes(kept)
    image.rename(image.with_name("renamed.png"))
    refused(command(*resume), str(run), "images and masks")
    image.with_name("renamed.png").rename(image)
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before
    fine(command(*resume))


def test_the_line_that_says_how_to_go_on_can_be_typed(command, home, tmp_path):
    """Quoted for the shell, whatever the folder is called."""
    place = tmp_path / "my runs; echo $HOME"
    script = driver(tmp_path, FORGET.format(action="os.kill(os.getpid(), signal.SIGINT)"))
    result = command(script, "train.py", *home.train(tmp_path), "--run_dir", place)
    assert result.returncode == 130
    assert "Traceback" not in result.stderr
    (hint,) = re.findall(r"to go on: (.*)", result.stderr)
    words = shlex.split(hint)
    assert words == ["python", "train.py", "--resume", str(place / "one")]
    fine(command(*words[1:]))


def test_a_killed_run_leaves_no_temporary_file_for_ever(command, home, tmp_path):
    """What `kill -9` leaves in the run's folder goes with the next start, beside other files in a day."""
    code = """
import torch
save = torch.save
def dying(value, path, *a):
    save(value, path, *a)
    if "last.pth" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = dying
"""
    flags = [*home.train(tmp_path), "--cache", "disk"]
    assert command(driver(tmp_path, code), "train.py", *flags).returncode == -signal.SIGKILL
    run = tmp_path / "runs/one"
    assert list(run.glob(".*.tmp"))
    (folder,) = (tmp_path / "store").iterdir()
    layer = next(folder.glob("layer*/*"))
    old = [layer / ".x.tokens.1.tmp", tmp_path / "ckpt/.Brain.pth.1.tmp"]
    (tmp_path / "ckpt").mkdir(exist_ok=True)
    for path in old:
        path.write_bytes(b"x")
        os.utime(path, (1, 1))
    fine(command("train.py", "--resume", run))
    assert not [path for path in (*run.rglob(".*.tmp"), *old) if path.exists()]


DAMAGED: dict[str, Callable[[Path], object]] = {
    "no config.json": lambda run: (run / "config.json").unlink(),
    "no JSON": lambda run: (run / "config.json").write_bytes(b"\xff\x00"),
    "last.pth is text": lambda run: (run / "last.pth").write_text("text"),
    "last.pth is cut short": lambda run: (run / "last.pth").write_bytes((run / "last.pth").read_bytes()[:-5000]),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_run_folder_is_refused_and_stays_as_it_is(command, home, run, what):
    DAMAGED[what](run)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    refused(command("train.py", *home.resume(run), "--epoch", 3), str(run))
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_run_that_was_killed_before_it_began_is_begun_again(command, home, tmp_path):
    """In the folder that it left, empty but for its lock; a folder that holds anything else is not touched."""
    killed = command("train.py", *home.train(tmp_path), on=(Call("engine.files.run.RunFolder.write_config"), 9))
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "runs/one").iterdir()] == ["lock"]
    fine(command("train.py", *home.train(tmp_path)))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one"]
    assert (tmp_path / "runs/one/metrics.jsonl").read_bytes() == (home.run / "metrics.jsonl").read_bytes()


# --- results that would be lost ---


def test_files_of_another_kind_are_not_replaced_by_results(command, home, tmp_path):
    """A checkpoint under --out_json or --save_scores, a picture under --save_ckpt or an export, stay."""
    kept = tmp_path / "kept.pth"
    shutil.copy(home.ckpt, kept)
    image = tmp_path / "scan.png"
    shutil.copy(home.data / "Brain_AD/test/good/img/test_good_00000.png", image)
    before = {path: path.read_bytes() for path in (kept, image)}
    refused(command("test.py", *home.test(), "--out_json", kept), "--out_json", "no JSON", "another name")
    refused(command("train.py", *home.train(tmp_path), "--out_json", kept), "--out_json", "no JSON")
    refused(command("test.py", *home.test(), "--save_scores", kept), "--save_scores", "another name")
    refused(command("engine.checkpoint", "export", home.ckpt, image), "scan.png", "another name")
    flags = ["--calibrate", home.data / "Brain_AD", "--save_ckpt", image]
    refused(command("predict.py", "--ckpt", home.ckpt, "--device", "cpu", *flags), "--save_ckpt", "another name")
    assert {path: path.read_bytes() for path in before} == before
    scores = tmp_path / "scores.npz"
    for _ in range(2):  # its own kind is replaced
        fine(command("test.py", *home.test(), "--save_scores", scores, "--out_json", tmp_path / "out.json"))
