"""Patch scores, what follows from them, and masks as packed bits."""

from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch

from dataset.readers.masks import load_mask
from engine.evaluation import Evaluation, Masks, evaluate
from tests.helpers.data import draw_samples, small_settings
from utils import InputError

SIZE = 42


@pytest.fixture
def samples(tmp_path):
    return draw_samples(tmp_path)


def make_evaluation(samples, head="seg", dec_type="mean"):
    scores = torch.randn(len(samples), 2, 9, generator=torch.Generator().manual_seed(1))
    return Evaluation(samples, scores, head, SIZE, dec_type)


def test_an_images_score_is_the_highest_pixel_of_its_map(samples):
    evaluation = make_evaluation(samples)
    maps = evaluation.maps(slice(None))
    assert maps.shape == (6, SIZE, SIZE) and float(maps.min()) >= 0 and float(maps.max()) <= 2
    np.testing.assert_allclose(evaluation.image_scores, maps.flatten(1).amax(1).double().numpy())
    torch.testing.assert_close(evaluation.maps([4, 1]), maps[[4, 1]])


def test_masks_are_those_of_the_reader(samples):
    masks = Masks.of(samples, small_settings())
    expected = torch.stack([load_mask(sample, SIZE) for sample in samples])
    assert len(masks.bits) == 3  # images without a mask take no room
    for part in (slice(None), slice(1, 4), [5, 0, 3]):
        torch.testing.assert_close(masks.get(part), expected[part], atol=0, rtol=0)
    torch.testing.assert_close(masks.select([3, 2]).get(slice(None)), expected[[3, 2]], atol=0, rtol=0)
    torch.testing.assert_close(Masks.pack(expected).get(slice(None)), expected, atol=0, rtol=0)


def draw_more(samples):
    """Four other images of the same files."""
    return [replace(sample, index=1) for sample in samples[:4]]


class FakeStore:
    """Serves the index of an image as its token; counts what is asked for."""

    def __init__(self, samples):
        self.samples, self.asked = list(samples), []
        self.chunk = 8
        self.tower = type("Tower", (), {"device": torch.device("cpu"), "autocast": None})

    def rows(self, items):
        return torch.tensor([self.samples.index(item) for item in items])

    def get(self, rows):
        self.asked.append(rows.tolist())
        return [rows.float()[:, None, None]] * 2

    def with_room(self, action):
        return action()


class FakeDetector:
    """Returns the tokens as scores, NaN for one of them."""

    scoring_head = "seg"

    def __init__(self, bad=None, kind="MFCFC"):
        self.bad, self.shapes = bad, []
        self.settings = small_settings(eval_batch=4, visionA=kind)
        self.adapters = Namespace(mixes_images=kind == "MViTFC")

    def prompts(self):
        return torch.zeros(3, 2)

    def patch_scores(self, tokens, text):
        self.shapes.append(len(tokens[0]))
        scores = torch.stack(tokens, dim=1)[..., 0].expand(-1, -1, 9).clone()
        scores[scores == self.bad] = torch.nan
        return scores


@pytest.mark.parametrize(("kind", "shapes"), [("MFCFC", [8, 8]), ("MViTFC", [4, 4, 2])])
def test_images_are_scored_in_their_order_and_in_batches_of_one_size(samples, kind, shapes):
    """The last one is filled up, but where images attend to each other: the checkpoint's batches, as published."""
    samples = samples + draw_more(samples)
    store, detector = FakeStore(samples), FakeDetector(kind=kind)
    evaluation = evaluate(detector, store, samples)
    assert [row for rows in store.asked for row in rows] == list(range(10))
    assert detector.shapes == shapes
    assert evaluation.patch_scores[:, 0, 0].tolist() == list(range(10))
    assert evaluation.labels.tolist() == [0, 1] * 5


def test_a_score_that_is_not_finite_names_the_image(samples):
    with pytest.raises(InputError, match=r"the score of 3\.png is not finite"):
        evaluate(FakeDetector(bad=3.0), FakeStore(samples), samples)
