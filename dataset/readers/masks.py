"""Masks: which pixels of an image are abnormal.

A mask's levels are its greys; with a palette of colours the palette's indices; of a volume its labels. Of greys those
above `mask_above` are abnormal, of labels all but 0, of either those that `ReadOptions.mask_labels` names, if any. The
paper's own data are read as published: by luminance, and resized where their size differs.
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

Levels = Counter[float]  # a level -> how many pixels have it

ABNORMAL_ABOVE = 127  # of 255, in a mask
FULL_MASK = 0.9  # the part of an image above which a mask is said
SHOWN = 8  # levels in a line


class Mask(NamedTuple):
    """A mask as it was read, or several of one image united."""

    image: Image.Image  # 8-bit grey at its own size; 0 and 255 where labels say what is abnormal
    notes: Notes  # `orientation`, `alpha`, `wide`, ...: what is to be said of the file
    values: tuple[Array, ...]  # of each file, its levels pixel by pixel
    by_label: bool  # labels say what is abnormal, not the grey

    @property
    def levels(self) -> Levels:
        """How often each level occurs."""
        counts = (np.unique(values, return_counts=True) for values in self.values)
        return sum((Levels(dict(zip(*map(np.ndarray.tolist, pair), strict=True))) for pair in counts), Levels())

    def marks(self, above: int) -> bool:
        """Whether any pixel is abnormal."""
        return self.image.getextrema()[1] > (0 if self.by_label else above)  # type: ignore[operator]


def read_mask(sample: Sample) -> Mask | None:
    """The mask of an image, None where it has none.

    Orientation is ignored as ever (note `orientation`). Colours become their luminance; where they are constant and the
    alpha channel is not, the mask is the alpha channel (note `alpha`). Of a volume the slice of the same number. The
    window is for images: it never changes a mask.

    Raises:
        InputError: a file cannot be read, or several masks of the image differ in size.
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
    """A line on the levels of some masks, their shares, and which count as abnormal; None for 0 and 255 alone."""
    if not by_label and set(levels) <= {0, 255}:
        return None
    total = max(sum(levels.values()), 1)
    shown = [f"{level:g} ({count / total:.2%})" for level, count in levels.most_common(SHOWN)]
    more = f", and {len(levels) - SHOWN} more" if len(levels) > SHOWN else ""
    if labels:
        rule = f"abnormal are {', '.join(map(str, labels))}, by mask_labels"
    else:
        rule = "abnormal is every label but 0" if by_label else f"abnormal is above {above}"
    return f"masks have {len(levels)} levels: {', '.join(shown)}{more}; {rule} (--mask_labels picks others)"


def load_mask(sample: Sample, size: int, above: int = ABNORMAL_ABOVE) -> Tensor:
    """A mask resized by nearest neighbour: (size, size) bool, True where it is above `above` of 255.

    All False where there is no mask. `InputError` where it cannot be read or is of another size than its image.
    """
    return load_grey_mask(sample, size)[0] > (above + 0.5) / 255


def load_grey_mask(sample: Sample, size: int) -> Tensor:
    """A mask's greys resized by nearest neighbour: (1, size, size) float32 in [0, 1], zeros where there is no mask.

    The published training augments these and thresholds afterwards: above 0.5 for 127, in general (above + 0.5) / 255.
    Another size than its image's is refused, or said once where `published`.
    """
    import torch  # noqa: PLC0415 (half a second, which `--help` need not wait for)

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
    """What is odd about a mask: `empty`, `labels` (marks something, but nothing above `above`), or `full`."""
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
    """Warnings about a shot's mask: constant, or nearly all of the image.

    A test mask of labels counts as empty, as published, and `dataset.check` reports it.

    Raises:
        InputError: the mask marks something, but nothing as abnormal: labels 0 and 1 where 0 and 255 are meant.
    """
    mask = read_mask(sample)
    notes = {} if mask is None else mask_notes(mask, above)
    if "labels" in notes:
        raise InputError(f"{sample.masks[0]}: {notes['labels']}")
    return [f"{sample.masks[0]}: {notes[kind]}" for kind in ("empty", "full") if kind in notes]
