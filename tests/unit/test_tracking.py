"""W&B with a fake run: logged values, failures and the key file. Real runs: tests/integration/test_dashboard.py."""

import json
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from engine.metrics import measure
from engine.report.tracking import Tracker, read_key, scalars
from tests.helpers.commands import ROOT
from tests.helpers.evaluations import make_world

KEY = "0123456789abcdef" * 2 + "deadbeef"  # has the form of an API key, but is nobody's
RECORDS = [
    {"epoch": 1, "det": 1.0, "seg": 2.0, "total": 3.0, "similarity": 0.5, "auc": 0.6, "pauc": 0.7, "best": True},
    {"epoch": 2, "det": 1.0, "seg": 2.0, "total": 3.0, "similarity": 0.4, "auc": None, "pauc": None, "best": False},
    {"epoch": 3, "det": 1.0, "seg": 2.0, "total": 3.0, "similarity": 0.3, "auc": 0.5, "pauc": 0.4, "best": False},
]


def test_failure_stops_tracking_but_interrupts_and_bugs_are_raised(capsys):
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


def test_without_images_no_page_is_logged_and_log_model_warns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))  # not in the home folder
    run = Mock(id="run", config={"obj": "Brain"})
    (tmp_path / "best.pth").write_text("x")
    metrics = measure(*make_world(tmp_path, [0, 1], [0.2, 0.8]), full=True)
    Tracker(run, 0).log_result(RECORDS[0], metrics, tmp_path / "index.html", tmp_path / "best.pth")
    (artifact,) = run.log_artifact.call_args.args
    assert (artifact.name, artifact.metadata["auc"], run.log.call_count) == ("Brain-run", 1.0, 0)
    assert "--log_model" in capsys.readouterr().err  # the checkpoint holds the names of its shots


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
    assert list(json.loads((ROOT / "key.json").read_text())) == ["api_key"]  # the value may be the user's key
