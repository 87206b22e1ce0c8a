"""Score one's own images with a MadCLIP checkpoint. Research use, not a medical device.

    python predict.py --ckpt ckpt/Brain.pth scan.png more_scans/ --out predictions --report page
    python predict.py --ckpt ckpt/Liver.pth series/ --window 40 400 --group_by series --out predictions
    python predict.py --ckpt ckpt/Brain.pth head.nii.gz --plane coronal --out predictions
    python predict.py --ckpt ckpt/Brain.pth --calibrate labelled --threshold_at tpr=0.95 --save_ckpt Brain-95.pth

For each image: the score, the decision at the checkpoint's threshold, the heat map (overlay and raw) and its contours;
of volumes and DICOM series the heat map in the scan's own space too. A run that was stopped goes on with the same
command. Exit codes: 0 all was read, 1 some could not be read, 2 nothing was done. docs/predict.md describes the files.
"""

from __future__ import annotations

from engine.files.predict_options import predict_options as parse
from utils import run_script

if __name__ == "__main__":  # reads the flags before it imports torch: --help and a mistyped flag take no time
    run_script("predict", parse)

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dataset.layout import BENCHMARKS, object_of
from dataset.medical_few import MedicalDataset
from dataset.readers.grey import Picture
from dataset.readers.images import picture_notes
from engine.calibration import describe_threshold
from engine.files.checkpoint import read as read_file
from engine.predictor import Prediction, Predictor, build, read_checkpoint
from engine.report.page import Card
from engine.report.predictions import Drawer, Results, Row, summary, write_page
from engine.scans import Entry, InputList, list_entries, series_notes
from utils import InputError, bar_seconds, prefetch, printable, probe_writable, sha256_file, show_traceback, warn

NOTE = "research use, not a medical device"
WEAK = "weak localisation from the detection heads, not measured"
GROUP_NOTE = (
    "a group is abnormal if its largest score is; the threshold was calibrated for single images, so that the more "
    "images a group has, the more often one exceeds it by chance"
)
SIDE = 1024  # pixels of an overlay's longer side, at most
NAMES = {"dicom": "DICOM", "nifti": "NIfTI", "pillow": "picture"}
MACHINE = {"images", "device", "num_workers", "batch_size", "out"}  # flags that leave the rows as they are


def main(options: argparse.Namespace) -> int:
    """Checkpoint -> images -> files; the exit code."""
    if options.save_ckpt:
        probe_writable(options.save_ckpt, "--save_ckpt", "checkpoint", read_file)
    checkpoint = read_checkpoint(options)
    trained = checkpoint.settings.read_options
    reading = replace(trained, window=options.window or trained.window, plane=options.plane or trained.plane)
    listing = list_entries(options.images, reading, options.anonymous)
    if options.images and not listing.entries and len(listing.faults) == 1:
        raise listing.faults[0]
    for line in listing.no_image:
        say(line)
    for fault in listing.faults:
        skip(fault)
    for count, words in ((listing.own, "results of an earlier run"), (listing.masks, "masks of images")):
        if count:
            say(f"{count} files are {words}, and left out")
    if options.images and not listing.entries:
        if listing.faults:
            raise InputError(f"{len(listing.faults)} files could not be read, see above; no image is left")
        nothing = f"no image in any of {len(listing.no_image)} files" if listing.no_image else "no image in it"
        raise InputError(f"{options.images[0]}: {nothing}")
    for line in series_notes(listing.entries):
        say(line)
    command = {name: value for name, value in vars(options).items() if name not in MACHINE}
    results = None
    if options.images:
        results = Results(options, json.dumps([command, sha256_file(options.ckpt)]), listing.entries)
    model = build(checkpoint, options)
    model.reading = reading
    if options.calibrate:
        calibrate(model, options)
    return predict(model, results, listing, options) if results else 0


def calibrate(model: Predictor, options: argparse.Namespace) -> None:
    """Set the thresholds on labelled images, print and keep them."""
    folder, reading = Path(options.calibrate), model.reading
    try:
        name = object_of(folder)
    except InputError:  # its name cannot be a data set's, and none is needed
        name = "calibration"
    dataset = MedicalDataset.open(name, folder.parent, folder, window=reading.window, plane=reading.plane)
    model.calibrate(dataset, options.threshold_at or "f1", options.batch_size, options.num_workers)
    print(describe_threshold(model.calibration))
    if options.save_ckpt:
        model.save(options.save_ckpt)
        print(f"{options.save_ckpt}: the checkpoint with these thresholds")


