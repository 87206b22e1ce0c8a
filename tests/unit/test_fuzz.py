"""Damaged and hostile files from outside: a one-line InputError, never another exception, a hang or a flood.

FUZZ_EXAMPLES=5000 pytest tests/unit/test_fuzz.py looks longer, at other examples each time.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import pickle
import re
import resource
import signal
import struct
import zipfile
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
from dataset.layout import KINDS, SPLITS, Layout
from dataset.medical_few import MedicalDataset
from engine.detector import Detector
from engine.files.checkpoint import Checkpoint
from engine.files.config import MODEL_FLAGS
from engine.files.published import encoder_difference, export
from tests.helpers.data import read_shot_list, small_settings
from tests.helpers.weights import save_torchscript
from utils import InputError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
MICRO = ModelConfig("micro", 4, False, 8, 4, 8, 1, 1, 5, 16, 8, 1, 1, {})
SECONDS = 30  # on a machine that does other things too
MEGABYTES = 256
FLAGS = argparse.Namespace(**{**dict.fromkeys(MODEL_FLAGS), "features_list": [2], "batch_size": 4})

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of odd tensors and protocols before it refuses them


def fuzz(examples: int) -> Callable:
    """A fixed number of the same examples, or FUZZ_EXAMPLES new ones."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,  # `bounded` stops what hangs; the first example of a process is slow for other reasons
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


class Hang(BaseException):
    """Not an Exception, so that no reader takes it for a damaged file."""


def memory(name: str) -> int:
    """A line of /proc/self/status in MiB."""
    return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024


@contextmanager
def bounded() -> Iterator[None]:
    """Fail what takes longer than SECONDS or more than MEGABYTES; refuse addresses long before the machine suffers."""

    def stop(*_: object) -> None:
        raise Hang

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, ((memory("VmSize") + 4096) * 2**20, hard))
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert memory("VmHWM") - before < MEGABYTES


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


# The files as they should be.


@cache
def micro_state() -> dict[str, torch.Tensor]:
    return random_state(MICRO, seed=0)


@cache
def tiny_clip() -> CLIP:
    return create_model("ViT-tiny-14-56", "random", 42)


@cache
def published() -> dict:
    """A checkpoint in the published format."""
    settings = small_settings(features_list=(2,), weights_sha256=tiny_clip().info.sha256)
    return export(Detector(tiny_clip(), settings), tiny_clip())


def saved(content: object, new_format: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=new_format)
    return file.getvalue()


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Callable[[str], bytes]:
    """The bytes of a whole file, by its kind."""

    @cache
    def make(kind: str) -> bytes:
        state = micro_state()
        if kind == "torchscript":
            path = tmp_path_factory.mktemp("fuzz") / "weights.pt"
            save_torchscript(state, path)
            return path.read_bytes()
        if kind == "safetensors":
            return save_safetensors(state)
        return saved(state if kind.startswith("state") else published(), "old" not in kind)

    return make


def read_and_load_weights(path: Path) -> None:
    model = CLIP(MICRO, 8, quick_gelu=False, normalize_pixels=False)
    load_state(model, read_weights(path), str(path))
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def read_and_restore(path: Path) -> None:
    """What test.py does with a checkpoint."""
    facts = {"obj": "Brain", "prompt_name": "Brain", "pixel_metrics": True, "mask_above": 127}
    checkpoint = Checkpoint.load(path, FLAGS, lambda: facts)
    encoder_difference(checkpoint.parts, tiny_clip())
    if checkpoint.settings.model_name == "ViT-tiny-14-56":
        detector = Detector(tiny_clip(), checkpoint.settings)
        checkpoint.restore(detector, tiny_clip(), path)
        assert all(torch.isfinite(weight).all() for weight in detector.parameters())


def read_list(path: Path) -> None:
    for names in read_shot_list(path, 0):
        assert names
        assert all(isinstance(name, str) for name in names)


READERS = {
    "torchscript": read_and_load_weights,
    "state": read_and_load_weights,
    "state old": read_and_load_weights,
    "safetensors": read_and_load_weights,
    "published": read_and_restore,
}


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


