"""What a CLIP model is: its sizes, activation and pixels, from a name, a JSON file, a folder or the Hugging Face hub.

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from utils import InputError, checked, preview, read_text

from . import hub

CONFIG_FOLDER = Path(__file__).parent / "model_configs"
PRETRAINS = ("openai", "laion400m", "laion2b", "random")
FIDELITIES = ("released", "corrected")
ADAPTER_KINDS = ("MFCFC", "MCNNFC", "MViTFC")
# What OpenAI's CLIP was trained with (`corrected` fidelity); the published MadCLIP code leaves images in [0, 1].
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
CONFIG_FILES = ("open_clip_config.json", "config.json")  # in a folder or on the hub
PIXEL_FILE = "preprocessor_config.json"  # beside Hugging Face's config.json: mean and std
VOCABULARY, PROMPT_LENGTH = 49408, 77  # of CLIP's tokenizer and of the prompts
MAX_SIZE, MAX_LAYERS = 2**17, 256  # of the numbers in a config: a hostile one must not ask for all memory

# Defaults of Hugging Face's CLIPConfig, whose files leave out what equals them.
HF_TEXT = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "model_type": "clip_text_model",
}  # fmt: skip
HF_VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "num_channels": 3, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "model_type": "clip_vision_model",
}  # fmt: skip
# Entries of open_clip's configs that change nothing here; any other must be absent or false.
HARMLESS = {"patch_dropout", "output_tokens", "name", "hub", "urls", "weights", "custom_text", "init_logit_scale"}
SAME = {"pool_type": ("tok", "argmax"), "proj_type": ("linear",), "act_layer": ("gelu",)}


@dataclass(frozen=True)
class Tower:
    """`vision_cfg` or `text_cfg` of a config file, in open_clip's words."""

    width: int
    layers: int
    head_width: int = 64
    heads: int = 0  # 0: width / head_width
    mlp_ratio: float = 4.0
    image_size: int = 0
    patch_size: int = 0
    context_length: int = PROMPT_LENGTH
    vocab_size: int = VOCABULARY


