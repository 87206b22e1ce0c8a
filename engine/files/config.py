"""Every flag once, the settings that a checkpoint keeps, and what follows from both.

Imports no torch, so that `--help` is instant.

`options` (argparse's namespace) is a command line, `Settings` what shaped a checkpoint.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from CLIP.config import ADAPTER_KINDS, FIDELITIES, PRETRAINS, ModelConfig
from dataset.layout import add_reading_flags, described, object_name, object_of
from Prompt.states import TEXT_MOODS, read_prompts, states_fault
from utils import InputError, Parser, checked, integer, printable

if TYPE_CHECKING:
    import torch

    from CLIP.weights import Weights
    from dataset.medical_few import MedicalDataset

VERSION = "0.2.0"

# Choices, in words: what they name lives in modules that import torch, and a test compares the two.
DEC_TYPES = ("mean", "max", "both")
LOSS_TYPES = ("sigmoid", "softmax")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
CACHES = ("auto", "gpu", "ram", "disk", "off")
CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32")
SELECTS = {
    "test": "best epoch on the test set",
    "valid": "best epoch on what is left of valid/ after the shots",
    "last": "last epoch",
}
PAPER = ("Brain", "Liver", "Retina_RESC", "Retina_OCT2017", "Chest", "Histopathology")  # the published data sets

NOT_GIVEN = "\0"  # no command line can hold it
MAX_IMG_SIZE = 4096
MAX_TEXT = 200  # characters of an object's name: prompts have few words, and the tokenizer takes long over long ones


# Argparse types.
positive = integer(1)
count = integer(0)


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not a number above 0")
    return value


def nonblank_text(text: str) -> str:
    """An argparse type: text that is not blank, nor longer than a checkpoint may hold."""
    if not text.strip() or len(text) > MAX_TEXT:
        raise argparse.ArgumentTypeError(f"is blank, or longer than {MAX_TEXT} characters")
    return text


def nonempty_path(text: str) -> str:
    """An argparse type: a path; not an empty one, which would be the current folder."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("is empty, or no path")
    return text


def run_name(text: str) -> str:
    """An argparse type: a name that may be a folder's, in W&B too."""
    if not text.strip() or not text.isprintable() or len(text) > 100 or len(os.fsencode(text)) > 255:
        raise argparse.ArgumentTypeError("give 1 to 100 printable characters")
    if text.startswith(("-", ".")) or ".." in text or set("/\\") & set(text):
        raise argparse.ArgumentTypeError(f"{text!r} begins with '-' or '.', or holds '/', '\\' or '..'")
    return text


def threshold_rule(text: str) -> str:
    """An argparse type: f1, fpr=RATE or tpr=RATE, see engine.calibration.Rule."""
    name, _, value = text.partition("=")
    try:
        valid = text == "f1" or (name in ("fpr", "tpr") and 0 <= float(value) < 1) or (name == "tpr" and value == "1")
    except ValueError:
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f"{text!r} is neither f1 nor fpr=RATE or tpr=RATE, a RATE from 0 to below 1")
    return text


