"""Losses, gradients and Adam steps against values measured on the published implementation."""

import itertools

import numpy as np
import pytest
import torch

import loss
from CLIP.adapter_shared import ADAPTERS
from engine.detector import make_optimizers
from tests.conftest import VARIANTS, load_golden
from tests.unit.test_golden_adapters import golden_adapters, patch_tokens
from tests.unit.test_golden_backbone import close
from tests.unit.test_golden_prompts import chooser_with_golden_contexts, clip_of

UNITS = list(itertools.product(("sigmoid", "softmax"), ("mean", "max", "both")))
TRAIN_CASES = [
    *(("MFCFC", [2, 4], "Brain", variant) for variant in VARIANTS),
    ("MFCFC", [2, 4], "Chest", "gelu_nomask"),
    ("MFCFC", [1, 2, 3, 4], "Brain", "gelu_nomask"),
    ("MFCFC", [1, 2, 3, 4], "Chest", "gelu_nomask"),
    ("MCNNFC", [2, 4], "Brain", "gelu_nomask"),
    ("MViTFC", [2, 4], "Brain", "gelu_nomask"),
]


def unit(name: str) -> torch.Tensor:
    return torch.from_numpy(load_golden("losses")[f"unit/{name}"])


@pytest.mark.parametrize(("loss_type", "dec_type"), UNITS)
def test_detection_loss_and_gradient(loss_type, dec_type):
    scores = unit("det_scores").requires_grad_()
    value = loss.detection_loss(scores, unit("labels"), loss_type, dec_type)
    value.backward()
    close(value, unit(f"{loss_type}/{dec_type}/loss").numpy())
    stored = unit(f"{loss_type}/{dec_type}/grad_det_scores")
    assert float((scores.grad - stored).norm()) <= 1e-4 * float(stored.norm())
    close(
        loss.image_score(loss.patch_difference(unit("det_scores")[None]), dec_type),
        unit(f"{loss_type}/{dec_type}/validation").numpy(),
    )


@pytest.mark.parametrize("loss_type", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("dec_type", "shares"), [("max", [1.0, 0.0, 0.0]), ("both", [2 / 3, 1 / 6, 1 / 6])])
def test_gradient_of_tied_largest_patches_goes_to_one(loss_type, dec_type, shares):
    """As in the published torch.max(x, dim=1)[0], one of two tied largest patches gets the whole gradient."""
    scores = torch.tensor([[[0.5, -0.5], [0.5, -0.5], [-0.5, 0.5]]])  # (1, 3 patches, 2); the third is mirrored
    scores = torch.cat([scores, scores]).requires_grad_()
    labels = torch.tensor([0.0, 1.0])
    loss.detection_loss(scores, labels, loss_type, dec_type).backward()
    plain = scores.detach().clone().requires_grad_()
    values = plain.softmax(dim=-1) if loss_type == "softmax" else None
    if values is None:
        z = torch.tensor([[[1.0, -1.0]], [[-1.0, 1.0]]])
        values = torch.nn.functional.logsigmoid(z * plain)
    largest = torch.max(values, dim=1)[0]
    decided = largest if dec_type == "max" else 0.5 * values.mean(dim=1) + 0.5 * largest
    if loss_type == "softmax":
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        total = bce(1 - decided[:, 0], labels) + bce(decided[:, 1], labels)
    else:
        total = -decided.sum(dim=-1).mean()
    total.backward()
    torch.testing.assert_close(scores.grad, plain.grad, atol=1e-7, rtol=0)

    tied = torch.tensor([[2.0, 2.0, 1.0]], requires_grad=True)
    loss.decide(tied, dec_type).sum().backward()
    torch.testing.assert_close(tied.grad[0], torch.tensor(shares))


def test_pixel_probability():
    abnormal = loss.pixel_probability(unit("seg_scores"), 42)
    close(torch.stack([1 - abnormal, abnormal], dim=1), unit("sync_AS").numpy())


@pytest.mark.parametrize("name", ["focal", "dice"])
def test_segmentation_losses(name):
    function = {"focal": loss.focal_loss, "dice": loss.dice_loss}[name]
    scores, masks = unit("seg_scores").requires_grad_(), unit("masks")[:, 0]
    value = function(loss.pixel_probability(scores, 42), masks)
    value.backward()
    close(value, unit(name).numpy())
    stored = unit(f"{name}_grad_seg_scores")
    assert float((scores.grad - stored).norm()) <= 1e-4 * float(stored.norm())
    close(function(unit("sync_AS")[:, 1], torch.zeros_like(masks)), unit(f"{name}_zero_masks").numpy())
    extreme = unit("extreme_probs")
    close(function(extreme[:, 1], unit("extreme_masks")[:, 0]), unit(f"extreme_{name}").numpy())


class Case:
    """A training step with the stored parameters on a batch of three images, as published."""

    def __init__(self, tiny_clip, kind, layers, obj, variant, contrast=True):
        data = load_golden("losses")
        self.chooser = chooser_with_golden_contexts(
            clip_of(variant, tiny_clip), obj, "learnable_all", variant.endswith("causal")
        )
        self.adapters = golden_adapters(kind, layers, contrast)
        self.tokens = patch_tokens(variant, layers)
        self.labels = torch.from_numpy(data["train/labels"])
        self.masks = torch.from_numpy(data["train/gt_soft_masks"])[:, 0].gt(0.5).float() if obj == "Brain" else None
        if self.masks is not None:
            assert np.array_equal(self.masks.numpy(), data["train/binarised_masks"][:, 0])

    def scores(self):
        heads = ("det", "seg") if self.masks is not None else ("det",)
        det, *seg = self.adapters(self.tokens, self.chooser(), heads)
        return det, seg[0] if seg else None

    def loss(self, loss_type="sigmoid", dec_type="mean"):
        return loss.training_loss(*self.scores(), self.labels, self.masks, loss_type, dec_type)

    def parameters(self):
        named = {f"{name.split('.')[0]}/{name.split('.', 1)[1]}": p for name, p in self.adapters.named_parameters()}
        for learner in self.chooser.prompt_learners.values():
            named.update({f"prompt_learner.ctx.{name}": p for name, p in learner.ctx.items()})
        return named


