"""Baselines on the same tokens, shots and test images as MadCLIP. Not in the paper.

Each baseline maps tokens, K tensors (B, N, C), to scores (B, K or 1, N). These replace MadCLIP's patch scores, so that
one `Evaluation` measures them all. An image-level method gives every patch of an image the same score.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from CLIP.clip import create_model
from CLIP.weights import find_weights
from Prompt.promptChooser import PromptChooser
from utils import set_seed

from .detector import seeded
from .distributed import pick_autocast, pick_device
from .evaluation import Evaluation, Masks
from .features import TokenStore
from .files.config import new_settings
from .metrics import measure
from .training import Splits, TrainingSet

BATCH = 32  # images at a time
MAX_BANK = 10_000  # patches in a memory bank; a larger bank is subsampled, as in PatchCore
MAX_PATCHES = 20_000  # maximum number of patches that the logistic regression is fitted to
SKETCH = 128  # width of the random projection in which the bank is subsampled, as in PatchCore
NAMES = ("zero-shot CLIP", "nearest normal patch", "class prototypes", "logistic regression")
Scores = Callable[[list[Tensor]], Tensor]


class Training:
    """The training data: the same views of the shots that MadCLIP is trained on.

    Args:
        tokens: K tensors (V, N, C).
        labels: (V,) bool, True = abnormal.
        masks: (V, N) in [0, 1], the abnormal fraction of each patch; if None, each patch has the label of its image.
        generator: for all random draws.
    """

    def __init__(self, tokens: list[Tensor], labels: Tensor, masks: Tensor | None, generator: torch.Generator) -> None:
        self.tokens, self.labels, self.localised, self.generator = tokens, labels, masks is not None, generator
        parts = labels[:, None].expand(-1, tokens[0].shape[1]).float() if masks is None else masks
        self.normal_patches, self.abnormal_patches = parts == 0, parts > 0.5  # (V, N) bool; the others are mixed


def pool_masks(masks: Tensor, patches: int) -> Tensor:
    """Pixels to patches: (V, S, S) bool -> (V, N), the abnormal fraction of each patch in [0, 1]."""
    return F.adaptive_avg_pool2d(masks[:, None].float(), round(patches**0.5)).flatten(1)


def zero_shot(project: Callable[[Tensor], Tensor], text_features: Tensor) -> Scores:
    """CLIP with fixed prompts, without training or shots: the logit of `abnormal` for each patch of the last layer.

    Args:
        project: the tower's final norm and projection, (B, N, C) of its last layer -> (B, N, D).
        text_features: (D, 2), columns [normal, abnormal], each of norm 1, from MadCLIP's fixed sentences.
    """
    direction = 100 * (text_features[:, 1] - text_features[:, 0])  # 100: CLIP's temperature
    return lambda layers: (F.normalize(project(layers[-1]), dim=-1) @ direction)[:, None]


def nearest_normal_patch(training: Training) -> Scores:
    """Distance to the nearest patch of the normal shots (PatchCore, Roth et al., CVPR 2022), in [0, 2] for each layer.

    As in PatchCore, a patch is a mean over 3 x 3, and a large bank is subsampled greedily. The distance is 1 - cosine.
    """
    normal = [neighbourhoods(layer[~training.labels]).flatten(0, 1) for layer in training.tokens]
    banks = [bank[coreset(bank, MAX_BANK, training.generator)] for bank in normal]

    def distances(layers: list[Tensor]) -> Tensor:
        nearest = [(neighbourhoods(x) @ bank.T).amax(dim=-1) for x, bank in zip(layers, banks, strict=True)]
        return 1 - torch.stack(nearest, dim=1)

    return distances


def neighbourhoods(tokens: Tensor) -> Tensor:
    """Patches averaged over their 3 x 3 neighbourhoods, cropped at the border: (B, N, C) -> (B, N, C), of norm 1."""
    side = round(tokens.shape[1] ** 0.5)
    grid = tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)
    pooled = F.avg_pool2d(grid, 3, stride=1, padding=1, count_include_pad=False)
    return F.normalize(pooled.flatten(2).transpose(1, 2), dim=-1)


def coreset(bank: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Indices of at most `size` rows of (P, C), far apart: a random one, then always the farthest from those chosen."""
    if len(bank) <= size:
        return torch.arange(len(bank), device=bank.device)
    projection = torch.randn(bank.shape[1], SKETCH, generator=generator) / SKETCH**0.5
    sketch = bank @ projection.to(bank)
    chosen = [torch.randint(len(bank), (), generator=generator).to(bank.device)]
    distance = torch.full((len(bank),), torch.inf, device=bank.device)
    while len(chosen) < size:
        distance = torch.minimum(distance, (sketch - sketch[chosen[-1]]).square().sum(dim=1))
        chosen.append(distance.argmax())
    return torch.stack(chosen)


def prototypes(training: Training) -> Scores:
    """For each layer, the cosine with the mean abnormal patch minus that with the mean normal patch, in [-2, 2].

    Without abnormal shots the score is minus the cosine with the normal prototype.
    """
    directions = []
    for layer in training.tokens:
        patches = F.normalize(layer, dim=-1)
        chosen = training.normal_patches, training.abnormal_patches
        normal, abnormal = (F.normalize(patches[of].sum(dim=0), dim=0) for of in chosen)  # 0 without patches
        directions.append(abnormal - normal)
    return lambda layers: torch.stack(
        [F.normalize(x, dim=-1) @ direction for x, direction in zip(layers, directions, strict=True)], dim=1
    )


