"""The flags of train.py, test.py and predict.py, the settings that a checkpoint stores, and functions of both.

`options` is a parsed command line (argparse's namespace); `Settings` is what shaped a checkpoint. This module does not
import torch, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from CLIP.config import ADAPTER_KINDS, FIDELITIES, PRETRAINS, ModelConfig
from dataset.layout import add_reading_flags, described, object_given, object_name
from dataset.readers.grey import AS_STORED, PLANES, ReadOptions
from dataset.readers.images import parse_window
from Prompt.states import TEXT_MOODS, read_prompts
from utils import InputError, Parser, integer, printable, read_json

if TYPE_CHECKING:
    from CLIP.weights import Weights
    from dataset.medical_few import MedicalDataset

VERSION = "0.3.0"

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
CACHES = ("auto", "gpu", "ram", "disk", "off")
CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32")
SELECTS = {
    "test": "best epoch on the test set",
    "valid": "best epoch on the validation images that are not shots",
    "last": "last epoch",
}
MAX_IMG_SIZE = 4096
MAX_TEXT = 200  # characters in an object's name: prompts have few words, and the tokenizer is slow on long texts


# Argparse types.
positive = integer(1)
count = integer(0)


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not a number above 0")
    return value


def matching(pattern: str, fault: str) -> Callable[[str], str]:
    """An argparse type: a text that matches a regular expression in full; `fault` is the message if it does not."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text, re.DOTALL):
            raise argparse.ArgumentTypeError(f"{text!r:.80} {fault}")
        return text

    return parse


nonblank_text = matching(rf"(?=.*\S).{{1,{MAX_TEXT}}}", f"is blank, or longer than {MAX_TEXT} characters")
nonempty_path = matching("[^\0]+", "is empty, or no path")  # an empty path would mean the current folder
run_name = matching(  # of its folder, and in W&B
    r"\w(?!.*\.\.)[\w .,=+@()-]{0,99}", "is not 1 to 100 letters, digits and _ - . , = + @ ( ) without '..'"
)
# See engine.metrics.choose_threshold.
threshold_rule = matching(
    r"f1|[ft]pr=(0|0?\.\d+)|tpr=1", "is not f1, fpr=RATE or tpr=RATE with a RATE from 0 to below 1"
)


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of each flag, unless it has none or its help text already states it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or "(default" in (action.help or ""):
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def flag(default: object, text: str, **options: object) -> dict[str, Any]:
    """A published flag that shapes a checkpoint: published default, help text, and argparse's `choices`, `type`, ..."""
    return {"default": default, "help": text, **options}


