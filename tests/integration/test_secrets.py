"""A planted W&B key: real runs of train.py and test.py, then a search of all that they printed and wrote."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataset import phantom
from tests.helpers.commands import ROOT
from tests.helpers.data import SMALL

OLD_KEY = "0123456789abcdef" * 2 + "deadbeef"  # the two shapes of a key, of nobody
NEW_KEY = "wandb_v1_Abc123xyzPlanted_" + "Q7" * 30
DATA = ["--obj", "Brain", "--data_path", "data", "--save_path", "ckpt", "--cache", "disk"]
TRAIN = [*SMALL, *DATA, "--shot", "1", "--epoch", "1", "--out_json", "train.json", "--exp_name", "exp"]


def plant(folder: Path, key: str | None) -> None:
    """Copy the program to `folder`, with a phantom, and `key` in key.json."""
    for name in ("CLIP", "Prompt", "dataset", "engine"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pt", "*.safetensors")
        )
    for name in ("train.py", "test.py", "loss.py", "utils.py", "key.json"):
        shutil.copy(ROOT / name, folder)
    phantom.write(folder / "data", ["Brain"], valid=2, test=2, seed=0, size=64)
    if key is not None:
        (folder / "key.json").write_text(json.dumps({"api_key": key}))


def run(folder: Path, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Start a script in `folder`, in an environment without the developer's own settings."""
    (folder / "home").mkdir(exist_ok=True)
    keep = {name: os.environ[name] for name in ("PATH", "TMPDIR", "VIRTUAL_ENV") if name in os.environ}
    environment = {**keep, "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **env}
    return subprocess.run(
        [sys.executable, script, *arguments], cwd=folder, env=environment, capture_output=True, check=False, timeout=200
    )


def forms(key: str) -> list[bytes]:
    """The key as it is, reversed, in hexadecimal and in base64 at each of three alignments."""
    raw = key.encode()
    found = [raw, raw[::-1], raw.hex().encode(), raw.hex().upper().encode()]
    for shift in range(3):
        text = base64.b64encode(b"x" * shift + raw)
        found.append(text[4 if shift else 0 : -4])  # what does not depend on the bytes beside it
    return found


def unpacked(path: Path) -> Iterator[bytes]:
    """The bytes of a file, and of what is packed in it."""
    content = path.read_bytes()
    yield content
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist())
    elif content[:2] == b"\x1f\x8b":
        yield zlib.decompress(content, 31)


def leaks(folder: Path, key: str, *results: subprocess.CompletedProcess[bytes]) -> list[str]:
    """Where the key is found, key.json aside."""
    places = {f"{path.relative_to(folder)}": b"\0".join(unpacked(path)) for path in sorted(folder.rglob("*"))
              if path.is_file() and path != folder / "key.json"}  # fmt: skip
    places |= {f"stdout {i}": result.stdout for i, result in enumerate(results)}
    places |= {f"stderr {i}": result.stderr for i, result in enumerate(results)}
    return [name for name, content in places.items() if any(form in content for form in forms(key))]


def test_the_search_finds_a_key(tmp_path):
    contents = [NEW_KEY.encode(), NEW_KEY.encode().hex().encode(), base64.b64encode(f"api:{NEW_KEY}".encode())]
    for index, content in enumerate(contents):
        (tmp_path / f"plain{index}").write_bytes(b"before " + content + b" after")
        with zipfile.ZipFile(tmp_path / f"packed{index}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("inner", content)
    assert len(leaks(tmp_path, NEW_KEY)) == 6
    assert not leaks(tmp_path, OLD_KEY)


@pytest.mark.parametrize(("key", "source"), [(OLD_KEY, "WANDB_API_KEY"), (NEW_KEY, "key.json")])
def test_a_planted_key_is_nowhere(tmp_path, key, source):
    plant(tmp_path, key if source == "key.json" else None)
    env = {source: key} if source == "WANDB_API_KEY" else {}
    results = [
        run(tmp_path, "train.py", *TRAIN, **env),
        run(tmp_path, "test.py", *DATA, "--out_json", "test.json", "--figures", "figures", **env),
    ]
    for result in results:
        assert result.returncode == 0, result.stderr
    # What is searched is there: the binary run file and what W&B notes of the machine, checkpoint, JSON, rows.
    (run_file,) = tmp_path.rglob("run-*.wandb")
    assert b"valid_Ungood_00000.png" in run_file.read_bytes()  # its records are not packed: a key would show
    assert [path for path in (tmp_path / ".cache").rglob("*") if path.is_file()]
    for name in ("train.json", "test.json", "ckpt/Brain.pth", "figures/Brain.png"):
        assert (tmp_path / name).is_file()
    assert not leaks(tmp_path, key, *results)


def test_a_crash_does_not_tell_the_key(tmp_path):
    """A fault inside an epoch, and one inside wandb that quotes the key: the traceback and the files are searched."""
    plant(tmp_path, None)
    script = f"""
import runpy, sys
import engine.evaluation, wandb
def crash(*args, **kwargs):
    raise ZeroDivisionError("a fault in the program")
def quote(self, *args, **kwargs):
    raise RuntimeError("could not log in with {NEW_KEY}")
if sys.argv[1] == "epoch":
    engine.evaluation.evaluate = crash
else:
    wandb.Run.log = quote
sys.argv = ["train.py", *sys.argv[2:]]
runpy.run_path("train.py", run_name="__main__")
"""
    (tmp_path / "crash.py").write_text(script.replace(NEW_KEY, '" + __import__("os").environ["WANDB_API_KEY"] + "'))
    environment = {"PYTHONPATH": str(tmp_path), "WANDB_API_KEY": NEW_KEY}
    crashed = run(tmp_path, "crash.py", "epoch", *TRAIN, **environment)
    assert crashed.returncode == 1
    assert b"ZeroDivisionError" in crashed.stderr
    quoted = run(tmp_path, "crash.py", "wandb", *TRAIN, **environment)
    assert quoted.returncode == 0
    assert b"tracking is off" in quoted.stderr
    assert b"***" in quoted.stderr
    assert not leaks(tmp_path, NEW_KEY, crashed, quoted)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_key_that_git_tracks_is_warned_of_at_the_start(tmp_path):
    plant(tmp_path, NEW_KEY)
    for command in (["init", "-q"], ["add", "key.json"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    for mode in ("offline", "disabled"):
        result = run(tmp_path, "train.py", *TRAIN, WANDB_MODE=mode)
        assert result.returncode == 0
        lines = result.stderr.decode().splitlines()
        assert [line for line in lines if "git tracks it" in line] == lines[:1]  # before anything else
        assert "key.json" in lines[0]
        assert NEW_KEY not in result.stderr.decode()
