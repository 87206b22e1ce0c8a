"""Checkpoints: small files with what was trained and everything needed to use it."""

from __future__ import annotations

import pickle
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision

from utils import InputError, atomic_path

from .detector import Detector, Settings

FORMAT = "madclip-1"


@dataclass
class Checkpoint:
    """What a checkpoint file holds, apart from the tensors' names, which are the published ones."""

    settings: Settings
    parts: dict[str, Any]  # see `Detector.parts`
    about: dict[str, Any] = field(default_factory=dict)  # shots, metrics, how the epoch was selected, versions

    def save(self, path: str | Path) -> None:
        """Write to a temporary name and rename; `InputError` where that is impossible."""
        payload = {"format": FORMAT, "settings": self.settings.to_dict(), "about": self.about, **self.parts}
        try:
            with atomic_path(path) as temporary:
                torch.save(payload, temporary)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            raise InputError(f"{path}: cannot be written ({error}); an older file there is intact") from error

    @classmethod
    def load(cls, path: str | Path) -> Checkpoint:
        """Read a file that `save` wrote; nothing in it can run code."""
        try:
            payload = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise InputError(f"--ckpt {path}: not found; train one with `python train.py --obj ...`") from error
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"--ckpt {path}: not a checkpoint, or damaged ({reason[:150]})") from error
        if not isinstance(payload, dict) or payload.get("format") != FORMAT:
            raise InputError(f"--ckpt {path}: not a checkpoint of this project (no format {FORMAT!r} in it)")
        try:
            settings = Settings.from_dict(payload["settings"])
        except (KeyError, TypeError) as error:
            raise InputError(f"--ckpt {path}: its settings are incomplete ({error})") from error
        parts = {name: part for name, part in payload.items() if name not in ("format", "settings", "about")}
        return cls(settings, parts, payload["about"])

    def restore(self, detector: Detector, path: str | Path) -> None:
        """Put the tensors into `detector`; `InputError` where they do not fit."""
        try:
            detector.load_parts(self.parts)
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"--ckpt {path}: its tensors do not fit its settings ({reason})") from error


def versions() -> dict[str, str]:
    """What made the file."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a str subclass, which weights_only=True refuses
        "torchvision": torchvision.__version__,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
