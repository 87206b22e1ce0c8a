"""The 16 views and the image transforms against values measured on the published implementation."""

import numpy as np
import pytest
import torch

from dataset.readers.images import Sample, load_image
from dataset.readers.masks import load_mask
from dataset.views import VIEWS, augment, augment_view
from tests.unit.test_golden_backbone import close


@pytest.mark.parametrize("call", ["with_masks", "without_masks"])
def test_views(golden, call):
    data = golden("augment")
    jitter = tuple(map(float, data[f"{call}/jitter_rand"]))
    views = augment(torch.from_numpy(data["images"]), jitter)
    close(views, data[f"{call}/images"])
    masks = torch.from_numpy(data["masks"]) * float(call == "with_masks")
    close(augment(masks), data[f"{call}/masks"])
    stored = torch.from_numpy(data[f"{call}/masks"])
    sure = (stored - 0.5).abs() > 1e-5
    assert torch.equal((augment(masks) > 0.5)[sure], (stored > 0.5)[sure])


def test_views_do_not_depend_on_other_images_of_the_batch(golden):
    images = torch.from_numpy(golden("augment")["images"])
    for view in range(VIEWS):
        alone = augment_view(images[1:], view, (0.3, 0.7))
        assert torch.equal(alone, augment_view(images, view, (0.3, 0.7))[1:])


@pytest.mark.parametrize("name", ["rgb", "gray", "palette", "rgba", "large", "gray16"])
def test_images(golden, tmp_path, name):
    data = golden("transforms")
    path = tmp_path / f"{name}.png"
    path.write_bytes(data[f"{name}/png"].tobytes())
    if name == "gray16":  # the published code clips it to white; here it equals the 8-bit image
        assert data["gray16/image"].mean() > data["gray/image"].mean()
        close(load_image(path, 42), data["gray/image"])
    else:
        close(load_image(path, 42), data[f"{name}/image"])


def test_mask(golden, tmp_path):
    data = golden("transforms")
    path = tmp_path / "mask.png"
    path.write_bytes(data["mask/png"].tobytes())
    mask = load_mask(Sample(path, 1, (path,), "mask.png"), 42)
    assert np.array_equal(mask.numpy(), data["mask/tensor"][0] > 0.5)
