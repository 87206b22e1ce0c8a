"""The folder of a training run, from which a killed run goes on as if nothing had happened.

runs/<exp_name>/
    config.json      every setting, the command, versions, git commit, host and device
    contents.json    what the images and masks held, by name: --resume refuses others
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
import json
import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from dataset import notes
from utils import InputError, atomic_path, preview, printable, probe_writable, read_text, remove_stale, write_json

from .. import distributed
from ..evaluation import load_evaluation
from . import checkpoint
from .config import Settings, shareable, shots_label

if TYPE_CHECKING:
    from dataset.medical_few import MedicalDataset

    from ..evaluation import Evaluation
    from ..metrics import Metrics
    from ..training import Splits, TrainingState

PROJECT = Path(__file__).parents[2]
STATE = "madclip-run-2"


class RunFolder:
    """One run's files. Make it with `create` or `open`. With several processes rank 0 writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics, self.result = path / "config.json", path / "metrics.jsonl", path / "result.json"
        self.last, self.best, self.contents = path / "last.pth", path / "best.pth", path / "contents.json"
        self._lock = FileLock(path / "lock")

    @classmethod
    def create(cls, run_dir: str | Path, name: str) -> RunFolder:
        """A new folder `run_dir`/`name`; -2, -3, ... is appended where a run of that name has left files."""
        return cls(distributed.from_main(cls._claim(run_dir, name) if distributed.is_main() else Path()))

    @staticmethod
    def _claim(run_dir: str | Path, name: str) -> Path:
        for number in range(1, 10_000):
            path = Path(run_dir) / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise InputError(f"--run_dir {run_dir}: {path} cannot be made ({error.strerror})") from error
            if number > 1:
                print(f"{Path(run_dir) / name} is there already, so this run is {path}", file=sys.stderr)
            return path
        raise InputError(f"--exp_name {name}: {run_dir} has 9,999 runs of that name; choose another")

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of an earlier run; `InputError` where `path` is none."""
        run = cls(Path(path))
        if not str(path) or not run.config.is_file():
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
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            config = self.read_config()
            writer = f"process {config.get('pid')} on {config.get('host')}"
            raise InputError(f"--resume {self.path}: {writer} is still at this run; stop it first") from None
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from error
        try:
            remove_stale(self.path.glob(".*.tmp"), seconds=0)  # of a killed process: this one is alone here
            yield
        except KeyboardInterrupt:
            hint = f"to go on: python train.py --resume {shlex.quote(str(self.path))}"
            print(f"stopped after epoch {state.epoch} of {epochs}; {hint}", file=sys.stderr)
            raise
        finally:
            self._lock.release()

    def files(self, options: argparse.Namespace) -> list[str]:
        """Lines that say where the results are."""
        lines = [f"checkpoint: {Path(options.save_path) / options.obj}.pth"] if options.save_model else []
        return [*lines, f"run:        {self.path}", f"report:     {self.path / 'index.html'}"]

    def read_config(self) -> dict[str, Any]:
        """What `write_config` wrote."""
        try:
            config = json.loads(read_text(self.config))
            shapes = {"options": dict, "settings": dict, "shots": dict, "resumed": int, "wandb_id": str}
            wrong = [name for name, kind in shapes.items() if name in config and not isinstance(config[name], kind)]
            if wrong or "options" not in config:
                raise TypeError(f"{wrong[0] if wrong else 'options'} is missing or of another kind")
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise InputError(f"--resume {self.path}: its config.json is damaged ({error})") from error
        result: dict[str, Any] = config
        return result

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.json."""
        if distributed.is_main():
            write_json(self.config, config)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json, which marks the run as finished."""
        if distributed.is_main():
            write_json(self.result, result)

    def check_contents(self, contents: Mapping[str, str]) -> None:
        """Keep the hashes of images and masks by name, or compare them with those that the run began with.

        Raises:
            InputError: naming the files that differ.
        """
        if not distributed.is_main():
            return
        if not self.contents.is_file():
            write_json(self.contents, contents)
            return
        try:
            before = json.loads(read_text(self.contents))
            changed = [name for name in {**before, **contents} if before.get(name) != contents.get(name)]
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"--resume {self.path}: its contents.json is damaged ({error})") from error
        if changed:
            raise InputError(
                f"--resume {self.path}: {len(changed)} images or masks are not those that the run began with: "
                f"{preview(changed)}; start a new run"
            )

    def save(self, state: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Write last.pth, then the newest line of metrics.jsonl."""
        if not distributed.is_main():
            return
        checkpoint.write({"format": STATE, "state": dict(state)}, self.last)
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(_line(history[-1]))
                file.flush()
        except OSError as error:
            raise InputError(
                f"{self.metrics}: cannot be written ({error.strerror}); last.pth beside it is intact"
            ) from error

    def load_into(self, state: TrainingState, epochs: int) -> None:
        """Put back what an interrupted run had reached; nothing in a new run.

        Raises:
            InputError: what `load` refuses, more than `epochs` finished epochs, a best.pth that is gone.
        """
        stored = self.load()
        if stored is not None:
            state.load_state_dict(stored)
        if state.epoch > epochs:
            raise InputError(f"--epoch {epochs}: {self.path} has finished {state.epoch} already")
        if 0 < state.best_epoch < state.epoch and not self.best.is_file():
            raise InputError(
                f"--resume {self.path}: best.pth is missing, the only copy of the selected epoch {state.best_epoch}: "
                f"put it back, or start a new run"
            )

    def load(self) -> dict[str, Any] | None:
        """The state in last.pth, or None before the first epoch's end; metrics.jsonl is made to agree.

        Raises:
            InputError: a damaged file, a run of an older version, or epochs in metrics.jsonl without a last.pth.
        """
        if not self.last.is_file():
            if self.metrics.is_file() and self.metrics.stat().st_size:
                raise InputError(
                    f"--resume {self.path}: last.pth is missing, though metrics.jsonl has epochs: put it back, or "
                    f"start a new run"
                )
            if self.metrics.is_symlink():  # of a folder from elsewhere: `save` would write through it
                self.metrics.unlink()
            return None
        payload = checkpoint.read(self.last, "--resume")
        state = payload.get("state")
        if str(payload.get("format")).startswith("madclip-run-") and payload["format"] != STATE:
            raise InputError(
                f"--resume {self.path}: a run of an older version, which drew and trained otherwise: start a new one"
            )
        if payload.get("format") != STATE or not isinstance(state, dict) or not isinstance(state.get("history"), list):
            raise InputError(f"--resume {self.path}: its last.pth is not a run's")
        if distributed.is_main():
            with atomic_path(self.metrics) as temporary:
                temporary.write_text("".join(map(_line, state["history"])), encoding="utf-8")
        return state


