"""Runs that share towers and stores read what they would have read alone."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import Sample
from engine.detector import Detector, Settings
from engine.features import Item
from engine.options import make_store
from engine.towers import Towers

CPU = torch.device("cpu")


@pytest.fixture
def items(tmp_path):
    rng = np.random.default_rng(0)
    found = []
    for i in range(5):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (42, 42, 3), dtype=np.uint8)).save(path)
        found.append(Item(Sample(path, 0, None, path.name)))
    return found


def load(towers, fidelity="released", seed=1):
    return towers.clip("ViT-tiny-14-56", "random", 42, weights=None, fidelity=fidelity, seed=seed, device=CPU)


def make_detector(clip, layers, kind="MFCFC", fidelity="released"):
    sizes = {"fidelity": fidelity, "img_size": 42, "features_list": tuple(layers), "visionA": kind, "eval_batch": 32}
    choices = {"text_mood": "fix", "contrast_mood": "yes", "dec_type": "mean", "loss_type": "sigmoid"}
    names = {"obj": "Brain", "prompt_name": "Brain", "model_name": "ViT-tiny-14-56", "pretrain": "random"}
    return Detector(clip, Settings(**sizes, **choices, **names, pixel_metrics=True, weights_sha256=""))


@pytest.mark.parametrize("cache", ["ram", "disk", "off"])
@pytest.mark.parametrize(("layers", "kind"), [((1, 2, 3, 4), "MFCFC"), ((3,), "MFCFC"), ((4, 2), "MViTFC")])
def test_a_shared_store_gives_what_an_own_one_gives(items, tmp_path, cache, layers, kind):
    options = argparse.Namespace(
        precision="fp32", batch_size=2, num_workers=1, cache=cache, cache_dir=tmp_path / "store", cache_dtype="float16"
    )
    towers = Towers(layers=(1, 2, 3, 4), class_token=True)
    clip = load(towers, "corrected")
    detector = make_detector(clip, layers, kind, "corrected")
    shared, own = towers.store(options, clip, detector), make_store(options, clip, detector)
    expected_passes = 0 if cache == "off" else 5
    assert [store.prepare(items) for store in (shared, own)] == [expected_passes] * 2
    for mine, theirs in zip(shared.get(items), own.get(items), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.is_contiguous()
    # The next run has other layers and adapters, and nothing passes again.
    shared.release_tower()
    other = towers.store(options, clip, make_detector(clip, (1,)))
    assert other.prepare(items) == 0
    assert other.get(items)[0].shape == (5, 9, 128)


def test_weights_are_loaded_once():
    towers = Towers()
    first = load(towers)
    assert load(towers) is first
    assert load(towers, seed=2) is not first  # random weights follow the seed
    load(towers, seed=3)
    assert load(towers) is not first  # two at most are kept
