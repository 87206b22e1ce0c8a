"""The losses of MadCLIP (paper, section 2.3), and the image and pixel scores, which use the same arithmetic."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TARGET_SMOOTHING = 1e-5  # smooths the one-hot target of the focal loss; also added to the probability, as published
DICE_SMOOTHING = 1.0
FOCAL_GAMMA = 2


class LossParts(NamedTuple):
    """The training loss: `total` = `det` + `seg`; `seg` is 0 on image-only data sets."""

    det: Tensor
    seg: Tensor
    total: Tensor


def decide(values: Tensor, dec_type: str) -> Tensor:
    """Reduce patch values (B, N, ...) -> (B, ...) by their mean, their maximum, or the average of both.

    The gradient of the maximum goes to one patch, as published; `amax` would divide it among ties.
    """
    if dec_type == "mean":
        return values.mean(dim=1)
    largest = values.max(dim=1).values
    return largest if dec_type == "max" else 0.5 * values.mean(dim=1) + 0.5 * largest


def detection_loss(scores: Tensor, labels: Tensor, loss_type: str, dec_type: str) -> Tensor:
    """Image-level loss of one layer.

    `sigmoid` is the paper's SigLIP-style loss, -log sigmoid(z s), with z = +1 for the branch of the label and -1 for
    the other. `softmax` is its ablation: a binary cross entropy takes the reduced probabilities as its logits.

    Args:
        scores: (B, N, 2), [normal branch, abnormal branch].
        labels: (B,), 1 = abnormal.
        loss_type: `sigmoid` or `softmax`.
        dec_type: `mean`, `max` or `both`: how patches are reduced, see `decide`.
    """
    labels = labels.to(scores.dtype)
    if loss_type == "sigmoid":
        sign = 2 * labels - 1
        z = torch.stack([-sign, sign], dim=-1)[:, None]  # (B, 1, 2)
        return -decide(F.logsigmoid(z * scores), dec_type).sum(dim=-1).mean()
    normal, abnormal = decide(scores.softmax(dim=-1), dec_type).unbind(-1)
    return F.binary_cross_entropy_with_logits(1 - normal, labels) + F.binary_cross_entropy_with_logits(abnormal, labels)


def patch_difference(scores: Tensor) -> Tensor:
    """Abnormal minus normal branch of one head, (K, B, N, 2) -> (B, K, N): all that an evaluation stores.

    The softmax over the two branches, on which all scores and maps are based, is the sigmoid of this difference.
    """
    return (scores[..., 1] - scores[..., 0]).transpose(0, 1)


def image_score(difference: Tensor, dec_type: str) -> Tensor:
    """Anomaly score of images from the detection heads: `patch_difference` (B, K, N) -> (B,) in [0, K].

    The probability of `abnormal` is reduced over the patches (see `decide`) and summed over the layers.
    """
    return torch.stack([decide(layer, dec_type) for layer in difference.sigmoid().unbind(1)]).sum(dim=0)


def upsample(difference: Tensor, size: int) -> Tensor:
    """Upsample patch grids to pixels, bilinear with aligned corners, as published: (B, K, N) -> (B, K, size, size)."""
    side = round(difference.shape[-1] ** 0.5)
    grid = difference.unflatten(-1, (side, side))
    return F.interpolate(grid, size=(size, size), mode="bilinear", align_corners=True)


def pixel_probability(seg_scores: Tensor, size: int) -> Tensor:
    """Probability of `abnormal` per pixel from one layer's patch scores: (B, N, 2) -> (B, size, size) in [0, 1]."""
    return upsample(patch_difference(seg_scores[None]), size)[:, 0].sigmoid()


def anomaly_map(difference: Tensor, size: int) -> Tensor:
    """Anomaly score of every pixel: `patch_difference` (B, K, N) -> (B, size, size) in [0, K], summed over the layers.

    The softmax over two upsampled branches equals the sigmoid of their upsampled difference. The published
    0.5 * (1 - p_normal) + 0.5 * p_abnormal equals p_abnormal, as the two probabilities sum to one.
    """
    total = difference.new_zeros(difference.shape[0], size, size)
    for layer in difference.split(1, dim=1):  # one at a time: 1/K of the memory, and twice as fast on a CPU
        total += upsample(layer, size)[:, 0].sigmoid_()
    return total


def focal_loss(probability: Tensor, masks: Tensor) -> Tensor:
    """Focal loss (Lin et al. 2017, gamma 2, no class weights) for two classes, averaged over all pixels.

    Args:
        probability: probability of `abnormal` in [0, 1], any shape.
        masks: same shape, 0 or 1.
    """
    true_class = torch.where(masks > 0.5, probability, 1 - probability)
    smoothed = (1 - TARGET_SMOOTHING) * true_class + TARGET_SMOOTHING * (1 - true_class) + TARGET_SMOOTHING
    return -((1 - smoothed) ** FOCAL_GAMMA * smoothed.log()).mean()


def dice_loss(probability: Tensor, masks: Tensor) -> Tensor:
    """1 - Dice coefficient (smoothing 1), averaged over the images: probability, masks (B, ...) -> scalar."""
    probability, masks = probability.flatten(1), masks.flatten(1)
    overlap = (probability * masks).sum(dim=1)
    dice = (2 * overlap + DICE_SMOOTHING) / (probability.sum(dim=1) + masks.sum(dim=1) + DICE_SMOOTHING)
    return 1 - dice.mean()


def training_loss(
    det_scores: Tensor, seg_scores: Tensor | None, labels: Tensor, masks: Tensor | None, loss_type: str, dec_type: str
) -> LossParts:
    """The training loss, summed over the layers: detection, plus focal and Dice loss if there are masks.

    Args:
        det_scores: (K, B, N, 2).
        seg_scores: (K, B, N, 2), or None on image-only data sets.
        labels: (B,), 1 = abnormal.
        masks: (B, S, S), 0 or 1, or None on image-only data sets.
        loss_type: see `detection_loss`.
        dec_type: see `decide`.
    """
    det = torch.stack([detection_loss(layer, labels, loss_type, dec_type) for layer in det_scores]).sum()
    seg = det.new_zeros(())
    if seg_scores is not None and masks is not None:
        for layer in seg_scores:
            probability = pixel_probability(layer, masks.shape[-1])
            seg = seg + focal_loss(probability, masks) + dice_loss(probability, masks)
    return LossParts(det, seg, det + seg)
