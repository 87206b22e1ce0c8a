"""Baselines on synthetic tokens, for which the right answer is known."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from dataset import phantom
from engine import baselines
from engine.baselines import Training
from engine.files.config import train_options
from tests.helpers.data import SMALL

K, N, C = 2, 9, 16  # layers, patches (3 x 3), channels


def make(images: int, seed: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Tokens of images. Every second image is abnormal: its first three patches point in another direction."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % 2 == 1
    abnormal = torch.zeros(images, N)
    abnormal[labels, :3] = 1
    tokens = []
    for layer in range(K):
        x = 0.3 * torch.randn(images, N, C, generator=generator)
        x[..., layer] += 1  # the normal direction differs between layers
        x[..., layer + 4] += 1.5 * abnormal
        tokens.append(x)
    return tokens, labels, abnormal


def training(masks: bool = True) -> Training:
    tokens, labels, abnormal = make(12, 0)
    return Training(tokens, labels, abnormal if masks else None, torch.Generator().manual_seed(0))


@pytest.fixture
def test_set():
    tokens, labels, abnormal = make(20, 1)

    def batches():
        for start in range(0, 20, 8):
            yield [layer[start : start + 8] for layer in tokens]

    return batches, labels, abnormal


def scored(scores, batches) -> torch.Tensor:
    return torch.cat([scores(layers) for layers in batches()])


def auc(targets: torch.Tensor, scores: torch.Tensor) -> float:
    return roc_auc_score(targets.flatten().numpy(), scores.flatten().numpy())


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(
    "method", [baselines.nearest_normal_patch, baselines.prototypes, baselines.logistic_regression]
)
def test_baselines_separate_abnormal_patches(test_set, method, masks):
    batches, labels, abnormal = test_set
    scores = scored(method(training(masks)), batches)
    assert scores.shape[::2] == (20, N)
    assert scores.dtype == torch.float32
    assert auc(labels, scores.sum(dim=1).amax(dim=1)) > 0.9  # images are in the right order
    if masks or method != baselines.logistic_regression:
        assert auc(abnormal, scores.sum(dim=1)) > 0.9
    else:  # image labels only: all patches of an image score alike
        assert (scores == scores[..., :1]).all()


def test_nearest_patch_is_exact_and_ignores_abnormal_shots():
    shots = training()
    normal = [layer[~shots.labels] for layer in shots.tokens]
    assert baselines.nearest_normal_patch(shots)(normal).abs().max() < 1e-6  # the bank contains these patches
    tokens, *_ = make(3, 2)
    scores = baselines.nearest_normal_patch(shots)(tokens)
    for k in range(K):
        bank = baselines.neighbourhoods(normal[k]).reshape(-1, C)
        patches = baselines.neighbourhoods(tokens[k]).reshape(-1, C)
        expected = 1 - F.cosine_similarity(patches[:, None], bank[None], dim=-1).max(dim=1).values
        assert torch.allclose(scores[:, k].flatten(), expected, atol=1e-6)


def test_zero_shot_uses_the_given_prompts(tmp_path):
    phantom.write(tmp_path, ["Brain"], valid=2, test=3, seed=0, size=64)
    path = tmp_path / "prompts.json"
    path.write_text('{"normal": ["calm {}"], "abnormal": ["{} with a stone"]}')
    paths = ["--data_path", tmp_path, "--cache_dir", tmp_path / "cache", "--obj", "Brain", "--shot", 1]
    results = []
    for flags in ([], ["--prompts", path], ["--prompt_name", "stone"]):
        options = train_options([str(word) for word in (*SMALL, *paths, *flags)])
        results.append(baselines.measure_baselines(options)["baselines"])
    assert len({result["zero-shot CLIP"]["pauc"] for result in results}) == 3
    assert len({result["class prototypes"]["pauc"] for result in results}) == 1
