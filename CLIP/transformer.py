"""The blocks of both towers: pre-norm residual attention (Radford et al. 2021, section 2.4), for a frozen network.

Parameter names are OpenAI's, so that weight files load without renaming.
"""

from collections import OrderedDict
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ImageTower

# Sequence lengths for plain products on a CPU: for 77 tokens without a mask, they take 2/3 of the fused kernel's time.
PLAIN_LENGTHS = range(64, 128)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): the approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply element-wise to a tensor of any shape."""
        return F.silu(1.702 * x).mul_(1 / 1.702)  # silu(y) = y * sigmoid(y): less memory traffic than the formula above


class Attention(nn.Module):
    """Multi-head self-attention with q, k, v stacked in `in_proj`, through PyTorch's fused kernel if it is faster."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def attend(self, qkv: Tensor, causal: bool) -> Tensor:
        """The heads' outputs, before `out_proj`: (B, L, 3C) -> (B, L, C); `causal`: no position sees later ones."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        if not causal and qkv.device.type == "cpu" and qkv.shape[1] in PLAIN_LENGTHS:
            mixed: Tensor = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return mixed.transpose(1, 2).flatten(2)  # from (B, heads, L, C / heads)

    def attend_at(self, x: Tensor, position: Tensor, causal: bool) -> Tensor:
        """`attend` at one position per sequence only (not in the paper): input x (B, L, C), position (B,) -> (B, C).

        No keys or values are computed. A head's scores are q.(Wk x + bk) = (Wk' q).x + q.bk; the softmax ignores the
        last term. Its output is sum p (Wv x + bv) = Wv (sum p x) + bv: Wv is applied to one vector instead of L.
        """
        rows = torch.arange(len(x), device=x.device)
        weight_q, weight_k, weight_v = self.in_proj_weight.chunk(3)
        bias_q, _, bias_v = self.in_proj_bias.chunk(3)
        q = F.linear(x[rows, position], weight_q, bias_q).unflatten(-1, (self.heads, -1))  # (B, heads, C / heads)
        keys, values = (weight.unflatten(0, (self.heads, -1)) for weight in (weight_k, weight_v))
        q = torch.einsum("bhd,hdc->bhc", q * q.shape[-1] ** -0.5, keys)
        scores = q @ x.transpose(1, 2)  # (B, heads, L)
        if causal:
            later = torch.arange(x.shape[1], device=x.device) > position[:, None]
            scores = scores.masked_fill(later[:, None], -torch.inf)
        mixed = scores.softmax(dim=-1) @ x  # (B, heads, C)
        return torch.einsum("bhc,hdc->bhd", mixed, values).flatten(1) + bias_v


class SwiGLU(nn.Module):
    """SiLU of the first half of the channels times the second half, in place of an activation (DINOv2 ViT-g)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., 2 H) -> (..., H)."""
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class ResidualAttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); DINOv2 scales the channels of both outputs (`ls_1`, `ls_2`)."""

    def __init__(self, width: int, heads: int, quick_gelu: bool, mlp_ratio: float, tower: ImageTower) -> None:
        super().__init__()
        hidden = round(width * mlp_ratio)
        if tower.swiglu:
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8  # three matrices with as many weights as the MLP's two
        self.ln_1 = nn.LayerNorm(width, tower.norm_eps)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, tower.norm_eps)
        gelu = SwiGLU() if tower.swiglu else QuickGELU() if quick_gelu else nn.GELU()
        c_fc = nn.Linear(width, hidden * (1 + tower.swiglu))
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=gelu, c_proj=nn.Linear(hidden, width)))
        self.ls_1, self.ls_2 = (nn.Parameter(torch.empty(width)) if tower.layer_scale else None for _ in range(2))

    def qkv(self, x: Tensor) -> Tensor:
        """Queries, keys and values of the block's input, side by side: (..., C) -> (..., 3C)."""
        return F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The block's output from its input and the attention heads' outputs: (..., C) twice -> (..., C)."""
        added: Tensor = self.attn.out_proj(mixed)
        x = x + (added if self.ls_1 is None else added * self.ls_1)
        added = self.mlp(self.ln_2(x))
        return x + (added if self.ls_2 is None else added * self.ls_2)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        return self.finish(x, self.attn.attend(self.qkv(x), causal))

    def forward_at(self, x: Tensor, position: Tensor, causal: bool = False) -> Tensor:
        """`forward(x, causal)[range(B), position]`, computed there only: x (B, L, C), position (B,) -> (B, C)."""
        rows = torch.arange(len(x), device=x.device)
        return self.finish(x[rows, position], self.attn.attend_at(self.ln_1(x), position, causal))


class Transformer(nn.Module):
    """A stack of residual attention blocks."""

    def __init__(
        self, width: int, layers: int, heads: int, quick_gelu: bool, mlp_ratio: float, tower: ImageTower
    ) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, quick_gelu, mlp_ratio, tower) for _ in range(layers)
        )

    @property
    def blocks(self) -> list[ResidualAttentionBlock]:
        """The blocks from first to last."""
        return [cast(ResidualAttentionBlock, block) for block in self.resblocks]
