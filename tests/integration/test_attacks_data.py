"""Hostile pictures, masks and folders through the real commands: refused in a line, or read as they are meant."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.attacks import CLOSED, UNGOOD, Home, driver, fine, read_json, refused, rows

FIRST = "valid_Ungood_00000.png"


@pytest.fixture
def data(home, tmp_path) -> Path:
    """A copy of the data, to be spoiled."""
    return home.copy_data(tmp_path)


def predict_refused(command, home: Home, out: Path, *images: object) -> str:
    """What a predict.py says that must name what it cannot read."""
    done = command("predict.py", "--ckpt", home.ckpt, "--device", "cpu", "--no-pictures", *images, "--out", out)
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


# --- masks ---


def test_a_mask_that_marks_nearly_everything_or_is_constant_is_said(command, home, data, tmp_path):
    """By the check, and by training where it is a shot's."""
    full, empty = (data / UNGOOD / "anomaly_mask" / f"valid_Ungood_0000{i}.png" for i in (0, 1))
    Image.new("L", (64, 64), 255).save(full)
    Image.new("L", (64, 64), 0).save(empty)
    checked = command("dataset.check", "--obj", "Brain", "--data_path", data)
    assert "100% of the image is abnormal (a constant mask)" in checked.stdout
    assert "empty" in checked.stdout
    done = command("train.py", *home.train(tmp_path, data), "--epoch", 1)
    fine(done)
    assert "1 abnormal shots have a mask of over 90% of the image" in done.stderr
    assert "1 abnormal shots have an empty mask" in done.stderr


def test_an_unreadable_test_mask_is_found_before_training(command, home, data, tmp_path):
    """Not after the first epoch."""
    mask = data / "Brain_AD/test/Ungood/anomaly_mask/test_Ungood_00002.png"
    mask.write_bytes(mask.read_bytes()[:60])
    result = command("train.py", *home.train(tmp_path, data))
    refused(result, "test_Ungood_00002.png")
    assert "epoch 1" not in result.stdout
    assert not list(tmp_path.glob("runs/*/last.pth"))


# --- pictures ---


def test_an_image_that_changes_while_it_is_read_is_never_kept_under_its_old_name(command, home, data, tmp_path):
    """Neither in files nor in memory: the run is refused, and the next one has the right tokens."""
    image = data / "Brain_AD/test/good/img/test_good_00001.png"
    other = data / "Brain_AD/test/Ungood/img/test_Ungood_00003.png"
    kept = image.read_bytes()
    code = f"""
import shutil, engine.features as features
load = features.Item.load
def swapped(item, size):
    if item.sample.path.name == "test_good_00001.png":
        shutil.copy({str(other)!r}, item.sample.path)
    return load(item, size)
features.Item.load = swapped
"""
    script = driver(tmp_path, code)
    for cache in ("disk", "ram", "off"):
        image.write_bytes(kept)
        result = command(script, "train.py", *home.train(tmp_path, data), "--cache", cache)
        refused(result, "test_good_00001.png", "changed while it was read")
    image.write_bytes(kept)
    fine(command("train.py", *home.train(tmp_path, data), "--cache", "disk", "--out_json", tmp_path / "out.json"))
    assert read_json(tmp_path / "out.json")["per_image"] == read_json(home.run / "result.json")["per_image"]


# --- folders and names ---


def test_a_folder_that_cannot_be_read_is_never_left_out(command, home, data, tmp_path):
    """By training, check and prediction alike; exit code 0 is for whole answers only."""
    folder = data / UNGOOD / "img/closed"
    folder.mkdir()
    shutil.copy(data / UNGOOD / "img" / FIRST, folder)
    script = driver(tmp_path, CLOSED)
    refused(command(script, "train.py", *home.train(tmp_path, data)), "closed", "cannot be read")
    checked = command(script, "dataset.check", "--obj", "Brain", "--data_path", data)
    assert checked.returncode == 1
    assert "closed" in checked.stdout
    flags = ["--ckpt", home.ckpt, "--device", "cpu", "--no-pictures", data / UNGOOD / "img", "--out", tmp_path / "out"]
    done = command(script, "predict.py", *flags)
    assert done.returncode == 1
    assert "closed: cannot be read" in done.stderr
    assert len(rows(tmp_path / "out")) == 4


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("make", [os.mkfifo, make_socket])
def test_a_pipe_or_socket_named_png_is_refused(command, home, data, tmp_path, make: Callable[[Path], None]):
    """In training, check and prediction: neither waited for nor left out without a word."""
    make(data / UNGOOD / "img/x.png")
    refused(command("train.py", *home.train(tmp_path, data)), "x.png", "a pipe, a socket or a device")
    assert command("dataset.check", "--obj", "Brain", "--data_path", data).returncode == 1
    assert "x.png" in predict_refused(command, home, tmp_path / "out", data / UNGOOD / "img")
