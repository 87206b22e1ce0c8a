"""Which weights a run reads: `find_weights` answers from names, files and folders.

No tensor is read, and torch is not imported.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from utils import InputError, sha256_file

from . import hub
from .config import CONFIG_FILES, ModelConfig, list_models

CKPT_FOLDER = Path(__file__).parent / "ckpt"


@dataclass(frozen=True)
class WeightsInfo:
    """Where the weights came from: goes into every checkpoint and into the key of every stored feature."""

    pretrain: str  # openai | laion400m | laion2b | random
    source: str  # file name without its folder, `owner/name/file` from the hub, or the seed of random weights
    sha256: str  # of the file; for random weights, of the words that make them


@dataclass(frozen=True)
class Weights(WeightsInfo):
    """A model's config and its weight file, or the seed that makes random weights."""

    config: ModelConfig
    path: Path | None  # None: random
    seed: int


def find_weights(
    model_name: str | ModelConfig, pretrained: str, weights: str | Path | None = None, seed: int = 0
) -> Weights:
    """Find a model's weight file and its SHA-256, which is remembered, so that a second call reads no file.

    `model_name` is what `ModelConfig.load` takes (a folder or repository holds the weights too), or a checkpoint's
    config; `pretrained`, one of `PRETRAINS`, says which file belongs to a name of model_configs/, and `weights` is a
    file, or a folder that holds one, instead of that. `seed` is of random weights. `InputError` for an unknown model,
    for no such weights, and for a file that is missing or cannot be read.
    """
    config = model_name if isinstance(model_name, ModelConfig) else ModelConfig.load(model_name)
    if pretrained == "random":
        if weights is not None:
            raise InputError(f"--pretrain random contradicts --weights {weights}: give one of them")
        words = f"random 2, seed {seed}, {config.name}, {config.architecture()}"
        sha256 = hashlib.sha256(words.encode()).hexdigest()
        return Weights(pretrained, f"random, seed {seed}", sha256, config, None, seed)
    path, source = _locate(model_name, config, pretrained, weights)
    check_file(path, config.name, pretrained)
    try:
        return Weights(pretrained, source, sha256_file(path), config, path, seed)
    except OSError as error:
        raise InputError(f"cannot read the weight file {path}: {error.strerror}") from error


def check_file(path: Path, model_name: str = "", pretrained: str = "openai") -> None:
    """`InputError` where `path` is no file with something in it."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe or a device may never end
            raise InputError(f"the weight file {path} is a folder or a device, not a file")
        if not path.stat().st_size:
            raise InputError(f"the weight file {path} is empty: fetch it again")
    except FileNotFoundError as error:
        wanted = model_name if model_name in list_models() else "ViT-L-14-336"
        wanted += "" if pretrained == "openai" else f" --pretrain {pretrained}"
        raise InputError(
            f"there is no weight file {path}: fetch it with `python -m CLIP.download {wanted}`, "
            "pass another with --weights, or try the program without any: --pretrain random"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read the weight file {path}: {error.strerror}") from error


def _locate(
    model_name: str | ModelConfig, config: ModelConfig, pretrained: str, weights: str | Path | None
) -> tuple[Path, str]:
    """The weight file, and its name for files that others read."""
    name = config.name if isinstance(model_name, ModelConfig) else model_name
    if weights is None and name.startswith(hub.PREFIX):
        repository = name.removeprefix(hub.PREFIX)
        path = hub.fetch(repository, hub.WEIGHT_FILES)
        return path, f"{repository}/{path.name}"
    own = not isinstance(model_name, ModelConfig) and name not in list_models()  # a JSON file or folder of the user's
    if weights is not None or (own and Path(name).is_dir()):
        path = Path(name if weights is None else weights)
        path = _in_folder(path, config) if path.is_dir() else path
        return path, path.name
    if pretrained not in config.weights and pretrained not in config.hub:
        known = [*{**config.weights, **config.hub}, "random"]
        raise InputError(
            f"--pretrain {pretrained}: no such weights are known for {config.name}; "
            f"choose --pretrain {' or '.join(known)}, or give a file with --weights FILE"
        )
    folder = Path(name).parent if own else CKPT_FOLDER
    path = folder / config.weights.get(pretrained, f"{config.name}-{pretrained}")
    if not path.exists() and pretrained in config.hub:  # as CLIP.download leaves it where OpenAI cannot be reached
        repository = config.hub[pretrained]
        if (stored := hub.cached(repository, hub.WEIGHT_FILES)) is not None:
            return stored, f"{repository}/{stored.name}"
    return path, path.name


def _in_folder(folder: Path, config: ModelConfig) -> Path:
    """A folder's weight file; its config must agree, as heads and activation are in no tensor's shape."""
    if any((folder / name).is_file() for name in CONFIG_FILES):
        theirs = ModelConfig.load(str(folder)).architecture()
        for name, value in config.architecture().items():
            if theirs[name] != value and name != "image_size":
                raise InputError(
                    f"--weights {folder}: its config says {name} {theirs[name]}, but {config.name} has {value}: "
                    f"give --model_name {folder} instead"
                )
    for name in hub.WEIGHT_FILES:
        if (folder / name).exists():
            return folder / name
    raise InputError(f"the folder {folder} holds no weights: none of {', '.join(hub.WEIGHT_FILES)}")
