"""After the first epoch nothing is decoded, no file of the data set is opened, and no tokens or masks are copied."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from dataset import phantom
from engine import features, metrics
from engine.features import TokenStore
from engine.training import TrainingState
from tests.helpers.data import SMALL
from tests.helpers.fake_device import DEVICE, FakeDevice, OnDevice

EPOCHS = 3
TOKENS = 4 * 9 * 128  # of an image: layers, patches, width
MAP = 42 * 42


@pytest.fixture(scope="module")
def data_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    phantom.write(path, ["Brain"], valid=4, test=7, seed=0, size=64)
    return path


def options(data_path: Path, folder: Path, *more: object):
    paths = ["--data_path", data_path, "--save_path", folder, "--run_dir", folder, "--cache_dir", folder / "store"]
    run = ["--obj", "Brain", "--shot", 2, "--epoch", EPOCHS, "--exp_name", "run", "--select", "valid"]
    return train.parse(list(map(str, [*SMALL, *paths, *run, *more])))


def each_epoch(monkeypatch, action) -> None:
    """Call `action` at the end of every epoch."""
    finish = TrainingState.finish_epoch

    def finished(self, *arguments):
        action()
        return finish(self, *arguments)

    monkeypatch.setattr(TrainingState, "finish_epoch", finished)


opened: list[str] = []  # while `watching`: the files that this process opens
watching: list[Path] = []


def watch(event: str, arguments: tuple) -> None:
    if watching and event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(str(watching[0])):
        opened.append(arguments[0])


sys.addaudithook(watch)  # for good: Python has no way to take it back


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_nothing_is_decoded_after_the_pass(data_path, tmp_path, monkeypatch, cache):
    """The audit hook sees every open() of the data set's folder, whoever calls it and by whatever library."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    counts, passes = [], []
    tokens = TokenStore._tokens
    monkeypatch.setattr(TokenStore, "_tokens", lambda self, batch: passes.append(len(batch)) or tokens(self, batch))
    each_epoch(monkeypatch, lambda: counts.append((len(opened), sum(passes))))
    opened.clear()
    watching.append(data_path)
    try:
        train.train(options(data_path, tmp_path, "--cache", cache))
    finally:
        watching.clear()
    assert counts[0][0] >= 22 + 11  # every image and every mask once at least, before the first epoch's end
    assert counts == counts[:1] * EPOCHS
    assert counts[0][1] == 2 * 2 * 16 + 14 + 4  # views of the shots, test images, what is left of valid/


def test_tokens_and_masks_stay_on_the_device(data_path, tmp_path, monkeypatch):
    """With --cache gpu, on a device that counts what is copied to and from it."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(train, "pick_device", lambda _: DEVICE)
    monkeypatch.setattr(features, "choose_cache", lambda *_: "gpu")
    monkeypatch.setattr(features, "describe_cache", lambda *_: "on the fake GPU")
    use_numpy = metrics._use_numpy
    monkeypatch.setattr(metrics, "_use_numpy", lambda tensor: not isinstance(tensor, OnDevice) and use_numpy(tensor))
    backward, held = TrainingState.backward, []

    def checked_backward(self, tokens, labels, masks, text):
        held.append(all(isinstance(tensor, OnDevice) for tensor in (*tokens, labels, masks)))
        return backward(self, tokens, labels, masks, text)

    monkeypatch.setattr(TrainingState, "backward", checked_backward)
    copies = []
    device = FakeDevice()

    def count() -> None:
        copies.append((list(device.up), list(device.down)))
        device.up.clear()
        device.down.clear()

    each_epoch(monkeypatch, count)
    with device:
        result = train.train(options(data_path, tmp_path))
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert held == [True] * 4 * EPOCHS

    first_up = sum(size for _, _, size in copies[0][0])
    assert first_up > 82 * 3 * MAP * 4  # the images that pass the tower
    for up, down in copies[1:]:
        assert up  # batches' rows and the like: the counter counts
        assert sum(size for _, _, size in up) < TOKENS * 4 / 4, up  # less than a quarter of an image's tokens
        large = [entry for entry in down if np.prod(entry[1]) >= MAP and len(entry[1]) > 1]
        assert not large, large  # no map and no mask travels back
    plain = train.train(options(data_path, tmp_path / "plain", "--cache", "ram"))
    assert (plain["auc"], plain["pauc"]) == (result["auc"], result["pauc"])
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "plain/run")]
    assert [json.loads(line)["total"] for line in lines[0].splitlines()] == [
        json.loads(line)["total"] for line in lines[1].splitlines()
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_on_a_gpu_no_epoch_copies_tokens_or_masks(data_path, tmp_path, monkeypatch):
    """The profiler's sum of what an epoch copies from the host's memory, after the first."""
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415

    monkeypatch.setenv("WANDB_MODE", "disabled")
    copied, profiler = [], profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU])

    def turn() -> None:
        nonlocal profiler
        profiler.__exit__(None, None, None)
        events = [event for event in profiler.events() if "HtoD" in event.name]
        copied.append(len(events))
        profiler = profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU])
        profiler.__enter__()

    each_epoch(monkeypatch, turn)
    profiler.__enter__()
    train.train(options(data_path, tmp_path, "--device", "cuda", "--cache", "gpu"))
    profiler.__exit__(None, None, None)
    assert copied[1] == copied[2] < copied[0]
