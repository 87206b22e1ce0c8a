"""Learnable prompt contexts (CoOp, Zhou et al. 2022, section 3.2), in three positions around a state phrase."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from CLIP.model import TextTower
from CLIP.tokenizer import tokenize

POSITIONS = ("end", "front", "middle")  # of the state phrase, in the order of the prompts
CONTEXTS = 8  # context vectors per prompt
CONTEXTS_BEFORE = {"end": CONTEXTS, "front": 0, "middle": CONTEXTS // 2}  # number of contexts before the state phrase
INIT_STD = 0.02


class PromptLearner(nn.Module):
    """The prompts of one class (`kind`): S `states` x `POSITIONS`, each with its own 8 context vectors.

    A prompt is the token sequence of `X X X X X X X X STATE.` with learnable embeddings in place of X, reordered to 8
    contexts, state (`end`); state, 8 contexts (`front`); or 4 contexts, state, 4 contexts (`middle`). The frozen text
    tower's token embeddings are read at construction only. `generator` (None: torch's global one) draws the contexts on
    the CPU, so that a seed gives the same contexts on every device.
    """

    embedded: Tensor  # (3 S, 77, W); `forward` puts in the contexts
    eot: Tensor  # (3 S,)
    context_positions: Tensor  # (3 S, 8)

    def __init__(
        self, text: TextTower, kind: str, states: Sequence[str], generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.kind = kind
        device, shape = text.positional_embedding.device, (len(states), CONTEXTS, text.positional_embedding.shape[-1])
        contexts = [torch.empty(shape).normal_(0, INIT_STD, generator=generator).to(device) for _ in POSITIONS]
        self.ctx = nn.ParameterDict({f"{kind}_{name}": part for name, part in zip(POSITIONS, contexts, strict=True)})
        ids = tokenize([f"{' '.join('X' * CONTEXTS)} {state}." for state in states])
        self.name_lengths = [int(row.argmax()) - 1 for row in tokenize(states)]  # without start and end
        order = torch.tensor(
            [_layout(CONTEXTS_BEFORE[name], length, ids.shape[1]) for name in POSITIONS for length in self.name_lengths]
        )
        is_context = (order >= 1) & (order <= CONTEXTS)
        arranged = ids.repeat(len(POSITIONS), 1).gather(1, order).to(device)
        with torch.no_grad():
            self.register_buffer("embedded", text.token_embedding(arranged), persistent=False)
        # The pooled position is the first occurrence of the highest id, as in CLIP.
        self.register_buffer("eot", arranged.argmax(dim=-1), persistent=False)
        positions = is_context.nonzero()[:, 1].unflatten(0, (-1, CONTEXTS)).to(device)
        self.register_buffer("context_positions", positions, persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Token embeddings (3 S, 77, W), position by position, and their end-of-text positions (3 S,)."""
        contexts = torch.cat([self.ctx[f"{self.kind}_{name}"] for name in POSITIONS])  # (3 S, 8, W)
        prompts = torch.arange(len(contexts), device=contexts.device)[:, None]
        return self.embedded.index_put((prompts, self.context_positions), contexts), self.eot


def _layout(before: int, phrase: int, total: int) -> list[int]:
    """The token order of `X X X X X X X X STATE.` with the state moved behind the first `before` contexts."""
    start, after = 1 + CONTEXTS, 1 + CONTEXTS + phrase
    return [*range(1 + before), *range(start, after), *range(1 + before, start), *range(after, total)]
