"""W&B tracking: real wandb runs in subprocesses with a home folder of their own, read back by wandb's own command."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from engine.report import tracking
from engine.report.tracking import Tracker
from tests.helpers.wandb_runs import WANDB, config, history, of_type, records, summary
from utils import redact

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef" * 2 + "deadbeef"  # the shape of a key, of nobody
OTHER_KEY = "fedcba9876543210" * 2 + "deadbeef"
PUBLISHED = ["epoch", "sim_texts", "AUC+pAUC", "AUC", "pAUC", "loss", "AUC+pAUCbest", "AUCbest", "pAUCbest"]
THREE_EPOCHS = """
    with tracker:
        for epoch in range(3):
            values = {name: epoch + i / 10 for i, name in enumerate(PUBLISHED)}
            tracker.log({**values, "epoch": epoch, "train/lr": 0.1}, step=epoch)
        tracker.summary({"test/AUC": 0.75})
"""


def run(
    tmp_path: Path, body: str = THREE_EPOCHS, *, terminal: int | None = None, patience: float = 100, **env: str
) -> Any:
    """Run `body` after `Tracker.start`, in a process that knows nothing of the developer's home or environment.

    Its stdin is empty and its stderr is captured, or both are `terminal`. `patience` is how many seconds it waits for
    the W&B server at the start and at the end.
    """
    script = f"""
import sys
from pathlib import Path
from engine.report import tracking
PUBLISHED = {PUBLISHED!r}
tracking.QUIET["init_timeout"] = tracking.QUIET["finish_timeout"] = {patience}
tracker = tracking.Tracker.start("exp", {{"lr": 0.1, "shots": [4, 16], "root": Path("data")}}, run_dir=Path("run"),
                                 tags=["few-shot"], group="sweep")
