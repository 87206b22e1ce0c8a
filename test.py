"""Test a MadCLIP checkpoint.

    python test.py --obj Liver                                  the checkpoint ckpt/Liver.pth on Liver's test set
    python test.py --obj Brain --ckpt FILE --out_json result.json --figures pictures

Arguments -> checkpoint -> metrics. Everything that shaped the checkpoint is read from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from CLIP import create_model
from dataset import MedicalDataset
from engine import distributed
from engine.checkpoint import Checkpoint, check_weights
from engine.detector import Detector, Settings
from engine.evaluate import evaluate, published_lines, result_json
from engine.features import Item
from engine.options import (
    Formatter,
    add_data_flags,
    add_model_flags,
    check_against,
    make_store,
    pick_device,
    say_weights,
    writable,
)
from engine.page import Report, read_history
from engine.published import encoder_difference, features_difference, infer_settings
from engine.report import Sheet, together
from utils import InputError, run_cli, set_seed, write_json


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of train.py that make sense here, and --ckpt."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=Formatter)
    add_data_flags(parser, obj="Brain")
    add_model_flags(parser, from_checkpoint=True)
    parser.add_argument("--ckpt", help="checkpoint (default: <save_path>/<obj>.pth)")
    parser.add_argument(
        "--allow_other_weights", action="store_true", help="only warn of other CLIP weights than it was trained on"
    )
    parser.add_argument("--figures", help="folder for pictures: test images beside masks and heat maps")
    parser.add_argument("--report", help="folder for a page with numbers, figures and every image (index.html)")
    parser.add_argument("--history", help="metrics.jsonl of the run, for its curves in --report")
    return parser.parse_args(arguments)


def default_checkpoint(save_path: str, obj: str) -> Path:
    """<save_path>/<obj>.pth, or <obj>.tar.pth, as one of the released checkpoints is called."""
    path = Path(save_path) / f"{obj}.pth"
    released = path.with_suffix(".tar.pth")
    return released if released.is_file() and not path.is_file() else path


def main() -> None:
    """Arguments -> checkpoint -> metrics."""
    distributed.start()
    options = parse()
    set_seed(options.seed)
    device = pick_device(options.device)
    if options.out_json:
        writable(options.out_json, "--out_json")
    figures = writable(Path(options.figures) / f"{options.obj}.png", "--figures") if options.figures else None
    if options.report:
        writable(Path(options.report) / "index.html", "--report")
    history = read_history(options.history) if options.history else None
    dataset = MedicalDataset.open(options.obj, options.data_path, options.data_root)
    ckpt = options.ckpt or default_checkpoint(options.save_path, options.obj)

    def infer(parts: dict[str, Any]) -> Settings:
        settings, words = infer_settings(parts, ckpt, dataset, options)
        print(f"{ckpt}: {words}")
        return settings

    checkpoint = Checkpoint.load(ckpt, infer)
    settings = checkpoint.settings
    check_against(settings, options)
    if dataset.pixel_metrics != settings.pixel_metrics:
        raise InputError(f"--obj {options.obj} and {ckpt}, trained on {settings.obj}: only one of them has masks")
    samples = dataset.samples("test")

    clip = create_model(
        settings.model_name, settings.pretrain, settings.img_size, weights=options.weights,
        fidelity=settings.fidelity, seed=checkpoint.about.get("options", {}).get("seed", options.seed), device=device,
    )  # fmt: skip
    say_weights(clip)
    check_weights(checkpoint, clip.info.sha256, clip.info.source, ckpt, options.allow_other_weights)
    difference = encoder_difference(checkpoint.parts, clip)
    if difference:
        print(f"{ckpt}: its text encoder differs by up to {difference:.3g} from the CLIP weights, which are used")
    detector = Detector(clip, settings).to(device)
    checkpoint.restore(detector, ckpt)
    difference = features_difference(checkpoint.parts, detector)
    if difference:
        print(
            f"{ckpt}: its text features differ by up to {difference:.3g} from those of the CLIP weights, which are used"
        )
    store = make_store(options, clip, detector)
    store.prepare([Item(sample) for sample in samples])
    store.release_tower()
    sheet = Sheet(samples, settings.img_size) if options.figures else None
    report = Report(samples, settings) if options.report else None
    found = evaluate(detector, store, samples, full=True, on_batch=together(sheet, report))

    select = checkpoint.about["select"]
    epoch = checkpoint.about.get("metrics", {}).get("epoch", "unknown")
    print(f"{options.obj}: {len(samples)} test images")
    if note := dataset.split_note():
        print(note)
    print(f"{ckpt}: trained on {settings.obj}, epoch {epoch}, --select {select}")
    print(found.line())
    for name, value in found.more.items():
        words = " to ".join(f"{v:.4f}" for v in value) if isinstance(value, list) else f"{value:.4f}"
        print(f"  {name}: {words}")
    if options.out_json:
        write_json(options.out_json, result_json(settings, found, select), "--out_json")
    if sheet:
        print(f"pictures: {sheet.save(figures)}")
    if report:
        print(f"report: {report.save(options.report, found, {'checkpoint': str(ckpt), **checkpoint.about}, history)}")
    print(published_lines(options.obj, found))


if __name__ == "__main__":
    run_cli(main)
