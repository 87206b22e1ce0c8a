"""A planted W&B key: real runs of train.py and test.py, then a search of all that they printed and wrote."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.helpers import wandb_runs
from tests.helpers.commands import ROOT
from tests.helpers.data import SMALL, unpacked

OLD_KEY = "0123456789abcdef" * 2 + "deadbeef"  # the two shapes of a key, of nobody
NEW_KEY = "wandb_v1_Abc123xyzPlanted_" + "Q7" * 30
PATHS = ["--obj", "Brain", "--data_path", "data", "--save_path", "ckpt"]
TRAIN = [*SMALL, *PATHS, "--shot", "1", "--epoch", "1", "--out_json", "train.json", "--run_dir", "runs"]


@pytest.fixture
def folder(phantoms, tmp_path) -> Path:
    """A working folder with data/ and key.json as it is published, from which the project's scripts are started."""
    (tmp_path / "home").mkdir()
    (tmp_path / "data").symlink_to(phantoms)
    shutil.copy(ROOT / "key.json", tmp_path)
    return tmp_path


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Without the developer's own settings of W&B."""
    own = {name: "" for name in os.environ if name.startswith("WANDB")}
    return {**own, "HOME": str(folder / "home"), "WANDB_MODE": "offline", **more}


def forms(key: str) -> list[bytes]:
    """The key as it is, reversed, in hexadecimal and in base64 at each of three alignments."""
    raw = key.encode()
    result = [raw, raw[::-1], raw.hex().encode(), raw.hex().upper().encode()]
    for shift in range(3):
        text = base64.b64encode(b"x" * shift + raw)
        result.append(text[4 if shift else 0 : -4])  # what does not depend on the bytes beside it
    return result


def leaks(folder: Path, key: str, *printed: str | bytes) -> list[str]:
    """Where the key is found, key.json aside."""
    places = {f"{path.relative_to(folder)}": b"\0".join(unpacked(path)) for path in sorted(folder.rglob("*"))
              if path.is_file() and path != folder / "key.json"}  # fmt: skip
    places |= {f"printed {i}": text.encode() if isinstance(text, str) else text for i, text in enumerate(printed)}
    return [name for name, content in places.items() if any(form in content for form in forms(key))]


def test_the_search_finds_a_key(tmp_path):
    contents = [NEW_KEY.encode(), NEW_KEY.encode().hex().encode(), base64.b64encode(f"api:{NEW_KEY}".encode())]
    for index, content in enumerate(contents):
        (tmp_path / f"plain{index}").write_bytes(b"before " + content + b" after")
        with zipfile.ZipFile(tmp_path / f"packed{index}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("inner", content)
    assert len(leaks(tmp_path, NEW_KEY, NEW_KEY)) == 7
    assert not leaks(tmp_path, OLD_KEY)


PLACES = {
    "WANDB_API_KEY": (OLD_KEY, None),
    "key.json": (NEW_KEY, "api_key"),  # the published form
}


@pytest.mark.parametrize("place", PLACES)
def test_a_planted_key_is_nowhere(command, folder, place):
    key, name = PLACES[place]
    if name:
        (folder / "key.json").write_text(json.dumps({name: key}))
    env = environment(folder, **({} if name else {"WANDB_API_KEY": key}))
    outputs = ["--figures", "figures", "--report", "page", "--save_scores", "brain.npz"]
    results = [
        command("train.py", *TRAIN, "--cache", "disk", "--cache_dir", "store", "--log_model", cwd=folder, env=env),
        command("test.py", *PATHS, "--device", "cpu", "--out_json", "test.json", *outputs, cwd=folder, env=env),
    ]
    for result in results:
        assert result.returncode == 0, result.stderr
        assert "is ignored" not in result.stderr  # key.json was read, and is of the right form
    # What is searched is there: the run as W&B shows it, with its pictures and its artifact; checkpoint, JSON, store.
    shown = json.dumps(wandb_runs.records(folder))
    assert "valid_Ungood_00000.png" in shown and "report" in shown
    for name in ("train.json", "test.json", "ckpt/Brain.pth", "figures/Brain.png", "page/index.html", "brain.npz"):
        assert (folder / name).is_file()
    assert list(folder.rglob("*.tokens"))
    printed = [text for result in results for text in (result.stdout, result.stderr)]
    assert not leaks(folder, key, shown, *printed)


CRASH = """
import os, sys
import train, wandb
def crash(*args, **kwargs):
    raise ZeroDivisionError("a fault in the program")
def quote(self, *args, **kwargs):
    raise OSError("could not log in with " + os.environ["WANDB_API_KEY"])
if sys.argv[1] == "epoch":
    train.evaluate = crash
else:
    wandb.Run.log = quote
train.main(train.parse(sys.argv[2:]))
"""


def test_a_crash_does_not_tell_the_key(command, folder):
    """A fault inside an epoch, and one inside wandb that quotes the key: the traceback and the files are searched."""
    (folder / "crash.py").write_text(CRASH)
    env = environment(folder, WANDB_API_KEY=NEW_KEY)
    crashed, quoted = (
        command(str(folder / "crash.py"), where, *TRAIN, cwd=folder, env=env) for where in ("epoch", "wandb")
    )
    assert crashed.returncode == 1
    assert "ZeroDivisionError" in crashed.stderr
    assert quoted.returncode == 0
    assert "not tracked" in quoted.stderr
    assert "***" in quoted.stderr
    assert not leaks(folder, NEW_KEY, crashed.stdout, crashed.stderr, quoted.stdout, quoted.stderr)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_key_that_git_tracks_is_warned_of(command, folder):
    (folder / "key.json").write_text(json.dumps({"api_key": NEW_KEY}))
    for words in (["init", "-q"], ["add", "key.json"]):
        subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)
    for mode in ("offline", "disabled"):
        result = command("train.py", *TRAIN, cwd=folder, env=environment(folder, WANDB_MODE=mode))
        assert result.returncode == 0, result.stderr
        assert len([line for line in result.stderr.splitlines() if "git tracks it" in line]) == 1
        assert NEW_KEY not in result.stderr