def open_run(
    options: argparse.Namespace, splits: Splits, settings: Settings, device: torch.device
) -> tuple[RunFolder, dict[str, Any], dict[str, Any]]:
    """The run's folder, its config.json (not written yet), and what its checkpoints say of themselves.

    The metadata holds no path, no host and no command: a checkpoint is shared, a run folder is not.

    Raises:
        InputError: a run to resume had other settings or other shots.
    """
    config: dict[str, Any] = {
        "options": {name: value for name, value in vars(options).items() if name != "resume"},
        "settings": settings.to_dict(),
        "shots": splits.shots.names(),
        "shots_from": re.sub(r"\S*(?=fewshot_seed/)", "", splits.shots.source),  # without the folder that holds it
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **checkpoint.versions(),
        **environment_info(device),
    }
    if options.resume is None:
        default = f"{options.obj}-{shots_label(options)}-{options.fidelity}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = RunFolder.create(options.run_dir, options.exp_name or default)
    else:
        run = RunFolder.open(options.resume)
        stored = run.read_config()
        for name in ("settings", "shots"):
            then, now = stored.get(name) or {}, config[name]
            changed = [key for key in now if key != "version" and now[key] != then.get(key)]
            if changed:
                key = changed[0]
                raise InputError(f"--resume {run.path}: {key} was {then.get(key)}, but is now {now[key]}")
        config |= {name: stored[name] for name in ("wandb_id", "started") if name in stored}
        config["resumed"] = stored.get("resumed", 0) + 1
    shared = ("shots", "shots_from", "started", *checkpoint.versions())
    metadata = {name: config[name] for name in shared}
    metadata |= {
        "options": {**shareable(options), "model_name": settings.model_name},
        "select": options.select,
        "run": run.path.name,
    }
    metadata |= {"shot_patients": sorted(splits.shot_patients())}
    return run, config, metadata


def shot_patients(settings: Settings, metadata: Mapping[str, Any], obj: str) -> set[str]:
    """The patients of a checkpoint's shots, where it is tested on the data set that they come from."""
    return set(metadata.get("shot_patients", [])) if settings.obj == obj else set()


def result_json(settings: Settings, evaluation: Evaluation, metrics: Metrics, select: str) -> dict[str, Any]:
    """What --out_json writes; `select` says how the epoch was chosen."""
    abnormal = int(evaluation.labels.sum())
    rows = zip(evaluation.names, evaluation.labels.tolist(), evaluation.image_scores.tolist(), strict=True)
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
        "per_image": [{"file": file, "label": label, "score": score} for file, label, score in rows],
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
    lines = (first, *map(printable, notes.describe(dataset)), masks_note, reading_note, printable(what))
    return "\n".join(filter(None, lines))


def check_outputs(options: argparse.Namespace) -> None:
    """Make sure that the results of train.py or test.py can be written, before hours are spent on them."""
    probe_writable(options.out_json, "--out_json", "JSON", lambda path: json.loads(read_text(path)))
    probe_writable(getattr(options, "save_scores", None), "--save_scores", "kept evaluation", load_evaluation)
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
