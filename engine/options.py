"""Command-line arguments, once for train.py and test.py, and what follows from them: device, precision, store."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from CLIP import ADAPTERS, CLIP, FIDELITIES, PRETRAINS, ModelConfig, list_models
from dataset import OBJECTS, MedicalDataset, named_after, object_name
from loss import DEC_TYPES, LOSS_TYPES
from Prompt import TEXT_MOODS
from utils import InputError, integer, temporary_path

from . import distributed
from .detector import Detector, Settings
from .features import DTYPES, MODES, Backbone, FeatureStore

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
CUDA_PASS_BATCH = 64  # images through the tower at a time: 18,560 tokens at ViT-L-14, 240 px; no gradients to keep


NOT_GIVEN = "\0"  # no command line can hold it
MAX_IMG_SIZE = 4096

# Argparse types.
positive = integer(1)
count = integer(0)


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not a number above 0")
    return value


def words(text: str) -> str:
    """An argparse type: text that is not blank, nor longer than a checkpoint may hold."""
    if not text.strip() or len(text) > 200:
        raise argparse.ArgumentTypeError("is blank, or longer than 200 characters")
    return text


def filled_path(text: str) -> Path:
    """An argparse type: a path; not an empty one, which would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return Path(text)


def run_name(text: str) -> str:
    """An argparse type: a name that may be a folder's, in W&B too."""
    if not text.strip() or not text.isprintable() or len(text) > 100 or len(os.fsencode(text)) > 255:
        raise argparse.ArgumentTypeError("give 1 to 100 printable characters")
    if text.startswith(("-", ".")) or ".." in text or set("/\\") & set(text):
        raise argparse.ArgumentTypeError(f"{text!r} begins with '-' or '.', or holds '/', '\\' or '..'")
    return text


# The published flags that shape a checkpoint, with the published defaults.
MODEL_FLAGS = {
    "model_name": {"default": "ViT-L-14-336", "choices": list_models(), "help": "a file of CLIP/model_configs"},
    "pretrain": {"default": "openai", "choices": PRETRAINS, "help": "where CLIP's weights come from"},
    "img_size": {"default": 240, "type": integer(1, MAX_IMG_SIZE), "help": "pixels a side that images are resized to"},
    "features_list": {
        "default": None,
        "type": int,
        "nargs": "+",
        "help": "layers that adapters read, counted from 1 (default: the quarters of the depth, 6 12 18 24 for ViT-L)",
    },
    "text_mood": {"default": "learnable_all", "choices": TEXT_MOODS, "help": "which prompts learn their contexts"},
    "contrast_mood": {"default": "yes", "choices": ("yes", "no"), "help": "subtract the other branch's text cosine"},
    "dec_type": {"default": "mean", "choices": DEC_TYPES, "help": "how patches are summarised for an image"},
    "loss_type": {"default": "sigmoid", "choices": LOSS_TYPES, "help": "detection loss"},
    "visionA": {"default": "MFCFC", "choices": tuple(ADAPTERS), "help": "kind of adapter"},
    "fidelity": {
        "default": "released",
        "choices": FIDELITIES,
        "help": "what the published code does, or what CLIP was trained with (README: Fidelity)",
    },
}


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show defaults, but not where there is none or the help says it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, NOT_GIVEN) else super()._get_help_string(action)


class DataRoot(argparse.Action):
    """--data_root: its folder names the data set too, unless --obj does, before or after it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str,
        option_string: str | None = None,
    ) -> None:
        """Keep the folder, and its name where no other is given so far."""
        if not values:  # Path("") would be the current folder
            raise argparse.ArgumentError(self, "is empty")
        namespace.data_root = values
        if namespace.obj == NOT_GIVEN:
            namespace.obj = named_after(values)


def add_data_flags(parser: argparse.ArgumentParser, obj: str) -> None:
    """Flags of both scripts: data, machine, features, results."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--obj",
        default=NOT_GIVEN,
        type=lambda text: object_name(obj if text == NOT_GIVEN else text),  # argparse passes string defaults through it
        help=f"data set: {', '.join(OBJECTS)}, or your own (default: the name of --data_root's folder, else {obj})",
    )
    data.add_argument("--data_path", default="./data/", help="folder that holds <obj>_AD")
    data.add_argument("--data_root", action=DataRoot, help="the data set's own folder, instead of <data_path>/<obj>_AD")
    data.add_argument(
        "--batch_size", type=integer(1, 65536), default=16, help="images a training step; scoring takes two such"
    )
    data.add_argument("--save_path", default="./ckpt/", help="folder of checkpoints")
    data.add_argument("--weights", help="file with CLIP weights, instead of the one under CLIP/ckpt")
    data.add_argument("--seed", type=integer(-(2**63), 2**64 - 1), default=111)  # as torch takes it
    data.add_argument("--out_json", help="write the results to this file")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    machine.add_argument(
        "--precision", default="auto", choices=PRECISIONS, help="auto: fp32 on a CPU, bf16 or fp16 on CUDA"
    )
    machine.add_argument(
        "--num_workers", type=integer(1, 256), default=2, help="threads that decode images beside the network"
    )
    features = parser.add_argument_group("features (README: The feature store)")
    features.add_argument("--cache", default="auto", choices=MODES, help="where the frozen tower's tokens are kept")
    features.add_argument("--cache_dir", default=".cache/features", help="folder of the disk store")
    features.add_argument("--cache_dtype", default="float16", choices=tuple(DTYPES), help="how tokens are kept")