"""
    (tmp_path / "home").mkdir(exist_ok=True)
    keep = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    home = {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", script + textwrap.dedent(body)],
        cwd=tmp_path,
        env={**keep, **home, **env},
        stdin=subprocess.DEVNULL if terminal is None else terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if terminal is None else terminal,
        text=True,
        timeout=600,
        check=True,
    )


@contextlib.contextmanager
def server(answer: str) -> Iterator[tuple[str, list[tuple[str, str, bytes]]]]:
    """Run a local stand-in for the W&B server: "ok", "401" or "silent". Yields its URL and (path, auth, body) seen."""
    seen: list[tuple[str, str, bytes]] = []
    leave = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
            seen.append((self.path, self.headers.get("Authorization", ""), body))
            if answer == "silent":
                leave.wait(60)
                return
            reply = json.dumps({"data": self.data(body)}).encode()
            self.send_response(401 if answer == "401" else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        do_GET = do_PUT = do_POST

        def data(self, body: bytes) -> dict[str, Any]:
            if b"mutation UpsertBucket" in body:
                project = {"id": "p", "name": "MadCLIP", "entity": {"id": "e", "name": "someone"}}
                bucket = {"id": "b", "name": json.loads(body)["variables"]["name"], "project": project}
                return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}
            if b"mutation CreateRunFiles" in body:
                names = json.loads(body)["variables"]["files"]
                files = [{"name": name, "uploadUrl": f"http://{self.headers['Host']}/up/{name}"} for name in names]
                return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
            return {}

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", seen
    finally:
        leave.set()
        http.shutdown()
        http.server_close()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_no_key(tmp_path: Path, done: Any, *but: Path) -> None:
    """No form of the key is in the output or in any file below `tmp_path`, names in `but` aside."""
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path not in but]
    texts = [path.read_bytes() for path in files] + [done.stdout.encode(), done.stderr.encode()]
    assert len(texts) > 5
    for secret in (KEY.encode(), base64.b64encode(f"api:{KEY}".encode())):
        assert not [text for text in texts if secret in text]


def test_no_key_gives_an_offline_run_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "key.json").write_text('{"wandb_api_key": "paste-your-key-here"}')
    done = run(tmp_path)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "no API key" in line
    folder = next((tmp_path / "run/wandb").glob("offline-run-*")).relative_to(tmp_path)
    assert f"`wandb leet {folder}`" in line
    assert f"`wandb sync {folder}`" in line

    rows = records(tmp_path)
    (started,) = of_type(rows, "run")
    assert (started["project"], started["display_name"], started["run_group"]) == ("MadCLIP", "exp", "sweep")
    assert started["tags"] == ["few-shot"]
    shown = config(rows)
    assert {name: shown[name] for name in ("lr", "shots", "root")} == {"lr": 0.1, "shots": [4, 16], "root": "data"}

    steps = history(rows)
    assert [row["_step"] for row in steps] == [row["epoch"] for row in steps] == [0, 1, 2]
    assert all({*PUBLISHED, "train/lr"} <= set(row) for row in steps)
    assert steps[2]["AUC+pAUC"] == pytest.approx(2.2)
    assert summary(rows)["test/AUC"] == 0.75

    metrics = {metric.get("name") or metric.get("glob_name"): metric for metric in of_type(rows, "metric")}
    assert "epoch" in metrics
    for name in ("loss", "AUC*", "test/*", "pictures/*"):
        assert metrics[name]["step_metric"] == "epoch"
        assert ("summary" in metrics[name]) == (name != "pictures/*")
    assert of_type(rows, "exit")[0].get("exit_code", 0) == 0


def test_offline_run_can_be_read_by_the_command_that_the_line_names(tmp_path: Path) -> None:
    command = re.search(r"`wandb leet (.+?)`", run(tmp_path).stderr)
    assert command
    shown = subprocess.run(
        [WANDB, "leet", "inspect", "--summary", "--json", command[1]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={"HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"], "WANDB_ERROR_REPORTING": "false"},
    )
    assert "test/AUC" in shown.stdout


def test_a_run_goes_on_under_the_same_id(tmp_path: Path) -> None:
    again = """
    first = tracker.id
    tracker.log({"epoch": 0, "loss": 3.0}, step=0, commit=True)
    tracker.finish()
    more = tracking.Tracker.start("exp", {}, run_dir=Path("again"), run_id=first)
    more.log({"epoch": 1, "loss": 2.0}, step=1)
    print(more.id == first, tracking.Tracker().id == "")
    more.finish()
    """
    assert run(tmp_path, again).stdout == "True True\n"
    before, after = records(tmp_path / "run"), records(tmp_path / "again")
    (first,), (second,) = (of_type(rows, "run") for rows in (before, after))
    assert first["run_id"] == second["run_id"]
    assert second["resume"]  # `wandb sync` appends to what the server has, then
    assert [row["_step"] for row in (*history(before), *history(after))] == [0, 1]


def test_scalars_enter_the_summary_by_hand_only(tmp_path: Path) -> None:
    body = """
    for epoch in range(3):
        tracker.log({"epoch": epoch, "test/AUC": epoch / 10, "loss": 1.0}, step=epoch, commit=True)
        if epoch == 1:
            tracker.summary({"epoch": 1, "test/AUC": 0.1})
    tracker.finish()
    """
    run(tmp_path, body)
    shown = summary(records(tmp_path))
    assert (shown["epoch"], shown["test/AUC"], shown.get("loss")) == (1, 0.1, None)


def test_an_exception_passes_through_and_marks_the_run_as_failed(tmp_path: Path) -> None:
    body = """
    try:
        with tracker:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        print("interrupted")
    """
    assert run(tmp_path, body).stdout == "interrupted\n"
    assert of_type(records(tmp_path), "exit")[0]["exit_code"] == 1


def test_disabled_does_nothing_and_imports_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, THREE_EPOCHS + '\n    print("wandb" in sys.modules)', WANDB_MODE="disabled", WANDB_API_KEY=KEY)
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert [path.name for path in tmp_path.rglob("*")] == ["home"]


def test_offline_mode_is_honoured_and_opens_no_connection(tmp_path: Path) -> None:
    with server("ok") as (url, seen):
        done = run(tmp_path, WANDB_MODE="offline", WANDB_API_KEY=KEY, WANDB_BASE_URL=url)
    assert not seen
    assert "offline (as asked for)" in done.stderr
    assert_no_key(tmp_path, done)


@pytest.mark.parametrize("source", ["environment", "netrc", "key.json"])
def test_online_with_the_key_from_each_place_and_the_key_is_written_nowhere(tmp_path: Path, source: str) -> None:
    (tmp_path / "home").mkdir()
    netrc, key_file = tmp_path / "home/.netrc", tmp_path / "key.json"
    with server("ok") as (url, seen):
        env = {"WANDB_BASE_URL": url}
        # Where two places hold a key, the earlier of environment, netrc, key.json wins.
        key_file.write_text(json.dumps({"api_key": KEY if source == "key.json" else OTHER_KEY}))
        if source == "netrc":
            netrc.write_text(f"machine {url.removeprefix('http://')}\n  login user\n  password {KEY}\n")
        if source == "environment":
            env["WANDB_API_KEY"] = KEY
        done = run(tmp_path, **env)
    assert done.stdout == ""
    line, warning = done.stderr.splitlines()
    assert line.startswith(f"W&B: online at {url}/someone/MadCLIP/runs/")
    assert "--log_images_every 0 prevents" in warning
    assert {auth for path, auth, _ in seen if path == "/graphql"} == {
        "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
    }
    streamed = b"".join(body for path, _, body in seen if path.endswith("/file_stream"))
    assert all(name.encode() in streamed for name in PUBLISHED)
    assert not any(KEY.encode() in body for _, _, body in seen)
    assert netrc.exists() == (source == "netrc")
    assert_no_key(tmp_path, done, netrc, key_file)
    shown = {path.name for path in tmp_path.glob("run/wandb/run-*/files/**/*")}
    assert not shown & {"diff.patch", "output.log", "code"}


def test_unreachable_server_gives_an_offline_run(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    done = run(tmp_path, patience=5, WANDB_API_KEY=KEY, WANDB_BASE_URL=url)
    (line,) = done.stderr.splitlines()
    assert f"offline ({url} did not take the run: " in line
    assert len(history(records(tmp_path))) == 3
    assert_no_key(tmp_path, done)


@pytest.mark.parametrize("answer", ["401", "silent"])
def test_refused_or_silent_server_gives_an_offline_run_in_bounded_time(tmp_path: Path, answer: str) -> None:
    with server(answer) as (url, seen):
        done = run(tmp_path, patience=5, WANDB_API_KEY=KEY, WANDB_BASE_URL=url)
    assert seen
    (line,) = done.stderr.splitlines()
    assert f"offline ({url} did not take the run: " in line
    assert len(history(records(tmp_path))) == 3
    assert_no_key(tmp_path, done)


@pytest.mark.parametrize("key", ["", "too-short"])
def test_never_asks_even_at_a_terminal(tmp_path: Path, key: str) -> None:
    master, slave = pty.openpty()
    try:
        with server("401") as (url, _):
            done = run(tmp_path, terminal=slave, patience=5, WANDB_BASE_URL=url, WANDB_API_KEY=key)
        shown = os.read(master, 65536).decode()
    finally:
        os.close(master)
        os.close(slave)
    assert done.stdout == ""
    (line,) = shown.splitlines()
    assert line.startswith("W&B: offline (")
    assert not (tmp_path / "home/.netrc").exists()


def test_wandb_dying_in_mid_run_costs_one_line_and_no_wait(tmp_path: Path) -> None:
    body = """
    import os, signal, subprocess
    tracker.log({"loss": 1.0}, step=0)
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,comm="], capture_output=True, text=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    (core,) = [int(pid) for pid, parent, *name in rows if int(parent) == os.getpid() and "wandb" in name[0]]
    os.kill(core, signal.SIGKILL)
    os.waitid(os.P_PID, core, os.WEXITED | os.WNOWAIT)
    while tracker.id:  # the connection's end reaches this process a little later
        tracker.log({"loss": 1.0}, step=1)
    tracker.summary({"a": 1})
    tracker.finish()
    print("trained")
    """
    if not shutil.which("ps"):
        pytest.skip("no ps command")
    done = run(tmp_path, body)
    assert done.stdout == "trained\n"
    offline, warning = done.stderr.splitlines()
    assert offline.startswith("W&B: offline")
    assert warning.startswith("W&B: warning: could not ")


@pytest.mark.parametrize("fault", ["raise ImportError('no wandb here')", "raise RuntimeError('broken\\nwandb')"])
def test_a_broken_wandb_costs_one_line(tmp_path: Path, fault: str) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/__init__.py").write_text(fault)
    done = run(tmp_path, THREE_EPOCHS + '\n    print("trained")', PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.stdout == "trained\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("W&B: warning: could not start")


class BrokenRun:
    """Stands in for a wandb run: counts the calls, and every one of them fails."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0

    def log(self, *_: object, **__: object) -> None:
        """Fail."""
        self.calls += 1
        raise self.error


