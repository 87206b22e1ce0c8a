"""The names of weights: OpenAI's, open_clip's and Hugging Face's, turned into OpenAI's; other families are named."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from utils import InputError

from .config import refused

Loader = Callable[[], torch.Tensor]  # reads one tensor of a file

NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # three integers in OpenAI's files
ANCHORS = ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")
# Hugging Face's names outside the layers, and whether the matrix is stored the other way round there.
HUGGING_FACE = {
    "text_model.embeddings.token_embedding.weight": ("token_embedding.weight", False),
    "text_model.embeddings.position_embedding.weight": ("positional_embedding", False),
    "text_model.final_layer_norm.weight": ("ln_final.weight", False),
    "text_model.final_layer_norm.bias": ("ln_final.bias", False),
    "text_projection.weight": ("text_projection", True),
    "vision_model.embeddings.class_embedding": ("visual.class_embedding", False),
    "vision_model.embeddings.patch_embedding.weight": ("visual.conv1.weight", False),
    "vision_model.embeddings.position_embedding.weight": ("visual.positional_embedding", False),
    "vision_model.pre_layrnorm.weight": ("visual.ln_pre.weight", False),  # their spelling
    "vision_model.pre_layrnorm.bias": ("visual.ln_pre.bias", False),
    "vision_model.post_layernorm.weight": ("visual.ln_post.weight", False),
    "vision_model.post_layernorm.bias": ("visual.ln_post.bias", False),
    "visual_projection.weight": ("visual.proj", True),
    "logit_scale": ("logit_scale", False),
}
LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
IN_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "self_attn.q_proj": "attn.in_proj",  # with k and v
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


def openai_names(loaders: Mapping[str, Loader], path: Path) -> dict[str, Loader]:
    """A CLIP's tensors under OpenAI's names; open_clip's and Hugging Face's become these, a common prefix is dropped.

    Raises:
        InputError: no CLIP weights, or a tower of another family, which is named.
    """
    for pattern, kind in FAMILIES.items():
        if any(re.search(pattern, key) for key in loaders):
            raise refused(kind, path)
    prefix, anchor = _anchor(loaders)
    if anchor is None:
        raise InputError(
            f"{path} holds no CLIP weights (no {ANCHORS[0]} or {ANCHORS[1]} among its {len(loaders)} tensors): "
            "pass OpenAI's, open_clip's or Hugging Face's file of the whole model"
        )
    named = {key.removeprefix(prefix): load for key, load in loaders.items()}
    if anchor == ANCHORS[1]:
        return _from_hugging_face(named, path)
    named = {key.removeprefix("text."): load for key, load in named.items()}
    return {key: load for key, load in named.items() if key not in NOT_WEIGHTS}


def _anchor(keys: Iterable[str]) -> tuple[str, str | None]:
    """The prefix of all names (`module.`, `model.`) and the anchor found behind it, None for none."""
    hits = [
        (key.removesuffix(anchor), anchor)
        for key in keys
        for anchor in ANCHORS
        if key == anchor or key.endswith(f".{anchor}")
    ]
    return min(hits, key=lambda hit: len(hit[0])) if hits else ("", None)


def _from_hugging_face(loaders: Mapping[str, Loader], path: Path) -> dict[str, Loader]:
    result: dict[str, Loader] = {}
    for key, load in loaders.items():
        if key in HUGGING_FACE:
            name, transposed = HUGGING_FACE[key]
            result[name] = _transposed(load) if transposed else load
        elif (match := LAYER.fullmatch(key)) and match[3] in IN_LAYER:
            tower, name, kind = "visual." if match[1] == "vision" else "", IN_LAYER[match[3]], match[4]
            stem = f"{tower}transformer.resblocks.{int(match[2])}.{name}"
            if name == "attn.in_proj":
                parts = [key.replace("q_proj", letter) for letter in ("q_proj", "k_proj", "v_proj")]
                if missing := [part for part in parts if part not in loaders]:
                    raise InputError(f"{path}: {missing[0]} is missing: fetch the file again")
                result[f"{stem}_{kind}"] = _joined([loaders[part] for part in parts])
            else:
                result[f"{stem}.{kind}"] = load
    return result


def _transposed(load: Loader) -> Loader:
    return lambda: load().t().contiguous()


def _joined(loads: list[Loader]) -> Loader:
    return lambda: torch.cat([load() for load in loads])
