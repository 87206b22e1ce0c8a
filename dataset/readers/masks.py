"""Masks: which pixels of an image are abnormal.

A mask's levels are its grey levels, the indices of a colour palette, or the labels of a volume. Grey levels above
`mask_above` and all indices and labels except 0 are abnormal or, if `ReadOptions.mask_labels` is set, only the levels
in it. The paper's own data are read as published: by luminance, and resized if the sizes differ.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageChops

from utils import InputError

from .grey import Array, Notes, warn_once
from .images import Sample, reader_of

if TYPE_CHECKING:
    from torch import Tensor

Levels = Counter[float]  # level -> number of pixels

ABNORMAL_ABOVE = 127  # of 255, in a mask
FULL_MASK = 0.9  # fraction of the image above which a mask is reported
SHOWN = 8  # levels in a note


class Mask(NamedTuple):
    """A mask as it was read, or the union of several masks of one image."""

    image: Image.Image  # 8-bit grey at its own size; 0 and 255 if `by_label`
    notes: Notes  # notes for the user on the file: `orientation`, `alpha`, `wide`, ...
    values: tuple[Array, ...]  # for each file, the level of every pixel
    by_label: bool  # labels decide what is abnormal, not grey levels

    @property
    def levels(self) -> Levels:
        """The number of pixels of each level."""
        counts = (np.unique(values, return_counts=True) for values in self.values)
        return sum((Levels(dict(zip(*map(np.ndarray.tolist, pair), strict=True))) for pair in counts), Levels())

    def marks(self, above: int) -> bool:
        """Whether any pixel is abnormal."""
        return self.image.getextrema()[1] > above  # type: ignore[operator]


def read_mask(sample: Sample) -> Mask | None:
    """The mask of an image, None if it has none.

    The orientation tag is ignored, as everywhere (note `orientation`). Colours become luminance; if that is constant
    and the alpha channel is not, the mask is the alpha channel (note `alpha`). A slice's mask is the mask file's slice
    of the same number. `window` applies to images only, never to masks.

    Raises:
        InputError: a file cannot be read or does not fit the image's file, or several masks of it differ in size.
    """
    mask: Mask | None = None
    labels = sample.options.mask_labels
    count = 1 if sample.index is None else len(reader_of(sample.path).describe(sample.path, sample.options.plane))
    for path in sample.masks:
        grey, levels, is_labelled, notes = reader_of(path).read_mask(path, sample, count)
        by_label = bool(labels) or (is_labelled and not sample.published)
        if sample.published or not by_label:
            levels = grey
        if by_label:
            grey = (np.isin(levels, labels) if labels else levels != 0).astype(np.uint8) * 255
        part = Mask(Image.fromarray(grey), notes, (levels,), by_label)
        if mask is not None:
            if part.image.size != mask.image.size:
                raise InputError(f"{path}: {part.image.size} pixels, but {sample.masks[0]} has {mask.image.size}")
            image = ImageChops.lighter(mask.image, part.image)
            part = Mask(image, mask.notes | notes, mask.values + part.values, mask.by_label or by_label)
        mask = part
    return mask


def levels_note(levels: Levels, by_label: bool, above: int, labels: tuple[int, ...]) -> str | None:
    """A note on the levels of masks, their shares and which are abnormal; None for grey levels 0 and 255 only."""
    if not by_label and set(levels) <= {0, 255}:
        return None
    total = max(sum(levels.values()), 1)
    shown = [f"{level:g} ({count / total:.2%})" for level, count in levels.most_common(SHOWN)]
    more = f", and {len(levels) - SHOWN} more" if len(levels) > SHOWN else ""
    if labels:
        rule = f"abnormal: {', '.join(map(str, labels))}, by mask_labels"
    else:
        rule = "abnormal: every label but 0" if by_label else f"abnormal: levels above {above}"
    return f"masks have {len(levels)} levels: {', '.join(shown)}{more}; {rule} (--mask_labels picks others)"


def load_mask(sample: Sample, size: int, above: int = ABNORMAL_ABOVE) -> Tensor:
    """A mask resized by nearest neighbour: (size, size) bool, True where it is above `above` of 255.

    All False if there is no mask. Raises `InputError` if it cannot be read or its size differs from the image's.
    """
    return load_grey_mask(sample, size)[0] > (above + 0.5) / 255


def load_grey_mask(sample: Sample, size: int) -> Tensor:
    """A mask's grey levels resized by nearest neighbour: (1, size, size) float32 in [0, 1], zeros without a mask.

    The published training augments these and thresholds afterwards: above 0.5 for 127, in general (above + 0.5) / 255.
    A size that differs from the image's raises `InputError`; if `published`, a warning is printed once instead.
    """
    import torch  # noqa: PLC0415 (takes half a second, which `--help` avoids)

    mask = read_mask(sample)
    if mask is None:
        return torch.zeros(1, size, size)
    image, path = mask.image, sample.masks[0]
    if image.size not in (sizes := reader_of(sample.path).sizes(sample)):
        if not sample.published:
            raise InputError(f"{path}: {image.size} pixels, but its image has {' or '.join(map(str, sizes))}")
        words = "masks of another size than their images: resized, as the published loader does"
        warn_once(f"{path.parent}: {words}")
    return torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.NEAREST))).float()[None] / 255


def mask_notes(mask: Mask, above: int = ABNORMAL_ABOVE) -> Notes:
    """Notes on an unusual mask: `empty`, `labels` (not empty, but nothing is above `above`), or `full`."""
    counts = np.asarray(mask.image.histogram())
    greys = np.flatnonzero(counts)
    share = counts[above + 1 :].sum() / max(counts.sum(), 1)
    if greys[-1] == 0:
        return {"empty": "empty"}
    if greys[-1] <= above:
        return {"labels": f"its largest value is {greys[-1]} of 255, and abnormal is above {above}: save 0 and 255"}
    if share > FULL_MASK:
        return {"full": f"{share:.0%} of the image is abnormal" + (" (a constant mask)" if len(greys) == 1 else "")}
    return {}


def check_mask(sample: Sample, above: int = ABNORMAL_ABOVE) -> list[str]:
    """Warnings about a shot's mask: it is empty, or covers nearly the whole image.

    A test mask with labels 0 and 1 counts as empty, as published; `dataset.check` reports it.

    Raises:
        InputError: the mask is not empty, but marks nothing as abnormal, such as one with 0 and 1 instead of 0 and 255.
    """
    mask = read_mask(sample)
    notes = {} if mask is None else mask_notes(mask, above)
    if "labels" in notes:
        raise InputError(f"{sample.masks[0]}: {notes['labels']}")
    return [f"{sample.masks[0]}: {notes[kind]}" for kind in ("empty", "full") if kind in notes]
