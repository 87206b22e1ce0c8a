"""Reading CLIP weight files: OpenAI's TorchScript archive, a state dict, safetensors. Nothing in a file is executed."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from utils import InputError

# OpenAI keeps three integers among the weights.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
# What OpenAI's files hold in float16: convolution, attention, MLP and both projections.
HALF = re.compile(
    r"visual\.(conv1\.(weight|bias)|proj)|text_projection|(visual\.)?transformer\.resblocks\.\d+\.(attn|mlp)\..+"
)
STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Weights of a CLIP model on the CPU, under OpenAI's key names, in the precision of the file.

    The content decides how the file is read, not its name: a TorchScript archive as OpenAI publishes it, a state dict
    written by torch.save (also under 'state_dict', also with 'module.' before the keys) or safetensors. open_clip's
    'text.transformer...' names become OpenAI's. Raises an InputError for everything that holds no CLIP weights.
    """
    path = Path(path)
    head = _head(path)
    try:
        content = _reader(path, head)(path)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        if name := refused_global(error):
            raise InputError(
                f"{path} holds Python objects beside tensors ({name}) and is not loaded, as reading them could run "
                "code: save only the weights with torch.save(model.state_dict(), FILE) and pass that"
            ) from error
        raise InputError(f"{path} is damaged or no weight file: fetch it again") from error
    except Exception as error:  # whatever a damaged or hostile file provokes in a parser
        raise InputError(f"{path} is damaged or no weight file ({one_line(error)}): fetch it again") from error
    return _clip_keys(content, path)


def check_state(state: dict[str, torch.Tensor], expected: dict[str, torch.Size], source: str) -> None:
    """Raise an InputError that names `source` unless `state` has every key of `expected`; more is fine.

    Each must have its shape and hold plain floating-point numbers, all of them finite.
    """
    wrong = [f"{key} {fault}" for key, shape in expected.items() if (fault := _fault(state.get(key), shape))]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(
            f"{source} does not fit the model asked for: {'; '.join(wrong[:3])}{more}: pass its own file with --weights"
        )


def one_line(words: object) -> str:
    """A text, or what an exception says, in at most 150 printable characters: it may quote a damaged file."""
    text = f"{type(words).__name__} {words}" if isinstance(words, Exception) else str(words)
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text[:1000]).split())[:150]


def refused_global(error: pickle.UnpicklingError) -> str:
    """What a file wanted to import when torch.load(weights_only=True) stopped, "" where it stopped for another reason.

    Releases of torch differ in what they let through: 2.15 no longer knows nested tensors.
    """
    found = re.search(r"GLOBAL (\S+)", str(error))
    return one_line(found[1]) if found else ""


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is numbers in memory, one for each element: not sparse, quantised, nested, meta or expanded."""
    return (
        tensor.layout is torch.strided
        and (tensor.dtype.itemsize > 1 or not tensor.is_floating_point())  # arithmetic knows no 8 bit floats
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta or tensor.is_complex())
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def check_archive(path: Path) -> None:
    """`InputError` where a zip file unpacks to far more than its size: weights are stored as they are, not packed."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > 2 * path.stat().st_size + 2**26:  # TorchScript packs its code, a few MB
        raise InputError(f"{path} would unpack to {unpacked:,} bytes and is not read: no weight file does that")


def stored_as_half(key: str) -> bool:
    """Whether OpenAI's files hold the tensor `key` in float16 (layer norms, embeddings and the scale are float32)."""
    return HALF.fullmatch(key) is not None


