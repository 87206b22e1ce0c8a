"""The checkpoint format of the published code: reading it (settings are inferred), and writing it for its test program.

The file is a plain dict with `normal_det_adapters` and `abnormal_det_adapters`. Depending on the text mode, it also has
`prompt_maker_normal` and `prompt_maker_abnormal`, each with the contexts and the whole frozen text encoder, or
`text_features_fix` (D, 2). It holds no settings.
"""

import argparse
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from CLIP.adapter_shared import BRANCHES
from CLIP.config import ModelConfig, list_models
from CLIP.model import CLIP
from dataset.medical_few import MedicalDataset
from utils import InputError

from ..detector import Detector
from .config import MODEL_FLAGS, VERSION, Settings, check_layers

ENCODER_PREFIX = "text_encoder."
# Settings that the tensors do not reveal; the defaults are those of the published test program.
ASSUMED = ("img_size", "contrast_mood", "dec_type", "loss_type", "fidelity")


def facts_of(dataset: MedicalDataset) -> dict[str, Any]:
    """Settings that a published checkpoint does not hold, taken from the data set that it was trained on."""
    layout = dataset.layout
    return {
        "obj": dataset.obj, "prompt_name": layout.prompt_name, "pixel_metrics": dataset.pixel_metrics,
        "mask_above": layout.mask_above,
    }  # fmt: skip


def looks_published(payload: dict[str, Any]) -> bool:
    """Whether a dict has the parts of a published checkpoint."""
    return all(isinstance(payload.get(f"{branch}_det_adapters"), dict) for branch in BRANCHES)


def infer_settings(
    parts: dict[str, Any], path: object, facts: Mapping[str, Any], flags: argparse.Namespace
) -> tuple[Settings, str]:
    """Infer the settings from the tensors' names and shapes; the rest comes from `flags` or the published defaults.

    Returns:
        The settings, with an empty hash of the weights, and a line that says what was inferred.

    Raises:
        InputError: parts are missing or of no known kind, no model has their sizes, or --features_list does not fit.
            Other errors are raised if the entries are not tensors.
    """
    adapters = parts["normal_det_adapters"]
    names = {name.split(".", 1)[1] for name in adapters}
    kinds = {"MViTFC": "transformer_encoder.linear1.weight", "MFCFC": "fc3.0.weight", "MCNNFC": "cnn.0.weight"}
    kind = next((kind for kind, name in kinds.items() if name in names), None)
    if kind is None:
        raise InputError(f"--ckpt {path}: adapters of no known kind ({sorted(names)[:3]!r:.80})")
    config = _find_model(adapters["0.fc1.0.weight" if kind != "MFCFC" else "0.fc2.0.weight"].shape, path, flags)
    count = 1 + max(int(name.split(".")[0]) for name in adapters)
    layers = check_layers(flags.features_list, config)
    if len(layers) != count:
        raise InputError(f"--ckpt {path} holds adapters for {count} layers: name them with --features_list")
    learners = [branch for branch in BRANCHES if f"prompt_maker_{branch}" in parts]
    mood = {2: "learnable_all", 1: "learnable_abnormal", 0: "fix"}[len(learners)]
    if mood == "fix" and "text_features_fix" not in parts:
        raise InputError(f"--ckpt {path}: holds neither prompt makers nor text_features_fix")
    assumed: dict[str, Any] = {name: getattr(flags, name) or MODEL_FLAGS[name]["default"] for name in ASSUMED}
    settings = Settings(
        **facts,
        model_name=config.name,
        pretrain=flags.pretrain or "openai",
        features_list=layers,
        visionA=kind,
        text_mood=mood,
        weights_sha256="",
        eval_batch=flags.batch_size,  # not doubled, as in the published test program
        model_config=config.to_dict(),
        version=VERSION,
        **assumed,
    )
    line = ", ".join(f"{name} {value}" for name, value in assumed.items())
    return settings, (
        f"published format, so inferred: {config.name}, {kind}, {count} layers, {mood}; "
        f"assumed: layers {' '.join(map(str, layers))}, {line}"
    )


def _find_model(sizes: torch.Size, path: object, flags: argparse.Namespace) -> ModelConfig:
    """The model of --model_name, or else the first in CLIP/model_configs with these sizes, (embedding, width).

    ViT-L-14 and ViT-L-14-336 have the same sizes; the latter, the published default, comes first.
    """
    default = MODEL_FLAGS["model_name"]["default"]
    names = [flags.model_name] if flags.model_name else [default, *list_models()]
    for config in map(ModelConfig.load, names):
        if (config.embed_dim, config.width) == tuple(sizes):
            return config
    which = f"that is not --model_name {flags.model_name}" if flags.model_name else "name yours with --model_name"
    raise InputError(f"--ckpt {path}: made for width {sizes[1]} and embedding {sizes[0]}; {which}")


def encoder_tensors(clip: CLIP) -> dict[str, Tensor]:
    """The frozen text encoder's tensors under their published names, without the token embedding."""
    state = clip.text.state_dict()
    return {
        f"{ENCODER_PREFIX}{name}": tensor for name, tensor in state.items() if not name.startswith("token_embedding")
    }


@torch.no_grad()
def frozen_difference(parts: dict[str, Any], detector: Detector, clip: CLIP) -> float:
    """The largest difference between the frozen tensors in a checkpoint and those in use; 0 if it holds none.

    These are the text encoder and, with fixed prompts, `text_features_fix`. The difference is infinite if a tensor has
    another name or shape, or holds NaN.
    """
    own = encoder_tensors(clip)
    learners = [parts.get(f"prompt_maker_{branch}", {}) for branch in BRANCHES]
    stored = [item for learner in learners for item in learner.items() if item[0].startswith(ENCODER_PREFIX)]
    if "text_features_fix" in parts:
        own["text_features_fix"] = detector.prompts()
        stored.append(("text_features_fix", parts["text_features_fix"]))
    largest = 0.0
    for name, tensor in stored:
        if name not in own or tensor.shape != own[name].shape:
            return math.inf
        largest = max(largest, float((tensor.float() - own[name].cpu()).abs().nan_to_num(nan=math.inf).max()))
    return largest


@torch.no_grad()
def to_published(detector: Detector, clip: CLIP) -> dict[str, Any]:
    """A detector as a dict in the published format, for the published test program."""
    parts = detector.parts()
    for branch in BRANCHES:
        if f"prompt_maker_{branch}" in parts:
            parts[f"prompt_maker_{branch}"] |= encoder_tensors(clip)
    if detector.settings.text_mood == "fix":
        parts["text_features_fix"] = detector.prompts()
    return parts
