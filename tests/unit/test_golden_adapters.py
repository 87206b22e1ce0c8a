"""Adapters and scores against values measured on the published implementation."""

import pytest
import torch

from CLIP.adapter_shared import ADAPTERS, DualBranchAdapters
from tests.conftest import VARIANTS, load_golden
from tests.unit.test_golden_backbone import close


def golden_adapters(kind: str, features_list: list[int], contrast: bool) -> DualBranchAdapters:
    """Adapters with the stored weights; index k is the same in the model and in the file."""
    model = DualBranchAdapters(kind, 128, 96, features_list, contrast)
    stored = load_golden("adapters")
    prefix = f"{kind}/"
    state = {
        key[len(prefix) :].replace("/", "."): torch.from_numpy(value)
        for key, value in stored.items()
        if key.startswith(prefix) and int(key.split("/")[2].split(".")[0]) < len(features_list)
    }
    model.load_state_dict(state)  # strict: exactly the published names
    return model.eval()


def patch_tokens(variant: str, layers: list[int]) -> list[torch.Tensor]:
    activation, data = variant.split("_", maxsplit=1)[0], load_golden("backbone")
    return [torch.from_numpy(data[f"{activation}/hidden_layer{layer}"])[:, 1:] for layer in sorted(layers)]


@pytest.mark.parametrize(
    ("layers", "variant"),
    [([4, 2], "gelu_nomask"), *((layers, variant) for layers in ([1, 2, 3, 4], [2, 4]) for variant in VARIANTS)],
)
@pytest.mark.parametrize("contrast", ["yes", "no"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_scores(golden, kind, contrast, layers, variant):
    name = f"scores/{kind}/contrast_{contrast}/features_{'_'.join(map(str, layers))}/{variant}"
    text = torch.from_numpy(golden("prompts")[f"Brain/learnable_all/{variant}/text_features"])
    model = golden_adapters(kind, layers, contrast == "yes")
    det, seg = model(patch_tokens(variant, layers), text)
    close(det, golden("adapters")[f"{name}/det_scores"])
    close(seg, golden("adapters")[f"{name}/seg_scores"])
    (only_seg,) = model(patch_tokens(variant, layers), text, heads=("seg",))
    close(only_seg, golden("adapters")[f"{name}/seg_scores"])


@pytest.mark.parametrize("branch", ["normal", "abnormal"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_single_adapter(golden, kind, branch):
    model = golden_adapters(kind, [1, 2, 3, 4], contrast=True)
    adapter = getattr(model, f"{branch}_det_adapters")[0]
    det, seg = adapter(torch.from_numpy(golden("backbone")["gelu/hidden_layer1"]))
    close(det, golden("adapters")[f"raw/{kind}/{branch}_det_adapters/0/det_features"])
    close(seg, golden("adapters")[f"raw/{kind}/{branch}_det_adapters/0/seg_features"])


def test_mvitfc_across_tokens_does_not_depend_on_the_batch():
    model = DualBranchAdapters("MViTFC", 128, 96, [1], across_tokens=True)
    assert model.reads_class_token
    tokens, text = torch.randn(3, 10, 128), torch.nn.functional.normalize(torch.randn(96, 2), dim=0)
    with torch.no_grad():
        together = model([tokens], text)[0]
        alone = torch.cat([model([tokens[i : i + 1]], text)[0] for i in range(3)], dim=1)
    assert together.shape == (1, 3, 9, 2)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_drawn_from_a_generator_equal_torch_layers(kind):
    """Initial weights are bitwise as published: normal adapters first, layer by layer, then abnormal ones."""
    layers = {
        "MFCFC": lambda: [torch.nn.Linear(32, out, bias=False) for out in (32, 24, 24)],
        "MCNNFC": lambda: [torch.nn.Conv1d(32, 32, 1), *(torch.nn.Linear(32, 24, bias=False) for _ in range(2))],
        "MViTFC": lambda: [
            torch.nn.TransformerEncoderLayer(32, nhead=8, dim_feedforward=32, dropout=0.0),
            *(torch.nn.Linear(32, 24, bias=False) for _ in range(2)),
        ],
    }
    torch.manual_seed(3)
    published = [value for _ in range(4) for layer in layers[kind]() for value in layer.state_dict().values()]
    after_published = torch.get_rng_state()
    torch.manual_seed(4)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    model = DualBranchAdapters(kind, 32, 24, [1, 2], generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(generator.get_state(), after_published)
    for (name, value), expected in zip(model.state_dict().items(), published, strict=True):
        assert torch.equal(value, expected), name