@dataclass(frozen=True)
class Settings:
    """Everything that shaped a checkpoint; stored in it, and applied whenever it is used.

    Fields with a `flag` are flags of train.py, and of test.py and predict.py, which check them against the checkpoint.
    """

    obj: str
    model_name: str = field(metadata=flag(
        "ViT-L-14-336", "CLIP model: a name in CLIP/model_configs, a JSON file, a folder, or hf-hub:OWNER/NAME",
        type=nonblank_text,
    ))  # fmt: skip
    pretrain: str = field(metadata=flag("openai", "where CLIP's weights come from", choices=PRETRAINS))
    fidelity: str = field(metadata=flag(
        "released", "released: as the published code computes; corrected: as CLIP was trained (docs/method.md)",
        choices=FIDELITIES,
    ))  # fmt: skip
    img_size: int = field(
        metadata=flag(240, "images are resized to this many pixels a side", type=integer(1, MAX_IMG_SIZE))
    )
    features_list: tuple[int, ...] = field(metadata=flag(
        None,
        "layers that adapters read, counted from 1 (default: quarters of the depth, 6 12 18 24 for ViT-L)",
        type=int, nargs="+",
    ))  # fmt: skip
    visionA: str = field(metadata=flag("MFCFC", "kind of adapter", choices=ADAPTER_KINDS))
    text_mood: str = field(metadata=flag("learnable_all", "which prompts learn their contexts", choices=TEXT_MOODS))
    contrast_mood: str = field(metadata=flag("yes", "subtract the other branch's text cosine", choices=("yes", "no")))
    dec_type: str = field(
        metadata=flag("mean", "how an image's patch scores are summarised", choices=("mean", "max", "both"))
    )
    loss_type: str = field(metadata=flag("sigmoid", "detection loss", choices=("sigmoid", "softmax")))
    prompt_name: str  # name of the object in the prompts
    pixel_metrics: bool  # whether the data set has masks; if so, images are scored by their segmentation maps
    weights_sha256: str
    eval_batch: int  # images scored together; affects the scores of MViTFC in `released` fidelity
    states: dict[str, list[str]] | None = None  # state phrases from --prompts; None: the published ones
    mask_above: int = 127  # mask grey level (0 to 255) above which a pixel is abnormal, in the training data
    reading: dict[str, Any] | None = None  # how images were read: window, plane, formats, deep; None: the defaults
    model_config: dict[str, Any] | None = None  # sizes of the model, which CLIP/model_configs may not hold
    version: str = ""  # of this project, when the checkpoint was made
    image_tower: str | None = field(default=None, metadata=flag(
        None, "DINOv2 as image tower: dinov2-small (or base ...), FOLDER, FILE, hf-hub:OWNER/NAME", type=nonblank_text,
    ))  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """The inverse of `to_dict`, for files of any version: unknown entries are ignored, later fields have defaults.

        Raises a `KeyError` if an entry without a default is missing.
        """
        known = {f.name: values[f.name] for f in fields(cls) if f.default is MISSING or f.name in values}
        return cls(**{**known, "features_list": tuple(known["features_list"])})

    @property
    def read_options(self) -> ReadOptions:
        """How training read files with more than 8 bits or more than one slice; the defaults if that is not stored."""
        reading = self.reading or {}
        window = reading.get("window")
        window = tuple(window) if isinstance(window, list) else window
        return ReadOptions(window, reading.get("plane", AS_STORED.plane), deep="deep" in reading)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON and for checkpoints read with weights_only=True."""
        return {**asdict(self), "features_list": list(self.features_list)}


MODEL_FLAGS: dict[str, dict[str, Any]] = {f.name: dict(f.metadata) for f in fields(Settings) if f.metadata}
# Flags of the published test program that have no effect in a test: they are accepted, and a note is printed.
NO_EFFECT_IN_TEST = ("exp_name", "epoch", "learning_rate", "save_model", "iterate")
# Flags that may change with --resume: length of the run, machine, and outputs; none that affects the numbers.
RESUMABLE = {
    "resume", "epoch", "data_path", "data_root", "weights", "device", "num_workers", "cache", "cache_dir", "save_path",
    "save_model", "out_json", "run_dir", "exp_name", "log_images_every", "log_model",
}  # fmt: skip
# Flags with paths of this machine, which are left out of all files that are shared.
PATHS = ("data_path", "data_root", "list", "weights", "save_path", "out_json", "cache_dir", "run_dir", "resume")


def new_settings(options: argparse.Namespace, dataset: MedicalDataset, weights: Weights) -> Settings:
    """The settings of a new checkpoint; `InputError` if --features_list does not fit the tower."""
    config = weights.config
    names = [name for name in MODEL_FLAGS if name not in ("features_list", "model_name", "image_tower")]
    return Settings(
        model_name=config.name,  # not the flag, which may be a path of this machine
        image_tower=config.tower.name or None,
        **{name: getattr(options, name) for name in names},
        obj=dataset.obj,
        features_list=check_layers(options.features_list, config),
        prompt_name=options.prompt_name or dataset.layout.prompt_name,
        states=options.prompts,
        pixel_metrics=dataset.pixel_metrics,
        weights_sha256=weights.sha256,
        eval_batch=2 * options.batch_size,
        mask_above=dataset.layout.mask_above,
        reading=dataset.reading,
        model_config=config.to_dict(),
        version=VERSION,
    )


# --- flags ---


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of train.py and test.py for data, machine and token store."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add(
        "--obj", type=object_name,
        help=f"data set, the paper's ({', '.join(described())}) or your own "
        "(default: --data_root's name, else Liver to train, Brain to test)"
    )  # fmt: skip
    add("--data_path", default="./data/", type=nonempty_path, help="folder that holds <obj>_AD")
    add("--data_root", type=nonempty_path, help="the data set's own folder, instead of <data_path>/<obj>_AD")
    add_reading_flags(group)
    add("--save_path", default="./ckpt/", type=nonempty_path, help="folder of <obj>.pth, the checkpoint")
    add("--weights", type=nonempty_path, help="file with CLIP weights (default: in CLIP/ckpt)")
    add("--seed", type=integer(-(2**63), 2**64 - 1), default=111, help="seed of all random draws")  # torch's range
    add("--out_json", type=nonempty_path, help="write the results to this file")
    add("--anonymous", action="store_true",
        help="replace file names, patients and UIDs with numbers in all output"
    )  # fmt: skip
    add_machine_flags(parser)
    add = parser.add_argument_group("token store (docs/method.md)").add_argument
    add("--cache", default="auto", choices=CACHES, help="where tokens are kept; auto: the first with room")
    add("--cache_dir", default=".cache/features", type=nonempty_path, help="folder of tokens kept on disk")
    add("--cache_dtype", default="auto", choices=CACHE_DTYPES, help="precision of kept tokens; auto: as computed")


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every script that runs a network."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--precision", default="auto", choices=PRECISIONS, help="auto: fp32 on a CPU, bf16 or fp16 on CUDA")
    add("--num_workers", type=integer(1, 256), default=2, help="threads that decode images")
    parser.add_argument("--version", action="version", version=f"MadCLIP {VERSION}")


def add_model_flags(parser: argparse.ArgumentParser, from_checkpoint: bool) -> None:
    """Add the flags that shape a checkpoint; with `from_checkpoint`, without defaults, as its values apply."""
    note = "as in the checkpoint; anything else is an error" if from_checkpoint else None
    group = parser.add_argument_group("model", note)
    for name, spec in MODEL_FLAGS.items():
        group.add_argument(f"--{name}", **{**spec, **({"default": None} if from_checkpoint else {})})


def add_shot_flags(group: Any, default: int | None) -> None:  # noqa: ANN401 - argparse's group is private
    """Add the flags for the number of labelled images."""
    group.add_argument("--shot", type=positive, default=default, help="labelled images of each class")
    group.add_argument("--shot_normal", type=count, help="labelled normal images (default: --shot)")
    group.add_argument("--shot_abnormal", type=count, help="labelled abnormal images, 0 for none (default: --shot)")


def train_parser() -> Parser:
    """The command line of train.py: the published flags with their published defaults, and our own flags."""
    description = "Train MadCLIP on a few labelled images."
    parser = Parser(prog="train.py", description=description, formatter_class=Formatter)
    add_data_flags(parser)
    add_model_flags(parser, from_checkpoint=False)
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--exp_name", type=run_name, help="name of the run in W&B and under runs/ (default: made from the settings)")
    add("--batch_size", type=integer(1, 65536), default=16, help="images per training step")
    add("--epoch", type=positive, default=60, help="number of epochs")
    add("--learning_rate", type=positive_float, default=0.001, help="learning rate of Adam")
    add_shot_flags(group, 16)
    add("--prompt_name", type=nonblank_text, help="what the prompts call the object (default: the data set's)")
    add("--prompts", type=read_prompts, metavar="FILE", help="JSON file with other state phrases (docs/data.md)")
    add("--iterate", type=int, default=0,
        help="K: lines a-K and n-K of the list of shots; negative: sample with --seed")  # fmt: skip
    add("--select", choices=tuple(SELECTS),
        help="epoch to report and save "
             "(default: test for the paper's six, else valid or last: docs/data.md)")  # fmt: skip
    add("--threshold_at", type=threshold_rule, default="f1", metavar="RULE",
        help="rule for the decision threshold: f1 (largest F1), fpr=RATE or tpr=RATE")  # fmt: skip
    add("--eval_every", type=positive, default=1, help="epochs between evaluations")
    add("--log_images_every", type=count, default=10,
        help="epochs between pictures in W&B; 0: upload no pictures and no file names")  # fmt: skip
    add("--log_model", action="store_true", help="upload the checkpoint to W&B as an artifact")
    add("--save_model", type=int, choices=(0, 1), nargs="?", const=1, default=1, help="write <obj>.pth (published: 0)")
    add("--no-save_model", dest="save_model", action="store_const", const=0, help="write none")
    add("--run_dir", default="runs", type=nonempty_path, help="folder of all runs")
    add("--resume", metavar="RUN", help="continue the run in this folder, with its settings")
    return parser


def test_parser() -> Parser:
    """The command line of test.py: every flag of the published test program, and our own flags."""
    description = "Test a MadCLIP checkpoint on a data set's test images."
    parser = Parser(prog="test.py", description=description, formatter_class=Formatter)
    add_data_flags(parser)
    add_model_flags(parser, from_checkpoint=True)
    add_shot_flags(parser.add_argument_group("shots", "checked against the checkpoint, if it names its shots"), None)
    published = parser.add_argument_group("published flags", "accepted, but without effect in a test")
    for name, kind in (("exp_name", str), ("epoch", positive), ("learning_rate", positive_float), ("iterate", int)):
        published.add_argument(f"--{name}", type=kind)
    published.add_argument("--save_model", type=int, choices=(0, 1), nargs="?", const=1)
    add = parser.add_argument
    add("--batch_size", type=integer(1, 65536), default=16, help="images computed together")
    add("--ckpt", type=nonempty_path, help="checkpoint (default: <save_path>/<obj>.pth)")
    add("--prompt_name", type=nonblank_text, help="what the prompts call the object (default: as in training)")
    add("--allow_other_weights", action="store_true",
        help="only warn if the CLIP weights differ from the training's")  # fmt: skip
    add("--save_scores", metavar="FILE", type=nonempty_path, help="write the patch scores (.npz)")
    add("--scores", metavar="FILE", type=nonempty_path, help="repeat the evaluation from this file, without weights")
    add("--figures", type=nonempty_path, help="folder for figures as PNG")
    add("--report", type=nonempty_path, help="folder for the report page, index.html")
    return parser


def predict_parser() -> Parser:
    """The command line of predict.py."""
    description = "Score your own images with a MadCLIP checkpoint. Research use, not a medical device."
    parser = Parser(prog="predict.py", description=description, formatter_class=Formatter)
    add = parser.add_argument
    add("images", nargs="*", type=nonempty_path, metavar="IMAGE_OR_FOLDER",
        help="PNG, JPEG, BMP, TIFF, WebP, GIF, JPEG 2000; DICOM (with pydicom), NIfTI (with nibabel)")  # fmt: skip
    add("--ckpt", required=True, type=nonempty_path, help="checkpoint of train.py, or one in the published format")
    add("--obj", help="data set that a published checkpoint was trained on")
    add("--weights", type=nonempty_path, help="file with CLIP weights (default: in CLIP/ckpt)")
    add("--allow_other_weights", action="store_true", help="only warn if the CLIP weights differ from the training's")
    add("--batch_size", type=integer(1, 65536), default=16, help="images computed together")
    add = parser.add_argument_group("reading").add_argument
    add("--window", nargs="+", metavar=("C W|auto|full", ""),
        help="CENTER WIDTH, auto (robust percentiles of a scan) or full: grey range beyond 8 bits "
        "(default: as in training, else the file's)")  # fmt: skip
    add("--plane", choices=PLANES, help="slicing plane of NIfTI volumes (default: as in training, else axial)")
    group = parser.add_argument_group("decisions")
    add = group.add_mutually_exclusive_group().add_argument
    add("--threshold", type=positive_float,
        help="images that score at least this are abnormal (default: the checkpoint's)")  # fmt: skip
    add("--calibrate", type=nonempty_path, metavar="FOLDER",
        help="set the threshold on labelled images, in any layout of docs/data.md")  # fmt: skip
    group.add_argument("--threshold_at", type=threshold_rule, metavar="RULE",
                       help="with --calibrate: f1 (default), fpr=RATE or tpr=RATE")  # fmt: skip
    group.add_argument("--save_ckpt", type=nonempty_path, metavar="FILE",
                       help="a copy of the checkpoint with the thresholds of --calibrate")  # fmt: skip
    add, switch = parser.add_argument_group("results").add_argument, argparse.BooleanOptionalAction
    add("--out", type=nonempty_path, help="folder of the results")
    add("--pictures", action=switch, default=True, help="write heat maps and contours")
    add("--volumes", action=switch, default=True, help="with --pictures, also write heat maps of scans as volumes")
    add("--group_by", choices=("series", "patient", "folder"), help="one row per group, in groups.csv")
    add("--report", type=nonempty_path, metavar="FOLDER",
        help="a page (index.html) with every image, highest scores first")  # fmt: skip
    add("--anonymous", action="store_true",
        help="replace file names, patients and UIDs with numbers in all results, but not in messages about "
        "unreadable files")  # fmt: skip
    add_machine_flags(parser)
    add_model_flags(parser, from_checkpoint=True)  # needed for published files, which do not store them
    return parser


# --- command lines ---


def train_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse train.py's command line; with --resume, the stored options are the defaults, and only some may change.

    Raises:
        InputError: the run to resume cannot be read, an option contradicts it, or there are no normal shots.
    """
    parser = train_parser()
    options = parser.parse_args(arguments)
    if options.resume is not None:
        stored = read_json(Path(options.resume) / "config.json", "--resume takes a run's folder")["options"]
        stored = {name: value for name, value in stored.items() if hasattr(options, name)}  # without removed flags
        parser.set_defaults(**stored)
        options = parser.parse_args(arguments)
        for name, before in stored.items():
            if name not in RESUMABLE and (given := getattr(options, name)) != before:
                raise InputError(f"--{name} {given} contradicts the run, started with {before}: leave it out")
    options.obj = options.obj or object_given(options) or "Liver"
    for name in ("shot_normal", "shot_abnormal"):
        if getattr(options, name) is None:
            setattr(options, name, options.shot)
    if not options.shot_normal:
        raise InputError("--shot_normal 0: training needs normal shots; only --shot_abnormal may be 0")
    return options


