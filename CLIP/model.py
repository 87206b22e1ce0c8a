"""CLIP's two frozen towers: images -> tokens after chosen layers, token ids or embeddings -> text embeddings.

Radford et al. 2021, section 2.4; MadCLIP (section 2) uses the image tower's tokens after four of its layers.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ImageTower, ModelConfig
from .transformer import Transformer
from .weights import Weights


def resize_positional_embedding(embedding: Tensor, grid: int, antialias: bool = True) -> Tensor:
    """Resize the grid part of (1 + g * g, C) to (1 + grid * grid, C), bicubic; the class row is kept."""
    class_row, rows = embedding[:1], embedding[1:]
    old = round(len(rows) ** 0.5)
    if old == grid:
        return embedding
    square = rows.T.reshape(1, -1, old, old)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", antialias=antialias, align_corners=False)
    return torch.cat([class_row, square.flatten(2)[0].T])


class VisionTower(nn.Module):
    """The image tower for one image size: CLIP's, or DINOv2, which has no projection into the joint embedding."""

    def __init__(self, config: ModelConfig, img_size: int, quick_gelu: bool, normalize_pixels: bool) -> None:
        super().__init__()
        width, patch, tower = config.width, config.patch_size, config.tower
        if tower.name:  # DINOv2 never uses QuickGELU and always normalises pixels
            quick_gelu, normalize_pixels = False, True
        self.normalize_pixels = normalize_pixels
        self.pixel_mean, self.pixel_std = list(config.pixel_mean), list(config.pixel_std)
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=tower.patch_bias)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(config.grid(img_size) ** 2 + 1, width))
        self.registers = nn.Parameter(torch.empty(tower.registers, width)) if tower.registers else None
        self.ln_pre = nn.LayerNorm(width) if tower.pre_norm else nn.Identity()
        self.transformer = Transformer(width, config.layers, config.heads, quick_gelu, config.mlp_ratio, tower)
        self.ln_post = nn.LayerNorm(width, tower.norm_eps)
        self.proj = None if tower.name else nn.Parameter(torch.empty(width, config.embed_dim))

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] -> the first block's input (B, T, C): class token, any registers, patches."""
        if self.normalize_pixels:
            mean, std = (images.new_tensor(values)[:, None, None] for values in (self.pixel_mean, self.pixel_std))
            images = (images - mean) / std
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # (B, N, C)
        class_token = self.class_embedding.expand(images.shape[0], 1, -1)
        x = torch.cat([class_token.to(patches.dtype), patches], dim=1) + self.positional_embedding
        if self.registers is not None:  # between the class token and the patches, without a position
            x = torch.cat([x[:, :1], self.registers.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        tokens: Tensor = self.ln_pre(x)
        return tokens

    def forward_intermediates(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Tokens (the class token, then the patches) after the given blocks, in one pass that stops at the deepest.

        Images (B, 3, S, S) in [0, 1], layers counted from 1 in any order -> one (B, L, C) per layer, in that order.
        """
        x, kept = self.embed(images), {}
        for number, block in enumerate(self.transformer.blocks[: max(layers)], start=1):
            x = block(x)
            if number in layers:
                kept[number] = x
        if self.registers is not None:
            patches = 1 + len(self.registers)
            kept = {number: torch.cat([x[:, :1], x[:, patches:]], dim=1) for number, x in kept.items()}
        return [kept[number] for number in layers]

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] -> image embeddings (B, D), not normalised; DINOv2's are (B, C)."""
        tokens = self.forward_intermediates(images, [len(self.transformer.blocks)])[0]
        embeddings: Tensor = self.ln_post(tokens[:, 0])
        return embeddings if self.proj is None else embeddings @ self.proj


class TextTower(nn.Module):
    """The text tower; its input is token ids, or embeddings with learnable contexts."""

    def __init__(self, config: ModelConfig, quick_gelu: bool) -> None:
        super().__init__()
        width = config.text_width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        sizes = config.text_layers, config.text_heads
        self.transformer = Transformer(width, *sizes, quick_gelu, config.text_mlp_ratio, ImageTower())
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config.embed_dim))

    def add_positions(self, embeddings: Tensor) -> Tensor:
        """Token embeddings (B, T, W) plus their positional embedding."""
        return embeddings + self.positional_embedding[: embeddings.shape[1]]

    def pool(self, x: Tensor, eot: Tensor, causal: bool) -> Tensor:
        """Last block and projection at the end of text only: block input (B, T, W), positions (B,) -> (B, D)."""
        pooled: Tensor = self.ln_final(self.transformer.blocks[-1].forward_at(x, eot, causal)) @ self.text_projection
        return pooled

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) -> text embeddings (B, D), not normalised; causal mask, pooled at the highest id.

        Positions after the last end of text in the batch are skipped: with the causal mask, they have no effect.
        """
        eot = ids.argmax(dim=-1)
        x = self.add_positions(self.token_embedding(ids[:, : int(eot.max()) + 1]))
        for block in self.transformer.blocks[:-1]:
            x = block(x, causal=True)
        return self.pool(x, eot, causal=True)


class CLIP(nn.Module):
    """A frozen CLIP for images of `img_size` pixels a side: no weight requires gradients; evaluation mode.

    `quick_gelu` selects the activation, see `clip.uses_quick_gelu`; `normalize_pixels` subtracts the config's mean and
    divides by its std (`corrected` fidelity). If `vision` is False, there is no image tower (`visual` is None), for
    runs that already have all tokens.
    """

    def __init__(
        self, config: ModelConfig, img_size: int, quick_gelu: bool, normalize_pixels: bool = False, vision: bool = True
    ) -> None:
        super().__init__()
        self.config, self.img_size, self.quick_gelu = config, img_size, quick_gelu
        self.info: Weights | None = None
        self.visual = VisionTower(config, img_size, quick_gelu, normalize_pixels) if vision else None
        self.text = TextTower(config, quick_gelu)
        self.logit_scale = nn.Parameter(torch.empty(()))  # part of every weight file; the method does not use it
        self.requires_grad_(False)
        self.eval()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.logit_scale.device

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] -> (B, D), not normalised."""
        return self._image_tower().forward(images)

    @torch.no_grad()
    def image_tokens(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """`VisionTower.forward_intermediates` without gradients."""
        return self._image_tower().forward_intermediates(images, layers)

    @torch.no_grad()
    def encode_text(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) -> (B, D), not normalised."""
        return self.text.forward(ids)

    def _image_tower(self) -> VisionTower:
        if self.visual is None:
            raise RuntimeError("this CLIP was made without its image tower (vision=False)")
        return self.visual
