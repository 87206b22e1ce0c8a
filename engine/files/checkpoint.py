"""Checkpoints: small files with what was trained and everything needed to use it."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from CLIP.config import ModelConfig
from CLIP.weights import find_weights, read_pickle
from Prompt.states import states_fault
from utils import InputError, atomic_path, checked, one_line, printable, warn

from .config import VERSION, Settings

if TYPE_CHECKING:
    import argparse

    from CLIP.model import CLIP
    from CLIP.weights import Weights, WeightsInfo

    from ..detector import Detector
    from .published import DatasetInfo

FORMAT = "madclip-1"
PARTS = ("normal_det_adapters", "abnormal_det_adapters", "prompt_maker_normal", "prompt_maker_abnormal")
METADATA = "about"  # its name in files, since the first version


@dataclass
class Checkpoint:
    """What a checkpoint file holds, apart from the tensors' names, which are the published ones."""

    settings: Settings
    parts: dict[str, Any]  # see `Detector.parts`
    metadata: dict[str, Any] = field(default_factory=dict)  # shots, metrics, how the epoch was selected, versions
    published: bool = False  # read from a file in the published format

    def save(self, path: str | Path) -> None:
        """Write to a temporary name and rename; `InputError` where that is impossible."""
        write({"format": FORMAT, "settings": self.settings.to_dict(), METADATA: self.metadata, **self.parts}, path)

    @classmethod
    def load(
        cls, path: str | Path, options: argparse.Namespace | None = None, dataset: DatasetInfo | None = None
    ) -> Checkpoint:
        """Read a file of either format; nothing in it can run code.

        Args:
            path: the file.
            options: for a published file, what no tensor tells (see `published.infer_settings`).
            dataset: for a published file, the data set that it was trained on; without it such a file is refused.

        Raises:
            InputError: no such file, a damaged one, or another kind of file.
        """
        from .published import infer_settings, looks_published  # noqa: PLC0415 - which imports this module's names

        payload = read(path)
        if payload.get("format") == FORMAT:
            settings = Settings.from_dict(payload["settings"], f"--ckpt {path}: settings")
            parts = {name: part for name, part in payload.items() if name not in ("format", "settings", METADATA)}
            return cls(settings, parts, payload[METADATA])
        if options is None or dataset is None or not looks_published(payload):
            raise InputError(f"--ckpt {path}: not a checkpoint of this project (no format {FORMAT!r} in it)")
        settings, line = infer_settings(payload, path, dataset, options)
        print(f"{path}: {line}")
        return cls(settings, payload, {"select": "unknown (published checkpoint)"}, published=True)

    @property
    def seed(self) -> int:
        """Of the run that made it: random weights are drawn from it."""
        return int(self.metadata.get("options", {}).get("seed", 0))

    def restore(self, detector: Detector, clip: CLIP, path: str | Path) -> None:
        """Put the tensors into `detector`, and print where a published file's frozen tensors are not those of `clip`.

        Raises:
            InputError: tensors that do not fit.
        """
        from .published import encoder_difference, features_difference  # noqa: PLC0415 - see `load`

        try:
            detector.load_parts(self.parts)
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"--ckpt {path}: its tensors do not fit its settings ({reason})") from error
        differences = {
            "text encoder differs": encoder_difference(self.parts, clip),
            "text features differ": features_difference(self.parts, detector),
        }
        for what, difference in differences.items():
            if difference:
                print(f"{path}: its {what} by up to {difference:.3g} from the CLIP weights, which are used")


@dataclass
class Metadata:
    """What is read of a checkpoint's metadata; more may stand there."""

    select: str
    options: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    shots: dict[str, list[str]] | None = None
    shot_patients: list[str] = field(default_factory=list)
    threshold: dict[str, Any] | None = None
    run: str | None = None


@dataclass
class SelectedMetrics:
    """`Metadata.metrics`."""

    epoch: int | None = None
    auc: float | None = None
    pauc: float | None = None


@dataclass
class Threshold:
    """`Metadata.threshold`, but for its `from`, a string."""

    value: float
    rule: str
    figures: dict[str, Any]
    pixel_value: float | None = None
    heat_range: list[float] | None = None


@dataclass
class ThresholdMetrics:
    """`Threshold.figures`, see `calibration.threshold_metrics`."""

    f1: float | None
    tpr: float | None
    fpr: float | None
    n_normal: int
    n_abnormal: int


def read(path: str | Path, flag: str = "--ckpt") -> dict[str, Any]:
    """The dict in a checkpoint file of either format, its types checked; `InputError` names `flag` for other files."""
    path = Path(path)
    if not path.is_file():
        why = "a folder or a device, not a checkpoint" if path.exists() else "not found"
        raise InputError(f"{flag} {path}: {why}; train one with `python train.py --obj ...`")
    payload = read_pickle(path, f"{flag} {path}: not a checkpoint")
    if not isinstance(payload, dict):
        raise InputError(f"{flag} {path}: not a checkpoint (it holds a {type(payload).__name__})")
    fault = next(_part_faults(payload), None)
    if fault:
        raise InputError(f"{flag} {path}: damaged, or not a checkpoint of this project ({one_line(fault)})")
    if payload.get("format") == FORMAT:
        where = f"{flag} {path}: damaged, or not a checkpoint of this project"
        check_metadata(payload.get("settings", {}), payload.get(METADATA), where)
    return payload


