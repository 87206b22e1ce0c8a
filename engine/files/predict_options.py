"""The command line of predict.py. Imports no torch, so that `--help` is instant."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from dataset.readers.grey import PLANES
from dataset.readers.images import parse_window
from utils import InputError, Parser, integer

from .config import Formatter, add_machine_flags, add_model_flags, nonempty_path, positive_float, threshold_rule


def predict_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; `InputError` for flags that do not belong together."""
    options = predict_parser().parse_intermixed_args(arguments)
    # --window takes one word or two, and what follows these are images.
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
    add(
        "--threshold",
        type=positive_float,
        help="images that score at least this are abnormal (default: the checkpoint's)",
    )
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
    add("--group_by", choices=("series", "patient", "folder"), help="a row for each, in groups.csv")
    add("--report", type=nonempty_path, metavar="FOLDER",
        help="a page (index.html) with every image, highest scores first")  # fmt: skip
    add("--anonymous", action="store_true",
        help="replace file names, patients and UIDs with numbers in all results, but not in messages about "
        "unreadable files")  # fmt: skip
    add_machine_flags(parser)
    add_model_flags(parser, from_checkpoint=True)  # for published files, which do not say
    return parser
