"""Weight files: every format comes back as the same tensors, and everything else as one clear line."""

from __future__ import annotations

import json
import os
import pickle
import random
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from CLIP.openai import NOT_WEIGHTS, check_state, read_weights, round_to_half, stored_as_half
from tests.conftest import tiny_state
from tests.helpers.weights import save_torchscript
from utils import InputError

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """Weights of the tiny model without the three integers; float32, exact in float16."""
    return {key: value for key, value in tiny_state().items() if key not in NOT_WEIGHTS}


@pytest.fixture(scope="module")
def small(state: State) -> State:
    """Leave out the 25 MB token embedding, for the tests that write many files."""
    return {key: value for key, value in state.items() if key != "token_embedding.weight"}


def same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def one_line(path: Path, match: str) -> str:
    """Read a file that is none; return the InputError, which must name it and be one line."""
    with pytest.raises(InputError, match=match) as caught:
        read_weights(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


class Payload:
    """Creates a folder when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_torchscript(tmp_path: Path, state: State) -> None:
    save_torchscript(tiny_state(), tmp_path / "weights.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # reading says nothing of TorchScript's end
        found = read_weights(tmp_path / "weights.bin")
    same(found, {key: value.half() if stored_as_half(key) else value for key, value in state.items()})


def test_torchscript_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        """What OpenAI's archive has none of: views, sharing, an empty tensor, other types, plain attributes."""

        def __init__(self) -> None:
            super().__init__()
            self.visual = torch.nn.Sequential()
            self.visual.add_module("conv1", torch.nn.Conv2d(3, 4, 2).bfloat16())
            self.shared = self.visual.conv1.weight
            self.view = torch.nn.Parameter(torch.arange(10.0)[3:7])
            self.empty = torch.nn.Parameter(torch.zeros(0, 4))
            self.norm = torch.nn.BatchNorm1d(3)
            self.register_buffer("turned", torch.arange(6, dtype=torch.int16).reshape(2, 3).t())
            self.attributes = ([1, 2], ["a"], {"x": 1.5}, torch.device("cpu"))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x)

    path = tmp_path / "odd.pt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.* is deprecated")
        torch.jit.save(torch.jit.script(Odd().double().eval()), str(path))
        same(read_weights(path), torch.jit.load(str(path)).state_dict())


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_state_dict(tmp_path: Path, state: State, precision: torch.dtype, new_format: bool) -> None:
    given = {key: value.to(precision) for key, value in state.items()}
    torch.save(given, tmp_path / "weights", _use_new_zipfile_serialization=new_format)
    same(read_weights(tmp_path / "weights"), given)


def test_nested_prefixed_and_custom_text_names(tmp_path: Path, small: State) -> None:
    def renamed(key: str) -> str:
        return "module." + (key if key.startswith("visual.") or key == "logit_scale" else f"text.{key}")

    given = {renamed(key): torch.nn.Parameter(value) for key, value in small.items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": given, "optimizer": {"state": {}}}, tmp_path / "weights.pt")
    found = read_weights(tmp_path / "weights.pt")
    same(found, small)
    assert not any(value.requires_grad for value in found.values())


def test_the_three_integers_are_dropped(tmp_path: Path, small: State) -> None:
    torch.save(small | {key: torch.tensor(56) for key in NOT_WEIGHTS}, tmp_path / "weights.pt")
    same(read_weights(tmp_path / "weights.pt"), small)


def test_safetensors_under_any_name(tmp_path: Path, small: State) -> None:
    save_file({key: value.half() for key, value in small.items()}, tmp_path / "weights.pt", metadata={"format": "pt"})
    same(read_weights(str(tmp_path / "weights.pt")), {key: value.half() for key, value in small.items()})


@pytest.mark.parametrize("form", ["torch", "torch-old", "pickle-2", "pickle-4", "torchscript"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_file_is_not_run(tmp_path: Path, small: State, form: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / "weights.pt"
    content = {**small, "evil": Payload(marker)}
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps({"evil": Payload(marker)}, protocol=int(form[-1])))
    elif form == "torchscript":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("weights/constants.pkl", pickle.dumps(Payload(marker), protocol=2))
            archive.writestr("weights/data.pkl", pickle.dumps(Payload(marker), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    text = one_line(path, "weight")
    assert not marker.exists()
    if form in ("torch", "torch-old", "pickle-2"):
        assert "could run code" in text
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # the payload does run where it is let


@pytest.mark.parametrize("form", ["torchscript", "torch", "torch-old", "safetensors"])
def test_truncated(tmp_path: Path, state: State, small: State, form: str) -> None:
    path = tmp_path / "weights.pt"
    if form == "torchscript":
        save_torchscript(state, path)
    elif form == "safetensors":
        save_file(small, path)
    else:
        torch.save(small, path, _use_new_zipfile_serialization=form == "torch")
    whole = path.read_bytes()
    for length in (1, 2, 5, 9, 100, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        one_line(path, "fetch it again")


def test_a_flipped_bit_in_a_torchscript_archive_is_noticed(tmp_path: Path, state: State) -> None:
    path = tmp_path / "weights.pt"
    save_torchscript(state, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    one_line(path, "CRC.*fetch it again")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_random_bytes(tmp_path: Path) -> None:
    rng = random.Random(3)
    for _ in range(60):
        path = tmp_path / "noise"
        path.write_bytes(rng.randbytes(rng.randint(1, 3000)))
        one_line(path, "weight")


def test_what_is_no_file_of_weights(tmp_path: Path) -> None:
    empty, page, other = tmp_path / "empty", tmp_path / "page", tmp_path / "other.zip"
    empty.touch()
    page.write_text("<!DOCTYPE html><html>log in first</html>")
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "hello")
    one_line(empty, "is empty")
    one_line(page, "no weight file")
    one_line(other, "no weight file")
    one_line(tmp_path, "a folder")
    text = one_line(tmp_path / "missing.pt", "there is no weight file")
    assert "python -m CLIP.download ViT-L-14-336" in text
    assert "--pretrain random" in text


@pytest.mark.parametrize(
    "content", [torch.ones(3), {}, [torch.ones(1)], {"fc.weight": torch.ones(2)}, {"state_dict": 1}]
)
def test_tensors_that_are_not_clip(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "weights.pt")
    one_line(tmp_path / "weights.pt", "holds no CLIP weights")


def test_safetensors_header_that_promises_too_much(tmp_path: Path) -> None:
    header = json.dumps({"visual.conv1.weight": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 324]}}).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    one_line(path, "fetch it again")


def test_check_state(small: State) -> None:
    expected = {key: value.shape for key, value in small.items()}
    check_state(small | {"extra": torch.ones(1)}, expected, "FILE")
    wrong = expected | {"visual.conv1.weight": torch.Size((1024, 3, 14, 14)), "new": torch.Size(())}
    with pytest.raises(InputError) as caught:
        check_state(small, wrong, "FILE (ViT-L-14-336)")
    assert str(caught.value) == (
        "FILE (ViT-L-14-336) does not fit the model asked for: visual.conv1.weight is (128,3,14,14), expected "
        "(1024,3,14,14); new is missing: pass its own file with --weights"
    )
    with pytest.raises(InputError, match=rf"and {len(expected) - 3} more"):
        check_state({}, expected, "FILE")


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
    same(round_to_half(state), state)  # exact in float16 already, as OpenAI's are
    same(round_to_half({key: value.half() for key, value in state.items()}), state)
