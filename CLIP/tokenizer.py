"""CLIP's byte-pair encoding: text -> token ids for the text tower."""

from __future__ import annotations

import gzip
import html
from collections.abc import Iterable
from functools import cache, lru_cache
from itertools import pairwise
from math import inf
from pathlib import Path

import ftfy
import regex
import torch

CONTEXT_LENGTH = 77
SOT, EOT = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
MERGES_FILE = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
# CLIP was trained with only the first merges of the file: 512 byte symbols, these, and two special ids make 49408.
MERGES = 48894
# Special tokens, English endings, runs of letters, single digits, runs of any other characters except blanks.
WORDS = regex.compile(
    rf"{regex.escape(SOT)}|{regex.escape(EOT)}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+",
    regex.IGNORECASE,
)


class Tokenizer:
    """Byte-pair encoder over CLIP's 49408 symbols; `Tokenizer.default()` is the shared one.

    The literal texts <|startoftext|> and <|endoftext|> become the special ids, as in OpenAI's code, so <|endoftext|>
    inside a prompt moves the position that the text tower pools (the first occurrence of the highest id).
    """

    def __init__(self) -> None:
        lines = gzip.decompress(MERGES_FILE.read_bytes()).decode("utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines[1 : MERGES + 1]]  # line 0 is a version
        # Each byte maps to a visible character, in the order of the ids: bytes that are visible in Latin-1 come first.
        visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in visible]
        self._letters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(others)}
        letters = list(self._letters.values())
        endings = [letter + WORD_END for letter in letters]
        self._symbols = [*letters, *endings, *("".join(pair) for pair in merges), SOT, EOT]
        self._ids = {symbol: i for i, symbol in enumerate(self._symbols)}
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._word_ids = lru_cache(maxsize=2**16)(self._encode_word)
        self.sot, self.eot, self.vocab_size = self._ids[SOT], self._ids[EOT], len(self._symbols)

    @classmethod
    @cache
    def default(cls) -> Tokenizer:
        """Return the shared tokenizer, which is created at the first call."""
        return cls()

    def encode(self, text: str) -> list[int]:
        """Ids of `text` in [0, 49408), without start, end and padding."""
        return [i for word in WORDS.findall(_clean(text)) for i in self._word_ids(word)]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Ids of one word: the adjacent pair with the best rank is merged until no pair is in the table."""
        if word in (SOT, EOT):
            return (self._ids[word],)
        parts = [self._letters[byte] for byte in word.encode("utf-8")]
        parts[-1] += WORD_END
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self._ranks.get(pair, inf))
            if best not in self._ranks:
                break
            joined: list[str] = []
            for part in parts:  # every occurrence becomes one part, from left to right
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined
        return tuple(self._ids[part] for part in parts)


def tokenize(texts: str | Iterable[str], context_length: int = CONTEXT_LENGTH, truncate: bool = False) -> torch.Tensor:
    """Ids (B, context_length) int32 of one text or several: start, words, end, zeros.

    A text that needs more than `context_length` ids raises a RuntimeError, as in OpenAI's code; with `truncate` it is
    cut, and its last id is replaced by the end.
    """
    tokenizer, texts = Tokenizer.default(), [texts] if isinstance(texts, str) else list(texts)
    tokens = torch.zeros(len(texts), context_length, dtype=torch.int32)
    for row, text in zip(tokens, texts, strict=True):
        ids = [tokenizer.sot, *tokenizer.encode(text), tokenizer.eot]
        if len(ids) > context_length:
            if not truncate:
                shown = text if len(text) <= 60 else f"{text[:60]}..."
                raise RuntimeError(f"{shown!r} needs {len(ids)} tokens, at most {context_length} fit: shorten it")
            ids = [*ids[: context_length - 1], tokenizer.eot]
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int32)
    return tokens


def _clean(text: str) -> str:
    """Repair mojibake, resolve HTML entities (twice, as CLIP was trained), collapse blanks and lower the case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()
