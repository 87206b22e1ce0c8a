"""After the first epoch nothing is decoded, no file of the data set is opened."""

import sys
from pathlib import Path

import pytest

import train
from dataset import phantom
from dataset.readers import images
from engine import features
from engine.features import TokenStore
from engine.report.figures import Plot
from engine.training import TrainingState
from tests.helpers.data import SMALL

EPOCHS = 3


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
    monkeypatch.setattr(Plot, "png", lambda *_, **__: b"")  # six figures take longer than the run
    counts, passes, decoded, hashed = [], [], [], []
    load_image, sha256_file = features.load_image_with_hash, images.sha256_file
    monkeypatch.setattr(features, "load_image_with_hash", lambda s, size: decoded.append(s.path) or load_image(s, size))
    monkeypatch.setattr(images, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    tokens = TokenStore._tokens
    monkeypatch.setattr(TokenStore, "_tokens", lambda self, batch: passes.append(len(batch)) or tokens(self, batch))
    each_epoch(monkeypatch, lambda: counts.append((len(opened), sum(passes))))
    opened.clear()
    watching.append(data_path)
    try:
        train.train(options(data_path, tmp_path, "--cache", cache, "--num_workers", 1))
    finally:
        watching.clear()
    assert len(decoded) == len(set(decoded)) == 2 * 2 + 14 + 4  # once for its tokens, all views and its hash
    assert not set(decoded) & set(hashed)
    assert counts[0][0] >= 22 + 11  # every image and every mask once at least, before the first epoch's end
    assert counts == counts[:1] * EPOCHS
    assert counts[0][1] == 2 * 2 * 16 + 14 + 4  # views of the shots, test images, what is left of valid/
