"""W&B: real runs in processes with a home of their own, read back by wandb's own command; no key leaks."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from engine.metrics import measure
from engine.report.tracking import Tracker, best, read_key, scalars
from tests.helpers.commands import ROOT
from tests.helpers.evaluations import make_world
from tests.helpers.wandb_runs import config, history, of_type, records

KEY = "0123456789abcdef" * 2 + "deadbeef"  # the shape of a key, of nobody
OTHER_KEY = "fedcba9876543210" * 2 + "deadbeef"
RECORDS = [
    {"epoch": 1, "det": 1.0, "seg": 2.0, "total": 3.0, "similarity": 0.5, "auc": 0.6, "pauc": 0.7, "best": True},
    {"epoch": 2, "det": 1.0, "seg": 2.0, "total": 3.0, "similarity": 0.4, "auc": None, "pauc": None, "best": False},
    {"epoch": 3, "det": 1.0, "seg": 2.0, "total": 3.0, "similarity": 0.3, "auc": 0.5, "pauc": 0.4, "best": False},
]
START = """
import sys
from pathlib import Path
from types import SimpleNamespace
from engine.files.run import RunFolder
from engine.report import tracking
from tests.helpers.evaluations import make_settings
RECORDS = {records}
tracking.OWN_SETTINGS.update(init_timeout={patience}, finish_timeout={patience})
options = SimpleNamespace(obj="Brain", shot=2, shot_normal=2, shot_abnormal=2, fidelity="released",
                          log_images_every={every}, data_path="secret-folder")
run = RunFolder(Path("run"))
run.path.mkdir(exist_ok=True)
settings = {{"shots": {{"normal": ["patient.png"]}}, "host": "secret-host"}}
tracker = tracking.start_tracker(options, make_settings(), run, settings)
"""
THREE_EPOCHS = """
    with tracker:
        for i in range(3):
            tracker.log_epoch(RECORDS[: i + 1], None, None, 2.0, 64)
"""


def run(folder: Path, body: str = THREE_EPOCHS, *, patience: float = 100, every: int = 0, **env: str) -> Any:
    """Run `body` after `start_tracker`, in a process that knows nothing of the developer's home or environment."""
    (folder / "home").mkdir(exist_ok=True)
    keep = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    home = {"HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", START.format(patience=patience, every=every, records=RECORDS) + textwrap.dedent(body)],
        cwd=folder, env={**keep, **home, **env}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600,
        check=True,
    )  # fmt: skip


