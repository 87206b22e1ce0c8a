"""Run real commands quickly: a server process imports torch once and forks a child for each command.

The child runs the command as `python` does, with an exit code, stdout and stderr of its own. Two things differ from a
fresh start: modules are already imported, and plots are blank, as drawing six takes longer than a training (`draw=True`
draws them). A signal can be sent to a command at an event inside it, so that no test depends on timing:

    command("train.py", ..., on=(Call("engine.files.run.RunFolder.save", 3), signal.SIGKILL))     killed at the event
    running = command.start("train.py", ..., on=(Call("train.evaluate"), signal.SIGSTOP))         waits for `go`
    running.stopped(); ...; running.go(); result = running.wait()
"""

import atexit
import contextlib
import csv
import functools
import gc
import importlib
import io
import json
import os
import pkgutil
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

ROOT = Path(__file__).parents[2]
# Modules that commands import, some slowly. Not wandb: processes forked after its import share its temporary folder.
WARM = (
    "train", "test", "predict", "reproduce", "dataset.check", "engine.checkpoint", "engine.report.page",
    "sklearn.metrics", "sklearn.linear_model", "sklearn.pipeline", "matplotlib.style",
    "matplotlib.backends.backend_agg", "contourpy", "nibabel", "pydicom.pixels",
    "torch._dynamo", "torch.utils.serialization.config",
)  # fmt: skip
# Slow modules that only one command imports.
LATE = {"engine.export": ("onnxscript", "onnxruntime", "torch.onnx._internal.exporter._core")}
HANG = 900  # seconds after which a command counts as hung: it is ended, and its test fails


@dataclass(frozen=True)
class Call:
    """Event: just before the n-th call of a function, named `module.function` or `module.Class.method`."""

    name: str
    number: int = 1


@dataclass(frozen=True)
class Change:
    """Event: just before the n-th creation, write, renaming or removal of a file or folder below `folder`."""

    folder: str
    number: int = 1


Event = Call | Change


def words(script: str, *arguments: object) -> list[str]:
    """Words of a command, with two defaults for train.py.

    --run_dir lies beside --save_path, so that tests write nothing into the project; --select is `test`, as published.
    """
    result = [script, *map(str, arguments)]
    if script == "train.py" and "--save_path" in result and "--run_dir" not in result:
        result += ["--run_dir", result[result.index("--save_path") + 1] + "-runs"]
    if script == "train.py" and not {"--select", "--resume"} & set(result):
        result += ["--select", "test"]
    return result


class Running:
    """A started command."""

    def __init__(self, commands: "Commands", command: list[str], folder: tempfile.TemporaryDirectory[str]) -> None:
        self._commands, self._command, self._folder = commands, command, folder
        self.path = Path(folder.name)  # folder of the files `out` and `err`
        self.pid = 0

    def stopped(self) -> None:
        """Wait until the command has stopped at its event; fail if it ends before."""
        while (state := Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]) != "T":
            if state == "Z":
                raise AssertionError(f"the command ended before its event:\n{self.wait().stderr}")
            time.sleep(0.02)

    def go(self) -> None:
        """Continue a stopped command."""
        os.kill(self.pid, signal.SIGCONT)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Wait for the command to end; return its exit code and what it has printed."""
        code = int(self._commands.ask({"wait": self.pid}))
        self._commands.running.remove(self)
        out, err = ((self.path / name).read_text(errors="replace") for name in ("out", "err"))
        self._folder.cleanup()
        return subprocess.CompletedProcess(self._command, code, out, err)


class Commands:
    """Starts scripts (`train.py`) and modules (`engine.checkpoint`) of this project; `close` when done."""

    def __init__(self) -> None:
        environment = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.commands"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.running: list[Running] = []

    def ask(self, request: Mapping[str, Any]) -> str:
        """Send a request to the server; return its answer, one line."""
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return self.server.stdout.readline()

    def start(
        self,
        script: str,
        *arguments: object,
        file_bytes: int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        draw: bool = False,
        on: tuple[Event, int] | None = None,
    ) -> Running:
        """Start a command, by default in the project's folder.

        `file_bytes` is the size of the largest file that it may write; `draw` says whether figures are drawn; `on` is
        an event and the signal that the command then gets.
        """
        command = words(script, *arguments)
        running = Running(self, command, tempfile.TemporaryDirectory())
        event = on and {"event": type(on[0]).__name__, "action": int(on[1]), **asdict(on[0])}
        request = {"command": command, "folder": str(running.path), "cwd": str(cwd), "file_bytes": file_bytes}
        running.pid = int(self.ask({**request, "env": dict(env or {}), "draw": draw, "on": event}))
        self.running.append(running)
        return running

    def __call__(self, script: str, *arguments: object, **how: Any) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; see `start` for the arguments."""
        return self.start(script, *arguments, **how).wait()

    def close(self) -> None:
        """End the server, and kill commands that a failed test has left running."""
        for running in list(self.running):
            os.kill(running.pid, signal.SIGKILL)
            running.wait()
        self.server.communicate()


