"""The training set, training steps and their saved state, selection of epochs, and random draws."""

import pytest
import torch
from PIL import Image

from CLIP.clip import create_model
from dataset import phantom
from dataset.medical_few import Shots
from dataset.readers.images import Sample
from dataset.readers.masks import load_mask
from dataset.views import VIEWS, augment
from engine.detector import Detector
from engine.features import TokenStore
from engine.files.config import train_options
from engine.metrics import Metrics
from engine.training import Splits, TrainingSet, TrainingState, check_losses, view_masks
from tests.helpers.data import draw_samples, small_settings
from utils import InputError


@pytest.fixture(scope="module")
def clip():
    return create_model("ViT-tiny-14-56", "random", 42, seed=1)


@pytest.fixture
def shots(tmp_path):
    samples = draw_samples(tmp_path)
    return Shots([samples[1], samples[3]], [samples[0]], "drawn")


def batch(count=4):
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randn(count, 9, 128, generator=generator) for _ in range(2)]
    masks = torch.rand(count, 42, 42, generator=generator) > 0.7
    return tokens, torch.tensor([1.0, 0.0] * (count // 2)), masks


def start(clip, seed=5, **changes):
    return TrainingState(Detector(clip, small_settings(**changes), seed), None, 0.001, seed)


class Served:
    """A store that returns the same tokens for all rows; `with_room` is that of the real store."""

    with_room = TokenStore.with_room

    def __init__(self, tokens):
        self.tokens, self.cache = tokens, "ram"

    def get(self, rows):
        return self.tokens

    def leave_gpu(self):
        self.cache = "ram"


def step(state, tokens, labels, masks):
    return state.step(Served(tokens), None, labels, masks, None)


def parameters(state):
    return {name: value.detach().clone() for name, value in state.detector.named_parameters()}


def test_views_come_abnormal_first_and_view_by_view(shots):
    training = TrainingSet.build(shots, small_settings(), 5)
    assert len(training) == VIEWS * 3 and training.labels.tolist() == [1.0] * 32 + [0.0] * 16
    assert [(item.name, item.view) for item in training.items[:3]] == [("1.png", 0), ("3.png", 0), ("1.png", 1)]
    assert torch.equal(training.masks[0], load_mask(shots.abnormal[0], 42)) and not training.masks[32:].any()
    assert [item.jitter is not None for item in training.items[:32:2]] == [view == 13 for view in range(VIEWS)]


def test_released_masks_are_binarised_after_the_views_corrected_before(golden, tmp_path):
    """Grey masks as in BMAD: released equals the published masks, corrected the views of binary masks."""
    grey = golden("grey_masks")
    samples = []
    for i, raw in enumerate(grey["raw"][:3]):  # the fourth holds labels 0 and 1 and is refused
        Image.fromarray(raw).save(tmp_path / f"{i}.png")
        samples.append(Sample(tmp_path / f"{i}.png", 1, (tmp_path / f"{i}.png",), f"{i}.png"))
    expected = grey["train_masks"].reshape(VIEWS, 4, 48, 48)[:, :3].reshape(-1, 48, 48)
    released = view_masks(samples, small_settings(img_size=48))
    assert torch.equal(released, torch.from_numpy(expected))
    corrected = view_masks(samples, small_settings(img_size=48, fidelity="corrected"))
    binary = torch.from_numpy(grey["test_masks"][:3]).float()
    assert torch.equal(corrected, augment(binary)[:, 0] > 0.5)
    assert not torch.equal(released, corrected)


def test_step_trains_only_adapters_and_contexts(clip):
    weights = {name: value.clone() for name, value in clip.state_dict().items()}
    state = start(clip)
    before = parameters(state)
    step(state, *batch())
    assert all(not torch.equal(value, before[name]) for name, value in parameters(state).items())
    assert all(torch.equal(value, weights[name]) for name, value in clip.state_dict().items())


def test_step_is_repeated_exactly_after_out_of_memory(clip, monkeypatch):
    one, other, backward = start(clip), start(clip), torch.Tensor.backward
    expected = step(one, *batch())
    store = Served(batch()[0])
    store.cache = "gpu"

    def fail_after_the_gradients(loss, *arguments, **options):
        backward(loss, *arguments, **options)
        if store.cache == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "backward", fail_after_the_gradients)
    assert torch.equal(other.step(store, None, *batch()[1:], other.detector.prompts()), expected)
    assert store.cache == "ram"
    assert all(torch.equal(value, parameters(other)[name]) for name, value in parameters(one).items())


def test_half_precision_scales_gradients_and_restores_the_scale(clip):
    states, norms = [start(clip), start(clip), start(clip)], []
    for state, autocast in zip(states, (None, torch.float16, torch.float16), strict=True):
        state.autocast, state.scaler = autocast, autocast and torch.amp.GradScaler("cpu", init_scale=64.0)
        state.backward(*batch(), None)
        norms.append(sum(float(p.grad.norm()) for p in state.detector.adapters.parameters() if p.grad is not None))
    assert norms[1] == pytest.approx(64 * norms[0], rel=0.05)
    states[1].scaler.update(16.0)
    states[2].load_state_dict(states[1].state_dict())
    assert states[2].scaler.get_scale() == 16


ABLATIONS = [
    {"visionA": "MCNNFC"},
    {"text_mood": "learnable_abnormal"},
    {"contrast_mood": "no"},
    {"loss_type": "softmax"},
    {"dec_type": "max"},
    {"features_list": (4,)},
    {"fidelity": "corrected"},
]


@pytest.mark.parametrize("change", ABLATIONS, ids=lambda change: next(iter(change)))
def test_changing_one_component_keeps_all_other_random_draws(clip, shots, change):
    """Adapters, contexts, shuffling and jitter have separate generators."""
    one, other = start(clip), start(clip, **change)
    before, after = parameters(one), parameters(other)
    own = "adapters" if {"visionA", "features_list"} & set(change) else "prompts" if "text_mood" in change else None
    for name in before.keys() & after.keys():
        if own is None or not name.startswith(own):
            assert torch.equal(before[name], after[name]), name
    assert torch.equal(torch.randperm(99, generator=one.shuffle), torch.randperm(99, generator=other.shuffle))
    items = [TrainingSet.build(shots, small_settings(**c), 5).items for c in ({}, change)]
    assert items[0] == items[1]


def finish(state, score, due=True, seconds=1.0, det=1.0):
    """Finish an epoch with this AUC on a test set without masks."""
    loss = torch.tensor([det, 0.5, det + 0.5], dtype=torch.float64)
    return state.finish_epoch(loss, 0.9, Metrics({"auc": score}), None, due, seconds)


def test_only_epochs_of_eval_every_are_selected(clip):
    """An epoch evaluated only as the last one is not selected, so extended and uninterrupted runs agree."""
    state = start(clip)
    for score, due in [(0.9, False), (0.5, True), (0.9, False), (0.5, True)]:
        finish(state, score, due=due)
    assert (state.best_epoch, state.selected_epoch) == (2, 2)


def test_the_best_must_be_strictly_better_and_above_0(clip):
    state = start(clip)
    assert [finish(state, score)["best"] for score in (0.0, 0.4, 0.4, 0.3, 0.5)] == [False, True, False, False, True]
    assert (state.best_epoch, state.best_score) == (5, 0.5)


def test_select_valid_uses_the_scores_of_valid(clip):
    state = start(clip)
    state.select = "valid"
    loss = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    scores = [(0.9, 0.3), (0.1, 0.7)]  # test and valid
    records = [state.finish_epoch(loss, 0.5, *(Metrics({"auc": auc}) for auc in pair), True, 1.0) for pair in scores]
    assert [record["best"] for record in records] == [True, True]
    assert [record["valid_auc"] for record in records] == [0.3, 0.7]
    assert state.best_score == 0.7


def test_losses_are_averaged_and_nan_is_reported():
    losses = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 5.0]])
    assert check_losses(losses, 4).tolist() == [2.0, 2.0, 4.0]
    losses[1, 2] = torch.nan
    with pytest.raises(InputError, match="epoch 4: the loss became nan at step 2"):
        check_losses(losses, 4)


