"""Checkpoints: small files with the trained parts and everything needed to use them."""

from __future__ import annotations

import argparse
import itertools
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from CLIP.config import ModelConfig
from CLIP.model import CLIP
from CLIP.weights import Weights, find_weights, read_pickle
from utils import EXPECTED, InputError, atomic_path, blame, warn

from ..detector import Detector
from .config import VERSION, Settings
from .published import frozen_difference, infer_settings, looks_published

Facts = Callable[[], Mapping[str, Any]]
FORMAT = "madclip-1"
METADATA = "about"  # the key of the metadata in files, since the first version
# The errors that torch raises if tensors do not have the expected type, shape or names.
BAD_TENSORS = (*EXPECTED, RuntimeError, TypeError, AttributeError)


@dataclass
class Checkpoint:
    """The content of a checkpoint file; the tensors have their published names."""

    settings: Settings
    parts: dict[str, Any]  # see `Detector.parts`
    metadata: dict[str, Any] = field(default_factory=dict)  # shots, metrics, how the epoch was selected, versions

    def save(self, path: str | Path) -> None:
        """Write the file atomically (temporary file, then rename); `InputError` if it cannot be written."""
        write_file({"format": FORMAT, "settings": self.settings.to_dict(), METADATA: self.metadata, **self.parts}, path)

    @classmethod
    def load(
        cls, path: str | Path, options: argparse.Namespace | None = None, facts: Facts | None = None
    ) -> Checkpoint:
        """Read a file of either format; nothing in it can run code. Prints what was inferred for a published file.

        Args:
            path: the file.
            options: for a published file, the settings that its tensors do not reveal (see `published.infer_settings`).
            facts: for a published file, returns the facts about its training data set (see `published.facts_of`);
                without it, such a file is refused.

        Raises:
            InputError: the file is missing, damaged, or of another kind.
        """
        payload = read_file(path)
        if payload.get("format") == FORMAT:
            with blame(f"--ckpt {path}: damaged"):
                settings = Settings.from_dict(payload.pop("settings"))
                return cls(settings, payload, payload.pop(METADATA))
        if options is None or facts is None or not looks_published(payload):
            fault = f"not a checkpoint of this project (no format {FORMAT!r} in it)"
            raise InputError(f"--ckpt {path}: {fault}; for a published one, name the data set with --obj")
        with blame(f"--ckpt {path}: not a published checkpoint after all", errors=BAD_TENSORS):
            settings, line = infer_settings(payload, path, facts(), options)
        print(f"{path}: {line}")
        return cls(settings, payload, {"select": "unknown (published checkpoint)"})

    @property
    def seed(self) -> int:
        """Seed of the run that made the checkpoint; random weights are drawn from it."""
        return int(self.metadata.get("options", {}).get("seed", 0))

    def restore(self, detector: Detector, clip: CLIP, path: str | Path) -> None:
        """Load the tensors into `detector`; prints a note if a published file's frozen tensors differ from `clip`.

        Raises:
            InputError: tensors do not fit, or are not finite.
        """
        with blame(f"--ckpt {path}: its tensors do not fit its settings", errors=BAD_TENSORS):
            detector.load_parts(self.parts)
            difference = frozen_difference(self.parts, detector, clip)
        if not all(bool(tensor.isfinite().all()) for tensor in detector.parameters()):
            raise InputError(f"--ckpt {path}: its tensors hold NaN or infinite numbers")
        if difference:
            print(f"{path}: its text side differs by up to {difference:.3g} from the CLIP weights, which are used")


def read_file(path: str | Path, flag: str = "--ckpt") -> dict[str, Any]:
    """The dict in a checkpoint file of either format; for any other file, an `InputError` that names `flag`."""
    path = Path(path)
    with blame(f"{flag} {path}", errors=(OSError,)):  # such as a name that is too long
        if not path.is_file():
            why = "a folder or a device, not a checkpoint" if path.exists() else "not found"
            raise InputError(f"{flag} {path}: {why}; train one with `python train.py --obj ...`")
    payload = read_pickle(path, f"{flag} {path}: not a checkpoint")
    if not isinstance(payload, dict):
        raise InputError(f"{flag} {path}: not a checkpoint (it holds a {type(payload).__name__})")
    return payload


