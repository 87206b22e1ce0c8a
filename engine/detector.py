"""The trainable model on top of the frozen towers: features -> scores, once for training, evaluation and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from CLIP import CLIP, DualBranchAdapters
from CLIP.adapter_shared import BRANCHES, HEADS
from loss import anomaly_map, image_score
from Prompt import PromptChooser


@dataclass(frozen=True)
class Settings:
    """Everything that shaped a checkpoint: stored in it, and obeyed by whoever reads it."""

    obj: str
    model_name: str
    pretrain: str
    fidelity: str
    img_size: int
    features_list: tuple[int, ...]
    visionA: str
    text_mood: str
    contrast_mood: str
    dec_type: str
    loss_type: str
    prompt_name: str  # what the prompts call the object
    pixel_metrics: bool  # the data set has masks: images are scored by their segmentation maps
    weights_sha256: str
    eval_batch: int  # images scored together: MViTFC in `released` fidelity depends on it
    states: dict[str, list[str]] | None = None  # state phrases of --prompts; None: the published ones

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """The inverse of `to_dict`; unknown entries are ignored and late ones default, so any version reads any."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values or f.default is MISSING}
        return cls(**{**known, "features_list": tuple(known["features_list"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON and for checkpoints read with weights_only=True."""
        return {**asdict(self), "features_list": list(self.features_list)}


class Detector(nn.Module):
    """Adapters and prompts: what MadCLIP trains.

    Args:
        clip: the frozen towers; not registered, so they are neither trained nor saved.
        settings: kinds and sizes.
    """

    def __init__(self, clip: CLIP, settings: Settings) -> None:
        super().__init__()
        corrected = settings.fidelity == "corrected"
        self.settings = settings
        self.prompts = PromptChooser(clip, settings.prompt_name, settings.text_mood, corrected, settings.states)
        self.adapters = DualBranchAdapters(
            settings.visionA,
            clip.config.width,
            clip.config.embed_dim,
            settings.features_list,
            contrast=settings.contrast_mood == "yes",
            across_tokens=corrected,
        )
        self.eval()  # as published, also while training

    def forward(self, tokens: Sequence[Tensor], text_features: Tensor, heads: Sequence[str] = HEADS) -> list[Tensor]:
        """K token tensors (B, T, C) and text features (D, 2) -> one (K, B, N, 2) of scores a head."""
        return self.adapters(tokens, text_features, heads)

    @torch.no_grad()
    def score(self, tokens: Sequence[Tensor], text_features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Anomaly scores, as published.

        With masks, an image scores as its highest pixel of the anomaly map; without, by the detection heads.
        Only the head that is read is computed.

        Returns:
            Image scores (B,) in [0, K], and maps (B, S, S) in [0, K], or None without masks.
        """
        if self.settings.pixel_metrics:
            maps = self.anomaly_maps(tokens, text_features)
            return maps.flatten(1).amax(dim=1), maps
        (det,) = self(tokens, text_features, ("det",))
        return image_score(det.float(), self.settings.dec_type), None

    @torch.no_grad()
    def anomaly_maps(self, tokens: Sequence[Tensor], text_features: Tensor) -> Tensor:
        """(B, S, S) in [0, K], from the segmentation heads."""
        (seg,) = self(tokens, text_features, ("seg",))
        return anomaly_map(seg.float(), self.settings.img_size)

    def parts(self) -> dict[str, Any]:
        """The trained tensors under the published names of a checkpoint, without copies of frozen weights."""
        parts: dict[str, Any] = {
            f"{branch}_det_adapters": getattr(self.adapters, f"{branch}_det_adapters").state_dict()
            for branch in BRANCHES
        }
        for kind, maker in self.prompts.makers.items():
            state = maker.state_dict()
            parts[f"prompt_maker_{kind}"] = {f"prompt_learner.{name}": tensor for name, tensor in state.items()}
        return parts

    def load_parts(self, parts: dict[str, Any]) -> None:
        """The inverse of `parts`; entries of an embedded text encoder are ignored."""
        for branch in BRANCHES:
            getattr(self.adapters, f"{branch}_det_adapters").load_state_dict(parts[f"{branch}_det_adapters"])
        prefix = "prompt_learner."
        for kind, maker in self.prompts.makers.items():
            stored = parts[f"prompt_maker_{kind}"]
            maker.load_state_dict(
                {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
            )


def make_optimizers(adapters: nn.Module, prompts: nn.Module, learning_rate: float) -> list[torch.optim.Adam]:
    """Adam as published (betas 0.5 and 0.999, no weight decay): one for the adapters, one for the contexts if any."""
    groups = [list(adapters.parameters()), list(prompts.parameters())]
    return [torch.optim.Adam(group, lr=learning_rate, betas=(0.5, 0.999), fused=True) for group in groups if group]
