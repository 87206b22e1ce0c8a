"""What the runs of one process share: loaded CLIP weights, and one feature store for each of them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from CLIP import CLIP, create_model

from .detector import Detector
from .features import FeatureStore, Item
from .options import make_store

MOST = 2  # towers in memory: an ablation alternates between the two kinds of fidelity


class Towers:
    """Stands in for `create_model` and `make_store` where several runs follow each other.

    Args:
        layers: all layers that the runs read, so that one pass serves them all.
        class_token: whether any run reads the class token.
    """

    def __init__(self, layers: Iterable[int] = (), class_token: bool = False) -> None:
        self.layers, self.class_token = frozenset(layers), class_token
        self._clips: dict[tuple, CLIP] = {}
        self._stores: dict[CLIP, FeatureStore] = {}

    def clip(
        self, model_name: str, pretrained: str, img_size: int, *, weights: str | Path | None, fidelity: str, seed: int,
        device: torch.device,
    ) -> CLIP:  # fmt: skip
        """See `create_model`; frozen weights that are loaded already are not loaded again."""
        drawn_from = seed if pretrained == "random" else None
        key = (model_name, pretrained, img_size, str(weights), fidelity, drawn_from, str(device))
        if key not in self._clips:
            if len(self._clips) == MOST:
                oldest = self._clips.pop(next(iter(self._clips)))
                self._stores.pop(oldest, None)
            self._clips[key] = create_model(
                model_name, pretrained, img_size, weights=weights, fidelity=fidelity, seed=seed, device=device
            )
        return self._clips[key]

    def store(self, options: argparse.Namespace, clip: CLIP, detector: Detector) -> SharedStore:
        """See `make_store`; the machine flags of the first run hold for all."""
        if clip not in self._stores:
            self._stores[clip] = make_store(options, clip, detector, self.layers, self.class_token)
        store = self._stores[clip]
        return SharedStore(store, detector.settings.features_list, detector.adapters.reads_class_token)


class SharedStore:
    """A `FeatureStore` as one run sees it: some of the layers that it keeps, and the class token or not."""

    def __init__(self, store: FeatureStore, layers: Sequence[int], class_token: bool) -> None:
        self.store = store
        self.places = [store.backbone.layers.index(layer) for layer in sorted(layers)]
        self.drops_class_token = store.backbone.class_token and not class_token

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever else a store offers
        return getattr(self.store, name)

    def release_tower(self) -> None:
        """Later runs may have other images, so the tower stays."""

    def get(self, items: Sequence[Item]) -> list[Tensor]:
        """See `FeatureStore.get`."""
        layers = self.store.get(items, self.places)
        return [layer[:, 1:].contiguous() for layer in layers] if self.drops_class_token else layers
