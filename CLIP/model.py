"""CLIP's two towers, frozen: images -> tokens after chosen layers, token embeddings -> text embeddings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from utils import InputError

from .transformer import Transformer

# What OpenAI's CLIP was trained with (`corrected` fidelity); the published MadCLIP code leaves images in [0, 1].
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
CONFIG_FOLDER = Path(__file__).parent / "model_configs"


@dataclass(frozen=True)
class ModelConfig:
    """Every size of a CLIP model, read from model_configs/NAME.json."""

    name: str
    embed_dim: int  # D
    quick_gelu: bool  # the activation that the OpenAI-style weights of this model were trained with
    image_size: int
    patch_size: int
    width: int  # C
    layers: int
    heads: int
    context_length: int
    vocab_size: int
    text_width: int
    text_layers: int
    text_heads: int
    weights: dict[str, str]  # pretrain -> file name under CLIP/ckpt

    @classmethod
    def load(cls, name: str) -> ModelConfig:
        """Read model_configs/NAME.json; `InputError` for an unknown name."""
        path = CONFIG_FOLDER / f"{name}.json"
        if name not in list_models():
            raise InputError(f"--model_name {name}: unknown; there are {', '.join(list_models())}")
        data = json.loads(path.read_text())
        vision, text = data["vision_cfg"], data["text_cfg"]
        return cls(
            name=name,
            embed_dim=data["embed_dim"],
            quick_gelu=data["quick_gelu"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["width"],
            layers=vision["layers"],
            heads=vision["width"] // vision["head_width"],
            context_length=text["context_length"],
            vocab_size=text["vocab_size"],
            text_width=text["width"],
            text_layers=text["layers"],
            text_heads=text["heads"],
            weights=data["weights"],
        )

    def grid(self, img_size: int) -> int:
        """Patches along a side at `img_size` pixels; a rest smaller than a patch is dropped, as published."""
        if img_size < self.patch_size:
            raise InputError(f"--img_size {img_size} is smaller than a patch of {self.name} ({self.patch_size} pixels)")
        return img_size // self.patch_size

    def default_features(self) -> list[int]:
        """The layers at the four quarters of the depth: 6 12 18 24 of 24, 3 6 9 12 of 12."""
        return [self.layers * quarter // 4 for quarter in (1, 2, 3, 4)]


def list_models() -> list[str]:
    """Names that `create_model` knows."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.json"))


def resize_positional_embedding(embedding: Tensor, grid: int) -> Tensor:
    """Resize the grid part of (1 + g * g, C) to (1 + grid * grid, C): bicubic, antialiased; the class row stays."""
    class_row, rows = embedding[:1], embedding[1:]
    old = round(len(rows) ** 0.5)
    if old == grid:
        return embedding
    square = rows.T.reshape(1, -1, old, old)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([class_row, square.flatten(2)[0].T])


class VisionTower(nn.Module):
    """The image tower at one image size."""

    def __init__(self, config: ModelConfig, img_size: int, quick_gelu: bool, normalize_pixels: bool) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        self.normalize_pixels = normalize_pixels
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(config.grid(img_size) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.layers, config.heads, quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, config.embed_dim))

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] -> tokens before the first block (B, L, C), class token first."""
        if self.normalize_pixels:
            images = normalize(images, PIXEL_MEAN, PIXEL_STD)
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # (B, N, C)
        class_token = self.class_embedding.expand(len(images), 1, -1)
        return self.ln_pre(torch.cat([class_token.to(patches.dtype), patches], dim=1) + self.positional_embedding)

    def forward_intermediates(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Tokens after the given blocks, in one pass that stops at the deepest.

        Args:
            images: (B, 3, S, S) in [0, 1].
            layers: numbers counted from 1, in any order.

        Returns:
            One (B, L, C) tensor an entry of `layers`, in its order; the class token comes first.
        """
        x = self.embed(images)
        kept = {}
        for number, block in enumerate(self.transformer.resblocks[: max(layers)], start=1):
            x = block(x)
            if number in layers:
                kept[number] = x
        return [kept[number] for number in layers]

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] -> image embeddings (B, D), not normalised."""
        tokens = self.forward_intermediates(images, [len(self.transformer.resblocks)])[0]
        return self.ln_post(tokens[:, 0]) @ self.proj


class TextTower(nn.Module):
    """The text tower, from token ids or from embeddings that hold learnable contexts."""

    def __init__(self, config: ModelConfig, quick_gelu: bool) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.text_width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.text_width))
        self.transformer = Transformer(config.text_width, config.text_layers, config.text_heads, quick_gelu)
        self.ln_final = nn.LayerNorm(config.text_width)
        self.text_projection = nn.Parameter(torch.empty(config.text_width, config.embed_dim))

    def add_positions(self, embeddings: Tensor) -> Tensor:
        """Token embeddings (B, T, W) with their positional embedding."""
        return embeddings + self.positional_embedding[: embeddings.shape[1]]

    def pool(self, x: Tensor, eot: Tensor, causal: bool) -> Tensor:
        """Input of the last block (B, T, W), end-of-text positions (B,) -> (B, D), through that position alone."""
        return self.ln_final(self.transformer.resblocks[-1].forward_at(x, eot, causal)) @ self.text_projection

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) -> text embeddings (B, D), not normalised; causal mask, pooled at the highest id.

        No position after the last end of text of the batch is computed: nothing before can see it.
        """
        eot = ids.argmax(dim=-1)
        x = self.add_positions(self.token_embedding(ids[:, : int(eot.max()) + 1]))
        for block in self.transformer.resblocks[:-1]:
            x = block(x, causal=True)
        return self.pool(x, eot, causal=True)


@dataclass(frozen=True)
class WeightsInfo:
    """Where the weights came from: goes into every checkpoint and into the key of every stored feature."""

    pretrain: str  # openai | laion400m | random
    source: str  # file name, or the seed of random weights
    sha256: str  # of the file; for random weights, of the words that make them


class CLIP(nn.Module):
    """A frozen CLIP: two towers, no gradients in any weight, evaluation mode for good."""

    def __init__(self, config: ModelConfig, img_size: int, quick_gelu: bool, normalize_pixels: bool = False) -> None:
        super().__init__()
        self.config = config
        self.img_size = img_size
        self.quick_gelu = quick_gelu
        self.info: WeightsInfo | None = None
        self.half_rounded = False  # weights went through float16, as published
        self.visual = VisionTower(config, img_size, quick_gelu, normalize_pixels)
        self.text = TextTower(config, quick_gelu)
        self.logit_scale = nn.Parameter(torch.empty(()))  # part of every weight file; the method does not use it
        self.requires_grad_(False)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.logit_scale.device

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] -> (B, D), not normalised."""
        return self.visual(images)

    @torch.no_grad()
    def image_tokens(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """`VisionTower.forward_intermediates` without a graph."""
        return self.visual.forward_intermediates(images, layers)

    @torch.no_grad()
    def encode_text(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) -> (B, D), not normalised."""
        return self.text(ids)
