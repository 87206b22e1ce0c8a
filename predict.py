"""Score your own images with a MadCLIP checkpoint. Research use, not a medical device.

    python predict.py --ckpt ckpt/Brain.pth scan.png more_scans/ --out predictions --report page
    python predict.py --ckpt ckpt/Liver.pth series/ --window 40 400 --group_by series --out predictions
    python predict.py --ckpt ckpt/Brain.pth head.nii.gz --plane coronal --out predictions
    python predict.py --ckpt ckpt/Brain.pth --calibrate labelled --threshold_at tpr=0.95 --save_ckpt Brain-95.pth

Writes for each image the score, the decision at the checkpoint's threshold, the heat map (overlay and raw) and its
contours; for volumes and DICOM series also the heat map in the scan's own space. The same command continues a stopped
run. Exit codes: 0 all images were read, 1 some could not be read, 2 nothing was done. Files: see docs/predict.md.
"""

from engine.files.config import predict_options as parse
from utils import run_script

if __name__ == "__main__":  # flags are parsed before torch is imported: --help and errors in flags answer at once
    run_script("predict", parse)

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dataset.layout import BENCHMARKS
from dataset.medical_few import MedicalDataset
from dataset.readers.grey import Picture
from dataset.readers.images import file_kind, picture_notes
from engine.calibration import describe_threshold
from engine.files.checkpoint import read_file
from engine.predictor import Prediction, Predictor, build, read_checkpoint
from engine.report.predictions import GROUP_NOTE, NOTE, Results, summary
from engine.scans import Entry, list_entries
from utils import InputError, bar_seconds, prefetch, printable, probe_writable, show_traceback, warn

SIDE = 1024  # maximum length of an overlay's longer side, in pixels
NAMES = {"dicom": "DICOM", "nifti": "NIfTI", "pillow": "picture"}


def main(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if options.save_ckpt:
        probe_writable(options.save_ckpt, "--save_ckpt", "checkpoint", read_file)
    checkpoint = read_checkpoint(options)
    trained = checkpoint.settings.read_options
    reading = replace(trained, window=options.window or trained.window, plane=options.plane or trained.plane)
    listing = list_entries(options.images, reading, options.anonymous)
    for line in (*listing.no_image, *listing.remarks):
        say(line)
    faults, nothing = list(listing.faults.values()), bool(options.images) and not listing.entries
    for fault in faults[nothing:]:
        skip(fault)
    if nothing:
        raise faults[0] if faults else InputError(f"{options.images[0]}: no image in it")
    if options.images:
        probe_writable(Path(options.out) / "predictions.csv", "--out")
    model = build(checkpoint, options)
    model.reading = reading
    results = Results(options, model, listing) if options.images else None
    if options.calibrate:
        calibrate(model, options)
    return predict(results) if results else 0


def calibrate(model: Predictor, options: argparse.Namespace) -> None:
    """Calibrate the thresholds on labelled images, print them and, with --save_ckpt, save them."""
    folder, reading = Path(options.calibrate), model.reading
    name = folder.absolute().name.removesuffix("_AD")
    dataset = MedicalDataset.open(name, folder.parent, folder, window=reading.window, plane=reading.plane)
    model.calibrate(dataset, options.threshold_at or "f1", options.batch_size, options.num_workers)
    print(describe_threshold(model.calibration))
    if options.save_ckpt:
        metadata = {**model.checkpoint.metadata, "threshold": model.calibration}
        replace(model.checkpoint, metadata=metadata).save(options.save_ckpt)
        print(f"{options.save_ckpt}: the checkpoint with these thresholds")


def predict(results: Results) -> int:
    """Predict the images and write the tables, pictures and page; returns the exit code."""
    options, model, listing = results.options, results.model, results.listing
    if model.threshold is None:
        print("decisions: none, as the checkpoint has no threshold; give one with --threshold or --calibrate")
    if model.weak:
        print(f"heat maps: weak localisation only, as the checkpoint was trained without masks ({model.settings.obj})")
    if model.network.adapters.mixes_images:
        print("scores: MViTFC as published attends across the images of a batch, so they depend on --batch_size")
    for line in reading_notes(model, listing.entries):
        warn(line)
    todo, start = results.todo, time.perf_counter()
    if len(todo) < len(listing.entries):
        print(f"{len(listing.entries) - len(todo)} images are predicted already: going on with the others")
    remarks = set[str]()

    def draw(item: tuple[Entry, tuple[int, tuple[Picture, Prediction] | InputError]]) -> tuple[Entry, Any]:
        entry, (_, outcome) = item
        if isinstance(outcome, InputError):
            return entry, outcome
        picture, prediction = outcome
        picture.notes.update(picture_notes(picture.image))
        return entry, (picture.notes, prediction, *results.draw(entry, picture, prediction))

    with tqdm(total=len(todo), desc="predict", unit="image", mininterval=bar_seconds()) as bar:
        stream = model.stream(todo, options.batch_size, options.num_workers, SIDE)
        drawn = prefetch(draw, zip(todo, stream, strict=True), options.num_workers, ahead=4)
        for _, members in groupby(drawn, key=lambda item: item[0].series):
            images = []
            for entry, outcome in members:
                bar.update()
                if not isinstance(outcome, InputError):
                    notes, *made = outcome
                    for kind in [kind for kind in notes if kind not in remarks]:  # print each once; the tables have all
                        remarks.add(kind)
                        say(f"{entry.file}: {notes[kind]}")
                    images.append((entry, *made))
                elif entry.path not in listing.faults:  # report a file of many frames only once
                    listing.faults[entry.path] = outcome
                    skip(outcome)
            results.add(images)
    rate = len(todo) / (time.perf_counter() - start)
    rows = results.close()
    if options.group_by:
        print(f"groups: {options.out}/groups.csv; {GROUP_NOTE}")
    counts = f"{len(rows)} images" if model.threshold is None else f"{', '.join(summary(rows))} abnormal"
    print(f"{counts}; {rate:.1f} images a second; {options.out}/predictions.csv and .json ({NOTE})")
    if listing.faults:
        say(f"{len(listing.faults)} file{'s' * (len(listing.faults) > 1)} could not be read, see above")
    return 1 if listing.faults else 0


def reading_notes(model: Predictor, entries: Sequence[Entry]) -> Iterator[str]:
    """Warnings, if these images are read differently from the training images."""
    settings, kinds = model.settings, {str(file_kind(entry.path)) for entry in entries}
    known = set((settings.reading or {}).get("formats") or ({"pillow"} if settings.obj in BENCHMARKS else kinds))
    if not kinds <= known:
        before, now = (", ".join(NAMES[kind] for kind in sorted(group)) for group in (known, kinds - known))
        yield f"the checkpoint was trained on {before} files, not on {now}: scores and threshold may not hold"
    for name in ("window", "plane") if settings.reading else ():
        given, trained = getattr(model.reading, name), getattr(settings.read_options, name)
        if given != trained:
            yield f"--{name} {given}, but training read images with {trained}: scores and threshold may not hold"


def skip(fault: InputError) -> None:
    """Print which file is skipped, and why; with --debug, print the traceback too."""
    say(f"skipped: {fault}")
    show_traceback(fault)


def say(text: str) -> None:
    """Print a line on stderr, above the progress bar."""
    tqdm.write(printable(text), file=sys.stderr)