def repacked(archive: bytes, member: Callable[[str], bool], change: Callable[[bytes], bytes]) -> bytes:
    """An archive with one member changed and every checksum right: what only an attacker or a test makes."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            new.writestr(info.filename, change(content) if member(info.filename) else content)
    return out.getvalue()


def odd_tensors() -> dict[str, Callable[[], torch.Tensor]]:
    ones = torch.ones(8, 8)
    return {
        "nan": lambda: ones * float("nan"),
        "infinite": lambda: ones * float("inf"),
        "sparse": ones.to_sparse,
        "sparse rows": ones.to_sparse_csr,
        "quantised": lambda: torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8),
        "meta": lambda: torch.empty(8, 8, device="meta"),
        "complex": lambda: ones.to(torch.complex64),
        "integers": ones.long,
        "float8": lambda: ones.to(torch.float8_e4m3fn),
        "scalar": lambda: torch.tensor(1.0),
        "empty": lambda: torch.empty(0),
        "expanded": lambda: torch.ones(1).expand(2**40),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    }


NO_TENSORS = [
    None, True, -1, 0, 2**70, float("nan"), 1e300, "", "x" * 5000, "\n", b"x", (), [], {}, [[]], {1: 2}, ["a"], [0],
    [2, 2], [-1], [10**9], ["2"], {"a": torch.ones(2)}, torch.Size([1]),
]  # fmt: skip
ODD = st.one_of(
    st.sampled_from(range(len(NO_TENSORS))).map(lambda index: copy.deepcopy(NO_TENSORS[index])),
    st.sampled_from(sorted(odd_tensors())).map(lambda name: odd_tensors()[name]()),
)


def places(content: dict, above: tuple = ()) -> Iterator[tuple]:
    """The path to every entry of nested dicts and lists."""
    for key, value in content.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from places(value, (*above, key))


@st.composite
def mistyped(draw: st.DrawFn, content: dict) -> dict:
    """`content` with an entry of another type, renamed or left out; a few tensors of the right shape hold NaN."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 2))):
        *above, key = draw(st.sampled_from(sorted(places(content), key=str)))
        inner = content
        for name in above:
            inner = inner[name]
        action = draw(st.sampled_from(["replace", "replace", "delete", "rename", "nan", "sparse"]))
        if action == "replace":
            inner[key] = draw(ODD)
        elif action == "rename":
            inner[draw(st.sampled_from([0, None, (1, 2), "", "other", "1.2.3", "x" * 300]))] = inner.pop(key)
        elif action == "delete":
            del inner[key]
        elif isinstance(inner[key], torch.Tensor) and inner[key].layout is torch.strided:
            inner[key] = inner[key] * float("nan") if action == "nan" else inner[key].to_sparse()
    return content


# The properties.


@pytest.mark.parametrize("kind", READERS)
def test_whole_files_are_read(tmp_path, whole, kind):
    (tmp_path / "file").write_bytes(whole(kind))
    assert refusal(READERS[kind], tmp_path / "file") == ""


@pytest.mark.parametrize("kind", READERS)
def test_damaged_files(tmp_path, whole, kind):
    @fuzz(25)
    @given(damaged(whole(kind)))
    def check(content: bytes) -> None:
        (tmp_path / "file").write_bytes(content)
        refusal(READERS[kind], tmp_path / "file")

    check()


@pytest.mark.parametrize("kind", ["torchscript", "state", "published"])
def test_damaged_pickle_in_a_sound_archive(tmp_path, whole, kind):
    archive = whole(kind)
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        pickled = next(members.read(name) for name in members.namelist() if name.endswith("/data.pkl"))

    @fuzz(40)
    @given(damaged(pickled))
    def check(content: bytes) -> None:
        changed = repacked(archive, lambda name: name.endswith("/data.pkl"), lambda _: content)
        (tmp_path / "file").write_bytes(changed)
        refusal(READERS[kind], tmp_path / "file")

    check()


