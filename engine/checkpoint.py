"""Checkpoints: small files with what was trained and everything needed to use it.

python -m engine.checkpoint show CKPT                 settings, shots, metrics, weights' hash
python -m engine.checkpoint export CKPT OUT           the published format, with CLIP's text encoder in it
"""

from __future__ import annotations

import json
import math
import pickle
import platform
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
import torchvision

from CLIP import create_model
from CLIP.openai import check_archive, is_plain, one_line, refused_global
from Prompt import states_fault
from utils import InputError, Parser, atomic_path, run_cli

from .detector import Detector, Settings
from .options import MAX_IMG_SIZE, MODEL_FLAGS
from .published import ENCODER_PREFIX, export, looks_published

FORMAT = "madclip-1"
PARTS = ("normal_det_adapters", "abnormal_det_adapters", "prompt_maker_normal", "prompt_maker_abnormal")
# Of settings: an object's name in prompts has a few words, and the tokenizer takes long over long ones.
LIMITS = {str: lambda value: len(value) <= 200, int: lambda value: value > 0, bool: lambda _: True}


@dataclass
class Checkpoint:
    """What a checkpoint file holds, apart from the tensors' names, which are the published ones."""

    settings: Settings
    parts: dict[str, Any]  # see `Detector.parts`
    about: dict[str, Any] = field(default_factory=dict)  # shots, metrics, how the epoch was selected, versions

    def save(self, path: str | Path) -> None:
        """Write to a temporary name and rename; `InputError` where that is impossible."""
        write({"format": FORMAT, "settings": self.settings.to_dict(), "about": self.about, **self.parts}, path)

    @classmethod
    def load(cls, path: str | Path, published: Callable[[dict[str, Any]], Settings] | None = None) -> Checkpoint:
        """Read a file that `save` wrote; nothing in it can run code.

        `published` makes settings for a file in the published format; without it such a file is refused.
        """
        payload = read(path)
        if payload.get("format") == FORMAT:
            try:
                settings = Settings.from_dict(payload["settings"])
            except (KeyError, TypeError) as error:
                raise InputError(f"--ckpt {path}: its settings are incomplete ({error})") from error
            parts = {name: part for name, part in payload.items() if name not in ("format", "settings", "about")}
            return cls(settings, parts, payload["about"])
        if published is None or not looks_published(payload):
            raise InputError(f"--ckpt {path}: not a checkpoint of this project (no format {FORMAT!r} in it)")
        return cls(published(payload), payload, {"select": "unknown (published checkpoint)"})

    def restore(self, detector: Detector, path: str | Path) -> None:
        """Put the tensors into `detector`; `InputError` where they do not fit."""
        try:
            detector.load_parts(self.parts)
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"--ckpt {path}: its tensors do not fit its settings ({reason})") from error


def read(path: str | Path, flag: str = "--ckpt") -> dict[str, Any]:
    """The dict in a checkpoint file of either format, its types checked; `InputError` names `flag` for other files."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # reading a pipe or a device may never end
            raise InputError(f"{flag} {path}: a folder or a device, not a checkpoint")
        if zipfile.is_zipfile(path):
            check_archive(path)
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{flag} {path}: not found; train one with `python train.py --obj ...`") from error
    except pickle.UnpicklingError as error:  # torch's own words advise to load it all the same
        name = refused_global(error)
        reason = f"Python objects beside tensors, which could run code: {name}" if name else "another kind of file"
        raise InputError(f"{flag} {path}: not a checkpoint, or damaged (it holds {reason})") from error
    except Exception as error:  # whatever a damaged or hostile file provokes in a parser
        raise InputError(f"{flag} {path}: not a checkpoint, or damaged ({one_line(error)})") from error
    if not isinstance(payload, dict):
        raise InputError(f"{flag} {path}: not a checkpoint (it holds a {type(payload).__name__})")
    ours = payload.get("format") == FORMAT
    fault = next(_part_faults(payload), None) or (next(_settings_faults(payload), None) if ours else None)
    if fault:
        raise InputError(f"{flag} {path}: damaged, or not a checkpoint of this project ({one_line(fault)})")
    return payload


def _part_faults(payload: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the types and values of the tensors that are used."""
    for name in PARTS:
        part = payload.get(name, {})
        if not isinstance(part, dict):
            yield f"{name} is a {type(part).__name__}"
        for key, tensor in part.items():
            if not isinstance(key, str) or not isinstance(tensor, torch.Tensor) or not is_plain(tensor):
                yield f"{name}: {key!r:.80} is no plain tensor"
            if not key.startswith(ENCODER_PREFIX) and not torch.isfinite(tensor).all():
                yield f"{name}: {key!r:.80} holds NaN or infinite numbers"


