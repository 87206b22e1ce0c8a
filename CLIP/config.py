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

from utils import InputError, checked, one_line, preview, read_text

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

# The entries of a tower in a config file, and the fields of `ModelConfig` that hold them.
VISION = {name: name for name in ("image_size", "patch_size", "width", "layers", "heads", "mlp_ratio")}
TEXT = {
    "context_length": "context_length", "vocab_size": "vocab_size", "width": "text_width", "layers": "text_layers",
    "heads": "text_heads", "mlp_ratio": "text_mlp_ratio",
}  # fmt: skip
# Hugging Face's words for these, and the defaults of its CLIPConfig, whose files leave out what equals them.
HF_NAMES = {
    "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "context_length": "max_position_embeddings",
}  # fmt: skip
HF_TEXT = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77,
}  # fmt: skip
HF_VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32,
}  # fmt: skip
HF_BOTH = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "model_type": "clip"}
# Entries of open_clip's configs that change nothing here; any other must be absent or false.
HARMLESS = {"patch_dropout", "output_tokens", "name", "hub", "urls", "weights", "custom_text", "init_logit_scale"}
IGNORED = {"pool_type": ("tok", "argmax"), "proj_type": ("linear",), "act_layer": ("gelu",)}


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
        """Read a config by name (`list_models`), JSON file, folder or `hf-hub:owner/name`.

        The JSON may be this project's, open_clip's or Hugging Face's; `InputError` for any other and for other names.
        """
        path, label = Path(name), name
        if name in list_models():
            path = CONFIG_FOLDER / f"{name}.json"
        elif name.startswith(hub.PREFIX):
            path = hub.fetch(name.removeprefix(hub.PREFIX), CONFIG_FILES)
            with contextlib.suppress(hub.Unreachable, hub.Missing):  # fetched now, its pixels are there offline as well
                hub.fetch(name.removeprefix(hub.PREFIX), (PIXEL_FILE,))
        elif path.is_dir():
            label = path.resolve().name
            path = next((path / file for file in CONFIG_FILES if (path / file).is_file()), path)
            if path.is_dir():
                raise InputError(f"--model_name {name}: the folder holds no {' and no '.join(CONFIG_FILES)}")
        elif path.suffix == ".json" and path.exists():
            label = path.stem if path.name not in CONFIG_FILES else path.parent.resolve().name
        else:
            raise InputError(
                f"--model_name {name}: unknown; there are {', '.join(list_models())}; or give a JSON file like those "
                "of CLIP/model_configs, a folder with config.json and weights, or hf-hub:owner/name"
            )
        return cls.from_dict({**_read(path), "name": label}, str(path))

    @classmethod
    def from_dict(cls, values: object, where: str = "the model's config") -> ModelConfig:
        """The inverse of `to_dict`, also for open_clip's JSON.

        `InputError` names `where`, for values that are missing or make no sense, and for another family.
        """
        given = _object(values, where)
        _check_family(given, where)
        defaults = {"quick_gelu": False, "context_length": PROMPT_LENGTH, "vocab_size": VOCABULARY}
        flat = {"name": where, **defaults, **given}
        for part, names in (("vision_cfg", VISION), ("text_cfg", TEXT)):
            tower = given[part]
            flat |= {own: tower[name] for name, own in names.items() if name in tower}
            width, head_width = tower.get("width"), tower.get("head_width", 64)
            if not tower.get("heads") and type(width) is int and type(head_width) is int and head_width > 0:
                flat[names["heads"]] = width // head_width
        config = checked(cls, flat, where)
        _check_sizes(config, where)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain values in the form of model_configs/*.json."""
        vision, text = ({name: getattr(self, own) for name, own in names.items()} for names in (VISION, TEXT))
        return {
            "name": self.name, "embed_dim": self.embed_dim, "quick_gelu": self.quick_gelu,
            "vision_cfg": vision, "text_cfg": text,
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


def refused(kind: str, where: object) -> InputError:
    """The line for a model of another family, `kind` in words."""
    return InputError(
        f"{where}: {kind} is another family, and not supported: both towers must be CLIP's own transformers "
        "(a ViT for images, CLIP's text transformer)"
    )


def _read(path: Path) -> dict[str, Any]:
    """The values of a JSON file, in open_clip's words."""
    values = _read_json(path)
    if "model_cfg" in values:  # open_clip_config.json
        pixels = _object(values.get("preprocess_cfg") or {}, path)
        return {**_object(values["model_cfg"], path), **_pixels(pixels, "mean", "std")}
    if "vision_cfg" in values or not ("model_type" in values or "text_config" in values):
        return values
    preprocessor = path.with_name(PIXEL_FILE)
    pixels = _read_json(preprocessor) if preprocessor.is_file() else {}
    return {**_from_hugging_face(values, path), **_pixels(pixels, "image_mean", "image_std")}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return _object(json.loads(read_text(path)), path)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({one_line(error)})") from error


def _object(values: object, where: object) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InputError(f"{where}: not an object but {type(values).__name__}")
    return values


def _pixels(values: Mapping[str, Any], mean: str, std: str) -> dict[str, Any]:
    return {own: values[theirs] for own, theirs in (("pixel_mean", mean), ("pixel_std", std)) if values.get(theirs)}


def _from_hugging_face(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A CLIPModel's config.json in open_clip's words."""
    if values.get("model_type", "clip") != "clip":
        raise refused(one_line(values["model_type"]), path)
    result: dict[str, Any] = {"embed_dim": values.get("projection_dim", 512)}
    activations = []
    for part, names, defaults in (("vision", VISION, HF_VISION), ("text", TEXT, HF_TEXT)):
        given = [_object(values.get(f"{part}_{suffix}") or {}, path) for suffix in ("config", "config_dict")]
        tower = {**HF_BOTH, **defaults, **given[0], **given[1]}
        if tower["model_type"] not in ("clip", f"clip_{part}_model"):
            raise refused(one_line(tower["model_type"]), path)
        if tower["layer_norm_eps"] != 1e-5:
            raise InputError(f"{path}: layer_norm_eps {tower['layer_norm_eps']!r:.40} is not CLIP's 1e-05")
        for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
            if type(tower[name]) is not int or tower[name] < 1:
                raise InputError(f"{path}: {name} {tower[name]!r:.40} is no positive integer")
        tower["mlp_ratio"] = tower["intermediate_size"] / tower["hidden_size"]
        result[f"{part}_cfg"] = {name: tower[HF_NAMES.get(name, name)] for name in names}
        activations.append(tower["hidden_act"])
    if activations not in (["gelu", "gelu"], ["quick_gelu", "quick_gelu"]):
        raise InputError(f"{path}: hidden_act {activations[0]!r:.40} and {activations[1]!r:.40} are not supported here")
    return {**result, "quick_gelu": activations[0] == "quick_gelu"}


def _check_family(values: Mapping[str, Any], where: str) -> None:
    """`InputError` that says what kind it is for a config with a tower that is not CLIP's."""
    vision, text = (_object(values.get(name), f"{where}: {name}") for name in ("vision_cfg", "text_cfg"))
    timm, hf = (one_line(name or "") for name in (vision.get("timm_model_name"), text.get("hf_model_name")))
    names = f"{timm} {text.get('hf_tokenizer_name')}".lower()
    families = {
        "a SigLIP model": "siglip" in names or values.get("init_logit_bias") is not None,
        f"a BERT text tower ({hf})": "bert" in hf.lower(),
        f"a text tower of Hugging Face ({hf})": hf,
        "a ResNet image tower": isinstance(vision.get("layers"), list) or "resnet" in timm.lower(),
        f"a timm image tower ({timm})": timm,
        "a CoCa model": values.get("multimodal_cfg"),
    }
    if kinds := [kind for kind, applies in families.items() if applies]:
        raise refused(kinds[0], where)
    known = {*VISION, *TEXT, "head_width"} | HARMLESS
    others = [
        f"{part}.{key}"
        for part, tower in (("vision_cfg", vision), ("text_cfg", text))
        for key, value in tower.items()
        if key not in known and value and value not in IGNORED.get(key, ())
    ]
    if others:
        raise InputError(f"{where}: {one_line(preview(others))}: not supported here")


def _check_sizes(config: ModelConfig, where: str) -> None:
    for f in fields(config):
        highest = MAX_LAYERS if "layers" in f.name else MAX_SIZE
        if f.type == "int" and not 1 <= getattr(config, f.name) <= highest:
            raise InputError(f"{where}: {f.name} is {getattr(config, f.name)}, not between 1 and {highest}")
    tokens = f"CLIP's tokens ({VOCABULARY} words, {PROMPT_LENGTH} positions): another tokenizer's is not supported"
    faults = {
        f"vision_cfg: width {config.width} is not a multiple of its {config.heads} heads": config.width % config.heads,
        f"text_cfg: width {config.text_width} is not a multiple of its {config.text_heads} heads": (
            config.text_width % config.text_heads
        ),
        "mlp_ratio must lie between 0 and 64": not (0 < config.mlp_ratio <= 64 and 0 < config.text_mlp_ratio <= 64),
        "mean and std of the pixels must be three numbers each, std above 0": (
            not len(config.pixel_mean) == len(config.pixel_std) == 3 or min(config.pixel_std) <= 0
        ),
        f"image_size {config.image_size} is smaller than a patch of {config.patch_size}": (
            config.image_size < config.patch_size
        ),
        f"a text tower of {config.vocab_size} words and {config.context_length} positions does not take {tokens}": (
            config.vocab_size < VOCABULARY or config.context_length < PROMPT_LENGTH
        ),
    }
    if wrong := [fault for fault, applies in faults.items() if applies]:
        raise InputError(f"{where}: {wrong[0]}")
