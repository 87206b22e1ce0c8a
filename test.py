"""Test a MadCLIP checkpoint.

    python test.py --obj Liver                                  the checkpoint ckpt/Liver.pth on Liver's test set
    python test.py --obj Brain --ckpt FILE --out_json result.json --figures pictures
    python test.py --obj Liver --ckpt ckpt/Brain.pth            trained on one data set, tested on another

Arguments -> checkpoint -> metrics. Everything that shaped the checkpoint is read from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from CLIP import create_model
from dataset import MedicalDataset
from engine import distributed
from engine.calibrate import describe_threshold, figures
from engine.detector import Settings
from engine.evaluate import evaluate, published_lines, result_json
from engine.features import Item
from engine.loading import load_detector
from engine.options import (
    Formatter,
    add_data_flags,
    add_model_flags,
    check_against,
    make_store,
    words,
    writable,
)
from engine.page import Report
from engine.report import Sheet, find_history, read_history, save_figures, together
from engine.towers import Towers
from utils import Parser, run_cli, set_seed, write_json


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of train.py that make sense here, and --ckpt."""
    parser = Parser(description=__doc__.split("\n\n")[0], formatter_class=Formatter)
    add_data_flags(parser, obj="Brain")
    add_model_flags(parser, from_checkpoint=True)
    parser.add_argument("--ckpt", help="checkpoint (default: <save_path>/<obj>.pth)")
    parser.add_argument(
        "--prompt_name", type=words, help="what the prompts call the object (default: as the checkpoint was trained)"
    )
    parser.add_argument(
        "--allow_other_weights", action="store_true", help="only warn of other CLIP weights than it was trained on"
    )
    parser.add_argument(
        "--figures", help="folder for PNG and SVG: images with heat maps, ROC, PR, histogram, curves of the run"
    )
    parser.add_argument("--report", help="folder for a page (index.html) with numbers, figures and every image")
    parser.add_argument(
        "--history", help="metrics.jsonl for the run's curves (default: the checkpoint's, if it is there)"
    )
    return parser.parse_args(arguments)


def default_checkpoint(save_path: str, obj: str) -> Path:
    """<save_path>/<obj>.pth, or <obj>.tar.pth, as one of the released checkpoints is called."""
    path = Path(save_path) / f"{obj}.pth"
    released = path.with_suffix(".tar.pth")
    return released if released.is_file() and not path.is_file() else path


def masks_note(settings: Settings, dataset: MedicalDataset) -> str | None:
    """A line where only one of the two data sets has masks; None where both or none have."""
    if settings.pixel_metrics == dataset.pixel_metrics:
        return None
    if settings.pixel_metrics:
        return f"{dataset.obj} has no masks: no pixel metrics; images score as trained, by their highest pixel"
    return (
        f"{settings.obj} has no masks, so the checkpoint's segmentation heads are untrained: no pixel metrics; images "
        f"score as trained, by the detection heads"
    )


def test(options: argparse.Namespace, towers: Towers | None = None) -> dict[str, Any]:
    """Arguments -> checkpoint -> metrics, which are printed, written where asked for, and returned.

    `towers` are shared with other runs of this process.
    """
    set_seed(options.seed)
    if options.out_json and distributed.is_main():
        writable(options.out_json, "--out_json")
    if options.figures:
        writable(Path(options.figures) / f"{options.obj}.png", "--figures")
    if options.report:
        writable(Path(options.report) / "index.html", "--report")
    history = read_history(options.history) if options.history else None
    dataset = MedicalDataset.open(options.obj, options.data_path, options.data_root)
    ckpt = options.ckpt or default_checkpoint(options.save_path, options.obj)

    loaded = load_detector(
        ckpt, options, lambda: dataset, partial(check_against, options=options),
        towers.clip if towers else create_model,
    )  # fmt: skip
    checkpoint, settings, clip, detector = loaded.checkpoint, loaded.settings, loaded.clip, loaded.detector
    samples = dataset.samples("test")
    store = (towers.store if towers else make_store)(options, clip, detector)
    store.prepare([Item(sample) for sample in samples])
    store.release_tower()
    sheet = Sheet(samples, settings.img_size) if options.figures else None
    report = Report(settings, options.obj) if options.report else None
    found = evaluate(detector, store, samples, full=True, on_batch=together(sheet, report))

    select = checkpoint.about["select"]
    epoch = checkpoint.about.get("metrics", {}).get("epoch", "unknown")
    print(f"{options.obj}: {len(samples)} test images")
    for note in (dataset.split_note(), masks_note(settings, dataset)):
        if note:
            print(note)
    print(
        f"{ckpt}: trained on {settings.obj}, tested on {options.obj}, epoch {epoch}, --select {select}; "
        f"the prompts say {settings.prompt_name!r}"
    )
    print(found.line())
    for name, value in found.more.items():
        text = " to ".join(f"{v:.4f}" for v in value) if isinstance(value, list) else f"{value:.4f}"
        print(f"  {name}: {text}")
    result = {**result_json(settings, found, select), "obj": options.obj, "trained_on": settings.obj}
    if threshold := checkpoint.about.get("threshold"):
        here = figures(found.labels, found.scores, threshold["value"])
        result["decision"] = {**threshold, "on_test": here}
        print(describe_threshold(threshold))
        print(f"  on the test set: sensitivity {here['tpr']:.4f}, false positive rate {here['fpr']:.4f}")
    if options.out_json and distributed.is_main():
        write_json(options.out_json, result, "--out_json")
    if distributed.is_main():
        about = {"checkpoint": str(ckpt), **checkpoint.about}
        history = find_history(about) if history is None else history
        if sheet:
            save_figures(options.figures, options.obj, sheet, found, about, history)
            print(f"pictures: {options.figures}")
        if report:
            print(f"report: {report.save(options.report, found, about, history)}")
    print(published_lines(options.obj, found))
    return result


def main() -> None:
    """Command line."""
    distributed.start()
    test(parse())


if __name__ == "__main__":
    run_cli(main)
