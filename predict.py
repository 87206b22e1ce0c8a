"""Score one's own images with a MadCLIP checkpoint. Research use, not a medical device.

    python predict.py --ckpt ckpt/Brain.pth scan.png more_scans/ --out predictions
    python predict.py --ckpt ckpt/Liver.pth series.dcm --window 40 400 --out predictions
    python predict.py --ckpt ckpt/Brain.pth head.nii.gz --plane coronal --out predictions

For each image: the score, the decision at the checkpoint's threshold, the heat map (overlay and raw) and its contours.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from engine.heat import contours, overlay, raw
from engine.options import PRECISIONS, Formatter, filled_path, writable
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dataset.medical_few import to_tensor
from dataset.readers import PLANES, Frame, MissingPackageError, ReadOptions, frames, list_files
from engine.predictor import Prediction, Predictor, load
from utils import InputError, Parser, atomic_path, integer, prefetch, run_cli, write_json

NOTE = "research use, not a medical device"
COLUMNS = (
    "file",
    "frame",
    "score",
    "threshold",
    "abnormal",
    "width",
    "height",
    "regions",
    "overlay",
    "raw",
    "contours",
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = Parser(description=__doc__.split("\n\n")[0], formatter_class=Formatter)
    parser.add_argument("images", nargs="+", type=filled_path, metavar="IMAGE_OR_FOLDER",
                        help="PNG, JPEG, BMP, TIFF; DICOM (with pydicom), NIfTI (with nibabel)")  # fmt: skip
    parser.add_argument("--ckpt", required=True, help="checkpoint of train.py, or one in the published format")
    parser.add_argument("--out", required=True, type=filled_path, help="folder of the results")
    parser.add_argument("--threshold", type=float, help="abnormal is score >= threshold (default: the checkpoint's)")
    parser.add_argument(
        "--window", nargs=2, type=float, metavar=("CENTER", "WIDTH"), help="of gray values beyond 8 bits"
    )
    parser.add_argument("--plane", default="axial", choices=PLANES, help="in which NIfTI volumes are cut")
    parser.add_argument("--pictures", action=argparse.BooleanOptionalAction, default=True,
                        help="write heat maps and contours")  # fmt: skip
    parser.add_argument("--obj", help="of a published checkpoint: the data set that it was trained on")
    parser.add_argument("--weights", help="file with CLIP weights, instead of the one under CLIP/ckpt")
    parser.add_argument(
        "--allow_other_weights", action="store_true", help="only warn when these are not the trained ones"
    )
    parser.add_argument("--batch_size", type=integer(1, 65536), default=16, help="images through the network at a time")
    parser.add_argument("--num_workers", type=integer(1, 256), default=2, help="threads that decode images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS, help="auto: fp32 on a CPU")
    options = parser.parse_args(arguments)
    if options.window and not (options.window[1] > 0 and all(map(math.isfinite, options.window))):
        center, width = options.window
        raise InputError(f"--window {center:g} {width:g}: two finite numbers, and a width above 0")
    if options.threshold is not None and not math.isfinite(options.threshold):
        raise InputError(f"--threshold {options.threshold:g}: not a finite number")
    return options


class Writer:
    """Writes the results of an image as soon as they are known; predictions.csv grows, predictions.json comes last."""

    def __init__(self, out: Path, model: Predictor, pictures: bool) -> None:
        self.out, self.model, self.pictures = out, model, pictures and model.settings.pixel_metrics
        self.rows: list[dict[str, Any]] = []
        self.names: Counter[str] = Counter()
        self.file = writable(out / "predictions.csv", "--out").open("w", newline="", encoding="utf-8")
        self.table = csv.DictWriter(self.file, COLUMNS)
        self.table.writeheader()

    def add(self, frame: Frame, place: str, image: Image.Image | None, found: Prediction) -> None:
        """One image; `place` is its path below the input that it came from."""
        row: dict[str, Any] = dict.fromkeys(COLUMNS) | {
            "file": str(frame.path), "frame": frame.index, "score": found.score, "threshold": self.model.threshold,
            "abnormal": found.abnormal, "width": found.size[0], "height": found.size[1],
        }  # fmt: skip
        if self.pictures:
            row |= self.draw(self.stem(frame, place), image, found)
        self.rows.append(row)
        try:
            self.table.writerow(row)
            self.file.flush()
        except OSError as error:
            raise InputError(f"--out {self.file.name}: cannot be written ({error.strerror}; disk full?)") from error

    def stem(self, frame: Frame, place: str) -> str:
        """Names of the pictures, which no two images share."""
        clean = re.sub(r"[^\w./-]+", "_", place).replace("/", "__").strip(".")[-120:]
        name = clean if frame.index is None else f"{clean}_{frame.index:04d}"
        self.names[name] += 1
        return name if self.names[name] == 1 else self.stem(frame, f"{place}-{self.names[name]}")

    def draw(self, stem: str, image: Image.Image, found: Prediction) -> dict[str, Any]:
        """Overlay, raw heat map and contours as files."""
        level = self.model.pixel_threshold
        regions = [] if level is None else contours(found.heat, level, found.size)
        names = {kind: f"{stem}_{kind}" for kind in ("overlay.png", "raw.png", "contours.json")}
        pictures = {
            "overlay.png": overlay(image, found.heat, self.model.heat_range, regions),
            "raw.png": raw(found.heat, len(self.model.settings.features_list)),
        }
        for kind, picture in pictures.items():
            with atomic_path(self.out / names[kind], "--out") as path:
                picture.save(path, "PNG")
        write_json(
            self.out / names["contours.json"],
            {"pixel_threshold": level, "width": found.size[0], "height": found.size[1], "regions": regions}, "--out",
        )  # fmt: skip
        outer = sum(region["area"] > 0 for region in regions)
        return {"regions": outer, **{kind.split(".")[0]: name for kind, name in names.items()}}

    def close(self, options: argparse.Namespace) -> None:
        """Write predictions.json."""
        self.file.close()
        about = {"note": NOTE, "checkpoint": options.ckpt, "settings": self.model.settings.to_dict(),
                 "calibration": self.model.calibration, "heat_range": self.model.heat_range}  # fmt: skip
        write_json(self.out / "predictions.json", {**about, "predictions": self.rows}, "--out")


Opened = tuple[Frame, str, Image.Image | None, Tensor, tuple[int, int]]


def list_frames(options: argparse.Namespace) -> tuple[list[tuple[Frame, str]], list[str]]:
    """Every image with its path below its input, and what could not be read."""
    how = ReadOptions(tuple(options.window) if options.window else None, options.plane)

    def open_file(path: Path) -> list[Frame] | str:
        if not path.exists():
            return f"{path}: not found"
        try:
            return frames(path, how)
        except MissingPackageError:
            raise
        except InputError as error:
            return str(error)

    found, faults = [], []
    for path, place in list_files(options.images, skip=options.out):
        inside = open_file(path)
        if isinstance(inside, str):
            faults.append(inside)
        else:
            found += [(frame, place) for frame in inside]
    return found, faults


def batches(
    todo: Sequence[tuple[Frame, str]], faults: list[str], options: argparse.Namespace, size: int, keep: bool
) -> Iterator[list[Opened]]:
    """Images, read beside the network and a batch at a time; those that cannot be read are added to `faults`.

    `keep` also holds the picture itself, for the overlay.
    """

    def read(entry: tuple[Frame, str]) -> Opened | str:
        frame, place = entry
        try:
            image = frame.read()
        except InputError as error:
            return str(error)
        return frame, place, image if keep else None, to_tensor(image, size), image.size

    batch: list[Opened] = []
    for opened in prefetch(read, todo, options.num_workers, ahead=options.batch_size):
        if isinstance(opened, str):
            faults.append(opened)
            tqdm.write(f"skipped: {opened}", file=sys.stderr)
        else:
            batch.append(opened)
        if len(batch) == options.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def main() -> None:
    """Arguments -> checkpoint -> images -> files."""
    options = parse()
    todo, faults = list_frames(options)
    for fault in faults:
        print(f"skipped: {fault}", file=sys.stderr)
    if not todo:
        raise InputError(
            faults[0] if faults else f"{options.images[0]}: no image in it (PNG, JPEG, TIFF, DICOM, NIfTI)"
        )
    model = load(
        options.ckpt, options.device, weights=options.weights, precision=options.precision, obj=options.obj,
        threshold=options.threshold, allow_other_weights=options.allow_other_weights,
    )  # fmt: skip
    writer = Writer(options.out, model, options.pictures)
    if model.threshold is None:
        print("decisions: none, as the checkpoint has no threshold; give one with --threshold")
    if not model.settings.pixel_metrics:
        print(f"heat maps: none, as the checkpoint was trained without masks ({model.settings.obj})")
    if model.detector.adapters.mixes_images:
        print("scores: MViTFC as published looks across the images of a batch, so they depend on --batch_size")

    start = time.perf_counter()
    size = model.settings.img_size
    with tqdm(total=len(todo), desc="predict", unit="image", mininterval=1.0) as bar:
        for batch in batches(todo, faults, options, size, writer.pictures):
            images = torch.stack([tensor for *_, tensor, _ in batch])
            found = model.predict_tensors(images, [sizes for *_, sizes in batch])
            for (frame, place, image, *_), prediction in zip(batch, found, strict=True):
                writer.add(frame, place, image, prediction)
            bar.update(len(batch))
    writer.close(options)
    seconds, abnormal = time.perf_counter() - start, sum(bool(row["abnormal"]) for row in writer.rows)
    count = (
        f"{abnormal} of {len(writer.rows)} abnormal" if model.threshold is not None else f"{len(writer.rows)} images"
    )
    print(
        f"{count}, {len(writer.rows) / seconds:.1f} images a second; {options.out}/predictions.csv and .json ({NOTE})"
    )
    if faults:
        raise InputError(
            f"{len(faults)} of {len(writer.rows) + len(faults)} files or images could not be read, see above"
        )


if __name__ == "__main__":
    run_cli(main)
