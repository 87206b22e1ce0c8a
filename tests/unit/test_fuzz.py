"""Damaged and hostile files from outside: a one-line InputError, never another exception, a hang or a flood.

FUZZ_EXAMPLES=5000 pytest tests/unit/test_fuzz.py looks longer, at other examples each time.
"""

from __future__ import annotations

import argparse
import copy
import io
import os
import pickle
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from tests.helpers.data import read_shot_list, small_settings
from tests.helpers.weights import save_torchscript
from utils import InputError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
MICRO = ModelConfig("micro", 4, False, 8, 4, 8, 1, 1, 5, 16, 8, 1, 1, {})
SECONDS = 120  # on a machine that does other things too
FLAGS = argparse.Namespace(**{**dict.fromkeys(MODEL_FLAGS), "features_list": [2], "batch_size": 4})

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of odd tensors and protocols before it refuses them


def fuzz(examples: int) -> Callable:
    """A fixed number of the same examples, or FUZZ_EXAMPLES new ones."""
    return settings(
        max_examples=EXAMPLES or examples, derandomize=not EXAMPLES, database=None, deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


class Hang(BaseException):
    """Not an Exception, so that no reader takes it for a damaged file."""


@contextmanager
def bounded() -> Iterator[None]:
    """Fail what hangs; refuse addresses long before the machine suffers."""

    def stop(*_: object) -> None:
        raise Hang

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * 2**30, hard))
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refusal(read: Callable[[Path], object], path: Path) -> str:
    """The one line with which `read` refuses `path`, "" where it reads it."""
    with bounded():
        try:
            read(path)
        except InputError as error:
            assert len(str(error).splitlines()) == 1, str(error)
            assert len(str(error)) < 1500, str(error)[:2000]
            return str(error)
    return ""


# The files as they should be, and what reads them.


@cache
def tiny_clip() -> CLIP:
    return create_model("ViT-tiny-14-56", "random", 42)


@cache
def published() -> dict:
    """A checkpoint in the published format."""
    settings = small_settings(features_list=(2,), weights_sha256=tiny_clip().info.sha256)
    return export(Detector(tiny_clip(), settings), tiny_clip())


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Callable[[str], bytes]:
    """The bytes of a whole file, by its kind."""

    @cache
    def make(kind: str) -> bytes:
        state = random_state(MICRO, seed=0)
        if kind == "torchscript":
            path = tmp_path_factory.mktemp("fuzz") / "weights.pt"
            save_torchscript(state, path)
            return path.read_bytes()
        return save_safetensors(state) if kind == "safetensors" else saved(state if kind == "state" else published())

    return make


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


def read_list(path: Path) -> None:
    for names in read_shot_list(path, 0):
        assert names
        assert all(isinstance(name, str) for name in names)


READERS = {
    "torchscript": read_and_load_weights, "state": read_and_load_weights, "safetensors": read_and_load_weights,
    "published": read_and_restore,
}  # fmt: skip


# What happens to them.


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with one to three of: cut short, bits flipped, bytes overwritten, put in, left out, moved."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        action = draw(st.sampled_from(["cut", "flip", "huge", "insert", "delete", "move"]))
        if action == "cut":
            del data[at:]
        elif action == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "huge":
            data[at : at + 8] = draw(st.sampled_from([b"\xff" * 8, struct.pack("<q", 2**60), bytes(8), b"\x7f" * 4]))
        elif action == "insert":
            data[at:at] = draw(st.binary(max_size=40))
        elif action == "delete":
            del data[at : at + draw(st.integers(1, 200))]
        else:
            source = draw(st.integers(0, max(len(data) - 1, 0)))
            data[at:at] = data[source : source + draw(st.integers(1, 400))]
    return bytes(data)


ONES = torch.ones(8, 8)
ODD = [
    None, True, -1, 2**70, float("nan"), "x" * 5000, "\n", b"x", (), [], {}, [[]], {1: 2}, {"a": torch.ones(2)},
    ONES * float("nan"), ONES.to_sparse(), ONES.to(torch.complex64), ONES.long(), torch.tensor(1.0), torch.empty(0),
    torch.ones(1).expand(2**40),
]  # fmt: skip


@st.composite
def mistyped(draw: st.DrawFn, content: dict) -> dict:
    """A checkpoint with a part or a tensor of another type, renamed or left out."""
    content = copy.deepcopy(content)
    inner = draw(st.sampled_from([content, *content.values()]))
    key = draw(st.sampled_from(sorted(inner)))
    action = draw(st.sampled_from(["replace", "replace", "delete", "rename"]))
    if action == "replace":
        inner[key] = ODD[draw(st.integers(0, len(ODD) - 1))]
    else:
        value = inner.pop(key)
        if action == "rename":
            inner[draw(st.sampled_from([0, None, (1, 2), "", "other", "1.2.3", "x" * 300]))] = value
    return content


@pytest.mark.parametrize("kind", READERS)
def test_damaged_files(tmp_path, whole, kind):
    (tmp_path / "file").write_bytes(whole(kind))
    assert refusal(READERS[kind], tmp_path / "file") == ""

    @fuzz(12)
    @given(damaged(whole(kind)))
    def check(content: bytes) -> None:
        (tmp_path / "file").write_bytes(content)
        refusal(READERS[kind], tmp_path / "file")

    check()


def test_wrong_types_in_a_published_checkpoint(tmp_path):
    @fuzz(25)
    @given(mistyped(published()))
    def check(content: dict) -> None:
        (tmp_path / "file").write_bytes(saved(content))
        refusal(read_and_restore, tmp_path / "file")

    check()


@pytest.mark.parametrize("head", [b"", b"PK\x03\x04", b"\x80\x02", b"\x40" + bytes(7) + b"{"])
@pytest.mark.parametrize("read", [read_and_load_weights, read_and_restore, read_list])
def test_random_bytes(tmp_path, read, head):
    @fuzz(8)
    @given(st.binary(max_size=400))
    def check(noise: bytes) -> None:
        (tmp_path / "file").write_bytes(head + noise)
        assert refusal(read, tmp_path / "file")

    check()


LISTS = st.one_of(
    damaged(b"n-0: a.png b.png\na-0: c.png d.png\nn-1: e.png\na-1: f.png\n"),
    st.lists(st.from_regex(r"\s*[an]-[0-9]{1,3} ?:( [a-z.\n\x00/]*){0,3}", fullmatch=True)).map(
        lambda lines: "\n".join(lines).encode()
    ),
    st.text().map(lambda text: text.encode("utf-8", "surrogatepass")),
)  # fmt: skip


def test_shot_lists(tmp_path):
    @fuzz(60)
    @given(LISTS)
    def check(content: bytes) -> None:
        (tmp_path / "list.txt").write_bytes(content)
        refusal(read_list, tmp_path / "list.txt")

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
    "nested header": struct.pack("<Q", 10**6) + b'{"a":' + b"[" * (10**6 - 5),
    "code": saved({"a": Call(print, "ran")}),
    "pickle in a pickle": saved({"state_dict": pickle.dumps({"a": Call(print, "ran")})}),
}


@pytest.mark.parametrize("read", [read_and_load_weights, read_and_restore])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path, capsys, name, read):
    (tmp_path / "file").write_bytes(HOSTILE[name])
    assert str(tmp_path / "file") in refusal(read, tmp_path / "file")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("read", [read_and_restore, read_list])
def test_no_regular_file(tmp_path, read):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero"), tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        assert str(path) in refusal(read, path)
