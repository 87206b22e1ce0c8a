"""The config of a CLIP (sizes, activation, pixel mean and std) from a name, JSON file, folder or the Hugging Face hub.

Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from utils import EXPECTED, InputError, Unreachable, blame, one_line, read_json, sha256_file

CONFIG_FOLDER = Path(__file__).parent / "model_configs"
CKPT_FOLDER = Path(__file__).parent / "ckpt"
PRETRAINS = ("openai", "laion400m", "laion2b", "random")
FIDELITIES = ("released", "corrected")
ADAPTER_KINDS = ("MFCFC", "MCNNFC", "MViTFC")
# OpenAI's CLIP was trained with these (`corrected` fidelity); the published MadCLIP code leaves images in [0, 1].
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
CONFIG_FILES = ("open_clip_config.json", "config.json")  # in a folder or on the hub
PIXEL_FILES = ("preprocessor_config.json", "processor_config.json")  # beside Hugging Face's config.json: mean and std
VOCABULARY, PROMPT_LENGTH = 49408, 77  # of CLIP's tokenizer and of the prompts
MAX_SIZE, MAX_LAYERS = 2**17, 256  # limits on the numbers in a config: a hostile one must not exhaust the memory
HUB = "hf-hub:"
CONFIG_ERRORS = (*EXPECTED, TypeError, AttributeError, ZeroDivisionError)  # raised for values of a wrong type

# The sizes of a tower: the name in this project and open_clip -> Hugging Face's name, and the default of its
# CLIPConfig, whose files omit values that equal the default.
TOWERS = {
    "vision": {
        "image_size": ("image_size", 224), "patch_size": ("patch_size", 32), "width": ("hidden_size", 768),
        "layers": ("num_hidden_layers", 12), "heads": ("num_attention_heads", 12),
        "mlp_ratio": ("intermediate_size", 3072),
    },
    "text": {
        "context_length": ("max_position_embeddings", 77), "vocab_size": ("vocab_size", 49408),
        "width": ("hidden_size", 512), "layers": ("num_hidden_layers", 12), "heads": ("num_attention_heads", 8),
        "mlp_ratio": ("intermediate_size", 2048),
    },
}  # fmt: skip
# Entries of open_clip's configs that have no effect here; all others must be absent or false, or as in `IGNORED`.
HARMLESS = {"patch_dropout", "output_tokens", "name", "hub", "urls", "weights", "custom_text", "init_logit_scale"}
IGNORED = {"pool_type": ("tok", "argmax"), "proj_type": ("linear",), "act_layer": ("gelu",)}


def _field(part: str, size: str) -> str:
    """The field of `ModelConfig` that holds a size of the `vision` or the `text` tower."""
    return f"text_{size}" if part == "text" and size in TOWERS["vision"] else size


@dataclass(frozen=True)
class ImageTower:
    """The architecture of an image tower besides its sizes; the defaults are CLIP's, CLIP/dinov2.py sets DINOv2's."""

    name: str = ""  # of a tower that replaces the model's own; else empty
    own_image_size: int = 0  # the image size of the model's own tower, if it is replaced
    patch_bias: bool = False
    layer_scale: bool = False
    pre_norm: bool = True  # a layer norm before the blocks
    norm_eps: float = 1e-5
    swiglu: bool = False  # in place of the MLP
    registers: int = 0  # number of register tokens
    antialias: bool = True  # when the positional embedding is resized


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a CLIP model; `load` reads them, `to_dict` and `from_dict` store them in a checkpoint."""

    name: str
    embed_dim: int  # D
    quick_gelu: bool  # whether the OpenAI-style weights of this model were trained with QuickGELU
    image_size: int
    patch_size: int
    width: int  # C
    layers: int
    heads: int
    context_length: int
    vocab_size: int
    text_width: int
    text_layers: int
    text_heads: int
    weights: dict[str, str] = field(default_factory=dict)  # pretrain -> file name under CLIP/ckpt
    hub: dict[str, str] = field(default_factory=dict)  # pretrain -> owner/name on the Hugging Face hub
    urls: dict[str, str] = field(default_factory=dict)  # pretrain -> URL that contains the SHA-256
    mlp_ratio: float = 4.0
    text_mlp_ratio: float = 4.0
    pixel_mean: tuple[float, ...] = PIXEL_MEAN
    pixel_std: tuple[float, ...] = PIXEL_STD
    tower: ImageTower = ImageTower()

    @classmethod
    def load(cls, name: str) -> ModelConfig:
        """Read a config by name (`list_models`), JSON file, folder or `hf-hub:owner/name`.

        The JSON is this project's, open_clip's or Hugging Face's; other JSON and unknown names raise `InputError`.
        """
        own = CONFIG_FOLDER / f"{name}.json"
        place = (own, name) if name in list_models() else find(name, CONFIG_FILES, "--model_name")
        if place is None:
            raise InputError(
                f"--model_name {name}: unknown; there are {', '.join(list_models())}; or give a JSON file like those "
                "of CLIP/model_configs, a folder with config.json and weights, or hf-hub:owner/name"
            )
        for file in PIXEL_FILES:
            with suppress(InputError):  # fetch them now, so that they are in the cache when offline
                find(name, (file,), "")
        with blame(place[0], "it is not a CLIP config", CONFIG_ERRORS):
            return cls.from_dict({**_read(place[0]), "name": place[1]}, str(place[0]))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the model's config") -> ModelConfig:
        """The inverse of `to_dict`, also for open_clip's JSON.

        Invalid sizes or another family raise `InputError`, which names `where`; missing ones, KeyError or TypeError.
        """
        flat = {"quick_gelu": False, "context_length": PROMPT_LENGTH, "vocab_size": VOCABULARY, **values}
        for part, sizes in TOWERS.items():
            tower = values[f"{part}_cfg"]
            flat |= {_field(part, size): tower[size] for size in sizes if size in tower}
            if not tower.get("heads"):
                flat[_field(part, "heads")] = tower["width"] // tower.get("head_width", 64)
            for key, value in tower.items():
                known = key in {*sizes, "head_width", *HARMLESS} or value in IGNORED.get(key, ())
                if value and not known:
                    raise InputError(f"{where}: {one_line(key)} {one_line(value)} is not supported here")
        flat |= {name: tuple(flat[name]) for name in ("pixel_mean", "pixel_std") if name in flat}
        flat["tower"] = ImageTower(**values.get("tower", {}))
        config = cls(**{f.name: flat[f.name] for f in fields(cls) if f.name in flat})
        _check_sizes(config, where)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain values in the form of model_configs/*.json."""
        vision, text = ({size: getattr(self, _field(part, size)) for size in sizes} for part, sizes in TOWERS.items())
        return {
            "name": self.name, "embed_dim": self.embed_dim, "quick_gelu": self.quick_gelu,
            "vision_cfg": vision, "text_cfg": text,
            "weights": dict(self.weights), "hub": dict(self.hub), "urls": dict(self.urls),
            "pixel_mean": list(self.pixel_mean), "pixel_std": list(self.pixel_std), "tower": asdict(self.tower),
        }  # fmt: skip

    def architecture(self) -> dict[str, Any]:
        """The fields that affect tokens and text embeddings: all except names and the locations of weights."""
        values = asdict(replace(self, name="", weights={}, hub={}, urls={}, tower=replace(self.tower, name="")))
        return values if self.tower.name else {name: value for name, value in values.items() if name != "tower"}

    def grid(self, img_size: int) -> int:
        """Whole patches per side at `img_size` pixels, as published; raises `InputError` if not even one fits."""
        if img_size < self.patch_size:
            tower = self.tower.name or self.name
            raise InputError(f"--img_size {img_size} is smaller than a patch of {tower} ({self.patch_size} pixels)")
        return img_size // self.patch_size

    def files(self) -> dict[str, str]:
        """The known weights: pretrain -> the name of the file under CLIP/ckpt that `CLIP.download` writes."""
        return {pretrain: f"{self.name}-{pretrain}" for pretrain in self.hub} | self.weights

    def default_features(self) -> list[int]:
        """The layers at each quarter of the depth: 6, 12, 18, 24 of 24 layers as published; 3, 6, 9, 12 of 12."""
        return sorted({max(self.layers * quarter // 4, 1) for quarter in (1, 2, 3, 4)})


def list_models() -> list[str]:
    """The names of the models in CLIP/model_configs."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.json"))


def find(name: str, files: Sequence[str], flag: str) -> tuple[Path, str] | None:
    """The path of the file that `name` means, and a name to show for it; None if nothing has that name.

    `name` is a file, or a folder or `hf-hub:owner/name`, from which the first of `files` is taken. Raises `InputError`
    if the folder or repository holds none of them.
    """
    path = Path(name)
    if name.startswith(HUB):
        return fetch(name.removeprefix(HUB), files), name
    if path.is_dir():
        return file_in(path, files, f"{flag} {name}: the folder"), path.resolve().name
    return (path, path.stem) if path.is_file() else None


def file_in(folder: Path, names: Sequence[str], what: str) -> Path:
    """The first of the files that the folder holds; raises `InputError`, which begins with `what`, if none."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{what} holds none of {', '.join(names)}")


# --- reading a config ---


def _read(path: Path) -> dict[str, Any]:
    """The values of a JSON file, converted to open_clip's form."""
    values: dict[str, Any] = read_json(path, "it is not a CLIP config")
    if "model_cfg" in values:  # open_clip_config.json
        return {**values["model_cfg"], **_pixels(values.get("preprocess_cfg") or {}, "mean", "std")}
    if "vision_cfg" in values or not ("model_type" in values or "text_config" in values):
        return values
    pixels: dict[str, Any] = {}
    for stored in map(read_json, filter(Path.is_file, map(path.with_name, PIXEL_FILES))):
        pixels |= stored.get("image_processor", stored)  # nested by transformers 5
    return {**_from_hugging_face(values, path), **_pixels(pixels, "image_mean", "image_std")}


def _pixels(values: Mapping[str, Any], mean: str, std: str) -> dict[str, Any]:
    return {own: values[theirs] for own, theirs in (("pixel_mean", mean), ("pixel_std", std)) if values.get(theirs)}


def _from_hugging_face(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Convert a CLIPModel's config.json to open_clip's form."""
    if (kind := values.get("model_type", "clip")) != "clip":
        raise InputError(f"{path}: model_type {one_line(kind)} is not supported here, only clip")
    result: dict[str, Any] = {"embed_dim": values.get("projection_dim", 512)}
    activations = set()
    for part, sizes in TOWERS.items():
        tower: dict[str, Any] = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, **dict(sizes.values())}
        for suffix in ("config", "config_dict"):
            tower |= values.get(f"{part}_{suffix}") or {}
        if tower["layer_norm_eps"] != 1e-5 or tower["hidden_act"] not in ("gelu", "quick_gelu"):
            words = " and ".join(f"{name} {one_line(tower[name])}" for name in ("hidden_act", "layer_norm_eps"))
            raise InputError(f"{path}: {words}: not supported here")
        ratio = tower["intermediate_size"] / tower["hidden_size"]
        result[f"{part}_cfg"] = {size: tower[theirs] for size, (theirs, _) in sizes.items()} | {"mlp_ratio": ratio}
        activations.add(tower["hidden_act"])
    if len(activations) > 1:
        raise InputError(f"{path}: another hidden_act in each tower is not supported here")
    return {**result, "quick_gelu": activations == {"quick_gelu"}}


def _check_sizes(config: ModelConfig, where: str) -> None:
    for name in (f.name for f in fields(config) if f.type == "int"):
        value, highest = getattr(config, name), MAX_LAYERS if "layers" in name else MAX_SIZE
        if type(value) is not int or not 1 <= value <= highest:
            wrong = f"{name} is {one_line(repr(value))}, not an integer from 1 to {highest}"
            raise InputError(f"{where}: {wrong}; both towers must be CLIP's own transformers")
    if config.width % config.heads or config.text_width % config.text_heads:
        raise InputError(f"{where}: a width is not a multiple of its heads")
    if not len(config.pixel_mean) == len(config.pixel_std) == 3 or min(config.pixel_std) <= 0:
        raise InputError(f"{where}: mean and std of the pixels must be three numbers each, std above 0")
    if config.vocab_size < VOCABULARY or config.context_length < PROMPT_LENGTH:
        raise InputError(
            f"{where}: a text tower of {config.vocab_size} words and {config.context_length} positions does not fit "
            f"CLIP's tokenizer ({VOCABULARY} words, {PROMPT_LENGTH} positions), and no other is supported"
        )


# --- the hub ---


def fetch(repository: str, names: Sequence[str]) -> Path:
    """The first of the files `names` that the hub's `repository` (`owner/name`, `owner/name@revision`) has.

    Uses huggingface_hub, with its cache, resuming, mirror and offline settings. Files in the cache are taken from there
    without asking the hub, so that later runs need no network. Raises `Unreachable` if the file is not in the cache and
    the hub cannot be reached, or if huggingface_hub is missing; `InputError` if the repository does not exist or has
    none of the files, or if a file has the wrong SHA-256.
    """
    what, unreachable = f"{HUB}{repository}", ""
    try:
        from huggingface_hub import errors, hf_hub_download, logging, try_to_load_from_cache  # noqa: PLC0415 - optional
    except ImportError as error:
        raise Unreachable(f"{what}: needs a package: pip install huggingface_hub") from error
    logging.set_verbosity_error()  # type: ignore[no-untyped-call] # otherwise it logs every attempt
    owner_name, _, revision = repository.partition("@")
    for name in names:
        where: dict[str, Any] = {"repo_id": owner_name, "filename": name, "revision": revision or None}
        path: Any = None
        with blame(what, "check the name, or log in with `hf auth login`"), suppress(errors.EntryNotFoundError):
            try:
                path = try_to_load_from_cache(**where) or hf_hub_download(**where, local_files_only=bool(unreachable))
            except errors.LocalEntryNotFoundError as error:  # also if the hub is unreachable
                unreachable = unreachable or one_line(error.__cause__ or error)
        if isinstance(path, str):  # else the cache knows that the repository has no such file
            expected = Path(path).resolve().name  # for large files, the SHA-256 given by the hub
            if re.fullmatch("[0-9a-f]{64}", expected) and sha256_file(path) != expected:
                raise InputError(f"{path}: wrong SHA-256, so damaged: delete {Path(path).resolve()}, run this again")
            return Path(path)
    if unreachable:
        raise Unreachable(
            f"{what}: not in the cache of huggingface_hub, and the hub cannot be reached ({unreachable}): check the "
            "network (HF_ENDPOINT names a mirror), or fetch the folder elsewhere and give it instead of the name"
        )
    raise InputError(f"{what}: holds none of {', '.join(names)}")
