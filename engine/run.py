"""The folder of a training run, from which a killed run goes on as if nothing had happened.

runs/<exp_name>/
    config.json      every setting, the command, versions, git commit, host and device
    metrics.jsonl    a line an epoch, the same bytes for the same numbers (hence no times; those are in W&B)
    last.pth         all that changes while training, after the last finished epoch
    best.pth         the checkpoint of the selected epoch so far
    result.json      the figures of the selected and of the last epoch; the run is finished where it exists

last.pth is the truth: it is written first, and what a killed process did not write after it is made from it again.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from utils import InputError, atomic_path, write_json

from . import checkpoint, distributed

PROJECT = Path(__file__).parents[1]
STATE = "madclip-run-1"


class RunFolder:
    """One run's files. Make it with `create` or `open`. With several processes rank 0 writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics, self.result = path / "config.json", path / "metrics.jsonl", path / "result.json"
        self.last, self.best = path / "last.pth", path / "best.pth"

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
        if not run.config.is_file():
            raise InputError(f"--resume {path}: no run there (no config.json in it)")
        return run

    def read_config(self) -> dict[str, Any]:
        """What `write_config` wrote."""
        try:
            config = json.loads(self.config.read_text(encoding="utf-8"))
            if not isinstance(config["options"], dict):
                raise TypeError("options")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"--resume {self.path}: its config.json is damaged ({error})") from error
        return config

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
        checkpoint.write({"format": STATE, "state": dict(state), "history": list(history)}, self.last)
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(_line(history[-1]))
                file.flush()
        except OSError as error:
            raise InputError(
                f"{self.metrics}: cannot be written ({error.strerror}); last.pth beside it is intact"
            ) from error

    def load(self) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """State and history of last.pth, or None before the first epoch's end; metrics.jsonl is made to agree."""
        history, state = [], None
        if self.last.is_file():
            payload = checkpoint.read(self.last, "--resume")
            state, history = payload.get("state"), payload.get("history")
            if payload.get("format") != STATE or not isinstance(state, dict) or not isinstance(history, list):
                raise InputError(f"--resume {self.path}: its last.pth is not a run's")
        if distributed.is_main():
            with atomic_path(self.metrics) as temporary:
                temporary.write_text("".join(map(_line, history)), encoding="utf-8")
        return None if state is None else (state, history)


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"


def surroundings(device: torch.device) -> dict[str, Any]:
    """Where and from what a run was started: command, git commit, host, device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "git_commit": git_commit(),
        "host": socket.gethostname(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
    }


def git_commit() -> str | None:
    """The project's commit, with `+` where tracked files differ from it; None outside of git."""
    try:
        call = ["git", "-C", str(PROJECT), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        found = subprocess.run(call, capture_output=True, stdin=subprocess.DEVNULL, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.decode().strip() or None


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
