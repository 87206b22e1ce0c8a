"""CLIP's weights: finding the file for a run (`find_weights`), and reading it in any form (`read_weights`).

The forms are OpenAI's TorchScript archive, a state dict of torch.save, and safetensors. The names of open_clip and
Hugging Face are converted to OpenAI's. Nothing in a file is executed.
"""

import hashlib
import io
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from utils import EXPECTED, InputError, blame, sha256_file

from .config import CKPT_FOLDER, CONFIG_FILES, HUB, ModelConfig, fetch, file_in, list_models
from .dinov2 import with_tower

WEIGHT_FILES = (  # in a folder or on the hub
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "model.safetensors", "pytorch_model.bin",
)  # fmt: skip
Loader = Callable[[], torch.Tensor]  # reads one tensor of a file

NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # three integers in OpenAI's files
# Keys that identify the naming scheme of a file: OpenAI's, Hugging Face's, DINOv2's.
ANCHORS = ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight", "layernorm.weight")
# Replacements, in this order, that convert names of Hugging Face's CLIPModel and Dinov2Model, and of open_clip's
# CustomTextCLIP, to OpenAI's. What follows a `/` says what to do with the tensor: q, k and v are stacked, `t` is
# transposed, `s` is squeezed, `-` is skipped.
NAMES = {
    r"^(embeddings|encoder|layernorm)\.": r"visual.\1.",
    r"^text\.|^text_model\.": "",
    r"^vision_model\.": "visual.",
    r"position_ids$": "position_ids/-",
    r"embeddings\.cls_token": "class_embedding/s",
    r"embeddings\.register_tokens": "registers/s",
    r"embeddings\.position_embeddings": "positional_embedding/s",
    r"embeddings\.position_embedding\.weight": "positional_embedding",
    r"embeddings\.patch_embedding(s\.projection)?\.": "conv1.",
    r"embeddings\.": "",
    r"pre_layrnorm\.": "ln_pre.",  # Hugging Face's spelling
    r"(post_)?layernorm\.": "ln_post.",
    r"final_layer_norm\.": "ln_final.",
    r"encoder\.layers?\.": "transformer.resblocks.",
    r"\.(layer_)?norm([12])": r".ln_\2",
    r"\.layer_scale([12])\.lambda1": r".ls_\1",
    r"mlp\.(fc1|weights_in)\.": "mlp.c_fc.",
    r"mlp\.(fc2|weights_out)\.": "mlp.c_proj.",
    r"(self_attn|attention\.attention)\.([qkv])[a-z_]+\.(.*)": r"attn.in_proj_\3/\2",
    r"self_attn\.": "attn.",
    r"attention\.output\.dense\.": "attn.out_proj.",
    r"^text_projection\.weight": "text_projection/t",
    r"^visual_projection\.weight": "visual.proj/t",
}
# Tensors in float16 in OpenAI's files: convolution, attention, MLP and both projections; the rest is float32.
HALF = re.compile(
    r"visual\.(conv1\.(weight|bias)|proj)|text_projection|(visual\.)?transformer\.resblocks\.\d+\.(attn|mlp)\..+"
)
STORAGES = {
    "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64, "IntStorage": torch.int32, "LongStorage": torch.int64,
}  # fmt: skip
# Errors that a damaged file causes in the parsers of archives, pickles and safetensors.
DAMAGE = (
    *EXPECTED, RuntimeError, AttributeError, TypeError, StopIteration, zipfile.BadZipFile, SafetensorError,
    pickle.UnpicklingError,
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """The origin of weights, or the seed of random ones; stored in checkpoints, part of the keys of stored tokens."""

    pretrain: str  # openai | laion400m | laion2b | random
    source: str  # file name without its folder, `owner/name/file` from the hub, or the seed of random weights
    sha256: str  # of the file, or of a text that describes random weights; with `tower`, of both hashes
    config: ModelConfig
    path: Path | None  # None: random
    seed: int
    tower: Path | None = None  # the file of an image tower that replaces the model's own


def find_weights(
    model_name: str | ModelConfig,
    pretrained: str,
    weights: str | Path | None = None,
    seed: int = 0,
    image_tower: str | None = None,
) -> Weights:
    """Find a model's weight file and its SHA-256.

    `model_name` is what `ModelConfig.load` takes (a folder or repository holds the weights, too), or a checkpoint's
    config. `pretrained`, one of `PRETRAINS`, selects the file for a name of model_configs/; `weights`, a file or a
    folder that holds one, replaces that file. `seed` is for random weights. `image_tower` is a DINOv2 that replaces the
    model's image tower (`dinov2.find_tower`). Raises `InputError` for an unknown model, for unknown weights, and for a
    file that is missing or cannot be read.
    """
    config = model_name if isinstance(model_name, ModelConfig) else ModelConfig.load(model_name)
    config, tower = with_tower(config, image_tower)
    if pretrained == "random":
        if weights is not None:
            raise InputError(f"--pretrain random contradicts --weights {weights}: give one of them")
        words = f"random 2, seed {seed}, {config.name}, {config.architecture()}"
        sha256 = hashlib.sha256(words.encode()).hexdigest()
        result = Weights(pretrained, f"random, seed {seed}", sha256, config, None, seed)
    else:
        path, source = _locate(model_name, config, pretrained, weights)
        hint = "name its file with --weights"
        if config.name in list_models():
            hint = f"fetch it with `python -m CLIP.download {config.name} --pretrain {pretrained}`, or {hint}"
        with blame(f"weights {path}", hint):
            if not path.is_file() and path.exists():  # reading a pipe or a device may never end
                raise InputError(f"the weight file {path} is a folder or a device, not a file")
            result = Weights(pretrained, source, sha256_file(path), config, path, seed)
    if tower is None:
        return result
    both = hashlib.sha256(f"{result.sha256} {sha256_file(tower)}".encode()).hexdigest()
    return replace(result, source=f"{result.source}; image tower {config.tower.name}", sha256=both, tower=tower)


def _locate(
    model_name: str | ModelConfig, config: ModelConfig, pretrained: str, weights: str | Path | None
) -> tuple[Path, str]:
    """The path of the weight file, and its name without local folders, for files that others read."""
    name = config.name if isinstance(model_name, ModelConfig) else model_name
    if weights is None and name.startswith(HUB):
        path = fetch(name.removeprefix(HUB), WEIGHT_FILES)
        return path, f"{name.removeprefix(HUB)}/{path.name}"
    own = not isinstance(model_name, ModelConfig) and name not in list_models()  # a JSON file or folder of the user's
    if weights is not None or (own and Path(name).is_dir()):
        path = Path(name if weights is None else weights)
        path = _in_folder(path, config) if path.is_dir() else path
    elif pretrained in (known := config.files()):
        path = (Path(name).parent if own else CKPT_FOLDER) / known[pretrained]
    else:
        # A checkpoint's model has its weights in the user's own folder.
        others = f"choose --pretrain {' or '.join([*known, 'random'])}, or " * (not isinstance(model_name, ModelConfig))
        fault = f"--pretrain {pretrained}: no such weights are known for {config.name}"
        raise InputError(f"{fault}; {others}give a file or folder with --weights")
    return path, path.name


def _in_folder(folder: Path, config: ModelConfig) -> Path:
    """A folder's weight file; its config must agree, as the shapes of tensors do not show heads and activation."""
    if any((folder / name).is_file() for name in CONFIG_FILES):
        theirs = ModelConfig.load(str(folder)).architecture()
        for name, value in config.architecture().items():
            of_text = not config.tower.name or name.startswith("text_")
            if of_text and theirs[name] != value and name != "image_size":
                raise InputError(
                    f"--weights {folder}: its config says {name} {theirs[name]}, but {config.name} has {value}: "
                    f"give --model_name {folder} instead"
                )
    return file_in(folder, WEIGHT_FILES, f"the folder {folder}")


# --- reading ---


def read_weights(path: str | Path, vision: bool = True) -> dict[str, torch.Tensor]:
    """Read the weights of a CLIP model, or of DINOv2, on the CPU, with OpenAI's names, in the precision of the file.

    The file's content, not its name, shows its form: a TorchScript archive as OpenAI publishes it, a state dict written
    by torch.save (also under 'state_dict') or safetensors. If `vision` is False, the image tower's bytes are not read
    (except from a pickle of torch before 1.6). Raises `InputError` if the file is damaged or holds no CLIP weights.
    """
    path = Path(path)
    with blame(f"{path} is damaged or no weight file", "fetch it again", DAMAGE), ExitStack() as files:
        loaders = openai_names(_tensors(path, files), path)
        return {key: load().detach() for key, load in loaders.items() if vision or not key.startswith("visual.")}


def _tensors(path: Path, files: ExitStack) -> dict[str, Loader]:
    """A loader for each tensor in a file, by name; `files` keeps the file open."""
    with path.open("rb") as file:
        head = file.read(9)
    zipped = head.startswith(b"PK")
    if zipped:
        archive = files.enter_context(zipfile.ZipFile(path))
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist()):
            return dict(_walk(_TorchScriptUnpickler(archive).load(), set()))
    elif head[8:] == b"{" and int.from_bytes(head[:8], "little") < 10**8:  # the length of a JSON header
        tensors = files.enter_context(safe_open(path, framework="pt", device="cpu"))
        return {key: partial(tensors.get_tensor, key) for key in tensors.keys()}  # noqa: SIM118 - no mapping
    content = read_pickle(path, str(path), mmap=zipped)
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {key: value.detach for key, value in content.items() if isinstance(value, torch.Tensor)}