def test_options(
    arguments: Sequence[str] | None = None, defaults: Mapping[str, object] | None = None
) -> argparse.Namespace:
    """Parse test.py's command line; prints a line on stderr that names the flags without effect.

    `defaults` replace those of the parser. With --scores and without --obj, `obj` is None: the file of scores names the
    data set.
    """
    parser = test_parser()
    parser.set_defaults(**(defaults or {}))
    options = parser.parse_args(arguments)
    if options.obj is None and not options.scores:
        options.obj = object_given(options) or "Brain"
    given = [f"--{name}" for name in NO_EFFECT_IN_TEST if getattr(options, name) is not None]
    if given:
        print(f"{' '.join(given)}: no effect in a test", file=sys.stderr)
    return options


def predict_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse predict.py's command line; `InputError` if flags contradict each other or a required one is missing."""
    options = predict_parser().parse_intermixed_args(arguments)
    # --window takes one word or two; any words after these are images.
    words = options.window or []
    taken = 1 if words[:1] in (["auto"], ["full"]) else 2
    options.images += map(nonempty_path, words[taken:])
    options.window = parse_window(words[:taken])
    if (options.threshold_at or options.save_ckpt) and not options.calibrate:
        raise InputError("--threshold_at and --save_ckpt need labelled images: --calibrate FOLDER")
    if options.save_ckpt and os.path.realpath(options.save_ckpt) == os.path.realpath(options.ckpt):
        raise InputError(f"--save_ckpt {options.save_ckpt}: is the checkpoint itself; give another name")
    if not options.images and not options.calibrate:
        raise InputError("name images or folders of images")
    if options.images and not options.out:
        raise InputError("name the folder of the results: --out FOLDER")
    return options