def logistic_regression(training: Training) -> Scores:
    """Logits of scikit-learn's logistic regression, for patches if the shots have masks, else for images (mean token).

    Settings are the defaults, except `max_iter`. Features are the tokens of all layers, normalised, concatenated and
    standardised. At most MAX_PATCHES are sampled, equally many per class. `ValueError` if a class is missing.
    """

    def features(layers: list[Tensor]) -> Tensor:
        joined = torch.cat([F.normalize(layer, dim=-1) for layer in layers], dim=-1)  # (B, N, K C)
        return joined if training.localised else joined.mean(dim=1, keepdim=True)

    x, y = features(training.tokens).flatten(0, 1), training.labels
    if training.localised:
        groups = [chosen.flatten().nonzero()[:, 0] for chosen in (training.normal_patches, training.abnormal_patches)]
        size = min(MAX_PATCHES // 2, *map(len, groups))
        drawn = [group[torch.randperm(len(group), generator=training.generator)[:size].to(group)] for group in groups]
        x, y = x[torch.cat(drawn)], torch.arange(2).repeat_interleave(size)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x.cpu().numpy(), y.cpu().numpy())

    def logits(layers: list[Tensor]) -> Tensor:
        test = features(layers)
        values = torch.from_numpy(model.decision_function(test.flatten(0, 1).cpu().numpy())).float()
        return values.reshape(len(test), 1, -1).expand(-1, -1, layers[0].shape[1])

    return logits


def fit(
    training: Training,
    project: Callable[[Tensor], Tensor] | None,
    text_features: Tensor,
    names: Sequence[str] = NAMES,
) -> Iterator[tuple[str, Scores]]:
    """Fit the baselines in `names`; yields the name of each and its function, which scores tokens.

    `zero_shot` is skipped without `project`, and the logistic regression if the shots show only one class.
    """
    if NAMES[0] in names and project is not None:
        yield NAMES[0], zero_shot(project, text_features)
    if NAMES[1] in names:
        yield NAMES[1], nearest_normal_patch(training)
    if NAMES[2] in names:
        yield NAMES[2], prototypes(training)
    if NAMES[3] in names and training.abnormal_patches.any() and training.normal_patches.any():
        yield NAMES[3], logistic_regression(training)


@torch.no_grad()
def measure_baselines(options: argparse.Namespace, names: Sequence[str] = NAMES) -> dict[str, Any]:
    """Measure the baselines on the data, shots and tokens that train.py would use with these options.

    Images are scored as in MadCLIP: by the highest pixel of the map if there are masks, else by their patches, which
    --dec_type summarises (the distance to the nearest normal patch by its maximum, as in PatchCore).

    Returns:
        {"obj": ..., "mask_above": ..., "shots": ..., "baselines": {name: metrics}}.
    """
    set_seed(options.seed)
    splits, device = Splits.open(options), pick_device(options.device)
    weights = find_weights(options.model_name, options.pretrain, options.weights, options.seed, options.image_tower)
    settings = new_settings(options, splits.dataset, weights)
    shots = TrainingSet.build(splits.shots, settings, options.seed)
    store = TokenStore(settings, weights, pick_autocast(options.precision, device), device, options)
    store.plan(shots.items, [splits.test])
    clip = create_model(weights, img_size=settings.img_size, fidelity=settings.fidelity, device=device)
    assert clip.visual is not None
    norm, projection = clip.visual.ln_post, clip.visual.proj  # `fill` frees the tower
    text = PromptChooser(clip, settings.prompt_name, "fix", states=settings.states)()
    store.fill(clip)
    patches = store.shape[1] - store.class_token
    read = map(store.get, store.rows(shots.items).split(BATCH))
    tokens = [torch.cat(layers)[:, -patches:].float() for layers in zip(*read, strict=True)]
    pooled = None if shots.masks is None else pool_masks(shots.masks, patches).to(device)
    training = Training(tokens, shots.labels.bool().to(device), pooled, seeded(options.seed, "baselines"))
    masks = Masks.of(splits.test, settings, options.num_workers, device)
    aligned = projection is not None and max(store.layers) == weights.config.layers  # DINOv2 has no text
    project = (lambda x: norm(x) @ projection) if aligned else None

    results = {}
    for name, scores in fit(training, project, text, names):
        batches = map(store.get, store.rows(splits.test).split(BATCH))
        scored = torch.cat([scores([layer[:, -patches:].float() for layer in layers]) for layers in batches])
        dec_type = "max" if name == NAMES[1] else settings.dec_type
        evaluation = Evaluation(
            splits.test, scored, "seg" if settings.pixel_metrics else "det", settings.img_size, dec_type
        )
        localised = training.localised or name != NAMES[3]
        metrics = measure(evaluation, masks if localised else None, full=True, without=splits.shot_patients())
        results[name] = metrics.values
        print(f"{name}: {metrics.line()}", flush=True)
    result = {"obj": options.obj, "mask_above": settings.mask_above, "shots": splits.shots.names}
    return {**result, "baselines": results}
