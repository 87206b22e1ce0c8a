"""A checkpoint made ready: its settings, the CLIP weights that it needs, and the detector with its tensors."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from CLIP import CLIP, create_model

from .checkpoint import Checkpoint, check_weights
from .detector import Detector, Settings
from .options import pick_device, say_weights
from .published import encoder_difference, features_difference, infer_settings


class Described(Protocol):
    """What a published checkpoint does not say and a data set does."""

    obj: str
    prompt_name: str
    pixel_metrics: bool


@dataclass
class Loaded:
    """See `load_detector`."""

    checkpoint: Checkpoint
    settings: Settings  # the checkpoint's, or with another prompt name
    clip: CLIP
    detector: Detector


def load_detector(
    ckpt: str,
    flags: argparse.Namespace,
    describe: Callable[[], Described],
    check: Callable[[Settings], None] = lambda settings: None,
    make_clip: Callable[..., CLIP] = create_model,
) -> Loaded:
    """Read a checkpoint of either format and print what it stands on.

    Args:
        ckpt: the file.
        flags: weights, device, seed, batch_size, allow_other_weights, prompt_name; for a published file also what no
            tensor tells (`published.DEFAULTS`, features_list, pretrain).
        describe: called for a published file.
        check: sees the settings before any weights are read.
        make_clip: see `create_model`.

    Raises:
        InputError: no checkpoint, other CLIP weights than it was trained on, tensors that do not fit.
    """

    def infer(parts: dict[str, Any]) -> Settings:
        settings, words = infer_settings(parts, ckpt, describe(), flags)
        print(f"{ckpt}: {words}")
        return settings

    checkpoint = Checkpoint.load(ckpt, infer)
    settings = checkpoint.settings
    check(settings)
    if flags.prompt_name:
        settings = replace(settings, prompt_name=flags.prompt_name)
    device = pick_device(flags.device)
    clip = make_clip(
        settings.model_name, settings.pretrain, settings.img_size, weights=flags.weights,
        fidelity=settings.fidelity, seed=checkpoint.about.get("options", {}).get("seed", flags.seed), device=device,
    )  # fmt: skip
    say_weights(clip)
    check_weights(checkpoint, clip.info.sha256, clip.info.source, ckpt, flags.allow_other_weights)
    if difference := encoder_difference(checkpoint.parts, clip):
        print(f"{ckpt}: its text encoder differs by up to {difference:.3g} from the CLIP weights, which are used")
    detector = Detector(clip, settings).to(device)
    checkpoint.restore(detector, ckpt)
    if difference := features_difference(checkpoint.parts, detector):
        print(
            f"{ckpt}: its text features differ by up to {difference:.3g} from those of the CLIP weights, which are used"
        )
    return Loaded(checkpoint, settings, clip, detector)
