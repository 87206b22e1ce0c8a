"""The folder of a training run. A run that was killed can be resumed from it as if nothing had happened.

runs/<exp_name>/
    config.json      every setting, the command, versions, git commit, host and device, a digest of all images and masks
    metrics.jsonl    a line per epoch; equal numbers give equal bytes (hence no times; those are in W&B)
    last.pth         everything that changes during training, after the last finished epoch
    best.pth         the checkpoint of the selected epoch so far
    result.json      the numbers of the selected and of the last epoch; the run is finished if this file exists
    index.html       the report page
    lock             held by the one process that writes

last.pth is authoritative: it is written first, and what a killed process did not write after it is restored from it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from dataset import notes
from dataset.medical_few import MedicalDataset
from utils import InputError, atomic_path, blame, printable, probe_writable, read_json, write_json

from .. import distributed
from ..evaluation import Evaluation
from ..metrics import Metrics
from ..training import Splits, TrainingState
from . import checkpoint
from .config import Settings, shareable, shots_label
from .scores import Scored, plain

PROJECT = Path(__file__).parents[2]
STATE = "madclip-run-3"
LABELLING = ("patient", "unmarked", "mask_above", "mask_labels")  # fields of a layout: what names and masks mean


class RunFolder:
    """The files of one run; `create` makes a new one. With several processes, only rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics, self.result = path / "config.json", path / "metrics.jsonl", path / "result.json"
        self.last, self.best = path / "last.pth", path / "best.pth"
        self._lock = FileLock(path / "lock")

    @classmethod
    def create(cls, run_dir: str | Path, name: str) -> RunFolder:
        """Make and lock the folder `run_dir`/`name`, or `name`-2, -3, ... if it is taken; `InputError` on failure."""
        if not distributed.is_main():
            return cls(distributed.from_main(Path()))
        for number in itertools.count(1):
            run = cls(Path(run_dir) / f"{name}{f'-{number}' * (number > 1)}")
            with blame(f"--run_dir {run_dir}: {run.path} cannot be made", errors=(OSError,)), suppress(Timeout):
                run.path.mkdir(parents=True, exist_ok=True)
                run._lock.acquire(timeout=0)
                # A process that was killed before it wrote config.json leaves nothing but the lock.
                if {path.name for path in run.path.iterdir()} <= {"lock"}:
                    break
                run._lock.release()
        if number > 1:
            print(f"{Path(run_dir) / name} is there already, so this run is {run.path}", file=sys.stderr)
        distributed.from_main(run.path)
        return run

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock on the folder until the block ends or the process dies.

        If the run is interrupted (Ctrl-C or SIGTERM), prints the command that resumes it.

        Raises:
            InputError: another process is writing here; the message names its pid and host.
        """
        if not distributed.is_main():
            yield
            return
        with blame(f"{self.path}: cannot be written", errors=(OSError,)):
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                config = read_json(self.config)
                writer = f"process {config['pid']} on {config['host']}"
                raise InputError(f"--resume {self.path}: {writer} is still writing this run; stop it first") from None
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C; Slurm sends it before it stops a job
        try:
            for path in self.path.glob(".*.tmp"):  # left by a killed process; no other process writes here
                path.unlink()
            yield
        except KeyboardInterrupt:
            print(f"stopped; to continue: python train.py --resume {shlex.quote(str(self.path))}", file=sys.stderr)
            raise
        finally:
            self._lock.release(force=True)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.json."""
        if distributed.is_main():
            write_json(self.config, config)

    def check_contents(self, config: dict[str, Any], digest: str) -> None:
        """Store the digest of all images and masks in config.json; `InputError` if the run began with other ones."""
        if config.setdefault("contents", digest) != digest:
            raise InputError(
                f"--resume {self.path}: the images and masks are not those that the run began with; start a new run"
            )
        self.write_config(config)

    def save(self, state: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Write last.pth, then the newest line of metrics.jsonl."""
        if not distributed.is_main():
            return
        checkpoint.write_file({"format": STATE, "state": dict(state)}, self.last)
        hint = "last.pth beside it is intact"
        with blame(f"{self.metrics}: cannot be written", hint, (OSError,)), self.metrics.open("a") as file:
            file.write(f"{json.dumps(history[-1])}\n")

    def load_into(self, state: TrainingState, epochs: int) -> None:
        """Restore the state of an interrupted run, and rewrite metrics.jsonl to match; does nothing in a new run.

        Raises:
            InputError: see `load`; or the state does not fit, or more than `epochs` epochs are finished.
        """
        stored = self.load()
        if stored is None:
            return
        with blame(f"--resume {self.last}: does not fit this run", errors=checkpoint.BAD_TENSORS):
            state.load_state_dict(stored)
        if state.epoch > epochs:
            raise InputError(f"--epoch {epochs}: {self.path} has finished {state.epoch} already")
        if distributed.is_main():
            with atomic_path(self.metrics) as temporary:
                temporary.write_text("".join(f"{json.dumps(record)}\n" for record in state.history), encoding="utf-8")

    def load(self) -> dict[str, Any] | None:
        """The state in last.pth, or None before the end of the first epoch.

        Raises:
            InputError: the file is damaged, missing although epochs are finished, or of another version.
        """
        if not self.last.is_file():
            if self.metrics.is_file() and self.metrics.stat().st_size:
                raise InputError(f"--resume {self.path}: last.pth is missing: put it back, or start a new run")
            return None
        payload = checkpoint.read_file(self.last, "--resume")
        if payload.get("format") != STATE:
            raise InputError(f"--resume {self.last}: a run of another version: start a new one")
        return dict(payload["state"])


def open_run(
    options: argparse.Namespace, splits: Splits, settings: Settings, device: torch.device
) -> tuple[RunFolder, dict[str, Any], dict[str, Any]]:
    """Open the run's folder; returns it, the content of config.json (not yet written) and the checkpoints' metadata.

    The metadata holds no path, no host and no command: checkpoints are shared, run folders are not.

    Raises:
        InputError: the run to resume had other settings or other shots.
    """
    config: dict[str, Any] = {
        "options": {name: value for name, value in vars(options).items() if name != "resume"},
        "settings": settings.to_dict(),
        "shots": splits.shots.names,
        "shots_from": splits.shots.source,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **checkpoint.versions(),
        **environment_info(device),
    }
    if options.resume is None:
        default = f"{options.obj}-{shots_label(options)}-{options.fidelity}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = RunFolder.create(options.run_dir, options.exp_name or default)
    else:
        run = RunFolder(Path(options.resume))
        _continue(run, config)
    shared = ("shots", "shots_from", "started", *checkpoint.versions())
    metadata = {name: config[name] for name in shared} | {
        "options": {**shareable(options), "model_name": settings.model_name, "image_tower": settings.image_tower},
        "select": options.select,
        "run": run.path.name,
        "benchmark": splits.dataset.is_benchmark,  # whether these are the paper's own images
        "shot_patients": None if options.anonymous else sorted(splits.shot_patients()),
        "data": {name: plain(getattr(splits.dataset.layout, name)) for name in LABELLING},
    }
    return run, config, metadata


def _continue(run: RunFolder, config: dict[str, Any]) -> None:
    """Raise an `InputError` if a resumed run has other settings or shots; copy the values that never change."""
    stored = read_json(run.config)
    for name in ("settings", "shots"):
        then, now = stored[name], config[name]
        for key in now:
            if key != "version" and now[key] != then.get(key):
                raise InputError(f"--resume {run.path}: {key} was {then.get(key)}, but is now {now[key]}")
    if stored["threads"] != config["threads"]:
        print(
            f"--resume: {config['threads']} threads, {stored['threads']} so far: from now on numbers agree within "
            f"rounding, not to the bit (OMP_NUM_THREADS={stored['threads']} keeps them)"
        )
    config |= {name: stored[name] for name in ("wandb_id", "started", "contents") if name in stored}
    config["resumed"] = stored.get("resumed", 0) + 1


def shot_patients(
    settings: Settings, metadata: Mapping[str, Any], dataset: MedicalDataset
) -> tuple[set[str] | None, str]:
    """The patients of a checkpoint's shots, named as in the data set; or None, and why they are not known."""
    patients, rule = metadata.get("shot_patients"), metadata.get("data", {}).get("patient")
    if "shot_patients" not in metadata:
        return None, "the checkpoint does not name its shots"
    if settings.obj != dataset.obj:
        return None, f"trained on {settings.obj}, and names do not tell whether {dataset.obj} shows the same patients"
    if dataset.layout.patient != rule:
        return None, "patients are named by another rule than in the training (--patient, or the JSON description)"
    if patients is None:
        return None, "trained with --anonymous, which keeps no patient"
    numbers = dataset.numbers
    return set(patients if numbers is None else (numbers[name] for name in patients if name in numbers)), ""


def read_as_trained(options: argparse.Namespace, settings: Settings, metadata: Mapping[str, Any]) -> None:
    """Fill in the reading options that no flag sets, with those of the checkpoint's training.

    Scans are read with the checkpoint's window and plane. The meaning of masks and names belongs to the data set: it is
    taken from the checkpoint only if that was trained on this data set.
    """
    reading = settings.reading or {}
    window = reading.get("window")
    stored = {"plane": reading.get("plane"), "window": [window] if isinstance(window, str) else window}
    if settings.obj == options.obj:
        stored |= {"mask_above": settings.mask_above, **metadata.get("data", {})}
    for name, value in stored.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def result_json(settings: Settings, evaluation: Evaluation, metrics: Metrics, select: str) -> dict[str, Any]:
    """The content of --out_json; `select` says how the epoch was chosen."""
    abnormal = int(evaluation.labels.sum())
    kinds = ({"kind": sample.kind} if sample.kind else {} for sample in evaluation.samples)
    rows = zip(evaluation.names, evaluation.labels.tolist(), evaluation.image_scores.tolist(), kinds, strict=True)
    return {
        "obj": settings.obj,
        "auc": metrics.auc,
        "pauc": metrics.pauc,
        "n_normal": len(evaluation.labels) - abnormal,
        "n_abnormal": abnormal,
        "select": select,
        "mask_above": settings.mask_above,
        **{name: value for name, value in metrics.values.items() if name not in ("auc", "pauc")},
        "settings": settings.to_dict(),
        "pauc_draws": [round(value, 6) for value in metrics.pauc_draws],
        "per_image": [{"file": file, "label": label, "score": score, **kind} for file, label, score, kind in rows],
    }


def published_lines(obj: str, metrics: Metrics) -> str:
    """The final lines of output, as in the published scripts; image-only data sets have no pixel AUC."""
    if metrics.pauc is None:
        return f"{obj} AUC : {metrics.auc:.4f} from det"
    return f"{obj} pAUC : {metrics.pauc:.4f}\n{obj} AUC : {metrics.auc:.4f}"


def describe_test(
    options: argparse.Namespace, dataset: MedicalDataset, settings: Settings, metadata: Mapping[str, Any], images: int
) -> str:
    """A few lines that say which checkpoint was tested on which images."""
    lines = [f"{options.obj}: {images} test images", *notes.describe(dataset)]
    if settings.pixel_metrics and not dataset.pixel_metrics:
        lines.append(f"{dataset.obj} has no masks: no pixel metrics; scores as in training, from the highest pixel")
    elif dataset.pixel_metrics and not settings.pixel_metrics:
        lines.append(
            f"{settings.obj} has no masks, so the checkpoint's segmentation heads are untrained: no pixel metrics; "
            f"scores as in training, from the detection heads"
        )
    if any(dataset.reading.get(name) != value for name, value in (settings.reading or {}).items()):
        lines.append(f"warning: training read pictures with {settings.reading}, this test with {dataset.reading}")
    lines.append(
        f"{Path(options.ckpt).name}: trained on {settings.obj}, tested on {options.obj}, epoch "
        f"{metadata.get('metrics', {}).get('epoch', 'unknown')}, --select {metadata['select']}; the prompts say "
        f"{settings.prompt_name!r}"
    )
    return "\n".join(map(printable, lines))


def check_outputs(options: argparse.Namespace) -> None:
    """Raise an `InputError` if results of train.py or test.py cannot be written, before hours are spent on them."""
    probe_writable(options.out_json, "--out_json", "JSON", read_json)
    probe_writable(getattr(options, "save_scores", None), "--save_scores", "kept evaluation", Scored.load)
    files = {"save_model": ("save_path", f"{options.obj}.pth"), "figures": ("figures", f"{options.obj}.png"),
             "report": ("report", "index.html")}  # fmt: skip
    for wanted, (flag, name) in files.items():
        if getattr(options, wanted, None) and not (wanted == "save_model" and hasattr(options, "ckpt")):
            probe_writable(Path(getattr(options, flag)) / name, f"--{flag}")


def environment_info(device: torch.device) -> dict[str, Any]:
    """Command, git commit, host, process, device and threads of a run, for config.json; W&B gets only the commit."""
    describe = ["git", "-C", str(PROJECT), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    commit = ""
    with suppress(OSError):  # no git on this machine
        commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "git_commit": commit or None,  # with `+` if tracked files differ from it
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
    }
