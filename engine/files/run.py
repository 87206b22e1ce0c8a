"""The folder of a training run, from which a killed run goes on as if nothing had happened.

runs/<exp_name>/
    config.json      every setting, the command, versions, git commit, host and device, a digest of all images and masks
    metrics.jsonl    a line an epoch, the same bytes for the same numbers (hence no times; those are in W&B)
    last.pth         all that changes while training, after the last finished epoch
    best.pth         the checkpoint of the selected epoch so far
    result.json      the numbers of the selected and of the last epoch; the run is finished where it exists
    lock             held by the one process that writes

last.pth is the truth: it is written first, and what a killed process did not write after it is made from it again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout

from dataset import notes
from dataset.layout import Layout
from dataset.medical_few import MedicalDataset
from utils import InputError, atomic_path, blame, printable, probe_writable, read_json, remove_stale, write_json

from .. import distributed
from ..evaluation import Evaluation
from ..metrics import Metrics
from ..training import Splits, TrainingState
from . import checkpoint
from .config import Settings, shareable, shots_label
from .scores import Scored

PROJECT = Path(__file__).parents[2]
STATE = "madclip-run-3"


class RunFolder:
    """One run's files. Make it with `create` or `open`. With several processes rank 0 writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics, self.result = path / "config.json", path / "metrics.jsonl", path / "result.json"
        self.last, self.best = path / "last.pth", path / "best.pth"
        self._lock = FileLock(path / "lock")

    @classmethod
    def create(cls, run_dir: str | Path, name: str) -> RunFolder:
        """The folder `run_dir`/`name`, locked; -2, -3, ... is appended where a run of that name has left files."""
        if not distributed.is_main():
            return cls(distributed.from_main(Path()))
        run = cls._claim(Path(run_dir), name)
        distributed.from_main(run.path)
        return run

    @classmethod
    def _claim(cls, run_dir: Path, name: str) -> RunFolder:
        number = 1
        while True:
            run = cls(run_dir / (name if number == 1 else f"{name}-{number}"))
            with blame(f"--run_dir {run_dir}: {run.path} cannot be made", errors=(OSError,)):
                run.path.mkdir(parents=True, exist_ok=True)
                if run._is_unused():
                    with contextlib.suppress(Timeout):
                        run._lock.acquire(timeout=0)
                        if run._is_unused():  # still: another process may have begun and ended meanwhile
                            break
                        run._lock.release()
            number += 1
        if number > 1:
            print(f"{run_dir / name} is there already, so this run is {run.path}", file=sys.stderr)
        return run

    def _is_unused(self) -> bool:
        """Whether no run has begun here: a process that is killed before it writes config.json leaves but the lock."""
        return not {path.name for path in self.path.iterdir()} - {"lock"}

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of an earlier run; `InputError` where `path` is none."""
        run = cls(Path(path))
        if not run.config.is_file():
            raise InputError(f"--resume {path}: no run there (no config.json in it)")
        return run

    @contextlib.contextmanager
    def writing(self, state: TrainingState, epochs: int) -> Iterator[None]:
        """Be the one process that writes here, until the block ends or the process dies.

        An interrupt prints how to go on.

        Raises:
            InputError: another process writes here; names its pid and host.
        """
        if not distributed.is_main():
            yield
            return
        with blame(f"{self.path}: cannot be written", errors=(OSError,)):
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                config = self.read_config()
                writer = f"process {config['pid']} on {config['host']}"
                raise InputError(f"--resume {self.path}: {writer} is still at this run; stop it first") from None
        try:
            remove_stale(self.path.glob(".*.tmp"), seconds=0)  # of a killed process: this one is alone here
            yield
        except KeyboardInterrupt:
            hint = f"to go on: python train.py --resume {shlex.quote(str(self.path))}"
            print(f"stopped after epoch {state.epoch} of {epochs}; {hint}", file=sys.stderr)
            raise
        finally:
            self._lock.release(force=True)

    def files(self, options: argparse.Namespace) -> list[str]:
        """Lines that say where the results are."""
        lines = [f"checkpoint: {Path(options.save_path) / options.obj}.pth"] if options.save_model else []
        return [*lines, f"run:        {self.path}", f"report:     {self.path / 'index.html'}"]

    def read_config(self) -> dict[str, Any]:
        """What `write_config` wrote."""
        return dict(read_json(self.config))

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.json."""
        if distributed.is_main():
            write_json(self.config, config)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json, which marks the run as finished."""
        if distributed.is_main():
            write_json(self.result, result)

    def save(self, state: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Write last.pth, then the newest line of metrics.jsonl."""
        if not distributed.is_main():
            return
        checkpoint.write({"format": STATE, "state": dict(state)}, self.last)
        hint = "last.pth beside it is intact"
        with blame(f"{self.metrics}: cannot be written", hint, (OSError,)), self.metrics.open("a") as file:
            file.write(_line(history[-1]))

    def load_into(self, state: TrainingState, epochs: int) -> None:
        """Put back what an interrupted run had reached, and make metrics.jsonl agree; nothing in a new run.

        Raises:
            InputError: what `load` refuses, more than `epochs` finished epochs, a best.pth that is gone.
        """
        stored = self.load()
        if stored is None:
            return
        with blame(f"--resume {self.last}: does not fit this run", errors=checkpoint.ODD):
            state.load_state_dict(stored)
        if state.epoch > epochs:
            raise InputError(f"--epoch {epochs}: {self.path} has finished {state.epoch} already")
        if 0 < state.best_epoch < state.epoch and not self.best.is_file():
            raise InputError(
                f"--resume {self.path}: best.pth is missing, the only copy of the selected epoch {state.best_epoch}: "
                f"put it back, or start a new run"
            )
        if distributed.is_main():
            with atomic_path(self.metrics) as temporary:
                temporary.write_text("".join(map(_line, state.history)), encoding="utf-8")

    def load(self) -> dict[str, Any] | None:
        """The state in last.pth, or None before the first epoch's end.

        Raises:
            InputError: a damaged file, a run of an older version, or epochs in metrics.jsonl without a last.pth.
        """
        if not self.last.is_file():
            if self.metrics.is_file() and self.metrics.stat().st_size:
                raise InputError(
                    f"--resume {self.path}: last.pth is missing, though metrics.jsonl has epochs: put it back, or "
                    f"start a new run"
                )
            return None
        payload = checkpoint.read(self.last, "--resume")
        if payload.get("format") != STATE:
            raise InputError(f"--resume {self.last}: a run of another version: start a new one")
        return dict(payload["state"])


