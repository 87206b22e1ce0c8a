"""The factory: configs, weights, activations, and open_clip as a second oracle."""

from __future__ import annotations

import pytest
import torch

from CLIP.clip import create_model, load_state, random_state, uses_quick_gelu
from CLIP.model import CLIP, ModelConfig
from CLIP.tokenizer import tokenize
from tests.conftest import tiny_state
from tests.helpers.weights import open_clip_model
from utils import InputError

# The first two numbers of `text_projection` and of `visual.proj` for seed 7.
PINNED = ([-0.0204647332, -0.1173628494], [-0.0586080588, 0.0273839403])


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize(("name", "size"), [("ViT-tiny-14-56", 56), ("ViT-tiny-14-56", 70), ("ViT-B-16-plus-240", 96)])
def test_towers_equal_open_clip(name, size, quick_gelu):
    config = ModelConfig.load(name)
    state = dict(tiny_state()) if name == "ViT-tiny-14-56" else random_state(config, 3)
    mine = CLIP(config, size, quick_gelu)
    load_state(mine, state, "test")
    theirs = open_clip_model(config, state, size, quick_gelu)
    torch.manual_seed(0)
    images = torch.rand(2, 3, size, size)
    ids = tokenize(["a photo of a brain.", "a very long sentence about a retinal OCT with flaw"])
    layers = config.default_features()
    with torch.no_grad():
        expected = theirs.visual.forward_intermediates(
            images, indices=[layer - 1 for layer in layers], intermediates_only=True, output_fmt="NLC",
            output_extra_tokens=True,
        )  # fmt: skip
        for k, tokens in enumerate(mine.image_tokens(images, layers)):
            torch.testing.assert_close(tokens[:, 1:], expected["image_intermediates"][k], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(mine.encode_image(images), theirs.encode_image(images), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(mine.encode_text(ids), theirs.encode_text(ids), atol=2e-5, rtol=1e-5)


def test_activation_follows_the_fidelity_table():
    large = ModelConfig.load("ViT-L-14-336")
    assert not uses_quick_gelu(large, "openai", 240, "released")
    assert uses_quick_gelu(large, "openai", 336, "released")
    assert uses_quick_gelu(large, "openai", 240, "corrected")
    assert not uses_quick_gelu(large, "laion400m", 240, "corrected")
    assert not uses_quick_gelu(ModelConfig.load("ViT-B-16-plus-240"), "laion400m", 240, "corrected")


def test_default_layers():
    assert ModelConfig.load("ViT-L-14-336").default_features() == [6, 12, 18, 24]
    assert ModelConfig.load("ViT-B-16-plus-240").default_features() == [3, 6, 9, 12]


def test_fidelity_rounds_and_normalises(tmp_path):
    state = random_state(ModelConfig.load("ViT-tiny-14-56"), 0)
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    fine = create_model("ViT-tiny-14-56", "openai", 112, weights=path, fidelity="corrected")
    rounded = create_model("ViT-tiny-14-56", "openai", 112, weights=path, fidelity="released")
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    assert torch.equal(fine.state_dict()[name], state[name])
    assert torch.equal(rounded.state_dict()[name], state[name].half().float())
    assert not torch.equal(rounded.state_dict()[name], state[name])
    assert torch.equal(rounded.state_dict()["visual.class_embedding"], state["visual.class_embedding"])
    assert (fine.quick_gelu, rounded.quick_gelu) == (True, False)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[None, :, None, None].expand(1, 3, 112, 112)
    blank = fine.visual.conv1(torch.zeros(1, 3, 112, 112)).flatten(2).transpose(1, 2)
    tokens = torch.cat([fine.visual.class_embedding.expand(1, 1, -1), blank], dim=1) + fine.visual.positional_embedding
    torch.testing.assert_close(fine.visual.embed(mean), fine.visual.ln_pre(tokens))
    assert fine.info.sha256 == rounded.info.sha256


def test_random_weights_are_seeded_and_do_not_depend_on_the_size():
    one, same, other = (create_model("ViT-tiny-14-56", "random", 112, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.visual.proj, other.visual.proj)
    assert one.info.sha256 == same.info.sha256 != other.info.sha256
    assert torch.equal(
        one.visual.conv1.weight, create_model("ViT-tiny-14-56", "random", 56, seed=1).visual.conv1.weight
    )


def test_random_tensors_are_drawn_one_by_one():
    """Pinned: a change of what a seed means must also change the words that are hashed ("random 2")."""
    state = random_state(ModelConfig.load("ViT-tiny-14-56"), 7)
    text = random_state(ModelConfig.load("ViT-tiny-14-56"), 7, vision=False)
    assert text.keys() == {key for key in state if not key.startswith("visual.")}
    assert all(torch.equal(value, state[key]) for key, value in text.items())
    drawn = [state[key].flatten()[:2].tolist() for key in ("text_projection", "visual.proj")]
    assert drawn[0] == pytest.approx(PINNED[0], abs=1e-6)
    assert drawn[1] == pytest.approx(PINNED[1], abs=1e-6)
    stds = {key: float(value.std()) for key, value in state.items() if value.numel() > 1000 and value.std() > 0}
    assert stds["visual.conv1.weight"] == pytest.approx((3 * 14**2) ** -0.5, rel=0.05)
    assert stds["transformer.resblocks.1.mlp.c_proj.weight"] == pytest.approx((2 * 2 * 128) ** -0.5, rel=0.05)
    assert stds["token_embedding.weight"] == pytest.approx(0.02, rel=0.05)


def test_the_text_tower_alone():
    """vision=False: the same text embeddings, and no image tower to hold or to run."""
    whole = create_model("ViT-tiny-14-56", "random", 42, seed=1)
    text = create_model("ViT-tiny-14-56", "random", 42, seed=1, vision=False)
    ids = tokenize(["a photo of a brain."])
    assert torch.equal(text.encode_text(ids), whole.encode_text(ids))
    assert text.info == whole.info
    assert text.visual is None
    assert not any(name.startswith("visual.") for name in text.state_dict())
    with pytest.raises(RuntimeError, match="without its image tower"):
        text.image_tokens(torch.zeros(1, 3, 42, 42), [1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model_name": "ViT-X"}, "unknown"),
        ({"model_name": "ViT-B-16-plus-240", "pretrained": "openai"}, "choose --pretrain laion400m or random"),
        ({"model_name": "ViT-tiny-14-56", "pretrained": "random", "img_size": 13}, "smaller than a patch"),
        ({"model_name": "ViT-tiny-14-56", "pretrained": "random", "weights": "x.pt"}, "contradicts"),
    ],
)
def test_what_cannot_be_made_says_why(arguments, words):
    with pytest.raises(InputError, match=words):
        create_model(**arguments)


def test_size_that_is_no_multiple_of_the_patch_drops_the_rest():
    assert [ModelConfig.load("ViT-tiny-14-56").grid(size) for size in (45, 42, 40)] == [3, 3, 2]
