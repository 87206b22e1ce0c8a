"""The published augmentation: 16 views of every few-shot image, and of its mask."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# In this order: the image itself, rotations, translations, zooms, colour jitter, two flips.
ROTATIONS = (-math.pi / 8, -math.pi / 16, math.pi / 16, math.pi / 8)
TRANSLATIONS = ((0.1, 0.1), (-0.1, 0.1), (-0.1, -0.1), (0.1, -0.1))  # in affine-grid units: 1 is half an image
ZOOMS = (1.1, 1.15, 1.2, 1.3)
JITTER_VIEW = 13
VIEWS = 16


def augment_view(images: Tensor, view: int, jitter: tuple[float, float] | None = None) -> Tensor:
    """One of the 16 views of the published augmentation.

    Args:
        images: (B, channels, S, S) in [0, 1]; masks take the same views and get soft edges.
        view: 0 identity, 1-4 rotations, 5-8 translations, 9-12 zooms, 13 colour jitter, 14 horizontal flip, 15
            vertical flip.
        jitter: two random numbers in [0, 1) for brightness and contrast; None (for masks) makes view 13 the identity.

    Returns:
        (B, channels, S, S) in [0, 1].
    """
    if view == 0:
        return images
    if view <= 4:
        cos, sin = math.cos(ROTATIONS[view - 1]), math.sin(ROTATIONS[view - 1])
        return _affine(images, [[cos, -sin, 0.0], [sin, cos, 0.0]])
    if view <= 8:
        x, y = TRANSLATIONS[view - 5]
        return _affine(images, [[1.0, 0.0, x], [0.0, 1.0, y]])
    if view <= 12:
        return _zoom(images, ZOOMS[view - 9])
    if view == JITTER_VIEW:
        return images if jitter is None else _jitter(images, *jitter)
    return images.flip(-1 if view == 14 else -2)


def augment(images: Tensor, jitter: tuple[float, float] | None = None) -> Tensor:
    """All 16 views, view by view (all images in view 0, then in view 1, ...): (B, ...) -> (16 B, ...)."""
    return torch.cat([augment_view(images, view, jitter) for view in range(VIEWS)])


def _affine(images: Tensor, matrix: list[list[float]]) -> Tensor:
    theta = torch.tensor([matrix], dtype=images.dtype, device=images.device).expand(len(images), -1, -1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _zoom(images: Tensor, factor: float) -> Tensor:
    size = images.shape[-1]
    kept = int(size / factor)
    first, last = (size - kept) // 2, (size + kept) // 2
    crop = images[..., first:last, first:last]
    return F.interpolate(crop, size=(size, size), mode="bilinear", align_corners=False)


def _jitter(images: Tensor, brightness: float, contrast: float) -> Tensor:
    bright = images * (0.8 + 0.4 * brightness)
    # The published mean is over channels and rows, which gives one mean per column.
    mean = bright.mean(dim=(-3, -2), keepdim=True)
    return ((bright - mean) * (0.8 + 0.4 * contrast) + mean).clamp(0, 1)
