"""Grey levels become 8 bits by a window or over a range, and pixels become square: whatever the format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils import InputError

Array = np.ndarray
Ends = tuple[float, float]
ROBUST = (0.5, 99.5)  # the percentiles of `--window auto`
SAMPLED = 2**20  # values that percentiles are taken from
MAX_SIDE = 16_384  # pixels of a slice after it was resampled


def to_rgb(values: Array) -> Image.Image:
    """An array as 8-bit RGB: (H, W), (H, W, 1) or (H, W, 3) of uint8, uint16, or float in [0, 1]; else `InputError`."""
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] != 3) or 0 in values.shape:
        raise InputError(f"an array of shape {values.shape} is no image: expected (H, W) or (H, W, 3)")
    if values.dtype == np.uint16:
        values = (values / 257).round()
    elif values.dtype.kind == "f":
        if not (values.min() >= 0 and values.max() <= 1):
            raise InputError(f"floating-point pixels from {values.min()} to {values.max()}: expected [0, 1]")
        values = (values * 255).round()
    elif values.dtype != np.uint8:
        raise InputError(f"pixels of type {values.dtype}: expected uint8, uint16 or floats in [0, 1]")
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def apply_window(values: Array, center: float, width: float, function: str = "LINEAR_EXACT") -> Array:
    """Grey values of any shape -> [0, 1], by DICOM's functions (PS3.3, C.11.2.1): LINEAR, LINEAR_EXACT, SIGMOID."""
    values = values.astype(np.float64)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR":
        center, width = center - 0.5, max(width - 1, 1e-6)
    windowed: Array = np.nan_to_num(((values - center) / width + 0.5).clip(0, 1))
    return windowed


def stretch(values: Array, low: float, high: float) -> Array:
    """Grey values -> [0, 1], `low` to `high`; 0 where a value is NaN or there is no range."""
    if not high > low:
        return np.zeros(values.shape)
    return np.nan_to_num((values.astype(np.float64) - low) / (high - low)).clip(0, 1)


class Range(NamedTuple):
    """The finite grey values of a picture, series or volume: what becomes black and white."""

    whole: Ends
    robust: Ends  # the percentiles `ROBUST`, or the whole range where these are equal
    of: str  # what has these values, in words

    @classmethod
    def measure(cls, parts: Sequence[Array], of: str, path: object) -> Range:
        """Over arrays of any shape; `InputError` where none holds a finite number."""
        extremes: list[float] = []
        sample = []
        for part in parts:
            flat = part.ravel(order="K")  # in the order of memory: no copy of a volume stored x first
            for start in range(0, flat.size, 2**24):
                piece = flat[start : start + 2**24]
                finite = piece[np.isfinite(piece)]
                extremes += [float(finite.min()), float(finite.max())] if finite.size else []
            sample.append(flat[:: max(flat.size * len(parts) // SAMPLED, 1)])
        if not extremes:
            raise InputError(f"{path}: no pixel holds a finite number")
        whole = min(extremes), max(extremes)
        values = np.concatenate(sample).astype(np.float64)
        values = values[np.isfinite(values)]
        low, high = map(float, np.percentile(values, ROBUST)) if values.size else whole
        return cls(whole, (low, high) if high > low else whole, of)

    def show(self, values: Array, window: str | None) -> tuple[Array, str]:
        """Values -> [0, 1] over the robust (`auto`) or the whole range, and that in words."""
        (low, high), words = (self.robust, "robust") if window == "auto" else (self.whole, "whole")
        return stretch(values, low, high), f"shown from {low:g} to {high:g}, the {words} range of {self.of}"


def is_stretched(spacing: Ends, ratio: float) -> bool:
    """Whether a row and a column of pixels differ by more than `ratio`; never where a distance is no length."""
    return all(math.isfinite(step) and step > 0 for step in spacing) and max(spacing) > ratio * min(spacing)


def square(image: Image.Image, spacing: Ends, how: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """The image enlarged along its coarser axis to pixels as wide as high; `spacing` is that of a row and a column."""
    if not is_stretched(spacing, 1.01):
        return image
    sides = zip(image.size, reversed(spacing), strict=True)
    width, height = (min(max(round(side * step / min(spacing)), 1), MAX_SIDE) for side, step in sides)
    return image.resize((width, height), how)
