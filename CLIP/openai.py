"""Reading CLIP weight files: OpenAI's TorchScript archive, a state dict, safetensors. Nothing in a file is executed.

OpenAI's, open_clip's and Hugging Face's names become OpenAI's; other families are named.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from safetensors import safe_open

from utils import InputError, one_line

from .config import refused
from .weights import check_file

Loader = Callable[[], torch.Tensor]  # reads one tensor of a file

NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # three integers in OpenAI's files
OPENAI_ANCHOR = "visual.conv1.weight"
HF_ANCHOR = "vision_model.embeddings.patch_embedding.weight"
# Hugging Face's words and OpenAI's, replaced in this order.
HUGGING_FACE = {
    "text_model.": "",
    "vision_model.": "visual.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding.": "conv1.",
    "embeddings.": "",
    "pre_layrnorm.": "ln_pre.",  # their spelling
    "post_layernorm.": "ln_post.",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm": "ln_",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.q_proj.": "attn.in_proj_",  # with k and v
    "self_attn.": "attn.",
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
}
# What a key of another family looks like, the telling ones first.
FAMILIES = {
    r"logit_bias$|vision_model\.head\.|visual\.trunk\.attn_pool\.": "a SigLIP model",
    r"word_embeddings|attention\.self\.query|bert": "a BERT text tower",
    r"text_decoder\.|visual\.attn_pool": "a CoCa model",
    r"visual\.(trunk\.)?(layer1|attnpool|stages)\.": "a ResNet image tower",
    r"visual\.trunk\.": "a timm image tower",
    r"visual\.blocks\.": "an EVA image tower",
}
# What OpenAI's files hold in float16: convolution, attention, MLP and both projections.
HALF = re.compile(
    r"visual\.(conv1\.(weight|bias)|proj)|text_projection|(visual\.)?transformer\.resblocks\.\d+\.(attn|mlp)\..+"
)
STORAGES = {
    "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64, "BoolStorage": torch.bool, "ByteStorage": torch.uint8, "CharStorage": torch.int8,
    "ShortStorage": torch.int16, "IntStorage": torch.int32, "LongStorage": torch.int64,
}  # fmt: skip


def read_weights(path: str | Path, vision: bool = True) -> dict[str, torch.Tensor]:
    """Weights of a CLIP model on the CPU, under OpenAI's key names, in the precision of the file.

    The content decides how the file is read, not its name: a TorchScript archive as OpenAI publishes it, a state dict
    written by torch.save (also under 'state_dict') or safetensors. Without `vision` the image tower's bytes stay unread
    (a pickle of torch before 1.6 apart). `InputError` for what holds no CLIP weights; another family is named.
    """
    path = Path(path)
    check_file(path)
    try:
        with ExitStack() as files:
            loaders = openai_names(_tensors(path, files), path)
            return {key: load().detach() for key, load in loaders.items() if vision or not key.startswith("visual.")}
    except InputError:
        raise
    except Exception as error:  # whatever a damaged or hostile file provokes in a parser
        if name := refused_global(error):
            raise InputError(
                f"{path} holds Python objects beside tensors ({name}) and is not loaded, as reading them could run "
                "code: save only the weights with torch.save(model.state_dict(), FILE) and pass that"
            ) from error
        reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({one_line(error)})"  # torch's own is a page
        raise InputError(f"{path} is damaged or no weight file{reason}: fetch it again") from error


def check_state(state: dict[str, torch.Tensor], expected: dict[str, torch.Size], source: str) -> None:
    """`InputError` that names `source` unless `state` has every key of `expected`, more is fine, as finite numbers."""
    wrong = [f"{key} {fault}" for key, shape in expected.items() if (fault := _fault(state.get(key), shape))]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        faults = f"{'; '.join(wrong[:3])}{more}"
        raise InputError(f"{source} does not fit the model asked for: {faults}: pass its own file with --weights")


def _fault(value: torch.Tensor | None, shape: torch.Size) -> str:
    """What is wrong with a weight, "" for nothing."""
    if value is None:
        return "is missing"
    if not is_plain(value) or not value.is_floating_point():
        return f"is no plain tensor of 16 to 64 bit floating-point numbers ({value.dtype})"
    if value.shape != shape:
        own, other = (f"({','.join(map(str, sizes))})" for sizes in (value.shape, shape))
        return f"is {own}, expected {other}"
    return "" if torch.isfinite(value).all() else "holds NaN or infinite numbers"


def refused_global(error: Exception) -> str:
    """What a file wanted to import when torch.load(weights_only=True) stopped, "" where it stopped for another reason.

    Releases of torch differ in what they let through: 2.15 no longer knows nested tensors.
    """
    match = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return one_line(match[1]) if match else ""


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
    """`state` in float32, what OpenAI stores in float16 rounded to that first: the published code's loading step."""
    return {key: (value.half() if stored_as_half(key) else value).float() for key, value in state.items()}