@contextlib.contextmanager
def server() -> Iterator[tuple[str, list[tuple[str, str, bytes]]]]:
    """Run a local stand-in for the W&B server. Yields its URL and (path, auth, body) seen."""
    seen: list[tuple[str, str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
            seen.append((self.path, self.headers.get("Authorization", ""), body))
            reply = json.dumps({"data": self.data(body)}).encode()
            self.send_response(200)
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
        http.shutdown()
        http.server_close()


def assert_no_key(folder: Path, done: Any, *but: Path) -> None:
    """No form of the key is in the output or in any file below `folder`, those in `but` aside."""
    texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file() and path not in but]
    assert len(texts) > 3
    for secret in (KEY.encode(), base64.b64encode(f"api:{KEY}".encode())):
        assert not [text for text in (*texts, done.stdout.encode(), done.stderr.encode()) if secret in text]


def test_without_a_key_the_run_is_offline_under_the_run_folder_and_goes_on_under_its_id(tmp_path):
    done = run(tmp_path)
    (line,) = done.stderr.splitlines()
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*")
    assert str(folder.relative_to(tmp_path)) in line
    rows = records(tmp_path)
    (started,) = of_type(rows, "run")
    assert (started["project"], started["display_name"], started["run_group"]) == ("MadCLIP", "run", "Brain-2shot")
    shown = json.dumps(rows)
    assert config(rows)["shot"] == 2
    assert "patient.png" not in shown  # --log_images_every 0
    assert "secret" not in shown
    steps = history(rows)
    assert [row["_step"] for row in steps] == [row["epoch"] for row in steps] == [0, 1, 2]
    assert [row.get("AUC") for row in steps] == [0.6, None, 0.5]
    assert [row["AUC+pAUCbest"] for row in steps] == [pytest.approx(1.3)] * 3
    assert steps[0]["time/images_per_second"] == 32

    stored = json.loads((tmp_path / "run/config.json").read_text())
    again = f'options.shot = 3\nconfig = {{"wandb_id": {stored["wandb_id"]!r}}}\ntracker.__exit__(None)\n'
    again += "tracking.start_tracker(options, make_settings(), run, config).__exit__(None)"
    run(tmp_path, again)
    assert json.loads((tmp_path / "run/config.json").read_text())["wandb_id"] == stored["wandb_id"]


def test_disabled_does_nothing_and_imports_nothing(tmp_path):
    done = run(tmp_path, THREE_EPOCHS + '    print("wandb" in sys.modules)', WANDB_MODE="disabled", WANDB_API_KEY=KEY)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize("source", ["environment", "netrc", "key.json"])
def test_online_with_the_key_from_each_place_and_the_key_is_written_nowhere(tmp_path, source):
    (tmp_path / "home").mkdir()
    netrc, key_file = tmp_path / "home/.netrc", tmp_path / "key.json"
    with server() as (url, seen):
        env = {"WANDB_BASE_URL": url}
        # Where two places hold a key, the earlier of environment, netrc, key.json wins.
        key_file.write_text(json.dumps({"api_key": KEY if source == "key.json" else OTHER_KEY}))
        if source == "netrc":
            netrc.write_text(f"machine {url.removeprefix('http://')}\n  login user\n  password {KEY}\n")
        if source == "environment":
            env["WANDB_API_KEY"] = KEY
        done = run(tmp_path, **env)
    assert url in done.stderr
    used = {auth for path, auth, _ in seen if path == "/graphql"}
    assert used == {"Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()}
    streamed = b"".join(body for path, _, body in seen if path.endswith("/file_stream"))
    assert all(name.encode() in streamed for name in ("sim_texts", "AUC+pAUCbest", "train/det"))
    assert not any(KEY.encode() in body for _, _, body in seen)
    assert netrc.exists() == (source == "netrc")
    assert_no_key(tmp_path, done, netrc, key_file)
    assert not {path.name for path in tmp_path.glob("run/wandb/run-*/files/**/*")} & {"diff.patch", "output.log"}


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_server_that_cannot_be_reached_gives_an_offline_run(tmp_path, mode):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://somebody:pass-word@127.0.0.1:{probe.getsockname()[1]}"
    done = run(tmp_path, patience=5, WANDB_API_KEY=KEY, WANDB_BASE_URL=url, WANDB_MODE=mode)
    assert len(history(records(tmp_path))) == 3
    assert len(done.stderr.splitlines()) == (2 if mode == "online" else 1)
    assert "pass-word" not in done.stderr
    assert_no_key(tmp_path, done)


def test_after_a_failure_nothing_is_tracked_and_an_interrupt_or_a_fault_passes(capsys):
    def broken(error: BaseException) -> Any:
        return SimpleNamespace(id="run", log=Mock(side_effect=error))

    run = broken(OSError(f"disk full, key {KEY}\nsecond line"))
    tracker = Tracker(run, 1, KEY)
    for _ in range(2):
        tracker.log_epoch(RECORDS, None, None, 1.0, 1)
    assert run.log.call_count == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "disk full, key ***" in line
    for error in (KeyboardInterrupt(), TypeError("a fault of the program")):
        with pytest.raises(type(error)):
            Tracker(broken(error)).log_epoch(RECORDS, None, None, 1.0, 1)


def test_image_only_sets_publish_their_auc_as_pauc():
    logged = scalars({**RECORDS[0], "pauc": None})
    assert logged["pAUC"] == logged["AUC"] == logged["AUC+pAUC"] == 0.6
    assert best(RECORDS[:0]) == {}


@pytest.mark.parametrize(("every", "shown"), [(3, [3, 7]), (10, [7]), (0, [])])
def test_when_pictures_are_due(tmp_path, every, shown):
    rows = []
    evaluation, masks = make_world(tmp_path, [0, 1], [0.2, 0.8])
    tracker = Tracker(SimpleNamespace(id="run", log=lambda values, step: rows.append((step, *values))), every)
    for epoch in (1, 3, 5, 7):
        tracker.log_sheet(epoch, evaluation, masks, epoch == 7)
    assert rows == [(epoch, "sheet") for epoch in shown]


def test_without_pictures_there_is_no_page_and_a_checkpoint_is_warned_of(tmp_path, capsys):
    run = Mock(id="run", config={"obj": "Brain"})
    (tmp_path / "best.pth").write_text("x")
    metrics = measure(*make_world(tmp_path, [0, 1], [0.2, 0.8]), full=True)
    Tracker(run, 0).log_result(RECORDS[0], metrics, tmp_path / "index.html", tmp_path / "best.pth")
    (artifact,) = run.log_artifact.call_args.args
    assert (artifact.name, artifact.metadata["auc"], run.log.call_count) == ("Brain-run", 1.0, 0)
    assert "--log_model" in capsys.readouterr().err  # it names its shots


def test_key_file(tmp_path, capsys):
    path = tmp_path / "key.json"
    assert read_key(path) == ""
    for text, key in (("...", ""), (KEY, KEY), (f" local-{KEY}\n", f"local-{KEY}"), ("paste-your-key-here", "")):
        path.write_text(json.dumps({"api_key": text}))
        assert read_key(path) == key
    for text in (json.dumps({"other": KEY}), json.dumps([KEY]), f'{{"api_key": {KEY}}}'):
        path.write_text(text)
        assert read_key(path) == ""
        shown = capsys.readouterr().err
        assert "key.json" in shown
        assert KEY not in shown
    assert list(json.loads((ROOT / "key.json").read_text())) == ["api_key"]  # its value may be the user's key


def test_a_real_key_that_git_tracks_is_warned_of(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("GIT_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "key.json"

    def warnings(*command: str) -> int:
        subprocess.run(["git", *command], check=True, capture_output=True)
        read_key(path)
        return len(capsys.readouterr().err.splitlines())

    warnings("init")
    path.write_text(json.dumps({"api_key": "paste-your-key-here"}))
    assert warnings("add", "key.json") == 0  # the place holder is meant to be tracked
    path.write_text(json.dumps({"api_key": "wandb_v1_Abc123_xyz"}))
    assert warnings("status") == 1
    assert warnings("update-index", "--skip-worktree", "key.json") == 0  # what the line advises