def shared_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of train.py that a test on another data set shares: reading of images, machine, token store."""
    parser = argparse.ArgumentParser()
    add_data_flags(parser)
    own = {"obj", "data_root", "save_path", "out_json"}
    return {name: getattr(options, name) for name in vars(parser.parse_args([])) if name not in own}


def check_against(settings: Settings, metadata: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Raise an `InputError` if a flag contradicts the checkpoint; shots are checked only if the metadata names them."""
    for name in (name for name in MODEL_FLAGS if name != "image_tower"):  # its weights are compared instead
        given, stored = getattr(options, name), getattr(settings, name)
        if name == "model_name" and given is not None:
            given = ModelConfig.load(given).name
        if given is not None and given != (list(stored) if name == "features_list" else stored):
            raise contradiction(name, given, stored)
    shots, trained = metadata.get("shots"), metadata.get("options", {})
    if shots is None:
        return
    for kind in ("normal", "abnormal"):
        given = getattr(options, f"shot_{kind}")
        name = "shot" if given is None else f"shot_{kind}"
        given = options.shot if given is None else given
        stored = trained.get(f"shot_{kind}") or len(shots.get(kind, []))  # a list may name more shots than --shot
        if given is not None and given != stored:
            raise contradiction(name, given, f"{stored} {kind} shots")


