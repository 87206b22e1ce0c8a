"""Look at checkpoints, and convert them.

python -m engine.checkpoint show CKPT [--card]        settings, shots, metrics, weights' hash; or a card in Markdown
python -m engine.checkpoint export CKPT OUT           the published format, with CLIP's text encoder in it
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from CLIP.clip import create_model
from CLIP.config import ModelConfig
from dataset.layout import BENCHMARKS, config_path, read_config
from utils import InputError, Parser, printable, probe_writable, run_cli

from .detector import Detector
from .export import card
from .files.checkpoint import METADATA, Checkpoint, check_weights, read_file, write_file
from .files.config import MODEL_FLAGS, Settings
from .files.published import to_published

PUBLISHED_LAYERS = (6, 12, 18, 24)  # the default of --features_list in the published program


def show(path: str) -> None:
    """Print the content of a checkpoint."""
    for name, part in read_file(path).items():
        if name in ("settings", METADATA):
            print(f"{'metadata' if name == METADATA else name}: {json.dumps(part, indent=2)}")
        elif isinstance(part, dict):
            tensors = [tensor for tensor in part.values() if isinstance(tensor, torch.Tensor)]
            print(f"{printable(name)}: {len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors):,} numbers")
        elif isinstance(part, torch.Tensor):
            print(f"{printable(name)}: {tuple(part.shape)}")


def export_file(path: str, out: str, weights_file: str | None) -> None:
    """Write a checkpoint of this project in the published format, and print notes; `InputError` with a DINOv2 tower."""
    if Path(out).exists() and Path(out).samefile(path):
        raise InputError(f"{out}: is the checkpoint itself, whose settings the published format cannot hold")
    probe_writable(out, "OUT", "checkpoint", read_file)
    checkpoint = Checkpoint.load(path)
    settings = checkpoint.settings
    if settings.image_tower:
        raise InputError(f"{path}: the published program knows no image tower but CLIP's, not {settings.image_tower}")
    known = ModelConfig.from_dict(settings.model_config) if settings.model_config else settings.model_name
    clip = create_model(
        known, settings.pretrain, settings.img_size, weights=weights_file, fidelity=settings.fidelity,
        seed=checkpoint.seed, vision=False,
    )  # fmt: skip
    assert clip.info is not None
    check_weights(checkpoint, clip.info, path)
    detector = Detector(clip, settings)
    checkpoint.restore(detector, clip, path)
    write_file(to_published(detector, clip), out)
    print(f"{out}: written in the published format")
    for line in export_notes(settings):
        print(f"{out}: {line}")


def export_notes(settings: Settings) -> Iterator[str]:
    """Notes for the user: flags that the published test program needs, and settings that it cannot express."""
    flags = {name: getattr(settings, name) for name in MODEL_FLAGS if name != "fidelity"}
    defaults = {name: flag["default"] for name, flag in MODEL_FLAGS.items()} | {"features_list": PUBLISHED_LAYERS}
    if settings.visionA == "MViTFC":  # attends across the images of a batch
        flags["batch_size"] = settings.eval_batch
    words = [
        f"--{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in flags.items()
        if value != defaults.get(name)
    ]
    if words:
        yield f"the published test program needs {' '.join(words)}"
    known = read_config(config_path(settings.obj)).get("prompt_name") if settings.obj in BENCHMARKS else None
    lost = {
        "--fidelity corrected": settings.fidelity != "released",
        "--prompts": settings.states is not None,
        f"--prompt_name {settings.prompt_name}": known not in (None, settings.prompt_name),
        f"the data set {settings.obj}": known is None,
    }
    for what in (what for what, applies in lost.items() if applies):
        yield f"its results differ there, as the published format cannot express {what}"


def main() -> None:
    """Run the command line."""
    parser = Parser(prog="python -m engine.checkpoint", description="Look at or convert checkpoints.")
    actions = parser.add_subparsers(dest="action", required=True)
    shower = actions.add_parser("show", help="print what a checkpoint holds")
    shower.add_argument("ckpt", help="a checkpoint, also in the published format")
    shower.add_argument("--card", action="store_true", help="a model card in Markdown, of a checkpoint of train.py")
    exporter = actions.add_parser("export", help="write the published format")
    exporter.add_argument("ckpt", help="a checkpoint of train.py")
    exporter.add_argument("out", help="the file to write")
    exporter.add_argument("--weights", help="file with CLIP weights, instead of the one in CLIP/ckpt")
    options = parser.parse_args()
    if options.action == "show" and options.card:
        checkpoint = Checkpoint.load(options.ckpt)
        print(card(checkpoint.settings, checkpoint.metadata))
    elif options.action == "show":
        show(options.ckpt)
    else:
        export_file(options.ckpt, options.out, options.weights)


if __name__ == "__main__":
    run_cli(main)
