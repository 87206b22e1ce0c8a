"""Adapters and the dual branch: tokens of the frozen tower -> detection and segmentation scores (MadCLIP section 2).

An adapter maps every token (width C) to two vectors in the joint embedding (width D), for detection and segmentation.
There are two branches (normal, abnormal), each with one adapter per layer. A patch's score in a branch is the cosine of
its vector and that branch's text feature, minus the cosine with the other one if `contrast` is set.

Parameter names and shapes are as published; both branches of a layer are computed in one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BRANCHES = ("normal", "abnormal")
HEADS = ("det", "seg")


def _linear(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out, bias=False), nn.LeakyReLU())


class Adapter(nn.Module):
    """A trunk (C -> C) and two heads (C -> D, without bias, LeakyReLU); the kinds differ in the trunk."""

    head_names: dict[str, str]  # det, seg -> the published name of that head's layer

    @staticmethod
    def trunks(adapters: Sequence[Adapter], tokens: Tensor) -> list[Tensor]:
        """The trunks' outputs, which the heads read: tokens (B, T, C) -> one (B, T, C) per adapter."""
        raise NotImplementedError

    def project(self, trunk: Tensor, heads: Sequence[str]) -> Tensor:
        """Apply the given heads in one matrix product: (B, T, C) -> (B, T, heads, D), not normalised."""
        weight = torch.cat([self.get_parameter(f"{self.head_names[head]}.0.weight") for head in heads])
        vectors: Tensor = F.leaky_relu(F.linear(trunk, weight), inplace=True).unflatten(-1, (len(heads), -1))
        return vectors

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, C) -> detection and segmentation vectors, (B, T, D) each."""
        det, seg = self.project(self.trunks([self], tokens)[0], HEADS).unbind(-2)
        return det, seg


class MFCFC(Adapter):
    """Linear, LeakyReLU, normalisation over the channels, then the heads."""

    head_names = {"det": "fc2", "seg": "fc3"}  # noqa: RUF012

    def __init__(self, width: int, embed_dim: int, across_tokens: bool = False) -> None:
        super().__init__()
        self.fc1 = _linear(width, width)
        self.fc2, self.fc3 = _linear(width, embed_dim), _linear(width, embed_dim)

    @staticmethod
    def trunks(adapters: Sequence[Adapter], tokens: Tensor) -> list[Tensor]:
        """See `Adapter.trunks`."""
        hidden = F.linear(tokens, torch.cat([adapter.get_parameter("fc1.0.weight") for adapter in adapters]))
        hidden = F.leaky_relu(hidden, inplace=True)
        return [F.layer_norm(part, part.shape[-1:]) for part in hidden.chunk(len(adapters), dim=-1)]


class MCNNFC(Adapter):
    """1x1 convolution (a linear layer with bias), normalisation over the channels, LeakyReLU, then the heads."""

    head_names = {"det": "fc1", "seg": "fc2"}  # noqa: RUF012

    def __init__(self, width: int, embed_dim: int, across_tokens: bool = False) -> None:
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv1d(width, width, 1))
        self.fc1, self.fc2 = _linear(width, embed_dim), _linear(width, embed_dim)

    @staticmethod
    def trunks(adapters: Sequence[Adapter], tokens: Tensor) -> list[Tensor]:
        """See `Adapter.trunks`."""
        weight = torch.cat([adapter.get_parameter("cnn.0.weight")[..., 0] for adapter in adapters])
        bias = torch.cat([adapter.get_parameter("cnn.0.bias") for adapter in adapters])
        hidden = F.linear(tokens, weight, bias).chunk(len(adapters), dim=-1)
        return [F.leaky_relu(F.layer_norm(part, part.shape[-1:])) for part in hidden]


class MViTFC(Adapter):
    """One post-norm transformer encoder layer, then the heads.

    As published (`across_tokens` False), attention runs across the images of a batch, separately at each token
    position, so an image's scores depend on the rest of its batch; `across_tokens` attends within an image.
    """

    head_names = {"det": "fc", "seg": "fc1"}  # noqa: RUF012

    def __init__(self, width: int, embed_dim: int, across_tokens: bool = False) -> None:
        super().__init__()
        # No dropout: the published model stays in evaluation mode while it trains.
        self.transformer_encoder = nn.TransformerEncoderLayer(
            width, nhead=8, dim_feedforward=width, dropout=0.0, batch_first=across_tokens
        )
        self.fc, self.fc1 = _linear(width, embed_dim), _linear(width, embed_dim)

    @staticmethod
    def trunks(adapters: Sequence[Adapter], tokens: Tensor) -> list[Tensor]:
        """See `Adapter.trunks`; here a token's output also depends on other tokens of the batch."""
        return [adapter.get_submodule("transformer_encoder")(tokens) for adapter in adapters]