def add_model_flags(parser: argparse.ArgumentParser, from_checkpoint: bool) -> None:
    """The flags that shape a checkpoint; test.py takes them only to contradict them."""
    note = "checked against the checkpoint, which decides" if from_checkpoint else None
    group = parser.add_argument_group("model", note)
    for name, spec in MODEL_FLAGS.items():
        group.add_argument(f"--{name}", **{**spec, **({"default": None} if from_checkpoint else {})})


def check_layers(layers: list[int] | None, config: ModelConfig) -> tuple[int, ...]:
    """The layers to read: the default where none are given; `InputError` for what the tower does not have."""
    if layers is None:
        return tuple(config.default_features())
    if min(layers) < 1 or max(layers) > config.layers:
        raise InputError(f"--features_list {' '.join(map(str, layers))}: {config.name} has layers 1 to {config.layers}")
    if list(layers) != sorted(set(layers)):
        raise InputError(f"--features_list {' '.join(map(str, layers))}: give each layer once, in ascending order")
    return tuple(layers)


def make_settings(options: argparse.Namespace, dataset: MedicalDataset, clip: CLIP) -> Settings:
    """The settings of a new checkpoint."""
    names = [name for name in MODEL_FLAGS if name != "features_list"]
    return Settings(
        **{name: getattr(options, name) for name in names},
        obj=dataset.obj,
        features_list=check_layers(options.features_list, clip.config),
        prompt_name=dataset.prompt_name if options.prompt_name is None else options.prompt_name,
        states=options.prompts,
        pixel_metrics=dataset.pixel_metrics,
        weights_sha256=clip.info.sha256,
        eval_batch=2 * options.batch_size,
    )


def check_against(settings: Settings, options: argparse.Namespace) -> None:
    """`InputError` where a flag contradicts the checkpoint."""
    for name in MODEL_FLAGS:
        given, stored = getattr(options, name), getattr(settings, name)
        if given is not None and given != (list(stored) if name == "features_list" else stored):
            raise InputError(
                f"--{name} {given} contradicts the checkpoint, which was trained with {stored}; leave it out"
            )


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; `InputError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda", distributed.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", name, re.ASCII):
        raise InputError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here")
    return device


def pick_autocast(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype that --precision means on `device`; None is float32."""
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def make_store(
    options: argparse.Namespace, clip: CLIP, detector: Detector, layers: Iterable[int] = (), class_token: bool = False
) -> FeatureStore:
    """The feature store that the flags ask for: it keeps what `detector` reads, more `layers`, the class token."""
    backbone = Backbone(
        clip,
        sorted({*detector.settings.features_list, *layers}),
        detector.adapters.reads_class_token or class_token,
        pick_autocast(options.precision, clip.device),
    )
    # A CPU is busy with 16 images; a GPU wants more at a time.
    batch = options.batch_size if clip.device.type == "cpu" else max(options.batch_size, CUDA_PASS_BATCH)
    return FeatureStore(backbone, options.cache, options.cache_dir, options.cache_dtype, batch, options.num_workers)


def say_weights(clip: CLIP) -> None:
    """Print where the weights come from, loudly where nothing is pre-trained."""
    print(f"weights: {clip.info.source}, SHA-256 {clip.info.sha256[:16]}...", flush=True)
    if clip.info.pretrain == "random":
        print("weights: RANDOM, nothing is pre-trained: scores show that the program runs, not what MadCLIP can do")


def writable(path: str | Path, flag: str) -> Path:
    """Make sure that `atomic_path` can write a file there before hours are spent on what it will hold."""
    with temporary_path(path, flag) as probe:
        probe.touch()
    return Path(path)
