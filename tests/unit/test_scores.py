"""Kept patch scores: all that was kept comes back, labels and patients from the file, and other flags are refused."""

from dataclasses import replace

import pytest
import torch

from dataset import phantom
from dataset.medical_few import MedicalDataset
from engine.evaluation import Evaluation
from engine.files.config import test_options as options_of_test
from engine.files.scores import Scored, Source
from tests.helpers.data import draw_samples, small_settings
from utils import InputError

SIZE = 42


def make_scored(samples, masks=None, **source) -> Scored:
    scores = torch.randn(len(samples), 2, 9, generator=torch.Generator().manual_seed(1))
    evaluation = Evaluation(samples, scores, "seg", SIZE, "mean")
    read = {"patient": None, "mask_above": 127, "mask_labels": [], "unmarked": None, "window": [40.0, 400.0]}
    values = {"words": "what", "obj": "Brain", "anonymous": False, "read": {**read, "plane": "axial"}}
    values["patients"] = ["1"]
    return Scored(evaluation, masks, small_settings(), {"select": "last"}, Source(**{**values, **source}))


def test_labels_and_patients_are_those_of_the_file(tmp_path):
    """Also where the data set was changed meanwhile: here its classes are swapped in the file."""
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
    ["--window", "auto"],
])  # fmt: skip
def test_flags_that_ask_for_another_test_are_refused(tmp_path, flags):
    scored = make_scored(draw_samples(tmp_path))
    with pytest.raises(InputError, match=flags[0]):
        scored.with_pictures(options_of_test(["--scores", "x.npz", *flags]))
    same = ["--obj", "Brain", "--mask_above", "127", "--window", "40", "400", "--dec_type", "mean"]
    scored.with_pictures(options_of_test(["--scores", "x.npz", "--data_path", str(tmp_path), *same]))