def prompts_file(path: str) -> dict[str, list[str]]:
    """An argparse type: the state phrases in a JSON file, see `Prompt.read_prompts`."""
    return read_prompts(path)


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show defaults, but not where there is none or the help states it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, NOT_GIVEN) or "(default" in (action.help or ""):
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class DataRoot(argparse.Action):
    """--data_root: its folder names the data set too, unless --obj does, before or after it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,  # noqa: ANN401 - argparse's signature
        option_string: str | None = None,
    ) -> None:
        """Keep the folder, and its name where no other is given so far."""
        namespace.data_root = values
        if namespace.obj == NOT_GIVEN:
            namespace.obj = object_of(values)


class Switch(argparse.Action):
    """--flag, --no-flag, and the published `--flag 1`, `--flag 0`."""

    VALUES = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}  # noqa: RUF012

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:  # noqa: ANN401
        negative = [f"--no-{option.removeprefix('--')}" for option in option_strings]
        super().__init__([*option_strings, *negative], dest, nargs="?", metavar="0|1", **options)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,  # noqa: ANN401 - argparse's signature
        option_string: str | None = None,
    ) -> None:
        """Set it."""
        value = self.VALUES.get("true" if values is None else str(values).lower())
        if value is None:
            raise argparse.ArgumentError(self, f"{values!r} is neither 0 nor 1")
        setattr(namespace, self.dest, value != (option_string or "").startswith("--no-"))


# The published flags that shape a checkpoint, with the published defaults.
MODEL_FLAGS: dict[str, dict[str, Any]] = {
    "model_name": {
        "default": "ViT-L-14-336",
        "type": nonblank_text,
        "help": "the tower: a name in CLIP/model_configs, a JSON file, a folder, or hf-hub:OWNER/NAME",
    },
    "pretrain": {"default": "openai", "choices": PRETRAINS, "help": "where CLIP's weights come from"},
    "img_size": {
        "default": 240,
        "type": integer(1, MAX_IMG_SIZE),
        "help": "images are resized to this many pixels a side",
    },
    "features_list": {
        "default": None,
        "type": int,
        "nargs": "+",
        "help": "layers that adapters read, counted from 1 (default: the quarters of the depth, 6 12 18 24 for ViT-L)",
    },
    "text_mood": {"default": "learnable_all", "choices": TEXT_MOODS, "help": "which prompts learn their contexts"},
    "contrast_mood": {"default": "yes", "choices": ("yes", "no"), "help": "subtract the other branch's text cosine"},
    "dec_type": {"default": "mean", "choices": DEC_TYPES, "help": "how an image's patch scores are summarised"},
    "loss_type": {"default": "sigmoid", "choices": LOSS_TYPES, "help": "detection loss"},
    "visionA": {"default": "MFCFC", "choices": ADAPTER_KINDS, "help": "kind of adapter"},
    "fidelity": {
        "default": "released",
        "choices": FIDELITIES,
        "help": "released: as the published code computes; corrected: as CLIP was trained (docs/method.md)",
    },
}
# Published flags of the test program that mean nothing in a test: accepted, and said to have no effect.
NO_EFFECT_IN_TEST = ("exp_name", "epoch", "learning_rate", "save_model", "iterate")
# What --resume may change: the length, the machine, and what is written where; nothing that shapes the numbers.
RESUMABLE = {
    "resume", "epoch", "data_path", "data_root", "weights", "device", "num_workers", "cache", "cache_dir", "save_path",
    "save_model", "out_json", "run_dir", "exp_name", "log_images_every", "log_model",
}  # fmt: skip
READ_PATHS = ("data_path", "data_root", "weights")
WRITTEN_PATHS = ("save_path", "out_json", "cache_dir")  # of a run folder from elsewhere they are asked for again
PATHS = (*READ_PATHS, *WRITTEN_PATHS, "run_dir", "resume")  # no shared file holds one


@dataclass(frozen=True)
class Settings:
    """Everything that shaped a checkpoint: stored in it, and obeyed by whoever reads it."""

    obj: str
    model_name: str
    pretrain: str
    fidelity: str
    img_size: int
    features_list: tuple[int, ...]
    visionA: str
    text_mood: str
    contrast_mood: str
    dec_type: str
    loss_type: str
    prompt_name: str  # what the prompts call the object
    pixel_metrics: bool  # the data set has masks: images are scored by their segmentation maps
    weights_sha256: str
    eval_batch: int  # images scored together: MViTFC in `released` fidelity depends on it
    states: dict[str, list[str]] | None = None  # state phrases of --prompts; None: the published ones
    mask_above: int = 127  # a mask's grey, of 255, above which a pixel is abnormal
    reading: dict[str, Any] | None = None  # how pictures beyond 8 bits were read: window, plane; None: the defaults
    model_config: dict[str, Any] | None = None  # the sizes of a tower that CLIP/model_configs does not name
    version: str = ""  # of this project, when the checkpoint was made

    @classmethod
    def from_dict(cls, values: object, where: str = "settings") -> Settings:
        """The inverse of `to_dict`; unknown entries are ignored and late ones default, so any version reads any.

        Raises:
            InputError: an entry that is missing, of another type, or not among a flag's choices.
        """
        settings = checked(cls, values, where)
        for name, spec in MODEL_FLAGS.items():
            value = getattr(settings, name)
            if spec.get("choices") and value not in spec["choices"]:
                raise InputError(f"{where}: {name} is {value!r:.80}")
        layers = settings.features_list
        if not layers or len(set(layers)) < len(layers) or min(layers) < 1:
            raise InputError(f"{where}: features_list is {list(layers)!r:.80}")
        if not 0 <= settings.mask_above <= 254:
            raise InputError(f"{where}: mask_above is {settings.mask_above}")
        texts = (settings.model_name, settings.prompt_name, settings.obj)
        if not 0 < settings.img_size <= MAX_IMG_SIZE or settings.eval_batch < 1 or max(map(len, texts)) > MAX_TEXT:
            raise InputError(f"{where}: img_size, eval_batch or a name is out of range")
        return settings

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON and for checkpoints read with weights_only=True."""
        return {**asdict(self), "features_list": list(self.features_list)}

    def tested_with(self, options: argparse.Namespace) -> Settings:
        """The settings of a test, which may say another prompt name and another grey of masks."""
        prompt_name = options.prompt_name or self.prompt_name
        mask_above = self.mask_above if options.mask_above is None else options.mask_above
        return replace(self, prompt_name=prompt_name, mask_above=mask_above)


