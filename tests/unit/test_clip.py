"""Model creation: configs, weights and activations, with open_clip as the reference."""

from dataclasses import replace

import pytest
import torch

from CLIP.clip import create_model, load_state, random_state, uses_quick_gelu
from CLIP.model import CLIP, ModelConfig
from CLIP.tokenizer import tokenize
from tests.conftest import tiny_state
from tests.helpers.weights import open_clip_model

# The first two numbers of `text_projection` and of `visual.proj` for seed 7.
PINNED = ([-0.0204647332, -0.1173628494], [-0.0586080588, 0.0273839403])


@pytest.mark.parametrize(
    ("name", "size", "quick_gelu"),
    [("ViT-tiny-14-56", 56, False), ("ViT-tiny-14-56", 70, True), ("ViT-B-16-plus-240", 48, False)],
)
def test_towers_equal_open_clip(name, size, quick_gelu):
    config = replace(ModelConfig.load(name), layers=4, text_layers=2)  # few, as in the tiny model: all layers are alike
    state = dict(tiny_state()) if name == "ViT-tiny-14-56" else random_state(config, 3)
    mine = CLIP(config, size, quick_gelu)
    load_state(mine, state, "test")
    theirs = open_clip_model(config, state, size, quick_gelu)
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


def test_random_tensors_are_drawn_independently():
    """Each tensor depends on seed and name only. If the values change, so must the hashed words ("random 2")."""
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
