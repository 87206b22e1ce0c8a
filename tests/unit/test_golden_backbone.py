"""The frozen towers against values measured on the published implementation."""

import numpy as np
import pytest
import torch

from CLIP.model import resize_positional_embedding
from CLIP.tokenizer import tokenize
from tests.conftest import tiny_state

ACTIVATIONS = {"gelu": False, "quickgelu": True}


def close(actual: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.detach(), torch.from_numpy(np.asarray(expected)), atol=tolerance, rtol=0)


def test_positional_embedding_resize(golden):
    resized = resize_positional_embedding(tiny_state()["visual.positional_embedding"], 3)
    close(resized, golden("backbone")["positional_embedding_42"])


def test_tokens_before_the_first_block(golden, tiny_clip):
    data = golden("backbone")
    with torch.no_grad():
        close(tiny_clip(False).visual.embed(torch.from_numpy(data["images"])), data["hidden_ln_pre"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layers", [[1, 2, 3, 4], [4, 2], [3]])
def test_tokens_after_layers(golden, tiny_clip, activation, layers):
    data = golden("backbone")
    tokens = tiny_clip(ACTIVATIONS[activation]).image_tokens(torch.from_numpy(data["images"]), layers)
    for layer, actual in zip(layers, tokens, strict=True):
        close(actual, data[f"{activation}/hidden_layer{layer}"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_embeddings(golden, tiny_clip, activation):
    data, clip = golden("backbone"), tiny_clip(ACTIVATIONS[activation])
    close(clip.encode_image(torch.from_numpy(data["images"])), data[f"{activation}/image_embedding"])
    ids = tokenize([str(text) for text in data["text_strings"]])
    assert np.array_equal(ids.numpy(), data["text_ids"])
    text = clip.encode_text(ids)
    close(text, data[f"{activation}/text_embedding"])
    close(torch.nn.functional.normalize(text, dim=-1), data[f"{activation}/text_embedding_normalized"])


def test_no_graph_and_no_gradients(tiny_clip):
    clip = tiny_clip(False)
    assert not any(parameter.requires_grad for parameter in clip.parameters())
    assert not clip.image_tokens(torch.rand(1, 3, 42, 42), [1])[0].requires_grad


def test_image_tower_stops_at_the_last_requested_layer(tiny_clip):
    clip, seen = tiny_clip(False), []
    hooks = [
        block.register_forward_hook(lambda *_, n=n: seen.append(n))
        for n, block in enumerate(clip.visual.transformer.resblocks, 1)
    ]
    clip.image_tokens(torch.rand(1, 3, 42, 42), [1, 2])
    for hook in hooks:
        hook.remove()
    assert seen == [1, 2]