def _tensors(path: Path, files: ExitStack) -> dict[str, Loader]:
    """What reads each tensor of a file, by name; `files` keeps the file open."""
    with path.open("rb") as file:
        head = file.read(9)
    zipped = head.startswith(b"PK")
    if zipped:
        if not zipfile.is_zipfile(path):
            raise InputError(f"{path} ends too early (a copy or download that stopped?): fetch it again")
        check_archive(path)
        archive = files.enter_context(zipfile.ZipFile(path))
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist()):
            return dict(_walk(_TorchScriptUnpickler(archive).load(), set()))
    elif head[8:] == b"{" and int.from_bytes(head[:8], "little") < 10**8:  # the length of a JSON header
        tensors = files.enter_context(safe_open(path, framework="pt", device="cpu"))
        return {key: partial(tensors.get_tensor, key) for key in tensors.keys()}  # noqa: SIM118 - no mapping
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    entries = content.items() if isinstance(content, dict) else ()
    return {key: value.detach for key, value in entries if isinstance(key, str) and isinstance(value, torch.Tensor)}


class _Inert:
    """Stands for every class and function that an archive names, so none of them is imported or called."""

    members: Mapping[str, Any] = {}

    def __init__(self, *_: object) -> None: ...

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
            return _stored
        return STORAGES.get(name, _Inert) if module == "torch" else _Inert

    def persistent_load(self, pid: tuple[str, torch.dtype, str, str, int]) -> Loader:
        return partial(self.read_storage, key=pid[2], dtype=pid[1])

    def read_storage(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        """The numbers stored under `key`, read once."""
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.folder}/{key}"))  # checks the CRC
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _stored(storage: Loader, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Loader:
    """Stands for `_rebuild_tensor_v2`: a tensor of an archive, whose storage is read when it is called."""
    return lambda: storage().as_strided(size, stride, offset)


def _walk(module: _Inert, seen: set[int], prefix: str = "") -> Iterator[tuple[str, Loader]]:
    seen.add(id(module))  # a hostile tree of shared modules has more paths than time
    for name, member in module.members.items():
        if isinstance(member, FunctionType):
            yield prefix + name, member
        elif isinstance(member, _Inert) and id(member) not in seen:
            yield from _walk(member, seen, f"{prefix}{name}.")


# --- names ---


def openai_names(loaders: Mapping[str, Loader], path: Path) -> dict[str, Loader]:
    """A CLIP's tensors under OpenAI's names; open_clip's and Hugging Face's become these, a common prefix is dropped.

    `InputError` for no CLIP weights, and for a tower of another family, which is named.
    """
    for pattern, kind in FAMILIES.items():
        if any(re.search(pattern, key) for key in loaders):
            raise refused(kind, path)
    anchors = [
        (key.removesuffix(anchor), anchor)  # what stands before it (`module.`, `model.`) stands before all names
        for key in loaders
        for anchor in (OPENAI_ANCHOR, HF_ANCHOR)
        if f".{key}".endswith(f".{anchor}")
    ]
    if not anchors:
        raise InputError(
            f"{path} holds no CLIP weights (no {OPENAI_ANCHOR} or {HF_ANCHOR} among its {len(loaders)} tensors): "
            "pass OpenAI's, open_clip's or Hugging Face's file of the whole model"
        )
    prefix, anchor = min(anchors, key=lambda hit: len(hit[0]))
    named = {key.removeprefix(prefix): load for key, load in loaders.items()}
    if anchor == HF_ANCHOR:
        return _from_hugging_face(named, path)
    named = {key.removeprefix("text."): load for key, load in named.items()}  # of open_clip's CustomTextCLIP
    return {key: load for key, load in named.items() if key not in NOT_WEIGHTS}


def _from_hugging_face(loaders: Mapping[str, Loader], path: Path) -> dict[str, Loader]:
    result: dict[str, Loader] = {}
    for key, load in loaders.items():
        name = key
        for theirs, ours in HUGGING_FACE.items():
            name = name.replace(theirs, ours)
        if ".q_proj." in key:
            parts = [key.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
            if missing := [part for part in parts if part not in loaders]:
                raise InputError(f"{path}: {missing[0]} is missing: fetch the file again")
            result[name] = partial(_joined, [loaders[part] for part in parts])
        elif not re.search(r"\.[kv]_proj\.|position_ids$", key):
            result[name] = partial(_transposed, load) if key.endswith("_projection.weight") else load
    return result


def _transposed(load: Loader) -> torch.Tensor:
    return load().t().contiguous()


def _joined(loads: list[Loader]) -> torch.Tensor:
    return torch.cat([load() for load in loads])
