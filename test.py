"""Test a MadCLIP checkpoint.

    python test.py --obj Liver                                  the checkpoint ckpt/Liver.pth on Liver's test set
    python test.py --obj Brain --ckpt FILE --out_json result.json --figures pictures
    python test.py --obj Liver --ckpt ckpt/Brain.pth            trained on one data set, tested on another
    python test.py --obj Brain --scores FILE --report page      from patch scores kept with --save_scores, no network

Flags -> checkpoint -> patch scores -> numbers. Everything that shaped the checkpoint is read from it.
"""

from __future__ import annotations

from engine.files.config import test_options as parse
from utils import run_script

if __name__ == "__main__":  # reads the flags before it imports torch: --help and a mistyped flag take no time
    run_script("test", parse)

import argparse
from typing import Any

from dataset.medical_few import MedicalDataset, anonymous
from engine import distributed
from engine.calibration import describe_threshold, threshold_metrics
from engine.detector import Detector
from engine.evaluation import Evaluation, Masks, evaluate, load_evaluation, own_batches
from engine.features import TokenStore, Tower
from engine.files.checkpoint import Checkpoint, check_metadata, default_checkpoint, find_trained_weights
from engine.files.config import Settings, check_against, pick_autocast, pick_device
from engine.files.run import check_outputs, describe_test, published_lines, result_json, shot_patients
from engine.metrics import measure, measure_without, patient_metrics
from engine.report.figures import read_history, save_figures
from engine.report.page import write_page
from utils import InputError, set_seed, write_json


def main(options: argparse.Namespace) -> None:
    """What the command does."""
    distributed.start()
    test(options)


def test(options: argparse.Namespace) -> dict[str, Any]:
    """Flags -> patch scores, computed or kept -> numbers, which are printed, written where asked for, and returned."""
    set_seed(options.seed)
    check_outputs(options)
    evaluation, masks, settings, metadata, source = (kept_scores if options.scores else compute_scores)(options)
    if options.save_scores and distributed.is_main():
        evaluation.save(options.save_scores, masks, settings=settings.to_dict(), metadata=metadata, source=source)

    threshold = metadata.get("threshold") or {}
    metrics = measure(evaluation, masks, full=True, pixel_threshold=threshold.get("pixel_value"))
    metrics.values.update(measure_without(evaluation, masks, shot_patients(settings, metadata, options.obj)))
    metrics.values.update(patient_metrics(evaluation))
    result = {**result_json(settings, evaluation, metrics, metadata["select"]), "obj": options.obj}
    result["trained_on"] = settings.obj
    print(source)
    print(metrics.table())
    if threshold:
        here = threshold_metrics(evaluation.labels, evaluation.image_scores, threshold["value"])
        result["decision"] = {**threshold, "on_test": here}
        print(describe_threshold(threshold))
        print(f"  on the test set: sensitivity {here['tpr']:.4f}, false positive rate {here['fpr']:.4f}")
    if distributed.is_main():
        history = read_history(options.ckpt) if options.ckpt else []
        if options.out_json:
            write_json(options.out_json, result, "--out_json")
        if options.figures:
            save_figures(options.figures, options.obj, evaluation, masks, metrics, metadata, history)
            print(f"pictures: {options.figures}")
        if options.report:
            page = write_page(options.report, evaluation, masks, metrics, settings, metadata, history, options.obj)
            print(f"report: {page}")
    print(published_lines(options.obj, metrics))
    return result


Scores = tuple[Evaluation, Masks | None, Settings, dict[str, Any], str]


def compute_scores(options: argparse.Namespace) -> Scores:
    """Data, checkpoint, towers, tokens, patch scores; and in words what was tested."""
    dataset = MedicalDataset.from_options(options)
    options.ckpt = options.ckpt or str(default_checkpoint(options.save_path, options.obj))
    checkpoint = Checkpoint.load(options.ckpt, options, dataset)
    check_against(checkpoint.settings, checkpoint.metadata, options)
    settings = checkpoint.settings.tested_with(options)
    device = pick_device(options.device)
    weights = find_trained_weights(checkpoint, options)
    samples = anonymous(dataset.samples("test")) if options.anonymous else dataset.samples("test")
    store = TokenStore(Tower.of(settings, weights, pick_autocast(options.precision, device), device), options)
    store.plan((), own_batches(samples, settings, device))
    clip = store.load_clip()
    detector = Detector(clip, settings).to(device)
    checkpoint.restore(detector, clip, options.ckpt)
    masks = Masks.of(samples, settings, options.num_workers, device) if dataset.pixel_metrics else None
    store.fill(clip)
    evaluation = evaluate(detector, store, samples)
    source = describe_test(options, dataset, settings, checkpoint.metadata, len(samples))
    return evaluation, masks, settings, checkpoint.metadata, source


def kept_scores(options: argparse.Namespace) -> Scores:
    """What --save_scores kept; pictures come from the data set, where it is there."""
    evaluation, masks, metadata = load_evaluation(options.scores)
    settings = check_metadata(metadata.get("settings"), metadata.get("metadata"), f"--scores {options.scores}")
    try:
        evaluation = evaluation.with_pictures(MedicalDataset.from_options(options))
    except InputError as error:
        print(f"no pictures: {error}")
    return (
        evaluation,
        masks,
        settings,
        metadata["metadata"],
        f"{metadata.get('source')}\nscores kept in {options.scores}",
    )
