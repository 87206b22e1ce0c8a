"""Report images: colours, overlays, outlines and contours, in the aspect ratio of the image file."""

import numpy as np
import pytest
from PIL import Image

from engine.report.images import (
    OUTLINE,
    alpha_blend,
    contours,
    draw_outline,
    heat_colours,
    heat_picture,
    overlay,
)
from engine.report.predictions import label


def test_colours_are_clipped_to_the_range():
    heat = np.array([[-5.0, 1.0, 2.0, 3.0, 9.0]])
    shown = np.asarray(heat_picture(heat, (1.0, 3.0)).convert("RGBA"))[0]
    assert (shown == heat_colours()[[0, 0, 128, 255, 255]]).all()
    heat_picture(np.ones((2, 3)), (1.0, 1.0))  # an empty range does not divide by zero
    lightness = heat_colours()[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > -0.5).all()  # higher scores are brighter, also in greyscale


def test_outline_and_heat_map_on_an_image_that_is_not_square():
    picture = Image.new("RGB", (40, 20))
    mask = np.zeros((10, 10), bool)
    mask[:, :5] = True
    drawn = np.asarray(draw_outline(picture, mask))
    assert drawn.shape == (20, 40, 3)
    assert (drawn[5, 19] == OUTLINE).all()
    assert not drawn[5, 20:].any()
    heat = np.zeros((10, 10), np.float32)
    heat[:, 5:] = 1.0
    blended = np.asarray(alpha_blend(Image.new("RGB", (40, 20), (90, 90, 90)), heat, (0.0, 1.0)))
    assert blended.shape == (20, 40, 3)
    assert (blended[10, 2] == 90).all()  # low heat does not change the image
    assert np.abs(blended[10, 37] - 0.75 * heat_colours()[255, :3] - 0.25 * 90).max() < 2


def test_overlay_scales_regions_from_pixels_of_the_file():
    picture = Image.new("RGB", (1024, 512))
    region = {"points": [[200.0, 100.0], [200.0, 900.0], [1800.0, 900.0], [1800.0, 100.0]]}
    drawn = overlay(picture, np.zeros((4, 4), np.float32), (0.0, 1.0), [region], (2048, 1024))
    assert drawn.size == picture.size
    assert drawn.getpixel((100, 250)) == OUTLINE
    assert drawn.getpixel((500, 250)) != OUTLINE


def test_contours_are_in_image_pixels_and_have_holes():
    heat = np.zeros((8, 8))
    heat[1:7, 1:7] = 1.0
    heat[3:5, 3:5] = 0.0
    region, hole = contours(heat, 0.5, (16, 8))
    assert region["peak"] == 1.0
    assert hole["peak"] is None
    assert hole["area"] < 0 < region["area"]
    assert region["area"] == pytest.approx(36 * 2, rel=0.05)
    x, y = np.array(region["points"]).T
    assert (x.min(), x.max()) == pytest.approx((2, 14))
    assert (y.min(), y.max()) == pytest.approx((1, 7))
    heat = np.pad(np.zeros((5, 5)), 2, constant_values=0.6)
    heat[4, 4] = 0.9  # an island in the hole
    assert [region["peak"] for region in contours(heat, 0.5, (9, 9))] == [0.6, None, 0.9]
    (whole,) = contours(np.ones((4, 4)), 0.5, (4, 4))  # reaches the border of the image
    assert whole["area"] == pytest.approx(16)


def test_side_labels_are_at_their_edges():
    one, both, above = (np.asarray(label(Image.new("RGB", (90, 90)), edges, False)) for edges in ("R", "RL", "RLA"))
    assert one[:, :30].any() and not one[:, 30:].any()
    assert (both[:, :30] == one[:, :30]).all() and both[:, 60:].any()
    assert above[:30, 30:60].any() and not above[60:, 30:60].any()
