"""The names of weights: OpenAI's, open_clip's and Hugging Face's, turned into OpenAI's; other families are named."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from utils import InputError

from .config import refused

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
