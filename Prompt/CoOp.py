"""Learnable prompt contexts (CoOp, Zhou et al. 2022, section 3.2), in three positions around a state phrase."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from CLIP.model import TextTower
from CLIP.tokenizer import tokenize

POSITIONS = ("end", "front", "middle")  # where the state phrase stands, in the order of the prompts
CONTEXTS = 8  # context vectors a prompt
BEFORE = {"end": CONTEXTS, "front": 0, "middle": CONTEXTS // 2}  # contexts that stand before the state phrase
INIT_STD = 0.02


class PromptLearner(nn.Module):
    """The prompts of one class: `states` x `POSITIONS`, each with its own 8 context vectors.

    A prompt is the token sequence of `X X X X X X X X STATE.` with the X embeddings learnable and moved:
    end: 8 contexts, state; front: state, 8 contexts; middle: 4 contexts, state, 4 contexts.

    Args:
        text: the frozen text tower, read for its token embeddings at construction only.
        kind: `normal` or `abnormal`, part of the published parameter names.
        states: S state phrases with the object's name in them.
        generator: draws the contexts, on the CPU; None is torch's global one.
    """

    eot: Tensor
    start: Tensor
    rest: Tensor
    context_positions: Tensor  # (3 S, 8)

    def __init__(
        self, text: TextTower, kind: str, states: Sequence[str], generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.kind = kind
        width, device = text.positional_embedding.shape[-1], text.positional_embedding.device
        # Drawn on the CPU, so that a seed means the same contexts on every device.
        shape = (len(states), CONTEXTS, width)
        self.ctx = nn.ParameterDict(
            {
                f"{kind}_{position}": torch.empty(shape).normal_(0, INIT_STD, generator=generator).to(device)
                for position in POSITIONS
            }
        )
        ids = tokenize([f"{' '.join('X' * CONTEXTS)} {state}." for state in states]).to(device)
        with torch.no_grad():
            embedded = text.token_embedding(ids)  # (S, 77, W)
        # The pooled position is the first highest id, as in CLIP; all three layouts keep the same length.
        self.register_buffer("eot", ids.argmax(dim=-1).repeat(len(POSITIONS)), persistent=False)
        self.register_buffer("start", embedded[:, :1], persistent=False)
        self.register_buffer("rest", embedded[:, 1 + CONTEXTS :], persistent=False)  # state, full stop, end, padding
        self.name_lengths = [len(_bare_ids(state)) for state in states]
        positions = [
            [1 + number + (length if number >= BEFORE[position] else 0) for number in range(CONTEXTS)]
            for position in POSITIONS
            for length in self.name_lengths
        ]
        self.register_buffer("context_positions", torch.tensor(positions, device=device), persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Token embeddings (3 S, 77, W), position by position, and their end-of-text positions (3 S,)."""
        prompts = [
            self._arrange(position, state, length)
            for position in POSITIONS
            for state, length in enumerate(self.name_lengths)
        ]
        return torch.stack(prompts), self.eot

    def _arrange(self, position: str, state: int, length: int) -> Tensor:
        """One prompt (77, W): the state phrase is the first `length` tokens of `rest`."""
        contexts = self.ctx[f"{self.kind}_{position}"][state]
        start, phrase, tail = self.start[state], self.rest[state, :length], self.rest[state, length:]
        before = BEFORE[position]
        return torch.cat([start, contexts[:before], phrase, contexts[before:], tail])


def _bare_ids(phrase: str) -> list[int]:
    """Token ids of a phrase without start, end and padding."""
    ids = tokenize(phrase)[0]
    return ids[1 : int(ids.argmax())].tolist()
