"""Prompts and text features against values measured on the published implementation."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from CLIP.clip import load_state, random_state
from CLIP.model import CLIP, ModelConfig, TextTower
from CLIP.tokenizer import tokenize
from Prompt.prompt_pass import PromptPass
from Prompt.promptChooser import PromptChooser
from Prompt.states import fixed_sentences, state_phrases
from tests.conftest import VARIANTS, load_golden
from tests.unit.test_golden_backbone import close


def chooser_with_golden_contexts(clip, obj: str, mood: str, causal: bool) -> PromptChooser:
    """A chooser with the stored contexts instead of random ones."""
    chooser = PromptChooser(clip, {"Brain": "Brain", "Chest": "Chest X-ray film"}[obj], mood, causal)
    stored = load_golden("prompts")
    with torch.no_grad():
        for learner in chooser.prompt_learners.values():
            for name, parameter in learner.ctx.items():
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
    learner = PromptChooser(tiny_clip(False), name, "learnable_all").prompt_learners[kind]
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
    for learner in chooser.prompt_learners.values():
        for name, parameter in learner.ctx.items():
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
    expected = [torch.empty(7, 8, 128).normal_(0, 0.02) for _ in range(6)]
    torch.manual_seed(5)
    from_global = PromptChooser(tiny_clip(False), "Brain", "learnable_all")
    from_own = PromptChooser(tiny_clip(False), "Brain", "learnable_all", generator=torch.Generator().manual_seed(5))
    for chooser in (from_global, from_own):
        drawn = {name: value for learner in chooser.prompt_learners.values() for name, value in learner.ctx.items()}
        names = [f"{kind}_{position}" for kind in ("abnormal", "normal") for position in ("end", "front", "middle")]
        for name, values in zip(names, expected, strict=True):
            assert torch.equal(drawn[name], values), name


def test_own_generator_leaves_the_global_one_unchanged(tiny_clip):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(5)
    one, other = (PromptChooser(tiny_clip(False), "Brain", "learnable_all", generator=generator) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    pair = [chooser.prompt_learners["normal"].ctx["normal_end"] for chooser in (one, other)]
    assert not torch.equal(*pair)  # the generator advances


def every_position(text: TextTower, embeddings: torch.Tensor, eot: torch.Tensor, causal: bool) -> torch.Tensor:
    """Reference: all positions of all prompts through all blocks, with explicit attention; (B, D)."""
    x = embeddings + text.positional_embedding
    mask = torch.full((77, 77), -torch.inf).triu(1) if causal else torch.zeros(77, 77)
    for block in text.transformer.resblocks:
        heads = block.attn.heads
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in block.qkv(x).chunk(3, dim=-1))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask).softmax(dim=-1)
        x = block.finish(x, (weights @ v).transpose(1, 2).flatten(2))
    return text.ln_final(x[torch.arange(len(x)), eot]) @ text.text_projection


@pytest.mark.parametrize("causal", [False, True])
def test_partial_prompt_pass_equals_the_full_pass(causal):
    """Equal features and gradients for changed contexts, phrases of one to seven tokens and all context positions."""
    config = replace(ModelConfig.load("ViT-tiny-14-56"), text_layers=4)  # more than one block before the last
    clip = CLIP(config, 56, quick_gelu=True)
    load_state(clip, random_state(config, seed=0), "random")
    states = {"normal": ["{}", "a quite unremarkable and ordinary {}"], "abnormal": ["{} with a flaw", "damaged {}"]}
    chooser = PromptChooser(clip, "Brain", "learnable_all", causal, states)
    with torch.no_grad():
        for parameter in chooser.parameters():
            parameter.normal_(0, 0.5)
    found, gradients = [], []
    for whole in (False, True):
        if whole:
            parts = [every_position(clip.text, *learner(), causal) for learner in chooser.prompt_learners.values()]
        else:
            parts = list(chooser.prompt_embeddings().values())
        found.append(torch.cat(parts))
        gradients.append(
            torch.autograd.grad((found[-1] * torch.arange(found[-1].shape[-1])).sum(), chooser.parameters())
        )
    close(found[0], found[1].detach().numpy())
    for part, whole in zip(*gradients, strict=True):
        assert float(whole.norm()) > 0
        assert float((part - whole).norm()) <= 1e-5 * float(whole.norm())


@pytest.mark.parametrize("causal", [False, True])
def test_fixed_positions_are_computed_once(tiny_clip, causal):
    """With the causal mask, embeddings at fixed positions do not change the outputs; those of contexts always do."""
    text = tiny_clip(False).text
    chooser = PromptChooser(tiny_clip(False), "Brain", "learnable_abnormal", causal)
    learner = chooser.prompt_learners["abnormal"]
    with torch.no_grad():
        embeddings, eot = learner()
        encode = PromptPass(text, embeddings, learner.context_positions, eot, causal)
        before = encode(embeddings)
        start_moved, context_moved = embeddings.clone(), embeddings.clone()
        start_moved[:, 0] *= -5
        context_moved[torch.arange(len(eot)), learner.context_positions[:, -1]] *= -5
        assert torch.equal(encode(start_moved), before) is causal  # without a mask its residual changes
        assert not torch.isclose(encode(context_moved), before).all(dim=-1).any()


def test_all_tensors_are_on_the_device_of_the_tower():
    """Parameters and cached tensors are created on the device of the tower; `meta` stands for a GPU."""
    with torch.device("meta"):
        clip = CLIP(ModelConfig.load("ViT-tiny-14-56"), 56, quick_gelu=False)
    chooser = PromptChooser(clip, "Brain", "learnable_all")
    tensors = [*chooser.parameters(), *chooser.buffers(), *chooser.encode.known, *chooser.encode.rows]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert chooser().device.type == "meta"
