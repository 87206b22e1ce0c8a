"""Prompts and text features against figures measured on the published implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from CLIP import tokenize
from Prompt.promptChooser import PromptChooser, fixed_sentences, state_phrases
from tests.conftest import VARIANTS, load_golden
from tests.unit.test_golden_backbone import close


def chooser_with_golden_contexts(clip, obj: str, mood: str, causal: bool) -> PromptChooser:
    """A chooser with the stored contexts in place of drawn ones."""
    chooser = PromptChooser(clip, {"Brain": "Brain", "Chest": "Chest X-ray film"}[obj], mood, causal)
    stored = load_golden("prompts")
    with torch.no_grad():
        for maker in chooser.makers.values():
            for name, parameter in maker.ctx.items():
                parameter.copy_(torch.from_numpy(stored[f"ctx/prompt_learner.ctx.{name}"]))
    return chooser


def clip_of(variant: str, tiny_clip):
    return tiny_clip(variant.startswith("quickgelu"))


@pytest.mark.parametrize("obj", ["Brain", "Chest"])
@pytest.mark.parametrize("kind", ["normal", "abnormal"])
def test_sentences_and_ids(golden, tiny_clip, obj, kind):
    data, name = golden("prompts"), {"Brain": "Brain", "Chest": "Chest X-ray film"}[obj]
    sentences = fixed_sentences(kind, name)
    assert sentences == data[f"{obj}/fix/{kind}/sentences"].tolist()
    ids = tokenize(sentences).numpy()
    stored = data[f"{obj}/fix/{kind}/token_ids"]
    assert np.array_equal(ids[:, : stored.shape[1]], stored)
    assert not ids[:, stored.shape[1] :].any()

    states = state_phrases(kind, name)
    assert states == data[f"{obj}/learnable/{kind}/states"].tolist()
    learnable = [f"X X X X X X X X {state}." for state in states]
    assert learnable == data[f"{obj}/learnable/{kind}/sentences"].tolist()
    stored_ids = data[f"{obj}/learnable/{kind}/token_ids"]
    assert np.array_equal(tokenize(learnable).numpy(), stored_ids)
    learner = PromptChooser(tiny_clip(False), name, "learnable_all").makers[kind]
    assert learner.name_lengths == data[f"{obj}/learnable/{kind}/name_lengths"].tolist()
    assert learner.eot.tolist() == stored_ids.argmax(axis=1).tolist() * 3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mood", ["fix", "learnable_all", "learnable_abnormal"])
@pytest.mark.parametrize("obj", ["Brain", "Chest"])
def test_text_features(golden, tiny_clip, obj, mood, variant):
    chooser = chooser_with_golden_contexts(clip_of(variant, tiny_clip), obj, mood, variant.endswith("causal"))
    close(chooser(), golden("prompts")[f"{obj}/{mood}/{variant}/text_features"], 1e-6)


@pytest.mark.parametrize("variant", ["gelu_nomask", "gelu_causal"])
def test_single_prompts(golden, tiny_clip, variant):
    chooser = chooser_with_golden_contexts(tiny_clip(False), "Brain", "learnable_all", variant.endswith("causal"))
    for kind, embeddings in chooser.prompt_embeddings().items():
        close(embeddings, golden("prompts")[f"Brain/learnable_all/{variant}/{kind}/embeddings_21"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_context_gradients(golden, tiny_clip, variant):
    data = golden("prompts")
    chooser = chooser_with_golden_contexts(
        clip_of(variant, tiny_clip), "Brain", "learnable_all", variant.endswith("causal")
    )
    (chooser() * torch.from_numpy(data["grad_vector"])).sum().backward()
    for maker in chooser.makers.values():
        for name, parameter in maker.ctx.items():
            key = f"prompt_learner.ctx.{name}"
            if variant.startswith("quickgelu"):
                norm = float(data[f"Brain/learnable_all/{variant}/grad_norm/{key}"])
                assert float(parameter.grad.norm()) == pytest.approx(norm, rel=1e-4)
            else:
                stored = torch.from_numpy(data[f"Brain/learnable_all/{variant}/grad/{key}"])
                assert float((parameter.grad - stored).norm()) <= 1e-4 * float(stored.norm())
    assert all(weight.grad is None for weight in chooser._clip[0].parameters())


def test_context_initialisation_is_seeded_and_abnormal_first(tiny_clip):
    torch.manual_seed(5)
    expected = torch.empty(7, 8, 128).normal_(0, 0.02)
    torch.manual_seed(5)
    chooser = PromptChooser(tiny_clip(False), "Brain", "learnable_all")
    assert torch.equal(chooser.makers["abnormal"].ctx["abnormal_end"], expected)