def _part_faults(payload: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the types and values of the tensors that are used."""
    for name in PARTS:
        part = payload.get(name, {})
        if not isinstance(part, dict):
            yield f"{name} is a {type(part).__name__}"
        for key, tensor in part.items():
            if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
                yield f"{name}: {key!r:.80} is no plain tensor"
            if not key.startswith("text_encoder.") and not torch.isfinite(tensor).all():
                yield f"{name}: {key!r:.80} holds NaN or infinite numbers"


def check_metadata(settings_in_file: object, metadata_in_file: object, where: str) -> Settings:
    """The settings that a file of ours holds; `InputError` where they or its metadata are not what we write."""
    settings = Settings.from_dict(settings_in_file, where)
    metadata = checked(Metadata, metadata_in_file, where)
    checked(SelectedMetrics, metadata.metrics, f"{where}: metrics")
    if metadata.threshold is not None:
        threshold = checked(Threshold, metadata.threshold, f"{where}: threshold")
        checked(ThresholdMetrics, threshold.figures, f"{where}: threshold: figures")
        two = threshold.heat_range is None or len(threshold.heat_range) == 2
        if not two or not isinstance(metadata.threshold.get("from"), str):
            raise InputError(f"{where}: its threshold is incomplete")
    if settings.model_config is not None:
        ModelConfig.from_dict(settings.model_config, f"{where}: model_config")
    if settings.states is not None and (fault := states_fault(settings.states)):
        raise InputError(f"{where}: states: {one_line(fault)}")
    seed = metadata.options.get("seed", 0)
    if type(seed) is not int or not -(2**63) <= seed < 2**64:
        raise InputError(f"{where}: seed is {seed!r:.80}")
    if metadata.run is not None and not printable(metadata.run) == metadata.run:
        raise InputError(f"{where}: run is {metadata.run!r:.80}")
    try:
        json.dumps([settings_in_file, metadata_in_file])
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: its settings are no plain values ({error!s:.80})") from error
    return settings


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
    import torchvision  # noqa: PLC0415

    return {
        "madclip": VERSION,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a str subclass, which weights_only=True refuses
        "torchvision": torchvision.__version__,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def check_weights(
    checkpoint: Checkpoint, weights: Weights | WeightsInfo, path: str | Path, allow_other: bool = False
) -> None:
    """Name both hashes where a checkpoint was trained on other CLIP weights: `InputError`, or a warning if allowed."""
    trained_on = checkpoint.settings.weights_sha256
    if not trained_on or weights.sha256 == trained_on:
        return
    message = f"--ckpt {path} was trained on CLIP weights {trained_on}, but {weights.source} is {weights.sha256}"
    if not allow_other:
        raise InputError(f"{message}; give the right file with --weights")
    warn(f"{message}; used all the same (--allow_other_weights)")


def find_trained_weights(checkpoint: Checkpoint, options: argparse.Namespace) -> Weights:
    """The CLIP weights that a checkpoint stands on, found under CLIP/ckpt or --weights; prints what they are.

    Raises:
        InputError: none, or others than it was trained on.
    """
    settings = checkpoint.settings
    seed = checkpoint.seed if not checkpoint.published else options.seed
    where = f"--ckpt {options.ckpt}: its model_config"
    known = ModelConfig.from_dict(settings.model_config, where) if settings.model_config else settings.model_name
    model = options.model_name or known  # a folder or a JSON file given anew says where its weights are
    weights = find_weights(model, settings.pretrain, options.weights, seed)
    print_weights_info(weights)
    deepest, depth = max(settings.features_list), weights.config.layers
    if deepest > depth:
        raise InputError(
            f"--ckpt {options.ckpt}: reads layer {deepest}, but {printable(weights.config.name)} has {depth}"
        )
    check_weights(checkpoint, weights, options.ckpt, options.allow_other_weights)
    return weights


def print_weights_info(weights: Weights) -> None:
    """Print where the weights come from, and a warning where nothing is pre-trained."""
    print(f"weights: {weights.source}, SHA-256 {weights.sha256[:16]}...", flush=True)
    if weights.pretrain == "random":
        print("weights: RANDOM, nothing is pre-trained: scores show that the program runs, not what MadCLIP can do")


def default_checkpoint(save_path: str, obj: str) -> Path:
    """<save_path>/<obj>.pth, or <obj>.tar.pth, as one of the released checkpoints is called."""
    path = Path(save_path) / f"{obj}.pth"
    released = path.with_suffix(".tar.pth")
    return released if released.is_file() and not path.is_file() else path


def set_aside(path: Path, run: str, started: str) -> None:
    """Rename a checkpoint that another run or the published program wrote, before this run writes under its name.

    It may be the only copy of what its owner has downloaded or trained.
    """
    if not path.is_file():
        return
    with contextlib.suppress(InputError):
        metadata = read(path).get(METADATA, {})
        if (metadata.get("run"), metadata.get("started")) == (run, started):
            return
    stem = f"{path.stem}.before-{time.strftime('%Y%m%d-%H%M')}"
    kept = next(
        p for n in range(1, 1000) if not (p := path.with_name(f"{stem}{f'-{n}' * (n > 1)}{path.suffix}")).exists()
    )
    path.rename(kept)
    print(f"{path} is not of this run: renamed to {kept}", flush=True)