def round_to_half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` in float32, what OpenAI stores in float16 rounded to that first: the published code's loading step.

    It changes nothing in OpenAI's own files; weights of a finer precision lose some of it.
    """
    return {key: (value.half() if stored_as_half(key) else value).float() for key, value in state.items()}


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _head(path: Path) -> bytes:
    """Read the first nine bytes; an InputError when there is no file or nothing in it."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe or a device may never end
            raise InputError(f"the weight file {path} is a folder or a device, not a file")
        with path.open("rb") as file:
            head = file.read(9)
    except FileNotFoundError as error:
        raise InputError(
            f"there is no weight file {path}: fetch it with `python -m CLIP.download ViT-L-14-336`, "
            "pass another with --weights, or try the program without any: --pretrain random"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read the weight file {path}: {error.strerror}") from error
    if not head:
        raise InputError(f"the weight file {path} is empty: fetch it again")
    return head


def _reader(path: Path, head: bytes) -> Callable[[Path], Any]:
    """Choose the function that reads `path`, by its content."""
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise InputError(f"{path} ends too early (a copy or download that stopped?): fetch it again")
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            scripted = any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
        return _read_torchscript if scripted else _read_archive
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") < 10**8:  # the length of a JSON header
        return load_file
    return _read_old_pickle


def _read_archive(path: Path) -> Any:  # noqa: ANN401 (whatever the file holds)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _read_old_pickle(path: Path) -> Any:  # noqa: ANN401 (whatever the file holds)
    return torch.load(path, map_location="cpu", weights_only=True)  # older than 2020: cannot be mapped


def _read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a TorchScript module tree under its dotted name, without loading or running the script."""
    with zipfile.ZipFile(path) as archive:
        return dict(_walk(_TorchScriptUnpickler(archive).load(), set()))


class _Inert:
    """Stands for every class and function that an archive names, so none of them is imported or called."""

    members: dict[str, Any]

    def __new__(cls, *_: object) -> _Inert:  # not __init__, which unpickling leaves out
        inert = super().__new__(cls)
        inert.members = {}
        return inert

    def __setstate__(self, state: object) -> None:
        self.members = state if isinstance(state, dict) else {}


class _TorchScriptUnpickler(pickle._Unpickler):  # the one in Python: the one in C fills 32 GiB for a hostile index
    """Reads `data.pkl`, where a module is an object whose state maps names to tensors and modules."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        pickled = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
        self.folder = pickled.removesuffix(".pkl")
        self.storages: dict[str, torch.Tensor] = {}
        super().__init__(io.BytesIO(archive.read(pickled)))

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 (a class, a function or a dtype)
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        return _Inert

    def persistent_load(self, pid: tuple[str, torch.dtype, str, str, int]) -> torch.Tensor:
        _, dtype, key, _, _ = pid
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.folder}/{key}"))  # checks the CRC
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _rebuild(
    storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> torch.Tensor:
    return storage.as_strided(size, stride, offset)


def _walk(module: _Inert, seen: set[int], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    seen.add(id(module))  # a hostile tree of shared modules has more paths than time
    for name, member in module.members.items():
        if isinstance(member, torch.Tensor):
            yield prefix + name, member
        elif isinstance(member, _Inert) and id(member) not in seen:
            yield from _walk(member, seen, f"{prefix}{name}.")


def _clip_keys(content: object, path: Path) -> dict[str, torch.Tensor]:
    """Keep the tensors of a state dict, under OpenAI's names; an InputError when they are not CLIP's."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    entries = content.items() if isinstance(content, dict) else ()
    state = {
        key.removeprefix("module.").removeprefix("text."): value.detach()
        for key, value in entries
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }
    if "visual.conv1.weight" not in state:
        raise InputError(
            f"{path} holds no CLIP weights (no visual.conv1.weight among its {len(state)} tensors): "
            "pass OpenAI's or open_clip's file of the whole model"
        )
    return {key: value for key, value in state.items() if key not in NOT_WEIGHTS}


def _fault(value: torch.Tensor | None, shape: torch.Size) -> str:
    """What is wrong with a weight, "" for nothing."""
    if value is None:
        return "is missing"
    if not is_plain(value) or not value.is_floating_point():
        return f"is no plain tensor of 16 to 64 bit floating-point numbers ({value.dtype})"
    if value.shape != shape:
        return f"is {_shape(value.shape)}, expected {_shape(shape)}"
    return "" if torch.isfinite(value).all() else "holds NaN or infinite numbers"


def _shape(shape: torch.Size) -> str:
    return f"({','.join(map(str, shape))})"
