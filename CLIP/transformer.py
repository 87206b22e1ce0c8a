"""The blocks of both towers: pre-norm residual attention (Radford et al. 2021), written for a frozen network.

Parameter names are OpenAI's, so that a weight file loads without a table of names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Prompts of 77 tokens without a mask: there plain products take two thirds of the fused CPU kernel's time.
PLAIN_LENGTHS = range(64, 128)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): the approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply element-wise to a tensor of any shape."""
        return F.silu(1.702 * x).mul_(1 / 1.702)  # silu(y) = y * sigmoid(y): less memory to cross than as written above


class Attention(nn.Module):
    """Multi-head self-attention with q, k, v stacked in `in_proj`, through PyTorch's fused kernel where that pays."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, heads, L, C / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """(B, L, C) -> (B, L, C); with `causal` a position sees itself and those before it."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3C)
        q, k, v = (self.split_heads(part) for part in qkv.chunk(3, dim=-1))
        if not causal and x.device.type == "cpu" and x.shape[1] in PLAIN_LENGTHS:
            mixed = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1) @ v  # (B, heads, L, C / heads)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def forward_at(self, x: Tensor, position: Tensor, causal: bool) -> Tensor:
        """The output at one position per sequence only: x (B, L, C), position (B,) -> (B, C)."""
        width = x.shape[-1]
        rows = torch.arange(len(x), device=x.device)
        weight_q, weight_kv = self.in_proj_weight.split((width, 2 * width))
        bias_q, bias_kv = self.in_proj_bias.split((width, 2 * width))
        q = self.split_heads(F.linear(x[rows, position], weight_q, bias_q).unsqueeze(1))  # (B, heads, 1, C / heads)
        k, v = (self.split_heads(part) for part in F.linear(x, weight_kv, bias_kv).chunk(2, dim=-1))
        mask = None
        if causal:
            mask = (torch.arange(x.shape[1], device=x.device) <= position[:, None])[:, None, None]  # (B, 1, 1, L)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, 1, C / heads)
        return self.out_proj(mixed.flatten(1))


class ResidualAttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, quick_gelu: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU() if quick_gelu else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))

    def forward_at(self, x: Tensor, position: Tensor, causal: bool = False) -> Tensor:
        """The block's output at one position per sequence: x (B, L, C), position (B,) -> (B, C).

        Equal to `forward(x, causal)[range(B), position]`, at the cost of the keys and values only.
        """
        rows = torch.arange(len(x), device=x.device)
        y = x[rows, position] + self.attn.forward_at(self.ln_1(x), position, causal)
        return y + self.mlp(self.ln_2(y))


class Transformer(nn.Module):
    """A stack of residual attention blocks."""

    def __init__(self, width: int, layers: int, heads: int, quick_gelu: bool) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, quick_gelu) for _ in range(layers))