def new_settings(options: argparse.Namespace, dataset: MedicalDataset, weights: Weights) -> Settings:
    """The settings of a new checkpoint."""
    config = weights.config
    names = [name for name in MODEL_FLAGS if name not in ("features_list", "model_name")]
    return Settings(
        model_name=config.name,  # not the flag, which may be a path of this machine
        **{name: getattr(options, name) for name in names},
        obj=dataset.obj,
        features_list=check_layers(options.features_list, config),
        prompt_name=options.prompt_name or dataset.prompt_name,
        states=options.prompts,
        pixel_metrics=dataset.pixel_metrics,
        weights_sha256=weights.sha256,
        eval_batch=2 * options.batch_size,
        mask_above=dataset.mask_above,
        reading=dataset.reading,
        model_config=config.to_dict(),
        version=VERSION,
    )


def add_data_flags(parser: argparse.ArgumentParser, obj: str) -> None:
    """Flags of train.py and test.py: data, machine, kept tokens."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--obj",
        default=NOT_GIVEN,
        type=lambda text: object_name(obj if text == NOT_GIVEN else text),  # argparse passes string defaults through it
        help=f"data set: {', '.join(described())}, or your own (default: the name of --data_root's folder, else {obj})",
    )
    data.add_argument("--data_path", default="./data/", type=nonempty_path, help="folder that holds <obj>_AD")
    data.add_argument(
        "--data_root", action=DataRoot, type=nonempty_path,
        help="the data set's own folder, instead of <data_path>/<obj>_AD",
    )  # fmt: skip
    add_reading_flags(data)
    data.add_argument("--save_path", default="./ckpt/", type=nonempty_path, help="folder of <obj>.pth, the checkpoint")
    data.add_argument("--weights", type=nonempty_path, help="file with CLIP weights, instead of the one in CLIP/ckpt")
    data.add_argument(
        "--seed", type=integer(-(2**63), 2**64 - 1), default=111, help="of every random draw"
    )  # torch's range
    data.add_argument("--out_json", type=nonempty_path, help="write the results to this file")
    data.add_argument(
        "--anonymous", action="store_true",
        help="hashes instead of file names in checkpoints, results, reports and W&B",
    )  # fmt: skip
    add_machine_flags(parser)
    tokens = parser.add_argument_group("token store (docs/method.md)")
    tokens.add_argument(
        "--cache",
        default="auto",
        choices=CACHES,
        help="where tokens are kept; auto: the first of gpu, ram, disk with room",
    )
    tokens.add_argument(
        "--cache_dir", default=".cache/features", type=nonempty_path, help="folder of tokens kept on disk"
    )
    tokens.add_argument(
        "--cache_dtype", default="auto", choices=CACHE_DTYPES,
        help="precision of kept tokens; auto: as computed, so float32 on a CPU and the autocast type on CUDA",
    )  # fmt: skip


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every script that runs a network."""
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    machine.add_argument(
        "--precision", default="auto", choices=PRECISIONS, help="auto: fp32 on a CPU, bf16 or fp16 on CUDA"
    )
    machine.add_argument("--num_workers", type=integer(1, 256), default=2, help="threads that decode images")
    parser.add_argument("--version", action="version", version=f"MadCLIP {VERSION}")