def predict(model: Predictor, results: Results, listing: InputList, options: argparse.Namespace) -> int:
    """Images -> rows, pictures, page; the exit code."""
    for line in describe(model):
        print(line)
    for line in reading_notes(model, listing):
        warn(line)
    total, start = len(results.todo), time.perf_counter()
    if total < len(listing.entries):
        print(f"{len(listing.entries) - total} images are predicted already: going on with the others")
    drawer, remarks, bad = Drawer(options, model), set[str](), set[Path]()

    def predicted() -> Iterator[tuple[Entry, Picture, Prediction]]:
        frames = (entry.frame for entry in results.todo)
        found = model.stream(frames, options.batch_size, options.num_workers, SIDE)
        for entry, result in zip(results.todo, found, strict=True):
            if not isinstance(result, InputError):
                yield entry, *result
            elif entry.frame.path not in bad:  # a file of many frames is said once
                bad.add(entry.frame.path)
                listing.faults.append(result)
                skip(result)

    def draw(item: tuple[Entry, Picture, Prediction]) -> tuple[Entry, Row, Card | None]:
        entry, picture, prediction = item
        picture.notes.update(picture_notes(picture.image))
        for kind, text in picture.notes.items():
            if kind not in remarks:  # once; the tables have them all
                remarks.add(kind)
                say(f"{entry.file}: {text}")
        return entry, *drawer.draw(entry, picture, prediction)

    with tqdm(total=total, desc="predict", unit="image", mininterval=bar_seconds()) as bar:
        drawn = prefetch(draw, predicted(), options.num_workers, ahead=4)
        for series, members in groupby(drawn, key=lambda item: item[0].series):
            done = []
            for item in members:
                done.append(item)
                bar.update()
            drawer.finish(series)
            results.add(done)
    seconds = time.perf_counter() - start
    rows = results.close(describe_run(model, listing, options), model.threshold)
    if options.report:
        print(f"report: {write_page(results, rows, model)}")
    results.remove_partial()
    if options.group_by:
        print(f"groups: {options.out}/groups.csv; {GROUP_NOTE}")
    counts = f"{len(rows)} images" if model.threshold is None else summary(rows)
    print(f"{counts}; {total / seconds:.1f} images a second; {options.out}/predictions.csv and .json ({NOTE})")
    if listing.faults:
        say(f"{len(listing.faults)} files could not be read, see above")
    return 1 if listing.faults else 0


def describe(model: Predictor) -> Iterator[str]:
    """What is to be known of the results before one looks at them."""
    if model.threshold is None:
        yield "decisions: none, as the checkpoint has no threshold; give one with --threshold or --calibrate"
    if model.weak:
        yield f"heat maps: weak localisation only, as the checkpoint was trained without masks ({model.settings.obj})"
    if model.detector.adapters.mixes_images:
        yield "scores: MViTFC as published looks across the images of a batch, so they depend on --batch_size"


def reading_notes(model: Predictor, listing: InputList) -> Iterator[str]:
    """Where these images are read in another way than those of the training, in words."""
    settings, kinds = model.settings, {entry.kind for entry in listing.entries}
    known = {"pillow"} if settings.obj in BENCHMARKS else set((settings.reading or {}).get("formats") or kinds)
    if not kinds <= known:
        before, now = (", ".join(NAMES[kind] for kind in sorted(group)) for group in (known, kinds - known))
        yield f"the checkpoint was trained on {before} files, not on {now}: scores and threshold may not hold"
    for name in ("window", "plane") if settings.reading else ():
        given, trained = getattr(model.reading, name), getattr(settings.read_options, name)
        if given != trained:
            yield f"--{name} {given}, but training read images with {trained}: scores and threshold may not hold"


def describe_run(model: Predictor, listing: InputList, options: argparse.Namespace) -> dict[str, Any]:
    """What predictions.json says beside its rows."""
    hidden = options.anonymous
    return {
        "note": NOTE, "group_note": GROUP_NOTE, "checkpoint": Path(options.ckpt).name if hidden else options.ckpt,
        "settings": model.settings.to_dict(), "calibration": model.calibration, "heat_range": model.heat_range,
        "heat": WEAK if model.weak else "segmentation heads", "window": model.reading.window,
        "plane": model.reading.plane, "no_image": len(listing.no_image) if hidden else listing.no_image,
        "not_read": len(listing.faults) if hidden else [str(fault) for fault in listing.faults],
    }  # fmt: skip


def skip(fault: InputError) -> None:
    """Say which file is left out, and why; with --debug also where in the program that was found."""
    say(f"skipped: {fault}")
    show_traceback(fault)


def say(text: str) -> None:
    """A line on stderr, above the progress bar."""
    tqdm.write(printable(text), file=sys.stderr)
