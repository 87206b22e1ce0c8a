"""The text tower for learnable prompts, which computes only what a training step changes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from CLIP.model import TextTower


class PromptPass:
    """The text tower for prompts that change at a few positions only; what does not depend on these is computed once.

    This is exact, as the tower is frozen. With the causal mask, no position attends to a later one: rows before a
    prompt's first changing position keep their queries, keys and values in every block, and rows after its end of text
    are skipped. Without a mask, unchanged rows keep theirs in the first block only, as its output changes everywhere.
    It is not in the paper, whose code computes every position of every prompt.

    `embeddings` (B, T, W) are without positional embedding; only their positions `changing` (B, V) will change. `eot`
    (B,) is the position of the end-of-text token. `causal` is CLIP's own mask; the published code has none here.
    """

    @torch.no_grad()
    def __init__(self, text: TextTower, embeddings: Tensor, changing: Tensor, eot: Tensor, causal: bool) -> None:
        self.text, self.eot, self.causal = text, eot, causal
        *blocks, _ = text.transformer.blocks
        if not causal:
            self.length = embeddings.shape[1]
            every = torch.arange(len(embeddings), device=changing.device)[:, None].expand_as(changing)
            self.rows: tuple[Tensor, ...] = (every.flatten(), changing.flatten())  # R = B V pairs
            x = text.add_positions(embeddings)
            self.known = [block.qkv(x) for block in blocks[:1]]  # (B, T, 3W)
            return
        self.length = int(eot.max()) + 1
        first, columns = changing.amin(dim=1), torch.arange(self.length, device=eot.device)
        live = (columns >= first[:, None]) & (columns <= eot[:, None])
        self.rows = live.nonzero(as_tuple=True)  # R pairs, prompt by prompt
        prefix = int(first.max())
        x = text.add_positions(embeddings[:, :prefix])
        known = []
        for block in blocks:
            known.append(block.qkv(x))
            x = block.finish(x, block.attn.attend(known[-1], causal))
        # One (B, length, 3W) for each block except the last, then the input (B, length, W) of the last.
        self.known = [F.pad(part, (0, 0, 0, self.length - prefix)) for part in (*known, x)]

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Text embeddings (B, D), not normalised, of `embeddings` (B, T, W)."""
        x = self.text.add_positions(embeddings[:, : self.length])
        *blocks, _ = self.text.transformer.blocks
        if not self.causal:
            for block, known in zip(blocks, self.known, strict=False):  # the first block only
                qkv = self._insert(known, block.qkv(x[self.rows]))
                x = block.finish(x, block.attn.attend(qkv, self.causal))
            for block in blocks[1:]:
                x = block(x)
            return self.text.pool(x, self.eot, self.causal)
        x = x[self.rows]  # (R, W)
        for block, known in zip(blocks, self.known[:-1], strict=True):
            qkv = self._insert(known, block.qkv(x))  # (B, length, 3W)
            x = block.finish(x, block.attn.attend(qkv, self.causal)[self.rows])
        return self.text.pool(self._insert(self.known[-1], x), self.eot, self.causal)

    def _insert(self, known: Tensor, rows: Tensor) -> Tensor:
        """`known` (B, length, ...) with the R changing rows inserted."""
        return known.to(rows.dtype).index_put(self.rows, rows)