def test_after_a_failure_the_tracker_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    tracker, broken = Tracker(), BrokenRun(OSError(f"disk full, key {KEY}\nsecond line"))
    tracker._run, tracker._secret = broken, KEY
    for step in range(3):
        tracker.log({"loss": 1.0}, step=step)
    tracker.summary({"a": 1})
    tracker.finish()
    assert broken.calls == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "disk full, key ***" in line


def test_an_interrupt_passes_through() -> None:
    tracker = Tracker()
    tracker._run = BrokenRun(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        tracker.log({"loss": 1.0})


def test_key_file_has_only_the_field_that_is_read() -> None:
    assert list(json.loads((ROOT / "key.json").read_text())) == ["api_key"]  # its value may be the user's key


@pytest.mark.parametrize(
    ("text", "key", "warned"),
    [
        (json.dumps({"api_key": "..."}), "", False),
        (json.dumps({"api_key": KEY}), KEY, False),
        (json.dumps({"wandb_api_key": "paste-your-key-here"}), "", False),
        (json.dumps({"wandb_api_key": " "}), "", False),
        (json.dumps({"wandb_api_key": f" {KEY}\n"}), KEY, False),
        (json.dumps({"wandb_api_key": 12}), "", True),
        (json.dumps({"other": KEY}), "", True),
        (json.dumps([KEY]), "", True),
        ("[" * 100_000, "", True),
        (f'{{"wandb_api_key": {KEY}}}', "", True),  # no quotes: not JSON
    ],
)
def test_key_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, key: str, warned: bool) -> None:
    path = tmp_path / "key.json"
    path.write_text(text)
    assert tracking._read_key_file(path) == key
    error = capsys.readouterr().err
    assert error.count("\n") == warned
    assert KEY not in error