@pytest.mark.parametrize(("kind", "layers", "obj", "variant"), TRAIN_CASES)
def test_training_loss_and_gradients(golden, tiny_clip, kind, layers, obj, variant):
    data, tag = golden("losses"), f"train/{kind}/features_{'_'.join(map(str, layers))}/{obj}/{variant}"
    case = Case(tiny_clip, kind, layers, obj, variant)
    parts = case.loss()
    for name in parts._fields:
        close(getattr(parts, name), data[f"{tag}/{name}_loss"])
    det, seg = case.scores()
    close(
        torch.stack([loss.detection_loss(layer, case.labels, "sigmoid", "mean") for layer in det]),
        data[f"{tag}/det_per_layer"],
    )
    if obj == "Brain":
        for name, function in (("focal", loss.focal_loss), ("dice", loss.dice_loss)):
            values = [function(loss.pixel_probability(layer, 42), case.masks) for layer in seg]
            close(torch.stack(values), data[f"{tag}/{name}_per_layer"])

    parts.total.backward()
    compared = 0
    for name, parameter in case.parameters().items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if f"{tag}/grad/{name}" in data:
            stored = torch.from_numpy(data[f"{tag}/grad/{name}"])
            assert float((gradient - stored).norm()) <= 1e-4 * float(stored.norm()) + 1e-12, name
        else:
            norm = float(data[f"{tag}/grad_norm/{name}"])
            assert float(gradient.norm()) == pytest.approx(norm, rel=1e-4, abs=1e-12), name
            stored = torch.from_numpy(data[f"{tag}/grad_head/{name}"])
            assert float((gradient.flatten()[:8] - stored).norm()) <= 1e-4 * max(float(stored.norm()), norm / 10), name
        compared += 1
    assert compared == len(list(case.adapters.parameters())) + 6


def test_every_option(golden, tiny_clip):
    data = golden("losses")
    table = data["train/table_features_1_2_3_4"]
    names = ("variant", "visionA", "loss_type", "dec_type", "contrast", "dataset", "value")
    axes = [data[f"train/table_axis_{name}"].tolist() for name in names]
    assert axes[1] == list(ADAPTERS)
    assert [len(axis) for axis in axes] == list(table.shape)
    for (i, variant), (j, kind), (m, contrast), (n, obj) in itertools.product(
        *(list(enumerate(axes[axis])) for axis in (0, 1, 4, 5))
    ):
        case = Case(tiny_clip, kind, [1, 2, 3, 4], obj, variant, contrast == "yes")
        with torch.no_grad():
            scores = case.scores()
            for (k, loss_type), (q, dec_type) in itertools.product(enumerate(axes[2]), enumerate(axes[3])):
                parts = loss.training_loss(*scores, case.labels, case.masks, loss_type, dec_type)
                close(torch.stack([getattr(parts, name) for name in axes[6]]), table[i, j, k, q, m, n])


@pytest.mark.parametrize(("obj", "file"), [("Brain", "losses"), ("Chest", "losses_detection")])
def test_one_adam_step(golden, tiny_clip, obj, file):
    data, tag = golden(file), f"train/MFCFC/features_2_4/{obj}/gelu_nomask"
    case = Case(tiny_clip, "MFCFC", [2, 4], obj, "gelu_nomask")
    before = {name: parameter.detach().clone() for name, parameter in case.parameters().items()}
    optimizers = make_optimizers(case.adapters, case.chooser, 0.001)
    parts = case.loss()
    parts.total.backward()
    close(parts.total, data[f"{tag}/total_loss"])
    for optimizer in optimizers:
        optimizer.step()
    without = set(data.get(f"{tag}/parameters_without_gradient", np.array([])).tolist())
    for name, parameter in case.parameters().items():
        if name in without:
            assert parameter.grad is None
            assert torch.equal(parameter, before[name])
            continue
        gradient = torch.from_numpy(data[f"{tag}/grad/{name}"])
        assert float((parameter.grad - gradient).norm()) <= 1e-4 * float(gradient.norm())
        sure = gradient.abs() > 1e-6  # for smaller gradients rounding decides the sign of the step
        close(parameter[sure], data[f"{tag}/after_adam/{name}"][sure.numpy()])


def test_eleven_steps(golden, tiny_clip):
    case = Case(tiny_clip, "MFCFC", [2, 4], "Brain", "gelu_nomask")
    optimizers = make_optimizers(case.adapters, case.chooser, 0.001)
    losses = []
    for _ in range(11):
        for optimizer in optimizers:
            optimizer.zero_grad()
        total = case.loss().total
        losses.append(float(total.detach()))
        total.backward()
        for optimizer in optimizers:
            optimizer.step()
    stored = golden("losses")["train/MFCFC/features_2_4/Brain/gelu_nomask/loss_over_11_evaluations"]
    np.testing.assert_allclose(losses, stored, atol=1e-5, rtol=0)


def test_anomaly_map_is_the_published_sum(golden):
    seg = unit("seg_scores")
    probabilities = unit("sync_AS")
    published = 0.5 * (1 - probabilities[:, 0]) + 0.5 * probabilities[:, 1]
    close(loss.anomaly_map(loss.patch_difference(torch.stack([seg, seg])), 42), (2 * published).numpy())
    assert str(golden("losses")["train/images_note"])  # a note: the images are those of backbone.npz
