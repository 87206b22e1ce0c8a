"""Synthetic evaluations: small images on disk, and patch scores computed from the wanted image scores."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from dataset.readers.images import Sample
from engine.evaluation import Evaluation, Masks
from tests.helpers.data import small_settings

SIZE = 28  # side of the maps in pixels: 2 x 2 patches
LAYERS = 2
PICTURE = (48, 24)  # width and height of the files: not square
METADATA: dict[str, Any] = {
    "select": "last", "run": "a-run", "metrics": {"epoch": 3, "auc": 0.8},
    "threshold": {"value": 0.4, "pixel_value": 0.35, "heat_range": [0.25, 1.75], "rule": "the largest F1",
                  "from": "images of valid/", "figures": {"tpr": 0.9, "fpr": 0.1, "n_normal": 9, "n_abnormal": 9}},
}  # fmt: skip


def make_samples(folder: Path, labels: Sequence[int], masks: bool = True) -> list[Sample]:
    """Write an image for each label; the masks of abnormal images mark the left half."""
    folder.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(PICTURE[::-1], np.uint8)
    mask[:, : PICTURE[0] // 2] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    samples = []
    for i, label in enumerate(labels):
        Image.new("RGB", PICTURE, (40 + i, 90, 90)).save(folder / f"{i}.png")
        has_mask = bool(label) and masks
        samples.append(
            Sample(folder / f"{i}.png", label, (folder / "mask.png",) if has_mask else (), f"test/{i:05}.png")
        )
    return samples


def make_evaluation(samples: Sequence[Sample], scores: Sequence[float], head: str = "seg") -> Evaluation:
    """An evaluation with these image scores, between 0 and LAYERS; each map is constant."""
    share = torch.tensor(scores, dtype=torch.float64) / LAYERS
    patches = share.logit()[:, None, None].expand(-1, LAYERS, 4).float().contiguous()
    return Evaluation(samples, patches, head, SIZE, "mean")


def make_world(
    folder: Path, labels: Sequence[int], scores: Sequence[float], masks: bool = True
) -> tuple[Evaluation, Masks | None]:
    """Write samples; return their evaluation and masks. Without masks the scores are those of the detection heads."""
    samples = make_samples(folder, labels, masks)
    evaluation = make_evaluation(samples, scores, "seg" if masks else "det")
    return evaluation, Masks.of(samples, small_settings(img_size=SIZE)) if masks else None


def noisy_evaluation(labels: Sequence[int] = (0, 1) * 5, head: str = "seg") -> tuple[Evaluation, Masks]:
    """Random patch scores, raised in the lower half of abnormal images; the masks of these mark the lower half."""
    abnormal = torch.tensor(labels) == 1
    scores = torch.randn(len(labels), 3, 16, generator=torch.Generator().manual_seed(0))
    scores[abnormal, :, 8:] += 1.0
    samples = [
        SimpleNamespace(name=f"{i}.png", label=label, patient=f"p{i // 2}" if i < 8 else None, mask=None, kind="")
        for i, label in enumerate(labels)
    ]
    mask = np.arange(400) >= 200
    rows = torch.where(abnormal, 0, -1)
    return Evaluation(samples, scores, head, 20, "mean"), Masks(rows, torch.from_numpy(np.packbits(mask)[None]), 20)