def refused(result: subprocess.CompletedProcess[str], *words: str) -> str:
    """Assert exit code 2, no traceback and one error line that contains `words`; return this line."""
    assert result.returncode == 2, (result.returncode, result.stdout[-500:], result.stderr[-2000:])
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def fine(result: subprocess.CompletedProcess[str]) -> str:
    """Assert that a command has succeeded; return its stdout."""
    assert result.returncode == 0, (result.returncode, result.stderr[-3000:])
    assert "Traceback" not in result.stderr
    return result.stdout


def rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, or of predictions.csv in a folder."""
    with (path / "predictions.csv" if path.is_dir() else path).open(newline="") as file:
        return list(csv.DictReader(file))


def read_json(path: Path) -> Any:
    """Content of a JSON file."""
    return json.loads(path.read_text())


def _serve() -> None:
    atexit.register(_end)  # registered before the handlers of the imports, so that it runs after them
    for module in WARM:
        importlib.import_module(module)
    Image.init()
    importlib.import_module("CLIP.tokenizer").Tokenizer.default()
    gc.collect()
    gc.freeze()  # else garbage collection in a child would touch, and so copy, all of these objects

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
            continue
        for module in LATE.get(request["command"][0], ()):
            importlib.import_module(module)
        child = os.fork()
        if child == 0:
            _become(**request)
        print(child, flush=True)


def _become(
    command: list[str],
    folder: str,
    cwd: str,
    file_bytes: int | None,
    env: Mapping[str, str],
    draw: bool,
    on: dict[str, Any] | None,
) -> NoReturn:
    """Run the command in the forked child; the interpreter exits as after any script, including atexit handlers."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    os.environ.update(env)
    os.chdir(cwd)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    signal.alarm(HANG)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored if pytest runs in the background
    if not draw:
        importlib.import_module("engine.report.figures").Plot.png = _blank
    if on:
        _install(**on)
    script = command[0]
    sys.argv = command
    try:
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        sys.exit(0)
    except SystemExit as left:
        _codes.append(left.code)
        raise


def _blank(*_: object, **__: object) -> bytes:
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    return file.getvalue()


_codes: list[object] = []  # the exit code of a child, once it is known


def _end() -> None:
    """Skip the interpreter's shutdown, which takes half a second, if the exit code is an integer."""
    if _codes and isinstance(_codes[0], int):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # then the normal shutdown reports the error
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_codes[0])


def _install(event: str, action: int, number: int, name: str = "", folder: str = "") -> None:
    """Send the signal `action` to this process at the `number`-th event."""
    seen = 0

    def happen() -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), action)

    if event == "Change":
        sys.addaudithook(functools.partial(_watch, folder, happen))
        return
    path, _, attribute = name.rpartition(".")
    owner = pkgutil.resolve_name(path)
    function = getattr(owner, attribute)

    @functools.wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        happen()
        return function(*arguments, **options)

    setattr(owner, attribute, wrapped)


CHANGES = ("os.rename", "os.remove", "os.mkdir")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _watch(folder: str, happen: Callable[[], None], event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook that calls `happen` before each change of a file or folder below `folder`."""
    if (event in CHANGES or (event == "open" and (arguments[2] or 0) & WRITES)) and arguments:
        path = arguments[0]
        if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(folder):
            happen()


if __name__ == "__main__":
    _serve()