def test_missing_key_file_is_no_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tracking._read_key_file(tmp_path / "key.json") == ""
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@pytest.mark.parametrize("key", [KEY, f"local-{KEY}", "wandb_v1_Abc123_xyz"])
def test_a_real_key_that_git_tracks_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    monkeypatch.delenv("GIT_DIR", raising=False)
    path = tmp_path / "key.json"

    def git(*command: str) -> None:
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)

    def warnings() -> list[str]:
        tracking.warn_of_tracked_key(path)
        lines = capsys.readouterr().err.splitlines()
        assert not any(key in line for line in lines)
        return lines

    git("init")
    path.write_text(json.dumps({"wandb_api_key": "paste-your-key-here"}))
    git("add", "key.json")
    assert warnings() == []  # the place holder is meant to be tracked
    path.write_text(json.dumps({"wandb_api_key": key}))
    (line,) = warnings()
    assert "git tracks it" in line
    git("update-index", "--skip-worktree", "key.json")  # what the line advises
    assert warnings() == []
    git("update-index", "--no-skip-worktree", "key.json")
    git("rm", "--cached", "--force", "key.json")
    assert warnings() == []


@pytest.mark.parametrize("name", ["key.json", "home/.netrc"])
def test_a_pipe_in_place_of_a_file_with_a_key_is_ignored(tmp_path: Path, name: str) -> None:
    (tmp_path / "home").mkdir()
    os.mkfifo(tmp_path / name)
    warning, line = run(tmp_path).stderr.splitlines()  # a hang would end it after ten minutes
    assert Path(name).name in warning
    assert "so it is ignored" in warning
    assert "offline (no API key)" in line


def test_a_pipe_is_not_searched_for_a_tracked_key(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "key.json")
    tracking.warn_of_tracked_key(tmp_path / "key.json")


def test_user_and_password_of_an_address_are_not_printed(tmp_path: Path) -> None:
    url = f"http://somebody:pass-word@127.0.0.1:{closed_port()}"
    done = run(tmp_path, patience=5, WANDB_API_KEY=KEY, WANDB_BASE_URL=url)
    assert "offline (http://***@127.0.0.1:" in done.stderr
    assert "pass-word" not in done.stderr
    assert "somebody" not in done.stderr
    assert redact("at https://a:b@host/x and //c:d@e", "x") == "at https://***@host/*** and //***@e"
    assert redact("https://me:pa/s@s@host") == "https://***@host"


def test_without_pictures_no_name_of_a_shot_is_shown(tmp_path: Path) -> None:
    body = """
    tracker.finish()
    with tracking.Tracker.start("exp", {"shots": {"normal": ["patient.png"]}, "shot": 1}, run_dir=Path("bare"),
                                pictures=False) as bare:
        print(bare.takes_pictures, bool(bare.id))
    """
    assert run(tmp_path, body).stdout == "False True\n"
    (path,) = tmp_path.glob("bare/wandb/offline-run-*/run-*.wandb")
    assert b"patient.png" not in path.read_bytes()
    assert config(records(tmp_path / "bare"))["shot"] == 1
