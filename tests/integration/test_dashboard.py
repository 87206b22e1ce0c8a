"""W&B records of real offline runs, read back with wandb's own command; command lines of the sweep."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from engine.files.config import train_options
from tests.helpers.commands import ROOT, Commands, fine
from tests.helpers.data import SMALL, unpacked

PUBLISHED = {"epoch", "sim_texts", "loss", "AUC", "pAUC", "AUC+pAUC", "AUCbest", "pAUCbest", "AUC+pAUCbest"}
EPOCHS = 5
WANDB = Path(sys.executable).with_name("wandb")
KEY = "0123456789abcdef" * 2 + "deadbeef"  # has the form of an API key, but is nobody's


def train(command: Commands, folder: Path, *flags: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Train in `folder`, with a home folder inside it."""
    own = {name: "" for name in os.environ if name.startswith("WANDB")} | {"HOME": str(folder / "home")}
    done = command("train.py", *SMALL, "--shot", 1, *flags, cwd=folder, env={**own, "WANDB_MODE": "offline", **env})
    fine(done)
    return done


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of the one offline run below `folder`, as `wandb leet inspect` prints them."""
    (path,) = folder.rglob("offline-run-*/run-*.wandb")
    with tempfile.TemporaryDirectory() as home:
        env = {"HOME": home, "PATH": os.environ["PATH"], "WANDB_ERROR_REPORTING": "false"}
        inspect = [WANDB, "leet", "inspect", "--json", path]
        done = subprocess.run(inspect, capture_output=True, text=True, timeout=120, check=True, env=env)
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_type(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The records of one type: run, history, summary, metric, artifact, exit."""
    return [row[kind] for row in rows if row["type"] == kind]


def test_offline_run(command, phantoms, tmp_path):
    # The second or fourth epoch is selected; the fifth is evaluated as the last one, but cannot be selected.
    flags = ["--obj", "Brain", "--data_path", phantoms, "--epoch", EPOCHS, "--select", "valid", "--eval_every", 2]
    output = train(command, tmp_path, *flags, "--log_images_every", 2, "--log_model").stdout
    rows = records(tmp_path)
    (files,) = tmp_path.glob("runs/*/wandb/offline-run-*/files")
    lines = [json.loads(line) for line in next(tmp_path.rglob("metrics.jsonl")).read_text().splitlines()]
    *history, last = (row["item"] for row in of_type(rows, "history"))
    assert [row["epoch"] for row in history] == [row["_step"] for row in history] == list(range(EPOCHS))
    metrics = {"AUC", "pAUC", "AP", "F1-max", "pixel_AP", "pixel_F1-max"}
    expected = PUBLISHED | {f"{part}/{name}" for part in ("test", "valid") for name in metrics}
    assert not [name for name in history[0] if "test/" in name or "valid/" in name]
    for i in (1, 3, 4):
        row, line = history[i], lines[i]
        assert expected <= set(row)
        # 16 views of 1 + 1 shots, 14 test images, the other 6 images of valid/
        assert row["time/images_per_second"] * row["time/epoch"] == pytest.approx(16 * 2 + 14 + 6)
        names = {"AUC": "auc", "pAUC": "pauc", "loss": "total", "valid/AUC": "valid_auc", "sim_texts": "similarity"}
        assert {name: row[name] for name in names} == {name: line[key] for name, key in names.items()}
        with Image.open(files / row["sheet.path"]) as picture:
            assert picture.width > 1000
    assert not [row for row in (history[0], history[2]) if "sheet.path" in row]
    page = next(tmp_path.glob("runs/*/index.html"))
    assert (files / last["report.path"]).read_bytes() == page.read_bytes()

    selected = int(re.search(r"^selected: .*\[epoch (\d+) of", output, re.MULTILINE)[1]) - 1
    summary = {name: value for row in of_type(rows, "summary") for name, value in row.get("update", {}).items()}
    assert (summary["epoch"], summary["AUC"]) == (selected, history[selected]["AUC"])
    assert summary["AUC+pAUCbest"] == history[-1]["AUC+pAUCbest"]
    assert 0 <= summary["test/AUPRO"] <= 1 and 0 <= summary["test/Dice"] <= 1
    (started,) = of_type(rows, "run")
    assert started["run_group"] == "Brain-1shot"
    assert started["config"]["update"]["shots"]["abnormal"] == ["valid_Ungood_00000.png"]
    assert [artifact["type"] for artifact in of_type(rows, "artifact")] == ["model"]


def test_resumed_run_keeps_its_id_and_no_key_or_password_leaks(command, phantoms, tmp_path):
    """Offline or with an unreachable server, runs resume; with --log_images_every 0 no file name is recorded."""
    flags = ["--obj", "Brain", "--data_path", phantoms, "--epoch", 1, "--exp_name", "one", "--log_images_every", 0]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://somebody:pass-word@127.0.0.1:{probe.getsockname()[1]}"
    online = {"WANDB_MODE": "online", "WANDB_BASE_URL": url, "WANDB_INIT_TIMEOUT": "2", "WANDB_API_KEY": KEY}
    first = train(command, tmp_path, *flags, **online)
    assert "valid_Ungood" not in json.dumps(records(tmp_path))
    said = [first]
    for epoch, env in ((2, {"WANDB_MODE": "offline"}), (3, {"WANDB_MODE": "online", "WANDB_API_KEY": "no key"})):
        said.append(command("train.py", "--resume", tmp_path / "runs/one", "--epoch", epoch, cwd=tmp_path, env=env))
        fine(said[-1])
    stored = json.loads((tmp_path / "runs/one/config.json").read_text())
    assert {path.name.rpartition("-")[2] for path in tmp_path.rglob("offline-run-*")} == {stored["wandb_id"]}
    printed = [done.stdout.encode() + done.stderr.encode() for done in said]
    texts = [part for path in tmp_path.rglob("*") if path.is_file() for part in unpacked(path)]
    assert not [text for text in (*printed, *texts) if KEY.encode() in text or b"pass-word" in text]


def test_sweep_command_lines():
    """The first and the last value of each parameter give a command line that train.py accepts."""
    config = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    start, *flags, rest = config["command"][2:]
    assert (start, rest, config["program"]) == ("${program}", "${args}", "train.py")
    values = {name: spec["values"] for name, spec in config["parameters"].items()}
    assert values.keys() == {"text_mood", "contrast_mood", "loss_type", "dec_type", "visionA", "fidelity", "seed"}
    for end in (0, -1):
        options = vars(train_options([*flags, *(f"--{name}={choices[end]}" for name, choices in values.items())]))
        assert {name: options[name] for name in values} == {name: choices[end] for name, choices in values.items()}