def add_model_flags(parser: argparse.ArgumentParser, from_checkpoint: bool) -> None:
    """The flags that shape a checkpoint; test.py takes them only to contradict them."""
    note = "checked against the checkpoint, which decides" if from_checkpoint else None
    group = parser.add_argument_group("model", note)
    for name, spec in MODEL_FLAGS.items():
        group.add_argument(f"--{name}", **{**spec, **({"default": None} if from_checkpoint else {})})


def add_shot_flags(group: Any, default: int | None) -> None:  # noqa: ANN401 - argparse's group is private
    """The number of labelled images."""
    group.add_argument("--shot", type=positive, default=default, help="labelled images of each class")
    group.add_argument("--shot_normal", type=count, help="labelled normal images (default: --shot)")
    group.add_argument("--shot_abnormal", type=count, help="labelled abnormal images, 0 for none (default: --shot)")


def train_parser() -> Parser:
    """The command line of train.py: the published flags with the published defaults, and ours beside them."""
    description = "Train MadCLIP on a few labelled images; docs/flags.md lists these flags too."
    parser = Parser(prog="train.py", description=description, formatter_class=Formatter)
    add_data_flags(parser, obj="Liver")
    add_model_flags(parser, from_checkpoint=False)
    group = parser.add_argument_group("training")
    group.add_argument(
        "--exp_name", type=run_name, help="name of the run in W&B and under runs/ (default: made from the settings)"
    )
    group.add_argument(
        "--batch_size",
        type=integer(1, 65536),
        default=16,
        help="images a training step; twice as many are scored together",
    )
    group.add_argument("--epoch", type=positive, default=60, help="number of epochs")
    group.add_argument("--learning_rate", type=positive_float, default=0.001, help="learning rate of Adam")
    add_shot_flags(group, 16)
    group.add_argument(
        "--prompt_name", type=nonblank_text, help="what the prompts call the object (default: the data set's)"
    )
    group.add_argument(
        "--prompts", type=prompts_file, metavar="FILE", help="JSON file with other state phrases (docs/data.md)"
    )
    group.add_argument(
        "--iterate",
        type=int,
        default=0,
        help="K takes lines a-K: and n-K: of the list of shots; negative: sample with --seed",
    )
    group.add_argument(
        "--select", choices=tuple(SELECTS),
        help="which epoch is reported and saved (default: test, the published protocol, for the paper's six data sets; "
        "else valid where it holds both classes beside the shots, else last)",
    )  # fmt: skip
    group.add_argument(
        "--threshold_at", type=threshold_rule, default="f1", metavar="RULE",
        help="how the decision threshold is set: f1 (the largest), fpr=RATE or tpr=RATE",
    )  # fmt: skip
    group.add_argument("--eval_every", type=positive, default=1, help="epochs between evaluations")
    group.add_argument(
        "--log_images_every", type=count, default=10,
        help="epochs between uploads of pictures to W&B; the last epoch is always uploaded; 0: no picture and no file "
        "name leaves this machine",
    )  # fmt: skip
    group.add_argument("--log_model", action="store_true", help="upload the checkpoint to W&B as an artifact")
    group.add_argument("--save_model", action=Switch, default=True, help="write <obj>.pth (published: off)")
    group.add_argument("--run_dir", default="runs", type=nonempty_path, help="folder that holds a folder for each run")
    group.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, with its settings")
    return parser


