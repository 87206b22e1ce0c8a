"""Fixtures: the golden arrays and the tiny model on which they were measured."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from CLIP.clip import load_state
from CLIP.model import CLIP, ModelConfig

GOLDEN = Path(__file__).parent / "golden"
TINY_SIZE = 42  # pixels: a 3x3 grid of patches; the weights were made for 56 pixels (4x4)
VARIANTS = ("gelu_nomask", "quickgelu_nomask", "gelu_causal", "quickgelu_causal")

torch.set_num_threads(1)  # tests run in parallel, one per core


@cache
def load_golden(name: str) -> dict[str, np.ndarray]:
    """All arrays of tests/golden/NAME.npz."""
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return {key: archive[key] for key in archive.files}


@cache
def tiny_state() -> dict[str, torch.Tensor]:
    """State dict of the tiny CLIP; the stored rows of its token embedding are put back into the whole table."""
    state = {key: torch.from_numpy(value) for key, value in load_golden("clip_tiny_weights").items()}
    table = torch.zeros(int(state["vocab_size"]), 128)
    table[state.pop("token_embedding.row_ids")] = state.pop("token_embedding.rows")
    return {**state, "token_embedding.weight": table}


@cache
def make_tiny_clip(quick_gelu: bool) -> CLIP:
    """The tiny CLIP at 42 pixels."""
    clip = CLIP(ModelConfig.load("ViT-tiny-14-56"), TINY_SIZE, quick_gelu)
    load_state(clip, tiny_state(), "golden")
    return clip


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed torch, so that random numbers do not depend on earlier tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    return load_golden


@pytest.fixture(scope="session")
def golden_json() -> Callable[[str], dict]:
    return lambda name: json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def tiny_clip() -> Callable[[bool], CLIP]:
    return make_tiny_clip