def test_damaged_safetensors_header(tmp_path, whole):
    content = whole("safetensors")
    size = int.from_bytes(content[:8], "little")

    @fuzz(40)
    @given(damaged(content[8 : 8 + size]))
    def check(header: bytes) -> None:
        (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
        refusal(read_and_load_weights, tmp_path / "file")

    check()


@pytest.mark.parametrize("kind", ["weights", "published"])
def test_wrong_types_everywhere(tmp_path, kind):
    read = {"weights": read_and_load_weights}.get(kind, read_and_restore)

    @fuzz(60)
    @given(mistyped(micro_state() if kind == "weights" else published()))
    def check(content: dict) -> None:
        (tmp_path / "file").write_bytes(saved(content))
        refusal(read, tmp_path / "file")

    check()


@pytest.mark.parametrize("head", [b"", b"PK\x03\x04", b"\x80\x02", b"\x40" + bytes(7) + b"{"])
@pytest.mark.parametrize("read", [read_and_load_weights, read_and_restore, read_list])
def test_random_bytes(tmp_path, read, head):
    @fuzz(15)
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
    @fuzz(100)
    @given(LISTS)
    def check(content: bytes) -> None:
        (tmp_path / "list.txt").write_bytes(content)
        refusal(read_list, tmp_path / "list.txt")

    check()


FOLDERS = [
    "valid/good/img",
    "a/../b",
    "/",
    ".",
    "",
    "x" * 300,
    "x" * 5000,
    "\0",
    "\ud800",
    "\n",
    1,
    None,
    [],
    ["x"],
    [1],
]
ENTRIES = [None, True, 0, 0.5, -1.0, float("nan"), "x", " ", "x" * 10**5, {}, [], [[]]]
TEMPLATES = [
    "{stem}",
    "{parent}/{stem}",
    "{x}/{stem}",
    "{stem.__class__}",
    "x/{stem:>99999999}",
    "../{stem}",
    "\0/{stem}",
]
SPLIT = st.fixed_dictionaries(dict.fromkeys(KINDS, st.sampled_from(FOLDERS)))
DESCRIPTIONS = st.builds(
    lambda entries, splits: entries | splits,
    st.dictionaries(st.sampled_from([*Layout.__dataclass_fields__, "x" * 10**5]), st.sampled_from(ENTRIES), max_size=1),
    st.fixed_dictionaries({}, optional=dict.fromkeys(SPLITS, SPLIT) | {"masks": st.sampled_from(TEMPLATES)}),
)


def test_descriptions_of_data_sets(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.layout.FOLDER", tmp_path)
    for folder in ("valid", "test", "x"):
        (tmp_path / "Knee_AD" / folder).mkdir(parents=True)

    def read(_: Path) -> None:
        dataset = MedicalDataset.open("Knee", tmp_path)
        for split in SPLITS:
            dataset.samples(split)

    @fuzz(200)
    @given(st.one_of(DESCRIPTIONS, st.sampled_from(ENTRIES)))
    def check(content: object) -> None:
        (tmp_path / "Knee.json").write_text(json.dumps(content))
        assert refusal(read, tmp_path / "Knee.json")  # there are no images

    check()


# Files that an attacker would make.


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def torchscript_of(pickled: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("weights/constants.pkl", b"\x80\x02).")
        archive.writestr("weights/data.pkl", pickled)
    return out.getvalue()


MODULE = b"cx\nM\n)\x81"  # an object of the class x.M


def nested_modules(depth: int) -> bytes:
    """Modules that hold the next one twice: 2**depth paths."""
    body = MODULE
    for level in range(depth):  # put the inner one, then make an outer one with it under two names
        index = bytes([level])
        body += b"q" + index + b"0" + MODULE + b"}(X\1\0\0\0ah" + index + b"X\1\0\0\0bh" + index + b"ub"
    return b"\x80\x02" + body + b"."


HOSTILE = {
    "deep": lambda _: b"\x80\x02" + b"(l" * 10**6 + b".",
    "text of 2**60 bytes": lambda _: torchscript_of(b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x."),
    "modules in modules": lambda _: torchscript_of(nested_modules(60)),
    "deep modules": lambda _: torchscript_of(
        b"\x80\x02" + (MODULE + b"}X\1\0\0\0a") * 10**4 + b"N" + b"sb" * 10**4 + b"."
    ),
    "header of 2**60 bytes": lambda _: struct.pack("<Q", 2**60) + b'{"a":1}',
    "nested header": lambda _: struct.pack("<Q", 10**6) + b'{"a":' + b"[" * (10**6 - 5),
    "pickle in a pickle": lambda _: saved({"state_dict": pickle.dumps({"a": Call(print, "ran")})}),
}


@pytest.mark.parametrize("read", [read_and_load_weights, read_and_restore])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path, whole, capsys, name, read):
    (tmp_path / "file").write_bytes(HOSTILE[name](whole))
    assert str(tmp_path / "file") in refusal(read, tmp_path / "file")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("read", [read_and_restore, read_list])
def test_no_regular_file(tmp_path, read):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero"), tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        assert str(path) in refusal(read, path)
