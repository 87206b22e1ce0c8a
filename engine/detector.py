"""The trainable model on top of the frozen towers: tokens -> patch scores, for training, evaluation and prediction."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from CLIP.adapter_shared import BRANCHES, DualBranchAdapters
from CLIP.model import CLIP
from loss import patch_difference
from Prompt.promptChooser import PromptChooser

from .files.config import Settings


def seeded(seed: int, purpose: str) -> torch.Generator:
    """A separate generator for each purpose, so that changing one component leaves all other draws as they are."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Detector(nn.Module):
    """Adapters and prompts: what MadCLIP trains.

    Args:
        clip: the frozen towers; not registered, so they are neither trained nor saved.
        settings: of the checkpoint.
        seed: for the initial adapters and contexts; each has its own generator, so that changing the kind of one leaves
            the other as it is.
    """

    def __init__(self, clip: CLIP, settings: Settings, seed: int = 0) -> None:
        super().__init__()
        corrected = settings.fidelity == "corrected"
        self.settings = settings
        self.prompts = PromptChooser(
            clip, settings.prompt_name, settings.text_mood, corrected, settings.states, seeded(seed, "contexts")
        )
        self.adapters = DualBranchAdapters(
            settings.visionA,
            clip.config.width,
            clip.config.embed_dim,
            settings.features_list,
            contrast=settings.contrast_mood == "yes",
            across_tokens=corrected,
            generator=seeded(seed, "adapters"),
        )
        self.eval()  # as published, even during training

    @property
    def scoring_head(self) -> str:
        """The head whose patch scores are used: `seg` with masks, `det` without."""
        return "seg" if self.settings.pixel_metrics else "det"

    @torch.no_grad()
    def patch_scores(self, tokens: Sequence[Tensor], text_features: Tensor) -> Tensor:
        """Abnormal minus normal score of each layer and patch of B images: (B, K, N) float32.

        Only the scoring head is computed. Image scores and anomaly maps are made from these (see loss.py).
        """
        (scores,) = self.adapters(tokens, text_features, (self.scoring_head,))
        return patch_difference(scores.float())

    def parts(self) -> dict[str, Any]:
        """The trained tensors under the published names of a checkpoint, without copies of frozen weights."""
        parts: dict[str, Any] = {
            f"{branch}_det_adapters": getattr(self.adapters, f"{branch}_det_adapters").state_dict()
            for branch in BRANCHES
        }
        for kind, learner in self.prompts.prompt_learners.items():
            state = learner.state_dict()
            parts[f"prompt_maker_{kind}"] = {f"prompt_learner.{name}": tensor for name, tensor in state.items()}
        return parts

    def load_parts(self, parts: dict[str, Any]) -> None:
        """The inverse of `parts`; entries of an embedded text encoder are ignored."""
        for branch in BRANCHES:
            getattr(self.adapters, f"{branch}_det_adapters").load_state_dict(parts[f"{branch}_det_adapters"])
        prefix = "prompt_learner."
        for kind, learner in self.prompts.prompt_learners.items():
            stored = parts[f"prompt_maker_{kind}"]
            learner.load_state_dict(
                {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
            )


def make_optimizers(adapters: nn.Module, prompts: nn.Module, learning_rate: float) -> list[torch.optim.Adam]:
    """Adam as published (betas 0.5 and 0.999, no weight decay): one for the adapters, one for the contexts if any."""
    groups = [list(adapters.parameters()), list(prompts.parameters())]
    return [torch.optim.Adam(group, lr=learning_rate, betas=(0.5, 0.999), fused=True) for group in groups if group]