def _settings_faults(payload: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the types and values of settings and notes; `Settings.from_dict` sees what is missing."""
    settings, about = payload.get("settings"), payload.get("about")
    if not isinstance(settings, dict) or not isinstance(about, dict):
        yield "no settings"
    for name, kind in get_type_hints(Settings).items():
        value, choices = settings.get(name), MODEL_FLAGS.get(name, {}).get("choices")
        fits = kind not in LIMITS or (isinstance(value, kind) and LIMITS[kind](value))
        if name in settings and (not fits or (choices and value not in choices)):
            yield f"{name} is {value!r:.80}"
    if settings.get("img_size", 1) > MAX_IMG_SIZE:
        yield f"img_size is {settings['img_size']!r:.80}, above {MAX_IMG_SIZE}"
    layers = settings.get("features_list", [1])
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, int) for layer in layers):
        yield f"features_list is {layers!r:.80}"
    states = settings.get("states")
    if states is not None and (fault := states_fault(states)):
        yield f"states: {fault}"
    options, metrics = about.get("options", {}), about.get("metrics", {})
    if not isinstance(about.get("select"), str) or not isinstance(options, dict) or not isinstance(metrics, dict):
        yield "its notes are incomplete"
    if not _is_threshold(about.get("threshold")):
        yield f"its threshold is {about['threshold']!r:.80}"
    seed = options.get("seed", 0)
    if type(seed) is not int or not -(2**63) <= seed < 2**64:
        yield f"seed is {seed!r:.80}"
    try:
        json.dumps([settings, about])
    except (TypeError, ValueError, RecursionError) as error:
        yield f"its settings are no plain values: {error!s:.80}"


def _is_threshold(value: Any) -> bool:  # noqa: ANN401
    """Whether it is what `calibrate` gives."""
    if value is None:
        return True
    if not isinstance(value, dict):
        return False
    figures, heat_range = value.get("figures"), value.get("heat_range", [0.0, 1.0])
    numbers = [value.get("value"), value.get("pixel_value", 0.0)]
    numbers += heat_range if isinstance(heat_range, list) and len(heat_range) == 2 else [None]
    rates = [figures.get(name, 0) for name in ("f1", "tpr", "fpr")] if isinstance(figures, dict) else [""]
    return (
        all(type(number) is float and math.isfinite(number) for number in numbers)
        and all(rate is None or type(rate) in (int, float) for rate in rates)
        and all(isinstance(figures.get(name), int) for name in ("n_normal", "n_abnormal"))
        and all(isinstance(value.get(name), str) for name in ("rule", "from"))
    )


def write(payload: dict[str, Any], path: str | Path) -> None:
    """Write atomically; `InputError` where that is impossible."""
    try:
        with atomic_path(path) as temporary:
            torch.save(payload, temporary)
    except RuntimeError as error:  # that is how torch.save reports a full disk
        raise InputError(f"{path}: cannot be written (disk full?); an older file there is intact") from error


def copy(source: str | Path, path: str | Path) -> None:
    """Copy a checkpoint atomically; `InputError` where that is impossible."""
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)


def versions() -> dict[str, str]:
    """What made the file."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a str subclass, which weights_only=True refuses
        "torchvision": torchvision.__version__,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def show(path: str) -> None:
    """Print what a checkpoint holds."""
    payload = read(path)
    for name in ("settings", "about"):
        if name in payload:
            print(f"{name}: {json.dumps(payload[name], indent=2)}")
    for name, part in payload.items():
        if isinstance(part, dict) and name not in ("settings", "about"):
            tensors = [tensor for tensor in part.values() if isinstance(tensor, torch.Tensor)]
            print(f"{name}: {len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors):,} numbers")
        elif isinstance(part, torch.Tensor):
            print(f"{name}: {tuple(part.shape)}")


def export_file(path: str, out: str, weights: str | None) -> None:
    """Write a checkpoint of ours in the published format."""
    if Path(out).exists() and Path(out).samefile(path):
        raise InputError(f"{out}: is the checkpoint itself, whose settings the published format cannot hold")
    checkpoint = Checkpoint.load(path)
    settings = checkpoint.settings
    clip = create_model(
        settings.model_name, settings.pretrain, settings.img_size, weights=weights, fidelity=settings.fidelity,
        seed=checkpoint.about.get("options", {}).get("seed", 0),
    )  # fmt: skip
    check_weights(checkpoint, clip.info.sha256, clip.info.source, path)
    detector = Detector(clip, settings)
    checkpoint.restore(detector, path)
    write(export(detector, clip), out)
    print(f"{out}: written in the published format")
    if settings.fidelity != "released" or settings.states:
        print(f"{out}: its script gives other numbers, as it knows neither --fidelity corrected nor --prompts")


def check_weights(
    checkpoint: Checkpoint, sha256: str, source: str, path: str | Path, allow_other: bool = False
) -> None:
    """Name both hashes where a checkpoint was trained on other CLIP weights: `InputError`, or a warning if allowed."""
    trained_on = checkpoint.settings.weights_sha256
    if not trained_on or sha256 == trained_on:
        return
    words = f"--ckpt {path} was trained on CLIP weights {trained_on}, but {source} is {sha256}"
    if not allow_other:
        raise InputError(f"{words}; give the right file with --weights")
    print(f"warning: {words}; used all the same (--allow_other_weights)", file=sys.stderr)


def main() -> None:
    """Command line."""
    parser = Parser(prog="python -m engine.checkpoint", description="Look at or convert checkpoints.")
    actions = parser.add_subparsers(dest="action", required=True)
    shower = actions.add_parser("show", help="print what a checkpoint holds")
    shower.add_argument("ckpt")
    exporter = actions.add_parser("export", help="write the published format")
    exporter.add_argument("ckpt")
    exporter.add_argument("out")
    exporter.add_argument("--weights", help="file with CLIP weights, instead of the one under CLIP/ckpt")
    options = parser.parse_args()
    if options.action == "show":
        show(options.ckpt)
    else:
        export_file(options.ckpt, options.out, options.weights)


if __name__ == "__main__":
    run_cli(main)
