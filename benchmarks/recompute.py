"""A stand-in for the published program: its arithmetic as the goldens' README describes it, everything computed anew.

For the benchmark alone. In every step the whole image tower runs forward and backward, with gradients for all of its
weights and attention weights as a tensor; so does the text tower, over all 77 positions of every prompt. Adapters
work product by product, on the class token too, both heads also where only one is read. In every epoch the test set
passes the tower again, all its pixels are kept, and scikit-learn sorts them. (Items 4, 8, 12, 18, 21 and 22 there.)

The modules, losses and optimisers are this project's, so its losses and AUCs tell whether ours is the same arithmetic.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from CLIP.model import CLIP
from dataset.readers import load_mask
from engine.detector import Detector, make_optimizers, seeded
from engine.features import Item
from loss import anomaly_map, patch_difference, training_loss
from train import Setup


def run(setup: Setup, epochs: int) -> Iterator[tuple[float, float, float, float]]:
    """Train with masks, shuffled as `engine.training` shuffles: seconds, mean loss, AUC and pAUC of each epoch."""
    clip, detector, data, options = setup.clip, setup.detector, setup.training, setup.options
    clip.requires_grad_(True)  # their gradients add up: no optimiser owns these weights
    optimizers = make_optimizers(detector.adapters, detector.prompts, options.learning_rate)
    shuffle = seeded(options.seed, "shuffle")
    views = images(data.items, clip)
    for _ in range(epochs):
        start = time.perf_counter()
        losses = []
        for batch in torch.randperm(len(views), generator=shuffle).split(options.batch_size):
            det, seg = scores(setup, views[batch], text_features(detector, clip))
            loss = training_loss(
                det, seg, data.labels[batch], data.masks[batch].float(), setup.settings.loss_type,
                setup.settings.dec_type,
            ).total  # fmt: skip
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.item())
        auc, pauc = evaluate(setup, options.batch_size)
        yield time.perf_counter() - start, sum(losses) / len(losses), auc, pauc
        ctypes.CDLL(None).malloc_trim(0)  # else what lies scattered between steps takes more than 24 GiB


def images(items: Sequence[Item], clip: CLIP) -> Tensor:
    """(B, 3, S, S) in [0, 1]."""
    return torch.stack([item.load(clip.img_size)[1] for item in items])


@sdpa_kernel(SDPBackend.MATH)
def text_features(detector: Detector, clip: CLIP) -> Tensor:
    """(D, 2): every position of every prompt through every block."""
    columns = {}
    for kind, learner in detector.prompts.prompt_learners.items():
        embeddings, eot = learner()
        x = embeddings + clip.text.positional_embedding
        for block in clip.text.transformer.resblocks:
            x = block(x, detector.settings.fidelity == "corrected")
        x = clip.text.ln_final(x)[torch.arange(len(x)), eot] @ clip.text.text_projection
        columns[kind] = F.normalize(x.mean(dim=0), dim=0)
    return torch.stack([columns["normal"], columns["abnormal"]], dim=1)


@sdpa_kernel(SDPBackend.MATH)
def scores(setup: Setup, batch: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S), text features (D, 2) -> detection and segmentation scores, (K, B, N, 2) each."""
    adapters = setup.detector.adapters
    layers = setup.clip.visual.forward_intermediates(batch, setup.store.tower.layers)
    result: tuple[list[Tensor], list[Tensor]] = ([], [])
    for k, tokens in enumerate(layers):  # (B, L, C)
        pair = [branch[k](tokens) for branch in (adapters.normal_det_adapters, adapters.abnormal_det_adapters)]
        for head, (normal, abnormal) in enumerate(zip(*pair, strict=True)):
            cosines = [F.normalize(vectors[:, 1:], dim=-1) @ text for vectors in (normal, abnormal)]
            result[head].append(
                torch.stack([cosines[0][..., 0] - cosines[0][..., 1], cosines[1][..., 1] - cosines[1][..., 0]], dim=-1)
            )
    return torch.stack(result[0]), torch.stack(result[1])


@torch.no_grad()
def evaluate(setup: Setup, batch_size: int) -> tuple[float, float]:
    """Image and pixel AUC over the test set, from all of its pixels at once."""
    clip, size, test = setup.clip, setup.settings.img_size, setup.splits.test
    text = text_features(setup.detector, clip)
    maps, masks = [], []
    for start in range(0, len(test), batch_size):
        samples = test[start : start + batch_size]
        _, seg = scores(setup, images([Item(sample) for sample in samples], clip), text)
        maps.append(anomaly_map(patch_difference(seg), size))
        masks += [load_mask(sample, size) for sample in samples]
    pixels, labels = torch.cat(maps), [sample.label for sample in test]
    auc = roc_auc_score(labels, pixels.flatten(1).amax(dim=1).numpy())
    return float(auc), float(roc_auc_score(torch.stack(masks).flatten().numpy(), pixels.flatten().numpy()))