def read_pickle(path: Path, what: str, mmap: bool = False) -> Any:  # noqa: ANN401 - any saved object
    """Load a file of torch.save on the CPU without running its code; raises `InputError`, which begins with `what`."""
    with blame(f"{what}: damaged, or not a file of tensors", errors=DAMAGE):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:  # its text is long, and suggests running the file's code
            raise InputError(
                f"{what}: not a file of tensors, or it also holds Python objects, and reading these could run "
                "code: fetch it again, or save only the weights with torch.save(model.state_dict(), FILE)"
            ) from error


class _Inert:
    """Replaces every class and function that an archive names, so that none of them is imported or called."""

    members: Mapping[str, Any] = {}

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.members = state


class _TorchScriptUnpickler(pickle._Unpickler):  # in Python: the one in C fills 32 GiB for a hostile index
    """Reads `data.pkl`, in which a module is an object whose state maps names to tensors and modules."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        pickled = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
        self.folder = pickled.removesuffix(".pkl")
        super().__init__(io.BytesIO(archive.read(pickled)))

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 (a class, a function or a dtype)
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        return STORAGES.get(name, _Inert) if module == "torch" else _Inert

    def persistent_load(self, pid: tuple[str, torch.dtype, str, str, int]) -> Loader:
        _, dtype, key, *_ = pid
        return lambda: torch.frombuffer(bytearray(self.archive.read(f"{self.folder}/{key}")), dtype=dtype)


def _rebuild_tensor(storage: Loader, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Loader:
    """Replaces `_rebuild_tensor_v2`: a loader that reads the tensor from the archive when it is called."""
    return lambda: storage().as_strided(size, stride, offset)


def _walk(module: _Inert, seen: set[int], prefix: str = "") -> Iterator[tuple[str, Loader]]:
    seen.add(id(module))  # visit each module once: a hostile tree of shared modules has too many paths
    for name, member in module.members.items():
        if isinstance(member, FunctionType):
            yield prefix + name, member
        elif isinstance(member, _Inert) and id(member) not in seen:
            yield from _walk(member, seen, f"{prefix}{name}.")


# --- names ---


def openai_names(loaders: Mapping[str, Loader], path: Path) -> dict[str, Loader]:
    """Convert a CLIP's open_clip or Hugging Face names to OpenAI's, and drop a common prefix.

    Raises `InputError` if there are no CLIP weights.
    """
    # The prefix of an anchor (`module.`, `model.`) is the prefix of all names.
    prefixes = [key.removesuffix(name) for key in loaders for name in ANCHORS if f".{key}".endswith(f".{name}")]
    if not prefixes:
        raise InputError(
            f"{path} holds no CLIP weights (no {' or '.join(ANCHORS)} among its {len(loaders)} tensors): "
            "pass OpenAI's, open_clip's or Hugging Face's file of the whole model"
        )
    prefix, parts = min(prefixes, key=len), dict[str, dict[str, Loader]]()
    for key, load in loaders.items():
        name = key.removeprefix(prefix)
        for pattern, ours in NAMES.items():
            name = re.sub(pattern, ours, name)
        name, _, part = name.partition("/")
        if part != "-" and name not in NOT_WEIGHTS:
            parts.setdefault(name, {})[part] = load
    return {name: partial(_join_parts, name, pieces) for name, pieces in parts.items()}


def _join_parts(name: str, parts: Mapping[str, Loader]) -> torch.Tensor:
    if "" in parts:
        return parts[""]()
    if "t" in parts:
        return parts["t"]().t().contiguous()
    if "s" in parts:
        return parts["s"]().squeeze()
    if missing := [letter for letter in "qkv" if letter not in parts]:
        raise ValueError(f"{name} lacks its part {missing[0]}")
    return torch.cat([parts[letter]() for letter in "qkv"])


def round_to_half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` in float32; what OpenAI stores in float16 is first rounded to it, as in the published code."""
    return {key: (value.half() if HALF.fullmatch(key) else value).float() for key, value in state.items()}