def train_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """train.py's command line; with --resume the stored options, and those given that may change."""
    options = train_parser().parse_args(arguments)
    if options.resume is not None:
        options = resumed_options(options.resume, sys.argv[1:] if arguments is None else arguments)
    for flag in ("shot_normal", "shot_abnormal"):
        if getattr(options, flag) is None:
            setattr(options, flag, options.shot)
    if not options.shot_normal:
        raise InputError("--shot_normal 0: training needs normal shots; only --shot_abnormal may be 0")
    return options


def resumed_options(folder: str, arguments: Sequence[str]) -> argparse.Namespace:
    """The options in a run's config.json, read as a command line would be, and over them those that are given."""
    from engine.files.run import RunFolder  # noqa: PLC0415 - imports torch

    stored = RunFolder.open(folder).read_config()["options"]
    parser = train_parser()
    prompts = stored.pop("prompts", None)
    if prompts is not None and (fault := states_fault(prompts)):
        raise InputError(f"--resume {folder}: its config.json is damaged (prompts: {fault})")
    words = [word for name, value in stored.items() for word in to_arguments(parser, name, value)]
    parser.where = f"--resume {folder}: its config.json is damaged"
    before = parser.parse_args(words)
    parser.where = ""
    options = parser.parse_args([*words, *arguments])
    for name, value in vars(before).items():
        if name in stored and stored[name] != value:  # of another type
            raise InputError(f"--resume {folder}: its config.json is damaged ({name} is {stored[name]!r:.80})")
    before.prompts = prompts
    options.prompts = prompts if options.prompts is None else options.prompts
    for name, value in vars(before).items():
        if name not in RESUMABLE and getattr(options, name) != value:
            raise InputError(
                f"--{name} {getattr(options, name)} contradicts the run, started with {value}: leave it out"
            )
    given = given_options(arguments)
    safe = (Path.cwd().resolve(), Path(folder).resolve())
    for name in WRITTEN_PATHS:
        value = getattr(options, name)
        if value is not None and name not in given:
            place = Path(value).resolve()
            if not any(place.is_relative_to(root) for root in safe):
                raise InputError(
                    f"--resume {folder}: the run's --{name} {value} lies outside of this folder: give --{name} again"
                )
    return options


def given_options(arguments: Sequence[str]) -> dict[str, Any]:
    """The options that a command line of train.py names, without defaults."""
    parser = train_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(list(arguments)))


def to_arguments(parser: argparse.ArgumentParser, name: str, value: object) -> list[str]:
    """A stored option as words of a command line; none for what is not set, or not known any more.

    Raises:
        InputError: a value of a kind that no command line gives.
    """
    action = next((action for action in parser._actions if action.dest == name), None)
    if action is None or name == "resume" or (value is None and action.default in (None, NOT_GIVEN)):
        return []
    if isinstance(action, argparse._StoreTrueAction | Switch):
        if not isinstance(value, bool):
            raise InputError(f"config.json: {name} is {value!r:.80}")
        if isinstance(action, Switch):
            return [f"--{name}={int(value)}"]
        return [f"--{name}"] if value else []
    if action.nargs == "+" and value is None:
        return []
    values = value if isinstance(value, list) and action.nargs == "+" else [value]
    if not values or not all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in values):
        raise InputError(f"config.json: {name} is {value!r:.80}")
    texts = [str(item) for item in values]
    return [f"--{name}={texts[0]}"] if len(texts) == 1 else [f"--{name}", *texts]


