"""Patch scores, image scores and maps, masks as packed bits, and saved scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from CLIP.clip import create_model
from CLIP.weights import find_weights
from dataset import phantom
from dataset.medical_few import MedicalDataset
from dataset.readers.masks import load_mask
from engine.detector import Detector
from engine.evaluation import Evaluation, Masks, evaluate
from engine.features import TokenStore
from engine.files.config import test_options as options_of_test
from engine.files.scores import Scored
from tests.helpers.data import draw_samples, small_settings, store_options
from utils import InputError

SIZE = 42


@pytest.fixture
def samples(tmp_path):
    return draw_samples(tmp_path)


def make_evaluation(samples, head="seg", dec_type="mean"):
    scores = torch.randn(len(samples), 2, 9, generator=torch.Generator().manual_seed(1))
    return Evaluation(samples, scores, head, SIZE, dec_type)


def test_image_score_is_the_maximum_of_its_map(samples):
    evaluation = make_evaluation(samples)
    maps = evaluation.maps(slice(None))
    assert maps.shape == (6, SIZE, SIZE) and float(maps.min()) >= 0 and float(maps.max()) <= 2
    np.testing.assert_allclose(evaluation.image_scores, maps.flatten(1).amax(1).double().numpy())
    torch.testing.assert_close(evaluation.maps([4, 1]), maps[[4, 1]])


def test_packed_masks_equal_those_of_the_reader(samples):
    masks = Masks.of(samples, small_settings())
    expected = torch.stack([load_mask(sample, SIZE) for sample in samples])
    assert len(masks.bits) == 3  # images without a mask use no memory
    for part in (slice(None), slice(1, 4), [5, 0, 3]):
        torch.testing.assert_close(masks.get(part), expected[part], atol=0, rtol=0)
    torch.testing.assert_close(masks.select([3, 2]).get(slice(None)), expected[[3, 2]], atol=0, rtol=0)
    torch.testing.assert_close(Masks.pack(expected).get(slice(None)), expected, atol=0, rtol=0)


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """Ten samples, a store with their tokens, a list of scored batch sizes, and a function that makes a detector."""
    samples, sizes = draw_samples(tmp_path, count=10), []
    weights = find_weights("ViT-tiny-14-56", "random", seed=1)
    clip = create_model(weights, img_size=SIZE)
    store = TokenStore(small_settings(), weights, None, torch.device("cpu"), store_options(tmp_path))
    store.plan([], [samples])
    store.fill(clip)
    whole = Detector.patch_scores
    monkeypatch.setattr(Detector, "patch_scores", lambda *given: sizes.append(len(given[1][0])) or whole(*given))
    return samples, store, sizes, lambda kind: Detector(clip, small_settings(eval_batch=4, visionA=kind))


@pytest.mark.parametrize(("kind", "batches"), [("MFCFC", [8, 8]), ("MViTFC", [4, 4, 2])])
def test_images_are_scored_in_order_and_in_batches_of_one_size(scored, kind, batches):
    """The last batch is padded; MViTFC, which attends across images, uses the checkpoint's batch size, as published."""
    samples, store, sizes, make = scored
    evaluation = evaluate(make(kind), store, samples)
    assert sizes == batches
    assert evaluation.patch_scores.shape == (10, 2, 9)
    assert evaluation.labels.tolist() == [0, 1] * 5
    turned = evaluate(make("MFCFC"), store, samples[::-1]).patch_scores.flip(0)
    assert kind == "MViTFC" or torch.equal(turned, evaluation.patch_scores)


def test_non_finite_score_is_reported_with_its_image(scored, monkeypatch):
    samples, store, _, make = scored
    tokens = store.get

    def damaged(rows):
        return [
            layer.masked_fill((rows == store.rows(samples[3:4]))[:, None, None], torch.nan) for layer in tokens(rows)
        ]

    monkeypatch.setattr(store, "get", damaged)
    with pytest.raises(InputError, match=r"the score of 3\.png is not finite"):
        evaluate(make("MFCFC"), store, samples)


# --- saved scores ---


def make_scored(samples, masks=None, **source) -> Scored:
    scores = torch.randn(len(samples), 2, 9, generator=torch.Generator().manual_seed(1))
    evaluation = Evaluation(samples, scores, "seg", SIZE, "mean")
    read = {"patient": None, "mask_above": 127, "mask_labels": [], "unmarked": None, "window": [40.0, 400.0]}
    values = {"words": "what", "obj": "Brain", "anonymous": False, "read": {**read, "plane": "axial"}}
    values |= {"patients": ["1"], "unknown": ""}
    return Scored(evaluation, masks, small_settings(), {"select": "last"}, {**values, **source})


def test_labels_and_patients_come_from_saved_scores(tmp_path):
    """Labels and patients come from the saved file, even if the data set has changed: here the classes are swapped."""
    phantom.write(tmp_path, ["Brain"], valid=2, test=4, seed=0, size=64)
    samples = MedicalDataset.open("Brain", tmp_path).samples("test")
    swapped = [replace(sample, label=1 - sample.label, patient="7") for sample in samples]
    make_scored(swapped).save(tmp_path / "scores.npz")
    options = options_of_test(["--scores", str(tmp_path / "scores.npz"), "--data_path", str(tmp_path)])
    found = Scored.load(options.scores).with_pictures(options).evaluation
    assert options.obj == "Brain"
    assert [sample.path for sample in found.samples] == [sample.path for sample in samples]
    assert [(sample.label, sample.patient) for sample in found.samples] == [(1 - s.label, "7") for s in samples]


@pytest.mark.parametrize("flags", [
    ["--obj", "Liver"], ["--mask_above", "0"], ["--dec_type", "max"], ["--fidelity", "corrected"], ["--ckpt", "x.pth"],
    ["--window", "auto"], ["--image_tower", "dinov2-small"],
])  # fmt: skip
def test_flags_that_contradict_saved_scores_are_refused(tmp_path, flags):
    scored = make_scored(draw_samples(tmp_path))
    with pytest.raises(InputError, match=flags[0]):
        scored.with_pictures(options_of_test(["--scores", "x.npz", *flags]))
    same = ["--obj", "Brain", "--mask_above", "127", "--window", "40", "400", "--dec_type", "mean"]
    scored.with_pictures(options_of_test(["--scores", "x.npz", "--data_path", str(tmp_path), *same]))
