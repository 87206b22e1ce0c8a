"""Weight files: every format gives the same tensors, and other files an error of one line."""

import os
import pickle
import random
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from CLIP.clip import create_model
from CLIP.weights import HALF, NOT_WEIGHTS, read_weights, round_to_half
from tests.conftest import tiny_state
from tests.helpers.weights import save_torchscript
from utils import InputError

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """Weights of the tiny model without OpenAI's three integers: float32, exact in float16."""
    return {key: value for key, value in tiny_state().items() if key not in NOT_WEIGHTS}


@pytest.fixture(scope="module")
def small(state: State) -> State:
    """Weights without the 25 MB token embedding, for tests that write many files."""
    return {key: value for key, value in state.items() if key != "token_embedding.weight"}


def same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def refused(path: Path, match: str = ".") -> None:
    """Assert that reading raises an error of one line that names the file."""
    with pytest.raises(InputError, match=match) as caught:
        read_weights(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text


class Payload:
    """Creates a folder when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_torchscript(tmp_path: Path, state: State) -> None:
    save_torchscript(tiny_state(), tmp_path / "weights.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning that TorchScript is deprecated
        found = read_weights(tmp_path / "weights.bin")
    same(found, {key: value.half() if HALF.fullmatch(key) else value for key, value in state.items()})


@pytest.mark.parametrize(("precision", "new_format"), [(torch.float32, True), (torch.float16, False)])
def test_state_dict(tmp_path: Path, small: State, precision: torch.dtype, new_format: bool) -> None:
    given = {key: value.to(precision) for key, value in small.items()}
    integers = {key: torch.tensor(56) for key in NOT_WEIGHTS}
    torch.save(given | integers, tmp_path / "weights", _use_new_zipfile_serialization=new_format)
    same(read_weights(tmp_path / "weights"), given)


def test_nested_prefixed_and_custom_text_names(tmp_path: Path, small: State) -> None:
    def renamed(key: str) -> str:
        return "module." + (key if key.startswith("visual.") or key == "logit_scale" else f"text.{key}")

    given = {renamed(key): torch.nn.Parameter(value) for key, value in small.items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": given, "optimizer": {"state": {}}}, tmp_path / "weights.pt")
    found = read_weights(tmp_path / "weights.pt")
    same(found, small)
    assert not any(value.requires_grad for value in found.values())


def test_safetensors_under_any_name(tmp_path: Path, small: State) -> None:
    save_file({key: value.half() for key, value in small.items()}, tmp_path / "weights.pt", metadata={"format": "pt"})
    same(read_weights(str(tmp_path / "weights.pt")), {key: value.half() for key, value in small.items()})


@pytest.mark.parametrize("form", ["torch", "torch-old", "pickle", "torchscript"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_file_is_not_run(tmp_path: Path, small: State, form: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / "weights.pt"
    content = {**small, "evil": Payload(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=4))
    elif form == "torchscript":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("weights/constants.pkl", pickle.dumps(Payload(marker), protocol=2))
            archive.writestr("weights/data.pkl", pickle.dumps(Payload(marker), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    refused(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # check: pickle does run the payload


def test_a_flipped_bit_in_a_torchscript_archive_is_noticed(tmp_path: Path, state: State) -> None:
    path = tmp_path / "weights.pt"
    save_torchscript(state, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(path, "CRC")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_without_weights_are_refused(tmp_path: Path, small: State) -> None:
    path, rng = tmp_path / "file", random.Random(3)
    page, deep, endless = b"<!DOCTYPE html><html>log in first</html>", b"\x80\x02" + b"(l" * 10**6 + b".", 2**60
    for content in (page, deep, struct.pack("<Q", endless) + b'{"a":1}', rng.randbytes(500)):
        path.write_bytes(content)
        refused(path)
    for save in (torch.save, save_file):
        save(small, path)
        path.write_bytes(path.read_bytes()[:-5000])
        refused(path)
    for names in (["readme.txt"], ["a/code/b.py"], ["a/code/b.py", "a/data.pkl"]):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"\x80\x04\x95\2\0\0\0\0\0\0\0X\5\0\0\0ab.")  # ends inside a frame
        refused(path)
    refused(tmp_path)
    for tensors in ({}, {"fc.weight": torch.ones(2)}):
        torch.save(tensors, path)
        refused(path, "no CLIP weights")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"visual.proj": torch.ones(128, 95)}, "visual.proj"),
        ({"visual.proj": None}, "visual.proj"),
        ({"visual.proj": torch.full((128, 96), torch.nan)}, "NaN"),
        ({"visual.positional_embedding": torch.ones(10, 128)}, "56 pixels"),
    ],
)
def test_mismatched_weights_are_refused(tmp_path: Path, state: State, change: State, words: str) -> None:
    path = tmp_path / "weights.pt"
    torch.save({key: value for key, value in (state | change).items() if value is not None}, path)
    with pytest.raises(InputError, match=words) as caught:
        create_model("ViT-tiny-14-56", "openai", 42, weights=path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert create_model("ViT-tiny-14-56", "openai", 42, weights=path, vision=False).visual is None  # not read


def test_round_to_half(state: State) -> None:
    generator = torch.Generator().manual_seed(0)
    fine = {key: value + 1e-4 * torch.randn(value.shape, generator=generator) for key, value in state.items()}
    rounded = round_to_half(fine)
    assert {value.dtype for value in rounded.values()} == {torch.float32}
    kept = {key for key in fine if torch.equal(rounded[key], fine[key])}
    embeddings = {"token_embedding.weight", "positional_embedding", "visual.positional_embedding"}
    norms = {key for key in fine if ".ln_" in f".{key}"}
    assert kept == norms | embeddings | {"visual.class_embedding", "logit_scale"}
    for key in fine.keys() - kept:
        assert torch.equal(rounded[key], fine[key].half().float()), key
    same(round_to_half({key: value.half() for key, value in state.items()}), state)  # already exact, as OpenAI's
