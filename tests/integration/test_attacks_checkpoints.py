"""Damaged and hostile checkpoints, kept evaluations and histories: one line that names the file, and exit code 2."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.attacks import fine, refused

DEEP = "[" * 100_000


def settings(**values: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda payload: {"settings": {**payload["settings"], **values}}


def metadata(**values: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda payload: {"about": {**payload["about"], **values}}


def nested(depth: int) -> list[Any]:
    """Lists in lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def wide(config: dict[str, Any]) -> dict[str, Any]:
    """A tower of a thousand million channels."""
    return {**config, "vision_cfg": {**config["vision_cfg"], "width": 64 * 10**9}}


HOSTILE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "a layer that the tower lacks": settings(features_list=[1, 2, 3, 99]),
    "layers below 1": settings(features_list=[-1, 0, 1, 2]),
    "a layer four times": settings(features_list=[1, 1, 1, 1]),
    "layers of words": settings(features_list=["one"]),
    "no layers": settings(features_list=[]),
    "an endless list of layers": settings(features_list=list(range(1, 100_000))),
    "img_size a word": settings(img_size="large"),
    "img_size huge": settings(img_size=10**9),
    "img_size true": settings(img_size=True),
    "eval_batch 0": settings(eval_batch=0),
    "mask_above beyond 8 bits": settings(mask_above=300),
    "an object's name of a megabyte": settings(prompt_name="x" * 10**6),
    "a model that is a path": settings(model_name="../../etc/passwd", model_config=None),
    "sizes that fill the memory": lambda p: settings(model_config=wide(p["settings"]["model_config"]))(p),
    "states of numbers": settings(states={"normal": [1], "abnormal": [2]}),
    "settings a list": lambda payload: {"settings": [1]},
    "settings nested deeply": settings(states=nested(80)),
    "epoch a word": metadata(metrics={"epoch": "abc", "auc": 0.5, "pauc": 0.5}),
    "metrics infinite": metadata(metrics={"epoch": 1, "auc": float("inf"), "pauc": 0.5}),
    "metrics a word": metadata(metrics="good"),
    "run with a NUL": metadata(run="a\0b"),
    "run with an escape": metadata(run="\x1b[2J"),
    "select a number": metadata(select=5),
    "shots a list": metadata(shots=[1, 2]),
    "shots of numbers": metadata(shots={"normal": [1], "abnormal": [2]}),
    "seed a word": metadata(options={"seed": "x"}),
    "threshold a word": metadata(threshold={"value": "high"}),
    "threshold without figures": metadata(threshold={"value": 0.5, "rule": "f1", "from": "valid/"}),
    "a range of three": lambda p: metadata(threshold={**p["about"]["threshold"], "heat_range": [0.0, 1.0, 2.0]})(p),
    "patients of numbers": metadata(shot_patients=[1, 2]),
    "metadata a tensor": lambda payload: {"about": torch.ones(2)},
    "a part that is a list": lambda payload: {"normal_det_adapters": [1]},
    "a part of words": lambda payload: {"normal_det_adapters": {"0.fc1.0.weight": "x"}},
    "a tensor of another shape": lambda p: {
        "normal_det_adapters": {name: tensor[..., :1] for name, tensor in p["normal_det_adapters"].items()}
    },
    "complex numbers": lambda p: {
        "normal_det_adapters": {name: tensor * 1j for name, tensor in p["normal_det_adapters"].items()}
    },
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_checkpoint_is_refused_by_test_and_predict(command, home, tmp_path, what):
    """In one line that names the file; nothing is written."""
    payload = torch.load(home.ckpt, weights_only=True)
    path = tmp_path / "evil.pth"
    torch.save({**payload, **HOSTILE[what](payload)}, path)
    name = "evil.pth" if what != "a model that is a path" else "--model_name ../../etc/passwd"
    refused(command("test.py", *home.flags(), "--ckpt", path, "--out_json", tmp_path / "out.json"), name)
    image = home.data / "Brain_AD/test/good/img/test_good_00000.png"
    flags = ["--ckpt", path, "--device", "cpu", image, "--out", tmp_path / "out"]
    refused(command("predict.py", *flags), name)
    assert not (tmp_path / "out.json").exists()


LINES = {
    "infinite": '{"epoch": 1, "det": Infinity}', "not a number": '{"epoch": 1, "det": NaN}',
    "1e308": '{"epoch": 1, "det": 1e308}', "deep": DEEP, "a list": "[1]", "epoch a word": '{"epoch": "one"}',
    "epoch 0": '{"epoch": 0}', "a huge integer": '{"epoch": 1, "det": 1' + "0" * 400 + "}",
    "5,000 digits": '{"epoch": 1, "det": ' + "9" * 5000 + "}", "a NUL": "\0",
}  # fmt: skip


@pytest.mark.parametrize("what", LINES)
def test_a_hostile_history_is_refused(command, home, tmp_path, what):
    """Before anything is computed, with the number of the line."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1, "det": 1.0}\n' + LINES[what] + "\n")
    flags = [*home.test(), "--history", path, "--figures", tmp_path / "figures"]
    refused(command("test.py", *flags), "metrics.jsonl, line 2")


@pytest.fixture(scope="module")
def kept(command, home, tmp_path_factory) -> Path:
    """An evaluation that test.py kept."""
    path = tmp_path_factory.mktemp("kept") / "kept.npz"
    fine(command("test.py", *home.test(), "--save_scores", path))
    return path


def array(**arrays: np.ndarray) -> Callable[[Path], None]:
    """Replaces arrays of a kept evaluation."""

    def spoil(path: Path) -> None:
        with np.load(path) as archive:
            values = {name: archive[name] for name in archive.files}
        with path.open("wb") as file:
            np.savez(file, **{**values, **arrays})

    return spoil


def describe(**entries: object) -> Callable[[Path], None]:
    """Changes the description of a kept evaluation."""

    def spoil(path: Path) -> None:
        with np.load(path) as archive:
            description = json.loads(str(archive["description"]))
        array(description=np.array(json.dumps({**description, **entries})))(path)

    return spoil


SPOILED: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "text": lambda path: path.write_text("x"),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04N."),
    "pickled objects": lambda path: np.savez(path, patch_scores=np.array([{}], dtype=object)),
    "scores of another shape": array(patch_scores=np.zeros((14, 4, 8), np.float32)),
    "fewer scores": array(patch_scores=np.zeros((3, 4, 9), np.float32)),
    "labels of 2": array(labels=np.full(14, 2)),
    "masks of others": array(mask_rows=np.full(14, 99, np.int32)),
    "deep": array(description=np.array(DEEP)),
    "size huge": describe(img_size=10**7),
    "size a word": describe(img_size="x"),
    "metadata a word": describe(metadata="x"),
    "settings a word": describe(settings="x"),
    "select a number": describe(metadata={"select": 5}),
    "threshold a word": describe(metadata={"select": "last", "threshold": "x"}),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_damaged_or_hostile_evaluation_is_refused(command, home, kept, tmp_path, what):
    """`test.py --scores` names the file."""
    path = tmp_path / "evil.npz"
    shutil.copy(kept, path)
    SPOILED[what](path)
    refused(command("test.py", *home.flags(), "--scores", path), "evil.npz")


def test_a_zip_bomb_is_no_checkpoint(command, home, tmp_path):
    """An archive that claims to unpack to far more than it holds is not unpacked."""
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**28))
    refused(command("test.py", *home.flags(), "--ckpt", path), "bomb.pth")