def open_run(
    options: argparse.Namespace, splits: Splits, settings: Settings, device: torch.device
) -> tuple[RunFolder, dict[str, Any], dict[str, Any]]:
    """The run's folder, its config.json (not written yet), and what its checkpoints say of themselves.

    The metadata holds no path, no host and no command: a checkpoint is shared, a run folder is not.

    Raises:
        InputError: a run to resume had other settings, other shots, or other images and masks.
    """
    config: dict[str, Any] = {
        "options": {name: value for name, value in vars(options).items() if name != "resume"},
        "settings": settings.to_dict(),
        "shots": splits.shots.names(),
        "shots_from": splits.shots.source,
        "contents": hashlib.sha256(json.dumps(splits.contents(), sort_keys=True).encode()).hexdigest(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **checkpoint.versions(),
        **environment_info(device),
    }
    if options.resume is None:
        default = f"{options.obj}-{shots_label(options)}-{options.fidelity}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = RunFolder.create(options.run_dir, options.exp_name or default)
    else:
        run = RunFolder.open(options.resume)
        _continue(run, config)
    shared = ("shots", "shots_from", "started", *checkpoint.versions())
    metadata = {name: config[name] for name in shared} | {
        "options": {**shareable(options), "model_name": settings.model_name, "image_tower": settings.image_tower},
        "select": options.select,
        "run": run.path.name,
        "benchmark": splits.dataset.is_benchmark,  # the paper's own images
        "shot_patients": None if options.anonymous else sorted(splits.shot_patients()),
        "data": described_by(splits.dataset.layout),
    }
    return run, config, metadata


def described_by(layout: Layout) -> dict[str, Any]:
    """What masks and names of a data set mean, in plain values."""
    named = {"patient": layout.patient, "unmarked": layout.unmarked}
    return {**named, "mask_above": layout.mask_above, "mask_labels": list(layout.mask_labels)}


def _continue(run: RunFolder, config: dict[str, Any]) -> None:
    """Compare the config of a run that goes on with the stored one, and take over what the run keeps for life."""
    stored = run.read_config()
    for name in ("settings", "shots"):
        then, now = stored[name], config[name]
        for key in now:
            if key != "version" and now[key] != then.get(key):
                raise InputError(f"--resume {run.path}: {key} was {then.get(key)}, but is now {now[key]}")
    if stored["contents"] != config["contents"]:
        raise InputError(
            f"--resume {run.path}: the images and masks are not those that the run began with; start a new run"
        )
    if stored["threads"] != config["threads"]:
        print(
            f"--resume: {config['threads']} threads, {stored['threads']} so far: the numbers go on within rounding, "
            f"not to the bit (OMP_NUM_THREADS={stored['threads']} keeps them)"
        )
    config |= {name: stored[name] for name in ("wandb_id", "started") if name in stored}
    config["resumed"] = stored.get("resumed", 0) + 1


def shot_patients(
    settings: Settings, metadata: Mapping[str, Any], options: argparse.Namespace
) -> tuple[set[str] | None, str]:
    """The patients of a checkpoint's shots as the data set names them, or None and why they are not known."""
    patients, rule = metadata.get("shot_patients"), metadata.get("data", {}).get("patient")
    if "shot_patients" not in metadata:
        return None, "the checkpoint does not name its shots"
    if settings.obj != options.obj:
        return None, f"trained on {settings.obj}, and names do not tell whether {options.obj} shows the same patients"
    if options.patient not in (None, rule):
        return None, "--patient is not what the training named patients by"
    if patients is None:
        return None, "trained with --anonymous, which keeps no patient"
    return set(patients), ""


def read_as_trained(options: argparse.Namespace, settings: Settings, metadata: Mapping[str, Any]) -> None:
    """Set what no flag says of how images are read to what the training of a checkpoint did.

    Scans are read by the checkpoint's window and plane. What masks and names mean belongs to the data set: it follows
    the checkpoint where that was trained on this one.
    """
    stored: dict[str, Any] = {}
    if settings.reading is not None:
        window = settings.read_options.window
        words = [window] if isinstance(window, str) else list(map(str, window or ()))
        stored = {"plane": settings.read_options.plane, "window": words or None}
    if settings.obj == options.obj:
        stored |= {"mask_above": settings.mask_above, **metadata.get("data", {})}
    for name, value in stored.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def result_json(settings: Settings, evaluation: Evaluation, metrics: Metrics, select: str) -> dict[str, Any]:
    """What --out_json writes; `select` says how the epoch was chosen."""
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
    """The lines with which the published scripts end; image-only data sets have no pixel AUC to print."""
    if metrics.pauc is None:
        return f"{obj} AUC : {metrics.auc:.4f} from det"
    return f"{obj} pAUC : {metrics.pauc:.4f}\n{obj} AUC : {metrics.auc:.4f}"


def describe_test(
    options: argparse.Namespace, dataset: MedicalDataset, settings: Settings, metadata: Mapping[str, Any], images: int
) -> str:
    """What was tested on what, in a few lines."""
    masks_note = None
    if settings.pixel_metrics and not dataset.pixel_metrics:
        masks_note = f"{dataset.obj} has no masks: no pixel metrics; images score as trained, by their highest pixel"
    elif dataset.pixel_metrics and not settings.pixel_metrics:
        masks_note = (
            f"{settings.obj} has no masks, so the checkpoint's segmentation heads are untrained: no pixel metrics; "
            f"images score as trained, by the detection heads"
        )
    epoch = metadata.get("metrics", {}).get("epoch", "unknown")
    what = (
        f"{Path(options.ckpt).name}: trained on {settings.obj}, tested on {options.obj}, epoch {epoch}, --select "
        f"{metadata['select']}; the prompts say {settings.prompt_name!r}"
    )
    reading_note = None
    if any(dataset.reading.get(name) != value for name, value in (settings.reading or {}).items()):
        reading_note = f"warning: training read pictures with {settings.reading}, this test with {dataset.reading}"
    first = f"{options.obj}: {images} test images"
    lines = (
        first,
        *map(printable, notes.describe(dataset, names=not options.anonymous)),
        masks_note,
        reading_note,
        printable(what),
    )
    return "\n".join(filter(None, lines))


def check_outputs(options: argparse.Namespace) -> None:
    """Make sure that the results of train.py or test.py can be written, before hours are spent on them."""
    probe_writable(options.out_json, "--out_json", "JSON", read_json)
    probe_writable(getattr(options, "save_scores", None), "--save_scores", "kept evaluation", Scored.load)
    files = {"save_model": ("save_path", f"{options.obj}.pth"), "figures": ("figures", f"{options.obj}.png"),
             "report": ("report", "index.html")}  # fmt: skip
    for wanted, (flag, name) in files.items():
        if getattr(options, wanted, None) and not (wanted == "save_model" and hasattr(options, "ckpt")):
            probe_writable(Path(getattr(options, flag)) / name, f"--{flag}")


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"


def environment_info(device: torch.device) -> dict[str, Any]:
    """Where and from what a run was started: command, git commit, host, process, device. Only config.json holds it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "git_commit": git_commit(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
    }


def git_commit() -> str | None:
    """The project's commit, with `+` where tracked files differ from it; None outside of git."""
    try:
        call = ["git", "-C", str(PROJECT), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        result = subprocess.run(call, capture_output=True, stdin=subprocess.DEVNULL, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.decode().strip() or None


class StopSignals:
    """SIGTERM interrupts like Ctrl-C (Slurm sends it before it takes a machine back), and neither does in `held`.

    Use as a context manager, in the main thread.
    """

    def __init__(self) -> None:
        self._held, self._pending = False, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._held:
            self._pending = True
        else:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let the block finish; an interrupt that came meanwhile follows it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt
