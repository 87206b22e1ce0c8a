"""Real commands, quickly: a process imports torch once and forks for each command, which then runs as `python` runs it.

Exit code, stdout and stderr are those of a process of its own; what differs from a fresh start is the warm imports.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


def words(script: str, *arguments: object) -> list[str]:
    """A command's words; train.py's runs go beside --save_path, so that tests leave nothing in the project's folder."""
    found = [script, *map(str, arguments)]
    if script == "train.py" and "--save_path" in found and "--run_dir" not in found:
        found += ["--run_dir", found[found.index("--save_path") + 1] + "-runs"]
    return found


class Commands:
    """Starts scripts (`train.py`) and modules (`engine.checkpoint`) of this project; `close` when done."""

    def __init__(self) -> None:
        environment = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.commands"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __call__(
        self,
        script: str,
        *arguments: object,
        file_bytes: int | None = None,
        env: Mapping[str, str] | None = None,
        stop: tuple[float, int] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command from the project's folder.

        `file_bytes` is the largest file that it may write; `stop` sends it a signal after some seconds.
        """
        command = words(script, *arguments)
        with tempfile.TemporaryDirectory() as folder:
            request = {
                "command": command,
                "folder": folder,
                "file_bytes": file_bytes,
                "env": dict(env or {}),
                "stop": stop,
            }
            self.server.stdin.write(json.dumps(request) + "\n")
            self.server.stdin.flush()
            code = int(self.server.stdout.readline())
            out, err = ((Path(folder) / name).read_text(errors="replace") for name in ("out", "err"))
        return subprocess.CompletedProcess(command, code, out, err)

    def close(self) -> None:
        """End the process that forks."""
        self.server.communicate(timeout=30)


def _serve() -> None:
    import test  # noqa: F401, PLC0415 (warms the imports)
    import train  # noqa: F401, PLC0415

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(**request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(
    command: list[str], folder: str, file_bytes: int | None, env: Mapping[str, str], stop: tuple[float, int] | None
) -> None:
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    os.environ.update(env)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    signal.alarm(120)  # ends what hangs
    if stop:
        timer = threading.Timer(stop[0], os.kill, (os.getpid(), stop[1]))
        timer.daemon = True
        timer.start()
    script, code = command[0], 0
    sys.argv = command
    try:
        if script.endswith(".py"):
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:  # as the interpreter does
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
