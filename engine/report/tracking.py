"""Weights & Biases behind one small class: it never asks, never waits long, and never stops a training run.

Where a run goes (wandb's own settings, such as WANDB_MODE, WANDB_BASE_URL, WANDB_ENTITY and WANDB_DIR, are honoured):

    WANDB_MODE=disabled               nothing is written, and wandb is not even imported
    WANDB_MODE=offline, or no key     files under the run folder, and one line that says how to look at and sync them
    a key                             online; offline after all when the server cannot be reached or says no

The key is taken from WANDB_API_KEY, from the netrc entry that `wandb login` writes, or from key.json, in this order.
"""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

KEY_SHAPE = re.compile(r"([\w-]+-)?[0-9a-f]{40}|wandb_v1_\w+")
PROBE_SECONDS = 5.0  # name look-up and TCP connection
QUIET = {  # bounded in time, and without what could carry secrets: console, source code, git diff and git remote
    "silent": True,
    "console": "off",
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "init_timeout": 15.0,  # wandb may add 10 s of grace
    "finish_timeout": 60.0,  # for the last upload; what is left stays on disk for `wandb sync`
    "finish_timeout_raises": True,
}


class Tracker:
    """One W&B run, or nothing at all: every method may be called either way. Make it with `Tracker.start`."""

    def __init__(self) -> None:
        self._run: Any = None  # a wandb.Run while all is well
        self._folder = ""  # its files, quoted for a shell
        self._secret = ""  # the key, to keep it out of messages
        self._pictures = True  # False after a failure in one of them

    @classmethod
    def start(
        cls,
        exp_name: str,
        config: Mapping[str, Any],
        *,
        run_dir: Path,
        tags: Sequence[str] = (),
        group: str | None = None,
        project: str = "MadCLIP",
        key_file: Path = Path("key.json"),
        run_id: str | None = None,
    ) -> Tracker:
        """Start the run `exp_name`; its files go to `run_dir`/wandb. Whatever fails costs the tracking, not the run.

        `config` is shown with the run: JSON-like values, no secrets. It returns within about 30 s, network or not.
        `run_id`, another tracker's `id`, continues that run: online at once; offline in a second folder of the same id,
        which `wandb sync` appends once the first is uploaded.
        """
        tracker = cls()
        if os.environ.get("WANDB_MODE", "").lower() == "disabled":
            return tracker
        try:
            options = {"project": project, "name": exp_name, "config": dict(config), "tags": tags, "group": group}
            if run_id:
                options |= {"id": run_id, "resume": "allow"}
            tracker._open({**options, "dir": os.environ.get("WANDB_DIR") or str(run_dir)}, Path(key_file))
        except Exception as error:  # tracking is a convenience: nothing in it may end a training run
            tracker._fail("could not start", error)
        return tracker

    def _open(self, options: dict[str, Any], key_file: Path) -> None:
        # wandb reads this when it is imported. Its crash reports could carry more than the user expects.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # Where tables and artifacts wait for their upload; by default below the user's home, apart from the run.
        os.environ.setdefault("WANDB_DATA_DIR", str(Path(options["dir"], "wandb", "data").absolute()))
        import wandb  # noqa: PLC0415 - it takes seconds, and is not needed when tracking is disabled

        resolved = wandb.setup(wandb.Settings(silent=True)).settings
        if resolved.mode == "disabled":  # `wandb disabled` was run in this folder
            return
        file_key = _read_key_file(key_file)  # read in any case, for its warning
        self._secret = os.environ.get("WANDB_API_KEY") or _netrc_key(resolved.base_url) or file_key
        if resolved.mode in ("offline", "dryrun"):
            reason = "as asked for"
        elif not self._secret and not resolved.identity_token_file:
            reason = "no API key"
        elif not _reachable(resolved.base_url):
            reason = f"no connection to {resolved.base_url}"
        else:
            reason = ""
            try:  # the key goes in as a setting: wandb.login() would also write it to the user's netrc file
                settings = wandb.Settings(**QUIET, api_key=self._secret or None)
                self._run = wandb.init(**options, mode="online", settings=settings)
            except Exception as error:
                reason = f"{resolved.base_url} did not take the run: {_one_line(error, self._secret)}"
        if self._run is None:
            self._run = wandb.init(**options, mode="offline", settings=wandb.Settings(**QUIET))
        self._folder = shlex.quote(str(Path(self._run.dir).parent))
        look = f"look: `wandb leet {self._folder}`; upload: `wandb sync {self._folder}`"
        _say(f"offline ({reason}); {look}" if reason else f"online at {self._run.url}")
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")

    @property
    def id(self) -> str:
        """What continues this run later (`start(run_id=...)`); "" where nothing is tracked."""
        return self._run.id if self._run is not None else ""

    @property
    def takes_pictures(self) -> bool:
        """Whether `picture` would do anything."""
        return self._run is not None and self._pictures

    def log(self, metrics: Mapping[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        """Record scalars. Calls with the same `step` are merged; `step` must not decrease, or W&B drops the values.

        `commit` closes the step at once, so that it outlives a killed process.
        """
        self._call("could not log", lambda run: run.log(dict(metrics), step=step, commit=commit))

    def define(self, names: Iterable[str]) -> None:
        """Plot `names` over the epoch, and keep them out of the summary but for what `summary` puts there."""
        for name in names:
            step = None if name == "epoch" else "epoch"
            self._call(
                "could not define", lambda run, n=name, s=step: run.define_metric(n, step_metric=s, summary="none")
            )

    def picture(self, action: Callable[[Any], object]) -> None:
        """Call `action(run)`, which prepares or logs pictures; a failure ends the pictures and keeps the numbers."""
        if self.takes_pictures:
            try:
                action(self._run)
            except Exception as error:
                self._pictures = False
                _say(f"warning: no pictures from here on ({_one_line(error, self._secret)})")

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set values of the run's summary, which the table of runs shows."""
        self._call("could not write the summary", lambda run: run.summary.update(dict(values)))

    def finish(self, exit_code: int = 0) -> None:
        """Write and upload what is left, for about a minute at most; a second call does nothing."""
        self._call("could not finish", lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(exit_code=0 if kind is None else 1)

    def _call(self, what: str, action: Callable[[Any], object]) -> None:
        if self._run is not None:
            try:
                action(self._run)
            except Exception as error:
                self._fail(what, error)

    def _fail(self, what: str, error: Exception) -> None:
        """Say it once, keep what was logged so far, and be a no-op from here on."""
        self._run = None
        files = f"; its files: {self._folder}" if self._folder else ""
        _say(f"warning: {what}, tracking is off from here on ({_one_line(error, self._secret)}){files}")
        with contextlib.suppress(Exception, SystemExit):  # else wandb tries again, and louder, when Python exits
            sys.modules["wandb"].teardown()


def _read_key_file(path: Path) -> str:
    """Return the key in key.json, "" for none or the place holder."""
    try:
        key = json.loads(path.read_text(encoding="utf-8"))["wandb_api_key"].strip()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # its text may quote the file: not shown
        _say(f'warning: {path} is not {{"wandb_api_key": "..."}}, so it is ignored')
        return ""
    return "" if key == "paste-your-key-here" else key  # the committed place holder


def warn_of_tracked_key(path: Path = Path("key.json")) -> None:
    """Warn where key.json holds a key that looks real and git tracks it, whether or not W&B is used."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return
    if KEY_SHAPE.search(text) and _tracked(path):
        advice = f"run `wandb login` and restore the file, or run `git update-index --skip-worktree {path}`"
        _say(f"warning: {path} holds an API key and git tracks it: {advice}")


def _tracked(path: Path) -> bool:
    command = ["git", "-C", str(path.absolute().parent), "ls-files", "-v", "--", path.name]
    try:
        found = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=5, check=False).stdout
    except (OSError, subprocess.SubprocessError):  # no git
        return False
    return found.startswith(b"H")  # "S": --skip-worktree was set, so no commit can pick the key up


def _netrc_key(base_url: str) -> str:
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return (netrc.netrc(path).authenticators(urlsplit(base_url).netloc) or ("", "", ""))[2] or ""
    return ""


def _reachable(base_url: str) -> bool:
    """Whether the server, or the proxy on the way, takes a TCP connection in time; wandb would try for longer."""
    url = urlsplit(base_url)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
    opened: list[bool] = []

    def connect() -> None:  # in a thread, since a name look-up has no time limit of its own
        with contextlib.suppress(OSError, UnicodeError), socket.create_connection(address, timeout=PROBE_SECONDS):
            opened.append(True)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return bool(opened)


def _one_line(error: Exception, secret: str) -> str:
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return (line.replace(secret, "***") if secret else line)[:300]


def _say(message: str) -> None:
    print(f"W&B: {message}", file=sys.stderr, flush=True)
