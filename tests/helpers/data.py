"""Small models and options for unit tests of the engine."""

import zipfile
import zlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.fewshot import parse_shot_list, pick_names
from dataset.readers.images import Sample
from engine.files.config import Settings

# Flags of a small model that needs no weights and trains in seconds on one core.
SMALL = ["--model_name", "ViT-tiny-14-56", "--pretrain", "random", "--img_size", "42", "--device", "cpu"]


def small_settings(**changes: object) -> Settings:
    """Settings of the tiny tower at 42 pixels."""
    values = {
        "obj": "Brain", "model_name": "ViT-tiny-14-56", "pretrain": "random", "fidelity": "released", "img_size": 42,
        "features_list": (2, 4), "visionA": "MFCFC", "text_mood": "learnable_all", "contrast_mood": "yes",
        "dec_type": "mean", "loss_type": "sigmoid", "prompt_name": "Brain", "pixel_metrics": True,
        "weights_sha256": "", "eval_batch": 4,
    }  # fmt: skip
    return Settings(**{**values, **changes})


def store_options(cache_dir: Path, **changes: object) -> Namespace:
    """The command-line options that a token store reads."""
    values = {"cache": "ram", "cache_dir": str(cache_dir), "cache_dtype": "auto", "num_workers": 1}
    return Namespace(**{**values, **changes})


def draw_samples(folder: Path, count: int = 6, size: int = 50, masks: bool = True) -> list[Sample]:
    """Write PNG files of noise; every second image is abnormal, with a rectangle as its mask."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(count):
        path, mask = folder / f"{i}.png", folder / f"{i}-mask.png"
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
        if i % 2 and masks:
            marked = np.zeros((size, size), np.uint8)
            marked[5 : 15 + i, 10:30] = 255
            Image.fromarray(marked).save(mask)
        samples.append(Sample(path, i % 2, (mask,) if i % 2 and masks else (), path.name))
    return samples


def unpacked(path: Path) -> Iterator[bytes]:
    """Bytes of a file and of its packed members, for tests that search them for text that must not be there."""
    content = path.read_bytes()
    yield content
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist())
    elif content[:2] == b"\x1f\x8b":
        yield zlib.decompress(content, 31)


def read_shot_list(path: Path, iterate: int) -> tuple[list[str], list[str]]:
    """The abnormal and the normal names in a list of shots: its lines `a-<iterate>:` and `n-<iterate>:`."""
    lines, warnings = parse_shot_list(path)
    return pick_names(lines, warnings, path, "a", iterate), pick_names(lines, warnings, path, "n", iterate)