def contradiction(name: str, given: object, stored: object, what: str = "checkpoint, which was trained") -> InputError:
    """The error for a flag that contradicts a checkpoint, or another source, which `what` describes."""
    given, stored = (" ".join(map(str, v)) if isinstance(v, list | tuple) else v for v in (given, stored))
    stored = "the default" if stored in (None, "") else stored
    return InputError(f"--{name} {given} contradicts the {what} with {stored}; leave it out")


def check_layers(layers: Sequence[int] | None, config: ModelConfig) -> tuple[int, ...]:
    """The layers to read, by default the quarters of the depth; adapter k reads the k-th layer of the list.

    Raises:
        InputError: a layer is given twice, or the tower does not have it.
    """
    if layers is None:
        return tuple(config.default_features())
    words = " ".join(map(str, layers))
    if min(layers) < 1 or max(layers) > config.layers:
        raise InputError(f"--features_list {words}: {printable(config.name)} has layers 1 to {config.layers}")
    if len(set(layers)) < len(layers):
        raise InputError(f"--features_list {words}: give each layer once")
    return tuple(layers)


def shots_label(options: argparse.Namespace) -> str:
    """The number of shots in words: 16shot, or 16n4a-shot if the classes differ."""
    normal, abnormal = options.shot_normal, options.shot_abnormal
    return f"{normal}shot" if normal == abnormal else f"{normal}n{abnormal}a-shot"


def shareable(options: argparse.Namespace | dict[str, Any]) -> dict[str, Any]:
    """The options without paths of this machine, for checkpoints, reports and W&B."""
    values = options if isinstance(options, dict) else vars(options)
    return {name: value for name, value in values.items() if name not in PATHS}
