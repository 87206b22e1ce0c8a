"""Scoring: detector + tokens -> `Evaluation`, the patch scores; metrics, maps and pictures are computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from CLIP.adapter_shared import mixes_images
from dataset.readers.images import Sample
from dataset.readers.masks import load_mask
from loss import anomaly_map, image_score
from utils import InputError, prefetch

from . import distributed
from .detector import Detector
from .features import TokenStore, chunk_size, filled
from .files.config import Settings

MAP_BATCH = 32  # maps at a time, if only their highest pixel is kept
Part = slice | Sequence[int]


@dataclass
class Evaluation:
    """The scores of M images, layer by layer and patch by patch.

    Attributes:
        samples: the images, in the order of the scores.
        patch_scores: (M, K, N) float32, abnormal minus normal branch, each a difference of cosines: in [-4, 4].
        head: `seg` (images are scored by the highest pixel of their map) or `det` (by their patches, see dec_type).
        img_size: S, pixels a side of the maps.
        dec_type: how the patches of the `det` head are summarised: mean, max or both.
    """

    samples: Sequence[Sample]
    patch_scores: Tensor
    head: str
    img_size: int
    dec_type: str

    @property
    def names(self) -> list[str]:
        """The names of the images in reports."""
        return [sample.name for sample in self.samples]

    @cached_property
    def labels(self) -> np.ndarray:
        """(M,) int, 1 = abnormal."""
        return np.array([sample.label for sample in self.samples], dtype=np.int64)

    @cached_property
    def image_scores(self) -> np.ndarray:
        """(M,) float64 in [0, K], as published: highest pixel of the map (`seg`), or summary of the patches (`det`)."""
        batches = self.patch_scores.split(MAP_BATCH)
        if self.head == "seg":
            scores = [anomaly_map(batch, self.img_size).flatten(1).amax(dim=1) for batch in batches]
        else:
            scores = [image_score(batch, self.dec_type) for batch in batches]
        return torch.cat(scores).double().cpu().numpy()

    def maps(self, part: Part) -> Tensor:
        """Anomaly maps (B, S, S) float32 in [0, K] of a slice or of a list of images, on the scores' device.

        Maps from detection heads are a weak localisation, for display only: no metric uses them.
        """
        index = part if isinstance(part, slice) else torch.as_tensor(part, device=self.patch_scores.device)
        return anomaly_map(self.patch_scores[index], self.img_size)

    def select(self, keep: Sequence[int]) -> Evaluation:
        """The evaluation restricted to some of the images."""
        index = torch.as_tensor(keep, dtype=torch.long, device=self.patch_scores.device)
        samples = [self.samples[i] for i in keep]
        return Evaluation(samples, self.patch_scores[index], self.head, self.img_size, self.dec_type)


class Masks:
    """Masks of M images as packed bits, decoded once per run; images without a mask take no memory.

    Attributes:
        rows: (M,) int64, the row of `bits` that holds an image's mask, or -1.
        bits: (R, ceil(S * S / 8)) uint8, on the device where they are used.
        size: S, pixels a side.
    """

    def __init__(self, rows: Tensor, bits: Tensor, size: int) -> None:
        self.rows, self.bits, self.size = rows, bits, size
        self._shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)  # numpy packs the high bit first

    @classmethod
    def of(
        cls, samples: Sequence[Sample], settings: Settings, workers: int = 2, device: str | torch.device = "cpu"
    ) -> Masks | None:
        """Decode the masks of `samples`, resized to the settings' size by nearest neighbour.

        Returns None if the settings or the images have no masks: there are no pixel metrics then.

        Raises:
            InputError: a mask cannot be read, or does not fit its image.
        """
        size, above = settings.img_size, settings.mask_above
        has_mask = torch.tensor([bool(sample.masks) for sample in samples])
        if not settings.pixel_metrics or not has_mask.any():
            return None
        masked = [sample for sample in samples if sample.masks]
        masks = prefetch(lambda sample: load_mask(sample, size, above), masked, workers)
        bits = np.stack([np.packbits(mask.numpy().ravel()) for mask in masks])
        rows = torch.full((len(samples),), -1)
        rows[has_mask] = torch.arange(len(masked))
        return cls(rows, torch.from_numpy(bits).to(device), size)

    @classmethod
    def pack(cls, masks: Tensor) -> Masks:
        """Pack masks (M, S, S) bool."""
        bits = np.packbits(masks.cpu().flatten(1).numpy(), axis=1)
        return cls(torch.arange(len(masks)), torch.from_numpy(bits), masks.shape[-1])

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, part: Part) -> Tensor:
        """Masks of some images, (B, S, S) bool, on the device of the bits; all False for an image without a mask."""
        rows = self.rows[part if isinstance(part, slice) else torch.as_tensor(part)]
        result = torch.zeros(len(rows), self.size, self.size, dtype=torch.bool, device=self.bits.device)
        held = (rows >= 0).nonzero()[:, 0].to(self.bits.device)
        if len(held):
            bits = self.bits[rows[rows >= 0].to(self.bits.device), :, None] >> self._shifts & 1
            result[held] = bits.flatten(1)[:, : self.size**2].unflatten(1, (self.size, self.size)).bool()
        return result

    def select(self, keep: Sequence[int]) -> Masks:
        """The masks of some of the images."""
        return Masks(self.rows[torch.as_tensor(keep, dtype=torch.long)], self.bits, self.size)


@torch.no_grad()
def evaluate(
    detector: Detector, store: TokenStore, items: Sequence[Sample], text_features: Tensor | None = None
) -> Evaluation:
    """Score images with the detector as it is now.

    Several processes divide the batches among themselves and exchange the patch scores. Each returns the whole result,
    which is that of a single process to the bit.

    Args:
        detector: adapters and prompts; its settings name the head and the images that are scored together.
        store: holds the tokens of the images that this process scores.
        items: images, or views of them.
        text_features: (D, 2), if the caller has computed them already.

    Raises:
        InputError: a score is NaN or infinite (the message names the image), or token files are gone.
    """
    settings = detector.settings
    text = detector.prompts() if text_features is None else text_features  # float32, as published
    batches = scoring_batches(items, settings, store.device)

    def score(batch: Sequence[Sample]) -> Tensor:
        tokens = store.get(store.rows(batch))
        if not detector.adapters.mixes_images:  # otherwise, filling up a batch would change its scores
            tokens = [filled(layer, store.chunk) for layer in tokens]
        return detector.patch_scores(tokens, text)[: len(batch)]

    with torch.autocast(store.device.type, dtype=store.autocast, enabled=store.autocast is not None):
        mine = [store.with_room(partial(score, batch)) for batch in distributed.share(batches)]
    if distributed.world() > 1:
        shares = distributed.all_gather([scores.cpu() for scores in mine])
        mine = [shares[i % distributed.world()][i // distributed.world()].to(text.device) for i in range(len(batches))]
    scores = torch.cat(mine)
    finite = scores.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        first = items[int(finite.to(torch.uint8).argmin())].name
        raise InputError(f"the score of {first} is not finite: diverged (lower --learning_rate), or a damaged image")
    return Evaluation(items, scores, detector.scoring_head, settings.img_size, settings.dec_type)


def scoring_batches(items: Sequence[Sample], settings: Settings, device: torch.device) -> list[Sequence[Sample]]:
    """Batches that are scored together: chunks of the device's size, or `eval_batch` if images attend to each other."""
    mixes = mixes_images(settings.visionA, settings.fidelity == "corrected")
    size = settings.eval_batch if mixes else chunk_size(device)
    return [items[start : start + size] for start in range(0, len(items), size)]


def own_batches(samples: Sequence[Sample], settings: Settings, device: torch.device) -> Sequence[Sequence[Sample]]:
    """The batches that this process scores in `evaluate`; all of them if it is the only process."""
    return distributed.share(scoring_batches(samples, settings, device))
