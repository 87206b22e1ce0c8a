"""The byte-pair encoder against stored ids, and against open_clip's on many scripts."""

# ruff: noqa: RUF001 (look-alike characters are tested)
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from CLIP.tokenizer import EOT, SOT, Tokenizer, _clean, tokenize

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tokenizer.json").read_text(encoding="utf-8"))
TOKENIZER = Tokenizer.default()

# First and last character of the ranges from which random strings are drawn.
SCRIPTS = (
    "az", "AZ", "\u00c0\u024f", "\u0370\u03ff", "\u0400\u04ff", "\u0590\u05ff", "\u0600\u06ff", "\u0900\u097f",
    "\u0e01\u0e5b", "\u3041\u30ff", "\u4e00\u9fff", "\uac00\ud7a3", "\U0001f300\U0001f64f", "09",
    "\u2150\u218b", "!/", ":@", "\u2010\u205e", "\u2000\u200f", "\x00\x1f", "\x80\xbf", "\uff01\uffee",
    "\u200b\u200d", "\ud800\ud810",
)  # fmt: skip
PIECES = [
    *("&amp;", "&lt;b&gt;", "&amp;lt;", "&nbsp;", "&#233;", "&#x1F600;", "&#28;", "&#xD800;", "&eacute", "&notit;"),
    *("schÃ¶n", "â€œquotedâ€\x9d", "Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "l’humanitÃ©", "ï¿½", "\ufeff"),
    *("don't", "WE'LL", "it's", "it'ſ", "'Re", "İI", "ß", "ﬁ", "e\u0301", "👩\u200d⚕️", "🇮🇹", "Ⅷ½²"),
    *("  ", "\t\n", "\r\n", "\x85", "\u3000", "_", "...", "!!!", "a photo of a", "<|", "|>", "endoftext", "</w>"),
]


def padded(ids: list[int], length: int = 77) -> list[int]:
    return ids + [0] * (length - len(ids))


def random_text(rng: random.Random) -> str:
    """One to eight words, with or without spaces between them; each is from one script or a special piece."""
    words = []
    for _ in range(rng.randint(1, 8)):
        if rng.random() < 0.3:
            words.append(rng.choice(PIECES))
        else:
            low, high = map(ord, rng.choice(SCRIPTS))
            words.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 9))))
    return rng.choice(("", " ", " ", " ")).join(words)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: ascii(case["text"])[:30])
def test_golden_case(case: dict[str, Any]) -> None:
    tokens = tokenize(case["text"])
    assert str(tokens.dtype) == f"torch.{GOLDEN['dtype']}"
    assert tokens.shape == (1, GOLDEN["context_length"])
    assert tokens[0].tolist() == padded(case["ids"])
    assert tokens[0].argmax().item() == case["argmax_position"]


@pytest.mark.parametrize("case", GOLDEN["too_long"], ids=lambda case: str(case["full_length_with_sot_eot"]))
def test_too_long(case: dict[str, Any]) -> None:
    assert len(TOKENIZER.encode(case["text"])) + 2 == case["full_length_with_sot_eot"]
    assert case["default_raises"] == "RuntimeError"
    with pytest.raises(RuntimeError, match=rf"needs {case['full_length_with_sot_eot']} tokens, at most 77") as caught:
        tokenize(case["text"])
    assert type(caught.value) is RuntimeError
    assert tokenize(case["text"], truncate=True)[0].tolist() == case["ids_with_truncate"]


def test_equals_open_clip_on_many_scripts() -> None:
    from open_clip.tokenizer import SimpleTokenizer  # noqa: PLC0415 (slow to import)

    theirs = SimpleTokenizer()
    rng = random.Random(40)
    texts = [random_text(rng) for _ in range(4000)]
    texts = [text for text in texts if SOT not in _clean(text) and EOT not in _clean(text)]
    assert len(texts) > 3900
    for text in texts:
        ids = TOKENIZER.encode(text)
        assert ids == theirs.encode(text), ascii(text)
    assert torch.equal(tokenize(texts, truncate=True).long(), theirs(texts))