@pytest.mark.parametrize(("det", "epochs", "changes", "warned_at"), [
    (2.77, 21, {}, [6]),  # two layers: 4 ln 2 = 2.7726; after a quarter of the epochs
    (2.77, 8, {}, [5]),  # not before the fifth epoch
    (2.5, 20, {}, []),
    (2.77, 20, {"loss_type": "softmax"}, []),
])  # fmt: skip
def test_warning_if_the_loss_stays_at_its_initial_value(clip, capsys, det, epochs, changes, warned_at):
    state, warned = start(clip, **changes), []
    for epoch in range(1, min(epochs, 8) + 1):
        finish(state, 0.5, det=det)
        state.warn_if_stuck(epochs)
        warned += [epoch] * ("which --fidelity corrected gives" in capsys.readouterr().err)
    assert warned == warned_at


def test_splits_are_described(tmp_path, capsys):
    """An unused abnormal image of valid/ without a mask, and only that, is left out of the calibration and reported."""
    phantom.write(tmp_path, ["Brain"], valid=5, test=2, seed=0, size=32)
    mask = sorted((tmp_path / "Brain_AD/valid/Ungood/anomaly_mask").iterdir())[-1]
    mask.unlink()
    (tmp_path / "Brain_AD/fewshot_seed/my2-shot.txt").unlink()
    options = train_options(["--obj", "Brain", "--data_path", str(tmp_path), "--shot", "2", "--seed", "4"])
    splits = Splits.open(options)
    assert "1 abnormal images of valid/ have no mask and are not shots" in capsys.readouterr().out
    assert (len(splits.unused), len(splits.calibration), splits.select) == (6, 5, "valid")
    assert mask.name not in {sample.path.name for sample in splits.calibration}
    splits.describe()
    assert "Brain: 4 test images (2 abnormal); shots sampled with seed 4 " in capsys.readouterr().out