def write_file(payload: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint file atomically; `InputError` if it cannot be written."""
    hint = "is the disk full? An older file there is intact"
    with blame(f"{path}: cannot be written", hint, (RuntimeError,)), atomic_path(path) as temporary:
        torch.save(dict(payload), temporary)  # raises a RuntimeError if the disk is full


def copy(source: str | Path, path: Path, metadata: Mapping[str, Any]) -> None:
    """Copy a run's checkpoint to `path` atomically; `metadata` is that of the run.

    A file there that this run did not write is renamed first: it may be the owner's only copy of a downloaded or
    trained checkpoint.
    """
    stored: Mapping[str, Any] = {}
    with suppress(InputError):  # there is no file, or it is no checkpoint
        stored = read_file(path).get(METADATA, {})
    if path.is_file() and any(stored.get(name) != metadata[name] for name in ("run", "started")):
        stem = f"{path.stem}.before-{time.strftime('%Y%m%d-%H%M')}"
        names = (f"{stem}{f'-{n}' * (n > 1)}{path.suffix}" for n in itertools.count(1))
        kept = next(place for name in names if not (place := path.with_name(name)).exists())
        path.rename(kept)
        print(f"{path} is not of this run: renamed to {kept}", flush=True)
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)


def versions() -> dict[str, str]:
    """Versions of this project and its libraries, and the time of writing."""
    return {
        "madclip": VERSION,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a str subclass, which weights_only=True refuses
        "torchvision": version("torchvision"),  # importing it takes a second
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def check_weights(checkpoint: Checkpoint, weights: Weights, path: str | Path, allow_other: bool = False) -> None:
    """Raise an `InputError`, or print a warning if `allow_other`, if a checkpoint was trained on other CLIP weights."""
    trained_on = checkpoint.settings.weights_sha256
    if not trained_on or weights.sha256 == trained_on:
        return
    message = f"--ckpt {path} was trained on CLIP weights {trained_on}, but {weights.source} is {weights.sha256}"
    if not allow_other:
        raise InputError(f"{message}; give the right file with --weights or --image_tower")
    warn(f"{message}; used anyway (--allow_other_weights)")


def find_trained_weights(checkpoint: Checkpoint, options: argparse.Namespace) -> Weights:
    """Find the CLIP weights that a checkpoint was trained on, in CLIP/ckpt or at --weights; prints which they are.

    Raises:
        InputError: the weights are missing or, without --allow_other_weights, differ from those of the training.
    """
    settings = checkpoint.settings
    seed = checkpoint.seed if "options" in checkpoint.metadata else getattr(options, "seed", 111)  # if none is stored
    known = ModelConfig.from_dict(settings.model_config) if settings.model_config else settings.model_name
    model = options.model_name or known  # a folder or JSON file also tells where the weights are
    tower = options.image_tower or settings.image_tower
    weights = find_weights(model, settings.pretrain, options.weights, seed, tower)
    print_weights_info(weights)
    check_weights(checkpoint, weights, options.ckpt, options.allow_other_weights)
    return weights


def print_weights_info(weights: Weights) -> None:
    """Print where the weights come from, and a warning if they are random."""
    print(f"weights: {weights.source}, SHA-256 {weights.sha256[:16]}...", flush=True)
    if weights.pretrain == "random" and weights.tower is not None:
        print("weights: the text tower is RANDOM, so that no text is aligned with the images")
    elif weights.pretrain == "random":
        print("weights: RANDOM, nothing is pre-trained: scores show that the program runs, not what MadCLIP can do")


def default_checkpoint(save_path: str, obj: str) -> Path:
    """<save_path>/<obj>.pth; if it is missing, <obj>.tar.pth, the name of one of the released checkpoints."""
    path = Path(save_path) / f"{obj}.pth"
    released = path.with_suffix(".tar.pth")
    return released if released.is_file() and not path.is_file() else path
