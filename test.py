"""Test a MadCLIP checkpoint.

    python test.py --obj Liver                                  the checkpoint ckpt/Liver.pth on Liver's test set
    python test.py --obj Brain --ckpt FILE --out_json result.json --figures pictures
    python test.py --obj Liver --ckpt ckpt/Brain.pth            trained on one data set, tested on another
    python test.py --obj Brain --scores FILE --report page      from the patch scores of --save_scores, no network

Flags -> checkpoint -> patch scores -> metrics. The model's settings are read from the checkpoint.
"""

from engine.files.config import test_options as parse
from utils import run_script

if __name__ == "__main__":  # flags are parsed before torch is imported: --help and errors in flags answer at once
    run_script("test", parse)

import argparse
from dataclasses import replace
from typing import Any

from dataset.medical_few import MedicalDataset
from engine import distributed
from engine.calibration import describe_threshold, threshold_metrics
from engine.detector import Detector
from engine.distributed import pick_autocast, pick_device
from engine.evaluation import Masks, evaluate, own_batches
from engine.features import TokenStore
from engine.files.checkpoint import Checkpoint, default_checkpoint, find_trained_weights
from engine.files.config import check_against
from engine.files.published import facts_of
from engine.files.run import check_outputs, describe_test, published_lines, read_as_trained, result_json, shot_patients
from engine.files.scores import READ, Scored, plain
from engine.metrics import measure
from engine.report.figures import plots, read_history, save_figures, sheet
from engine.report.page import write_page
from utils import set_seed, write_json


def main(options: argparse.Namespace) -> None:
    """Run the command."""
    distributed.start()
    test(options)


def test(options: argparse.Namespace) -> dict[str, Any]:
    """Compute the patch scores, or load them (--scores), and measure them; prints, writes and returns the result."""
    set_seed(options.seed)
    scored = Scored.load(options.scores).with_pictures(options) if options.scores else None
    check_outputs(options)
    scored = scored or compute_scores(options)
    evaluation, masks, settings, metadata = scored.evaluation, scored.masks, scored.settings, scored.metadata
    if options.save_scores and distributed.is_main():
        scored.save(options.save_scores)

    threshold, patients, unknown = metadata.get("threshold") or {}, scored.source["patients"], scored.source["unknown"]
    without = None if patients is None else set(patients)
    metrics = measure(evaluation, masks, full=True, pixel_threshold=threshold.get("pixel_value"), without=without)
    result = {**result_json(settings, evaluation, metrics, metadata["select"]), "obj": options.obj}
    result |= {"trained_on": settings.obj, "without_shot_patients": unknown or "measured"}
    print(scored.source["words"])
    print(metrics.table())
    if patients is None:
        print(f"  without the shots' patients: not known ({unknown})")
    if threshold:
        here = threshold_metrics(evaluation.labels, evaluation.image_scores, threshold["value"])
        result["decision"] = {**threshold, "on_test": here}
        print(describe_threshold(threshold))
        print(f"  on the test set: sensitivity {here['tpr']:.4f}, false positive rate {here['fpr']:.4f}")
    if distributed.is_main():
        figures = plots(evaluation, metrics, metadata, read_history(options.ckpt) if options.ckpt else [])
        if options.out_json:
            write_json(options.out_json, result, "--out_json")
        if options.figures:
            save_figures(options.figures, options.obj, sheet(evaluation, masks), figures)
            print(f"pictures: {options.figures}")
        if options.report:
            details = (settings, metadata, figures, options.obj, unknown)
            page = write_page(options.report, evaluation, masks, metrics, *details)
            print(f"report: {page}")
    print(published_lines(options.obj, metrics))
    return result


def compute_scores(options: argparse.Namespace) -> Scored:
    """Score the test images with the checkpoint; the result also says, in words, what was scored."""
    options.ckpt = options.ckpt or str(default_checkpoint(options.save_path, options.obj))
    checkpoint = Checkpoint.load(options.ckpt, options, lambda: facts_of(MedicalDataset.from_options(options)))
    trained, metadata = checkpoint.settings, checkpoint.metadata
    check_against(trained, metadata, options)
    read_as_trained(options, trained, metadata)
    dataset = MedicalDataset.from_options(options)
    prompt_name = options.prompt_name or trained.prompt_name
    settings = replace(trained, prompt_name=prompt_name, mask_above=dataset.layout.mask_above)
    patients, unknown = shot_patients(trained, metadata, dataset)
    samples = dataset.samples("test")
    if options.anonymous:
        metadata = {name: value for name, value in metadata.items() if name not in ("shots", "shot_patients")}
    device = pick_device(options.device)
    weights = find_trained_weights(checkpoint, options)
    store = TokenStore(settings, weights, pick_autocast(options.precision, device), device, options)
    store.plan((), own_batches(samples, settings, device))
    clip = store.load_clip()
    detector = Detector(clip, settings).to(device)
    checkpoint.restore(detector, clip, options.ckpt)
    masks = Masks.of(samples, settings, options.num_workers, device) if dataset.pixel_metrics else None
    store.fill(clip)
    evaluation = evaluate(detector, store, samples)
    source = {
        "words": describe_test(options, dataset, settings, metadata, len(samples)),
        "obj": dataset.obj, "anonymous": options.anonymous,
        "read": {name: plain(getattr(dataset.layout, name)) for name in READ},
        "patients": None if patients is None else sorted(patients), "unknown": unknown,
    }  # fmt: skip
    return Scored(evaluation, masks, settings, metadata, source)