def test_parser() -> Parser:
    """The command line of test.py: every flag of the published one, and ours."""
    description = "Test a MadCLIP checkpoint on a data set's test images."
    parser = Parser(prog="test.py", description=description, formatter_class=Formatter)
    add_data_flags(parser, obj="Brain")
    add_model_flags(parser, from_checkpoint=True)
    add_shot_flags(parser.add_argument_group("shots", "checked against the checkpoint, if it names its shots"), None)
    published = parser.add_argument_group("published flags", "accepted, but without effect in a test")
    for name, kind in (("exp_name", str), ("epoch", positive), ("learning_rate", positive_float), ("iterate", int)):
        published.add_argument(f"--{name}", type=kind)
    published.add_argument("--save_model", action=Switch, default=None)
    parser.add_argument(
        "--batch_size", type=integer(1, 65536), default=16,
        help="images through the tower at a time; a checkpoint in the published format also scores so many together",
    )  # fmt: skip
    parser.add_argument("--ckpt", type=nonempty_path, help="checkpoint (default: <save_path>/<obj>.pth)")
    parser.add_argument(
        "--prompt_name", type=nonblank_text, help="what the prompts call the object (default: as in training)"
    )
    parser.add_argument(
        "--allow_other_weights",
        action="store_true",
        help="warn, instead of stopping, where CLIP weights differ from training",
    )
    parser.add_argument("--save_scores", metavar="FILE", type=nonempty_path, help="keep the patch scores (.npz)")
    parser.add_argument(
        "--scores", metavar="FILE", type=nonempty_path,
        help="make every number and figure from patch scores that were kept, without weights",
    )  # fmt: skip
    parser.add_argument("--figures", type=nonempty_path, help="folder for figures as PNG")
    parser.add_argument("--report", type=nonempty_path, help="folder for the report page, index.html")
    return parser


def test_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """test.py's command line; a line on stderr names the flags that have no effect."""
    options = test_parser().parse_args(arguments)
    given = [f"--{name}" for name in NO_EFFECT_IN_TEST if getattr(options, name) is not None]
    if given:
        print(f"{' '.join(given)}: no effect in a test", file=sys.stderr)
    return options


def check_against(settings: Settings, metadata: Mapping[str, Any], options: argparse.Namespace) -> None:
    """`InputError` where a flag contradicts the checkpoint; a published one's metadata do not name its shots."""
    for name in MODEL_FLAGS:
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
        stored = trained.get(f"shot_{kind}") or len(shots.get(kind, []))  # a list may name more than were asked for
        if given is not None and given != stored:
            raise contradiction(name, given, f"{stored} {kind} shots")


def contradiction(name: str, given: object, stored: object) -> InputError:
    """What to say where a flag contradicts a checkpoint."""
    given, stored = (" ".join(map(str, v)) if isinstance(v, list | tuple) else v for v in (given, stored))
    return InputError(f"--{name} {given} contradicts the checkpoint, which was trained with {stored}; leave it out")


def check_layers(layers: Sequence[int] | None, config: ModelConfig) -> tuple[int, ...]:
    """The layers to read: by default the quarters of the depth; adapter k reads the k-th layer of the list.

    Raises:
        InputError: a layer twice, or one that the tower does not have.
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
    """16shot, or 16n4a-shot where the classes differ."""
    normal, abnormal = options.shot_normal, options.shot_abnormal
    return f"{normal}shot" if normal == abnormal else f"{normal}n{abnormal}a-shot"


def shareable(options: argparse.Namespace | dict[str, Any]) -> dict[str, Any]:
    """The options without any path of this machine: what checkpoints, reports and W&B may hold."""
    values = options if isinstance(options, dict) else vars(options)
    return {name: value for name, value in values.items() if name not in PATHS}


def default_select(is_papers: bool, valid_left: Callable[[], tuple[int, int]]) -> str:
    """--select where it is not given: `is_papers` says whether the data are the paper's own.

    `valid_left` counts the normal and abnormal images of valid/ beside the shots.
    """
    if is_papers:
        return "test"
    return "valid" if min(valid_left()) > 0 else "last"


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; `InputError` for a device that is not there."""
    import torch  # noqa: PLC0415

    if name == "auto":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))  # of torchrun: a GPU each
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", name, re.ASCII):
        raise InputError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here")
    return device


def pick_autocast(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype that --precision means on `device`; None is float32."""
    import torch  # noqa: PLC0415

    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