ADAPTERS: dict[str, type[Adapter]] = {"MFCFC": MFCFC, "MCNNFC": MCNNFC, "MViTFC": MViTFC}


def reads_class_token(kind: str, across_tokens: bool) -> bool:
    """Whether adapters read the class token (dropped before the scores): if tokens attend to others of their image."""
    return kind == "MViTFC" and across_tokens


def mixes_images(kind: str, across_tokens: bool) -> bool:
    """Whether an image's scores depend on the other images in its batch: MViTFC as published."""
    return kind == "MViTFC" and not across_tokens


class Cosine(torch.autograd.Function):
    """v.d / |v| for vectors (..., D) and a direction (D,), which is not normalised here.

    The vectors are a step's largest tensors: they are not copied, and backward reads them twice (autograd: five times).
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, direction: Tensor) -> Tensor:  # noqa: ANN401 - torch's class lacks fields
        """Scores (...)."""
        norms = vectors.norm(dim=-1)
        scores: Tensor = (vectors @ direction) / norms
        ctx.save_for_backward(vectors, direction, scores, norms)
        return scores

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
        """With s = v.d / |v|: ds/dv = d / |v| - s v / |v|^2, ds/dd = v / |v|."""
        vectors, direction, scores, norms = ctx.saved_tensors
        along_direction = (gradient / norms).to(vectors.dtype)
        along_vectors = (-gradient * scores / norms**2).to(vectors.dtype)
        of_vectors = vectors * along_vectors[..., None]
        of_vectors.addcmul_(along_direction[..., None], direction.to(vectors.dtype))
        learnt = ctx.needs_input_grad[1]  # False for fixed prompts
        return of_vectors, along_direction.flatten() @ vectors.flatten(0, -2) if learnt else None


class DualBranchAdapters(nn.Module):
    """Two branches of adapters for K layers, and their scores.

    `kind` is a key of `ADAPTERS`; `width` is C, `embed_dim` D. `features_list` has the layers, counted from 1; adapter
    k belongs to the k-th. `contrast` subtracts the cosine with the other branch's text feature (MadCLIP section 2, dual
    objective); `across_tokens` lets MViTFC attend within an image (`corrected` fidelity). `generator` draws the initial
    weights, on the CPU; None is torch's global generator.
    """

    def __init__(
        self,
        kind: str,
        width: int,
        embed_dim: int,
        features_list: Sequence[int],
        contrast: bool = True,
        across_tokens: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        branches = []
        with torch.random.fork_rng(devices=[], enabled=generator is not None):  # torch's layers take no generator
            if generator is not None:
                torch.set_rng_state(generator.get_state())
            for _ in BRANCHES:
                adapters = [ADAPTERS[kind](width, embed_dim, across_tokens) for _ in features_list]
                branches.append(nn.ModuleList(adapters))
            if generator is not None:
                generator.set_state(torch.get_rng_state())
        self.normal_det_adapters, self.abnormal_det_adapters = branches
        self.adapter_of_layer = [list(features_list).index(layer) for layer in sorted(features_list)]
        self.contrast = contrast
        self.reads_class_token = reads_class_token(kind, across_tokens)
        self.mixes_images = mixes_images(kind, across_tokens)

    def forward(self, tokens: Sequence[Tensor], text_features: Tensor, heads: Sequence[str] = HEADS) -> list[Tensor]:
        """Scores of every patch, one (K, B, N, 2) per head: [normal branch, abnormal branch].

        They are cosines in [-1, 1], with `contrast` their differences in [-2, 2]. `tokens` are K tensors in ascending
        layer order, (B, N, C), or (B, L, C) with `reads_class_token`; `text_features` (D, 2) has the columns [normal,
        abnormal], each of norm 1.
        """
        normal, abnormal = text_features.unbind(-1)
        directions = (normal - abnormal, abnormal - normal) if self.contrast else (normal, abnormal)
        layers = []
        for k, x in zip(self.adapter_of_layer, tokens, strict=True):
            pair = [cast(Adapter, branch[k]) for branch in (self.normal_det_adapters, self.abnormal_det_adapters)]
            scores = []
            for adapter, trunk, direction in zip(pair, pair[0].trunks(pair, x), directions, strict=True):
                vectors = adapter.project(trunk[:, 1:] if self.reads_class_token else trunk, heads)  # (B, N, heads, D)
                scores.append(Cosine.apply(vectors, direction))  # (B, N, heads)
            layers.append(torch.stack(scores, dim=-1).unbind(-2))  # (B, N, 2) per head
        return [torch.stack(scores) for scores in zip(*layers, strict=True)]