@dataclass(frozen=True)
class ModelConfig:
    """Every size of a CLIP model; `load` reads it, `to_dict` and `from_dict` keep it in a checkpoint."""

    name: str
    embed_dim: int  # D
    quick_gelu: bool  # the activation that the OpenAI-style weights of this model were trained with
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
    urls: dict[str, str] = field(default_factory=dict)  # pretrain -> address with the SHA-256 in it
    mlp_ratio: float = 4.0
    text_mlp_ratio: float = 4.0
    pixel_mean: tuple[float, ...] = PIXEL_MEAN
    pixel_std: tuple[float, ...] = PIXEL_STD

    @classmethod
    def load(cls, name: str) -> ModelConfig:
        """Read a config by name (`list_models`), JSON file, folder or `hf-hub:owner/name`; `InputError` for others."""
        if name in list_models():
            return cls.read(CONFIG_FOLDER / f"{name}.json", name)
        if name.startswith(hub.PREFIX):
            repository = name.removeprefix(hub.PREFIX)
            path = hub.fetch(repository, CONFIG_FILES)
            with contextlib.suppress(hub.Unreachable):  # its pixels come along, so that they are there offline as well
                hub.fetch_if_there(repository, (PIXEL_FILE,))
            return cls.read(path, name, path.with_name(PIXEL_FILE))
        path = Path(name)
        if path.is_dir():
            found = [path / file for file in CONFIG_FILES if (path / file).is_file()]
            if not found:
                raise InputError(f"--model_name {name}: the folder holds no {' and no '.join(CONFIG_FILES)}")
            return cls.read(found[0], path.resolve().name, path / PIXEL_FILE)
        if path.suffix == ".json" and path.exists():
            return cls.read(path, path.stem if path.name not in CONFIG_FILES else path.resolve().parent.name)
        raise InputError(
            f"--model_name {name}: unknown; there are {', '.join(list_models())}; or give a JSON file like those of "
            "CLIP/model_configs, a folder with config.json and weights, or hf-hub:owner/name"
        )

    @classmethod
    def read(cls, path: Path, name: str, preprocessor: Path | None = None) -> ModelConfig:
        """Read a JSON file in this project's, open_clip's or Hugging Face's form; `InputError` for any other."""
        values = _read_json(path)
        if "model_cfg" in values:  # open_clip_config.json
            pixels = values.get("preprocess_cfg") or {}
            values = {**_object(values["model_cfg"], path), **_pixels(_object(pixels, path), "mean", "std")}
        elif "vision_cfg" not in values and ("model_type" in values or "text_config" in values):
            values = _from_hugging_face(values, path)
            if preprocessor is not None and preprocessor.is_file():
                values |= _pixels(_read_json(preprocessor), "image_mean", "image_std")
        return cls.from_dict({**values, "name": name}, str(path))

    @classmethod
    def from_dict(cls, values: object, where: str = "the model's config") -> ModelConfig:
        """The inverse of `to_dict`, also for open_clip's JSON.

        Raises:
            InputError: naming `where`, for values that are missing or make no sense, and for another family.
        """
        given = _object(values, where)
        _check_family(given, where)
        vision = checked(Tower, given.get("vision_cfg"), f"{where}: vision_cfg")
        text = checked(Tower, given.get("text_cfg"), f"{where}: text_cfg")
        own = {f.name: given[f.name] for f in fields(cls) if f.name in given}
        config = checked(
            cls,
            {
                "name": where, "quick_gelu": False, **own,
                "image_size": vision.image_size, "patch_size": vision.patch_size, "width": vision.width,
                "layers": vision.layers, "heads": vision.heads or vision.width // max(vision.head_width, 1),
                "context_length": text.context_length, "vocab_size": text.vocab_size, "text_width": text.width,
                "text_layers": text.layers, "text_heads": text.heads or text.width // max(text.head_width, 1),
                "mlp_ratio": vision.mlp_ratio, "text_mlp_ratio": text.mlp_ratio,
            },
            where,
        )  # fmt: skip
        _check_sizes(config, where)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain values in the form of model_configs/*.json."""
        return {
            "name": self.name,
            "embed_dim": self.embed_dim,
            "quick_gelu": self.quick_gelu,
            "vision_cfg": {
                "image_size": self.image_size, "patch_size": self.patch_size, "width": self.width,
                "layers": self.layers, "heads": self.heads, "mlp_ratio": self.mlp_ratio,
            },
            "text_cfg": {
                "context_length": self.context_length, "vocab_size": self.vocab_size, "width": self.text_width,
                "layers": self.text_layers, "heads": self.text_heads, "mlp_ratio": self.text_mlp_ratio,
            },
            "weights": dict(self.weights), "hub": dict(self.hub), "urls": dict(self.urls),
            "pixel_mean": list(self.pixel_mean), "pixel_std": list(self.pixel_std),
        }  # fmt: skip

    def architecture(self) -> dict[str, Any]:
        """What shapes the tokens and text embeddings beside the weights: all but the name and where weights are."""
        return asdict(replace(self, name="", weights={}, hub={}, urls={}))

    def grid(self, img_size: int) -> int:
        """Patches along a side at `img_size` pixels; a rest smaller than a patch is dropped, as published."""
        if img_size < self.patch_size:
            raise InputError(f"--img_size {img_size} is smaller than a patch of {self.name} ({self.patch_size} pixels)")
        return img_size // self.patch_size

    def default_features(self) -> list[int]:
        """The layers at the four quarters of the depth: 6 12 18 24 of 24 as published, 3 6 9 12 of 12."""
        return [self.layers * quarter // 4 for quarter in (1, 2, 3, 4)]


def list_models() -> list[str]:
    """Names under CLIP/model_configs."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.json"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return _object(json.loads(read_text(path)), path)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({hub.one_line(error)})") from error


def _object(values: object, where: object) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InputError(f"{where}: not an object but {type(values).__name__}")
    return values


def _pixels(values: Mapping[str, Any], mean: str, std: str) -> dict[str, Any]:
    return {own: values[theirs] for own, theirs in (("pixel_mean", mean), ("pixel_std", std)) if values.get(theirs)}


def _from_hugging_face(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A CLIPModel's config.json in open_clip's words."""
    text, vision = (
        {**defaults, **_object(values.get(name) or {}, path), **_object(values.get(f"{name}_dict") or {}, path)}
        for name, defaults in (("text_config", HF_TEXT), ("vision_config", HF_VISION))
    )
    kinds = [values.get("model_type", "clip"), text["model_type"], vision["model_type"]]
    wrong = [str(kind) for kind in kinds if not str(kind).startswith("clip")]
    if wrong or kinds[0] != "clip":
        raise refused(hub.one_line((wrong or kinds)[0]), path)
    for tower in (vision, text):
        activation = tower["hidden_act"]
        if activation not in ("gelu", "quick_gelu") or activation != vision["hidden_act"]:
            raise InputError(f"{path}: hidden_act {activation!r:.40} in one tower is not supported here")
        if tower["layer_norm_eps"] != 1e-5:
            raise InputError(f"{path}: layer_norm_eps {tower['layer_norm_eps']!r:.40} is not CLIP's 1e-05")
        for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
            if type(tower[name]) is not int or tower[name] < 1:
                raise InputError(f"{path}: {name} {tower[name]!r:.40} is no positive integer")

    def sizes(tower: Mapping[str, Any], **others: str) -> dict[str, Any]:
        names = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads", **others}
        ratio = tower["intermediate_size"] / tower["hidden_size"]
        return {**{own: tower[theirs] for own, theirs in names.items()}, "mlp_ratio": ratio}

    return {
        "embed_dim": values.get("projection_dim", 512),
        "quick_gelu": vision["hidden_act"] == "quick_gelu",
        "vision_cfg": sizes(vision, image_size="image_size", patch_size="patch_size"),
        "text_cfg": sizes(text, context_length="max_position_embeddings", vocab_size="vocab_size"),
    }


def refused(kind: str, where: object) -> InputError:
    """The line for a model of another family, `kind` in words."""
    return InputError(
        f"{where}: {kind} is another family, and not supported: both towers must be CLIP's own transformers "
        "(a ViT for images, CLIP's text transformer)"
    )


def _check_family(values: Mapping[str, Any], where: str) -> None:
    """`InputError` that says what kind it is for a config with a tower that is not CLIP's."""
    vision, text = (_object(values.get(name), f"{where}: {name}") for name in ("vision_cfg", "text_cfg"))
    timm, hf = vision.get("timm_model_name"), text.get("hf_model_name")
    tokenizer = str(text.get("hf_tokenizer_name") or "")
    if "siglip" in f"{timm} {tokenizer}".lower() or values.get("init_logit_bias") is not None:
        raise refused("a SigLIP model", where)
    if hf:
        bert = "a BERT text tower" if "bert" in str(hf).lower() else "a text tower of Hugging Face"
        raise refused(f"{bert} ({hub.one_line(hf)})", where)
    if isinstance(vision.get("layers"), list) or "resnet" in str(timm).lower():
        raise refused("a ResNet image tower", where)
    if timm:
        raise refused(f"a timm image tower ({hub.one_line(timm)})", where)
    if values.get("multimodal_cfg"):
        raise refused("a CoCa model", where)
    known = {f.name for f in fields(Tower)} | HARMLESS
    others = [
        f"{part}.{key}"
        for part, tower in (("vision_cfg", vision), ("text_cfg", text))
        for key, value in tower.items()
        if key not in known and value and value not in SAME.get(key, ())
    ]
    if others:
        raise InputError(f"{where}: {hub.one_line(preview(others))}: not supported here")


def _check_sizes(config: ModelConfig, where: str) -> None:
    numbers = {f.name: getattr(config, f.name) for f in fields(config) if f.type == "int"}
    for name, value in numbers.items():
        highest = MAX_LAYERS if "layers" in name else MAX_SIZE
        if not 1 <= value <= highest:
            raise InputError(f"{where}: {name} is {value}, not between 1 and {highest}")
    for name, width, heads in (
        ("vision_cfg", config.width, config.heads),
        ("text_cfg", config.text_width, config.text_heads),
    ):
        if width % heads:
            raise InputError(f"{where}: {name}: width {width} is not a multiple of its {heads} heads")
    if not all(0 < ratio <= 64 for ratio in (config.mlp_ratio, config.text_mlp_ratio)):
        raise InputError(f"{where}: mlp_ratio must lie between 0 and 64")
    if len(config.pixel_mean) != 3 or len(config.pixel_std) != 3 or min(config.pixel_std) <= 0:
        raise InputError(f"{where}: mean and std of the pixels must be three numbers each, std above 0")
    if config.image_size < config.patch_size:
        raise InputError(f"{where}: image_size {config.image_size} is smaller than a patch of {config.patch_size}")
    if config.vocab_size < VOCABULARY or config.context_length < PROMPT_LENGTH:
        raise InputError(
            f"{where}: a text tower of {config.vocab_size} words and {config.context_length} positions does not take "
            f"CLIP's tokens ({VOCABULARY} words, {PROMPT_LENGTH} positions): another tokenizer's is not supported"
        )
