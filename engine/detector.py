"""The trainable model on top of the frozen towers: features -> scores, once for training, evaluation and prediction."""

from __future__ import annotations

import torch
from torch import nn


def make_optimizers(adapters: nn.Module, prompts: nn.Module, learning_rate: float) -> list[torch.optim.Adam]:
    """Adam as published (betas 0.5 and 0.999, no weight decay): one for the adapters, one for the contexts if any."""
    groups = [list(adapters.parameters()), list(prompts.parameters())]
    return [torch.optim.Adam(group, lr=learning_rate, betas=(0.5, 0.999)) for group in groups if group]
