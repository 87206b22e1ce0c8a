"""Images are decoded once, before the first epoch ends; later epochs do not need the data set."""

import pytest

import train
from dataset import phantom
from dataset.readers import images
from engine import features
from engine.calibration import CHOSEN_SOURCE
from engine.features import TokenStore
from engine.report.figures import Plot
from engine.training import TrainingState
from tests.helpers.data import SMALL

EPOCHS = 3


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_images_are_decoded_only_once(tmp_path, monkeypatch, cache):
    data, counts, passes, decoded, hashed = tmp_path / "data", [], [], [], []
    phantom.write(data, ["Brain"], valid=4, test=7, seed=0, size=64)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(Plot, "png", lambda *_, **__: b"")  # drawing six figures takes longer than the run
    load_image, sha256_file = features.load_image_with_hash, images.sha256_file
    tokens, finish = TokenStore._tokens, TrainingState.finish_epoch

    def finished(self, *arguments):
        counts.append(sum(passes))
        if len(counts) == 1:
            data.rename(tmp_path / "gone")
        if len(counts) == EPOCHS:  # calibration reads masks of valid/, the page images
            (tmp_path / "gone").rename(data)
        return finish(self, *arguments)

    monkeypatch.setattr(features, "load_image_with_hash", lambda s, size: decoded.append(s.path) or load_image(s, size))
    monkeypatch.setattr(images, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    monkeypatch.setattr(TokenStore, "_tokens", lambda self, batch: passes.append(len(batch)) or tokens(self, batch))
    monkeypatch.setattr(TrainingState, "finish_epoch", finished)
    paths = ["--data_path", data, "--save_path", tmp_path, "--run_dir", tmp_path, "--cache_dir", tmp_path / "store"]
    run = ["--obj", "Brain", "--shot", 2, "--epoch", EPOCHS, "--exp_name", "run", "--select", "valid", "--cache", cache]
    run += ["--num_workers", 1]
    result = train.train(train.parse(list(map(str, [*SMALL, *paths, *run]))))
    assert result["decision"]["from"] == CHOSEN_SOURCE
    assert len(decoded) == len(set(decoded)) == 2 * 2 + 14 + 4  # once for tokens of all views and hash
    assert not set(decoded) & set(hashed)
    assert counts == [2 * 2 * 16 + 14 + 4] * EPOCHS  # views of the shots, test images, rest of valid/
