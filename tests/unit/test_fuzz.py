"""Damaged and hostile files from outside: a one-line InputError, never another exception.

FUZZ_EXAMPLES=5000 pytest tests/unit/test_fuzz.py looks longer, at other examples each time.
"""

import argparse
import io
import os
import pickle
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from CLIP.clip import create_model, load_state, random_state
from CLIP.config import ModelConfig
from CLIP.model import CLIP
from CLIP.weights import read_weights
from engine.detector import Detector
from engine.files.checkpoint import Checkpoint
from engine.files.config import MODEL_FLAGS
from engine.files.published import export
from tests.helpers.data import small_settings
from tests.helpers.weights import save_torchscript
from utils import InputError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
MICRO = ModelConfig("micro", 4, False, 8, 4, 8, 1, 1, 5, 16, 8, 1, 1, {})
FLAGS = argparse.Namespace(**{**dict.fromkeys(MODEL_FLAGS), "features_list": [2], "batch_size": 4})

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of odd tensors and protocols before it refuses them


def fuzz(examples: int) -> Callable:
    """A fixed number of the same examples, or FUZZ_EXAMPLES new ones."""
    return settings(
        max_examples=EXAMPLES or examples, derandomize=not EXAMPLES, database=None, deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


def refusal(read: Callable[[Path], object], path: Path) -> str:
    """The one line with which `read` refuses `path`, "" where it reads it."""
    try:
        read(path)
    except InputError as error:
        assert len(str(error).splitlines()) == 1, str(error)
        assert len(str(error)) < 1500, str(error)[:2000]
        return str(error)
    return ""


@cache
def tiny_clip() -> CLIP:
    return create_model("ViT-tiny-14-56", "random", 42)


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def whole(kind: str, folder: Path) -> bytes:
    """The bytes of a whole file."""
    state = random_state(MICRO, seed=0)
    if kind == "published":
        settings = small_settings(features_list=(2,), weights_sha256=tiny_clip().info.sha256)
        return saved(export(Detector(tiny_clip(), settings), tiny_clip()))
    if kind == "torchscript":
        save_torchscript(state, folder / "weights.pt")
        return (folder / "weights.pt").read_bytes()
    return save_safetensors(state) if kind == "safetensors" else saved(state)


def read_and_load_weights(path: Path) -> None:
    model = CLIP(MICRO, 8, quick_gelu=False, normalize_pixels=False)
    load_state(model, read_weights(path), str(path))
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def read_and_restore(path: Path) -> None:
    """What test.py does with a checkpoint."""
    facts = {"obj": "Brain", "prompt_name": "Brain", "pixel_metrics": True, "mask_above": 127}
    checkpoint = Checkpoint.load(path, FLAGS, lambda: facts)
    if checkpoint.settings.model_name == "ViT-tiny-14-56":
        detector = Detector(tiny_clip(), checkpoint.settings)
        checkpoint.restore(detector, tiny_clip(), path)
        assert all(torch.isfinite(weight).all() for weight in detector.parameters())


READERS = {
    "torchscript": read_and_load_weights, "state": read_and_load_weights, "safetensors": read_and_load_weights,
    "published": read_and_restore,
}  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with one to three of: cut short, bits flipped, bytes overwritten, left out."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        action = draw(st.sampled_from(["cut", "flip", "huge", "delete"]))
        if action == "cut":
            del data[at:]
        elif action == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "huge":
            data[at : at + 8] = draw(st.sampled_from([b"\xff" * 8, struct.pack("<q", 2**60), bytes(8)]))
        else:
            del data[at : at + draw(st.integers(1, 200))]
    return bytes(data)


@pytest.mark.parametrize("kind", READERS)
def test_damaged_files(tmp_path, kind):
    content = whole(kind, tmp_path)
    (tmp_path / "file").write_bytes(content)
    assert refusal(READERS[kind], tmp_path / "file") == ""

    @fuzz(12)
    @given(damaged(content))
    def check(content: bytes) -> None:
        (tmp_path / "file").write_bytes(content)
        refusal(READERS[kind], tmp_path / "file")

    check()


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


HOSTILE = {
    "deep": b"\x80\x02" + b"(l" * 10**6 + b".",
    "header of 2**60 bytes": struct.pack("<Q", 2**60) + b'{"a":1}',
    "code": saved({"a": Call(print, "ran")}),
    "pickle in a pickle": saved({"state_dict": pickle.dumps({"a": Call(print, "ran")})}),
}


@pytest.mark.parametrize("read", [read_and_load_weights, read_and_restore])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path, capsys, name, read):
    (tmp_path / "file").write_bytes(HOSTILE[name])
    assert str(tmp_path / "file") in refusal(read, tmp_path / "file")
    assert capsys.readouterr().out == ""
